"""Who reduces how many parts: against equal shares, the best of all ways to deal few parts out, and the protocol's
page."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2p_diloco.core.shares import LARGEST_SHARE_OVER_EQUAL, deal, part_counts
from tests.support.decoded_shares import parts_of_each, shares_of

uplinks_of_some = st.lists(st.integers(1, 40) | st.integers(1, 2**25), min_size=1, max_size=12)


def took(uplinks: Sequence[int], counts: Sequence[int], n_members: int, n_parts: int) -> Fraction:
    """Until the last reducer has sent its contributions to the others' parts, and its means; in parts, at an uplink
    of 1."""
    return max(
        Fraction(n_parts + (n_members - 2) * count, uplink) for uplink, count in zip(uplinks, counts, strict=True)
    )


@pytest.mark.parametrize("reducers", [1, 2, 3, 7])
@pytest.mark.parametrize("n_parts", [0, 1, 2, 6, 7, 96])
@pytest.mark.parametrize("uplink", [1, 12_500_000])
def test_with_equal_uplinks_all_have_as_many(reducers: int, n_parts: int, uplink: int) -> None:
    names, parts = [10 * i for i in range(reducers)], range(5, 5 + n_parts)
    for n_members in range(reducers, reducers + 3):
        dealt = deal(names, part_counts([uplink] * reducers, n_members, n_parts), parts)
        assert dealt == {names[i]: list(parts[i::reducers]) for i in range(reducers)}


def test_of_two_members_each_sends_the_same_whatever_it_reduces() -> None:
    assert part_counts([1, 100], 2, 7) == [4, 3]


@pytest.mark.parametrize(
    ("uplinks", "n_members", "counts"),
    [
        ([100, 100, 100, 25], 4, [32, 32, 32, 0]),  # it cannot even send its own contribution by then
        ([100, 100, 100, 60], 4, [32, 32, 32, 0]),
        ([100, 100, 100, 70], 4, [30, 30, 30, 6]),
        ([100, 25, 25, 25], 4, [96, 0, 0, 0]),
        ([400, *[100] * 15], 16, [24, *[5] * 12, *[4] * 3]),
        ([100, 100], 8, [48, 48]),  # six can not be dialled
        ([100, 50], 8, [69, 27]),
        ([7], 8, [96]),
    ],
)
def test_who_is_slow_reduces_less_or_nothing(uplinks: list[int], n_members: int, counts: list[int]) -> None:
    assert part_counts(uplinks, n_members, 96) == counts


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 12), min_size=2, max_size=4),
    st.integers(0, 3),
    st.integers(1, 7),
)
def test_no_way_to_deal_the_parts_out_is_better_by_more_than_a_part(
    uplinks: list[int], clients: int, n_parts: int
) -> None:
    n_members, reducers = len(uplinks) + clients, len(uplinks)
    largest = -(-LARGEST_SHARE_OVER_EQUAL * n_parts // reducers)
    ways = (way for way in product(range(min(largest, n_parts) + 1), repeat=reducers) if sum(way) == n_parts)
    best = min(took(uplinks, way, n_members, n_parts) for way in ways)
    counts = part_counts(uplinks, n_members, n_parts)
    assert sum(counts) == n_parts
    assert min(counts) >= 0
    assert took(uplinks, [max(count - 1, 0) for count in counts], n_members, n_parts) <= best


@settings(max_examples=100)
@given(uplinks_of_some, st.integers(0, 20), st.integers(0, 200))
def test_the_page_comes_to_the_same_in_another_way(uplinks: list[int], clients: int, n_parts: int) -> None:
    n_members, reducers, parts = len(uplinks) + clients, range(len(uplinks)), range(n_parts)
    dealt = deal(reducers, part_counts(uplinks, n_members, n_parts), parts)
    assert list(dealt.values()) == parts_of_each(shares_of(uplinks, n_members), parts)
    assert sorted(part for hand in dealt.values() for part in hand) == list(parts)


@settings(max_examples=100)
@given(st.data())
def test_uplinks_that_are_not_true_cost_little(data: st.DataObject) -> None:
    uplinks = data.draw(uplinks_of_some)
    said = data.draw(st.lists(st.integers(1, 2**25), min_size=len(uplinks), max_size=len(uplinks)))
    n_members, n_parts = max(2, len(uplinks) + data.draw(st.integers(0, 8))), data.draw(st.integers(1, 300))
    counts = part_counts(said, n_members, n_parts)
    largest = -(-LARGEST_SHARE_OVER_EQUAL * n_parts // len(uplinks))
    assert max(counts) <= largest
    equal = max(Fraction(len(uplinks) * n_parts + (n_members - 2) * n_parts, len(uplinks) * one) for one in uplinks)
    in_whole_parts = [max(count - 1, 0) for count in counts]
    assert took(uplinks, in_whole_parts, n_members, n_parts) <= LARGEST_SHARE_OVER_EQUAL * equal
