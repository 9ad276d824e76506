"""The network side of one peer, on any transport: it is made of its parts here, and makes outer steps.

    join        take the newest state of the own ledger, then whatever leads to the swarm's head, and follow that
    begin       the trainer takes theta: from now on the state moves at outer steps only
    outer_step  gather -> reduce -> settle -> apply, or catch up: the only place where an update is committed
    leave       withdraw the record

Everything runs in one event loop. Four tasks live as long as the peer (``run``): publish my record, read the others',
follow the swarm, and keep sound what I hold. What other peers do wrong ends in a log line and a value; what goes wrong
here (disk, daemon) raises LocalError out of ``run``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from p2p_diloco.core.addresses import Endpoint
from p2p_diloco.core.aggregate import Alignment, align
from p2p_diloco.core.codec import Vector
from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.directory import Directory
from p2p_diloco.core.errors import Gap, NetworkError
from p2p_diloco.core.events import EventLog
from p2p_diloco.core.grid import part_slices
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.pace import planned_steps
from p2p_diloco.core.records import Phase, Record, Role
from p2p_diloco.core.roster import Group, evaluator, on_head, rank
from p2p_diloco.core.swarm_head import Standing, must_catch_up
from p2p_diloco.core.update import Update, parts_with
from p2p_diloco.core.waiting import deadline
from p2p_diloco.ledger.replica import Replica
from p2p_diloco.peer.catchup import Catchup
from p2p_diloco.peer.control import OuterResult
from p2p_diloco.peer.follower import Follower
from p2p_diloco.peer.presence import LastRound, Presence
from p2p_diloco.peer.probes import Probes
from p2p_diloco.peer.reception import Reception
from p2p_diloco.peer.upkeep import Upkeep
from p2p_diloco.peer.uploads import Uploads
from p2p_diloco.round.matchmaking import Matchmaker
from p2p_diloco.round.meeting import Meeting
from p2p_diloco.round.missed import Missed
from p2p_diloco.round.seat import Seat
from p2p_diloco.round.settle import RoundCost, Settlement
from p2p_diloco.wire.channel import MANIFEST_PROTOCOL, Transport, run_protocol

log = logging.getLogger(__name__)

ATTEMPTS = 3
"""Rounds tried on one head before the trainer goes on alone."""
HAND_OVER_POLL_S = 0.2


class Peer:
    """``local``: float32 [n], the trainer's parameters; unchanged while ``outer_step`` runs. A seed has none."""

    def __init__(
        self,
        *,
        transport: Transport,
        identity: Identity,
        replica: Replica,
        signed_manifest: bytes,
        local: Vector | None,
        events: EventLog,
        client_mode: bool = False,
        name: str = "",
        max_upload_bytes_per_s: float | None = None,
        metrics: Endpoint | None = None,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self.transport = transport
        self.identity = identity
        self.replica = replica
        self.manifest = replica.manifest
        self.local = local
        self.events = events
        self.wall_s = wall_s
        self.timeouts: Timeouts = transport.timeouts
        self.protocol = run_protocol(self.manifest.run_id)
        self.role: Role = "seed" if local is None else "trainer"
        self.directory = Directory(identity.peer_id, self.manifest.run_id)
        nowhere = Standing(step=0, head=bytes(32), heads=(), committed=False)
        self.seat = Seat(standing=nowhere, role_trainer=local is not None, client_mode=client_mode)
        self.matchmaker = Matchmaker(
            transport=transport,
            identity=identity,
            manifest=self.manifest,
            directory=self.directory,
            seat=self.seat,
            timeouts=self.timeouts,
            wall_s=wall_s,
        )
        self.catchup = Catchup(
            transport=transport,
            identity=identity,
            directory=self.directory,
            replica=replica,
            timeouts=self.timeouts,
            events=events,
            wall_s=wall_s,
        )
        self.uploads = Uploads(
            ledger=replica.ledger,
            n=self.manifest.n_params,
            events=events,
            timeouts=self.timeouts,
            max_bytes_per_s=max_upload_bytes_per_s,
        )
        self.upkeep = Upkeep(
            replica=replica,
            catchup=self.catchup,
            directory=self.directory,
            events=events,
            timeouts=self.timeouts,
            wall_s=wall_s,
        )
        self.presence = Presence(
            transport=transport,
            identity=identity,
            replica=replica,
            directory=self.directory,
            seat=self.seat,
            role=self.role,
            name=name,
            metrics=metrics,
            wall_s=wall_s,
        )
        self.follower = Follower(
            replica=replica,
            seat=self.seat,
            directory=self.directory,
            catchup=self.catchup,
            upkeep=self.upkeep,
            presence=self.presence,
            events=events,
            timeouts=self.timeouts,
            wall_s=wall_s,
        )
        self.reception = Reception(
            signed_manifest=signed_manifest,
            seat=self.seat,
            replica=replica,
            matchmaker=self.matchmaker,
            presence=self.presence,
            uploads=self.uploads,
            probes=Probes(transport=transport, seat=self.seat, wall_s=wall_s, rate=self.uploads.rate),
            timeouts=self.timeouts,
        )
        self.speeds: dict[str, float] = {}
        """Peer id -> tokens per second, as it said in the last round."""
        self.pace = 0.0
        self._telling: asyncio.Task[None] | None = None

    # -- life --------------------------------------------------------------------------------------------------------

    async def join(self) -> None:
        """Serve, look around, and get to the swarm's head. NetworkError when nobody can give us a state."""
        started_s = self._now()
        await asyncio.to_thread(self.replica.load)
        from_step = self.replica.state.step if self.replica.state else None
        if self.replica.state is not None:
            self.presence.take_standing()
        self.presence.seal()
        await self.transport.serve(MANIFEST_PROTOCOL, self.reception.give_manifest)
        await self.transport.serve(self.protocol, self.reception.receive)
        await self.presence.refresh()
        caught_up = await self.follower.catch_up(patience_s=self.timeouts.discover_s)
        if self.replica.state is None:
            raise NetworkError(
                "no peer of the run could give us its state; try again when a seed or another peer is up"
            )
        self.presence.take_standing()
        if self.role == "seed":
            self.seat.phase = "inner"
        self.events.write(
            "joined",
            step=self.seat.standing.step,
            head=self.seat.standing.head.hex(),
            from_step=from_step,
            snapshot=bool(caught_up),
            seconds=self._now() - started_s,
        )
        await self.presence.publish()
        await self.presence.refresh()  # who joined meanwhile: of two that do so at once, the later one sees the other
        await self.presence.push_to_all()

    async def begin(self) -> None:
        """The trainer is about to take theta and to train: up to now the state has followed the swarm, from now on it
        moves at outer steps only."""
        async with self.follower.moving:
            await self.presence.push_to_all()
            await self.follower.catch_up(patience_s=0.0)
            self.follower.by_itself = False
        self._to_phase("inner")
        await self.presence.publish()
        await self.presence.push_to_all()

    async def run(self) -> None:
        """Until cancelled: keep my record in the DHT, the others' here, and what I hold sound."""
        await asyncio.gather(
            self.presence.publish_loop(), self.presence.refresh_loop(), self.follower.run(), self.upkeep.run()
        )

    async def leave(self, reason: str) -> None:
        """See that what I hold is not lost, then withdraw the record, so that nobody waits for us."""
        if self.replica.state is None:
            return
        await self.matchmaker.gatherings.close()
        self.seat.in_round = False
        with contextlib.suppress(asyncio.TimeoutError):
            async with deadline(self.timeouts.leave_s / 4):
                await self._hand_over()
        self._to_phase("left")
        if self._telling is not None:
            self._telling.cancel()
        self.events.write("left", step=self.step, head=self.seat.standing.head.hex(), reason=reason)
        await asyncio.gather(self.presence.publish(), self.presence.push_to_all())
        await self.upkeep.settled()

    async def _hand_over(self) -> None:
        """If a seed is there, it shall have my outer step before I go: after the last one nobody else stays."""
        self._to_phase("inner")
        while True:
            seeds = [record for record in self.directory.live(self.wall_s()) if record.role == "seed"]
            if not seeds or any(self.seat.standing.head in (record.head, *record.heads) for record in seeds):
                return
            await self.presence.push(seeds)
            await asyncio.sleep(HAND_OVER_POLL_S)

    # -- the outer step ----------------------------------------------------------------------------------------------

    async def outer_step(self, tokens: int, *, dropped: bool = False, pace: float = 0.0) -> OuterResult:
        """Offer what the trainer learned from ``tokens`` tokens, and take what the group learned. ``dropped``: offer
        nothing, as if the contribution had been lost on its way. ``pace``: the trainer's speed in tokens per second; 0
        where unknown."""
        if self.local is None:
            raise RuntimeError("a seed makes no outer steps")
        self.pace = pace
        self.events.write("offered", step=self.step, tokens=tokens)
        before, mends = self.seat.standing, self.upkeep.mends
        if not await asyncio.to_thread(_all_finite, self.local, self.replica.theta):
            log.error("training diverged: a parameter is not finite; going back to theta of outer step %d", self.step)
            with contextlib.suppress(Gap):
                await self.upkeep.mend()  # a bit that flips in theta can make training diverge, again and again
            self._log_round(Missed(reason="diverged", detail="a parameter is not finite"), None, 0.0)
            result = self._result(adopted=True, reason="diverged")
        else:
            result = await self._try_rounds(tokens, dropped)
            kept = self.manifest.spec.round.on_missed == "keep" and self.upkeep.mends == mends
            if result.moved and kept:  # what was learned from a theta that was wrong is not
                result = replace(result, kept=await asyncio.to_thread(self._keep, before, self.local))
        result = replace(result, planned=self.planned_steps())
        self.seat.closes_s = None
        self.follower.behind = False
        self.seat.progress = replace(self.seat.progress, inner_step=0, reported_s=self._now())
        self._to_phase("evaluate" if result.evaluate else "inner")
        if result.adopted:
            await self.presence.push_to_all()
        self.presence.last_round = LastRound(
            group=result.group,
            seconds=result.gather_s + result.reduce_s + result.settle_s + result.apply_s,
            bytes=result.bytes_sent + result.bytes_received,
        )
        self.presence.publish_now.ring()
        return result

    def planned_steps(self) -> int:
        """Inner steps that this peer plans, by its speed and the others'."""
        here = on_head(self.directory.expected(self.wall_s()), self.seat.standing.head)
        speeds = [self.speeds[record.peer_id] for record in here if record.peer_id in self.speeds]
        return planned_steps(self.manifest.spec.inner.steps, self.pace, speeds)

    def _keep(self, before: Standing, local: Vector) -> bool:
        """The state has moved on from ``before``. Parts whose new theta has my contribution in it are taken into
        ``local``, for they would count twice. Whether any are left as the trainer made them; none where my ledger does
        not show the way, after a roll-back or a snapshot."""
        taken: set[int] = set()
        head = before.head
        for step in range(before.step, self.step):
            update = self.replica.ledger.update(step)
            if update is None or update.header.parent != head:
                return False
            head = update.header.head
            taken |= parts_with(update, self.identity.peer_id)
        slices = part_slices(len(local))
        if head == before.head or len(taken) == len(slices):
            return False
        for part in taken:
            local[slices[part]] = self.replica.theta[slices[part]]
        return True

    async def _try_rounds(self, tokens: int, dropped: bool) -> OuterResult:
        for _ in range(ATTEMPTS):
            await self.follower.ask_ways()
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

    async def _tell_seeds(self) -> None:
        """Seeds follow at once: what a group has committed shall soon be in more hands than the group's."""
        seeds = [record for record in self.directory.live(self.wall_s()) if record.role == "seed"]
        await self.presence.push(seeds)

    async def _round(self, tokens: int, dropped: bool) -> OuterResult:
        """One attempt: gather, reduce, settle, apply."""
        started_s = self._now()
        self._to_phase("gather")
        group = await self.matchmaker.find_group(tokens, dropped=dropped, tokens_per_s=self.pace)
        gather_s = self._now() - started_s
        if isinstance(group, Missed):
            self._log_round(group, None, gather_s)
            return self._result(reason=group.reason, gather_s=gather_s)
        self.speeds = {member.peer_id: member.tokens_per_s for member in group.members}
        self.seat.in_round = True
        settlement = self._meet(group)
        try:
            self._to_phase("reduce")
            await settlement.reduce()
            self._to_phase("settle")
            outcome = await settlement.settle()
            cost = settlement.cost()
            if isinstance(outcome, Missed):
                if group.leader in settlement.meeting.lost:
                    self.matchmaker.company.failed(group.head, group.members[group.leader].peer_id)
                self._log_round(outcome, settlement, gather_s)
                return self._result(reason=outcome.reason, group=len(group.members), gather_s=gather_s, cost=cost)
            self._to_phase("apply")
            apply_started_s = self._now()
            meeting = settlement.meeting
            alignment = await asyncio.to_thread(align, meeting.theta, meeting.local, outcome, meeting.grid)
            await self._commit(outcome)
            met = (member.peer_id for i, member in enumerate(group.members) if i not in settlement.meeting.lost)
            self.directory.met(met, self.step, self.seat.standing.head)
            apply_s = self._now() - apply_started_s
        finally:
            self.seat.in_round = False
            self.seat.changed.ring()
        evaluate = evaluator(group, self.seat.standing.head) == self.identity.peer_id
        if settlement.leads:
            self._telling = asyncio.create_task(self._tell_seeds())
        result = self._result(
            committed=True,
            group=len(group.members),
            gather_s=gather_s,
            cost=cost,
            apply_s=apply_s,
            evaluate=evaluate,
        )
        self._log_round(None, settlement, gather_s, apply_s, alignment)
        return result

    def _meet(self, group: Group) -> Settlement:
        assert self.local is not None
        settlement = Settlement(
            Meeting(
                group=group,
                transport=self.transport,
                protocol=self.protocol,
                directory=self.directory,
                timeouts=self.timeouts,
                grid=self.manifest.grid,
                theta=self.replica.theta,
                local=self.local,
                min_group=self.manifest.spec.round.min_group,
            )
        )
        self.reception.open_round(settlement)
        return settlement

    async def _commit(self, update: Update) -> None:
        """Ledger first, then theta. A snapshot, where one is due, is written while training goes on."""
        await self.upkeep.settled()
        if not self.replica.sound:
            await self.upkeep.mend()
        await asyncio.to_thread(self.replica.commit, update)
        self.presence.take_standing()
        self.upkeep.moved()

    async def _adopt(self) -> OuterResult:
        """Catch up with the swarm instead of meeting it."""
        before, sound = self.seat.standing, self.replica.sound
        async with self.follower.moving:
            target = self.follower.target()
            await self.presence.push_to_all()
            if self.follower.must_move():  # else the others still wait for us where we are
                self._to_phase("joining")
            elif sound and target is not None and must_catch_up(before, target):
                self.follower.led_nowhere(target)
            await self.follower.catch_up(patience_s=0.0)
        moved = self.seat.standing != before
        if sound:
            return self._result(adopted=moved, reason="behind")
        self._log_round(Missed(reason="repaired", detail="bits of the state had flipped"), None, 0.0)
        return self._result(adopted=True, reason="repaired")

    def _result(self, *, cost: RoundCost | None = None, reason: str = "", **fields: object) -> OuterResult:
        state = self.replica.loaded
        result = OuterResult(committed=False, adopted=False, reason=reason, step=state.step, head=state.head.hex())
        return replace(result, **(vars(cost) if cost else {}), **fields)  # type: ignore[arg-type]

    def _log_round(
        self,
        missed: Missed | None,
        settlement: Settlement | None,
        gather_s: float,
        apply_s: float = 0.0,
        alignment: Alignment | None = None,
    ) -> None:
        standing = self.seat.standing
        members = settlement.group.members if settlement else ()
        self.events.write(
            "round",
            step=standing.step,
            head=standing.head.hex(),
            committed=missed is None,
            reason=missed.reason if missed else "",
            detail=missed.detail if missed else "",
            group=[member.peer_id for member in members],
            dropped=[member.peer_id for member in members if member.dropped],
            lost=[members[i].peer_id for i in sorted(settlement.meeting.lost)] if settlement else [],
            gather_s=gather_s,
            apply_s=apply_s,
            **vars(settlement.cost() if settlement else RoundCost()),
            **(vars(alignment) if alignment else {}),
        )

    def evaluates_genesis(self) -> bool:
        """Whether I am the one, of those who are here, to evaluate theta before the first outer step."""
        standing = self.seat.standing
        here: Sequence[Record] = on_head(self.directory.live(self.wall_s()), standing.head)
        mine = rank(standing.head, self.identity.peer_id)
        return standing.step == 0 and all(mine < rank(standing.head, record.peer_id) for record in here)

    # -- small things ------------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        return self.seat.standing.step

    def _to_phase(self, phase: Phase) -> None:
        self.seat.phase = phase
        self.events.write("phase", phase=phase, step=self.step)
        self.presence.seal()
        self.seat.changed.ring()

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


def _all_finite(*vectors: Vector) -> bool:
    return all(bool(np.isfinite(values).all()) for values in vectors)
