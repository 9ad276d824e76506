"""Which contributions count, and how much: against the rule in exact fractions, and by what it is for."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p_diloco.core.agreement import AGREES_FROM, LARGEST_OF_TWO, LEAST_COSINE, agreeing, bounded, bounded_by_weight
from p2p_diloco.core.codec import Vector
from p2p_diloco.core.norms import squared_norms


@pytest.mark.parametrize(
    ("norms", "factors"),
    [
        ([], []),
        ([1e30], [1.0]),
        ([1.0, 4.0], [1.0, 1.0]),
        ([1.0, 8.0], [1.0, 0.5]),
        ([0.0, 8.0], [1.0, 0.0]),
        ([1.0, 2.0, 8.0], [1.0, 1.0, 0.25]),
        ([8.0, 8.0, 1.0], [1.0, 1.0, 1.0]),
        ([1.0, 2.0, 4.0, 8.0], [1.0, 1.0, 0.5, 0.25]),
        ([0.0, 0.0, 5.0], [1.0, 1.0, 0.0]),
        ([2.0, 2.0, 2.0, 2.0, 1e33], [1.0, 1.0, 1.0, 1.0, 2e-33]),
    ],
)
def test_a_norm_counts_up_to_the_median_or_of_two_up_to_so_many_times_the_other(
    norms: list[float], factors: list[float]
) -> None:
    assert bounded(norms) == factors
    assert bounded_by_weight(norms, [1.0] * len(norms)) == factors
    assert LARGEST_OF_TWO == 4


def test_of_five_and_more_who_weighs_more_than_the_median_may_be_as_much_longer() -> None:
    norms, weights = [3.0, 1.0, 2.0, 4.0, 2.0], [1.5, 0.5, 1.0, 1.25, 0.25]
    assert bounded_by_weight(norms, weights) == [1.0, 1.0, 1.0, 0.625, 1.0]
    assert bounded_by_weight(norms[:4], weights[:4]) == bounded(norms[:4]) == [2 / 3, 1.0, 1.0, 0.5]
    assert bounded_by_weight([8.0, 1.0], [1.5, 1.0]) == [0.5, 1.0]
    assert bounded_by_weight([2.0, 1.0, 2.0, 1.0, 1.0], [0.5] * 5) == [0.5, 1.0, 0.5, 1.0, 1.0], "and no less long"


def stay(vectors: dict[int, Vector], shares: dict[int, float] | None = None) -> list[int]:
    shares = shares or dict.fromkeys(vectors, 1 / len(vectors))
    shares = {i: float(np.float32(share)) for i, share in shares.items()}
    mean = np.zeros_like(next(iter(vectors.values())))
    for i, values in vectors.items():
        mean += np.float32(shares[i]) * values
    return agreeing(vectors, dict(zip(vectors, squared_norms(list(vectors.values())))), shares, mean)


def exactly(vectors: dict[int, Vector]) -> list[int]:
    """The rule in fractions, with equal shares, from the vectors as they are."""
    exact = {i: [Fraction(float(value)) for value in values] for i, values in vectors.items()}
    left = list(exact)
    while len(vectors) >= AGREES_FROM and 2 * (len(left) - 1) > len(vectors):
        cosines = {}
        for i in left:
            others = [sum(column, Fraction()) for column in zip(*(exact[j] for j in left if j != i))]
            with_others = sum((a * b for a, b in zip(exact[i], others)), Fraction())
            size = sum((a * a for a in exact[i]), Fraction()) * sum((a * a for a in others), Fraction())
            cosines[i] = float(with_others) / math.sqrt(size) if size else 0.0
        out = min(left, key=lambda i: cosines[i])
        if cosines[out] >= LEAST_COSINE:
            break
        left.remove(out)
    return left


@given(st.integers(0, 10_000), st.integers(3, 9), st.floats(0, 1))
def test_who_stays_is_who_stays_by_the_exact_rule(seed: int, count: int, common: float) -> None:
    generator = np.random.default_rng(seed)
    direction = generator.standard_normal(20)
    vectors: dict[int, Vector] = {}
    for i in range(count):
        towards = common * direction * generator.choice([-1, 1, 1]) + generator.standard_normal(20)
        vectors[3 * i] = (towards * generator.uniform(0.2, 5)).astype(np.float32)
    assert stay(vectors) == exactly(vectors)


def honest(count: int, n: int = 1000) -> dict[int, Vector]:
    """They have little in common: a cosine of some 0.1 between two."""
    generator = np.random.default_rng(1)
    common = generator.standard_normal(n)
    return {i: (0.35 * common + generator.standard_normal(n)).astype(np.float32) for i in range(count)}


@pytest.mark.parametrize("count", range(1, 10))
def test_honest_ones_stay(count: int) -> None:
    assert stay(honest(count)) == list(range(count))


@pytest.mark.parametrize(("count", "flipped"), [(5, [2]), (5, [0]), (7, [6]), (9, [3, 4])])
def test_who_points_away_from_the_others_is_left_out_however_much_it_weighs(count: int, flipped: list[int]) -> None:
    vectors = honest(count)
    for i in flipped:
        vectors[i] = -vectors[i]
    shares = {i: (1.5 if i in flipped else 1.0) / count for i in vectors}
    assert stay(vectors, shares) == [i for i in vectors if i not in flipped]


def test_of_four_nobody_is_left_out() -> None:
    vectors = honest(4)
    assert stay(vectors | {2: -vectors[2]}) == [0, 1, 2, 3]


def test_more_than_half_stay_in_any_case() -> None:
    vectors = {i: np.array([1.0, 0, 0] if i % 2 else [-1.0, 0, 0], np.float32) for i in range(6)}
    assert len(stay(vectors)) == 4
    both = {i: np.array([1.0 - 2 * (i < 3), 0, 0], np.float32) for i in range(5)}
    assert stay(both) == [0, 1, 2], "the three are a majority, whatever they say"


def test_zeros_point_nowhere() -> None:
    assert stay({i: np.zeros(4, np.float32) for i in range(5)}) == [0, 1, 2, 3, 4]
    vectors = honest(5)
    assert stay(vectors | {1: np.zeros(1000, np.float32)}) == [0, 1, 2, 3, 4]
