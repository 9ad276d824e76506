"""What peers say to each other about what they hold: the way that the state has gone, updates and snapshots, the run's
manifest, records, and what the run's owner has revoked."""

from __future__ import annotations

from typing import Annotated

from pydantic import FailFast, Field

from p2p_diloco.core.invitation import MAX_REVOCATIONS_BYTES
from p2p_diloco.core.records import Hash, Natural
from p2p_diloco.core.signed_part import MAX_PARTS
from p2p_diloco.wire.message import Message, Sealed

MAX_LINKS = 1024
MAX_CHAIN_BYTES = 16 * 1024 * 1024
"""Of headers and certificates in one answer; one pair may be larger."""

MAX_HAVE_BYTES = 2 * MAX_PARTS // 8
"""A bit for each chunk of the largest model: parts of theta, and of momentum."""


class AskHeads(Message):
    """Asks which way a peer went from outer step ``since`` on. Answered by Heads, or by No when there are none from
    there on."""

    tag = "ask-heads"
    purpose = "catchup"
    since: Natural
    pruned: bool = False
    """Those, too, that no update of yours leads to any more: I want to know where our ways part, not to catch up."""


class Heads(Message):
    """The head at outer step ``first``, and the links of the updates from there on, of those that I can serve, or of
    all in my chain where ``pruned`` was asked for. Heads follow from links, so nobody can invent a way to a head that
    others stand on."""

    tag = "heads"
    first: Natural
    head: Hash
    links: Annotated[list[Hash], FailFast(), Field(max_length=MAX_LINKS)]


class AskChain(Message):
    """Answered by Size and then as many bytes in frames of CHUNK_BYTES: the headers and certificates of as many updates
    from outer step ``since`` on as fit into MAX_CHAIN_BYTES, in order; or by No, when there is none."""

    tag = "ask-chain"
    purpose = "catchup"
    bulk = True
    since: Natural


class AskUpdate(Message):
    """Send me the update that ends in this head. Answered by Size and then as many bytes in frames of CHUNK_BYTES, or
    No."""

    tag = "ask-update"
    purpose = "catchup"
    bulk = True
    step: Natural
    head: Hash
    """The head that the update leads to."""


class AskIndex(Message):
    """Send me what is in this snapshot. Answered, as AskUpdate, with its head and the hash of each of its chunks, 32
    bytes each."""

    tag = "ask-index"
    purpose = "catchup"
    bulk = True
    step: Natural
    digest: Hash


class AskChunk(Message):
    """Send me one chunk of a snapshot: a part of theta or of momentum, at most CHUNK_BYTES. Answered as AskUpdate."""

    tag = "ask-chunk"
    purpose = "catchup"
    bulk = True
    step: Natural
    digest: Hash
    chunk: Natural


class AskHave(Message):
    """Which chunks of this snapshot do you have? Asked of a peer that downloads it, too. Answered by Have, or by No
    where there are none."""

    tag = "ask-have"
    purpose = "catchup"
    bulk = True
    step: Natural
    digest: Hash


class Have(Message):
    """These chunks of the snapshot I have: a bit for each, that of chunk 0 the lowest of the first byte."""

    tag = "have"
    chunks: Annotated[bytes, Field(max_length=MAX_HAVE_BYTES)]


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
