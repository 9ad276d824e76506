"""Norms and inner products that are the same bits on every machine.

The kernels behind ``np.dot``, ``np.sum`` and ``linalg.norm`` add in an order of their own, which differs between
processors. Here it is given, in float32:

    products   p[j] = x[j] * y[j]
    lanes      s[l] = p[l] + p[LANES + l] + p[2 * LANES + l] + ..., from the left; what is missing at the end is zero
    halving    s[l] + s[LANES / 2 + l] for the first half of the lanes, and so on until one is left

Where that one's magnitude is not between SMALLEST_SUM and LARGEST_SUM, all of it is done again in float64, in which
nothing that a codec lets through is too large or too small. Otherwise an error is at most 2^-19 of the products'
magnitudes: no sum has more than 31 roundings, in a part of 256 Ki values.

Rules of this file: ``np.multiply`` and ``np.add`` on whole arrays, nothing that reduces.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from p2p_diloco.core.codec import Vector

LANES = 16384
"""So few that they stay in a processor's cache, and so many that numpy's calls cost little."""
SMALLEST_SUM = 2.0**-64
LARGEST_SUM = 2.0**64
"""Far from where float32 ends, at 2^-126 and 2^128."""


def squared_norms(vectors: Sequence[Vector]) -> list[float]:
    """Returns the squared norm of each of ``vectors``, float32 [n] each."""
    return [_inner_product(vector, vector) for vector in vectors]


def inner_products(vectors: Sequence[Vector], other: Vector) -> list[float]:
    """Returns the inner product of each of ``vectors`` with ``other``, float32 [n] each."""
    return [_inner_product(vector, other) for vector in vectors]


def _inner_product(x: Vector, y: Vector) -> float:
    with np.errstate(over="ignore", invalid="ignore"):
        total = _halved(_lanes(x, y))
    if SMALLEST_SUM <= abs(total) <= LARGEST_SUM:
        return total
    return _halved(_lanes(x.astype(np.float64), y.astype(np.float64)))


def _lanes(x: npt.NDArray[np.floating], y: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """Returns [LANES], of the type of ``x`` and ``y``."""
    sums = np.zeros(LANES, x.dtype)
    products = np.multiply(x, y)
    for start in range(0, len(x), LANES):
        there = products[start : start + LANES]
        np.add(sums[: len(there)], there, out=sums[: len(there)])
    return sums


def _halved(sums: npt.NDArray[np.floating]) -> float:
    left = len(sums)
    while left > 1:
        left //= 2
        np.add(sums[:left], sums[left : 2 * left], out=sums[:left])
    return float(sums[0])
