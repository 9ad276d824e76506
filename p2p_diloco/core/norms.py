"""Norms and inner products that are the same bits on every machine.

The kernels behind ``np.dot``, ``np.sum`` and ``linalg.norm`` add in an order of their own, which differs between
processors. Here it is given. The product of two float32 is exact in float64, and only sums round:

    products   p[j] = x[j] * y[j], in float64
    lanes      s[l] = p[l] + p[LANES + l] + p[2 * LANES + l] + ..., from the left; what is missing at the end is zero
    halving    s[l] + s[LANES / 2 + l] for the first half of the lanes, and so on until one is left

Rules of this file: ``np.multiply`` and ``np.add`` on whole arrays, nothing that reduces.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from p2p_diloco.core.codec import Vector

LANES = 4096
"""Small enough that eight vectors' stay in a processor's cache."""

Lanes = npt.NDArray[np.float64]


def squared_norms(vectors: Sequence[Vector]) -> list[float]:
    """Returns the squared norm of each of ``vectors``, float32 [n] each."""
    sums, values = _lanes(vectors), _lanes(vectors)
    for start in _starts(vectors):
        _take(vectors, start, values)
        np.multiply(values, values, out=values)
        np.add(sums, values, out=sums)
    return _halved(sums)


def inner_products(vectors: Sequence[Vector], other: Vector) -> list[float]:
    """Returns the inner product of each of ``vectors`` with ``other``, float32 [n] each."""
    sums, values, others = _lanes(vectors), _lanes(vectors), _lanes([other])
    for start in _starts(vectors):
        _take(vectors, start, values)
        _take([other], start, others)
        np.multiply(values, others, out=values)
        np.add(sums, values, out=sums)
    return _halved(sums)


def _lanes(vectors: Sequence[Vector]) -> Lanes:
    return np.zeros((len(vectors), LANES))


def _starts(vectors: Sequence[Vector]) -> range:
    return range(0, len(vectors[0]) if vectors else 0, LANES)


def _take(vectors: Sequence[Vector], start: int, out: Lanes) -> None:
    """Writes the values of each vector from ``start`` on into its lanes, and zeros behind them."""
    for vector, lanes in zip(vectors, out):
        values = vector[start : start + LANES]
        lanes[: len(values)] = values
        lanes[len(values) :] = 0


def _halved(sums: Lanes) -> list[float]:
    left = LANES
    while left > 1:
        left //= 2
        np.add(sums[:, :left], sums[:, left : 2 * left], out=sums[:, :left])
    return [float(total) for total in sums[:, 0]]
