"""The leader of a round: it counts receipts, proposes a commit, and collects the signatures that certify it.

A peer leads when it has given up all leaders before it in the order of ``Group.reducers``; the first one leads at once.
It commits only what it holds itself, and what it commits counts only when most of the members that certify have signed
it; where too few are known, the run's owner has to witness it as well. One that is not the first asks the members that
have not come for a commit that they have signed, before it decides: the first one that it hears of is the round's,
unless it is not what was reduced.

Receipts may come long before a peer leads, for members give up leaders at different times: they wait for its decision.
What it decides is in ``settle_decide``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Set

from p2p_diloco.core.errors import Misbehaved, RemoteError
from p2p_diloco.core.waiting import deadline, heard, now_s
from p2p_diloco.round.butterfly import run_all
from p2p_diloco.round.outcome import Missed, Settled
from p2p_diloco.round.settle_ballot import Ballot, certifies
from p2p_diloco.round.settle_decide import (
    Decision,
    agreed_state,
    answer_to_receipt,
    collects_until_s,
    commit_fits,
    decide,
    receipt_fits,
    without_refused,
)
from p2p_diloco.round.settle_member import Member
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.messages import Again, AskCommit, Certifies, Commit, Eta, No, Receipt, Took, TookBefore

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
        self.before: dict[int, TookBefore] = {}
        """Member -> what it has signed with a leader before me."""
        self.certified: tuple[int, Commit, Certifies] | None = None
        """A commit that is certified, and the member that has told me so."""
        self.ballot: Ballot | None = None
        """On my commit."""
        self.committed = False
        """It was my commit that was certified."""

    async def lead(self) -> Settled | Missed:
        """Decides on the update, has it certified, gives it to everybody, and returns it. The leaders before me have
        failed."""
        member, meeting, me = self.member, self.meeting, self.meeting.me
        number = max(member.butterflies)
        await self._hear_members()
        if self.certified is not None and (outcome := await self._pass_on(*self.certified)) is not None:
            return outcome
        while (commit := self._heard()) is None:
            held = {i: receipt.part_hashes for i, receipt in self.receipts.items() if receipt.number >= number}
            held[me] = meeting.hashes()
            decision = decide(
                without_refused(held, meeting.refused),
                self.group,
                me=me,
                min_group=meeting.min_group,
                reducers=member.reducers(),
                newest=max(number, *(receipt.number for receipt in self.receipts.values()), 0),
                state=self._agreed_state(),
            )
            if isinstance(decision, No):
                return self._fail(decision.reason)
            if isinstance(decision, Again):
                self.decision, number = decision, decision.number
                await member.reduce_again(decision)
                await self._collect(set(decision.members) - {me}, number)
                continue
            await member.fetch_missing(decision, me)
            if meeting.hashes() == decision.part_hashes:
                return await self._give(decision)
            for holder in meeting.lost & held.keys():
                self.receipts.pop(holder, None)
        return await self._give(commit)

    def _knows(self) -> bool:
        """Tells whether I know of a commit that I shall give on."""
        return self.certified is not None or self._heard() is not None

    def _heard(self) -> Commit | None:
        """Returns the commit that members have signed before, as far as I know; None where there is none, or only such
        as I should not sign."""
        mine, n_parts = self.member.taken, len(self.meeting.parts)
        signed = [(self.meeting.me, mine)] if mine is not None else list(self.before.items())
        for holder, before in signed:
            commit = Commit(part_hashes=before.part_hashes, holders=[holder] * n_parts, state=before.state)
            if mine is not None or not self.member.objection(commit):
                return commit
        return None

    async def _pass_on(self, source: int, commit: Commit, certifies: Certifies) -> Settled | Missed | None:
        """Gives everybody a commit that was certified before I came to lead, and returns its update. None when it is
        not: who said so is lost, and I decide."""
        try:
            outcome = await self.member.certify(commit, certifies, source)
        except Misbehaved as error:
            self.meeting.lose(source, error)
            return None
        if isinstance(outcome, Missed):
            self._fail(outcome.detail)
        else:
            self.decision = outcome.commit(self.meeting.me)
        self.meeting.changed.ring()
        return outcome

    def _agreed_state(self) -> bytes:
        """Returns the digest of the outer state that most members name, as ``agreed_state`` has it."""
        states = {i: receipt.state for i, receipt in self.receipts.items()}
        return agreed_state({**states, self.meeting.me: self.meeting.state}, self.group)

    async def _give(self, commit: Commit) -> Settled | Missed:
        """Gives a commit to everybody, as soon as all of it is held here. Returns its update when it is certified
        within ``Timeouts.settle_s``."""
        meeting, me = self.meeting, self.meeting.me
        update = await self.member.complete(commit, me)
        if update is None:
            return self._fail("parts of the update could not be fetched")
        ballot = self.ballot = Ballot(meeting=meeting, taken=self.member.what_is_taken(commit), update=update)
        holders = [me if holder in meeting.lost else holder for holder in commit.holders]
        self.decision = Commit(part_hashes=commit.part_hashes, holders=holders, state=commit.state)
        mine = None if self.member.objection(commit) else self.member.sign(commit)
        if isinstance(mine, Took):
            ballot.count(me, mine.signature)
        for member, before in self.before.items():
            if (before.part_hashes, before.state) == (commit.part_hashes, commit.state):
                try:
                    ballot.count(member, before.signature)
                except Misbehaved as error:
                    meeting.lose(member, error)
        meeting.changed.ring()
        deadline_s = now_s() + meeting.timeouts.settle_s
        while not ballot.has_most:
            changed = meeting.changed.event
            if now_s() >= deadline_s or ballot.is_over:
                return self._fail("most of the group did not sign the update")
            await heard(changed, deadline_s - now_s())
        certificate = await ballot.certificate()
        if certificate is None:
            return self._fail("the run's owner, whose witness so few known members need, does not give it")
        self.committed = True
        settled = self.member.settled = Settled(update=update, certificate=certificate)
        meeting.changed.ring()
        return settled

    def _fail(self, reason: str) -> Missed:
        """Tells everybody that the round has failed, and returns the same."""
        self.decision = No(reason=reason)
        self.meeting.changed.ring()
        return Missed(reason="failed", detail=reason)

    # -- before a decision -------------------------------------------------------------------------------------------

    async def _hear_members(self) -> None:
        """Waits for the members' receipts and, unless I am the first leader, for what the others have taken."""
        me, everybody = self.meeting.me, set(range(len(self.group.members)))
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
        while not self._knows():
            changed, now = self.meeting.changed.event, now_s()
            came = {i for i, receipt in self.receipts.items() if receipt.number >= number}
            until_s = collects_until_s(
                now,
                began_s=began_s,
                timeouts=self.meeting.timeouts,
                all_came=not expected - came - self.meeting.lost,
                most=self.group.is_most({*came, self.meeting.me}),
            )
            if until_s is None:
                break
            await heard(changed, until_s - now)
        if self._knows():
            return
        for member in expected - self.receipts.keys():
            self.meeting.lose(member, None)

    async def _collect_or_hear(self, expected: Set[int]) -> None:
        """Collects receipts as the first leader. When most have not come in time, it may be I that was away, and the
        others have gone on to the next leader: its commit is worth as much as mine."""
        asking = asyncio.create_task(self._ask_late())
        try:
            await self._collect(expected, 0)
            if self._knows() or asking.done():
                await asking
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    async def _ask_late(self) -> None:
        """Asks the other leaders whether they have signed a commit, after ``Timeouts.settle_s`` without most."""
        await asyncio.sleep(self.meeting.timeouts.settle_s)
        if not self.group.is_most({*self.receipts, self.meeting.me}):
            late = set(self.group.reducers) - {self.meeting.me} - self.receipts.keys()
            await run_all(*(self._ask_whether_taken(i) for i in late))

    async def _ask_whether_taken(self, asked: int) -> None:
        """Asks a member for the commit that it has signed.

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
                    answer: Eta | TookBefore | Commit | No = await channel.request(ask, Eta, TookBefore, Commit, No)
                while isinstance(answer, Eta):
                    answer = await channel.receive(Eta, TookBefore, Commit, No, timeout_s=timeouts.request_s)
                if isinstance(answer, Commit):
                    certifies: Certifies = await channel.receive(Certifies, timeout_s=timeouts.request_s)
        except asyncio.TimeoutError:
            meeting.lose(asked, None)
        except RemoteError as error:
            meeting.lose(asked, error)
        else:
            if isinstance(answer, TookBefore) and len(answer.part_hashes) == n_parts:
                self.before[asked] = answer
                meeting.changed.ring()
            if isinstance(answer, Commit) and commit_fits(answer, group_size=len(self.group.members), n_parts=n_parts):
                self.certified = asked, answer, certifies
                meeting.changed.ring()
        finally:
            if channel is not None:
                channel.close()

    # -- asked by others ---------------------------------------------------------------------------------------------

    async def on_receipt(self, channel: Channel, sender: int, receipt: Receipt) -> None:
        """Takes a member's receipt, and tells the member what I decide as soon as I lead and have decided; then takes
        its signature, and tells it when the commit is certified. When the member fails before that, its receipt does
        not count any more."""
        meeting = self.meeting
        try:
            while True:
                newest, n_parts = max(self.member.butterflies), len(meeting.parts)
                if not receipt_fits(receipt, self.group, me=meeting.me, newest=newest, n_parts=n_parts):
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
                await self._hear_signature(channel, sender)
                await channel.send(await self._last_word(channel))
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
            changed, settled = meeting.changed.event, member.settled
            applied = None if settled is None else settled.commit(meeting.me)
            answer = answer_to_receipt(sender, number, decision=self.decision, applied=applied, over=meeting.over)
            if answer is not None:
                return answer
            next_word_s = await member.keep_waiting(channel, changed, next_word_s)

    async def _hear_signature(self, channel: Channel, sender: int) -> None:
        """Takes a member's signature over the commit that I gave it, which it may have to complete first."""
        meeting = self.meeting
        word: Eta | Took | No = await channel.receive(Eta, Took, No, timeout_s=meeting.timeouts.request_s)
        while isinstance(word, Eta):
            word = await channel.receive(Eta, Took, No, timeout_s=meeting.timeouts.request_s)
        if self.ballot is not None:
            self.ballot.hear(sender, word)

    async def _last_word(self, channel: Channel) -> Certifies | No:
        """Returns what a member is told in the end about the commit that I gave it. It hears every
        ``Timeouts.heartbeat_s`` that I am still here."""
        meeting, member = self.meeting, self.member
        next_word_s = now_s() + meeting.timeouts.heartbeat_s
        while True:
            changed, settled = meeting.changed.event, member.settled
            if settled is not None:
                return certifies(settled.certificate)
            if isinstance(self.decision, No):
                return self.decision
            if meeting.over:
                return No(reason="the round is over")
            next_word_s = await member.keep_waiting(channel, changed, next_word_s)
