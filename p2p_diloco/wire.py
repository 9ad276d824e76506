"""Frames and messages of our own streams. No hivemind here: a channel is a reader, a writer and the peer beyond.

    frame     4 bytes, big-endian length <= 4 MiB, then as many bytes
    message   a frame with msgpack [tag, {field: value}], at most its class's size, parsed by its class's schema

Rules of this file: a length is checked before memory is taken; every read and every write has a time-out; whatever does
not fit raises a RemoteError that names the peer; nothing is ever unpickled.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal, Protocol, TypeVar

import msgpack
from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field, ValidationError

from p2p_diloco.config import Timeouts
from p2p_diloco.errors import Gone, Misbehaved, Refused, Silent
from p2p_diloco.records import MAX_RECORD_BYTES, Hash, Natural, unpack_plain
from p2p_diloco.traffic import Purpose, Traffic
from p2p_diloco.waiting import deadline

MAX_FRAME_BYTES = 4 * 1024 * 1024
MAX_MESSAGE_BYTES = 256 * 1024
CHUNK_BYTES = 1024 * 1024
"""Updates, and whatever else is larger than a message, go in frames of this size; a snapshot's chunk is one."""
MAX_PARTS = 1 << 16
"""A model of 17 billion parameters."""
MAX_LINKS = 1024
MAX_TRANSFER_BYTES = 2 * 1024 * 1024
"""In one direction, of one exchange that measures a connection."""
MANIFEST_PROTOCOL = "p2p-diloco/1/manifest"
"""Who knows a peer's address, but no run id yet, can ask for the manifest."""
DIAL_BACK_PROTOCOL = "p2p-diloco/1/dial-back"
"""Served by who wants to know whether others can reach it."""


def run_protocol(run_id: str) -> str:
    """All other streams. Handler names are global to a libp2p host, so the run's id is in them."""
    return f"p2p-diloco/2/{run_id}"


Sealed = Annotated[bytes, Field(max_length=MAX_RECORD_BYTES)]
Reason = Annotated[str, Field(max_length=200)]
T = TypeVar("T")


def check_ip(text: str) -> str:
    """ValueError unless it is an IP address, without a zone, whose name could be anything."""
    if "%" in text:
        raise ValueError("an address with a zone")
    ipaddress.ip_address(text)
    return text


IpAddress = Annotated[str, Field(max_length=45), AfterValidator(check_ip)]


class Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    tag: ClassVar[str]
    max_bytes: ClassVar[int] = MAX_MESSAGE_BYTES
    purpose: ClassVar[Purpose | None] = None
    """Of a stream that begins with this message; None for an answer."""


M = TypeVar("M", bound=Message)


class Ready(Message):
    """Member to leader: I am ready for a round. Answered by Eta, as often as the time changes, and then by
    Roster, TooFew, Redirect, Behind or No."""

    tag = "ready"
    purpose = "other"
    readiness: Sealed
    record: Sealed


class Roster(Message):
    """Leader to member: the signed readiness of every member, in the order of rank."""

    tag = "roster"
    members: Annotated[list[Sealed], FailFast(), Field(max_length=128)]
    absent: Annotated[list[Sealed], FailFast(), Field(max_length=64)] = []
    """Records of trainers on this head that do not come. Only in runs that keep missed rounds, where they count in the
    divisor of the mean."""


class TooFew(Message):
    """Leader to member: the round closed with fewer than the run's smallest group."""

    tag = "too-few"
    ready: Natural


class Redirect(Message):
    """I shall not lead: this peer ranks before me and is alive."""

    tag = "redirect"
    record: Sealed


class Behind(Message):
    """The round you ask about is over: this is where I stand now. Catch up."""

    tag = "behind"
    record: Sealed


class No(Message):
    tag = "no"
    reason: Reason


