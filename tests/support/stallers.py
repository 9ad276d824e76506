"""Peers that cost the others time: strangers whose records nobody answers for, members that contribute nothing, and
peers that promise. Swarms in memory, and how many outer steps the honest make in a given time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.group import Group
from p2p_diloco.core.records import open_record, peers_key, seal_record
from p2p_diloco.core.waiting import now_s
from p2p_diloco.peer.control import OuterResult
from p2p_diloco.peer.reception import REQUESTS
from p2p_diloco.round.outcome import Missed, Settled
from p2p_diloco.round.settle import Settlement
from p2p_diloco.wire.channel import Channel, run_protocol
from p2p_diloco.wire.message import Message
from p2p_diloco.wire.messages import No
from p2p_diloco.wire.round_messages import Closing, Contribute, Eta, Ready, Receipt, Redirect
from p2p_diloco.wire.state_messages import Push
from tests.support.builders import identity, record_of
from tests.support.fakes import FakeNetwork, FakeTransport, SimPeer, make_manifest

OWNER = identity(0)
"""The seed: it witnesses the first outer steps."""
N = 2000
FIRST_STRANGER = 200
RECORD_EVERY_S = 2.0
STEP_S = 3.0
INNER_STEPS = 10
"""An inner phase takes 3 times ``Timeouts.settle_s``."""
IDLE_S = 45.0
"""So long an idle member is lost to a round."""

Answer: TypeAlias = Callable[[Channel, Message, bytes], Awaitable[None]]


class IdleSettlement(Settlement):
    """A member's part in a round that it does nothing in, and answers nobody."""

    async def reduce(self) -> None:
        await asyncio.sleep(IDLE_S)

    async def settle(self) -> Settled | Missed:
        return Missed(reason="failed", detail="idle")

    async def serve(self, channel: Channel, message: Message) -> None:
        await asyncio.sleep(10 * IDLE_S)


class Idler(SimPeer):
    """A peer that comes to every round, and is idle there, from outer step ``honest_steps`` on."""

    honest_steps: int = 0

    async def offer(self, tokens: int) -> OuterResult:
        outer_steps = self.peer.outer_steps
        assert outer_steps is not None
        if self.peer.step >= self.honest_steps:
            outer_steps.attempts.__dict__["_meet"] = self._meet
        return await super().offer(tokens)

    def _meet(self, group: Group, last_norms: tuple[float, ...] | None, state: bytes) -> Settlement:
        outer_steps = self.peer.outer_steps
        assert outer_steps is not None
        attempts = outer_steps.attempts
        meeting = type(attempts)._meet(attempts, group, last_norms, state).meeting
        settlement = IdleSettlement(meeting)
        attempts.reception.open_round(settlement)
        return settlement


class Boaster(SimPeer):
    """A peer that claims a speed."""

    async def offer(self, tokens: int) -> OuterResult:
        return await self.peer.outer_step(tokens, pace=1e9)


class Swarm:
    """Honest trainers ``1..k``, of STEP_S by default, and a seed."""

    def __init__(self, folder: Path, *, gather_s: float = 2.0) -> None:
        self.folder = folder
        self.genesis = np.random.default_rng(0).standard_normal(N).astype(np.float32)
        manifest = make_manifest(N, self.genesis, OWNER, outer_steps=100_000, inner_steps=INNER_STEPS, codec="int8")
        round_ = manifest.spec.round.model_copy(update={"gather_s": gather_s})
        self.manifest = manifest.model_copy(update={"spec": manifest.spec.model_copy(update={"round": round_})})
        self.network = FakeNetwork()
        self.honest: list[SimPeer] = []
        self.tasks: list[asyncio.Task[None]] = []

    def add(self, index: int, kind: type[SimPeer] = SimPeer, *, step_s: float = STEP_S, seed: bool = False) -> SimPeer:
        target = None if seed else np.random.default_rng(index).standard_normal(N).astype(np.float32)
        genesis = self.genesis if seed else None
        sim = kind.create(
            self.network, self.manifest, OWNER, self.folder, index, target=target, genesis=genesis, step_s=step_s
        )
        sim.start()
        return sim

    async def start(self, k: int = 4, step_s: tuple[float, ...] = ()) -> None:
        self.add(0, seed=True)
        await asyncio.sleep(1)
        self.honest = [self.add(i + 1, step_s=step_s[i] if step_s else STEP_S) for i in range(k)]
        await asyncio.sleep(1)

    @property
    def step(self) -> int:
        """Of the honest one that has made the fewest outer steps."""
        return min(sim.peer.step for sim in self.honest)

    async def until(self, step: int) -> None:
        end_s = now_s() + 100 * INNER_STEPS * STEP_S
        while self.step < step:
            assert now_s() < end_s, self.step
            await asyncio.sleep(0.5)

    async def made_in(self, seconds: float) -> int:
        before = self.step
        await asyncio.sleep(seconds)
        return self.step - before

    def stranger(self, number: int, answer: Answer, *, committed: bool = False) -> None:
        """A stranger that always claims to stand where the first honest trainer does."""
        who = identity(FIRST_STRANGER + number)
        transport = FakeTransport(self.network, who.peer_id, Timeouts())

        def record() -> bytes:
            standing = self.honest[0].peer.seat.standing
            fields: dict[str, Any] = {
                "run_id": self.manifest.run_id,
                "issued_s": now_s(),
                "step": standing.step,
                "head": standing.head,
            }
            return seal_record(
                record_of(who, **fields, heads=list(standing.heads[:4]), committed=committed, life_s=30.0), who
            )

        async def serve(channel: Channel) -> None:
            await answer(channel, await channel.receive(*REQUESTS, timeout_s=100.0), record())

        async def live() -> None:
            await transport.serve(run_protocol(self.manifest.run_id), serve)
            while True:
                sealed = record()
                self.network.store(
                    peers_key(self.manifest.run_id), who.peer_id, (sealed, open_record(sealed).expires_s)
                )
                await asyncio.sleep(RECORD_EVERY_S)

        self.tasks.append(transport._spawn(live()))


async def silent(channel: Channel, message: Message, record: bytes) -> None:
    await asyncio.sleep(500)


async def promises(channel: Channel, message: Message, record: bytes) -> None:
    """Always about to be ready."""
    if isinstance(message, Closing):
        await channel.send(Eta(eta_s=86400.0))
        await asyncio.sleep(500)
    else:
        await polite(channel, message, record)


async def busy(channel: Channel, message: Message, record: bytes) -> None:
    """Always in a round."""
    if isinstance(message, Closing | Ready):
        while True:
            await channel.send(Eta(eta_s=10.0, busy=True))
            await asyncio.sleep(3)
    await polite(channel, message, record)


async def stalls(channel: Channel, message: Message, record: bytes) -> None:
    """Leads, and gathers for ever."""
    if isinstance(message, Ready):
        while True:
            await channel.send(Eta(eta_s=1.0))
            await asyncio.sleep(3)
    elif isinstance(message, Closing):
        await channel.send(Redirect(record=record))
    else:
        await polite(channel, message, record)


async def polite(channel: Channel, message: Message, record: bytes) -> None:
    if isinstance(message, Push):
        await channel.send(Push(record=record))
    elif not isinstance(message, Contribute | Receipt):
        await channel.send(No(reason="not now"))
