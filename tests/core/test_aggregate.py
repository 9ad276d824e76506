"""What a reducer makes of contributions, and how one of them lies to it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p_diloco.core.aggregate import SAMPLED_PARTS, Alignment, align, reduce_part, sampled, weighted_mean
from p2p_diloco.core.codec import Vector
from p2p_diloco.core.codecs import CODECS, CodecName, encode
from p2p_diloco.core.grid import PART_VALUES, Grid, part_slices
from p2p_diloco.core.update import (
    Part,
    Update,
    UpdateHeader,
)
from tests.core.test_codecs import largest_of
from tests.core.test_outer import N


def test_the_mean_weighs_by_tokens_in_the_given_order() -> None:
    values = [np.random.default_rng(i).standard_normal(N).astype(np.float32) for i in range(3)]
    weights = [100, 300, 7]
    expected = np.average(np.array(values, np.float64), axis=0, weights=weights)
    mean = weighted_mean(list(zip(weights, values)))
    assert mean.dtype == np.float32
    np.testing.assert_allclose(mean, expected, atol=1e-6)
    np.testing.assert_array_equal(weighted_mean([(5, values[0])]), values[0])


def test_a_mean_over_all_who_train_is_shorter_by_those_who_sent_nothing() -> None:
    values = [np.array([1, -2, 4], np.float32), np.array([3, 2, 0], np.float32)]
    np.testing.assert_array_equal(weighted_mean([(1, values[0]), (3, values[1])], total_weight=8), [1.25, 0.5, 0.5])
    np.testing.assert_array_equal(
        weighted_mean([(1, values[0]), (3, values[1])], total_weight=4), weighted_mean([(1, values[0]), (3, values[1])])
    )


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("total", [None, 1000])
def test_a_reduced_part_is_the_encoded_mean_of_what_came_in_the_order_of_the_roster(
    codec: CodecName, total: int | None
) -> None:
    generator = np.random.default_rng(3)
    first, third = (generator.standard_normal(99).astype(np.float32) for _ in range(2))
    grid = Grid(n=99, codec=codec)
    part = reduce_part({2: third, 0: first}, [100, 200, 300], 0, grid, total)
    assert part.mask == b"\x05"
    assert part.data == encode(weighted_mean([(100, first), (300, third)], total), codec)
    nothing = reduce_part({}, [100, 200, 300], 0, grid, total)
    assert (nothing.mask, nothing.data) == (b"", encode(np.zeros(99, np.float32), codec))


def update_of(mean: Vector, codec: CodecName) -> Update:
    parts = tuple(Part(mask=b"\x01", data=encode(mean[where], codec)) for where in part_slices(len(mean)))
    header = UpdateHeader(
        step=0, parent=bytes(32), contributors=(("a", 1),), part_hashes=tuple(part.hash for part in parts)
    )
    return Update(header=header, parts=parts)


def aligned(theta: Vector, local: Vector, update: Update, codec: CodecName) -> Alignment:
    found = align(theta, local, update, Grid(n=len(theta), codec=codec))
    assert found is not None
    return found


def normal(seed: int, n: int) -> Vector:
    return np.random.default_rng(seed).standard_normal(n, np.float32)


@pytest.mark.parametrize("codec", CODECS)
def test_norms_and_cosine(codec: CodecName) -> None:
    """Of all values, where the model has few parts, whatever their lengths; within what the codec rounds."""
    n = PART_VALUES + 100
    theta, contribution, mean = normal(0, n), normal(1, n), normal(2, n) + normal(1, n)
    found = aligned(theta, theta - contribution, update_of(mean, codec), codec)
    norms = float(np.linalg.norm(contribution)), float(np.linalg.norm(mean))
    assert found.contribution_norm == pytest.approx(norms[0], rel=1e-5)
    assert found.update_norm == pytest.approx(norms[1], rel=0.02)
    assert found.cosine == pytest.approx(float(contribution @ mean) / norms[0] / norms[1], abs=0.02)


def test_a_large_model_is_estimated_from_a_sample() -> None:
    n = 3 * SAMPLED_PARTS * PART_VALUES + 100
    theta, contribution, mean = np.zeros(n, np.float32), np.full(n, 0.5, np.float32), np.full(n, -0.25, np.float32)
    first = slice(0, PART_VALUES)
    contribution[first] = 0  # not in the sample
    found = aligned(theta, theta - contribution, update_of(mean, "int8"), "int8")
    assert found.contribution_norm == pytest.approx(0.5 * n**0.5, rel=1e-6)
    assert found.update_norm == pytest.approx(0.25 * n**0.5, rel=1e-6)
    assert found.cosine == pytest.approx(-1.0)


@given(st.integers(1, 10_000))
def test_the_sample_is_spread_evenly_and_fixed(n_parts: int) -> None:
    parts = list(sampled(n_parts))
    assert parts == sorted(set(parts)) == list(sampled(n_parts))
    assert len(parts) == min(n_parts, SAMPLED_PARTS)
    assert parts[0] >= 0
    assert parts[-1] < n_parts
    gaps = [after - before for before, after in pairwise(parts)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_zeros_have_no_direction() -> None:
    zeros, ones = np.zeros(10, np.float32), np.ones(10, np.float32)
    nothing = aligned(ones, ones, update_of(zeros, "fp32"), "fp32")
    assert nothing == Alignment(contribution_norm=0.0, update_norm=0.0, cosine=0.0)
    assert aligned(ones, zeros, update_of(zeros, "fp32"), "fp32").cosine == 0.0


@pytest.mark.parametrize("codec", CODECS)
def test_the_largest_and_smallest_values_stay_finite(codec: CodecName) -> None:
    """What another peer made of the mean must not give figures that the event log cannot write."""
    largest = np.full(1000, largest_of(codec), np.float32)
    smallest, zeros = np.full(1000, 1e-45, np.float32), np.zeros(1000, np.float32)
    for mean in (largest, -largest, np.full(1000, 1e-38, np.float32)):
        for contribution in (largest, -largest, smallest):
            found = aligned(contribution, zeros, update_of(mean, codec), codec)
            assert np.isfinite([found.contribution_norm, found.update_norm, found.cosine]).all()
            assert -1.001 <= found.cosine <= 1.001
    found = aligned(largest, zeros, update_of(-largest, codec), codec)
    assert found.contribution_norm == pytest.approx(largest_of(codec) * 1000**0.5, rel=1e-5)
    assert found.cosine == pytest.approx(-1.0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_bit_that_has_flipped_is_no_figure(value: float) -> None:
    """In what is served to others, and in the event log, is nothing that is not finite."""
    ones = np.ones(10, np.float32)
    theta = ones.copy()
    theta[3] = value
    assert align(theta, ones, update_of(ones, "fp32"), Grid(n=10, codec="fp32")) is None
    assert align(ones, theta, update_of(ones, "fp32"), Grid(n=10, codec="fp32")) is None
