"""One member of a round: it reduces, gives its receipt to a leader, takes one commit, and fetches what it misses.

A member holds to one leader at a time, in the order of ``Group.reducers``, and never goes back to one that it has given
up. It takes one commit in a round. When a later leader asks for it, the member tells the commit that it has taken, or
denies it as soon as it has given up all leaders before that one.

What it says and answers is here; whether a word fits the round is decided in ``settle_decide``.
"""

from __future__ import annotations

import asyncio
import logging

from p2p_diloco.core.errors import Misbehaved, RemoteError, Silent
from p2p_diloco.core.update import Update
from p2p_diloco.core.waiting import deadline, heard, now_s
from p2p_diloco.round.butterfly import Butterfly, run_all
from p2p_diloco.round.meeting import Meeting
from p2p_diloco.round.missed import Missed
from p2p_diloco.round.settle_decide import Decision, again_fits, answer_to_later_leader, commit_fits
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.messages import Again, AskPart, Commit, Eta, No, Receipt, Size, Took

log = logging.getLogger(__name__)

LEADERS_SHARE = 0.75
"""Of the time that a round has left, for one decision: the leader may reduce for half of that, and then it collects."""


class Member:
    """Makes one member's part of a round. It holds what this peer has reduced, which leader it follows, and which
    commit it has taken."""

    def __init__(self, meeting: Meeting) -> None:
        self.meeting = meeting
        self.group = meeting.group
        members, parts = range(len(self.group.members)), range(len(meeting.parts))
        self.butterflies = {0: Butterfly(meeting, 0, members, parts)}
        """Number -> the butterfly. 0 is the round's own; a leader begins the others."""
        self.place = 0
        """Of the leader that I hold to, in the order of leaders: I have given up those before it."""
        self.taken: Commit | None = None
        """The commit that I have taken or, as the leader, given. There is never another one in this round."""
        limit_s = meeting.timeouts.round_limit_s(2 * meeting.grid.vector_bytes)
        self.started_s = now_s()
        self.ends_s = self.started_s + limit_s
        """The deadline of the whole round, reduce and settle together."""

    def left_s(self) -> float:
        """Returns the seconds until the round must have ended."""
        return self.ends_s - now_s()

    # -- butterflies -------------------------------------------------------------------------------------------------

    async def reduce(self) -> None:
        """Runs the round's own butterfly. It ends in time, whatever others do; parts may be missing then."""
        await self._run(self.butterflies[0])

    async def reduce_again(self, again: Again) -> None:
        """Runs another butterfly, as a leader wants it. What I hold of its parts is forgotten, for it is refused."""
        log.info("outer step %d: %d parts are reduced again", self.group.step, len(again.parts))
        for part in again.parts:
            self.meeting.parts[part] = None
        butterfly = Butterfly(self.meeting, again.number, again.members, again.parts)
        self.butterflies[again.number] = butterfly
        self.meeting.changed.ring()
        await self._run(butterfly)

    async def _run(self, butterfly: Butterfly) -> None:
        """Runs a butterfly for at most half of the time that the round has left. Reducers that owe parts then are given
        up; the other half of the time is enough to do without them."""
        try:
            async with deadline(self.left_s() / 2):
                await butterfly.run()
        except asyncio.TimeoutError:
            for reducer in butterfly.owing():
                self.meeting.lose(reducer, None)

    # -- with a leader -----------------------------------------------------------------------------------------------

    async def follow(self, leader: int) -> Update | Missed | None:
        """Gives my receipt to a leader, takes its commit, and returns the update. None when the leader fails me before
        that: the next one leads."""
        meeting = self.meeting
        try:
            channel = await meeting.open(leader)
            try:
                commit = await self._ask_commit(channel)
                if isinstance(commit, No):
                    return Missed(reason="failed", detail=commit.reason)
                self.taken = commit
                await channel.send(Took())
            finally:
                channel.close()
        except RemoteError as error:
            meeting.lose(leader, error)
            if self.taken is None:
                return None
        return await self.complete(self.taken, leader)

    async def _ask_commit(self, channel: Channel) -> Commit | No:
        """Returns a leader's last word, after as many butterflies as it asks for. Misbehaved when a word of it does not
        fit the round."""
        meeting, group_size, number = self.meeting, len(self.group.members), max(self.butterflies)
        while True:
            receipt = Receipt(round_id=self.group.round_id, number=number, part_hashes=meeting.hashes())
            answer = await self._hear_decision(channel, receipt)
            if isinstance(answer, Again):
                newest, n_parts = max(self.butterflies), len(meeting.parts)
                if not again_fits(answer, me=self.group.me, newest=newest, group_size=group_size, n_parts=n_parts):
                    raise Misbehaved(channel.peer_id, "asks to reduce again what does not fit the round")
                await self.reduce_again(answer)
                number = answer.number
                continue
            if isinstance(answer, Commit) and not commit_fits(
                answer, group_size=group_size, n_parts=len(meeting.parts)
            ):
                raise Misbehaved(channel.peer_id, "sends a commit that does not fit the round")
            return answer

    async def _hear_decision(self, channel: Channel, receipt: Receipt) -> Decision:
        """Returns what a leader decides about a receipt. Silent when no word comes for ``Timeouts.request_s``, or only
        promises do for LEADERS_SHARE of the time that the round has left."""
        try:
            async with deadline(self.left_s() * LEADERS_SHARE):
                answer: Eta | Decision = await channel.request(receipt, Eta, Again, Commit, No)
                while isinstance(answer, Eta):
                    answer = await channel.receive(Eta, Again, Commit, No, timeout_s=self.meeting.timeouts.request_s)
                return answer
        except asyncio.TimeoutError:
            raise Silent(channel.peer_id, "promises a decision, and does not come to one") from None

    # -- with a commit -----------------------------------------------------------------------------------------------

    async def complete(self, commit: Commit, leader: int) -> Update | Missed:
        """Returns the update of a commit that I have taken, after fetching the parts that I do not hold."""
        await self.fetch_missing(commit, leader)
        held = [part for part in self.meeting.parts if part is not None]
        if [part.hash for part in held] != commit.part_hashes:
            return Missed(reason="behind", detail="the round committed, but parts of the update could not be fetched")
        return Update(header=self.group.header(commit.part_hashes), parts=tuple(held))

    async def fetch_missing(self, commit: Commit, leader: int) -> None:
        """Fetches the parts of a commit that I do not hold, first from the holders that it names, and what fails there
        from the leader; one stream at a time to each."""
        for sources in (commit.holders, [leader] * len(commit.holders)):
            wanted_from: dict[int, list[int]] = {}
            for part, (held, wanted) in enumerate(zip(self.meeting.parts, commit.part_hashes)):
                if held is None or held.hash != wanted:
                    self.meeting.parts[part] = None
                    if wanted not in self.meeting.refused:
                        wanted_from.setdefault(sources[part], []).append(part)
            others = [i for i in wanted_from if i != self.group.me]
            await run_all(*(self._fetch(commit, source, wanted_from[source]) for source in others))

    async def _fetch(self, commit: Commit, source: int, parts: list[int]) -> None:
        """Fetches some parts of a commit from one member, which is lost when it fails or sends other bytes. It is not
        to blame for a part that I refuse: it may have taken it in good faith."""
        meeting = self.meeting
        try:
            for part in parts:
                channel = await meeting.open(source)
                try:
                    wanted = commit.part_hashes[part]
                    await channel.request(AskPart(round_id=self.group.round_id, part=part, hash=wanted), Size)
                    received = await meeting.receive_part(channel, part, meeting.timeouts.request_s)
                finally:
                    channel.close()
                if received.hash != wanted:
                    raise Misbehaved(channel.peer_id, f"sends other bytes for part {part} than it said that it holds")
                if objection := meeting.objection(part):
                    log.warning("outer step %d: the group holds what I refuse: %s", self.group.step, objection)
                    meeting.refused.add(wanted)
                    continue
                meeting.hold(part, received)
        except RemoteError as error:
            meeting.lose(source, error)

    # -- asked by others ---------------------------------------------------------------------------------------------

    async def on_contribute(self, channel: Channel, sender: int, number: int) -> None:
        """Serves a sender of butterfly ``number``. It may have heard of the butterfly a moment before me, so I wait for
        it for ``Timeouts.request_s``."""
        if number >= len(self.group.members):
            raise Misbehaved(channel.peer_id, f"contributes to butterfly {number} of a round")
        deadline_s = now_s() + self.meeting.timeouts.request_s
        while number not in self.butterflies:
            if self.meeting.over or now_s() >= deadline_s:
                await channel.send(No(reason="the round is over"))
                return
            await heard(self.meeting.changed.event, deadline_s - now_s())
        await self.butterflies[number].on_contribute(channel, sender)

    async def on_ask_part(self, channel: Channel, message: AskPart) -> None:
        """Gives a part to a member that misses it, if I hold exactly the one that it names."""
        part = self.meeting.parts[message.part] if message.part < len(self.meeting.parts) else None
        if part is None or part.hash != message.hash:
            await channel.send(No(reason="not held"))
            return
        await channel.send(Size(size_bytes=len(part.data)))
        await self.meeting.send_part(channel, part)

    async def on_ask_commit(self, channel: Channel, asker: int) -> None:
        """Tells a later leader which commit I have taken, as soon as ``answer_to_later_leader`` has an answer. Until
        then it hears from time to time that I am still here."""
        if asker not in self.group.reducers:
            raise Misbehaved(channel.peer_id, "asks for a commit, and cannot lead")
        meeting, next_word_s = self.meeting, now_s()
        asker_place = self.group.reducers.index(asker)
        while True:
            changed = meeting.changed.event
            answer = answer_to_later_leader(asker_place, place=self.place, taken=self.taken, over=meeting.over)
            if answer is not None:
                await channel.send(answer)
                return
            next_word_s = await self.keep_waiting(channel, changed, next_word_s)

    async def keep_waiting(self, channel: Channel, changed: asyncio.Event, next_word_s: float) -> float:
        """Waits until something has changed, or until ``next_word_s`` on the loop's clock: then tells the peer
        that waits for an answer that I am still here. Returns when the next such word is due."""
        await heard(changed, max(next_word_s - now_s(), 0.0))
        if now_s() < next_word_s:
            return next_word_s
        every_s = self.meeting.timeouts.heartbeat_s
        await channel.send(Eta(eta_s=every_s))
        return now_s() + every_s
