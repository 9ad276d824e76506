"""Whose word counts about which branch of a run's history is the swarm's. Pure functions of records and ledger.

A record is a claim, and a name costs nothing: who has a vote follows from the ledger. It is whoever was known where two
branches part, for what comes after that may be liars' own: those who know only them see nobody else in their ledger. In
the first outer steps, when nobody is known, it is whoever has contributed so far. The run's owner has one vote, since
it stands behind what it has witnessed; no other seed has any. Where nobody of all these is there, everybody has one: to
follow a claim takes certificates anyhow. In a run by invitation, all peers of one token have one vote together; whoever
has one itself counts no other of its own token.

An anchor of the run's owner is above all votes: who stands on a history that leaves it out has none, however many they
are, and whatever they were where the branches part.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Protocol

from p2p_diloco.core.admission import Seated, counts_as, one_vote_each
from p2p_diloco.core.anchor import Anchor
from p2p_diloco.core.known import WINDOW_STEPS, known_at
from p2p_diloco.core.records import Record
from p2p_diloco.core.swarm_head import Standing, way


def electors_at(step: int, last: Sequence[Collection[str]], owner: str) -> frozenset[str]:
    """Returns the peers that have a vote about what follows outer step ``step``. ``last``: the contributors of the last
    updates before, as ``known_at`` has them; ``owner``: the peer id of the run's owner."""
    if step < WINDOW_STEPS:
        return frozenset((owner, *(peer_id for contributed in last for peer_id in contributed)))
    return known_at(step, last).peers | {owner}


class History(Protocol):
    """Tells what a ledger has of a run's history, as far as this peer has followed it."""

    def step_of(self, head: bytes) -> int | None:
        """Returns the outer step of a head; None for one that is not in this history."""
        ...

    def electors(self, step: int) -> frozenset[str]:
        """Returns the peers that have a vote about what follows an outer step of this history."""
        ...


class NoHistory:
    """Is that of a peer that has no ledger yet."""

    def step_of(self, head: bytes) -> int | None:
        """Returns None: no head is in it."""
        return None

    def electors(self, step: int) -> frozenset[str]:
        """Returns nobody."""
        return frozenset()


def electorate(
    records: Sequence[Record],
    mine: Standing,
    me: Seated,
    before: Mapping[bytes, bytes],
    history: History,
    anchor: Anchor | None = None,
) -> tuple[list[Record], Standing | None]:
    """Returns whose standings count, of those in ``records``, and mine if it counts as well. ``before``: as
    ``swarm_head`` has it. ``anchor``: which no history may leave out; whoever stands on one that does has no vote."""
    records = [record for record in records if record.step > 0 or is_genesis(record.head, mine, history)]
    if anchor is not None:
        records = [record for record in records if not leaves_out(anchor, record, mine, before, history)]
    i_count = anchor is None or leads_through(anchor, mine, history)
    electors = history.electors(fork_step(records, mine, before, history))
    i_vote, my_vote = i_count and me.peer_id in electors, {counts_as(me)}
    voters = one_vote_each((one for one in records if one.peer_id in electors), but=my_vote if i_vote else ())
    if voters:
        return voters, mine if i_vote else None
    return one_vote_each(records, but=my_vote), mine if i_count else None


def leads_through(anchor: Anchor, mine: Standing, history: History) -> bool:
    """Returns whether I stand at an anchor, or came by it."""
    return mine.step >= anchor.step and history.step_of(anchor.head) == anchor.step


def leaves_out(anchor: Anchor, record: Record, mine: Standing, before: Mapping[bytes, bytes], history: History) -> bool:
    """Returns whether a peer is known to stand on a history without an anchor: short of it, or on a branch that parts
    from mine before it; where mine is without it itself, on one that parts from mine later. Of a branch of which nobody
    has shown where it comes from, nothing is known."""
    if record.step < anchor.step:
        return True
    shared = next((at for at in map(history.step_of, way(record, before)) if at is not None), None)
    if shared is None:
        return False
    return (shared < anchor.step) == (history.step_of(anchor.head) == anchor.step)


def is_genesis(head: bytes, mine: Standing, history: History) -> bool:
    """Returns whether a head is that of the run's genesis, which the manifest names: there is no other one."""
    return head == mine.head if mine.step == 0 else history.step_of(head) == 0


def fork_step(records: Iterable[Record], mine: Standing, before: Mapping[bytes, bytes], history: History) -> int:
    """Returns the outer step at which the branches part that anybody with a vote there stands on; my own outer step
    where none does. A stranger's branch parts from nothing."""
    step = mine.step
    for record in records:
        shared = next((at for at in map(history.step_of, way(record, before)) if at is not None), None)
        if shared is not None and shared < min(step, record.step) and record.peer_id in history.electors(shared):
            step = shared
    return step
