"""How the parts of a vector are shared among the members that reduce them, by how fast each of these sends. Pure.

Of ``n`` members that exchange a vector of V bytes, one that reduces a share ``s`` of it sends V * (1 - s) of its own to
the other reducers, and V * s to each of the n - 1 others: V * (1 + (n - 2) * s) in all. The last one to be ready is
ready first when all that reduce anything are ready at the same time T:

    share = (T * uplink - 1) / (n - 2), at least 0 and at most LARGEST_SHARE_OVER_EQUAL of an equal share

with that T at which all shares together are 1. Who cannot even send its own contribution in T reduces nothing. The
seed that helps sends no contribution: it is counted as if it did.

Every member computes this for itself and has to come to the same, so it is done in integers and fractions alone.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction

LARGEST_SHARE_OVER_EQUAL = 4
"""So many times an equal share one member reduces at most, whatever is said of its uplink: with wrong uplinks a
butterfly takes at most so many times as long as with equal shares."""


def part_counts(uplinks: Sequence[int], n_members: int, n_parts: int) -> list[int]:
    """Returns how many of ``n_parts`` each reducer reduces. ``uplinks``: of each reducer, in any unit, above 0.
    ``n_members``: all that exchange parts, reducers or not. What is left when all have the whole parts of their shares
    goes to those that lack most of another part, the first ones of those that lack as much: with equal uplinks nobody
    has two parts more than another one, and who has one more stands before who has not."""
    exact = [share * n_parts for share in _shares(uplinks, n_members)]
    counts = [int(quota) for quota in exact]
    by_lack = sorted(range(len(counts)), key=lambda i: counts[i] - exact[i])
    for i in by_lack[: n_parts - sum(counts)]:
        counts[i] += 1
    return counts


def deal(reducers: Sequence[int], counts: Sequence[int], parts: Sequence[int]) -> dict[int, list[int]]:
    """Returns the parts of each reducer. They are dealt out one by one, in turn, and who has its number is passed over:
    with equal numbers the ``k``-th part goes to the ``k``-th reducer, and on from the first one."""
    hands: dict[int, list[int]] = {reducer: [] for reducer in reducers}
    due, left = dict(zip(reducers, counts)), iter(parts)
    dealt_to = [reducer for reducer in reducers if due[reducer]]
    while dealt_to:
        for reducer in dealt_to:
            hands[reducer].append(next(left))
        dealt_to = [reducer for reducer in dealt_to if len(hands[reducer]) < due[reducer]]
    return hands


def _shares(uplinks: Sequence[int], n_members: int) -> list[Fraction]:
    """Returns the share of each reducer, all together 1."""
    if len(set(uplinks)) <= 1 or n_members <= 2:  # of two members each sends the same, whatever it reduces
        return [Fraction(1, len(uplinks)) for _ in uplinks]
    more, largest = n_members - 2, min(Fraction(LARGEST_SHARE_OVER_EQUAL, len(uplinks)), Fraction(1))

    def shares_at(time: Fraction) -> list[Fraction]:
        return [min(max((time * uplink - 1) / more, Fraction(0)), largest) for uplink in uplinks]

    def dealt_at(time: Fraction) -> Fraction:
        return sum(shares_at(time), Fraction(0))

    # All shares together rise with the time, in straight lines between the times at which one begins, or is full.
    bends = sorted({Fraction(1, uplink) for uplink in uplinks} | {(1 + more * largest) / uplink for uplink in uplinks})
    last = bisect_right(bends, Fraction(1), key=dealt_at) - 1
    before, missing = bends[last], 1 - dealt_at(bends[last])
    if not missing:
        return shares_at(before)
    after = bends[last + 1]
    return shares_at(before + (after - before) * missing / (dealt_at(after) - dealt_at(before)))
