"""What a member answers to the others, whether they lead or not: to contributions, and to who asks for a part or a
commit.

Their words are checked here, before anything is done about them.
"""

from __future__ import annotations

import asyncio
from collections import Counter

from p2p_diloco.core.errors import Misbehaved
from p2p_diloco.core.waiting import heard, now_s
from p2p_diloco.round.settle_ballot import certifies
from p2p_diloco.round.settle_decide import answer_to_later_leader
from p2p_diloco.round.settle_eta import keep_waiting
from p2p_diloco.round.settle_member import Member
from p2p_diloco.wire.audit_messages import AskContributions
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.messages import No, Size
from p2p_diloco.wire.round_messages import AskPart


class MemberAnswers:
    """Serves the streams that others open to a member of their round."""

    def __init__(self, member: Member) -> None:
        self.member = member
        self.meeting = member.meeting
        self.group = member.group
        self.audits: Counter[int] = Counter()
        """Member -> how many parts it has asked me about."""

    async def on_contribute(self, channel: Channel, sender: int, number: int) -> None:
        """Serves a sender of butterfly ``number``. It may have heard of the butterfly a moment before me, so I wait for
        it for ``Timeouts.request_s``."""
        if number >= len(self.group.members):
            raise Misbehaved(channel.peer_id, f"contributes to butterfly {number} of a round")
        deadline_s = now_s() + self.meeting.timeouts.request_s
        while number not in self.member.butterflies:
            if self.meeting.over or now_s() >= deadline_s:
                await channel.send(No(reason="the round is over"))
                return
            await heard(self.meeting.changed.event, deadline_s - now_s())
        await self.member.butterflies[number].on_contribute(channel, sender)

    async def on_ask_part(self, channel: Channel, message: AskPart) -> None:
        """Gives a part to a member that misses it, if I hold exactly the one that it names."""
        part = self.meeting.parts[message.part] if message.part < len(self.meeting.parts) else None
        reduction = self.meeting.reductions[message.part] if part is not None else None
        if part is None or reduction is None or part.hash != message.hash:
            await channel.send(No(reason="not held"))
            return
        await channel.send(Size(size_bytes=len(part.data)))
        await self.meeting.send_part(channel, part, reduction)

    async def on_ask_contributions(self, channel: Channel, asker: int, message: AskContributions) -> None:
        """Shows a member the contributions to a part that I have reduced, as often as the run lets it audit a round,
        and while the round is among those that I still serve."""
        kept = self.meeting.kept
        if kept is None or self.audits[asker] >= self.meeting.audit_parts:
            await channel.send(No(reason="nothing more is shown"))
            return
        self.audits[asker] += 1
        packed = await asyncio.to_thread(kept.read, message.number, message.part)
        if packed is None:
            await channel.send(No(reason="nothing is kept"))
            return
        await channel.send_blob(packed)

    async def on_ask_commit(self, channel: Channel, asker: int) -> None:
        """Tells a later leader which commit I have signed, as soon as ``answer_to_later_leader`` has an answer. Until
        then it hears from time to time that I am still here."""
        if asker not in self.group.reducers:
            raise Misbehaved(channel.peer_id, "asks for a commit, and cannot lead")
        meeting, pledge, next_word_s = self.meeting, self.member.pledge, now_s()
        asker_place = self.group.leaders.index(asker)
        while True:
            changed = meeting.changed.event
            if pledge.settled is not None:
                await channel.send(pledge.settled.commit(meeting.me))
                await channel.send(certifies(pledge.settled.certificate))
                return
            answer = answer_to_later_leader(asker_place, place=self.member.place, taken=pledge.taken, over=meeting.over)
            if answer is not None:
                await channel.send(answer)
                return
            next_word_s = await keep_waiting(channel, changed, next_word_s, meeting.timeouts.heartbeat_s)
