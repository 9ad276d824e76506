"""What comes to one reducer in a butterfly: the contributions of every other member to its parts, in order.

A sender may open a second stream where its first one has closed at once (``round.tries``). It begins with the first
part again, and what has come before is thrown away.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from p2p_diloco.core.codec import Vector
from p2p_diloco.core.errors import Gone, Misbehaved, RemoteError
from p2p_diloco.core.identity import SIGNATURE_BYTES
from p2p_diloco.core.patience import late_senders, spare_s
from p2p_diloco.core.signed_part import Contribution
from p2p_diloco.core.waiting import deadline, heard, now_s
from p2p_diloco.round.measured import Arrivals
from p2p_diloco.round.meeting import Meeting
from p2p_diloco.round.tries import MAX_TRIES
from p2p_diloco.wire.channel import Channel

log = logging.getLogger(__name__)

QUEUED_PARTS = 2
"""So many contributions of one sender a reducer holds decoded; then the sender waits. Those of a sender that is gone
are read and thrown away: it still gets the means."""


@dataclass(frozen=True, kw_only=True)
class Came:
    """A contribution that its reducer holds."""

    contribution: Contribution
    values: Vector
    """The same, decoded."""


@dataclass(kw_only=True, eq=False)
class Sender:
    """Says what has come from another member, and what is still awaited of it."""

    contributes: bool
    limit_s: float
    """How long it is waited for at a time."""
    patience_s: float
    """How long it is still waited for, in all."""
    longest_s: float = 0.0
    """The longest that it was waited for."""
    awaited: bool = True
    """Its stream has not come yet, or its second one is due."""
    opened: int = 0
    """How many streams it has opened to me."""
    live: int = 0
    """How many of them are being served."""
    taken: int = 0
    """How many contributions have come."""
    gone: bool = False
    """It failed."""
    arrivals: Arrivals | None = None
    """How fast its contributions come; None before it has opened a stream."""
    queue: asyncio.Queue[Came | None] = field(default_factory=lambda: asyncio.Queue(QUEUED_PARTS))
    """Its contributions that no mean has been taken of; None when there will be no more."""

    def ends(self) -> None:
        """Takes in that no more will come."""
        if self.queue.full():
            self.queue.get_nowait()
        self.queue.put_nowait(None)
        self.gone = True


class Intake:
    """Takes the contributions to the parts of this member, ``mine``, in one butterfly. ``reducers``: the members that
    reduce some of its parts."""

    def __init__(
        self, meeting: Meeting, number: int, members: Sequence[int], mine: Sequence[int], reducers: Sequence[int]
    ) -> None:
        self.meeting = meeting
        self.number = number
        self.mine = mine
        self.n_reducers = len(reducers)
        self.began_s = now_s()
        self.senders: dict[int, Sender] = {}
        """By their indices in the roster."""
        part_bytes = SIGNATURE_BYTES + max(map(meeting.grid.part_bytes, mine), default=0)
        reaching = meeting.group.reaching(meeting.me)
        for i in members:
            if i in reaching:
                streams = len(reducers) + (len(members) - 1 if i in reducers else 0)
                self.senders[i] = Sender(
                    contributes=not meeting.group.members[i].dropped,
                    limit_s=meeting.limit_s(i, streams * part_bytes),
                    patience_s=meeting.patience_s(i),
                )
        self.due = [i for i, sender in self.senders.items() if sender.contributes]
        """Those that contribute."""
        self.late = late_senders(meeting.group, self.due, meeting.lapsed)
        """Those of them that are waited for only a little longer than all others."""
        self.waited_s = 0.0
        """So long I have waited for those alone."""

    async def contributions_to(self, part: int) -> dict[int, Came]:
        """Returns what comes in time of the others' contributions to one of my parts. A sender may keep me waiting for
        ``Meeting.limit_s`` at a time, and in all for ``Meeting.patience_s`` longer than its bytes take at
        ``Timeouts.slow_rate_bytes_per_s``: else its reducers, which wait, were slow in everybody's eyes. Those in
        ``late`` are waited for when all others have come, for ``spare_s``."""
        prompt = [i for i in self.due if i not in self.late]
        limits_s = [min(self.senders[i].patience_s, self.senders[i].limit_s) for i in prompt]
        came = await asyncio.gather(*(self._next_contribution(i, part, wait_s) for i, wait_s in zip(prompt, limits_s)))
        others_s = now_s()
        left_s = spare_s(others_s - self.began_s, self.waited_s, self.meeting.timeouts.late_s)
        came += await asyncio.gather(*(self._next_contribution(i, part, left_s) for i in self.late))
        self.waited_s += now_s() - others_s
        return {i: one for i, one in zip((*prompt, *self.late), came) if one is not None}

    async def _next_contribution(self, index: int, part: int, limit_s: float) -> Came | None:
        """Returns a sender's next contribution, or None when the sender is gone, or is so now: nothing has come within
        ``limit_s``."""
        sender, meeting, began_s = self.senders[index], self.meeting, now_s()
        if sender.gone:
            return None
        came = None
        try:
            async with deadline(limit_s):
                came = sender.queue.get_nowait() if sender.queue.qsize() else await sender.queue.get()
            meeting.changed.ring()
        except asyncio.TimeoutError:
            late = meeting.group.members[index].peer_id[-8:]
            log.info("outer step %d: %s is late with part %d, waited %.2f s", meeting.group.step, late, part, limit_s)
        waited_s = now_s() - began_s
        sender.longest_s = max(sender.longest_s, waited_s)
        sent_meanwhile_bytes = self.n_reducers * meeting.grid.part_bytes(part)
        sender.patience_s += sent_meanwhile_bytes / meeting.timeouts.slow_rate_bytes_per_s - waited_s
        if came is None:
            sender.gone = True
            meeting.lose(index, None)
            meeting.changed.ring()
        return came

    def times_s(self) -> list[float]:
        """Returns the longest that I waited for each sender, ``Timeouts.part_s`` where that was in vain; none where I
        reduce nothing."""
        due, in_vain_s = [self.senders[i] for i in self.due], self.meeting.timeouts.part_s
        return [in_vain_s if sender.gone else sender.longest_s for sender in due] if self.mine else []

    def opens(self, channel: Channel, index: int) -> Sender:
        """Takes in that a sender has opened a stream to me, and returns what I know of it. It may open MAX_TRIES, also
        when the first one has not ended for me yet; Misbehaved for any more, or where it is not among the members.
        ``Sender.live`` is for the caller to lower when the stream has ended."""
        sender = self.senders.get(index)
        if sender is None or sender.opened == MAX_TRIES:
            raise Misbehaved(channel.peer_id, f"opens more than {MAX_TRIES} streams in a round")
        sender.awaited = False
        sender.opened += 1
        sender.live += 1
        self.meeting.changed.ring()
        return sender

    async def take(self, channel: Channel, index: int) -> None:
        """Takes what comes over one stream of a sender."""
        sender, meeting = self.senders[index], self.meeting
        if not sender.contributes:
            return
        arrivals = sender.arrivals = Arrivals()
        try:
            for at, part in enumerate(self.mine):
                came = await self._take_one(channel, part, arrivals)
                while sender.queue.full() and self._is_due(sender, at):
                    arrivals.held_back()
                    await meeting.changed.event.wait()
                if self._is_due(sender, at):
                    sender.taken += 1
                    sender.queue.put_nowait(came)
        except RemoteError as error:
            if isinstance(error, Misbehaved) or not await self._comes_again(sender, error):
                meeting.lose(index, error)
                sender.ends()
                meeting.changed.ring()

    def _is_due(self, sender: Sender, at: int) -> bool:
        """Returns whether a sender's contribution to one of my parts, by its place among these, has not come yet and
        still counts."""
        return sender.taken == at and not sender.gone and not self.meeting.over

    async def _comes_again(self, sender: Sender, error: RemoteError) -> bool:
        """Returns whether nothing is lost with a sender's stream that has failed: all has come, another one is there,
        or, where it closed before anything came over it, a second one comes within ``Timeouts.again_s``."""
        meeting = self.meeting
        if sender.live > 1 or sender.taken == len(self.mine):
            return True
        if sender.taken or sender.opened == MAX_TRIES or not isinstance(error, Gone):
            return False
        sender.awaited = True
        until_s = now_s() + meeting.timeouts.again_s
        while sender.awaited and not sender.gone and not meeting.over and now_s() < until_s:
            changed = meeting.changed.event
            await heard(changed, until_s - now_s())
        return not sender.awaited

    async def _take_one(self, channel: Channel, part: int, arrivals: Arrivals) -> Came:
        """Returns a sender's next contribution. Misbehaved unless it decodes, and its sender has signed it."""
        size = self.meeting.grid.part_bytes(part) + SIGNATURE_BYTES
        frame = await channel.receive_frame(size, self.meeting.timeouts.reduced_part_s)
        arrivals.came(len(frame), now_s())
        contribution = Contribution.from_frame(frame)
        try:
            values = self.meeting.grid.decode(part, contribution.data)
        except ValueError as error:
            raise Misbehaved(channel.peer_id, f"sends a contribution that does not decode: {error}") from error
        if not contribution.is_signed(self.meeting.place(self.number, part), channel.peer_id):
            raise Misbehaved(channel.peer_id, f"sends a contribution to part {part} that it did not sign")
        return Came(contribution=contribution, values=values)

    def cannot_come(self, index: int) -> None:
        """Takes in that a member is dead: unless it has opened a stream to me before, it does not come as a sender
        either."""
        sender = self.senders.get(index)
        if sender is not None and sender.awaited and sender.contributes:
            sender.ends()
            self.meeting.changed.ring()
