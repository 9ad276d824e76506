"""The outer steps of a trainer's peer: rounds tried, and one update committed, or the swarm's state taken.

    outer_step   up to ATTEMPTS rounds on one head (``attempts``); where the swarm has gone on, catch up instead
    _adopt       take the swarm's state in place of a round

What goes wrong here (disk, daemon) raises LocalError.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass, replace

import numpy as np

from p2p_diloco.core.codec import Vector
from p2p_diloco.core.errors import Gap
from p2p_diloco.core.event import OuterGradientOffered
from p2p_diloco.core.events import EventLog
from p2p_diloco.core.pace import Phase
from p2p_diloco.core.swarm_head import Standing, must_catch_up
from p2p_diloco.core.update import parts_with
from p2p_diloco.core.waiting import now_s
from p2p_diloco.ledger.replica import Replica
from p2p_diloco.peer.attempts import Attempts, Offer
from p2p_diloco.peer.control import OuterResult
from p2p_diloco.peer.follower import Follower
from p2p_diloco.peer.presence import LastRound, Presence
from p2p_diloco.peer.round_event import round_ended
from p2p_diloco.peer.upkeep import Upkeep
from p2p_diloco.round.here import Here
from p2p_diloco.round.outcome import Missed

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
    attempts: Attempts
    follower: Follower
    upkeep: Upkeep
    presence: Presence
    events: EventLog
    phase: Phase
    """How long the trainer trains, and how many inner steps it plans."""

    async def outer_step(self, tokens: int, *, dropped: bool, pace: float) -> OuterResult:
        """Offers what the trainer learned from ``tokens`` tokens, takes what the group learned, and returns what became
        of it: at the latest when ATTEMPTS rounds have failed. ``dropped``: offer nothing, as if the contribution had
        been lost on its way. ``pace``: the trainer's speed in tokens per second; 0 where unknown."""
        seat = self.here.seat
        gather_s = self.replica.manifest.spec.round.gather_s
        called_s = None if seat.closes_s is None else seat.closes_s - gather_s
        whole_plan = seat.progress.inner_step >= self.replica.manifest.spec.inner.steps
        self.phase.end(now_s(), called_s, tokens / pace if pace > 0 else 0.0, whole_plan=whole_plan)
        self.events.write(OuterGradientOffered(step=self._step, tokens=tokens))
        result = await self._offer(Offer(tokens=tokens, dropped=dropped, pace=pace))
        result = replace(result, planned=self.phase.planned)
        self.phase.go_on(now_s(), moved=result.moved)
        seat.closes_s = None
        self.follower.behind = False
        seat.progress = replace(seat.progress, inner_step=0, reported_s=now_s())
        self.presence.enter("evaluate" if result.evaluate else "inner")
        if result.adopted:
            await self.presence.pushes.to_all()
        self.presence.last_round = LastRound(
            group=result.group,
            seconds=result.gather_s + result.reduce_s + result.settle_s + result.apply_s,
            bytes=result.bytes_sent + result.bytes_received,
        )
        self.presence.publish_now.ring()
        return result

    def begin(self) -> None:
        """Notes that the trainer takes theta now."""
        self.phase.go_on(now_s(), moved=True)

    @property
    def _step(self) -> int:
        return self.here.seat.standing.step

    async def _offer(self, offer: Offer) -> OuterResult:
        """Tries rounds, unless training has diverged; then the trainer goes back to theta."""
        before, mends = self.here.seat.standing, self.upkeep.mends
        if not await asyncio.to_thread(_all_finite, self.local, self.replica.theta):
            log.error("training diverged: a parameter is not finite; going back to theta of outer step %d", self._step)
            with contextlib.suppress(Gap):
                await self.upkeep.mend()  # a bit that flips in theta can make training diverge, again and again
            missed = Missed(reason="diverged", detail="a parameter is not finite")
            self.events.write(round_ended(self.here.seat, missed))
            return self._without_round("diverged", adopted=True)
        result = await self._try_rounds(offer)
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

    async def _try_rounds(self, offer: Offer) -> OuterResult:
        """Tries rounds until one does not fail, at most ATTEMPTS, or catches up where nobody waits for me here."""
        for _ in range(ATTEMPTS):
            await self.follower.ask_ways(failed=False)
            if self.follower.must_move():
                result = await self._adopt()
                if result.moved or self.follower.must_move():
                    return result  # else nobody has what was claimed, and those on our head wait for us
            result = await self.attempts.make(offer)
            if result.reason == "behind":
                result = await self._adopt()
                if result.moved or self.follower.must_move():
                    return result
            elif result.reason != "failed":
                break
        if result.reason == "alone":  # a seed that was started again may be behind me, and cannot dial me
            await self.presence.pushes.to_seeds()
        return result

    async def _adopt(self) -> OuterResult:
        """Catches up with the swarm instead of meeting it."""
        before, sound = self.here.seat.standing, self.replica.sound
        async with self.follower.moving:
            target = self.follower.target()
            await self.presence.pushes.to_all()
            if self.follower.must_move():  # else the others still wait for us where we are
                self.presence.enter("joining")
            elif sound and target is not None and must_catch_up(before, target):
                self.follower.led_nowhere(target)
            await self.follower.catch_up(patience_s=0.0)
        moved = self.here.seat.standing != before
        if sound:
            return self._without_round("behind", adopted=moved)
        missed = Missed(reason="repaired", detail="bits of the state had flipped")
        self.events.write(round_ended(self.here.seat, missed))
        return self._without_round("repaired", adopted=True)

    def _without_round(self, reason: str, *, adopted: bool) -> OuterResult:
        """Returns the result of an outer step that no round was made for."""
        state = self.replica.loaded
        return OuterResult(committed=False, adopted=adopted, reason=reason, step=state.step, head=state.head.hex())


def _all_finite(*vectors: Vector) -> bool:
    return all(bool(np.isfinite(values).all()) for values in vectors)
