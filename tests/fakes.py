"""A whole swarm in one event loop: a clock that jumps, links in memory, a DHT that is a dictionary.

``SimLoop`` has no real time: where a real loop would wait, its clock moves on at once, so a minute of a swarm takes as
long as its computations. Threads are run inline. A schedule is therefore the same every time.
"""

from __future__ import annotations

import asyncio
import selectors
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from p2p_diloco.codec import Codec, Vector
from p2p_diloco.config import Timeouts
from p2p_diloco.errors import Gone, RemoteError
from p2p_diloco.events import EventLog
from p2p_diloco.identity import Identity
from p2p_diloco.ledger import Ledger
from p2p_diloco.manifest import DataSpec, InnerSpec, ModelSpec, OuterSpec, RoundSpec, RunManifest, RunSpec
from p2p_diloco.outer import genesis_state
from p2p_diloco.peer import OuterResult, Peer
from p2p_diloco.records import open_record
from p2p_diloco.replica import Replica
from p2p_diloco.rounds import Progress, outer_step_due
from p2p_diloco.wire import Channel, Handler

T = TypeVar("T")

START_S = 1_000_000.0
LONGEST_S = 5_000.0
THREAD_S = 0.01


class _JumpingSelector(selectors.DefaultSelector):
    """Never waits: tells the loop's clock how long it would have."""

    loop: SimLoop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise AssertionError("the swarm waits for something that never happens")
        self.loop.now_s += max(timeout, 0.0)
        if self.loop.now_s > START_S + LONGEST_S:
            raise AssertionError(f"the swarm is still busy after {LONGEST_S:.0f} s")
        return []


class SimLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.now_s = START_S
        selector = _JumpingSelector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.now_s

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        """The work of a thread takes THREAD_S; a peer that dies meanwhile never does it."""
        future: asyncio.Future[T] = self.create_future()

        def work() -> None:
            if future.cancelled():
                return
            try:
                future.set_result(func(*args))
            except Exception as error:
                future.set_exception(error)

        self.call_later(THREAD_S, work)
        return future


def run_simulated(main: Coroutine[Any, Any, T]) -> T:
    """As asyncio.run, on a SimLoop; an exception in any task, even one nobody awaits, fails the test."""
    loop = SimLoop()
    unheard: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: unheard.append(context))
    try:
        result = loop.run_until_complete(main)
        pending = asyncio.all_tasks(loop)
        for task in pending:
            task.cancel()
        if pending:
            loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
    finally:
        loop.close()
    assert not unheard, unheard
    return result


@dataclass(eq=False)
class FakeWriter:
    """Delivers in order, ``latency_s`` later, unless either end has died by then."""

    network: FakeNetwork
    source: str
    target: str
    reader: asyncio.StreamReader
    latency_s: float
    sent: deque[bytes | None] = field(default_factory=deque)
    closed: bool = False

    def write(self, data: bytes | memoryview, /) -> None:
        if not self.closed:
            self._send(bytes(data))

    async def drain(self) -> None:
        await asyncio.sleep(0)
        if self.closed or not self.network.connected(self.source, self.target):
            raise ConnectionResetError

    def close(self) -> None:
        if not self.closed:
            self._send(None)
            self.closed = True

    def _send(self, data: bytes | None) -> None:
        self.sent.append(data)
        asyncio.get_running_loop().call_later(self.latency_s, self._deliver)

    def _deliver(self) -> None:
        data = self.sent.popleft()
        if data is None or not self.network.connected(self.source, self.target):
            if not self.reader.at_eof():
                self.reader.feed_eof()
        elif not self.reader._eof:  # type: ignore[attr-defined]
            self.reader.feed_data(data)


@dataclass(eq=False)
class FakeNetwork:
    latency_s: float = 0.02
    nodes: dict[str, FakeTransport] = field(default_factory=dict)
    dead: set[str] = field(default_factory=set)
    stored: dict[str, dict[str, tuple[bytes, float]]] = field(default_factory=dict)
    """The DHT: key -> peer id -> (record, when it expires)."""

    def connected(self, a: str, b: str) -> bool:
        return a not in self.dead and b not in self.dead

    def kill(self, peer_id: str) -> None:
        """As SIGKILL: its streams end, its tasks do no more, its record stays in the DHT."""
        self.dead.add(peer_id)
        node = self.nodes[peer_id]
        for reader in node.readers:
            if not reader.at_eof():
                reader.feed_eof()
        for task in node.tasks:
            task.cancel()


