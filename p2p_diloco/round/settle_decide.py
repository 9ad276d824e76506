"""What is decided while a round is settled: which commit, which wait ends, whose word fits. All of it is pure.

Everything a decision needs is an argument, the time among it. ``settle`` tells what is said to whom; the other files of
settling ask here and act.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from typing import TypeAlias

from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.group import Group
from p2p_diloco.wire.messages import No
from p2p_diloco.wire.round_messages import Again, Commit, Receipt, TookBefore

log = logging.getLogger(__name__)

Decision: TypeAlias = Again | Commit | No
"""A leader's: reduce some parts again, this is the update, or the round has failed."""

LEADERS_SHARE = 0.75
"""Of the time that a round has left, for one decision: the leader may reduce for half of that, and then it collects."""
SLOWER_THAN_I = 3.0
"""So many times as long as I have reduced others may take, who have to receive the same over other links."""


# -- what a leader decides ---------------------------------------------------------------------------------------------


def decide(
    held: Mapping[int, Sequence[bytes]],
    group: Group,
    *,
    me: int,
    min_group: int,
    reducers: Sequence[int],
    newest: int,
    state: bytes,
    apart: Set[int] = frozenset(),
) -> Decision:
    """Returns what a leader tells the members that have sent a receipt.

    It is a commit when most of the members that certify have sent receipts, and every part is held by one of them.
    Parts that none of them holds are reduced again by all of them, in a butterfly of a new number; there are fewer of
    these than members. So are parts of which they hold different bytes, none of them most: without whoever reduced
    those, if the others are enough; the same goes for members that are ``apart``. The round fails otherwise.

    ``held``: member -> the hashes of the parts that it holds, the leader, ``me``, among them. ``reducers``: who has
    reduced each part; I have not sent different bytes. ``newest``: the highest number of a butterfly that the leader
    has heard of. ``state``: as ``agreed_state`` has it. ``apart``: who has reduced without most of the others.
    """
    size, n_parts, left = len(group.members), len(reducers), group.n_trainers(held)
    if left < min_group or not group.is_most(held.keys()):
        return No(reason=f"{left} of {len(group.trainers)} members are left, too few to commit")
    hashes, holders = choose_parts(held, n_parts)
    torn = [part for part in range(n_parts) if reducers[part] != me and is_torn(part, hashes[part], held, group)]
    others = held.keys() - {reducers[part] for part in torn} - (apart - {me})
    if group.n_trainers(others) < min_group or not group.is_most(others):
        torn, others = [], set(held)
    missing = sorted({*torn, *(part for part, chosen in enumerate(hashes) if not chosen)})
    if not missing:
        return Commit(part_hashes=hashes, holders=holders, state=state)
    if newest + 1 >= size:
        return No(reason=f"{len(missing)} parts were lost again and again")
    return Again(number=newest + 1, members=sorted(others), parts=missing)


def is_torn(part: int, chosen: bytes, held: Mapping[int, Sequence[bytes]], group: Group) -> bool:
    """Returns whether members hold different bytes for a part, and too few of them those that were ``chosen``, for
    nobody signs another hash than its reducer has sent."""
    with_chosen = {member for member, hashes in held.items() if hashes[part] in (b"", chosen)}
    return len(with_chosen) < len(held) and not group.is_most(with_chosen)


def agreed_state(states: Mapping[int, bytes], group: Group) -> bytes:
    """Returns the digest of the outer state that most of the members that certify name, of those in ``states``: member
    -> digest. Empty where they do not agree: then none is certified, and the run goes on."""
    named = Counter(state for member, state in states.items() if member in group.voting)
    most = min(named, key=lambda state: (-named[state], state), default=b"")
    return most if 2 * named[most] > len(group.voting) else b""


def without_refused(held: Mapping[int, Sequence[bytes]], refused: Set[bytes]) -> dict[int, list[bytes]]:
    """Returns the same as ``held`` without the hashes of parts that this leader refuses: nobody holds them for it."""
    return {i: [b"" if one in refused else one for one in hashes] for i, hashes in held.items()}


def choose_parts(held: Mapping[int, Sequence[bytes]], n_parts: int) -> tuple[list[bytes], list[int]]:
    """Returns the hash of every part of the update, and a member that holds it.

    Of several hashes of one part, the one that most members hold is taken, and the smaller one where that is even. The
    hash is empty where nobody holds anything. ``held``: member -> the hashes in its receipt.
    """
    chosen: list[bytes] = []
    holders: list[int] = []
    for part in range(n_parts):
        counts = Counter(hashes[part] for hashes in held.values() if hashes[part])
        if len(counts) > 1:
            log.warning("part %d: its reducer sent different bytes to different members", part)
        wanted = min(counts, key=lambda candidate: (-counts[candidate], candidate), default=b"")
        chosen.append(wanted)
        holders.append(min((member for member, hashes in held.items() if hashes[part] == wanted), default=0))
    return chosen, holders


