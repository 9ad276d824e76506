"""What peers say to each other about rounds and states: each message, its size and the schema that checks it; and the
bytes of every message there is.

Rules of this file: every list and every string is bounded; one class, one tag; nothing is ever unpickled.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgpack
from pydantic import FailFast, Field, ValidationError

from p2p_diloco.core.certificate import MAX_CERTIFICATE_BYTES, MAX_FULL_BYTES
from p2p_diloco.core.group import MAX_ABSENT, MAX_MEMBERS
from p2p_diloco.core.invitation import MAX_REVOCATIONS_BYTES
from p2p_diloco.core.records import Hash, Natural, unpack_plain
from p2p_diloco.wire.anchor_messages import ABOUT_ANCHORS
from p2p_diloco.wire.message import Message, Reason, Sealed, Signature
from p2p_diloco.wire.probe_messages import PROBES

MAX_FRAME_BYTES = 4 * 1024 * 1024
CHUNK_BYTES = 1024 * 1024
"""Updates, and whatever else is larger than a message, go in frames of this size; a snapshot's chunk is one."""
MAX_PARTS = 1 << 16
"""A model of 17 billion parameters."""
MAX_LINKS = 1024
MAX_CHAIN_BYTES = 16 * 1024 * 1024
"""Of headers and certificates in one answer; one pair may be larger."""


class Ready(Message):
    """Member to leader: I am ready for a round. Answered by Eta, as often as the time changes, and then by
    Roster, TooFew, NoWitness, Redirect, Behind or No."""

    tag = "ready"
    purpose = "other"
    readiness: Sealed
    record: Sealed


class Roster(Message):
    """Leader to member: the signed readiness of every member, in the order of rank, and the leader's signature over the
    whole."""

    tag = "roster"
    members: Annotated[list[Sealed], FailFast(), Field(max_length=MAX_MEMBERS)]
    absent: Annotated[list[Sealed], FailFast(), Field(max_length=MAX_ABSENT)] = Field(default=[])
    """Records of trainers on this head that do not come. Only in runs that keep missed rounds, where they count in the
    total weight."""
    signature: Signature


class TooFew(Message):
    """Leader to member: the round closed with fewer than the run's smallest group."""

    tag = "too-few"
    ready: Natural


class NoWitness(Message):
    """Leader to member: too few of those who are ready are known, and the run's owner, whose seed would have to witness
    the update, is not there."""

    tag = "no-witness"


class Redirect(Message):
    """I shall not lead: this peer precedes me and is alive."""

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
    Redirect (a leader that precedes you gathers on this head: come there) or No; a peer that is busy with another
    leader's round on this very head says so from time to time, and answers when that is over."""

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
    state: Hash | Literal[b""] = b""
    """The digest of my outer state, at an outer step at which a snapshot is due."""


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
    Answered by Took, when the member holds all of it and signs it, or by No, when it does not sign; then by Eta, any
    number, and Certifies or No."""

    tag = "commit"
    max_bytes = MAX_FRAME_BYTES
    part_hashes: Annotated[list[Hash], FailFast(), Field(max_length=MAX_PARTS)]
    holders: Annotated[list[Annotated[int, Field(ge=0, lt=256)]], FailFast(), Field(max_length=MAX_PARTS)]
    state: Hash | Literal[b""] = b""
    """The digest of the state that the update leads on from, where a snapshot is due and most members agree on it."""


class Took(Message):
    """Member to leader: my signature over the update (``core.certificate.Taken``). I sign no other in this round."""

    tag = "took"
    signature: Signature


class AskCommit(Message):
    """A later leader to a member that has not come: have you taken a commit? Answered by Eta while the member is with
    an earlier leader, and then by TookBefore; by Commit and Certifies, when the member knows that it is certified; or
    by No: then the member signs none of an earlier leader any more."""

    tag = "ask-commit"
    purpose = "reduce"
    round_id: Hash


class TookBefore(Message):
    """Member to a later leader: the commit that I have taken, and my signature over it."""

    tag = "took-before"
    max_bytes = MAX_FRAME_BYTES
    part_hashes: Annotated[list[Hash], FailFast(), Field(max_length=MAX_PARTS)]
    state: Hash | Literal[b""] = b""
    signature: Signature


class Certifies(Message):
    """Leader to member: the update is certified by these. Who has it applies the update."""

    tag = "certifies"
    full: Annotated[bytes, Field(max_length=MAX_FULL_BYTES)]
    members: Annotated[list[Annotated[int, Field(ge=0, lt=256)]], FailFast(), Field(max_length=MAX_MEMBERS)]
    """Indices in the roster of those who have signed, rising."""
    signatures: Annotated[list[Signature], FailFast(), Field(max_length=MAX_MEMBERS)]
    """In the order of ``members``."""
    witness: Signature | Literal[b""] = b""
    """Of the run's owner, where it has witnessed the update and is no member."""


class AskWitness(Message):
    """Leader to the owner's seed: too few of us are known; witness this update. Answered by Eta while the seed catches
    up, and then by Witnessed or No: it witnesses one update on a head."""

    tag = "ask-witness"
    purpose = "reduce"
    link: Hash
    """The update's."""
    certificate: Annotated[bytes, Field(max_length=MAX_CERTIFICATE_BYTES)]
    """As it would be without a witness."""
    max_bytes = MAX_CERTIFICATE_BYTES + 1024


class Witnessed(Message):
    """The owner's seed to a leader: my signature over the update that you named."""

    tag = "witnessed"
    signature: Signature


class AskPart(Message):
    """Member to member: send me one part of the round's update. Answered by Size and one frame, as in Contribute, or by
    No."""

    tag = "ask-part"
    purpose = "reduce"
    round_id: Hash
    part: Natural
    hash: Hash


class AskHeads(Message):
    """I want to catch up: which way did you go from outer step ``since`` on? Answered by Heads, or by No when there are
    none from there on."""

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


class AskChain(Message):
    """Answered by Size and then as many bytes in frames of CHUNK_BYTES: the headers and certificates of as many updates
    from outer step ``since`` on as fit into MAX_CHAIN_BYTES, in order; or by No, when there is none."""

    tag = "ask-chain"
    purpose = "catchup"
    since: Natural


class AskUpdate(Message):
    """Send me the update that ends in this head. Answered by Size and then as many bytes in frames of CHUNK_BYTES, or
    No."""

    tag = "ask-update"
    purpose = "catchup"
    step: Natural
    head: Hash
    """The head that the update leads to."""


class AskIndex(Message):
    """Send me what is in this snapshot. Answered, as AskUpdate, with its head and the hash of each of its chunks, 32
    bytes each."""

    tag = "ask-index"
    purpose = "catchup"
    step: Natural
    digest: Hash


class AskChunk(Message):
    """Send me one chunk of a snapshot: a part of theta or of momentum, at most CHUNK_BYTES. Answered as AskUpdate."""

    tag = "ask-chunk"
    purpose = "catchup"
    step: Natural
    digest: Hash
    chunk: Natural


class Size(Message):
    """I send you so many bytes, in the frames that follow."""

    tag = "size"
    size_bytes: Natural


class AskManifest(Message):
    """Send me the run's signed manifest. Answered as AskUpdate."""

    tag = "ask-manifest"
    purpose = "other"


class Push(Message):
    """This is my newest record, which matters at once: I have joined, moved on, or am leaving. Answered by Push."""

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


MESSAGES: dict[str, type[Message]] = {
    kind.tag: kind for kind in sorted(Message.__subclasses__(), key=lambda k: (k in PROBES, k in ABOUT_ANCHORS))
}
"""Tag -> message, of all there are."""


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
