"""Frames of our own streams. No hivemind here: a channel is a reader, a writer and the peer beyond.

    frame     4 bytes, big-endian length <= 4 MiB, then as many bytes
    message   a frame with msgpack [tag, {field: value}], at most its class's size, parsed by its class's schema
              (``messages``)

Rules of this file: a length is checked before memory is taken; every read and every write has a time-out; whatever does
not fit raises a RemoteError that names the peer; nothing is ever unpickled.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.errors import Gone, Misbehaved, Refused, Silent
from p2p_diloco.core.manifest import PROTOCOL
from p2p_diloco.core.reach import Ways
from p2p_diloco.core.waiting import deadline, now_s
from p2p_diloco.wire.connections import Connections
from p2p_diloco.wire.message import CHUNK_BYTES, MAX_FRAME_BYTES, Message
from p2p_diloco.wire.messages import No, Size, pack, parse
from p2p_diloco.wire.traffic import Purpose, Traffic

MANIFEST_PROTOCOL = "p2p-diloco/1/manifest"
"""Who knows a peer's address, but no run id yet, can ask for the manifest."""
RELAYED_BYTES = 64 * 1024
"""Of a message or blob through a relay. p2pd's own relays cut a connection, with all its streams, after 128 KiB or two
minutes, and the cut looks like an orderly end."""
NOT_THROUGH_A_RELAY = "we are connected through a relay, which carries small messages only"
DIAL_BACK_PROTOCOL = "p2p-diloco/1/dial-back"
"""Served by who wants to know whether others can reach it."""


def run_protocol(run_id: str) -> str:
    """Returns the name of a run's streams, all but those that give its manifest. Handler names are global to a libp2p
    host, so the run's id is in them, and so is the protocol: peers of two versions never talk past each other."""
    return f"p2p-diloco/{PROTOCOL}/{run_id}"


M = TypeVar("M", bound=Message)
T = TypeVar("T")


class Writer(Protocol):
    """Writes one stream. ``drain`` returns when all that was written is handed over."""

    def write(self, data: bytes | memoryview, /) -> None: ...
    async def drain(self) -> None: ...
    def close(self) -> None: ...


@dataclass(kw_only=True)
class Meter:
    """Bytes, frame headers included."""

    sent: int = 0
    received: int = 0


