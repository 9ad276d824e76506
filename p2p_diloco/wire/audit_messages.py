"""What peers say to each other when they audit what a reducer has made of their contributions."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from p2p_diloco.core.identity import MAX_PEER_ID_CHARS
from p2p_diloco.core.records import Hash, Natural
from p2p_diloco.wire.message import Message


class AskContributions(Message):
    """Member to reducer, after the update is applied: show me the contributions to a part that you reduced. Answered,
    as AskUpdate, by the senders' contributions and signatures; or by No."""

    tag = "ask-contributions"
    purpose = "other"
    bulk = True
    round_id: Hash
    number: Annotated[int, Field(ge=0, lt=256)]
    """Of the butterfly."""
    part: Natural


class Accuses(Message):
    """I can prove that a part that this peer has reduced is not the mean of what was contributed to it. Answered by
    AskEvidence, or by No from who knows that already, or has no reason to listen."""

    tag = "accuses"
    purpose = "other"
    peer_id: Annotated[str, Field(min_length=1, max_length=MAX_PEER_ID_CHARS)]


class AskEvidence(Message):
    """Answers Accuses: prove it. Answered, as AskUpdate, by the evidence."""

    tag = "ask-evidence"
