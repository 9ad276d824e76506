"""One all-reduce: some parts of the vector, among some members of a round.

Every part has one reducer. A sender streams its contributions to a reducer's parts over one stream and reads the means
back on the same stream. The reducer decodes, checks, takes the mean by the run's rule (``core.aggregate``), encodes it
once and sends *these bytes* to everybody; it uses the decoded bytes itself.

A contribution goes through the codec even where sender and reducer are the same peer, so that the result does not
depend on who reduces what. Both are signed (``core.signed_part``): to sign a part takes 0.04 ms, to check one 0.14 ms.

A sender that fails is left out from that part on; a reducer that fails leaves holes. A stream that closes at once
(``Channel.is_fresh``) is tried a second time before that: it begins with the first part again, its reducer takes what
has not come yet, and means go over both. Nothing here raises for what another peer does: what is missing in the end is
seen when the round is settled, and another butterfly is run for it.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

from p2p_diloco.core.aggregate import norm_of
from p2p_diloco.core.codec import Vector
from p2p_diloco.core.errors import Gone, Misbehaved, RemoteError
from p2p_diloco.core.identity import SIGNATURE_BYTES
from p2p_diloco.core.patience import late_senders, spare_s
from p2p_diloco.core.signed_part import Contribution, Inputs, Place
from p2p_diloco.core.waiting import deadline, heard, now_s, run_all, run_beside
from p2p_diloco.round.measured import Arrivals
from p2p_diloco.round.meeting import Meeting
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.round_messages import Contribute

log = logging.getLogger(__name__)

QUEUED_PARTS = 2
"""So many contributions of one sender a reducer holds decoded; then the sender waits. Those of a sender that is gone
are read and thrown away: it still gets the means."""
MAX_TRIES = 2
"""Of one sender to one reducer in a butterfly: one, and a second try."""
IN_TIME_SHARE = 0.5
"""Of ``Timeouts.part_s``: a contribution that is handed over so soon after the butterfly began is in time for every
reducer that heard of the round when I did."""


@dataclass(frozen=True, kw_only=True)
class Came:
    """A contribution that its reducer holds."""

    contribution: Contribution
    values: Vector
    """The same, decoded."""


class Butterfly:
    """One all-reduce at one member. ``number``: 0 for the one that a round begins with, over all parts and members;
    rising for those that follow."""

    def __init__(self, meeting: Meeting, number: int, members: Sequence[int], parts: Sequence[int]) -> None:
        self.meeting = meeting
        self.number = number
        self.me = meeting.me
        self.members = members
        self.shares = meeting.group.shares_among(members, parts)
        """Who reduces -> its parts; none, where it is slow."""
        self.reducers = [reducer for reducer, share in self.shares.items() if share]
        """Those that have parts to reduce."""
        self.parts = parts
        self.began_s = now_s()
        others = [i for i in members if i in meeting.group.reaching(self.me)]
        self.waiting = set(others)
        """Members whose stream has not come yet, or whose second one is due."""
        self.opened = dict.fromkeys(others, 0)
        """Sender -> how many streams it has opened to me."""
        self.live = dict.fromkeys(others, 0)
        """Sender -> how many of them are being served."""
        self.queues: dict[int, asyncio.Queue[Came | None]] = {
            i: asyncio.Queue(QUEUED_PARTS) for i in others if not meeting.group.members[i].dropped
        }
        """Reducer only: sender -> its contributions to my parts, in order; None when there will be no more."""
        self.taken = dict.fromkeys(self.queues, 0)
        """Reducer only: sender -> how many contributions have come from it."""
        self.late = late_senders(meeting.group, self.queues, meeting.lapsed)
        """Reducer only: senders that are waited for only a little longer than all others."""
        self.waited_s = 0.0
        """Reducer only: so long I have waited for those alone."""
        self.patience_s = {i: meeting.patience_s(i) for i in self.queues}
        """Reducer only: how long a sender is still waited for, in all."""
        self.gone: set[int] = set()
        """Reducer only: senders that failed."""
        self.arrivals: dict[int, Arrivals] = {}
        """Reducer only: sender -> how fast its contributions come."""

    async def run(self) -> None:
        """Reduces my parts, and exchanges contributions for means with every other reducer that I reach."""
        await run_all(self._reduce(), *(self._contribute(reducer) for reducer in self._called()))

    def owing(self) -> list[int]:
        """Returns the reducers whose means have not all come."""
        return [i for i in self._called() if any(self.meeting.parts[part] is None for part in self._parts_of(i))]

    def _called(self) -> list[int]:
        """Returns the other reducers that I reach: what I contribute is in their parts alone."""
        return [i for i in self.reducers if i in self.meeting.group.reached_by(self.me)]

    def _parts_of(self, reducer: int) -> list[int]:
        """Returns the parts of one reducer; none of who is none, or reduces nothing."""
        return self.shares.get(reducer, [])

    def reducer_of(self) -> dict[int, int]:
        """Returns the reducer of each of the parts."""
        return {part: reducer for reducer, share in self.shares.items() for part in share}

    def uplinks(self) -> dict[int, int]:
        """Returns the uplinks of the members whose contributions have come to me, in bytes/s, as far as enough has. A
        sender sends each reducer its contributions, and, if it reduces, everybody its means."""
        sizes = {i: sum(map(self.meeting.grid.part_bytes, share)) for i, share in self.shares.items()}
        measured = {}
        for sender, arrivals in self.arrivals.items():
            group = self.meeting.group
            contributions = [size for reducer, size in sizes.items() if reducer in group.reached_by(sender)]
            means = [sizes.get(sender, 0)] * len(group.reaching(sender).intersection(self.members))
            uplink = arrivals.uplink(sizes[self.me], contributions + means)
            if uplink is not None:
                measured[sender] = uplink
        return measured

    def place(self, part: int) -> Place:
        """Returns what names one of the parts in what is signed."""
        return Place(round_id=self.meeting.group.round_id, number=self.number, part=part)

    # -- as a sender -------------------------------------------------------------------------------------------------

    async def _contribute(self, reducer: int) -> None:
        """Sends my contributions to one reducer's parts, and takes the means. A stream that closes at once is tried a
        second time; what goes over that one does not count as delivered in time, for the reducer may have given me
        up."""
        parts, meeting = self._parts_of(reducer), self.meeting
        in_time_s = self.began_s + meeting.timeouts.part_s * IN_TIME_SHARE
        try:
            for tries_left, until_s in ((1, in_time_s), (0, -math.inf)):
                channel = await meeting.open(reducer)
                try:
                    await channel.send(Contribute(round_id=meeting.group.round_id, number=self.number))
                    sending = self._send_contributions(channel, parts, until_s)
                    await run_beside(self._receive_means(channel, parts), sending)
                    return
                except Gone as error:
                    if not (tries_left and meeting.tries_again(channel, error)):
                        raise
                    meeting.delivered.difference_update((self.number, part) for part in parts)
                finally:
                    channel.close()
        except RemoteError as error:
            meeting.lose(reducer, error)
            if isinstance(error, Gone) and reducer in self.waiting and reducer in self.queues:
                self._hear_no_more(reducer)  # who is dead does not come as a sender either

    async def _send_contributions(self, channel: Channel, parts: list[int], in_time_s: float) -> None:
        """Sends my contributions; those that are left when all means have come are in none of these. What is handed
        over before ``in_time_s`` counts as delivered in time."""
        if self.meeting.group.members[self.me].dropped:
            return
        for part in parts:
            contribution = self.meeting.signed_contribution(self.place(part))
            await channel.send_frame(contribution.data, contribution.signature)
            if now_s() < in_time_s:
                self.meeting.delivered.add((self.number, part))

    async def _receive_means(self, channel: Channel, parts: list[int]) -> None:
        meeting = self.meeting
        for part in parts:
            received, reduction = await meeting.receive_part(channel, part, meeting.timeouts.reduced_part_s)
            mine = reduction.number == self.number and reduction.reducer == meeting.index_of(channel.peer_id)
            if not mine and reduction.number <= self.number:  # else it has been reduced again meanwhile
                raise Misbehaved(channel.peer_id, f"sends part {part} of another reducer")
            if objection := meeting.objection(part, received, reduction):
                raise Misbehaved(channel.peer_id, f"sends {objection}")
            if meeting.takes(part, received, reduction):
                meeting.hold_reduced(part, received, reduction)

    # -- as a reducer ------------------------------------------------------------------------------------------------

    async def _reduce(self) -> None:
        """Takes the mean of my parts, one after another, with the contributions that come in time."""
        meeting, group = self.meeting, self.meeting.group
        for part in self._parts_of(self.me):
            came = await self._contributions_to(part)
            if not group.members[self.me].dropped:
                mine = meeting.signed_contribution(self.place(part))
                came[self.me] = Came(contribution=mine, values=meeting.grid.decode(part, mine.data))
            values = {sender: one.values for sender, one in came.items()}
            reduced = group.aggregation.reduce(values, group.weights, part, meeting.grid, group.total_weight)
            meeting.norms[part] = norm_of(meeting.grid.decode(part, reduced.data))
            contributions = {sender: one.contribution for sender, one in came.items()}
            meeting.hold_own(self.place(part), reduced, Inputs.of(contributions))
            if meeting.kept is not None and meeting.kept.hold(self.number, part, contributions):
                await asyncio.to_thread(meeting.kept.spill)

    async def _contributions_to(self, part: int) -> dict[int, Came]:
        """Returns what comes in time of the others' contributions to one of my parts. A sender may keep me waiting for
        ``Timeouts.part_s`` at a time (a quarter of it, when I lost it in an earlier round), and in all for not much
        longer than its bytes take at ``Timeouts.slow_rate_bytes_per_s``: else its reducers, which wait, were slow in
        everybody's eyes. Those in ``late`` are waited for when all others have come, for ``spare_s``."""
        prompt = [sender for sender in self.queues if sender not in self.late]
        limits_s = [min(self.patience_s[sender], self.meeting.patience_s(sender)) for sender in prompt]
        came = await asyncio.gather(*(self._next_contribution(i, part, wait_s) for i, wait_s in zip(prompt, limits_s)))
        others_s = now_s()
        left_s = spare_s(others_s - self.began_s, self.waited_s, self.meeting.timeouts.late_s)
        came += await asyncio.gather(*(self._next_contribution(i, part, left_s) for i in self.late))
        self.waited_s += now_s() - others_s
        return {sender: one for sender, one in zip((*prompt, *self.late), came) if one is not None}

    async def _next_contribution(self, sender: int, part: int, limit_s: float) -> Came | None:
        """Returns a sender's next contribution, or None when the sender is gone, or is so now: nothing has come within
        ``limit_s``."""
        if sender in self.gone:
            return None
        queue, meeting, began_s = self.queues[sender], self.meeting, now_s()
        came = None
        try:
            async with deadline(limit_s):
                came = queue.get_nowait() if queue.qsize() else await queue.get()
            meeting.changed.ring()
        except asyncio.TimeoutError:
            late = meeting.group.members[sender].peer_id[-8:]
            log.info("outer step %d: %s is late with part %d, waited %.2f s", meeting.group.step, late, part, limit_s)
        sent_meanwhile_bytes = len(self.reducers) * meeting.grid.part_bytes(part)
        self.patience_s[sender] += sent_meanwhile_bytes / meeting.timeouts.slow_rate_bytes_per_s - (now_s() - began_s)
        if came is None:
            self.gone.add(sender)
            meeting.lose(sender, None)
            meeting.changed.ring()
        return came

    async def on_contribute(self, channel: Channel, sender: int) -> None:
        """Serves a member's stream to me as a reducer: contributions come, means go. It may open MAX_TRIES, also when
        the first one has not ended for me yet."""
        if self.opened.get(sender, MAX_TRIES) == MAX_TRIES:
            raise Misbehaved(channel.peer_id, f"opens more than {MAX_TRIES} streams in a round")
        self.waiting.discard(sender)
        self.opened[sender] += 1
        self.live[sender] += 1
        self.meeting.changed.ring()
        mine = self._parts_of(self.me)
        try:
            await run_all(self._take_contributions(channel, sender, mine), self._send_means(channel, mine))
        finally:
            self.live[sender] -= 1

    async def _take_contributions(self, channel: Channel, sender: int, parts: list[int]) -> None:
        queue, meeting = self.queues.get(sender), self.meeting
        if queue is None:
            return
        arrivals = self.arrivals[sender] = Arrivals()
        try:
            for index, part in enumerate(parts):
                came = await self._take_contribution(channel, part, arrivals)
                while queue.full() and self._is_due(sender, index):
                    arrivals.held_back()
                    await meeting.changed.event.wait()
                if self._is_due(sender, index):
                    self.taken[sender] += 1
                    queue.put_nowait(came)
        except RemoteError as error:
            if isinstance(error, Misbehaved) or not await self._comes_again(sender, error):
                meeting.lose(sender, error)
                self._hear_no_more(sender)

    def _is_due(self, sender: int, index: int) -> bool:
        """Returns whether a sender's contribution to one of my parts, by its index among these, has not come yet and
        still counts."""
        return self.taken[sender] == index and sender not in self.gone and not self.meeting.over

    async def _comes_again(self, sender: int, error: RemoteError) -> bool:
        """Returns whether nothing is lost with a sender's stream that has failed: all has come, another one is there,
        or, where it closed before anything came over it, a second one comes within ``Timeouts.again_s``."""
        meeting = self.meeting
        if self.live[sender] > 1 or self.taken[sender] == len(self._parts_of(self.me)):
            return True
        if self.taken[sender] or self.opened[sender] == MAX_TRIES or not isinstance(error, Gone):
            return False
        self.waiting.add(sender)
        until_s = now_s() + meeting.timeouts.again_s
        while sender in self.waiting - self.gone and not meeting.over and now_s() < until_s:
            changed = meeting.changed.event
            await heard(changed, until_s - now_s())
        return sender not in self.waiting

    async def _take_contribution(self, channel: Channel, part: int, arrivals: Arrivals) -> Came:
        """Returns a sender's next contribution. Misbehaved unless it decodes, and its sender has signed it."""
        size = self.meeting.grid.part_bytes(part) + SIGNATURE_BYTES
        frame = await channel.receive_frame(size, self.meeting.timeouts.reduced_part_s)
        arrivals.came(len(frame), now_s())
        contribution = Contribution.from_frame(frame)
        try:
            values = self.meeting.grid.decode(part, contribution.data)
        except ValueError as error:
            raise Misbehaved(channel.peer_id, f"sends a contribution that does not decode: {error}") from error
        if not contribution.is_signed(self.place(part), channel.peer_id):
            raise Misbehaved(channel.peer_id, f"sends a contribution to part {part} that it did not sign")
        return Came(contribution=contribution, values=values)

    async def _send_means(self, channel: Channel, parts: list[int]) -> None:
        for part in parts:
            while True:
                changed = self.meeting.changed.event
                reduced, reduction = self.meeting.parts[part], self.meeting.reductions[part]
                if reduced is not None and reduction is not None:
                    break
                if self.meeting.over:
                    return
                await changed.wait()
            await self.meeting.send_part(channel, reduced, reduction)

    def _hear_no_more(self, sender: int) -> None:
        """Waits for a sender no more."""
        queue = self.queues[sender]
        if queue.full():
            queue.get_nowait()
        queue.put_nowait(None)
        self.gone.add(sender)
        self.meeting.changed.ring()
