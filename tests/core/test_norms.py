"""Sums that are the same bits everywhere: against plain Python, and without a processor's extensions."""

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from p2p_diloco.core.codec import LARGEST_VALUE, Vector
from p2p_diloco.core.norms import LANES, inner_products, squared_norms

LARGEST = float(np.float32(LARGEST_VALUE))
LENGTHS = (1, 2, 100, LANES - 1, LANES, LANES + 1, 3 * LANES + 77)


def vector(seed: int, n: int) -> Vector:
    """Magnitudes over ten decades."""
    generator = np.random.default_rng(seed)
    return (generator.standard_normal(n) * 10 ** generator.uniform(-5, 5, n)).astype(np.float32)


def as_said(x: Vector, y: Vector) -> float:
    """The words of ``norms``, one number after another."""
    total = summed(list(x), list(y))
    if 2.0**-64 <= abs(total) <= 2.0**64:
        return total
    return summed(x.tolist(), y.tolist())


def summed(x: Sequence[Any], y: Sequence[Any]) -> float:
    """In the precision of the numbers that there are: numpy's float32, or Python's."""
    lanes = [0 * x[0]] * LANES
    for j, (a, b) in enumerate(zip(x, y)):
        lanes[j % LANES] += a * b
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = [one + other for one, other in zip(lanes[:half], lanes[half:])]
    return float(lanes[0])


@pytest.mark.parametrize("n", LENGTHS)
def test_sums_are_those_of_the_words(n: int) -> None:
    vectors, other = [vector(seed, n) for seed in range(3)], vector(9, n)
    assert squared_norms(vectors) == [as_said(one, one) for one in vectors]
    assert inner_products(vectors, other) == [as_said(one, other) for one in vectors]


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e24])
def test_what_is_too_large_or_too_small_for_float32_is_summed_in_float64(scale: float) -> None:
    n = LANES + 5
    vectors, other = [vector(seed, n) * np.float32(scale) for seed in range(2)], vector(9, n)
    for found, one in zip(squared_norms(vectors), vectors):
        assert found == as_said(one, one)
        assert found == pytest.approx(math.fsum(float(value) ** 2 for value in one), rel=1e-12)
    assert inner_products(vectors, other) == [as_said(one, other) for one in vectors]


@given(
    npst.arrays(np.float32, st.integers(1, 40), elements=st.floats(-LARGEST, LARGEST, width=32, allow_nan=False)),
    st.integers(0, 2**32 - 1),
)
def test_sums_are_near_the_exact_ones_and_finite(x: Vector, seed: int) -> None:
    y = vector(seed, len(x))
    exact = sum((Fraction(float(a)) * Fraction(float(b)) for a, b in zip(x, y)), Fraction())
    size = sum((abs(Fraction(float(a)) * Fraction(float(b))) for a, b in zip(x, y)), Fraction())
    (found,) = inner_products([x], y)
    assert abs(Fraction(found) - exact) <= size * Fraction(1, 2**19)
    assert np.isfinite(squared_norms([x])).all()


def test_nothing_and_nobody() -> None:
    assert squared_norms([]) == []
    assert squared_norms([np.zeros(0, np.float32)]) == [0.0]


PRINTS = """
import numpy as np
from p2p_diloco.core.aggregate import AGGREGATIONS
from p2p_diloco.core.grid import Grid
from p2p_diloco.core.norms import inner_products, squared_norms
from tests.core.test_norms import vector
vectors = [vector(seed, 36365) for seed in range(6)]
vectors.append(-vectors[0] - vectors[1])
print([total.hex() for total in squared_norms([vectors[1] * np.float32(1e20)])])
print([total.hex() for total in [*squared_norms(vectors), *inner_products(vectors, vectors[2])]])
for codec in ("fp32", "int4"):
    part = AGGREGATIONS["robust"].reduce(dict(enumerate(vectors)), [5, 9, 7, 7, 7, 3, 7], 0, Grid(n=36365, codec=codec))
    print(part.mask.hex(), part.hash.hex())
"""


def dispatched() -> list[str]:
    """What numpy has other kernels for, and this processor can."""
    umath = importlib.import_module("numpy._core._multiarray_umath")
    return [name for name in umath.__cpu_dispatch__ if umath.__cpu_features__[name]]


def bits_without(features: list[str]) -> str:
    environment = os.environ | {"NPY_DISABLE_CPU_FEATURES": " ".join(features)}
    done = subprocess.run([sys.executable, "-c", PRINTS], capture_output=True, text=True, env=environment, check=True)
    return done.stdout


def test_the_bits_are_the_same_without_the_processors_extensions() -> None:
    """AVX2 is the first of them on x86-64, which newer versions of numpy call X86_V3."""
    features, with_all = dispatched(), bits_without([])
    assert with_all.count("\n") == 4
    for first in {0, min(1, len(features))}:
        assert bits_without(features[first:]) == with_all
