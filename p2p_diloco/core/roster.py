"""Who meets in a round: readiness that its own peers signed, and the group that follows from a roster of them.

Rules of this file:

    - Nobody can choose to lead: ranks are hashes of head and peer id, and change with every head.
    - Only peers on the same head can meet.
    - A roster is believed only as far as its members signed it themselves.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Annotated

from pydantic import Field

from p2p_diloco.core.aggregate import Aggregation
from p2p_diloco.core.digest import digest
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.records import MAX_SEAT_BYTES, Hash, Natural, Record, Signed, open_record, seal, unseal
from p2p_diloco.core.runfile import OnMissed
from p2p_diloco.core.update import UpdateHeader

READINESS_CONTEXT = b"p2p-diloco readiness\0"


class Readiness(Signed):
    """A peer's signed word that it is ready for one round on one head."""

    run_id: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
    step: Natural
    head: Hash
    weight: Annotated[int, Field(gt=0, lt=2**60)]
    """Tokens that this peer trained on since it took theta."""
    client_mode: bool
    dropped: bool = False
    """It reduces for the others and takes the update, but contributes nothing this time."""
    tokens_per_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Its speed, as it claims: others may plan more for it, and never fewer."""
    nonce: Annotated[bytes, Field(min_length=8, max_length=8)]
    """New for every attempt, so that no two rounds have the same id."""
    seat: Annotated[bytes, Field(max_length=MAX_SEAT_BYTES)] = b""
    """As in the peer's record."""


def seal_readiness(readiness: Readiness, identity: Identity) -> bytes:
    """Returns a readiness as the bytes that its peer has signed."""
    return seal(readiness, READINESS_CONTEXT, identity)


def open_readiness(sealed: bytes) -> Readiness:
    """Returns a sealed readiness. ValueError for anything that its own peer did not sign in exactly this form."""
    return unseal(sealed, Readiness, READINESS_CONTEXT)


def new_nonce() -> bytes:
    """Returns what tells one attempt at a round from the next."""
    return os.urandom(8)


@dataclass(frozen=True, kw_only=True)
class Group:
    """The members of a round, in the order of rank, and everything about the round that follows from the roster
    alone."""

    round_id: bytes
    step: int
    head: bytes
    members: tuple[Readiness, ...]
    weights: tuple[int, ...]
    """Tokens, at most ``Aggregation.largest_weight`` times the group's median: a false claim gains little."""
    total_weight: int | None
    """What the weighted sum of the contributions is divided by, in tokens. None: by the weights of those that come in
    time."""
    aggregation: Aggregation
    """The run's rule for the mean of a part."""
    me: int

    @property
    def leader(self) -> int:
        """Index of the member that settles the round: the first that can be dialled."""
        return self.reducers[0]

    @property
    def reducers(self) -> tuple[int, ...]:
        """Indices of the members that reduce, by rank. The same ones settle the round, one after the other fails."""
        return self.reducers_among(range(len(self.members)))

    def reducers_among(self, members: Sequence[int]) -> tuple[int, ...]:
        """Returns the indices of those of ``members`` that reduce for them: all that can be dialled, or all in client
        mode when there is nobody else."""
        dialable = tuple(i for i in members if not self.members[i].client_mode)
        return dialable or tuple(members)

    def header(self, part_hashes: Sequence[bytes]) -> UpdateHeader:
        """Returns the header of the update that this round makes of these parts."""
        contributors = tuple((member.peer_id, weight) for member, weight in zip(self.members, self.weights))
        return UpdateHeader(step=self.step, parent=self.head, contributors=contributors, part_hashes=tuple(part_hashes))


def rank(head: bytes, peer_id: str) -> bytes:
    """Returns the rank of a peer on a head: the smaller one is asked first to lead."""
    return digest(head, peer_id.encode())


def form_roster(sealed: Iterable[bytes], head: bytes, max_group: int) -> list[bytes]:
    """Returns the members of a round in the order of rank, the best-ranked ones when there are too many."""
    ranked = sorted(sealed, key=lambda one: rank(head, open_readiness(one).peer_id))
    return ranked[:max_group]


