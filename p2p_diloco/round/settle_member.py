"""One member of a round: it reduces, gives its receipt to a leader, and takes the commit that the leader gives it.

A member holds to one leader at a time, in the order of ``Group.leaders``, and never goes back to one that it has given
up. It signs one commit in a round, and only when it holds all of its parts. When a later leader asks, the member tells
the commit that it has signed, or denies it as soon as it has given up all leaders before that one. It applies what is
certified, whether it has signed that or not.

What it does, and what it says to a leader, is here. Each word of the leader is checked before anything is done about
it: Again and Commit in ``_ask_commit``, Certifies in ``Pledge.certify``. What the member answers to others is in
``settle_member_answers``.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TypeVar

from p2p_diloco.core.errors import Misbehaved, Refused, RemoteError, Silent
from p2p_diloco.core.waiting import deadline, now_s
from p2p_diloco.round.butterfly import Butterfly
from p2p_diloco.round.meeting import Meeting
from p2p_diloco.round.outcome import NOT_WITNESSED, Missed, Settled
from p2p_diloco.round.settle_completion import COULD_NOT_FETCH, Completion
from p2p_diloco.round.settle_decide import again_fits, commit_fits, promises_s
from p2p_diloco.round.settle_eta import beyond_etas, telling
from p2p_diloco.round.settle_pledge import Pledge
from p2p_diloco.round.tries import Tries
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.message import Message
from p2p_diloco.wire.messages import No
from p2p_diloco.wire.round_messages import Again, Certifies, Commit, Eta, Receipt

log = logging.getLogger(__name__)
M = TypeVar("M", bound=Message)


class Member:
    """Makes one member's part of a round. It holds what this peer has reduced, and which leader it follows."""

    def __init__(self, meeting: Meeting) -> None:
        self.meeting = meeting
        self.group = meeting.group
        self.completion = Completion(meeting)
        self.pledge = Pledge(meeting, self.completion)
        members, parts = range(len(self.group.members)), range(len(meeting.parts))
        self.butterflies = {0: Butterfly(meeting, 0, members, parts)}
        """Number -> the butterfly. 0 is the round's own; a leader begins the others."""
        self.place = 0
        """Of the leader that I hold to, in the order of leaders: I have given up those before it."""
        limit_s = meeting.timeouts.round_limit_s(2 * meeting.grid.vector_bytes)
        self.reduced_s = 0.0
        """So long I have reduced, in all butterflies."""
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
            self.meeting.forget(part)
        butterfly = Butterfly(self.meeting, again.number, again.members, again.parts)
        self.butterflies[again.number] = butterfly
        self.meeting.changed.ring()
        await self._run(butterfly)

    def reducers(self) -> list[int]:
        """Returns who has reduced each part, as far as I know."""
        last: dict[int, int] = {}
        for number in sorted(self.butterflies):
            last |= self.butterflies[number].reducer_of()
        return [last[part] for part in range(len(self.meeting.parts))]

    async def _run(self, butterfly: Butterfly) -> None:
        """Runs a butterfly for at most half of the time that the round has left. Reducers that owe parts then are given
        up; the other half of the time is enough to do without them."""
        began_s = now_s()
        try:
            async with deadline(self.left_s() / 2):
                await butterfly.run()
        except asyncio.TimeoutError:
            for reducer in butterfly.owing():
                self.meeting.lose(reducer, None)
        self.reduced_s += now_s() - began_s

    # -- with a leader -----------------------------------------------------------------------------------------------

    async def follow(self, leader: int) -> Settled | Missed | None:
        """Gives my receipt to a leader, signs its commit, and returns the update with its certificate. None when the
        leader fails me before that, or most do not sign: the next one leads. A stream that closes at once is tried a
        second time."""
        tries = Tries(self.meeting, leader)
        try:
            while True:
                async with tries as channel:
                    commit = await self._ask_commit(channel, leader)
                    if isinstance(commit, No):
                        return Missed(reason="failed", detail=commit.reason)
                    return await self._take(channel, commit, leader)
        except RemoteError as error:
            self.meeting.lose(leader, error)
        return None

    async def _ask_commit(self, channel: Channel, leader: int) -> Commit | No:
        """Returns a leader's last word, after as many butterflies as it asks for. Misbehaved when a word of it does not
        fit the round."""
        meeting, group_size, number = self.meeting, len(self.group.members), max(self.butterflies)
        while True:
            hashes, round_id = meeting.hashes(), self.group.round_id
            await channel.send(Receipt(round_id=round_id, number=number, part_hashes=hashes, state=meeting.state))
            answer: Again | Commit | No = await self._hear(channel, leader, Again, Commit)
            if isinstance(answer, Again):
                newest, n_parts = max(self.butterflies), len(meeting.parts)
                if not again_fits(answer, me=meeting.me, newest=newest, group_size=group_size, n_parts=n_parts):
                    raise Misbehaved(channel.peer_id, "asks to reduce again what does not fit the round")
                await self.reduce_again(answer)
                number = answer.number
                continue
            if isinstance(answer, Commit) and not commit_fits(
                answer, group_size=group_size, n_parts=len(meeting.parts)
            ):
                raise Misbehaved(channel.peer_id, "sends a commit that does not fit the round")
            return answer

    async def _hear(self, channel: Channel, leader: int, *kinds: type[M]) -> M | No:
        """Returns a leader's next word but any Eta. Silent when none comes for ``Timeouts.request_s``, or only promises
        do for ``promises_s``."""
        timeouts, credit_s = self.meeting.timeouts, self.meeting.credit_s(leader)
        request_s = timeouts.request_s
        longest_s = promises_s(self.left_s(), reduced_s=self.reduced_s, credit_s=credit_s, timeouts=timeouts)
        try:
            async with deadline(longest_s):
                word: Eta | M | No = await channel.receive(Eta, *kinds, No, timeout_s=request_s)
                return await beyond_etas(channel, word, *kinds, No, timeout_s=request_s)
        except asyncio.TimeoutError:
            raise Silent(channel.peer_id, "promises a word, and does not come to it") from None

    # -- with a commit -----------------------------------------------------------------------------------------------

    async def _take(self, channel: Channel, commit: Commit, leader: int) -> Settled | Missed:
        """Fetches what I miss of a commit, signs it if I may, and waits until it is certified. Refused when it is
        not, whether I have signed it or not: the next leader may do better, and all members think the same of this one.
        It is not to blame, for a reducer may have sent it something else."""
        objection = self.pledge.objection(commit)
        every_s = self.meeting.timeouts.heartbeat_s
        update = None if objection else await telling(channel, self.completion.complete(commit, leader), every_s)
        if update is None and not objection:
            await channel.send(No(reason="parts of it do not come"))
            return Missed(reason="behind", detail=COULD_NOT_FETCH)
        word = No(reason=objection) if objection else self.pledge.sign(commit)
        await channel.send(word)
        answer = await self._hear(channel, leader, Certifies)
        if isinstance(answer, No):
            self.meeting.uncertified = "witness" if answer.reason == NOT_WITNESSED else "signatures"
            why = word.reason if isinstance(word, No) else answer.reason
            raise Refused(channel.peer_id, f"commits what most do not sign: {why}")
        return await self.pledge.certify(commit, answer, leader)
