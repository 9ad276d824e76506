"""Links in memory, and a DHT that is a dictionary.

The network between the peers is nobody's (see ``simloop``): what is on its way to a peer arrives, whatever has become
of the sender, and lies in the receiver's buffer when that one is stopped. What may go wrong, and how it looks:

    kill        streams of the dead end a latency later; ``silent``, as when a machine is switched off: never
    stop        streams stay open and buffers fill; ``whole``: new streams are not accepted either
    cut         a link's streams are reset; ``silent``, as when a cable is pulled: they hold what they have until the
                link is back, or are reset when that takes longer than SILENT_RESET_S
    address     a home gets another one: its streams hold what they have, and nobody is told. Whatever it sends over one
                of them resets that one, for it comes from where nobody is; others reach it when it has dialled them
    reset       the newest stream of one peer to another is, and nothing else: both are there, and so is the link
    slow        one direction of a link takes longer
    uplinks     all that a peer sends goes through one line of so many bytes per second
    dht         records come late, twice, old after new, or never
    echo        the first message of a stream, or all of it, comes a second time, in a stream of its own

A peer in client mode can be reached by those that it has reached itself, as long as that connection stands.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import deque
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.errors import Gone, LocalError, RemoteError, Silent
from p2p_diloco.core.reach import IPV4_ALONE, Ways
from p2p_diloco.core.records import open_record
from p2p_diloco.core.waiting import Bell, heard
from p2p_diloco.wire.channel import Channel, Handler, Links, Writer
from p2p_diloco.wire.traffic import Traffic
from tests.support.simloop import NOBODY, Incarnation

BUFFER_BYTES = 64 * 1024
SILENT_RESET_S = 40.0
"""Keep-alives of libp2p give a connection up after about this long."""
LATE_S = 6.0
"""How late a record may come when the DHT is in trouble."""

T = TypeVar("T")
HowCut = Literal["", "reset", "silent"]


@dataclass(frozen=True)
class Link:
    """One direction between two peers."""

    slow_s: float = 0.0
    """Added to the latency."""
    cut: HowCut = ""


CLEAR = Link()


class Pipe:
    """One direction of a stream, the socket buffers at its ends included. Bytes stay in order."""

    def __init__(self, network: FakeNetwork, source: str, target: str) -> None:
        self.network, self.source, self.target = network, source, target
        self.reader = asyncio.StreamReader(limit=network.buffer_bytes)
        self.reader.set_transport(self)  # type: ignore[arg-type]
        self.back = self
        """The other direction."""
        self.room = Bell()
        self.unread_bytes = 0
        self.closed = False
        """The source has closed the stream."""
        self.over = False
        """The target sees its end: nothing comes any more."""
        self.astray = False
        """Nothing that is sent arrives: one end has another address now."""
        self.resets = False
        """The source is that end: the target's machine knows no such stream, and says so."""
        self._sent: deque[bytes | None] = deque()
        self._arrived = 0
        self._sent_s = self._arrives_s = 0.0
        self._full = False

    def pause_reading(self) -> None:
        self._full = True

    def resume_reading(self) -> None:
        self._full = False
        asyncio.get_running_loop().call_soon(self.deliver, context=NOBODY)

    def send(self, data: bytes | None) -> None:
        """None is the end."""
        if self.over or self.closed:
            return
        self.closed = data is None
        if self.resets:
            asyncio.get_running_loop().call_later(2 * self.network.latency_s, self.reset, context=NOBODY)
        self.unread_bytes += len(data or b"")
        loop = asyncio.get_running_loop()
        together = self._sent_s == loop.time() and self.source not in self.network.uplinks
        last = self._sent[-1] if len(self._sent) > self._arrived and together else None
        if last is not None and data is not None:
            self._sent[-1] = last + data
            return
        self._sent.append(data)
        self._sent_s = loop.time()
        leaves_s = self.network.leaves_s(self.source, len(data or b""))
        self._arrives_s = max(self._arrives_s, leaves_s + self.network.delay_s(self.source, self.target))
        loop.call_at(self._arrives_s, self._arrive, context=NOBODY)

    def _arrive(self) -> None:
        self._arrived += 1
        self.deliver()

    def deliver(self) -> None:
        """Give the target what is there for it, as far as its buffer goes."""
        cut = self.astray or self.network.link(self.source, self.target).cut
        while self._arrived and not (self.over or self._full or cut):
            data = self._sent.popleft()
            self._arrived -= 1
            if data is None:
                self.end()
            else:
                self.unread_bytes -= len(data)
                self.reader.feed_data(data)
        self.room.ring()

    def end(self) -> None:
        """What has not arrived never does. Who writes into the other direction hears of it, too."""
        if not self.over:
            self.over = True
            self.network.pipes.pop(self, None)
            self.reader.feed_eof()
            self.room.ring()
            self.back.room.ring()

    def reset(self) -> None:
        """Ends the stream in both directions."""
        self.end()
        self.back.end()