class Closing(Message):
    """Leader to a peer that is not ready: the round on this head closes in ``gather_s``. Answered by Eta, Behind,
    Redirect (a better ranked leader gathers on this head: come there) or No; a peer that is busy with another leader's
    round on this very head says so from time to time, and answers when that is over."""

    tag = "closing"
    purpose = "other"
    head: Hash
    gather_s: Annotated[float, Field(ge=0, le=600, allow_inf_nan=False)]
    record: Sealed
    """The leader's."""


class Eta(Message):
    """I shall be ready (a member), or the round closes (a leader), in ``eta_s``."""

    tag = "eta"
    eta_s: Annotated[float, Field(ge=0, le=86400, allow_inf_nan=False)]
    busy: bool = False
    """I am in a round on this head, or wait for one: another word comes in ``eta_s``."""
    leader: Sealed = b""
    """The record of whom I wait for, so that two leaders on one head hear of each other."""


class Contribute(Message):
    """Sender to reducer; then, as frames, the sender's contributions to the reducer's parts, in order. The reducer
    answers with as many frames: a byte with the mask's length, the mask, the encoded mean. Or No."""

    tag = "contribute"
    purpose = "reduce"
    round_id: Hash
    number: Annotated[int, Field(ge=0, lt=256)] = 0
    """Of the butterfly: 0 is the round's own, then those for parts that were lost."""


class Receipt(Message):
    """Member to leader: the hashes of the parts I hold after butterfly ``number``; empty where I hold none. Answered by
    Eta, as often as it takes, and then by Again, Commit or No."""

    tag = "receipt"
    purpose = "reduce"
    max_bytes = MAX_FRAME_BYTES
    round_id: Hash
    number: Annotated[int, Field(ge=0, lt=256)] = 0
    part_hashes: Annotated[list[Hash | Literal[b""]], FailFast(), Field(max_length=MAX_PARTS)]


class Again(Message):
    """Leader to member: nobody holds ``parts``. ``members`` reduce them in a butterfly of this number, among
    themselves. Answered by a new Receipt."""

    tag = "again"
    max_bytes = MAX_FRAME_BYTES
    number: Annotated[int, Field(gt=0, lt=256)]
    members: Annotated[list[Annotated[int, Field(ge=0, lt=256)]], FailFast(), Field(max_length=256)]
    parts: Annotated[list[Annotated[int, Field(ge=0, lt=MAX_PARTS)]], FailFast(), Field(max_length=MAX_PARTS)]


class Commit(Message):
    """Leader to member: this is the update. ``holders[i]`` is the index in the roster of one who holds part ``i``.
    Answered by Took."""

    tag = "commit"
    max_bytes = MAX_FRAME_BYTES
    part_hashes: Annotated[list[Hash], FailFast(), Field(max_length=MAX_PARTS)]
    holders: Annotated[list[Annotated[int, Field(ge=0, lt=256)]], FailFast(), Field(max_length=MAX_PARTS)]


class Took(Message):
    """Member to leader: I shall apply this update, and no other in this round."""

    tag = "took"


class AskCommit(Message):
    """A later leader to a member that has not come: have you taken a commit? Answered by Eta while the member is with
    an earlier leader, and then by the commit, or by No: then the member takes none from an earlier leader any more."""

    tag = "ask-commit"
    purpose = "reduce"
    round_id: Hash


class AskPart(Message):
    """Answered by Size and one frame, as in Contribute, or by No."""

    tag = "ask-part"
    purpose = "reduce"
    round_id: Hash
    part: Natural
    hash: Hash


class AskHeads(Message):
    """Answered by Heads, or by No when there are none from ``since`` on."""

    tag = "ask-heads"
    purpose = "catchup"
    since: Natural


class Heads(Message):
    """The head at outer step ``first``, and the links of the updates from there on that I can serve. Heads follow from
    links, so nobody can invent a way to a head that others stand on."""

    tag = "heads"
    first: Natural
    head: Hash
    links: Annotated[list[Hash], FailFast(), Field(max_length=MAX_LINKS)]


class AskUpdate(Message):
    """Answered by Size and then as many bytes in frames of CHUNK_BYTES, or No."""

    tag = "ask-update"
    purpose = "catchup"
    step: Natural
    head: Hash
    """The head that the update leads to."""


