"""What is decided: pure functions of (my standing, the records of others, signed readiness). No clock, no I/O.

States of a peer, as its record shows them:

    joining  -> inner                         state downloaded, or loaded from the own ledger
    inner    -> gather                        H inner steps done, or the round is closing
    gather   -> reduce -> settle -> apply     a group found; parts exchanged; the leader's commit
    apply    -> evaluate | inner              one peer of the group evaluates theta
    any      -> inner                         the round did not commit: nothing to clean up
    inner    -> joining                       the swarm's head is not mine, nor one that I have passed: catch up

Rules of this file:

    - Nobody can choose to lead: ranks are hashes of head and peer id, and change with every head.
    - Only peers on the same head can meet.
    - The swarm's head is never the loudest claim: it has a majority of those who have ever committed, or directly
      extends a head that has one, as far back as it can show.
    - A roster is believed only as far as its members signed it themselves.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Annotated, Literal

from pydantic import Field

from p2p_diloco.core.identity import Identity
from p2p_diloco.core.manifest import OnMissed
from p2p_diloco.core.outer import UpdateHeader, digest
from p2p_diloco.core.records import Hash, Natural, Record, Signed, open_record, seal, unseal

READINESS_CONTEXT = b"p2p-diloco readiness\0"
LARGEST_WEIGHT_OVER_MEDIAN = 4
LARGEST_SPEED_OVER_MEDIAN = 4
NEARLY = 0.9


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where a peer is: its outer step, its head, and the heads that led there, newest first, as far as it has them."""

    step: int
    head: bytes
    heads: tuple[bytes, ...]
    committed: bool


MissedReason = Literal["alone", "behind", "failed", "leaving", "diverged", "repaired"]


@dataclass(frozen=True, kw_only=True)
class Missed:
    """A round that did not commit here. A value: there is nothing to clean up."""

    reason: MissedReason
    detail: str


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far the trainer is, as it last reported. Times are the event loop's."""

    inner_step: int = 0
    """Since it took theta."""
    planned: int = 0
    step_s: float = 0.0
    """Mean seconds of an inner step."""
    reported_s: float = 0.0

    def ready_in_s(self, now_s: float, gather_s: float) -> float:
        return ready_in_s(
            remaining_steps=self.planned - self.inner_step,
            step_s=self.step_s,
            since_step_s=now_s - self.reported_s,
            gather_s=gather_s,
        )


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
    """Its speed: who is slower plans fewer inner steps."""
    nonce: Annotated[bytes, Field(min_length=8, max_length=8)]
    """New for every attempt, so that no two rounds have the same id."""


def seal_readiness(readiness: Readiness, identity: Identity) -> bytes:
    return seal(readiness, READINESS_CONTEXT, identity)


def open_readiness(sealed: bytes) -> Readiness:
    """ValueError for anything that its own peer did not sign in exactly this form."""
    return unseal(sealed, Readiness, READINESS_CONTEXT)


def new_nonce() -> bytes:
    return os.urandom(8)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Who meets in a round, in the order of rank; everything about the round that follows from the roster alone."""

    round_id: bytes
    step: int
    head: bytes
    members: tuple[Readiness, ...]
    weights: tuple[int, ...]
    """Tokens, at most four times the group's median: a false claim gains little."""
    divisor: int | None
    """What the weighted sum is divided by, in tokens; None: the weights of the contributions that come in time."""
    me: int

    @property
    def leader(self) -> int:
        """Index of who settles the round: the first that can be dialled."""
        return self.reducers[0]

    @property
    def reducers(self) -> tuple[int, ...]:
        """Indices of the members that reduce, and of those who may settle the round, the first one first."""
        return self.reducers_among(range(len(self.members)))

    def reducers_among(self, members: Sequence[int]) -> tuple[int, ...]:
        """Client-mode members do not reduce, unless there is nobody else."""
        dialable = tuple(i for i in members if not self.members[i].client_mode)
        return dialable or tuple(members)

    def header(self, part_hashes: Sequence[bytes]) -> UpdateHeader:
        contributors = tuple((member.peer_id, weight) for member, weight in zip(self.members, self.weights))
        return UpdateHeader(step=self.step, parent=self.head, contributors=contributors, part_hashes=tuple(part_hashes))


def rank(head: bytes, peer_id: str) -> bytes:
    return digest(head, peer_id.encode())


def form_roster(sealed: Iterable[bytes], head: bytes, max_group: int) -> list[bytes]:
    """The members of a round in the order of rank, the best ranked ones where there are too many."""
    ranked = sorted(sealed, key=lambda one: rank(head, open_readiness(one).peer_id))
    return ranked[:max_group]


