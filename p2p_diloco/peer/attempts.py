"""The attempts of a trainer's peer at an outer step: one round each, whose update is committed here and nowhere else.

    make   gather -> reduce -> settle -> apply
    hold   the same, with a group that there is: so the seed of the run's owner takes part where it helps (``helping``)

A round that fails is a value (``Missed``), and leaves the state as it was. What goes wrong here (disk, daemon) raises
LocalError.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import Literal

from p2p_diloco.core.aggregate import Alignment, align, norm_of
from p2p_diloco.core.codec import Vector
from p2p_diloco.core.events import EventLog
from p2p_diloco.core.group import Group, evaluator
from p2p_diloco.core.pace import Phase, claimed_steps, second_most_steps
from p2p_diloco.core.swarm_head import Standing
from p2p_diloco.core.update import Update, contributors_in_full
from p2p_diloco.core.waiting import now_s, to_its_end
from p2p_diloco.ledger.ledger import Ledger
from p2p_diloco.ledger.replica import Replica
from p2p_diloco.peer.control import OuterResult
from p2p_diloco.peer.presence import Presence
from p2p_diloco.peer.reception import Reception
from p2p_diloco.peer.round_event import round_ended
from p2p_diloco.peer.upkeep import Upkeep
from p2p_diloco.peer.witness import Witness
from p2p_diloco.round.here import Here
from p2p_diloco.round.matchmaking import Matchmaker
from p2p_diloco.round.meeting import Meeting
from p2p_diloco.round.outcome import Missed, MissedReason, Settled
from p2p_diloco.round.settle import RoundCost, Settlement


@dataclass(frozen=True, kw_only=True)
class Offer:
    """Is what the trainer has for a round."""

    tokens: int
    """It has learned from so many since its last outer step."""
    dropped: bool
    """Offer nothing, as if the contribution had been lost on its way."""
    pace: float
    """The trainer's speed in tokens per second; 0 where unknown."""


