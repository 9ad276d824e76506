"""What a reducer makes of contributions, and how one of them lies to it."""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import median_low

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p_diloco.core.aggregate import (
    AGGREGATIONS,
    SAMPLED_PARTS,
    AggregateName,
    Alignment,
    align,
    sampled,
)
from p2p_diloco.core.codec import Vector
from p2p_diloco.core.codecs import CODECS, CodecName, encode
from p2p_diloco.core.grid import PART_VALUES, Grid, part_slices
from p2p_diloco.core.roster import counted_weights
from p2p_diloco.core.update import (
    Part,
    Update,
    UpdateHeader,
)
from tests.core.test_codecs import largest_of
from tests.core.test_outer import N
from tests.support.reference import weighted_mean


def plain_mean(values: list[Vector], weights: list[int], total: int | None = None) -> Vector:
    """The values of the part that all of these make by the plain rule."""
    grid = Grid(n=len(values[0]), codec="fp32")
    return grid.decode(0, AGGREGATIONS["mean"].reduce(dict(enumerate(values)), weights, 0, grid, total).data)


def test_the_mean_weighs_by_tokens_in_the_given_order() -> None:
    values = [np.random.default_rng(i).standard_normal(N).astype(np.float32) for i in range(3)]
    weights = [100, 300, 7]
    expected = np.average(np.array(values, np.float64), axis=0, weights=weights)
    mean = plain_mean(values, weights)
    np.testing.assert_allclose(mean, expected, atol=1e-6)
    np.testing.assert_array_equal(mean, weighted_mean(list(zip(weights, values))))
    np.testing.assert_array_equal(plain_mean(values[:1], [5]), values[0])


def test_a_mean_over_all_who_train_is_shorter_by_those_who_sent_nothing() -> None:
    values = [np.array([1, -2, 4], np.float32), np.array([3, 2, 0], np.float32)]
    np.testing.assert_array_equal(plain_mean(values, [1, 3], total=8), [1.25, 0.5, 0.5])
    np.testing.assert_array_equal(plain_mean(values, [1, 3], total=4), plain_mean(values, [1, 3]))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("total", [None, 1000])
def test_a_part_of_the_plain_mean_is_the_encoded_mean_of_what_came_in_the_order_of_the_roster(
    codec: CodecName, total: int | None
) -> None:
    generator = np.random.default_rng(3)
    first, third = (generator.standard_normal(99).astype(np.float32) for _ in range(2))
    grid = Grid(n=99, codec=codec)
    mean = AGGREGATIONS["mean"]
    part = mean.reduce({2: third, 0: first}, [100, 200, 300], 0, grid, total)
    assert part.mask == b"\x05"
    assert part.data == encode(weighted_mean([(100, first), (300, third)], total), codec)
    nothing = mean.reduce({}, [100, 200, 300], 0, grid, total)
    assert (nothing.mask, nothing.data) == (b"", encode(np.zeros(99, np.float32), codec))


ROBUST = AGGREGATIONS["robust"]


def robust(came: dict[int, Vector], weights: list[int] | None = None, total: int | None = None) -> tuple[bytes, Vector]:
    """The mask and the values of the part that is made of what came."""
    grid = Grid(n=len(next(iter(came.values()))), codec="fp32")
    part = ROBUST.reduce(came, weights or [100] * (max(came) + 1), 0, grid, total)
    return part.mask, grid.decode(0, part.data)


def test_where_all_are_alike_robust_is_the_mean() -> None:
    common = normal(0, 200)
    came = {i: common + np.float32(0.1) * normal(i + 1, 200) for i in range(6)}
    came = {i: values / np.float32(np.linalg.norm(values)) for i, values in came.items()}
    weights = [100, 120, 140, 150, 90, 80]
    mask, values = robust(came, weights)
    assert mask == b"\x3f"
    np.testing.assert_allclose(values, weighted_mean(list(zip(weights, came.values()))), atol=1e-7)


@pytest.mark.parametrize("count", [3, 4, 5, 9])
@pytest.mark.parametrize("hostile", [np.float32(1e30), np.float32(-1e30), np.float32(100)])
def test_the_mean_is_no_longer_than_the_median_times_the_largest_weight(count: int, hostile: np.float32) -> None:
    came = {i: normal(0, 500) + normal(i, 500) for i in range(count)}
    came[1] = np.full(500, hostile, np.float32)
    usual = median_low([float(np.linalg.norm(one.astype(np.float64))) for one in came.values()])
    _, values = robust(came)
    assert np.linalg.norm(values) <= usual * (1 + 1e-5)
    _, values = robust(came, [100, 150, *[100] * (count - 2)])
    assert np.linalg.norm(values) <= usual * (1.5 if count >= 5 else 1) * (1 + 1e-5)


