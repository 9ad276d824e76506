"""The shares of a butterfly, from what ``docs/protocol.md`` says of them: another way than the package's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction


def lower_median(values: Sequence[int]) -> int:
    return sorted(values)[(len(values) - 1) // 2]


def said_in(uplinks: bytes) -> dict[bytes, int]:
    """Tag -> bytes per second."""
    entries = [uplinks[i : i + 5] for i in range(0, len(uplinks), 5)]
    return {one[:4]: min((8 + one[4] % 8) * 2 ** (one[4] // 8), 2**25) for one in entries}


def uplinks_of(tags: Sequence[bytes], said: Mapping[int, bytes], reducers: Sequence[int]) -> list[int]:
    """``said``: member that certifies -> what is in its readiness."""
    heard = {j: said_in(uplinks) for j, uplinks in said.items()}
    of = {i: [one[tag] for j, one in heard.items() if j != i and tag in one] for i, tag in enumerate(tags)}
    measured = {i: lower_median(values) for i, values in of.items() if values}
    usual = lower_median([measured[i] for i in reducers if i in measured] or [2**25])
    uplinks = []
    for i in range(len(tags)):
        smaller, larger = sorted((measured.get(i, usual), usual))
        bounded = max(usual // 4, min(4 * usual, measured.get(i, usual)))
        uplinks.append(usual if 4 * smaller >= 3 * larger else bounded)
    return uplinks


def shares_of(uplinks: Sequence[int], n: int) -> list[Fraction]:
    """Every number of reducers that have nothing, and of those that have the largest share, is tried."""
    m = len(uplinks)
    if n <= 2 or len(set(uplinks)) == 1:
        return [Fraction(1, m)] * m
    largest = min(Fraction(1), Fraction(4, m))
    order = sorted(range(m), key=lambda i: uplinks[i])
    for full in range(m + 1):
        for nothing in range(m - full + 1):
            between = order[nothing : m - full]
            left = 1 - full * largest
            if not between and left:
                continue
            soonest = max(
                [(1 + largest * (n - 2)) / Fraction(uplinks[i]) for i in order[m - full :]], default=Fraction(0)
            )
            total = sum(uplinks[i] for i in between)
            time = (left * (n - 2) + len(between)) / Fraction(total) if between else soonest
            shares = {i: (time * uplinks[i] - 1) / (n - 2) for i in order}
            if (
                all(shares[i] <= 0 for i in order[:nothing])
                and all(0 <= shares[i] <= largest for i in between)
                and all(shares[i] >= largest for i in order[m - full :])
            ):
                return [max(Fraction(0), min(largest, shares[i])) for i in range(m)]
    raise AssertionError(f"no shares for {uplinks} of {n}")


def parts_of_each(shares: Sequence[Fraction], parts: Sequence[int]) -> list[list[int]]:
    exact = [share * len(parts) for share in shares]
    due = [int(one) for one in exact]
    for i in sorted(range(len(due)), key=lambda i: (-(exact[i] - int(exact[i])), i))[: len(parts) - sum(due)]:
        due[i] += 1
    dealt: list[list[int]] = [[] for _ in due]
    turn = 0
    for part in parts:
        while len(dealt[turn % len(due)]) == due[turn % len(due)]:
            turn += 1
        dealt[turn % len(due)].append(part)
        turn += 1
    return dealt
