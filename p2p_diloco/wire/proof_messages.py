"""What peers say to each other so that nobody signs two things unseen: which roster and which certified commit a member
of a round has, and the proofs against those that have lied."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import FailFast, Field

from p2p_diloco.core.certificate import MAX_FULL_BYTES
from p2p_diloco.core.group import MAX_MEMBERS
from p2p_diloco.core.identity import MAX_PEER_ID_CHARS
from p2p_diloco.core.records import MAX_BARRED, Hash
from p2p_diloco.wire.message import Message, Signature

PeerId = Annotated[str, Field(min_length=1, max_length=MAX_PEER_ID_CHARS)]


class AskRoster(Message):
    """Member of a round to a peer on its head that is not in it: I have a roster of this leader; have you another one?
    Answered by Roster, when the peer has, or by No. After a Roster comes mine, where the two prove that their leader
    lies, or No."""

    tag = "ask-roster"
    purpose = "reduce"
    head: Hash
    leader: PeerId
    round_id: Hash
    signature: Signature
    """The leader's, over the roster that I have."""


class AskOther(Message):
    """Member to member: I am about to apply this update of our round; do you know that another one is certified?
    Answered by Other, when the member does, or by No. From now on it knows of mine."""

    tag = "ask-other"
    purpose = "reduce"
    round_id: Hash
    link: Hash
    full: Annotated[bytes, Field(max_length=MAX_FULL_BYTES)]
    state: Hash | Literal[b""] = b""
    members: Annotated[list[Annotated[int, Field(ge=0, lt=256)]], FailFast(), Field(max_length=MAX_MEMBERS)]
    signatures: Annotated[list[Signature], FailFast(), Field(max_length=MAX_MEMBERS)]
    witness: Signature | Literal[b""] = b""


class Other(Message):
    """Member to member: this update of our round is certified as well. Whoever has signed both lies."""

    tag = "other"
    link: Hash
    full: Annotated[bytes, Field(max_length=MAX_FULL_BYTES)]
    state: Hash | Literal[b""] = b""
    members: Annotated[list[Annotated[int, Field(ge=0, lt=256)]], FailFast(), Field(max_length=MAX_MEMBERS)]
    signatures: Annotated[list[Signature], FailFast(), Field(max_length=MAX_MEMBERS)]
    witness: Signature | Literal[b""] = b""


class AskBarred(Message):
    """Asks whom a peer has barred. Answered by BarredPeers, or by No where that is nobody; as many AskProof as are
    wanted follow."""

    tag = "ask-barred"
    purpose = "other"


class BarredPeers(Message):
    """Lists the peers that one has barred, each with a proof that it serves."""

    tag = "barred"
    peer_ids: Annotated[list[PeerId], FailFast(), Field(max_length=MAX_BARRED)]


class AskProof(Message):
    """Asks for the proof against a peer. Answered by Size and then as many bytes in frames of CHUNK_BYTES, or by No."""

    tag = "ask-proof"
    peer_id: PeerId


PROOFS: tuple[type[Message], ...] = (AskRoster, AskOther, Other, AskBarred, BarredPeers, AskProof)
"""All of them."""