def collects_until_s(
    now: float, *, began_s: float, wait_s: float, timeouts: Timeouts, all_came: bool, most: bool
) -> float | None:
    """Returns the time until which a leader goes on waiting for receipts, or None when it has waited enough.

    It waits for all members that it has not lost, for ``wait_s`` (``Recent.receipt_s``). Where most have sent no
    receipt by then, the others may still wait for a reducer that is silent: it waits until ``Timeouts.settle_s`` and
    ``Timeouts.reduced_part_s`` are over, and only until most have. ``most``: of the members that certify.
    """
    deadline_s = began_s + wait_s
    last_deadline_s = began_s + timeouts.settle_s + timeouts.reduced_part_s
    if all_came or now >= last_deadline_s or (now >= deadline_s and most):
        return None
    return deadline_s if now < deadline_s else last_deadline_s


def promises_s(left_s: float, *, reduced_s: float, credit_s: float, timeouts: Timeouts) -> float:
    """Returns how long a leader may promise its next word and not come to it.

    It has ``Timeouts.settle_s``, in which an honest one collects what it needs to decide, the time that others may
    reduce longer than I, and its credit. Who has all of that may collect as long as ``collects_until_s`` lets it; who
    has stalled a round lately has less. It is never more than LEADERS_SHARE of ``left_s``, the time that the round has
    left. ``reduced_s``: how long I have reduced. ``credit_s``: what the leader may still cost.
    """
    longest_s = timeouts.settle_s + SLOWER_THAN_I * reduced_s + max(credit_s, 0.0)
    return min(LEADERS_SHARE * left_s, longest_s)


# -- what is answered --------------------------------------------------------------------------------------------------


def answer_to_receipt(
    member: int, number: int, *, decision: Decision | None, applied: Commit | None, over: bool
) -> Decision | None:
    """Returns what ``member`` is told about its receipt of butterfly ``number``, or None while there is nothing yet.

    ``decision``: what I have decided as the leader, if I lead. Otherwise the member hears, when the round is over for
    me, which commit I have applied, if any. A butterfly that it shall join is news to it only once.
    """
    if isinstance(decision, Again):
        return decision if decision.number > number and member in decision.members else None
    if decision is not None:
        return decision
    if over:
        return applied or No(reason="the round is over")
    return None


def answer_to_later_leader(asker: int, *, place: int, taken: TookBefore | None, over: bool) -> TookBefore | No | None:
    """Returns what a later leader that asks for a commit is told, or None while there is nothing yet.

    It is told the commit that I have signed, with my signature. A No promises that I sign none of a leader before the
    asker, so it comes only when I have given up all of those, or when the round is over for me. ``asker`` and
    ``place``: where the asker, and the leader that I am with, stand in the order of leaders.
    """
    if taken is not None:
        return taken
    if over or place >= asker:
        return No(reason="no commit has come")
    return None


# -- what fits the round -----------------------------------------------------------------------------------------------


def objection_to(commit: Commit, *, reduced: Sequence[bytes], state: bytes) -> str:
    """Returns why a member does not sign a commit; empty where it does. A leader counts what the members hold, and
    decides nothing: a commit that names other bytes for a part than its reducer has sent me is not what was reduced.

    ``reduced``: the hash of each part as its reducer gave it to me, empty for the others. ``state``: the digest of my
    outer state, where one is due.
    """
    other = [i for i, (mine, named) in enumerate(zip(reduced, commit.part_hashes)) if mine not in (b"", named)]
    if other:
        return f"part {other[0]} is not what its reducer sent me"
    if commit.state and commit.state != state:
        return "my outer state has other bits"
    return ""


def commit_fits(commit: Commit, *, group_size: int, n_parts: int) -> bool:
    """Returns whether a commit names all parts of the update, and for each of them a member that holds it."""
    return len(commit.part_hashes) == len(commit.holders) == n_parts and all(
        holder < group_size for holder in commit.holders
    )


def again_fits(again: Again, *, me: int, newest: int, group_size: int, n_parts: int) -> bool:
    """Returns whether a leader may ask me for this butterfly: it is a new one, I am in it, and members and parts are of
    this round, rising, and at least one. ``newest``: the number of my last butterfly."""
    members, parts = again.members, again.parts
    return (
        newest < again.number < group_size
        and members == sorted(set(members))
        and me in members
        and members[-1] < group_size
        and parts == sorted(set(parts))
        and bool(parts)
        and parts[-1] < n_parts
    )


def receipt_fits(receipt: Receipt, group: Group, *, me: int, newest: int, n_parts: int) -> bool:
    """Returns whether a member may send me this receipt as its leader.

    Only a leader begins butterflies: the first one knows them all (``newest`` is its last), those after it at least how
    many there may be. A number that never was would use up those that are left.
    """
    highest = newest if group.leader == me else len(group.members) - 1
    return me in group.reducers and len(receipt.part_hashes) == n_parts and receipt.number <= highest