def check_roster(
    sealed: Sequence[bytes],
    mine: Readiness,
    *,
    min_group: int,
    max_group: int,
    max_weight: int,
    on_missed: OnMissed = "adopt",
    absent: Sequence[bytes] = (),
) -> Group:
    """The group of a roster. ValueError unless every member signed for this very round, once, and I am one of them;
    and every absent one signed that it trains on this head.

    ``on_missed`` "keep": who misses a round comes to the next one with the progress of both, so the sum is divided by
    the weights of all who train on this head, absent ones at the group's median (docs/log.md has the figures).
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
    weights, divisor = counted_weights([member.weight for member in members], on_missed, absent=len(away))
    return Group(
        round_id=digest(b"round", *sealed, *absent),
        step=mine.step,
        head=mine.head,
        members=members,
        weights=weights,
        divisor=divisor,
        me=members.index(mine),
    )


def counted_weights(tokens: Sequence[int], on_missed: OnMissed, absent: int) -> tuple[tuple[int, ...], int | None]:
    """``Group.weights`` and ``Group.divisor`` of members that claim ``tokens`` each."""
    usual = median_low(tokens)
    weights = tuple(min(claimed, LARGEST_WEIGHT_OVER_MEDIAN * usual) for claimed in tokens)
    return weights, sum(weights) + usual * absent if on_missed == "keep" else None


def on_head(records: Iterable[Record], head: bytes) -> list[Record]:
    """Trainers that will come to the next round on this head."""
    return [r for r in records if r.head == head and r.role == "trainer" and r.phase not in ("joining", "left")]


def leader_order(records: Iterable[Record], head: bytes, me: str, client_mode: bool) -> list[str]:
    """Peer ids that may lead a round on ``head``, the first choice first; I am one unless in client mode."""
    leaders = {r.peer_id for r in on_head(records, head) if not r.client_mode}
    if not client_mode:
        leaders.add(me)
    return sorted(leaders, key=lambda peer_id: rank(head, peer_id))


def evaluator(group: Group, head: bytes) -> str:
    """Who evaluates theta after an outer step: another member every time."""
    return min((member.peer_id for member in group.members), key=lambda peer_id: rank(head, peer_id))


def announces_run(records: Iterable[Record], me: str) -> bool:
    """Whether I announce the run to newcomers: some eight peers do, so the list stays short in a large swarm."""
    return sum(record.peer_id < me for record in records) < 8


def swarm_head(
    records: Iterable[Record | Standing], mine: Standing | None, before: Mapping[bytes, bytes] | None = None
) -> tuple[int, bytes] | None:
    """(outer step, head) of the swarm; None when nobody is there. ``before``: head -> the one that it is known to
    follow from, for a record has room for its peer's last ones only.

    Voters are the live peers that have committed, and me if I have. The base is the newest head that most voters stand
    on or have passed. A head that has the base in its history is newer than the base without contradicting it: of
    those, the one with the most voters on or beyond it, then the newest, then the smaller digest. A claim from nowhere,
    however new, extends nothing and changes nothing. Where no head has a majority (a healed partition), the same order
    decides among all.
    """
    everybody: list[Record | Standing] = [*records, *([mine] if mine is not None else [])]
    voters = [voter for voter in everybody if voter.committed] or everybody
    if not voters:
        return None
    # Most say the same: a way, which is as long as the run's history, is walked once for all of them.
    alike: dict[tuple[int, bytes, tuple[bytes, ...]], list[Record | Standing]] = {}
    for voter in voters:
        alike.setdefault((voter.step, voter.head, tuple(voter.heads)), []).append(voter)
    paths = [path_of(same[0], before or {}) for same in alike.values()]
    support: Counter[tuple[int, bytes]] = Counter()
    for path, same in zip(paths, alike.values()):
        for candidate in path:
            support[candidate] += len(same)

    def order(candidate: tuple[int, bytes]) -> tuple[int, int, bytes]:
        return (-support[candidate], -candidate[0], candidate[1])

    agreed = [candidate for candidate, count in support.items() if 2 * count > len(voters)]
    if not agreed:
        return min(support, key=order)
    base = max(agreed)
    newer = {path[0] for path in paths if base in path[1:]}
    return min(newer, key=order) if newer else base


def way_of(peer: Record | Standing, before: Mapping[bytes, bytes]) -> list[bytes]:
    """Its head and those that led there, newest first: what it says itself, and what is known to come before that."""
    way = [peer.head, *peer.heads]
    while (older := before.get(way[-1])) is not None:
        way.append(older)
    return way


def path_of(peer: Record | Standing, before: Mapping[bytes, bytes]) -> list[tuple[int, bytes]]:
    """As ``way_of``, each head with its outer step."""
    return [(peer.step - back, head) for back, head in enumerate(way_of(peer, before))]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What somebody says that theta of an outer step makes of held-out text."""

    step: int
    loss: float
    """Nats per token."""
    path: Collection[tuple[int, bytes]]
    """(outer step, head) of where who says so stands, and of where it is known to have stood before."""