@dataclass(eq=False)
class FakeWriter:
    incarnation: Incarnation
    pipe: Pipe
    echo: Pipe | None = None
    echoed: int = 0
    """Messages that the echo is still to hear."""

    def write(self, data: bytes | memoryview, /) -> None:
        if self.incarnation.alive:
            self.pipe.send(bytes(data))
            if self.echo is not None and self.echoed > 0:
                self.echo.send(bytes(data))

    async def drain(self) -> None:
        self.echoed -= 1
        await asyncio.sleep(0)
        pipe = self.pipe
        while pipe.unread_bytes > pipe.network.buffer_bytes and not (pipe.over or pipe.back.over):
            await pipe.room.event.wait()
        if pipe.closed or pipe.over or pipe.back.over:
            raise ConnectionResetError

    def close(self) -> None:
        if self.incarnation.alive:
            self.pipe.send(None)
            if self.echo is not None:
                self.echo.send(None)


@dataclass(eq=False)
class FakeNetwork:
    """``jitter``: a message takes up to so many latencies more, so that streams overtake each other."""

    latency_s: float = 0.02
    jitter: float = 0.0
    buffer_bytes: int = BUFFER_BYTES
    random: random.Random = field(default_factory=lambda: random.Random(0))
    nodes: dict[str, FakeTransport] = field(default_factory=dict)
    dead: set[str] = field(default_factory=set)
    mute: set[str] = field(default_factory=set)
    """Peers whose machine answers nothing: switched off, or stopped as a whole."""
    stored: dict[str, dict[str, tuple[bytes, float]]] = field(default_factory=dict)
    """The DHT: key -> peer id -> (record, when it expires)."""
    dht_trouble: float = 0.0
    """How probable it is that a record is lost, late or old."""
    echo: float = 0.0
    """How probable it is that a stream's first message, or all of it, comes a second time in a stream of its own."""
    pipes: dict[Pipe, None] = field(default_factory=dict)
    """All that are open, the oldest first; no set, whose order would change from run to run."""
    connections: set[tuple[str, str]] = field(default_factory=set)
    """Between a peer that cannot be dialled and one that it has dialled: streams go both ways over those."""
    moved: set[tuple[str, str]] = field(default_factory=set)
    """A peer with a new address, and one that it has not dialled since."""
    uplinks: dict[str, float] = field(default_factory=dict)
    """Peer -> bytes per second that it can send in all; the others as many as they like."""
    changed: Bell = field(default_factory=Bell)
    """Who can reach whom has."""

    def __post_init__(self) -> None:
        self._links: dict[tuple[str, str], Link] = {}
        self._free_s: dict[str, float] = {}
        """Peer -> when its uplink has sent what was written."""
        self._older: dict[tuple[str, str], tuple[bytes, float]] = {}
        self._islands: dict[str, int] = {}
        self._well_since_s: dict[frozenset[str], float] = {}
        """Link, or peer alone -> when what was wrong with it was over; infinite while it is not."""

    # -- links -------------------------------------------------------------------------------------------------------

    def link(self, source: str, target: str) -> Link:
        return self._links.get((source, target), CLEAR)

    def leaves_s(self, source: str, size_bytes: int) -> float:
        """When what a peer writes now has gone out; from now on what it writes next waits for that."""
        now = asyncio.get_running_loop().time()
        if source not in self.uplinks:
            return now
        self._free_s[source] = max(self._free_s.get(source, now), now) + size_bytes / self.uplinks[source]
        return self._free_s[source]

    def delay_s(self, source: str, target: str) -> float:
        jitter = self.jitter * self.random.random() if self.jitter else 0.0
        return self.latency_s * (1 + jitter) + self.link(source, target).slow_s

    def connected(self, a: str, b: str) -> bool:
        return not ({a, b} & self.dead or self.link(a, b).cut or self.link(b, a).cut)

    def silent(self, a: str, b: str) -> bool:
        """Whether ``a`` hears nothing at all from ``b``, not even that it is gone."""
        return b in self.mute or (b, a) in self.moved or "silent" in (self.link(a, b).cut, self.link(b, a).cut)

    def well_since_s(self, a: str, b: str) -> float:
        """The loop time since when two peers have lived, run and heard each other without delay. -inf: always;
        inf: they do not."""
        return max(self._well_since_s.get(frozenset(ends), -math.inf) for ends in ((a,), (b,), (a, b)))

    def _note(self, *ends: str, well: bool) -> None:
        self._well_since_s[frozenset(ends)] = asyncio.get_running_loop().time() if well else math.inf

    def slow(self, source: str, target: str, slow_s: float) -> None:
        self._note(source, target, well=not slow_s)
        self._links[source, target] = replace(self.link(source, target), slow_s=slow_s)

    def cut(self, a: str, b: str, how: Literal["reset", "silent"]) -> None:
        self._note(a, b, well=False)
        for way in ((a, b), (b, a)):
            self._links[way] = replace(self.link(*way), cut=how)
        self._changed()
        between = [pipe for pipe in self.pipes if {pipe.source, pipe.target} == {a, b}]
        if how == "reset":
            self._reset(between, a, b)
        else:
            asyncio.get_running_loop().call_later(SILENT_RESET_S, self._give_up, between, a, b, context=NOBODY)

    def move(self, peer_id: str) -> None:
        """Gives a home another address."""
        self.moved |= {(peer_id, other) for other in self.nodes if other != peer_id}
        for pipe in self.pipes:
            pipe.astray = pipe.astray or peer_id in (pipe.source, pipe.target)
            pipe.resets = pipe.resets or peer_id == pipe.source

    def reset(self, source: str, target: str) -> None:
        """What is on its way over that stream is gone with it."""
        next(pipe for pipe in reversed(self.pipes) if (pipe.source, pipe.target) == (source, target)).reset()

    def _give_up(self, between: list[Pipe], a: str, b: str) -> None:
        if self.link(a, b).cut:
            self._reset(between, a, b)

    def _reset(self, pipes: list[Pipe], a: str, b: str) -> None:
        self.connections -= {(a, b), (b, a)}
        for pipe in pipes:
            pipe.end()

    def restore(self, a: str, b: str) -> None:
        self._note(a, b, well=True)
        for way in ((a, b), (b, a)):
            self._links[way] = replace(self.link(*way), cut="")
        self._changed()
        for pipe in [pipe for pipe in self.pipes if {pipe.source, pipe.target} == {a, b}]:
            pipe.deliver()

    def _changed(self) -> None:
        self._islands.clear()
        self.changed.ring()

    def island(self, peer_id: str) -> int:
        """The same number for two living peers that can reach each other, if only through others."""
        if not self._islands:
            living = [p for p in self.nodes if p not in self.dead]
            for number, start in enumerate(living):
                shore = [] if start in self._islands else [start]
                while shore:
                    here = shore.pop()
                    self._islands[here] = number
                    shore += [p for p in living if p not in self._islands and self.connected(here, p)]
        return self._islands.get(peer_id, -1)

    # -- peers -------------------------------------------------------------------------------------------------------

    def kill(self, peer_id: str, *, silent: bool = False) -> None:
        """As SIGKILL: nothing of the peer runs any more, its streams end, its record stays in the DHT."""
        self._note(peer_id, well=False)
        self.nodes[peer_id].incarnation.die()
        self.dead.add(peer_id)
        if silent:
            self.mute.add(peer_id)
        self._changed()
        loop = asyncio.get_running_loop()
        mine = [pipe for pipe in self.pipes if peer_id in (pipe.source, pipe.target)]
        self.connections = {ends for ends in self.connections if peer_id not in ends}
        for pipe in mine:
            if silent:
                loop.call_later(SILENT_RESET_S, pipe.end, context=NOBODY)
            elif pipe.source == peer_id:
                pipe.send(None)
            else:
                loop.call_later(self.delay_s(peer_id, pipe.source), pipe.end, context=NOBODY)

    def stop(self, peer_id: str, *, whole: bool = False) -> None:
        """As SIGSTOP, of p2pd, too, if ``whole``."""
        self._note(peer_id, well=False)
        self.nodes[peer_id].incarnation.stop()
        if whole:
            self.mute.add(peer_id)

    def resume(self, peer_id: str) -> None:
        self._note(peer_id, well=True)
        self.mute.discard(peer_id)
        self.nodes[peer_id].incarnation.resume()
        self._changed()

    def enter(self, node: FakeTransport) -> None:
        """A peer's new life begins."""
        self.nodes[node.peer_id] = node
        self.dead.discard(node.peer_id)
        self.mute.discard(node.peer_id)
        if frozenset((node.peer_id,)) in self._well_since_s:
            self._note(node.peer_id, well=True)
        self._changed()

    # -- the DHT -----------------------------------------------------------------------------------------------------

    def store(self, key: str, peer_id: str, record: tuple[bytes, float]) -> None:
        if not self._trouble():
            self._store(key, peer_id, record)
            return
        for _ in range(self.random.choice((0, 1, 2))):
            late_s = LATE_S * self.random.random()
            asyncio.get_running_loop().call_later(late_s, self._store, key, peer_id, record, context=NOBODY)

    def _store(self, key: str, peer_id: str, record: tuple[bytes, float]) -> None:
        held = self.stored.setdefault(key, {})
        if peer_id in held:
            self._older[key, peer_id] = held[peer_id]
        held[peer_id] = record

    def records(self, key: str, viewer: str) -> list[tuple[bytes, float]]:
        """What ``viewer`` finds: those on its own side of a partition, and those of the dead."""
        found = []
        for peer_id, record in self.stored.get(key, {}).items():
            if peer_id in self.nodes and peer_id not in self.dead and self.island(peer_id) != self.island(viewer):
                continue
            if not self._trouble():
                found.append(record)
            elif self.random.random() < 0.5:
                found.append(self._older.get((key, peer_id), record))
        return found

    def _trouble(self) -> bool:
        return self.dht_trouble > 0 and self.random.random() < self.dht_trouble