class AskIndex(Message):
    """Answered, as AskUpdate, with a snapshot's head and the hash of each of its chunks, 32 bytes each."""

    tag = "ask-index"
    purpose = "catchup"
    step: Natural
    digest: Hash


class AskChunk(Message):
    """Answered, as AskUpdate, with one chunk of a snapshot: a part of theta or of momentum, at most CHUNK_BYTES."""

    tag = "ask-chunk"
    purpose = "catchup"
    step: Natural
    digest: Hash
    chunk: Natural


class Size(Message):
    tag = "size"
    size_bytes: Natural


class AskManifest(Message):
    """Answered by Size and then as many bytes, the signed manifest, in frames of CHUNK_BYTES."""

    tag = "ask-manifest"
    purpose = "other"


class Push(Message):
    """My newest record, when it matters at once: I have joined, moved on, or am leaving. Answered by Push."""

    tag = "push"
    purpose = "other"
    record: Sealed


class AskDialBack(Message):
    """Who signed ``consent`` listens where this stream comes from: can you reach it? Answered by DialedBack or No."""

    tag = "ask-dial-back"
    purpose = "other"
    consent: Sealed


class DialBack(Message):
    """To the one that I was asked to dial: here I am. Not answered."""

    tag = "dial-back"
    purpose = "other"


class DialedBack(Message):
    tag = "dialed-back"
    reached: bool
    ip: IpAddress
    """Where the asking stream comes from, as I see it: the only address that I dial."""
    reason: Reason = ""
    """Why not reached."""


class AskTransfer(Message):
    """Then a frame of ``up_bytes``. Answered by Transferred and a frame of ``down_bytes``, and another AskTransfer may
    follow; or by No."""

    tag = "ask-transfer"
    purpose = "other"
    up_bytes: Annotated[int, Field(ge=0, le=MAX_TRANSFER_BYTES)]
    down_bytes: Annotated[int, Field(ge=0, le=MAX_TRANSFER_BYTES)]


class Transferred(Message):
    tag = "transferred"
    wall_s: Annotated[float, Field(ge=0, le=1e11, allow_inf_nan=False)]
    """The answering peer's clock: Unix time."""


MESSAGES: dict[str, type[Message]] = {kind.tag: kind for kind in Message.__subclasses__()}


