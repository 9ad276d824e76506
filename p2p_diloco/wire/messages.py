"""What peers say to each other: every message of our streams, its size and the schema that checks it.

Rules of this file: every list and every string is bounded; one class, one tag; nothing is ever unpickled.
"""

from __future__ import annotations

import ipaddress
from typing import Annotated, ClassVar, Literal

import msgpack
from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field, ValidationError

from p2p_diloco.core.invitation import MAX_REVOCATIONS_BYTES
from p2p_diloco.core.records import MAX_RECORD_BYTES, Hash, Natural, unpack_plain
from p2p_diloco.wire.traffic import Purpose

MAX_FRAME_BYTES = 4 * 1024 * 1024
MAX_MESSAGE_BYTES = 256 * 1024
CHUNK_BYTES = 1024 * 1024
"""Updates, and whatever else is larger than a message, go in frames of this size; a snapshot's chunk is one."""
MAX_PARTS = 1 << 16
"""A model of 17 billion parameters."""
MAX_LINKS = 1024
MAX_TRANSFER_BYTES = 2 * 1024 * 1024
"""In one direction, of one exchange that measures a connection."""

Sealed = Annotated[bytes, Field(max_length=MAX_RECORD_BYTES)]
Reason = Annotated[str, Field(max_length=200)]


def check_ip(text: str) -> str:
    """Returns ``text`` if it is an IP address. Raises ValueError if not, or with a zone, whose name could be
    anything."""
    if "%" in text:
        raise ValueError("an address with a zone")
    ipaddress.ip_address(text)
    return text


IpAddress = Annotated[str, Field(max_length=45), AfterValidator(check_ip)]


class Message(BaseModel):
    """One message of a stream; each kind is a class, and its fields are checked when it is parsed."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    tag: ClassVar[str]
    max_bytes: ClassVar[int] = MAX_MESSAGE_BYTES
    purpose: ClassVar[Purpose | None] = None
    """Of a stream that begins with this message; None for an answer."""


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
    total weight."""


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
    """I refuse what you ask, for this reason. Answers any message that asks for something."""

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
    """So many bytes follow, in frames."""

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


class AskRevocations(Message):
    """Answered by RevocationList, or by No where nothing is revoked. In a run by invitation alone."""

    tag = "ask-revocations"
    purpose = "other"


class RevocationList(Message):
    """The newest list that I have of what the run's owner has revoked."""

    tag = "revocations"
    sealed: Annotated[bytes, Field(max_length=MAX_REVOCATIONS_BYTES)]


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
    """Whether I could dial you back."""

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
    """I have your bytes, and mine follow in one frame."""

    tag = "transferred"
    wall_s: Annotated[float, Field(ge=0, le=1e11, allow_inf_nan=False)]
    """The answering peer's clock: Unix time."""


MESSAGES: dict[str, type[Message]] = {kind.tag: kind for kind in Message.__subclasses__()}


def pack(message: Message) -> bytes:
    """Returns a message as bytes."""
    return bytes(msgpack.packb([message.tag, message.model_dump()]))


def parse(data: bytes) -> Message:
    """Returns the message that ``data`` is. Raises a ValueError that says what is wrong, and quotes nothing."""
    content = unpack_plain(data)
    if not (isinstance(content, list) and len(content) == 2 and isinstance(content[0], str)):
        raise ValueError("not a message")
    kind = MESSAGES.get(content[0])
    if kind is None:
        raise ValueError("a message of no known kind")
    try:
        return kind.model_validate(content[1])
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise ValueError(f"{first['loc']}: {first['msg']}") from error
