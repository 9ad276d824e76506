"""What peers say to each other when one of them measures: whether it can be reached, how fast its connection is, and
what time it is."""

from __future__ import annotations

import ipaddress
from typing import Annotated

from pydantic import AfterValidator, Field

from p2p_diloco.wire.message import Message, Reason, Sealed

MAX_TRANSFER_BYTES = 2 * 1024 * 1024
"""In one direction, of one exchange that measures a connection."""


def check_ip(text: str) -> str:
    """Returns ``text`` if it is an IP address. Raises ValueError if not, or with a zone, whose name could be
    anything."""
    if "%" in text:
        raise ValueError("an address with a zone")
    ipaddress.ip_address(text)
    return text


IpAddress = Annotated[str, Field(max_length=45), AfterValidator(check_ip)]


class AskDialBack(Message):
    """Can you reach the peer that signed ``consent``, which listens where this stream comes from? Answered by
    DialedBack or No."""

    tag = "ask-dial-back"
    purpose = "other"
    consent: Sealed


class DialBack(Message):
    """You are the peer that I was asked to dial, and I have reached you. Not answered."""

    tag = "dial-back"
    purpose = "other"


class DialedBack(Message):
    """I could dial you back, or I could not."""

    tag = "dialed-back"
    reached: bool
    ip: IpAddress
    """Where the asking stream comes from, as I see it: the only address that I dial."""
    reason: Reason = ""
    """Why not reached."""


class AskTransfer(Message):
    """Let us measure a transfer: a frame of ``up_bytes`` follows. Answered by Transferred and a frame of
    ``down_bytes``, and another AskTransfer may follow; or by No."""

    tag = "ask-transfer"
    purpose = "other"
    bulk = True
    up_bytes: Annotated[int, Field(ge=0, le=MAX_TRANSFER_BYTES)]
    down_bytes: Annotated[int, Field(ge=0, le=MAX_TRANSFER_BYTES)]


class Transferred(Message):
    """I have your bytes, and mine follow in one frame."""

    tag = "transferred"
    wall_s: Annotated[float, Field(ge=0, le=1e11, allow_inf_nan=False)]
    """The answering peer's clock: Unix time."""