UNEVEN = [150, 150, 100, 100, 50]
"""As they count, of peers of speeds 1, 3/4, 1/2, 1/2 and 1/4."""


def uneven(*norms: float) -> dict[int, Vector]:
    """So long each; they have much in common."""
    came = {i: normal(0, 500) + normal(i + 1, 500) for i in range(len(norms))}
    return {i: values * np.float32(norm / np.linalg.norm(values)) for (i, values), norm in zip(came.items(), norms)}


def test_of_five_a_faster_peer_counts_with_as_much_longer_a_contribution_as_its_weight() -> None:
    came = uneven(2, 1.5, 1, 1, 0.5)
    mask, values = robust(came, UNEVEN)
    assert mask == b"\x1f"
    lengths = [1.5, 1.5, 1, 1, 0.5]
    units = [one / np.linalg.norm(one) for one in came.values()]
    expected = sum(weight * length * unit for weight, length, unit in zip(UNEVEN, lengths, units)) / sum(UNEVEN)
    np.testing.assert_allclose(values, expected, atol=1e-6)
    _, by_others = robust({i: came[i] for i in range(4)}, UNEVEN)
    fewer = sum(weight * unit for weight, unit in zip(UNEVEN[:4], units)) / sum(UNEVEN[:4])
    np.testing.assert_allclose(by_others, fewer, atol=1e-6, err_msg="of four, all as long as the median at most")


def test_the_weights_that_count_are_over_the_median_of_the_whole_roster() -> None:
    """Also where only the slower ones' contributions to a part came: here those that weigh 100 are no faster ones."""
    roster = [150, 150, 100, 100, 50, 50, 50, 100, 100]
    came = {i + 2: values for i, values in uneven(1, 1, 0.5, 0.5, 0.5).items()}
    _, values = robust(came, roster)
    units = {i: one / np.linalg.norm(one) for i, one in came.items()}
    expected = sum(roster[i] * 0.5 * unit for i, unit in units.items()) / 350
    np.testing.assert_allclose(values, expected, atol=1e-6)


def test_two_of_five_that_flip_are_left_out_though_they_are_long_and_claim_the_largest_weight() -> None:
    came = uneven(150, 150, 1, 1, 1)
    mask, _ = robust({i: -one if i < 2 else one for i, one in came.items()}, [150, 150, 100, 100, 100])
    assert mask == b"\x1c"


@pytest.mark.parametrize("count", [3, 4, 5, 9])
def test_one_that_flips_and_claims_the_largest_weight_does_not_turn_the_mean_round(count: int) -> None:
    came = uneven(*[1.0] * count)
    came[0] = came[0] * np.float32(-100)
    _, values = robust(came, [150] + [100] * (count - 1))
    others = sum(came[i] for i in range(1, count))
    assert np.dot(values, others) > 0


def test_of_two_neither_moves_the_mean_by_more_than_so_many_times_the_other() -> None:
    mine, other = normal(0, 500), np.full(500, 1e30, np.float32)
    for came in ({0: mine, 1: other}, {0: other, 1: mine}):
        _, values = robust(came)
        assert np.linalg.norm(values) <= 4 * np.linalg.norm(mine)
    _, values = robust({0: mine, 1: 3 * mine})
    np.testing.assert_allclose(values, 2 * mine, rtol=1e-5, atol=1e-6)


def test_who_is_left_out_is_not_in_the_mask_and_divides_nothing() -> None:
    came = {i: normal(0, 500) + normal(i + 1, 500) for i in (0, 2, 3, 5, 6)}
    came[3] = -came[3]
    came = {i: values / np.float32(np.linalg.norm(values)) for i, values in came.items()}
    others = {i: values for i, values in came.items() if i != 3}
    mask, values = robust(came, [100, 1, 120, 150, 1, 90, 80])
    assert mask == bytes([0b1100101])
    _, without = robust(others, [100, 1, 120, 150, 1, 90, 80])
    np.testing.assert_allclose(values, without, atol=1e-7)
    _, kept = robust(came, [100, 1, 120, 150, 1, 90, 80], total=1000)
    _, kept_without = robust(others, [100, 1, 120, 150, 1, 90, 80], total=850)
    np.testing.assert_allclose(kept, kept_without, atol=1e-7)