@dataclass(kw_only=True, eq=False)
class Attempts:
    """Makes attempts, one at a time, with the parts of one ``Peer``."""

    here: Here
    replica: Replica
    local: Vector | None
    """The trainer's parameters, float32 [n]; they do not change while a round lasts. None at a seed."""
    witness: Witness
    matchmaker: Matchmaker
    upkeep: Upkeep
    presence: Presence
    reception: Reception
    events: EventLog
    phase: Phase
    """How many inner steps the trainer plans: each round that commits says so anew."""
    _last_norms: tuple[bytes, tuple[float, ...]] | None = None
    """A head, and the norms of the parts of the update that led there."""
    _telling: asyncio.Task[None] | None = None
    """The round that I led last is being told to the seeds."""

    async def close(self) -> None:
        """Tells the seeds no more."""
        if self._telling is not None:
            self._telling.cancel()
            await asyncio.gather(self._telling, return_exceptions=True)

    async def make(self, offer: Offer) -> OuterResult:
        """Makes one attempt: gather, reduce, settle, apply. Returns what became of it."""
        last_norms, state = await self._norms_of_last(), await self._digest_due()
        started_s = now_s()
        self.presence.enter("gather")
        group = await self.matchmaker.find_group(
            offer.tokens, dropped=offer.dropped, tokens_per_s=offer.pace, trained_s=self.phase.trained_s
        )
        gather_s = now_s() - started_s
        self.phase.wait(self.matchmaker.called_s)
        if isinstance(group, Missed):
            self.events.write(round_ended(self.here.seat, group, gather_s=gather_s))
            return self._result(group.reason, 0, gather_s, RoundCost())
        return await self._hold(group, last_norms, state, gather_s=gather_s, pace=offer.pace)

    async def hold(self, group: Group) -> OuterResult:
        """Takes part in the round of a group that I have gathered, as the seed that helps it. Returns what became of
        it."""
        return await self._hold(group, await self._norms_of_last(), await self._digest_due(), gather_s=0.0, pace=0.0)

    async def _hold(
        self, group: Group, last_norms: tuple[float, ...] | None, state: bytes, *, gather_s: float, pace: float
    ) -> OuterResult:
        self.here.seat.in_round = True
        settlement = self._meet(group, last_norms, state)
        try:
            self.presence.enter("reduce")
            await settlement.reduce()
            lost, silent = frozenset(settlement.meeting.lost), frozenset(settlement.meeting.silent)
            self.presence.enter("settle")
            outcome = await settlement.settle()
            cost = settlement.cost()
            idle = lost if isinstance(outcome, Missed) else silent  # who is gone costs little where others commit
            self._judge(settlement, outcome, idle, cost.reduce_s + cost.settle_s)
            if isinstance(outcome, Missed):
                self.reception.audits.begin(settlement.meeting, None)
                self.events.write(round_ended(self.here.seat, outcome, settlement, gather_s=gather_s))
                return self._result(outcome.reason, len(group.trainers), gather_s, cost)
            self.presence.enter("apply")
            apply_started_s = now_s()
            alignment = await self._apply(settlement, outcome)
            self._plan(group, outcome.update, pace)
            apply_s = now_s() - apply_started_s
        finally:
            self.here.seat.in_round = False
            self.here.seat.changed.ring()
        self.reception.audits.begin(settlement.meeting, outcome.update)
        if settlement.leads:
            self._telling = asyncio.create_task(self.presence.pushes.to_seeds())
        standing = self.here.seat.standing
        self.events.write(
            round_ended(self.here.seat, outcome, settlement, gather_s=gather_s, apply_s=apply_s, alignment=alignment)
        )
        evaluates = evaluator(group, standing.head) == self.here.peer_id
        result = self._result("", len(group.trainers), gather_s, cost)
        return replace(result, apply_s=apply_s, evaluate=evaluates)

    def _result(self, reason: MissedReason | Literal[""], group: int, gather_s: float, cost: RoundCost) -> OuterResult:
        """Returns what became of a round of ``group`` members. ``reason``: why it did not commit; empty where it
        did."""
        state = self.replica.loaded
        return OuterResult(
            committed=not reason,
            adopted=False,
            reason=reason,
            step=state.step,
            head=state.head.hex(),
            group=group,
            gather_s=gather_s,
            reduce_s=cost.reduce_s,
            settle_s=cost.settle_s,
            bytes_sent=cost.bytes_sent,
            bytes_received=cost.bytes_received,
        )

    async def _norms_of_last(self) -> tuple[float, ...] | None:
        """Returns the norm of each part of the update that led here; None where my ledger does not have it."""
        standing = self.here.seat.standing
        if self._last_norms is None or self._last_norms[0] != standing.head:
            found = await asyncio.to_thread(_update_norms, self.replica.ledger, standing)
            self._last_norms = None if found is None else (standing.head, found)
        return None if self._last_norms is None else self._last_norms[1]

    def _judge(self, settlement: Settlement, outcome: Settled | Missed, idle: frozenset[int], took_s: float) -> None:
        """Remembers who failed me in a round, and who contributed to all parts that it could. ``idle``: those whom I
        lost in the butterfly, and who count as idle. A leader that was silent, or only promised, pays for what it has
        cost, also where the next one brings the round to its end; so does a reducer that answered late, and a known
        peer beside the round. And how fast others have sent, of those that may reduce, and how long all took."""
        company, group = self.matchmaker.company, settlement.group
        ids = [member.peer_id for member in group.members]
        contributed = [] if isinstance(outcome, Missed) else contributors_in_full(outcome.update, settlement.excused())
        company.judge_round({ids[i] for i in idle}, len(ids) - 1, took_s, contributed)
        company.measured.note(group.step, {ids[i]: uplink for i, uplink in settlement.uplinks().items()})
        if isinstance(outcome, Missed):
            company.recent.forget_rounds()
        else:
            intake, hearing = settlement.member.butterflies[0].intake, settlement.leader.hearing
            company.recent.note_round(intake.times_s(), hearing.receipts_s)
        stalled_s = settlement.stalled_s
        if len(settlement.meeting.lost) < len(ids) - 1:  # else I was cut off myself, most likely
            for leader in stalled_s:
                company.failed(group.head, ids[leader], cost_s=stalled_s[leader])
        late_s = settlement.once.late_s
        if len(settlement.meeting.lost | late_s.keys()) < len(ids) - 1:
            for reducer in late_s:
                company.kept_waiting(ids[reducer], late_s[reducer])
        for peer_id, waited_s in settlement.rosters.late_s.items():
            company.kept_waiting(peer_id, waited_s)
        if isinstance(outcome, Missed) and group.leader in settlement.meeting.lost - stalled_s.keys():
            company.failed(group.head, ids[group.leader], cost_s=0.0)

    async def _digest_due(self) -> bytes:
        """Returns the digest of the outer state, at an outer step at which a snapshot is due; empty elsewhere."""
        return await asyncio.to_thread(self.replica.digest_due)

    def _meet(self, group: Group, last_norms: tuple[float, ...] | None, state: bytes) -> Settlement:
        """Opens the round: its members are served from now on."""
        company = self.matchmaker.company
        settlement = Settlement(
            Meeting(
                group=group,
                identity=self.here.identity,
                owner=self.replica.manifest.owner,
                transport=self.here.transport,
                protocol=self.here.protocol,
                directory=self.here.directory,
                timeouts=self.here.timeouts,
                grid=self.replica.ledger.grid,
                theta=self.replica.theta,
                local=self.replica.theta if self.local is None else self.local,
                min_group=self.replica.manifest.spec.round.min_group,
                state=state,
                last_norms=last_norms,
                lapsed=frozenset(company.lapsed),
                recent=company.recent,
                uplinks=company.measured.at(group.step),
                credits_s={one.peer_id: company.rounds.left_s(one.peer_id, now_s()) for one in group.members},
                kept=self.reception.audits.kept(),
                audit_parts=self.reception.audits.count,
                around=self.reception.around(group),
                known=self.here.seat.known.peers,
                own_witness=self.witness,
            )
        )
        self.reception.open_round(settlement)
        return settlement

    async def _apply(self, settlement: Settlement, settled: Settled) -> Alignment | None:
        """Commits the update that the group has agreed on. Returns how it compares with my own
        contribution, where it can be compared."""
        meeting, update = settlement.meeting, settled.update
        alignment = None
        if self.local is not None:
            alignment = await asyncio.to_thread(align, meeting.theta, meeting.local, update, meeting.grid)
        await self._commit(settled)
        self._last_norms = self.here.seat.standing.head, tuple(meeting.norms)
        met = (member.peer_id for i, member in enumerate(settlement.group.members) if i not in meeting.lost)
        self.here.directory.met(met, self.here.seat.standing.step, self.here.seat.standing.head)
        return alignment

    def _plan(self, group: Group, update: Update, pace: float) -> None:
        """Plans the inner steps up to the next outer step."""
        spec, weights = self.replica.manifest.spec, [weight for _, weight in update.header.contributors]
        tokens = spec.tokens_per_inner_step
        speeds = [member.tokens_per_s for member in group.members if member.peer_id != self.here.peer_id]
        claimed = claimed_steps(spec.inner.steps, pace, speeds)
        self.phase.plan(second_most_steps(weights, tokens), tokens / pace if pace > 0 else 0.0, claimed)

    async def _commit(self, settled: Settled) -> None:
        """Writes the update to the ledger first, and then moves theta. A snapshot, where one is due, is written while
        training goes on."""
        await self.upkeep.settled()
        if not self.replica.sound:
            await self.upkeep.mend()
        await to_its_end(asyncio.to_thread(self.replica.commit, settled.update, settled.certificate))
        self.presence.take_standing()
        self.upkeep.moved()


def _update_norms(ledger: Ledger, standing: Standing) -> tuple[float, ...] | None:
    update = ledger.update(standing.step - 1) if standing.step else None
    if update is None or update.header.head != standing.head:
        return None
    return tuple(norm_of(ledger.grid.decode(i, part.data)) for i, part in enumerate(update.parts))