def believed_losses(evaluations: Iterable[Evaluation], swarm: tuple[int, bytes] | None) -> list[tuple[int, float]]:
    """(outer step, held-out loss), one loss a step, rising. ``swarm``: as ``swarm_head`` has it.

    Believed is who stands on the swarm's head, or has passed it, and of them nobody about a step that the swarm has not
    made, nor a loss that no model has: not finite, or below 0. Where several have evaluated a step, the lower one of
    the losses in the middle counts. Whoever stands on the head can still lie about a step that it alone evaluated.
    """
    losses: dict[int, list[float]] = {}
    for said in evaluations:
        if swarm is not None and swarm in said.path and said.step <= swarm[0] and 0 <= said.loss < math.inf:
            losses.setdefault(said.step, []).append(said.loss)
    return [(step, median_low(losses[step])) for step in sorted(losses)]


def newest_evaluation(records: Iterable[Record], swarm: tuple[int, bytes] | None) -> tuple[int, float] | None:
    """(outer step, held-out loss) of the newest step whose loss is believed; None where there is none."""
    evaluations = (
        Evaluation(step=record.held_out_step, loss=record.held_out_loss, path=path_of(record, {}))
        for record in records
        if record.held_out_loss is not None
    )
    return next(reversed(believed_losses(evaluations, swarm)), None)


def from_nowhere(records: Iterable[Record], mine: Standing, before: Mapping[bytes, bytes]) -> list[Record]:
    """Of those who have a vote, who is not known to have ever stood where I did: it is on a history of its own, or more
    steps ahead or behind than a record shows."""
    here = set(way_of(mine, before))
    return [r for r in records if r.committed and here.isdisjoint(way_of(r, before))]


@dataclass(frozen=True, kw_only=True)
class Dispute:
    """Peers that came the same way as I name another digest of the same state."""

    others: tuple[str, ...]
    """Peer ids of all who do, in the order of the records."""
    majority: bytes | None
    """Another digest than mine that more than half of all name, me counted in: two others at least. None: there is no
    such digest."""


def disputed(step: int, digest: bytes, heads: Mapping[int, bytes], records: Iterable[Record]) -> Dispute | None:
    """Whether somebody else's newest snapshot, at ``step`` like mine, is of another state than mine, of ``digest``.

    ``heads``: outer step -> head of my history. Heads name updates, not what came out of them; so peers on the same
    head ought to have the same bits, and one that has other bits cannot tell by its head. Only those are compared who
    have ever committed and came to ``step`` and beyond by my heads.
    """
    same_way = [
        r
        for r in records
        if r.committed
        and r.snapshot_step == step
        and any(
            heads.get(r.step - back) == head for back, head in enumerate((r.head, *r.heads)) if r.step - back >= step
        )
    ]
    others = tuple(r.peer_id for r in same_way if r.snapshot_digest != digest)
    if not others:
        return None
    named = Counter(r.snapshot_digest for r in same_way if r.snapshot_digest != digest)
    most = min(named, key=lambda candidate: (-named[candidate], candidate))
    outvoted = 2 * named[most] > len(same_way) + 1
    return Dispute(others=others, majority=most if outvoted else None)


def must_catch_up(mine: Standing, target: tuple[int, bytes] | None) -> bool:
    """Whether the swarm's head is neither mine nor one that I have passed."""
    return target is not None and target[1] != mine.head and target[1] not in mine.heads


def ready_in_s(*, remaining_steps: int, step_s: float, since_step_s: float, gather_s: float) -> float:
    """Seconds until a trainer will be ready that was told that the round closes in ``gather_s``: it finishes its
    steps if there is time, else stops at the last step that ends in time, but not before one ends. All the time there
    is for one that has not finished a step yet, whose speed nobody knows."""
    if step_s <= 0:
        return gather_s if remaining_steps > 0 else 0.0
    next_end_s = max(step_s - since_step_s, 0.0)
    if remaining_steps <= 0:
        return 0.0
    finish_s = next_end_s + (remaining_steps - 1) * step_s
    if finish_s <= gather_s:
        return finish_s
    steps_in_time = int((gather_s - next_end_s) // step_s) if gather_s > next_end_s else 0
    return next_end_s + steps_in_time * step_s


def planned_steps(inner_steps: int, mine: float, others: Sequence[float]) -> int:
    """How many inner steps a peer plans, so that all finish together: in proportion to its speed (dynamic local
    updates, arXiv 2401.09135, section 4). ``inner_steps``: H, what the fastest makes. Speeds in tokens per second, 0
    where unknown; one that is more than four times the median counts as four times the median: a false claim gains
    little. Whoever is nearly as fast as the fastest makes all H: speeds measured on a shared processor differ by as
    much from one round to the next."""
    known = [speed for speed in (mine, *others) if speed > 0]
    if mine <= 0 or len(known) < 2:
        return inner_steps
    fastest = min(max(known), LARGEST_SPEED_OVER_MEDIAN * median_low(known))
    return inner_steps if mine >= NEARLY * fastest else max(1, round(inner_steps * mine / fastest))


def outer_step_due(*, inner_step: int, planned: int, step_s: float, closes_in_s: float | None, behind: bool) -> bool:
    """Whether a trainer that has just ended an inner step offers what it has: its steps are done, the round closes
    before another one ends, or the swarm went on without it."""
    if behind or inner_step >= planned:
        return True
    return inner_step > 0 and closes_in_s is not None and closes_in_s < step_s
