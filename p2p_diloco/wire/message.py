"""What every message of our streams is: a tag, fields that are checked, and a largest size."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from p2p_diloco.core.identity import SIGNATURE_BYTES
from p2p_diloco.core.records import MAX_RECORD_BYTES
from p2p_diloco.wire.traffic import Purpose

MAX_MESSAGE_BYTES = 256 * 1024
"""Of a message that has no larger bound of its own."""
MAX_FRAME_BYTES = 4 * 1024 * 1024
CHUNK_BYTES = 1024 * 1024
"""Updates, and whatever else is larger than a message, go in frames of this size; a snapshot's chunk is one."""

Sealed = Annotated[bytes, Field(max_length=MAX_RECORD_BYTES)]
Signature = Annotated[bytes, Field(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]
Reason = Annotated[str, Field(max_length=200)]


class Message(BaseModel):
    """One message of a stream; each kind is a class, and its fields are checked when it is parsed."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    tag: ClassVar[str]
    max_bytes: ClassVar[int] = MAX_MESSAGE_BYTES
    purpose: ClassVar[Purpose | None] = None
    """Of a stream that begins with this message; None for an answer."""
    bulk: ClassVar[bool] = False
    """A stream that begins with this message carries parts of a model, or as much: it goes through no relay."""
