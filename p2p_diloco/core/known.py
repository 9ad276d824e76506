"""Which peers are known at a head: those that the updates up to there have in them. Pure.

A name costs nothing, work does. Who has contributed to most parts of at least LEAST_STEPS of the last WINDOW_STEPS
updates is known there, to everybody who has that history, and whatever anybody claims. Known members lead and reduce,
and most of them have to sign an update; unknown ones are few in a roster. This bounds how fast strangers can become the
majority of a run, and not whether they can: only invitations do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

WINDOW_STEPS = 16
"""Before there are so many updates, nobody is known."""
LEAST_STEPS = 4
LEAST_KNOWN = 2
"""Known members of a roster that can do without the owner's witness; one, in a run whose smallest group is one."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """Says who is known where an outer step begins."""

    step: int
    """The outer step."""
    peers: frozenset[str]


NOBODY_KNOWN = Known(step=0, peers=frozenset())
"""At the beginning of a run."""


def known_at(step: int, last: Sequence[Collection[str]]) -> Known:
    """Returns who is known at outer step ``step``. ``last``: of each of the last WINDOW_STEPS updates, or of all where
    there are fewer, the peers that have contributed to most of its parts."""
    if step < WINDOW_STEPS:
        return Known(step=step, peers=frozenset())
    steps = Counter(peer_id for contributed in last for peer_id in set(contributed))
    return Known(step=step, peers=frozenset(peer_id for peer_id, count in steps.items() if count >= LEAST_STEPS))


def carried_to(step: int, contributed: Mapping[int, Collection[str]], least_known: int) -> int:
    """Returns the outer step up to which a history has been carried on by most of those that might have left it, if it
    was sound up to ``step``. ``contributed``: the outer step of each update from WINDOW_STEPS before that on -> who is
    in most of its parts. ``least_known``: so many known members can do without the owner's witness.

    Most of those known at an outer step have contributed to an update there or later: they stood there. They carry the
    history to where the last of these updates leads on from that has most of them behind it, and then those count that
    are known there. So members may come and go, but not most of them at once. Where too few are known, or those that
    have not gone on are too few, nobody can leave without the owner.
    """
    newest = {peer_id: at for at in sorted(contributed) for peer_id in contributed[at]}
    while step in contributed:
        known = known_at(step, [contributed[at] for at in range(max(step - WINDOW_STEPS, 0), step)]).peers
        if len(known) < least_known:
            step += 1
            continue
        enough = min(len(known) // 2 + 1, len(known) - least_known + 1)
        reached = sorted((newest[peer_id] for peer_id in known), reverse=True)[enough - 1]
        if reached <= step:
            break
        step = reached
    return step


def most_unknown(known: int) -> int:
    """Returns how many unknown members a roster with so many ``known`` ones may have: fewer than half as many. One in
    any case, or two peers would stay two for ever; it then has at most a third of the weight."""
    return max(1, (known - 1) // 2)
