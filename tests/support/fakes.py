"""A whole swarm in one event loop: peers that are real but for clock (``simloop``), links and DHT (``links``)."""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from p2p_diloco.core.aggregate import AggregateName
from p2p_diloco.core.codec import Vector
from p2p_diloco.core.codecs import CodecName
from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.errors import LocalError
from p2p_diloco.core.events import EventLog
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.manifest import RunManifest
from p2p_diloco.core.outer import genesis_state
from p2p_diloco.core.pace import Progress, outer_step_due
from p2p_diloco.core.reach import IPV4_ALONE, Ways
from p2p_diloco.core.runfile import (
    DataSpec,
    InnerSpec,
    Membership,
    ModelSpec,
    OnMissed,
    OuterSpec,
    RoundSpec,
    RunSpec,
    SeedsReduce,
)
from p2p_diloco.core.waiting import cancel_and_wait, deadline
from p2p_diloco.ledger.ledger import Ledger
from p2p_diloco.ledger.replica import Replica
from p2p_diloco.peer.control import OuterResult
from p2p_diloco.peer.peer import Peer
from tests.support.builders import identity
from tests.support.links import FakeNetwork, FakeTransport
from tests.support.simloop import Incarnation, run_simulated

__all__ = ["FakeNetwork", "FakeTransport", "SimPeer", "make_manifest", "run_simulated"]

USUAL_TIMEOUTS = Timeouts()


def make_manifest(
    n: int,
    theta: Vector,
    owner: Identity,
    *,
    codec: CodecName = "fp32",
    outer_steps: int = 50,
    inner_steps: int = 10,
    min_group: int = 2,
    lr: float = 0.7,
    momentum: float = 0.9,
    on_missed: OnMissed = "adopt",
    max_group: int = 64,
    snapshot_every: int = 5,
    aggregate: AggregateName = "mean",
    membership: Membership = "open",
    audit_parts: int = 1,
    seeds_reduce: SeedsReduce = "auto",
) -> RunManifest:
    """A sound manifest for vectors of ``n`` values that belong to no real model. ``mean``: what an update holds can be
    counted exactly."""
    return RunManifest(
        spec=RunSpec(
            name="simulated",
            membership=membership,
            model=ModelSpec(config={"model_type": "llama"}),
            data=DataSpec(seq_len=8),
            inner=InnerSpec(steps=inner_steps, batch_size=1),
            outer=OuterSpec(steps=outer_steps, lr=lr, momentum=momentum, codec=codec, aggregate=aggregate),
            round=RoundSpec(
                min_group=min_group,
                max_group=max_group,
                gather_s=2.0,
                snapshot_every=snapshot_every,
                on_missed=on_missed,
                audit_parts=audit_parts,
                seeds_reduce=seeds_reduce,
            ),
        ),
        model_config_json='{"model_type":"llama"}',
        n_params=n,
        layout_digest="0" * 64,
        vocab_size=256,
        data_fingerprint="",
        genesis=genesis_state(theta.copy()).digest().hex(),
        owner=owner.peer_id,
    )


S = TypeVar("S", bound="SimPeer")


