"""A round at one member, from the roster to the update: the butterfly, and how its members agree on its outcome.

    member -> leader   Receipt: the hashes of the parts that I hold
    leader -> member   Eta, as often as it takes: I am still here
                       Again: nobody holds some parts; these members reduce them once more; then a new Receipt
                       Commit: the hashes of all parts, which are the update, and who holds each
    member -> leader   Eta, as often as it takes; Took: my signature over this commit; or No, and why I do not sign
    leader -> owner    AskWitness, where too few members are known; answered by Witnessed, or by No
    leader -> member   Certifies: the signatures of most; or No
    leader -> member   AskCommit: what have you signed? Answered by TookBefore, by Commit and Certifies, or by No
    member -> member   AskPart: answered by its size and the part, or by No
    member -> reducer  AskOther: this I am about to apply; answered by Other, or by No

Where a word of another peer is checked, before anything is done about it:

    Again, Commit           ``settle_member``, from the leader; ``settle_hearing``, from a member that tells a commit
    Certifies               ``settle_pledge``
    a part that was asked   ``settle_completion``, and ``Meeting.receive_part``
    Receipt                 ``settle_leader_answers``
    Took, TookBefore        ``settle_ballot``
    Witnessed               ``settle_ballot``
    AskPart, AskCommit      ``settle_member_answers``; Contribute as well, and then ``butterfly``
    AskOther, Other         ``settle_once``
    AskRoster, Roster       ``rosters``, where two rosters may prove that their leader lies

Rules of this file and of those whose names begin with its own:

    - **What makes an update.** Not the leader's word, but a certificate (``core.certificate``): the signatures of most
      of the members that certify: of the known ones, where too few are known of all, and of each token only the first;
      and then of the run's owner, too. A member applies what is certified, whether it has signed it or not, and
      nothing else.
    - **What a member signs.** One commit in a round, all of whose parts it holds, when each part is what its reducer
      has sent to it: a leader counts what members hold, and decides nothing. Two commits of one round can be certified
      only when somebody in both majorities has signed both, and then the two signatures prove that it lies.
    - **One update.** Before a member applies what is certified, it tells the other reducers, and hears whether another
      update of the round is certified (``settle_once``), or its leader has signed another roster (``rosters``). Then
      the round is void for it: it has failed.
    - **What a leader proposes.** Only what it holds itself, and only when most of the members that certify have sent
      receipts.
    - **Who leads next.** Leaders are the members that reduce, in the order of ``Group.leaders``. One that is silent or
      gone, only promises (``settle_decide.promises_s``), or proposes what most do not sign, is given up
      for good, and the next one leads. Members may see this at different times.
    - **How a commit survives its leader.** Before a later leader decides anything, it asks the members that have not
      come to it what they have signed, or know to be certified. A commit that is certified it gives on with its
      certificate; one that is signed it gives on as its own, and the signatures that there are count. So a leader that
      dies before anybody has signed costs a time-out, and one that dies afterwards costs no more. Members deny that
      they have signed only when they have given up all leaders before the one that asks, and nobody comes back to a
      leader that it has given up: a member that hears less than others, or pretends to, cannot take the lead from one
      that they hear.
    - **How a member gets what it misses.** It takes the commit from the leader that it holds to, and fetches the parts
      from the members that the commit names, then from the leader. A member that does not get there is behind by one
      update, and catches up with the swarm as a newcomer does (``peer.catchup``).

A part is made again from the contributions that members still have: theta and local do not change during a round. The
death of any one member thus costs its own contribution and one time-out. Nothing here raises for what another member
does: the result is an update with its certificate, or a Missed with the reason, and the members that failed are in
``Meeting.lost``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from p2p_diloco.core.waiting import deadline, now_s
from p2p_diloco.round.meeting import Meeting
from p2p_diloco.round.outcome import Missed, Settled
from p2p_diloco.round.rosters import Rosters
from p2p_diloco.round.settle_leader import Leader
from p2p_diloco.round.settle_leader_answers import LeaderAnswers
from p2p_diloco.round.settle_member import Member
from p2p_diloco.round.settle_member_answers import MemberAnswers
from p2p_diloco.round.settle_once import Once
from p2p_diloco.wire.audit_messages import AskContributions
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.proof_messages import AskOther
from p2p_diloco.wire.round_messages import AskCommit, AskPart, Contribute, Receipt

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RoundCost:
    """Says what a round has taken at one member."""

    reduce_s: float = 0.0
    settle_s: float = 0.0
    bytes_sent: int = 0
    bytes_received: int = 0


class Settlement:
    """One round at one member. It is a member, and the leader too when its turn comes."""

    def __init__(self, meeting: Meeting) -> None:
        self.meeting = meeting
        self.group = meeting.group
        self.member = Member(meeting)
        self.leader = Leader(self.member)
        self.member_answers = MemberAnswers(self.member)
        self.leader_answers = LeaderAnswers(self.leader)
        self.once = Once(meeting)
        self.rosters = Rosters(meeting)
        self.stalled_s: dict[int, float] = {}
        """Leader that was silent, or only promised -> the seconds that I have held to it in vain."""
        self.reduce_s = 0.0
        self.settle_s = 0.0

    async def reduce(self) -> None:
        """Runs the butterfly. It ends in time, whatever others do, and at once when the round is void; parts may be
        missing then. Peers beside the round are asked for other rosters meanwhile."""
        self.rosters.ask(self.meeting.around)
        try:
            await self._unless_void(self.member.reduce())
        except asyncio.CancelledError:
            await self.rosters.close()
            raise
        self.reduce_s = now_s() - self.member.started_s

    async def settle(self) -> Settled | Missed:
        """Agrees with the others on the outcome, and returns it, at the latest when the round must have ended. Nothing
        is reduced or committed here after that."""
        started_s = now_s()
        self.rosters.ask(self.group.members[i].peer_id for i in sorted(self.meeting.elsewhere))
        try:
            async with deadline(self.member.left_s()):
                outcome = await self._unless_void(self._settle_once())
        except asyncio.TimeoutError:
            outcome = Missed(reason="failed", detail="the round took longer than its time")
        finally:
            await self.rosters.close()
            self.settle_s = now_s() - started_s
            self.meeting.over = True
            self.meeting.changed.ring()
        if outcome is None:
            self.member.pledge.settled = None  # nobody shall hear of it from me
            return Missed(reason="failed", detail=f"the round is void: {self.meeting.signatures.void}")
        if isinstance(outcome, Missed) and outcome.reason == "failed":
            outcome = replace(outcome, uncertified=self.meeting.uncertified)
        return outcome

    async def _unless_void(self, work: Coroutine[Any, Any, T]) -> T | None:
        """Returns what comes of a part of the round; None, as soon as the round is void."""
        signatures = self.meeting.signatures
        task, voided = asyncio.ensure_future(work), asyncio.ensure_future(signatures.voided.wait())
        try:
            await asyncio.wait((task, voided), return_when=asyncio.FIRST_COMPLETED)
            return None if signatures.void else task.result()
        finally:
            task.cancel()
            voided.cancel()
            await asyncio.gather(task, voided, return_exceptions=True)

    async def _settle_once(self) -> Settled | Missed:
        """Settles the round, and returns its update when nobody knows of another one that is certified, nor of another
        roster of its leader."""
        outcome = await self._settle()
        if isinstance(outcome, Settled):
            await self.once.confirm(outcome)
            await self.rosters.answered()
        return outcome

    async def _settle(self) -> Settled | Missed:
        """Holds to one leader after another, in the order of ``Group.leaders``, until one of them, or this peer, has an
        outcome. Those that I do not reach I have given up from the beginning."""
        for place, leader in enumerate(self.group.leaders):
            if leader in self.meeting.lost or leader not in self.meeting.within_call:
                continue
            self.member.place = place
            self.meeting.changed.ring()
            began_s = now_s()
            i_lead = leader == self.meeting.me
            outcome = await (self.leader.lead() if i_lead else self.member.follow(leader))
            if outcome is not None:
                return outcome
            if leader in self.meeting.silent:
                self.stalled_s[leader] = now_s() - began_s
        return Missed(reason="failed", detail="nobody is left to settle the round")

    @property
    def leads(self) -> bool:
        """Returns whether it was my commit that was certified, and something came of it."""
        return self.leader.committed and not self.meeting.signatures.void

    def cost(self) -> RoundCost:
        """Returns what the round has taken so far."""
        return RoundCost(
            reduce_s=self.reduce_s,
            settle_s=self.settle_s,
            bytes_sent=self.meeting.meter.sent,
            bytes_received=self.meeting.meter.received,
        )

    @property
    def part_counts(self) -> tuple[int, ...] | None:
        """Returns how many parts each member reduces in the round's own butterfly; None where all reducers have equal
        shares."""
        shares = self.member.butterflies[0].shares
        counts = {i: len(share) for i, share in shares.items()}
        if max(counts.values()) - min(counts.values()) <= 1:
            return None
        return tuple(counts.get(i, 0) for i in range(len(self.group.members)))

    @property
    def share_percent(self) -> int | None:
        """Returns how much I reduce in the round's own butterfly, in percent of an equal share; None where all reducers
        have equal shares, and where I am none of them."""
        counts, reducers = self.part_counts, self.group.reducers
        if counts is None or self.meeting.me not in reducers:
            return None
        return 100 * counts[self.meeting.me] * len(reducers) // sum(counts)

    def excused(self) -> list[int]:
        """Returns, of each part, the members that do not reach its reducer, as the bits of a number."""
        reducers, everybody = self.member.reducers(), range(len(self.group.members))
        reach = {reducer: {reducer, *self.group.reaching(reducer)} for reducer in set(reducers)}
        bits = {reducer: sum(1 << i for i in everybody if i not in reach[reducer]) for reducer in reach}
        return [bits[reducer] for reducer in reducers]

    def uplinks(self) -> dict[int, int]:
        """Returns the uplinks that the round's own butterfly has shown me, in bytes/s, of members that may reduce."""
        measured = self.member.butterflies[0].uplinks()
        return {i: uplink for i, uplink in measured.items() if i in self.group.reducers}

    def close(self) -> None:
        """Forgets the contributions that were kept: nobody asks about this round any more."""
        if self.meeting.kept is not None:
            self.meeting.kept.close()

    async def serve(
        self, channel: Channel, message: Contribute | Receipt | AskPart | AskCommit | AskContributions | AskOther
    ) -> None:
        """Serves a stream that a member of this round has opened to me."""
        sender = self.meeting.index_of(channel.peer_id)
        if isinstance(message, AskContributions):
            await self.member_answers.on_ask_contributions(channel, sender, message)
            return
        self.meeting.count(channel)
        if isinstance(message, Contribute):
            await self.member_answers.on_contribute(channel, sender, message.number)
        elif isinstance(message, Receipt):
            await self.leader_answers.on_receipt(channel, sender, message)
        elif isinstance(message, AskPart):
            await self.member_answers.on_ask_part(channel, message)
        elif isinstance(message, AskOther):
            await self.once.on_ask_other(channel, message)
        else:
            await self.member_answers.on_ask_commit(channel, sender)
