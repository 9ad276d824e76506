"""The network side of one peer, on any transport: it keeps the records, serves others, and makes outer steps.

    join        take the newest state of the own ledger, then whatever leads to the swarm's head, and follow that
    begin       the trainer takes theta: from now on the state moves at outer steps only
    outer_step  gather -> reduce -> settle -> apply, or catch up: the only place where an update is committed
    leave       withdraw the record

Everything runs in one event loop. Three tasks live as long as the peer: publish my record, read the others', and tell
the trainer what changes (``wait_news``). What other peers do wrong ends in a log line and a value; what goes wrong here
(disk, daemon) raises LocalError out of ``run``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from p2p_diloco.butterfly import Butterfly, RoundCost
from p2p_diloco.catchup import Catchup
from p2p_diloco.codec import Vector
from p2p_diloco.config import Timeouts
from p2p_diloco.errors import NetworkError
from p2p_diloco.events import EventLog
from p2p_diloco.identity import Identity
from p2p_diloco.matchmaking import Matchmaker, Seat
from p2p_diloco.outer import Update
from p2p_diloco.presence import LastRound, Presence
from p2p_diloco.records import Directory, Phase, Record, Role
from p2p_diloco.replica import Replica
from p2p_diloco.rounds import (
    Group,
    Missed,
    Standing,
    evaluator,
    must_catch_up,
    on_head,
    rank,
    swarm_head,
)
from p2p_diloco.waiting import Bell, deadline, heard
from p2p_diloco.wire import (
    MANIFEST_PROTOCOL,
    AskHeads,
    AskManifest,
    AskPart,
    AskSnapshot,
    AskUpdate,
    Channel,
    Closing,
    Contribute,
    Message,
    No,
    Push,
    Ready,
    Receipt,
    Transport,
    run_protocol,
)

log = logging.getLogger(__name__)

ATTEMPTS = 3
"""Rounds tried on one head before the trainer goes on alone."""
HAND_OVER_POLL_S = 0.2
ROUNDS_KEPT = 2
"""Finished rounds whose parts are still served to members that are late."""
REQUESTS = (Ready, Closing, Contribute, Receipt, AskPart, AskHeads, AskUpdate, AskSnapshot, Push)


@dataclass(frozen=True, kw_only=True)
class OuterResult:
    """What became of one outer step. Sent to the trainer as JSON."""

    committed: bool
    """My contribution, or the group's without it, is in the outer state."""
    adopted: bool
    """The state moved on without me: the local steps since the last one are lost."""
    reason: str
    """Why not committed; empty otherwise."""
    step: int
    """The outer step that the peer stands at now."""
    head: str
    group: int = 0
    gather_s: float = 0.0
    reduce_s: float = 0.0
    settle_s: float = 0.0
    apply_s: float = 0.0
    bytes_sent: int = 0
    bytes_received: int = 0
    evaluate: bool = False
    """This peer is the one to evaluate theta now."""

    @property
    def moved(self) -> bool:
        """Theta is new: the trainer takes it."""
        return self.committed or self.adopted


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
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self.transport = transport
        self.identity = identity
        self.replica = replica
        self.manifest = replica.manifest
        self.signed_manifest = signed_manifest
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
            wall_s=wall_s,
        )
        self._following = True
        """A seed, and a trainer that has not begun: the state goes where the swarm goes, by itself."""
        self._moving = asyncio.Lock()
        """Held by who moves the state other than by a round."""
        self.behind = False
        """The swarm went on without me: the trainer shall come for an outer step now."""
        self.rounds: deque[Butterfly] = deque(maxlen=ROUNDS_KEPT)
        self.round_started = Bell()
        self._snapshot_task: asyncio.Task[None] | None = None
        self._telling: asyncio.Task[None] | None = None

    # -- life --------------------------------------------------------------------------------------------------------

    async def join(self) -> None:
        """Serve, look around, and get to the swarm's head. NetworkError when nobody can give us a state."""
        started_s = self._now()
        await asyncio.to_thread(self.replica.load)
        from_step = self.replica.state.step if self.replica.state else None
        if self.replica.state is not None:
            self._take_standing()
        self.presence.seal()
        await self.transport.serve(MANIFEST_PROTOCOL, self._serve_manifest)
        await self.transport.serve(self.protocol, self._serve)
        await self.presence.refresh()
        caught_up = await self._catch_up_to_swarm(patience_s=self.timeouts.discover_s)
        if self.replica.state is None:
            raise NetworkError(
                "no peer of the run could give us its state; try again when a seed or another peer is up"
            )
        self._take_standing()
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
        await self.presence.push_to_all()

    async def begin(self) -> None:
        """The trainer is about to take theta and to train: up to now the state has followed the swarm, from now on it
        moves at outer steps only."""
        async with self._moving:
            await self.presence.push_to_all()
            await self._catch_up_to_swarm(patience_s=0.0)
            self._following = False
        self._to_phase("inner")
        await self.presence.publish()
        await self.presence.push_to_all()

    async def run(self) -> None:
        """Until cancelled: keep my record in the DHT, and the others' here."""
        await asyncio.gather(self.presence.publish_loop(), self._refresh_loop())

    async def leave(self, reason: str) -> None:
        """See that what I hold is not lost, then withdraw the record, so that nobody waits for us."""
        if self.replica.state is None:
            return
        await self.matchmaker.close()
        self.seat.in_round = False
        with contextlib.suppress(asyncio.TimeoutError):
            async with deadline(self.timeouts.leave_s / 4):
                await self._hand_over()
        self._to_phase("left")
        if self._telling is not None:
            self._telling.cancel()
        self.events.write("left", step=self.step, head=self.seat.standing.head.hex(), reason=reason)
        await asyncio.gather(self.presence.publish(), self.presence.push_to_all())
        await self._snapshot_written()

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

    async def outer_step(self, tokens: int) -> OuterResult:
        """Offer what the trainer learned from ``tokens`` tokens, and take what the group learned."""
        if self.local is None:
            raise RuntimeError("a seed makes no outer steps")
        if not await asyncio.to_thread(_all_finite, self.local):
            log.error("training diverged: a parameter is not finite; going back to theta of outer step %d", self.step)
            result = self._result(adopted=True, reason="diverged")
        else:
            result = await self._try_rounds(tokens)
        self.seat.closes_s = None
        self.behind = False
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

    async def _try_rounds(self, tokens: int) -> OuterResult:
        for _ in range(ATTEMPTS):
            if must_catch_up(self.seat.standing, self._swarm_head()):
                return await self._adopt()
            result = await self._round(tokens)
            if result.reason == "behind":
                return await self._adopt()
            if result.reason != "failed":
                break
        return result

    async def _tell_seeds(self) -> None:
        """Seeds follow at once: what a group has committed shall soon be in more hands than the group's."""
        seeds = [record for record in self.directory.live(self.wall_s()) if record.role == "seed"]
        await self.presence.push(seeds)

    async def _round(self, tokens: int) -> OuterResult:
        """One attempt: gather, reduce, settle, apply."""
        started_s = self._now()
        self._to_phase("gather")
        group = await self.matchmaker.find_group(tokens)
        gather_s = self._now() - started_s
        if isinstance(group, Missed):
            self._log_round(group, None, gather_s)
            return self._result(reason=group.reason, gather_s=gather_s)
        self._to_phase("reduce")
        self.seat.in_round = True
        butterfly = self._butterfly(group)
        try:
            outcome = await butterfly.run()
            cost = butterfly.cost()
            if isinstance(outcome, Missed):
                self._log_round(outcome, butterfly, gather_s)
                return self._result(reason=outcome.reason, group=len(group.members), gather_s=gather_s, cost=cost)
            self._to_phase("apply")
            apply_started_s = self._now()
            await self._commit(outcome)
            met = (member.peer_id for i, member in enumerate(group.members) if i not in butterfly.lost)
            self.directory.met(met, self.step, self.seat.standing.head)
            apply_s = self._now() - apply_started_s
        finally:
            self.seat.in_round = False
            self.seat.changed.ring()
        evaluate = evaluator(group, self.seat.standing.head) == self.identity.peer_id
        if group.leader == group.me:
            self._telling = asyncio.create_task(self._tell_seeds())
        result = self._result(
            committed=True,
            group=len(group.members),
            gather_s=gather_s,
            cost=cost,
            apply_s=apply_s,
            evaluate=evaluate,
        )
        self._log_round(None, butterfly, gather_s, apply_s)
        return result

    def _butterfly(self, group: Group) -> Butterfly:
        assert self.local is not None
        butterfly = Butterfly(
            group=group,
            transport=self.transport,
            protocol=self.protocol,
            directory=self.directory,
            timeouts=self.timeouts,
            codec=self.manifest.spec.outer.codec,
            theta=self.replica.theta,
            local=self.local,
            min_group=self.manifest.spec.round.min_group,
        )
        self.rounds.append(butterfly)
        self.round_started.ring()
        return butterfly

    async def _commit(self, update: Update) -> None:
        """Ledger first, then theta. A snapshot, where one is due, is written while training goes on."""
        await self._snapshot_written()
        await asyncio.to_thread(self.replica.commit, update)
        self._take_standing()
        self._snapshot_task = asyncio.create_task(asyncio.to_thread(self.replica.snapshot_if_due))

    async def _adopt(self) -> OuterResult:
        """Catch up with the swarm instead of meeting it."""
        before = self.seat.standing
        self._to_phase("joining")
        async with self._moving:
            await self.presence.push_to_all()
            await self._catch_up_to_swarm(patience_s=0.0)
        if self.seat.standing == before:
            return self._result(reason="behind")
        return self._result(adopted=True, reason="behind")

    async def _catch_up_to_swarm(self, patience_s: float) -> bool:
        """Go to the swarm's head, and on while it moves. Whether a snapshot had to be downloaded. A newcomer, who has
        no state, waits up to ``patience_s`` for somebody who gives it one."""
        deadline_s, snapshot = self._now() + patience_s, False
        while True:
            target = self._swarm_head()
            if target is None or (self.replica.state is not None and not must_catch_up(self.seat.standing, target)):
                caught_up = None
            else:
                started_s = self._now()
                await self._snapshot_written()
                caught_up = await self.catchup.to(target)
            if caught_up is None:
                if self.replica.state is not None:
                    self._take_standing()  # a download that broke off may have moved it part of the way
                if self.catchup.received_bytes:
                    deadline_s = self._now() + patience_s
                if self.replica.state is not None or self._now() >= deadline_s:
                    return snapshot
                await asyncio.sleep(self.timeouts.refresh_s)
                await self.presence.refresh()
                continue
            snapshot = snapshot or caught_up.snapshot
            self._take_standing()
            self.events.write("caught_up", seconds=self._now() - started_s, **vars(caught_up))
            if caught_up.rolled_back:
                log.warning("gave up %d outer steps that the swarm did not share", caught_up.rolled_back)

    async def _snapshot_written(self) -> None:
        """A snapshot is written from the state itself: it must be on the disk before the state changes."""
        if self._snapshot_task is not None:
            await asyncio.shield(self._snapshot_task)

    def _result(self, *, cost: RoundCost | None = None, reason: str = "", **fields: object) -> OuterResult:
        state = self.replica.loaded
        result = OuterResult(committed=False, adopted=False, reason=reason, step=state.step, head=state.head.hex())
        return replace(result, **(vars(cost) if cost else {}), **fields)  # type: ignore[arg-type]

    def _log_round(
        self, missed: Missed | None, butterfly: Butterfly | None, gather_s: float, apply_s: float = 0.0
    ) -> None:
        standing = self.seat.standing
        members = butterfly.group.members if butterfly else ()
        cost = butterfly.cost() if butterfly else RoundCost(reduce_s=0.0, settle_s=0.0, bytes_sent=0, bytes_received=0)
        self.events.write(
            "round",
            step=standing.step,
            head=standing.head.hex(),
            committed=missed is None,
            reason=missed.reason if missed else "",
            detail=missed.detail if missed else "",
            group=[member.peer_id for member in members],
            lost=[members[i].peer_id for i in sorted(butterfly.lost)] if butterfly else [],
            gather_s=gather_s,
            apply_s=apply_s,
            **vars(cost),
        )

    # -- serving -----------------------------------------------------------------------------------------------------

    async def _serve_manifest(self, channel: Channel) -> None:
        await channel.receive(AskManifest, timeout_s=self.timeouts.first_message_s)
        await channel.send_blob(self.signed_manifest)

    async def _serve(self, channel: Channel) -> None:
        """One incoming stream: its first message says what it is for."""
        message: Message = await channel.receive(*REQUESTS, timeout_s=self.timeouts.first_message_s)
        if self.seat.phase == "left":
            await channel.send(No(reason="leaving"))
        elif isinstance(message, Push):
            await self.presence.on_push(channel, message)
        elif self.replica.state is None:
            await channel.send(No(reason="joining"))
        elif isinstance(message, Ready):
            await self.matchmaker.on_ready(channel, message)
        elif isinstance(message, Closing):
            await self.matchmaker.on_closing(channel, message)
        elif isinstance(message, (Contribute, Receipt, AskPart)):
            await self._serve_round(channel, message)
        elif isinstance(message, AskHeads):
            await self.catchup.on_ask_heads(channel, message)
        elif isinstance(message, AskUpdate):
            await self.catchup.on_ask_update(channel, message)
        elif isinstance(message, AskSnapshot):
            await self.catchup.on_ask_snapshot(channel, message)

    async def _serve_round(self, channel: Channel, message: Contribute | Receipt | AskPart) -> None:
        butterfly = await self._find_round(message.round_id)
        if butterfly is None:
            await channel.send(No(reason="no such round"))
        elif isinstance(message, Contribute):
            await butterfly.on_contribute(channel)
        elif isinstance(message, Receipt):
            await butterfly.on_receipt(channel, message)
        else:
            await butterfly.on_ask_part(channel, message)

    async def _find_round(self, round_id: bytes) -> Butterfly | None:
        """A member may know the roster a moment before I do: wait for it, as long as I wait for anything small."""
        deadline_s = self._now() + self.timeouts.request_s
        while True:
            started = self.round_started.event
            for butterfly in self.rounds:
                if butterfly.group.round_id == round_id:
                    return butterfly
            if self._now() >= deadline_s:
                return None
            await heard(started, deadline_s - self._now())

    # -- the swarm's head --------------------------------------------------------------------------------------------

    async def _refresh_loop(self) -> None:
        """Look at the others' records from time to time, or when one is pushed."""
        refresh_s = self._now() + self.timeouts.refresh_s
        while True:
            pushed = self.presence.pushed.event
            await heard(pushed, max(refresh_s - self._now(), 0.0))
            if self._now() >= refresh_s:
                await self.presence.refresh()
                refresh_s = self._now() + self.timeouts.refresh_s
            if self._snapshot_task is not None and self._snapshot_task.done():
                self._snapshot_task.result()
            await self._follow()

    async def _follow(self) -> None:
        """Go where the swarm goes; once training, tell the trainer to come."""
        async with self._moving:
            if not must_catch_up(self.seat.standing, self._swarm_head()):
                return
            if self._following:
                await self._catch_up_to_swarm(patience_s=0.0)
                self.presence.publish_now.ring()
            elif self.seat.phase == "inner" and not self.behind:
                self.behind = True
                self.seat.changed.ring()

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

    def _swarm_head(self) -> tuple[int, bytes] | None:
        mine = self.seat.standing if self.replica.state is not None else None
        return swarm_head(self.directory.live(self.wall_s()), mine)

    def _to_phase(self, phase: Phase) -> None:
        self.seat.phase = phase
        self.presence.seal()
        self.seat.changed.ring()

    def _take_standing(self) -> None:
        self.seat.standing = self.replica.standing()
        self.presence.seal()

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


def _all_finite(values: Vector) -> bool:
    return bool(np.isfinite(values).all())