@dataclass(eq=False)
class SimPeer:
    """A peer of ours, whole but for processes and network, and a trainer that pulls its parameters to a target."""

    peer: Peer
    transport: FakeTransport
    target: Vector
    step_s: float = 1.0
    rate: float = 0.1
    results: list[OuterResult] = field(default_factory=list)
    history: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)
    """Outer step -> (head, bytes of theta), as this peer saw them."""
    ended_by: LocalError | None = None
    """What went wrong on its own side, and ended it."""
    training: bool = True
    """Its owner wants it to."""
    trainer: asyncio.Task[None] | None = None
    drop: float = 0.0
    """Probability that it contributes nothing to a round."""
    drops: random.Random = field(default_factory=random.Random)

    @classmethod
    def create(
        cls: type[S],
        network: FakeNetwork,
        manifest: RunManifest,
        owner: Identity,
        folder: Path,
        index: int,
        *,
        target: Vector | None,
        genesis: Vector | None = None,
        client_mode: bool = False,
        ways: Ways = IPV4_ALONE,
        step_s: float = 1.0,
        clock_s: float = 0.0,
        seat: bytes = b"",
        timeouts: Timeouts = USUAL_TIMEOUTS,
    ) -> S:
        """``genesis`` where this peer is to have S_0 on its disk; ``target`` None for a seed. The same index and folder
        again are the same peer, started again. ``clock_s``: how fast its clock is."""
        who = identity(index)
        n, outer = manifest.n_params, manifest.spec.outer
        ledger = Ledger(
            folder / str(index),
            grid=manifest.grid,
            lr=outer.lr,
            momentum=outer.momentum,
            snapshot_every=manifest.spec.round.snapshot_every,
            run_id=manifest.run_id,
        )
        if genesis is not None and not ledger.snapshots():
            ledger.write_snapshot(genesis_state(genesis.copy()))
        transport = FakeTransport(
            network, who.peer_id, timeouts, dialable=not client_mode, ways=ways, incarnation=Incarnation(str(index))
        )
        peer = Peer(
            transport=transport,
            identity=who,
            replica=Replica(manifest, ledger, np.empty(n, np.float32), np.empty(n, np.float32)),
            signed_manifest=manifest.signed(owner),
            local=None if target is None else np.empty(n, np.float32),
            events=EventLog(folder / str(index)),
            wall_s=lambda: asyncio.get_running_loop().time() + clock_s,
            seat=seat,
        )
        pull = np.zeros(n, np.float32) if target is None else target
        return cls(peer=peer, transport=transport, target=pull, step_s=step_s)

    def start(self) -> None:
        """Live until killed, or until something goes wrong on its own side, which ends the process."""
        self.life = self.transport._spawn(self._live())

    async def _live(self) -> None:
        try:
            await self.peer.join()
            await asyncio.gather(self.peer.run(), self._begin())
        except LocalError as error:
            self.ended_by = error
            self.transport.network.kill(self.peer.identity.peer_id)
        finally:
            self.peer.events.close()

    async def _begin(self) -> None:
        if self.peer.local is None:
            return
        await self.peer.begin()
        self.trainer = asyncio.ensure_future(self._train(self.peer.local))
        await asyncio.wait((self.trainer,))
        if not self.trainer.cancelled():
            self.trainer.result()

    async def _train(self, local: Vector) -> None:
        """As ``train.train`` does it, until the run's last outer step."""
        peer, spec, now = self.peer, self.peer.manifest.spec, asyncio.get_running_loop().time
        self._see_theta()
        local[:] = peer.replica.theta
        done, tokens, planned = 0, 0, spec.inner.steps
        while peer.step < spec.outer.steps and self.training:
            await asyncio.sleep(self.step_s)
            self.learn(local)
            done, tokens = done + 1, tokens + spec.tokens_per_inner_step
            peer.seat.progress = Progress(inner_step=done, planned=planned, step_s=self.step_s, reported_s=now())
            closes_s = peer.seat.closes_s
            if outer_step_due(
                inner_step=done,
                planned=planned,
                step_s=self.step_s,
                closes_in_s=None if closes_s is None else closes_s - now(),
                behind=peer.follower.behind,
            ):
                result = await self.offer(tokens)
                self.results.append(result)
                done, planned = 0, result.planned
                if result.moved:
                    self._see_theta()
                if result.moved and not result.kept:
                    local[:] = peer.replica.theta
                    tokens = 0

    def learn(self, local: Vector) -> None:
        """One inner step."""
        local -= np.float32(self.rate) * (local - self.target)

    async def offer(self, tokens: int) -> OuterResult:
        dropped = self.drops.random() < self.drop
        pace = self.peer.manifest.spec.tokens_per_inner_step / self.step_s
        return await self.peer.outer_step(tokens, dropped=dropped, pace=pace)

    async def leave(self) -> None:
        """As Ctrl+C does it: politely, but not for long. The process ends."""
        leave_s = self.peer.here.timeouts.leave_s
        with contextlib.suppress(asyncio.TimeoutError):
            async with deadline(leave_s / 2):
                if self.trainer is not None:
                    await cancel_and_wait([self.trainer], leave_s / 4)
                await self.peer.leave("asked")
        self.peer.events.close()
        self.transport.network.kill(self.peer.identity.peer_id)

    def _see_theta(self) -> None:
        state = self.peer.replica.loaded
        self.history[state.step] = (state.head, state.theta.tobytes())