@dataclass(eq=False)
class FakeTransport:
    network: FakeNetwork
    peer_id: str
    timeouts: Timeouts
    handlers: dict[str, Handler] = field(default_factory=dict)
    dialable: bool = True
    """False for a peer in client mode."""
    ways: Ways = IPV4_ALONE
    """Over which families it is reached, and reaches others."""
    relayed: bool = False
    """A relay is between it and all others."""
    incarnation: Incarnation = field(default_factory=Incarnation)
    complaints: list[RemoteError] = field(default_factory=list)
    """What handlers raised about their peers."""
    traffic: Traffic = field(default_factory=Traffic)
    favoured: set[str] = field(default_factory=set)
    failures: list[LocalError] = field(default_factory=list)
    """What handlers raised about this peer itself; a stream handler ends nothing but its stream."""

    def __post_init__(self) -> None:
        self.network.enter(self)

    @property
    def tasks(self) -> list[asyncio.Task[Any]]:
        """What this peer is still busy with; nothing once it is dead."""
        return self.incarnation.unfinished() if self.incarnation.alive else []

    async def serve(self, protocol: str, handler: Handler) -> None:
        self.handlers[protocol] = handler

    async def open(self, peer_id: str, maddrs: list[str], protocol: str) -> Channel:
        network, loop = self.network, asyncio.get_running_loop()
        deadline_s = loop.time() + self.timeouts.connect_s
        takes_s = network.delay_s(self.peer_id, peer_id) + network.link(peer_id, self.peer_id).slow_s
        await asyncio.sleep(min(takes_s, self.timeouts.connect_s))
        while network.silent(self.peer_id, peer_id) or takes_s > self.timeouts.connect_s:
            changed, left_s = network.changed.event, deadline_s - loop.time()
            if left_s <= 0:
                raise Silent(peer_id, f"cannot be reached within {self.timeouts.connect_s:g} s")
            await heard(changed, left_s)
        remote = network.nodes.get(peer_id)
        if remote is None or not network.connected(self.peer_id, peer_id) or protocol not in remote.handlers:
            raise Gone(peer_id, "cannot be reached")
        if (self.peer_id, peer_id) in network.moved:
            network.moved.discard((self.peer_id, peer_id))
            network.changed.ring()
        if not self.dialable:
            network.connections.add((self.peer_id, peer_id))
        if not remote.dialable and (peer_id, self.peer_id) not in network.connections:
            raise Gone(peer_id, "cannot be dialled")
        if not self._is_in_reach(remote):
            raise Gone(peer_id, "network is unreachable")
        there = self._connect(remote, protocol)
        writer = FakeWriter(self.incarnation, there)
        if network.echo > 0 and network.random.random() < network.echo:
            writer.echo, writer.echoed = self._connect(remote, protocol), network.random.choice((1, 1_000_000))
        channel = self._channel(peer_id, there.back.reader, writer)
        channel.relayed = self.relayed or remote.relayed
        return channel

    def _is_in_reach(self, remote: FakeTransport) -> bool:
        """Whether one of the two can dial the other one: streams then go both ways."""
        return any(one.ways.reaches_over & other.ways.reached_over for one, other in ((self, remote), (remote, self)))

    def _connect(self, remote: FakeTransport, protocol: str) -> Pipe:
        """A new stream that ``remote`` serves; the direction to it."""
        there = Pipe(self.network, self.peer_id, remote.peer_id)
        there.back = Pipe(self.network, remote.peer_id, self.peer_id)
        there.back.back = there
        self.network.pipes |= {there: None, there.back: None}
        theirs = remote._channel(self.peer_id, there.reader, FakeWriter(remote.incarnation, there.back))
        theirs.relayed = self.relayed or remote.relayed
        remote._spawn(remote._handle(remote.handlers[protocol], theirs))
        return there

    def _channel(self, peer_id: str, reader: asyncio.StreamReader, writer: Writer) -> Channel:
        return Channel(peer_id=peer_id, reader=reader, writer=writer, timeouts=self.timeouts, traffic=self.traffic)

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        return self.incarnation.run(asyncio.get_running_loop().create_task, work)

    async def _handle(self, handler: Handler, channel: Channel) -> None:
        try:
            await handler(channel)
        except RemoteError as error:
            self.traffic.reject(error)
            self.complaints.append(error)
        except LocalError as error:
            self.failures.append(error)
        finally:
            channel.close()

    async def publish(self, key: str, record: bytes, expires_s: float) -> bool:
        await asyncio.sleep(self.network.latency_s)
        open_record(record)
        self.network.store(key, self.peer_id, (record, expires_s))
        return True

    async def look_up(self, key: str) -> list[bytes]:
        await asyncio.sleep(self.network.latency_s)
        now_s = asyncio.get_running_loop().time()
        return [record for record, expires_s in self.network.records(key, self.peer_id) if expires_s > now_s]

    async def maddrs(self) -> list[str]:
        return [f"/memory/{self.peer_id[-8:]}/p2p/{self.peer_id}"]

    async def links(self) -> Links:
        others = [peer_id for peer_id in self.network.nodes if self.network.connected(self.peer_id, peer_id)]
        return Links(direct=len(others) - 1, routing_table=len(self.network.nodes) - 1)