def test_nothing_that_came_is_zeros() -> None:
    grid = Grid(n=99, codec="int4")
    nothing = ROBUST.reduce({}, [1, 2], 0, grid)
    assert (nothing.mask, nothing.data) == (b"", grid.encode(np.zeros(99, np.float32)))


LARGEST = float(np.float32(1e30))
ANY_VALUE = st.floats(-LARGEST, LARGEST, width=32) | st.sampled_from([0.0, LARGEST, -LARGEST, 1e-45, -1e-38, 1.0])


@given(
    st.lists(st.lists(ANY_VALUE, min_size=3, max_size=3), min_size=1, max_size=8),
    st.lists(st.integers(1, 2**60), min_size=8, max_size=8),
    st.sampled_from(["mean", "robust"]),
    st.sampled_from(sorted(CODECS)),
    st.booleans(),
)
def test_whatever_came_the_mean_is_finite(
    came: list[list[float]], claimed: list[int], aggregate: AggregateName, codec: CodecName, keep: bool
) -> None:
    grid, rule = Grid(n=3, codec=codec), AGGREGATIONS[aggregate]
    weights, total = counted_weights(claimed[: len(came)], rule, "keep" if keep else "adopt", absent=1)
    decoded = {i: grid.decode(0, grid.encode(np.array(values, np.float32))) for i, values in enumerate(came)}
    part = rule.reduce(decoded, weights, 0, grid, total)
    values = grid.decode(0, part.data)
    assert np.isfinite(values).all()
    if aggregate == "robust" and len(came) > 2:
        norms = [float(np.linalg.norm(one.astype(np.float64))) for one in decoded.values()]
        assert np.linalg.norm(values.astype(np.float64)) <= 1.3 * 1.5 * median_low(norms) + 1e-30


def test_what_a_member_takes_of_a_reducer() -> None:
    """Four times what it expects: of its own contribution or of the last update; of a slower peer's, as much more as
    it is slower, and with the square of that before the first update, while learning rates rise."""
    even, slow = [100] * 5, [100, 100, 25, 100, 100]
    assert ROBUST.largest_norm(1.0, even, 2, 0.5) == 4.0
    assert ROBUST.largest_norm(1.0, even, 2, 3.0) == 12.0
    assert ROBUST.largest_norm(1.0, even, 2, None) == 4.0
    assert ROBUST.largest_norm(1.0, slow, 2, 0.5) == 16.0
    assert ROBUST.largest_norm(1.0, slow, 2, None) == 64.0
    assert ROBUST.largest_norm(1.0, slow, 1, 0.5) == 4.0
    assert ROBUST.largest_norm(0.0, even, 2, 0.5) == 2.0
    assert ROBUST.largest_norm(0.0, even, 2, None) == math.inf, "it has nothing to go by"
    assert AGGREGATIONS["mean"].largest_norm(1.0, even, 2, 0.5) == math.inf


@pytest.mark.parametrize("faster", [[], [1500, 1500], [4000, 4000, 4000]])
@pytest.mark.parametrize("slower", [1, 2, 4, 10, 100])
@pytest.mark.parametrize(("tokens_power", "last"), [(2.0, None), (1.0, None), (1.0, 0.3), (0.5, 0.3), (0.5, 0.0)])
def test_an_honest_slow_peer_takes_what_honest_reducers_make(
    slower: int, tokens_power: float, last: float | None, faster: list[int]
) -> None:
    """The norm of a contribution rises with the tokens: in proportion at most, and with their square in a warm-up."""
    tokens = [1000, 1000, 1000, 1000 // slower, *faster]
    norms = [(trained / 1000) ** tokens_power for trained in tokens]
    common = np.full(100, 0.1, np.float32)
    weights, _ = counted_weights(tokens, ROBUST, "adopt", absent=0)
    _, mean = robust({i: common * np.float32(norm) for i, norm in enumerate(norms)}, list(weights))
    for me in range(len(tokens)):
        assert np.linalg.norm(mean) <= ROBUST.largest_norm(norms[me], weights, me, last)


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