@dataclass(kw_only=True)
class Channel:
    """One stream to one authenticated peer, which counts its bytes."""

    peer_id: str
    reader: asyncio.StreamReader
    writer: Writer
    timeouts: Timeouts
    traffic: Traffic = field(default_factory=Traffic)
    """Of all streams of this transport."""
    connections: Connections = field(default_factory=Connections)
    """Of this transport."""
    purpose: Purpose = "other"
    """Said by the message that the stream begins with."""
    remote_ip: str = ""
    """Of a stream that came in: the address that it came from. Empty where a relay is between."""
    relayed: bool = False
    """A relay is between: it is for small messages only."""
    meter: Meter = field(default_factory=Meter)
    """Of this stream, or of all that are counted together."""
    opened_s: float = field(default_factory=now_s)
    """Loop time."""
    used_s: float = 0.0
    """Loop time of the last frame, in either direction."""
    heard: bool = False
    """A frame has come over it."""

    @property
    def is_fresh(self) -> bool:
        """Returns whether the stream was opened within ``Timeouts.heartbeat_s``, and nothing has come over it yet."""
        return not self.heard and now_s() < self.opened_s + self.timeouts.heartbeat_s

    async def send_frame(self, *pieces: bytes | memoryview) -> None:
        """Sends ``pieces`` as one frame, and returns when they are handed over. Raises Silent when the peer does not
        read, Gone when the stream is closed."""
        size = sum(len(piece) for piece in pieces)
        if size > MAX_FRAME_BYTES:
            raise ValueError(f"a frame of {size} bytes")

        async def write() -> None:
            self.writer.write(size.to_bytes(4, "big"))
            for piece in pieces:
                self.writer.write(piece)
            await self.writer.drain()

        began_s = now_s()
        try:
            await self._bounded(write(), self.timeouts.write_s, "does not read what we send")
        except Silent:
            self.connections.fell_silent(self.peer_id, began_s)
            raise
        self.used_s = now_s()
        self.meter.sent += 4 + size
        self.traffic.sent[self.purpose] += 4 + size

    async def receive_frame(self, max_bytes: int, timeout_s: float) -> bytes:
        """Returns the next frame. Raises Misbehaved for one of more than ``max_bytes``, before its bytes are read;
        Silent after ``timeout_s``; Gone when the stream is closed."""
        data = await self._read_frame(max_bytes, timeout_s)
        self._count_received(data)
        return data

    async def _read_frame(self, max_bytes: int, timeout_s: float) -> bytes:
        async def read() -> bytes:
            size = int.from_bytes(await self.reader.readexactly(4), "big")
            if size > max_bytes:
                raise Misbehaved(self.peer_id, f"announces a frame of {size} bytes where at most {max_bytes} are due")
            return await self.reader.readexactly(size)

        return await self._bounded(read(), timeout_s, f"has sent nothing for {timeout_s:g} s")

    def _count_received(self, frame: bytes) -> None:
        self.used_s = now_s()
        self.heard = True
        self.connections.heard(self.peer_id, self.used_s)
        self.meter.received += 4 + len(frame)
        self.traffic.received[self.purpose] += 4 + len(frame)

    async def send(self, message: Message) -> None:
        """Sends one message. Raises as ``send_frame``; and Gone, before anything is sent, where a relay is between, and
        the message is too large for it, or parts of a model would follow."""
        data = pack(message)
        if self.relayed and (message.bulk or len(data) > RELAYED_BYTES):
            raise Gone(self.peer_id, f"cannot be reached: {NOT_THROUGH_A_RELAY}")
        self.purpose = message.purpose or self.purpose
        await self.send_frame(data)

    async def receive(self, *kinds: type[M], timeout_s: float, max_bytes: int = MAX_FRAME_BYTES) -> M:
        """Returns the next message, which is one of ``kinds``. Raises Refused for a No that is not among them; else as
        ``receive_frame``."""
        data = await self._read_frame(min(max_bytes, max(kind.max_bytes for kind in kinds)), timeout_s)
        try:
            message = self._parse(data)
            self.purpose = message.purpose or self.purpose
        finally:
            self._count_received(data)
        if isinstance(message, kinds):
            return message
        if isinstance(message, No):
            raise Refused(self.peer_id, message.reason)
        raise Misbehaved(self.peer_id, f"sends {message.tag} out of turn")

    async def request(self, message: Message, *kinds: type[M], timeout_s: float | None = None) -> M:
        """Sends one message and returns the next one that comes, within ``request_s`` where no time is given."""
        await self.send(message)
        asked_s = now_s()
        try:
            return await self.receive(*kinds, timeout_s=self.timeouts.request_s if timeout_s is None else timeout_s)
        except Silent:
            self.connections.fell_silent(self.peer_id, asked_s)
            raise

    async def send_blob(self, data: bytes) -> None:
        """Sends Size, and then the bytes in frames of CHUNK_BYTES; No in their place where a relay would cut them."""
        if self.relayed and len(data) > RELAYED_BYTES:
            await self.send(No(reason=NOT_THROUGH_A_RELAY))
            return
        await self.send(Size(size_bytes=len(data)))
        for start in range(0, len(data), CHUNK_BYTES):
            await self.send_frame(memoryview(data)[start : start + CHUNK_BYTES])

    async def receive_blob(self, max_bytes: int, timeout_s: float) -> bytes:
        """Returns what ``send_blob`` sent at the other end. Raises Misbehaved, before anything is taken, when it is
        more than ``max_bytes``. ``timeout_s``: for each frame."""
        announced = (await self.receive(Size, timeout_s=timeout_s)).size_bytes
        if announced > max_bytes:
            raise Misbehaved(self.peer_id, f"announces {announced} bytes where at most {max_bytes} are due")
        data = bytearray()
        while len(data) < announced:
            data += await self.receive_chunk(announced - len(data), timeout_s)
        return bytes(data)

    async def receive_chunk(self, left_bytes: int, timeout_s: float) -> bytes:
        """Returns min(CHUNK_BYTES, ``left_bytes``) bytes: whole chunks, so that ``timeout_s`` is a lowest rate, too."""
        due = min(CHUNK_BYTES, left_bytes)
        chunk = await self.receive_frame(due, timeout_s)
        if len(chunk) != due:
            raise Misbehaved(self.peer_id, f"serves a chunk of {len(chunk)} bytes, another size than is due")
        return chunk

    def refusal(self, frame: bytes) -> Refused | None:
        """Returns the error for a peer that sent No where other bytes were due; None when ``frame`` is no No."""
        try:
            message = self._parse(frame)
        except Misbehaved:
            return None
        return Refused(self.peer_id, message.reason) if isinstance(message, No) else None

    def close(self) -> None:
        """Closes the stream, in both directions."""
        self.writer.close()

    def _parse(self, data: bytes) -> Message:
        try:
            return parse(data)
        except ValueError as error:
            raise Misbehaved(self.peer_id, f"sends a malformed message ({error})") from error

    async def _bounded(self, work: Awaitable[T], timeout_s: float, complaint: str) -> T:
        try:
            async with deadline(timeout_s):
                return await work
        except asyncio.TimeoutError:
            raise Silent(self.peer_id, complaint) from None
        except (asyncio.IncompleteReadError, OSError) as error:
            raise Gone(self.peer_id, "closed the stream") from error


class Handler(Protocol):
    """Serves one incoming stream. The transport closes the channel when it returns."""

    def __call__(self, channel: Channel, /) -> Awaitable[None]: ...


@dataclass(frozen=True, kw_only=True)
class Links:
    """Says how a peer is connected now."""

    direct: int = 0
    """Connections."""
    relayed: int = 0
    routing_table: int = 0
    """Peers in our part of the DHT's routing table."""


class Transport(Protocol):
    """A peer's access to the network. ``node.Node`` is the real one; the tests have one in memory."""

    peer_id: str
    timeouts: Timeouts
    traffic: Traffic
    favoured: set[str]
    """Ids of the peers that have done something for us, which ``peer`` keeps up to date. Their streams and records have
    places that no stranger can take."""

    async def serve(self, protocol: str, handler: Handler) -> None:
        """Has ``handler`` serve every incoming stream of this protocol from now on."""

    async def open(self, peer_id: str, maddrs: list[str], protocol: str) -> Channel:
        """Opens a stream to a peer. Raises Gone when the peer cannot be reached, Silent when that takes longer than
        ``connect_s``."""

    async def publish(self, key: str, record: bytes, expires_s: float) -> bool:
        """Stores our signed record under ``key`` in the DHT. Returns False when nobody took it."""

    async def look_up(self, key: str) -> list[bytes]:
        """Returns the signed records under ``key``: unverified, bounded in number and size; none when nothing is
        found."""

    async def maddrs(self) -> list[str]:
        """Returns the addresses where others can dial us, the most public first, each ending in /p2p/PEER-ID."""

    @property
    def dialable(self) -> bool:
        """Returns whether others can dial us at these addresses, as far as we know."""

    @property
    def ways(self) -> Ways:
        """Returns over which families others dial us, and we dial them, as far as we know."""

    async def links(self) -> Links:
        """Returns how we are connected now."""
