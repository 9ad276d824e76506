"""The leader of a round: it collects receipts, decides on the update, and gives the commit to everybody.

A peer leads when it has given up all leaders before it in the order of ``Group.reducers``; the first one leads at once.
It commits only what it holds itself, and applies only when a quorum of the group, itself included, has taken that. One
that is not the first asks the members that have not come for a commit that they have taken, before it decides: the
first commit that it hears of is the round's.

Receipts may come long before a peer leads, for members give up leaders at different times: they wait for its decision.
What it decides is in ``settle_decide``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Set

from p2p_diloco.core.errors import Misbehaved, RemoteError
from p2p_diloco.core.update import Update
from p2p_diloco.core.waiting import deadline, heard, now_s
from p2p_diloco.round.butterfly import run_all
from p2p_diloco.round.missed import Missed
from p2p_diloco.round.settle_decide import (
    Decision,
    answer_to_receipt,
    collects_until_s,
    decide,
    is_quorum,
    receipt_fits,
    without_refused,
)
from p2p_diloco.round.settle_member import Member
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.messages import Again, AskCommit, Commit, Eta, No, Receipt, Took

log = logging.getLogger(__name__)


class Leader:
    """A member that others take for the leader, now or later: what they have told it, and what it tells them."""

    def __init__(self, member: Member) -> None:
        self.member = member
        self.meeting = member.meeting
        self.group = member.group
        self.receipts: dict[int, Receipt] = {}
        """Member -> its newest receipt."""
        self.decision: Decision | None = None
        """What members with a receipt are told."""
        self.took: set[int] = set()
        """Members that took the commit, from me or from a leader before me."""
        self.committed = False
        """It was my commit that a quorum took."""

    async def lead(self) -> Update | Missed:
        """Decides on the update, gives it to everybody, and returns it. The leaders before me have failed."""
        member, meeting, me = self.member, self.meeting, self.group.me
        number = max(member.butterflies)
        await self._hear_members()
        while member.taken is None:
            held = {i: receipt.part_hashes for i, receipt in self.receipts.items() if receipt.number >= number}
            held[me] = meeting.hashes()
            decision = decide(
                without_refused(held, meeting.refused),
                group_size=len(self.group.members),
                min_group=meeting.min_group,
                n_parts=len(meeting.parts),
                newest=max(number, *(receipt.number for receipt in self.receipts.values()), 0),
            )
            if isinstance(decision, No):
                return self._fail(decision.reason)
            if isinstance(decision, Again):
                self.decision, number = decision, decision.number
                await member.reduce_again(decision)
                await self._collect(held.keys() - {me}, number)
                continue
            await member.fetch_missing(decision, me)
            if meeting.hashes() == decision.part_hashes:
                member.taken = decision
            else:
                for holder in meeting.lost & held.keys():
                    self.receipts.pop(holder, None)
        return await self._give(member.taken)

    async def _give(self, commit: Commit) -> Update | Missed:
        """Gives a commit to everybody, as soon as all of it is held here. Returns its update when a quorum has taken it
        within ``Timeouts.settle_s``."""
        outcome = await self.member.complete(commit, self.group.me)
        if isinstance(outcome, Missed):
            self._fail(outcome.detail)
            return outcome
        holders = [self.group.me if holder in self.meeting.lost else holder for holder in commit.holders]
        self.decision = Commit(part_hashes=commit.part_hashes, holders=holders)
        self.meeting.changed.ring()
        deadline_s = now_s() + self.meeting.timeouts.settle_s
        while not self._is_quorum(self.took):
            if now_s() >= deadline_s:
                return self._fail("most of the group did not take the commit")
            await heard(self.meeting.changed.event, deadline_s - now_s())
        self.committed = True
        return outcome

    def _fail(self, reason: str) -> Missed:
        """Tells everybody that the round has failed, and returns the same."""
        self.decision = No(reason=reason)
        self.meeting.changed.ring()
        return Missed(reason="failed", detail=reason)

    def _is_quorum(self, others: Set[int]) -> bool:
        """Returns whether these members and I are a quorum of the group."""
        return is_quorum(len(others) + 1, len(self.group.members))

    # -- before a decision -------------------------------------------------------------------------------------------

    async def _hear_members(self) -> None:
        """Waits for the members' receipts and, unless I am the first leader, for what the others have taken."""
        me, everybody = self.group.me, set(range(len(self.group.members)))
        expected = everybody - self.meeting.lost - {me}
        if self.member.place:
            log.info("outer step %d: settled by me, the first leader is gone", self.group.step)
            others = everybody - {me} - self.receipts.keys()
            await run_all(self._collect(expected, 0), *(self._ask_whether_taken(i) for i in others))
        else:
            await self._collect_or_hear(expected)

    async def _collect(self, expected: Set[int], number: int) -> None:
        """Waits for the receipts of ``expected`` after butterfly ``number``, for as long as ``collects_until_s`` says
        or until a commit is heard of. Members that have sent none by then are given up, unless a commit ended the
        wait."""
        began_s = now_s()
        while self.member.taken is None:
            changed, now = self.meeting.changed.event, now_s()
            came = {i for i, receipt in self.receipts.items() if receipt.number >= number}
            until_s = collects_until_s(
                now,
                began_s=began_s,
                timeouts=self.meeting.timeouts,
                all_came=not expected - came - self.meeting.lost,
                quorum=self._is_quorum(came),
            )
            if until_s is None:
                break
            await heard(changed, until_s - now)
        if self.member.taken is not None:
            return
        for member in expected - self.receipts.keys():
            self.meeting.lose(member, None)

    async def _collect_or_hear(self, expected: Set[int]) -> None:
        """Collects receipts as the first leader. When no quorum has come in time, it may be I that was away, and the
        others have gone on to the next leader: its commit is worth as much as mine."""
        asking = asyncio.create_task(self._ask_late())
        try:
            await self._collect(expected, 0)
            if self.member.taken is not None or asking.done():
                await asking
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    async def _ask_late(self) -> None:
        """Asks the other leaders whether they have taken a commit, after ``Timeouts.settle_s`` without a quorum."""
        await asyncio.sleep(self.meeting.timeouts.settle_s)
        if not self._is_quorum(self.receipts.keys()):
            late = set(self.group.reducers) - {self.group.me} - self.receipts.keys()
            await run_all(*(self._ask_whether_taken(i) for i in late))

    async def _ask_whether_taken(self, asked: int) -> None:
        """Asks a member for the commit that it has taken, and takes the first one that is heard of.

        The member has half of the time that the round has left, for what is heard has to be given to the others, and
        ``Timeouts.request_s`` from one word to the next. One that has failed me before is worth a try and not another
        time-out: its first word has to come within ``Timeouts.heartbeat_s``, its answer within ``Timeouts.request_s``.
        """
        meeting, member, timeouts = self.meeting, self.member, self.meeting.timeouts
        n_parts, channel = len(meeting.parts), None
        whole_s, first_s = member.left_s() / 2, timeouts.request_s
        if asked in meeting.lost:
            whole_s, first_s = min(timeouts.request_s, whole_s), timeouts.heartbeat_s
        try:
            async with deadline(whole_s):
                async with deadline(first_s):
                    channel = await meeting.open(asked)
                    ask = AskCommit(round_id=self.group.round_id)
                    answer: Eta | Commit | No = await channel.request(ask, Eta, Commit, No)
                while isinstance(answer, Eta):
                    answer = await channel.receive(Eta, Commit, No, timeout_s=timeouts.request_s)
        except asyncio.TimeoutError:
            meeting.lose(asked, None)
        except RemoteError as error:
            meeting.lose(asked, error)
        else:
            if isinstance(answer, Commit) and len(answer.part_hashes) == len(answer.holders) == n_parts:
                if member.taken is None:
                    member.taken = Commit(part_hashes=answer.part_hashes, holders=[asked] * n_parts)
                if member.taken.part_hashes == answer.part_hashes:
                    self.took.add(asked)
                meeting.changed.ring()
        finally:
            if channel is not None:
                channel.close()

    # -- asked by others ---------------------------------------------------------------------------------------------

    async def on_receipt(self, channel: Channel, sender: int, receipt: Receipt) -> None:
        """Takes a member's receipt, and tells the member what I decide as soon as I lead and have decided. When the
        member fails before it has taken the commit, its receipt does not count any more."""
        meeting = self.meeting
        try:
            while True:
                newest, n_parts = max(self.member.butterflies), len(meeting.parts)
                if not receipt_fits(receipt, self.group, newest=newest, n_parts=n_parts):
                    raise Misbehaved(channel.peer_id, "sends a receipt that does not fit the round")
                self.receipts[sender] = receipt
                meeting.changed.ring()
                answer = await self._decided(channel, sender, receipt.number)
                await channel.send(answer)
                if not isinstance(answer, Again):
                    break
                patience_s = meeting.timeouts.reduced_part_s + meeting.timeouts.settle_s
                receipt = await channel.receive(Receipt, timeout_s=patience_s)
            if isinstance(answer, Commit):
                await channel.receive(Took, timeout_s=meeting.timeouts.request_s)
                self.took.add(sender)
                meeting.changed.ring()
        except RemoteError as error:
            self.receipts.pop(sender, None)
            meeting.lose(sender, error)
            raise

    async def _decided(self, channel: Channel, sender: int, number: int) -> Decision:
        """Returns what a member is told about its receipt of butterfly ``number``. Until there is something to tell, it
        hears every ``Timeouts.heartbeat_s`` that I am still here."""
        meeting, member = self.meeting, self.member
        next_word_s = now_s() + meeting.timeouts.heartbeat_s
        while True:
            changed = meeting.changed.event
            answer = answer_to_receipt(sender, number, decision=self.decision, taken=member.taken, over=meeting.over)
            if answer is not None:
                return answer
            next_word_s = await member.keep_waiting(channel, changed, next_word_s)