@dataclass(eq=False)
class FakeTransport:
    network: FakeNetwork
    peer_id: str
    timeouts: Timeouts
    handlers: dict[str, Handler] = field(default_factory=dict)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    readers: list[asyncio.StreamReader] = field(default_factory=list)
    """The other ends of this node's streams: they see it die."""
    complaints: list[RemoteError] = field(default_factory=list)
    """What handlers raised about their peers."""
    bytes_sent: int = 0

    def __post_init__(self) -> None:
        self.network.nodes[self.peer_id] = self

    async def serve(self, protocol: str, handler: Handler) -> None:
        self.handlers[protocol] = handler

    async def open(self, peer_id: str, maddrs: list[str], protocol: str) -> Channel:
        await asyncio.sleep(self.network.latency_s)
        remote = self.network.nodes.get(peer_id)
        if remote is None or not self.network.connected(self.peer_id, peer_id) or protocol not in remote.handlers:
            raise Gone(peer_id, "cannot be reached")
        here, there = asyncio.StreamReader(), asyncio.StreamReader()
        self.readers.append(there)
        remote.readers.append(here)
        theirs = remote._channel(self.peer_id, there, here)
        remote._spawn(remote._handle(remote.handlers[protocol], theirs))
        return self._channel(peer_id, here, there)

    def _channel(self, peer_id: str, mine: asyncio.StreamReader, theirs: asyncio.StreamReader) -> Channel:
        writer = FakeWriter(self.network, self.peer_id, peer_id, theirs, self.network.latency_s)
        return Channel(peer_id=peer_id, reader=mine, writer=writer, timeouts=self.timeouts)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _handle(self, handler: Handler, channel: Channel) -> None:
        try:
            await handler(channel)
        except RemoteError as error:
            self.complaints.append(error)
        finally:
            channel.close()

    async def publish(self, key: str, record: bytes, expires_s: float) -> bool:
        await asyncio.sleep(self.network.latency_s)
        if self.peer_id in self.network.dead:
            return False
        open_record(record)
        self.network.stored.setdefault(key, {})[self.peer_id] = (record, expires_s)
        return True

    async def look_up(self, key: str) -> list[bytes]:
        await asyncio.sleep(self.network.latency_s)
        now_s = asyncio.get_running_loop().time()
        return [record for record, expires_s in self.network.stored.get(key, {}).values() if expires_s > now_s]

    async def maddrs(self) -> list[str]:
        return [f"/memory/{self.peer_id[-8:]}/p2p/{self.peer_id}"]


def make_manifest(
    n: int,
    theta: Vector,
    owner: Identity,
    *,
    codec: Codec = "fp32",
    outer_steps: int = 50,
    inner_steps: int = 10,
    min_group: int = 2,
    lr: float = 0.7,
    momentum: float = 0.9,
) -> RunManifest:
    """A sound manifest for vectors of ``n`` values that belong to no real model."""
    return RunManifest(
        spec=RunSpec(
            name="simulated",
            model=ModelSpec(config={"model_type": "llama"}),
            data=DataSpec(seq_len=8),
            inner=InnerSpec(steps=inner_steps, batch_size=1),
            outer=OuterSpec(steps=outer_steps, lr=lr, momentum=momentum, codec=codec),
            round=RoundSpec(min_group=min_group, gather_s=2.0, snapshot_every=5),
        ),
        model_config_json="{}",
        n_params=n,
        layout_digest="0" * 64,
        vocab_size=256,
        data_fingerprint="",
        genesis=genesis_state(theta.copy()).digest().hex(),
        owner=owner.peer_id,
    )


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

    @classmethod
    def create(
        cls,
        network: FakeNetwork,
        manifest: RunManifest,
        owner: Identity,
        folder: Path,
        index: int,
        *,
        target: Vector | None,
        genesis: Vector | None = None,
        client_mode: bool = False,
        step_s: float = 1.0,
    ) -> SimPeer:
        """``genesis`` where this peer is to have S_0 on its disk; ``target`` None for a seed."""
        identity = Identity.from_seed(index.to_bytes(32, "big"))
        n, outer = manifest.n_params, manifest.spec.outer
        ledger = Ledger(
            folder / str(index),
            n=n,
            codec=outer.codec,
            lr=outer.lr,
            momentum=outer.momentum,
            snapshot_every=manifest.spec.round.snapshot_every,
            run_id=manifest.run_id,
        )
        if genesis is not None and not ledger.snapshots():
            ledger.write_snapshot(genesis_state(genesis.copy()))
        transport = FakeTransport(network, identity.peer_id, Timeouts())
        peer = Peer(
            transport=transport,
            identity=identity,
            replica=Replica(manifest, ledger, np.empty(n, np.float32), np.empty(n, np.float32)),
            signed_manifest=manifest.signed(owner),
            local=None if target is None else np.empty(n, np.float32),
            events=EventLog(folder / str(index)),
            client_mode=client_mode,
            wall_s=asyncio.get_running_loop().time,
        )
        pull = np.zeros(n, np.float32) if target is None else target
        return cls(peer=peer, transport=transport, target=pull, step_s=step_s)

    def start(self) -> None:
        """Live until killed, or until the last outer step."""
        self.transport._spawn(self.live())

    async def live(self) -> None:
        try:
            await self.peer.join()
            run = asyncio.ensure_future(self.peer.run())
            self.transport.tasks.add(run)
            if self.peer.local is not None:
                await self.peer.begin()
                await self._train(self.peer.local)
            await run
        finally:
            self.peer.events.close()

    async def _train(self, local: Vector) -> None:
        peer, spec, now = self.peer, self.peer.manifest.spec, asyncio.get_running_loop().time
        self._take_theta(local)
        done = 0
        while peer.step < spec.outer.steps:
            await asyncio.sleep(self.step_s)
            local -= np.float32(self.rate) * (local - self.target)
            done += 1
            peer.seat.progress = Progress(
                inner_step=done, planned=spec.inner.steps, step_s=self.step_s, reported_s=now()
            )
            closes_s = peer.seat.closes_s
            if outer_step_due(
                inner_step=done,
                planned=spec.inner.steps,
                step_s=self.step_s,
                closes_in_s=None if closes_s is None else closes_s - now(),
                behind=peer.behind,
            ):
                result = await peer.outer_step(done * spec.tokens_per_inner_step)
                self.results.append(result)
                if result.moved:
                    self._take_theta(local)
                    done = 0

    def _take_theta(self, local: Vector) -> None:
        local[:] = self.peer.replica.theta
        state = self.peer.replica.loaded
        self.history[state.step] = (state.head, state.theta.tobytes())
