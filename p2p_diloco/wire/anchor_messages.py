"""What peers say to each other about the anchors of the run's owner."""

from __future__ import annotations

from typing import Annotated

from pydantic import FailFast, Field

from p2p_diloco.core.anchor import MAX_ANCHOR_BYTES
from p2p_diloco.core.records import Natural
from p2p_diloco.wire.message import Message

ANCHORS_SENT = 256
"""In one answer, at most."""


class AskAnchors(Message):
    """Asks for the anchors that a peer goes by whose number is larger than ``since``. Answered by AnchorList."""

    tag = "ask-anchors"
    purpose = "other"
    since: Natural


class AnchorList(Message):
    """Lists the anchors that a peer goes by, the oldest first, as many as there is room for; none where there is none.
    Whoever gets ANCHORS_SENT asks for more."""

    tag = "anchors"
    anchors: Annotated[
        list[Annotated[bytes, Field(max_length=MAX_ANCHOR_BYTES)]], FailFast(), Field(max_length=ANCHORS_SENT)
    ]