def check_roster(
    sealed: Sequence[bytes],
    mine: Readiness,
    *,
    min_group: int,
    max_group: int,
    max_weight: int,
    aggregation: Aggregation,
    on_missed: OnMissed = "adopt",
    absent: Sequence[bytes] = (),
) -> Group:
    """Returns the group of a roster. ValueError unless every member signed for this very round, once, and I am one of
    them; and every absent peer signed that it trains on this head.

    ``on_missed`` "keep": a peer that misses a round comes to the next one with the progress of both, so the sum is
    divided by the weights of all that train on this head, absent ones at the group's median (docs/log.md has the
    figures).
    """
    if not min_group <= len(sealed) <= max_group:
        raise ValueError(f"a roster of {len(sealed)}")
    members = tuple(open_readiness(one) for one in sealed)
    ids = [member.peer_id for member in members]
    if len(set(ids)) != len(ids):
        raise ValueError("a roster that names a peer twice")
    if mine not in members:
        raise ValueError("a roster without me")
    for member in members:
        if (member.run_id, member.step, member.head) != (mine.run_id, mine.step, mine.head):
            raise ValueError("a roster with a member on another head")
        if member.weight > max_weight:
            raise ValueError(f"a roster with a weight of {member.weight}")
    if ids != sorted(ids, key=lambda peer_id: rank(mine.head, peer_id)):
        raise ValueError("a roster that is not in the order of rank")
    away = [open_record(one) for one in absent]
    if away and on_missed != "keep":
        raise ValueError("a roster with absent peers")
    if len({*ids, *(record.peer_id for record in away)}) != len(ids) + len(away):
        raise ValueError("a roster that names an absent peer twice")
    if any(record.run_id != mine.run_id for record in away) or len(on_head(away, mine.head)) != len(away):
        raise ValueError("a roster with an absent peer that does not train on this head")
    claimed = [member.weight for member in members]
    weights, total_weight = counted_weights(claimed, aggregation, on_missed, absent=len(away))
    return Group(
        round_id=digest(b"round", *sealed, *absent),
        step=mine.step,
        head=mine.head,
        members=members,
        weights=weights,
        total_weight=total_weight,
        aggregation=aggregation,
        me=members.index(mine),
    )


def counted_weights(
    tokens: Sequence[int], aggregation: Aggregation, on_missed: OnMissed, absent: int
) -> tuple[tuple[int, ...], int | None]:
    """Returns ``Group.weights`` and ``Group.total_weight`` of members that claim ``tokens`` each, where ``absent`` more
    peers train on their head."""
    usual = median_low(tokens)
    largest = math.floor(aggregation.largest_weight * usual)
    weights = tuple(min(claimed, largest) for claimed in tokens)
    return weights, sum(weights) + usual * absent if on_missed == "keep" else None


def on_head(records: Iterable[Record], head: bytes) -> list[Record]:
    """Returns the records of the trainers that will come to the next round on this head."""
    return [r for r in records if r.head == head and r.role == "trainer" and r.phase not in ("joining", "left")]


def leader_order(records: Iterable[Record], head: bytes, me: str, client_mode: bool) -> list[str]:
    """Returns the peers that may lead a round on ``head``, the first choice first. I am one unless in client mode."""
    leaders = {r.peer_id for r in on_head(records, head) if not r.client_mode}
    if not client_mode:
        leaders.add(me)
    return sorted(leaders, key=lambda peer_id: rank(head, peer_id))


def evaluator(group: Group, head: bytes) -> str:
    """Returns the member that evaluates theta after an outer step: another one every time."""
    return min((member.peer_id for member in group.members), key=lambda peer_id: rank(head, peer_id))


def announces_run(records: Iterable[Record], me: str) -> bool:
    """Returns whether I announce the run to newcomers. Some eight peers do, so the list stays short in a large
    swarm."""
    return sum(record.peer_id < me for record in records) < 8