class Writer(Protocol):
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
    """One stream to one authenticated peer. Counts its bytes."""

    peer_id: str
    reader: asyncio.StreamReader
    writer: Writer
    timeouts: Timeouts
    traffic: Traffic = field(default_factory=Traffic)
    """Of all streams of this transport."""
    purpose: Purpose = "other"
    """Said by the message that the stream begins with."""
    remote_ip: str = ""
    """Of a stream that came in: the address that it came from. Empty where a relay is between."""
    meter: Meter = field(default_factory=Meter)
    """Of this stream, or of all that are counted together."""

    async def send_frame(self, *pieces: bytes | memoryview) -> None:
        """Raises Silent when the peer does not read, Gone when the stream is closed."""
        size = sum(len(piece) for piece in pieces)
        if size > MAX_FRAME_BYTES:
            raise ValueError(f"a frame of {size} bytes")

        async def write() -> None:
            self.writer.write(size.to_bytes(4, "big"))
            for piece in pieces:
                self.writer.write(piece)
            await self.writer.drain()

        await self._bounded(write(), self.timeouts.write_s, "does not read what we send")
        self.meter.sent += 4 + size
        self.traffic.sent[self.purpose] += 4 + size

    async def receive_frame(self, max_bytes: int, timeout_s: float) -> bytes:
        """Raises Misbehaved for a longer frame, before its bytes are read; Silent after ``timeout_s``; Gone."""
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
        self.meter.received += 4 + len(frame)
        self.traffic.received[self.purpose] += 4 + len(frame)

    async def send(self, message: Message) -> None:
        self.purpose = message.purpose or self.purpose
        await self.send_frame(msgpack.packb([message.tag, message.model_dump()]))

    async def receive(self, *kinds: type[M], timeout_s: float, max_bytes: int = MAX_FRAME_BYTES) -> M:
        """One message of one of ``kinds``. Raises Refused for a No that is not among them; else as receive_frame."""
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
        await self.send(message)
        return await self.receive(*kinds, timeout_s=self.timeouts.request_s if timeout_s is None else timeout_s)

    async def send_blob(self, data: bytes) -> None:
        """Size, and then the bytes in frames of CHUNK_BYTES."""
        await self.send(Size(size_bytes=len(data)))
        for start in range(0, len(data), CHUNK_BYTES):
            await self.send_frame(memoryview(data)[start : start + CHUNK_BYTES])

    async def receive_blob(self, max_bytes: int, timeout_s: float) -> bytes:
        """What ``send_blob`` sent. Raises Misbehaved, before anything is taken, when it is more than ``max_bytes``."""
        announced = (await self.receive(Size, timeout_s=timeout_s)).size_bytes
        if announced > max_bytes:
            raise Misbehaved(self.peer_id, f"announces {announced} bytes where at most {max_bytes} are due")
        data = bytearray()
        while len(data) < announced:
            data += await self.receive_chunk(announced - len(data), timeout_s)
        return bytes(data)

    async def receive_chunk(self, left_bytes: int, timeout_s: float) -> bytes:
        """min(CHUNK_BYTES, ``left_bytes``) bytes: whole chunks, so that ``timeout_s`` is a lowest rate, too."""
        due = min(CHUNK_BYTES, left_bytes)
        chunk = await self.receive_frame(due, timeout_s)
        if len(chunk) != due:
            raise Misbehaved(self.peer_id, f"serves a chunk of {len(chunk)} bytes, another size than is due")
        return chunk

    def refusal(self, frame: bytes) -> Refused | None:
        """Of who sent a No where other bytes are due."""
        try:
            message = self._parse(frame)
        except Misbehaved:
            return None
        return Refused(self.peer_id, message.reason) if isinstance(message, No) else None

    def close(self) -> None:
        self.writer.close()

    def _parse(self, data: bytes) -> Message:
        try:
            content = unpack_plain(data)
            if not (isinstance(content, list) and len(content) == 2 and isinstance(content[0], str)):
                raise ValueError("not a message")
            kind = MESSAGES.get(content[0])
            if kind is None:
                raise ValueError("a message of no known kind")
            return kind.model_validate(content[1])
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            raise Misbehaved(self.peer_id, f"sends a malformed message ({first['loc']}: {first['msg']})") from error
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
    """Serves one incoming stream; the transport closes the channel afterwards."""

    def __call__(self, channel: Channel, /) -> Awaitable[None]: ...


@dataclass(frozen=True, kw_only=True)
class Links:
    direct: int = 0
    """Connections."""
    relayed: int = 0
    routing_table: int = 0
    """Peers in our part of the DHT's routing table."""


class Transport(Protocol):
    """What a peer needs of a network. ``node.Node`` is the real one; the tests have one in memory."""

    peer_id: str
    timeouts: Timeouts
    traffic: Traffic

    async def serve(self, protocol: str, handler: Handler) -> None:
        """From now on, every incoming stream of this protocol goes to ``handler``."""

    async def open(self, peer_id: str, maddrs: list[str], protocol: str) -> Channel:
        """Raises Gone when the peer cannot be reached, Silent when that takes longer than ``connect_s``."""

    async def publish(self, key: str, record: bytes, expires_s: float) -> bool:
        """Store our signed record under ``key`` in the DHT. False when nobody took it."""

    async def look_up(self, key: str) -> list[bytes]:
        """The signed records under ``key``; unverified, bounded in number and size. Empty when nothing is found."""

    async def maddrs(self) -> list[str]:
        """Where others can dial us, the most public address first, each ending in /p2p/PEER-ID."""

    async def links(self) -> Links:
        """To whom we are connected now."""
