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
import math
from collections.abc import Sequence

from p2p_diloco.core.aggregate import norm_of
from p2p_diloco.core.errors import Gone, Misbehaved, RemoteError
from p2p_diloco.core.signed_part import Inputs, Place
from p2p_diloco.core.waiting import now_s, run_all, run_beside
from p2p_diloco.round.intake import Came, Intake
from p2p_diloco.round.meeting import Meeting
from p2p_diloco.round.tries import Tries
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.round_messages import Contribute

IN_TIME_SHARE = 0.5
"""Of ``Timeouts.least_wait_s``: a contribution that is handed over so soon after the butterfly began is in time for
every reducer that heard of the round when I did."""


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
        self.intake = Intake(meeting, number, members, self._parts_of(self.me), self.reducers)

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
        group = self.meeting.group
        for index, sender in self.intake.senders.items():
            contributions = [size for reducer, size in sizes.items() if reducer in group.reached_by(index)]
            means = [sizes.get(index, 0)] * len(group.reaching(index).intersection(self.members))
            if sender.arrivals is not None:
                uplink = sender.arrivals.uplink(sizes[self.me], contributions + means)
                if uplink is not None:
                    measured[index] = uplink
        return measured

    def place(self, part: int) -> Place:
        """Returns what names one of the parts in what is signed."""
        return self.meeting.place(self.number, part)

    # -- as a sender -------------------------------------------------------------------------------------------------

    async def _contribute(self, reducer: int) -> None:
        """Sends my contributions to one reducer's parts, and takes the means. A stream that closes at once is tried a
        second time; what goes over that one does not count as delivered in time, for the reducer may have given me
        up."""
        parts, meeting = self._parts_of(reducer), self.meeting
        tries = Tries(meeting, reducer)
        try:
            while True:
                until_s = self.began_s + meeting.timeouts.least_wait_s * IN_TIME_SHARE if tries.is_first else -math.inf
                meeting.delivered.difference_update((self.number, part) for part in parts)
                async with tries as channel:
                    await channel.send(Contribute(round_id=meeting.group.round_id, number=self.number))
                    sending = self._send_contributions(channel, parts, until_s)
                    await run_beside(self._receive_means(channel, parts), sending)
                    return
        except RemoteError as error:
            meeting.lose(reducer, error)
            if isinstance(error, Gone):
                self.intake.cannot_come(reducer)

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
            came = await self.intake.contributions_to(part)
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

    async def on_contribute(self, channel: Channel, index: int) -> None:
        """Serves a member's stream to me as a reducer: contributions come, means go."""
        sender = self.intake.opens(channel, index)
        try:
            await run_all(self.intake.take(channel, index), self._send_means(channel, self._parts_of(self.me)))
        finally:
            sender.live -= 1

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
