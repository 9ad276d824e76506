"""Every message that there is, its schema, and the bytes of each; and those that answer anything.

Each topic has a file of messages. Rules of all of them: every list and every string is bounded; one class, one tag;
nothing is ever unpickled.
"""

from __future__ import annotations

import msgpack
from pydantic import ValidationError

from p2p_diloco.core.records import Natural, unpack_plain
from p2p_diloco.wire import (
    anchor_messages,
    audit_messages,
    probe_messages,
    proof_messages,
    round_messages,
    state_messages,
)
from p2p_diloco.wire.message import Message, Reason


class No(Message):
    """I refuse what you ask, for this reason. Answers any message that asks for something."""

    tag = "no"
    reason: Reason


class Size(Message):
    """I send you so many bytes, in the frames that follow."""

    tag = "size"
    size_bytes: Natural


TOPICS = (
    __name__,
    *(topic.__name__ for topic in (round_messages, audit_messages, state_messages, anchor_messages, proof_messages)),
    probe_messages.__name__,
)
"""The files that messages are in, in the order of docs/protocol.md."""
MESSAGES: dict[str, type[Message]] = {
    kind.tag: kind for kind in sorted(Message.__subclasses__(), key=lambda kind: TOPICS.index(kind.__module__))
}
"""Tag -> message, of every message there is, topic by topic."""


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
