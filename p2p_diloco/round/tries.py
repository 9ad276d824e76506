"""The streams that a member opens to another one in one matter: one and, where that closed at once, a second one.

A stream that closes before anything came over it happens to peers that are there (one whose stream came before the
roster, or a newcomer under load), and to who is dead no second one can be opened.
"""

from __future__ import annotations

import logging
from types import TracebackType

from p2p_diloco.core.errors import Gone
from p2p_diloco.round.meeting import Meeting
from p2p_diloco.wire.channel import Channel

log = logging.getLogger(__name__)

MAX_TRIES = 2
"""Streams of one member to another one, in one matter: one, and a second try."""


class Tries:
    """The tries of one member with another one. Each ``async with`` is one of them: its stream is open inside, and
    closed after it. An end of the stream that is worth another try is no exception outside, so in a ``while True`` the
    next one begins."""

    def __init__(self, meeting: Meeting, member: int) -> None:
        self.meeting = meeting
        self.member = member
        self.left = MAX_TRIES
        """So many have not begun."""
        self.channel: Channel
        """Of the try that has begun last."""

    @property
    def is_first(self) -> bool:
        """Returns whether none has begun yet."""
        return self.left == MAX_TRIES

    async def __aenter__(self) -> Channel:
        """Opens the stream of the next try."""
        self.left -= 1
        self.channel = await self.meeting.open(self.member)
        return self.channel

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Closes the stream, and returns whether another try follows."""
        self.channel.close()
        if not isinstance(error, Gone) or not self.left or not self.channel.is_fresh:
            return False
        step, who = self.meeting.group.step, error.peer_id[-8:]
        log.info("outer step %d: %s %s at once: tried again", step, who, error.reason)
        return True
