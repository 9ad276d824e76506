"""The outer steps of a trainer's peer: rounds tried, and one update committed, or the swarm's state taken.

    outer_step   up to ATTEMPTS rounds on one head; where the swarm has gone on, catch up instead
    _round       gather -> reduce -> settle -> apply: the only place where an update is committed
    _adopt       take the swarm's state in place of a round

A round that fails is a value (``Missed``), and leaves the state as it was. What goes wrong here (disk, daemon) raises
LocalError.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass, field, replace

import numpy as np

from p2p_diloco.core.aggregate import Alignment, align, norm_of
from p2p_diloco.core.codec import Vector
from p2p_diloco.core.errors import Gap
from p2p_diloco.core.event import OuterGradientOffered
from p2p_diloco.core.events import EventLog
from p2p_diloco.core.group import Group, evaluator
from p2p_diloco.core.pace import Phase, claimed_steps, second_most_steps
from p2p_diloco.core.swarm_head import Standing, must_catch_up
from p2p_diloco.core.update import Update, contributors_in_full, parts_with
from p2p_diloco.core.waiting import now_s
from p2p_diloco.ledger.ledger import Ledger
from p2p_diloco.ledger.replica import Replica
from p2p_diloco.peer.control import OuterResult
from p2p_diloco.peer.follower import Follower
from p2p_diloco.peer.presence import LastRound, Presence
from p2p_diloco.peer.reception import Reception
from p2p_diloco.peer.round_event import round_ended
from p2p_diloco.peer.upkeep import Upkeep
from p2p_diloco.round.here import Here
from p2p_diloco.round.matchmaking import Matchmaker
from p2p_diloco.round.meeting import Meeting
from p2p_diloco.round.outcome import Missed, Settled
from p2p_diloco.round.settle import RoundCost, Settlement

log = logging.getLogger(__name__)

ATTEMPTS = 3
"""Rounds tried on one head before the trainer goes on alone."""


@dataclass(kw_only=True, eq=False)
class OuterSteps:
    """Makes outer steps, one at a time, with the parts of one ``Peer``."""

    here: Here
    replica: Replica
    local: Vector
    """The trainer's parameters, float32 [n]; they do not change while ``outer_step`` runs."""
    matchmaker: Matchmaker
    follower: Follower
    upkeep: Upkeep
    presence: Presence
    reception: Reception
    events: EventLog
    _phase: Phase = field(init=False)
    """How long the trainer trains, and how many inner steps it plans."""
    _pace: float = 0.0
    """Tokens per second of this peer's trainer; 0 where unknown."""
    _last_norms: tuple[bytes, tuple[float, ...]] | None = None
    """A head, and the norms of the parts of the update that led there."""
    _telling: asyncio.Task[None] | None = None
    """The round that I led last is being told to the seeds."""

    def __post_init__(self) -> None:
        self._phase = Phase(inner_steps=self.replica.manifest.spec.inner.steps)

    async def outer_step(self, tokens: int, *, dropped: bool, pace: float) -> OuterResult:
        """Offers what the trainer learned from ``tokens`` tokens, takes what the group learned, and returns what became
        of it: at the latest when ATTEMPTS rounds have failed. ``dropped``: offer nothing, as if the contribution had
        been lost on its way. ``pace``: the trainer's speed in tokens per second; 0 where unknown."""
        self._pace = pace
        seat = self.here.seat
        gather_s = self.replica.manifest.spec.round.gather_s
        called_s = None if seat.closes_s is None else seat.closes_s - gather_s
        whole_plan = seat.progress.inner_step >= self.replica.manifest.spec.inner.steps
        self._phase.end(now_s(), called_s, tokens / pace if pace > 0 else 0.0, whole_plan=whole_plan)
        self.events.write(OuterGradientOffered(step=self._step, tokens=tokens))
        result = await self._offer(tokens, dropped)
        result = replace(result, planned=self._phase.planned)
        self._phase.go_on(now_s(), moved=result.moved)
        seat.closes_s = None
        self.follower.behind = False
        seat.progress = replace(seat.progress, inner_step=0, reported_s=now_s())
        self.presence.enter("evaluate" if result.evaluate else "inner")
        if result.adopted:
            await self.presence.push_to_all()
        self.presence.last_round = LastRound(
            group=result.group,
            seconds=result.gather_s + result.reduce_s + result.settle_s + result.apply_s,
            bytes=result.bytes_sent + result.bytes_received,
        )
        self.presence.publish_now.ring()
        return result

    def begin(self) -> None:
        """Notes that the trainer takes theta now."""
        self._phase.go_on(now_s(), moved=True)

    def close(self) -> None:
        """Tells the seeds no more."""
        if self._telling is not None:
            self._telling.cancel()

    @property
    def _step(self) -> int:
        return self.here.seat.standing.step

    async def _offer(self, tokens: int, dropped: bool) -> OuterResult:
        """Tries rounds, unless training has diverged; then the trainer goes back to theta."""
        before, mends = self.here.seat.standing, self.upkeep.mends
        if not await asyncio.to_thread(_all_finite, self.local, self.replica.theta):
            log.error("training diverged: a parameter is not finite; going back to theta of outer step %d", self._step)
            with contextlib.suppress(Gap):
                await self.upkeep.mend()  # a bit that flips in theta can make training diverge, again and again
            missed = Missed(reason="diverged", detail="a parameter is not finite")
            self.events.write(round_ended(self.here.seat.standing, missed))
            return self._result(adopted=True, reason="diverged")
        result = await self._try_rounds(tokens, dropped)
        keeps = self.replica.manifest.spec.round.on_missed == "keep" and self.upkeep.mends == mends
        if result.moved and keeps:  # what was learned from a theta that was wrong is not
            result = replace(result, kept=await asyncio.to_thread(self._keep, before, self.local))
        return result

    def _keep(self, before: Standing, local: Vector) -> bool:
        """Takes parts of the new theta into ``local`` whose update has my contribution in it, for they would count
        twice; the state has moved on from ``before``. Returns whether any parts are left as the trainer made them: none
        where my ledger does not show the way, after a roll-back or a snapshot."""
        taken: set[int] = set()
        head = before.head
        for step in range(before.step, self._step):
            update = self.replica.ledger.update(step)
            if update is None or update.header.parent != head:
                return False
            head = update.header.head
            taken |= parts_with(update, self.here.peer_id)
        slices = self.replica.ledger.grid.slices
        if head == before.head or len(taken) == len(slices):
            return False
        for part in taken:
            local[slices[part]] = self.replica.theta[slices[part]]
        return True

    async def _try_rounds(self, tokens: int, dropped: bool) -> OuterResult:
        """Tries rounds until one does not fail, at most ATTEMPTS, or catches up where nobody waits for me here."""
        for _ in range(ATTEMPTS):
            await self.follower.ask_ways(failed=False)
            if self.follower.must_move():
                result = await self._adopt()
                if result.moved or self.follower.must_move():
                    return result  # else nobody has what was claimed, and those on our head wait for us
            result = await self._round(tokens, dropped)
            if result.reason == "behind":
                return await self._adopt()
            if result.reason != "failed":
                break
        return result

    # -- a round -----------------------------------------------------------------------------------------------------

    async def _round(self, tokens: int, dropped: bool) -> OuterResult:
        """Makes one attempt: gather, reduce, settle, apply."""
        last_norms, state = await self._norms_of_last(), await self._digest_due()
        started_s = now_s()
        self.presence.enter("gather")
        group = await self.matchmaker.find_group(tokens, dropped=dropped, tokens_per_s=self._pace)
        gather_s = now_s() - started_s
        if isinstance(group, Missed):
            self.events.write(round_ended(self.here.seat.standing, group, gather_s=gather_s))
            return self._result(reason=group.reason, gather_s=gather_s)
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
                self.events.write(round_ended(self.here.seat.standing, outcome, settlement, gather_s=gather_s))
                return self._result(reason=outcome.reason, group=len(group.members), gather_s=gather_s, cost=cost)
            self.presence.enter("apply")
            apply_started_s = now_s()
            alignment = await self._apply(settlement, outcome)
            apply_s = now_s() - apply_started_s
        finally:
            self.here.seat.in_round = False
            self.here.seat.changed.ring()
        self.reception.audits.begin(settlement.meeting, outcome.update)
        if settlement.leads:
            self._telling = asyncio.create_task(self.presence.push_to_seeds())
        result = self._result(
            committed=True,
            group=len(group.members),
            gather_s=gather_s,
            cost=cost,
            apply_s=apply_s,
            evaluate=evaluator(group, self.here.seat.standing.head) == self.here.peer_id,
        )
        ended = round_ended(
            self.here.seat.standing, None, settlement, gather_s=gather_s, apply_s=apply_s, alignment=alignment
        )
        self.events.write(ended)
        return result

    async def _norms_of_last(self) -> tuple[float, ...] | None:
        """Returns the norm of each part of the update that led here; None where my ledger does not have it."""
        standing = self.here.seat.standing
        if self._last_norms is None or self._last_norms[0] != standing.head:
            found = await asyncio.to_thread(_update_norms, self.replica.ledger, standing)
            self._last_norms = None if found is None else (standing.head, found)
        return None if self._last_norms is None else self._last_norms[1]

    def _judge(self, settlement: Settlement, outcome: Settled | Missed, idle: frozenset[int], took_s: float) -> None:
        """Remembers who failed me in a round, and who contributed in full. ``idle``: those whom I lost in the
        butterfly, and who count as idle."""
        company, group = self.matchmaker.company, settlement.group
        ids = [member.peer_id for member in group.members]
        contributed = [] if isinstance(outcome, Missed) else contributors_in_full(outcome.update)
        company.judge_round({ids[i] for i in idle}, len(ids) - 1, took_s, contributed)
        if isinstance(outcome, Missed) and group.leader in settlement.meeting.lost:
            company.failed(group.head, ids[group.leader], cost_s=0.0)

    async def _digest_due(self) -> bytes:
        """Returns the digest of the outer state, at an outer step at which a snapshot is due; empty elsewhere."""
        return await asyncio.to_thread(self.replica.digest_due)

    def _meet(self, group: Group, last_norms: tuple[float, ...] | None, state: bytes) -> Settlement:
        """Opens the round: its members are served from now on."""
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
                local=self.local,
                min_group=self.replica.manifest.spec.round.min_group,
                state=state,
                last_norms=last_norms,
                lapsed=frozenset(self.matchmaker.company.lapsed),
                kept=self.reception.audits.kept(),
                audit_parts=self.reception.audits.count,
            )
        )
        self.reception.open_round(settlement)
        return settlement

    async def _apply(self, settlement: Settlement, settled: Settled) -> Alignment | None:
        """Commits the update that the group has agreed on. Returns how it compares with my own
        contribution, where it can be compared."""
        meeting, update = settlement.meeting, settled.update
        alignment = await asyncio.to_thread(align, meeting.theta, meeting.local, update, meeting.grid)
        await self._commit(settled)
        self._last_norms = self.here.seat.standing.head, tuple(meeting.norms)
        met = (member.peer_id for i, member in enumerate(settlement.group.members) if i not in meeting.lost)
        self.here.directory.met(met, self._step, self.here.seat.standing.head)
        self._plan(settlement.group, update)
        return alignment

    def _plan(self, group: Group, update: Update) -> None:
        """Plans the inner steps up to the next outer step."""
        spec, weights = self.replica.manifest.spec, [weight for _, weight in update.header.contributors]
        tokens = spec.tokens_per_inner_step
        speeds = [member.tokens_per_s for member in group.members if member.peer_id != self.here.peer_id]
        claimed = claimed_steps(spec.inner.steps, self._pace, speeds)
        self._phase.plan(second_most_steps(weights, tokens), tokens / self._pace if self._pace > 0 else 0.0, claimed)

    async def _commit(self, settled: Settled) -> None:
        """Writes the update to the ledger first, and then moves theta. A snapshot, where one is due, is written while
        training goes on."""
        await self.upkeep.settled()
        if not self.replica.sound:
            await self.upkeep.mend()
        await asyncio.to_thread(self.replica.commit, settled.update, settled.certificate)
        self.presence.take_standing()
        self.upkeep.moved()

    async def _adopt(self) -> OuterResult:
        """Catches up with the swarm instead of meeting it."""
        before, sound = self.here.seat.standing, self.replica.sound
        async with self.follower.moving:
            target = self.follower.target()
            await self.presence.push_to_all()
            if self.follower.must_move():  # else the others still wait for us where we are
                self.presence.enter("joining")
            elif sound and target is not None and must_catch_up(before, target):
                self.follower.led_nowhere(target)
            await self.follower.catch_up(patience_s=0.0)
        moved = self.here.seat.standing != before
        if sound:
            return self._result(adopted=moved, reason="behind")
        missed = Missed(reason="repaired", detail="bits of the state had flipped")
        self.events.write(round_ended(self.here.seat.standing, missed))
        return self._result(adopted=True, reason="repaired")

    def _result(
        self,
        *,
        committed: bool = False,
        adopted: bool = False,
        reason: str = "",
        group: int = 0,
        gather_s: float = 0.0,
        cost: RoundCost | None = None,
        apply_s: float = 0.0,
        evaluate: bool = False,
    ) -> OuterResult:
        state, cost = self.replica.loaded, cost or RoundCost()
        return OuterResult(
            committed=committed,
            adopted=adopted,
            reason=reason,
            step=state.step,
            head=state.head.hex(),
            group=group,
            gather_s=gather_s,
            reduce_s=cost.reduce_s,
            settle_s=cost.settle_s,
            apply_s=apply_s,
            bytes_sent=cost.bytes_sent,
            bytes_received=cost.bytes_received,
            evaluate=evaluate,
        )


def _update_norms(ledger: Ledger, standing: Standing) -> tuple[float, ...] | None:
    update = ledger.update(standing.step - 1) if standing.step else None
    if update is None or update.header.head != standing.head:
        return None
    return tuple(norm_of(ledger.grid.decode(i, part.data)) for i, part in enumerate(update.parts))


def _all_finite(*vectors: Vector) -> bool:
    return all(bool(np.isfinite(values).all()) for values in vectors)
