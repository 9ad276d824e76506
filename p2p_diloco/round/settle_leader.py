"""The leader of a round: it decides from receipts, proposes a commit, and has it certified.

A peer leads when it has given up all leaders before it in the order of ``Group.leaders``; the first one leads at once.
It commits only what it holds itself, and what it commits counts only when most of the members that certify have signed
it; where too few are known, the run's owner has to witness it as well. One that is not the first asks the members that
have not come for a commit that they have signed, before it decides: the first one that it hears of is the round's,
unless it is not what was reduced.

Receipts may come long before a peer leads, for members give up leaders at different times: they wait for its decision.
What it decides is in ``settle_decide``, what it hears before in ``settle_hearing``, and what it tells each member in
``settle_leader_answers``.
"""

from __future__ import annotations

from p2p_diloco.core.errors import Misbehaved
from p2p_diloco.core.waiting import heard, now_s
from p2p_diloco.round.outcome import NOT_WITNESSED, Missed, Settled
from p2p_diloco.round.settle_ballot import Ballot
from p2p_diloco.round.settle_decide import Decision, agreed_state, decide, without_refused
from p2p_diloco.round.settle_hearing import Hearing
from p2p_diloco.round.settle_member import Member
from p2p_diloco.wire.messages import No
from p2p_diloco.wire.round_messages import Again, Certifies, Commit, Took


class Leader:
    """A member that others take for the leader, now or later: what it has decided, and the ballot on its commit."""

    def __init__(self, member: Member) -> None:
        self.member = member
        self.meeting = member.meeting
        self.group = member.group
        self.hearing = Hearing(member)
        self.decision: Decision | None = None
        """What members with a receipt are told."""
        self.ballot: Ballot | None = None
        """On my commit."""
        self.committed = False
        """It was my commit that was certified."""

    async def lead(self) -> Settled | Missed:
        """Decides on the update, has it certified, gives it to everybody, and returns it. The leaders before me have
        failed."""
        member, hearing, meeting, me = self.member, self.hearing, self.meeting, self.meeting.me
        number = max(member.butterflies)
        await hearing.hear_members()
        if hearing.certified is not None and (outcome := await self._pass_on(*hearing.certified)) is not None:
            return outcome
        while (commit := hearing.signed_before()) is None:
            held = {i: receipt.part_hashes for i, receipt in hearing.receipts.items() if receipt.number >= number}
            held[me] = meeting.hashes()
            decision = decide(
                without_refused(held, meeting.refused),
                self.group,
                me=me,
                min_group=meeting.min_group,
                reducers=member.reducers(),
                newest=max(number, *(receipt.number for receipt in hearing.receipts.values()), 0),
                state=self._agreed_state(),
                apart=meeting.lonely,
            )
            if isinstance(decision, No):
                return self._fail(decision.reason)
            if isinstance(decision, Again):
                self.decision, number = decision, decision.number
                await member.reduce_again(decision)
                await hearing.collect(set(decision.members) - {me}, number)
                continue
            await member.completion.fetch_missing(decision, me)
            if meeting.hashes() == decision.part_hashes:
                return await self._give(decision)
            for holder in meeting.lost & held.keys():
                hearing.receipts.pop(holder, None)
        return await self._give(commit)

    async def _pass_on(self, source: int, commit: Commit, certifies: Certifies) -> Settled | Missed | None:
        """Gives everybody a commit that was certified before I came to lead, and returns its update. None when it is
        not: who said so is lost, and I decide."""
        try:
            outcome = await self.member.pledge.certify(commit, certifies, source)
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
        states = {i: receipt.state for i, receipt in self.hearing.receipts.items()}
        return agreed_state({**states, self.meeting.me: self.meeting.state}, self.group)

    async def _give(self, commit: Commit) -> Settled | Missed:
        """Gives a commit to everybody, as soon as all of it is held here. Returns its update when it is certified
        within ``Timeouts.settle_s``."""
        meeting, pledge, me = self.meeting, self.member.pledge, self.meeting.me
        update = await self.member.completion.complete(commit, me)
        if update is None:
            return self._fail("parts of the update could not be fetched")
        ballot = self.ballot = Ballot(meeting=meeting, taken=pledge.what_is_taken(commit), update=update)
        holders = [me if holder in meeting.lost else holder for holder in commit.holders]
        self.decision = Commit(part_hashes=commit.part_hashes, holders=holders, state=commit.state)
        mine = None if pledge.objection(commit) else pledge.sign(commit)
        if isinstance(mine, Took):
            ballot.count(me, mine.signature)
        for member, before in self.hearing.before.items():
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
                meeting.uncertified = "signatures"
                return self._fail("most of the group did not sign the update")
            await heard(changed, deadline_s - now_s())
        certificate = await ballot.certificate()
        if certificate is None:
            meeting.uncertified = "witness"
            return self._fail(NOT_WITNESSED)
        self.committed = True
        settled = pledge.settled = Settled(update=update, certificate=certificate)
        meeting.changed.ring()
        return settled

    def _fail(self, reason: str) -> Missed:
        """Tells everybody that the round has failed, and returns the same."""
        self.decision = No(reason=reason)
        self.meeting.changed.ring()
        return Missed(reason="failed", detail=reason)
