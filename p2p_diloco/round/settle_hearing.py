"""What a leader hears before it decides: the members' receipts, and, where it is not the first one, which commit they
have signed, or know to be certified.

Receipts come by themselves (``settle_leader_answers`` checks and takes them); for a commit the members are asked. What
they answer is checked here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Set

from p2p_diloco.core.errors import Misbehaved, RemoteError
from p2p_diloco.core.waiting import deadline, heard, now_s, run_all
from p2p_diloco.round.settle_decide import collects_until_s, commit_fits
from p2p_diloco.round.settle_eta import beyond_etas
from p2p_diloco.round.settle_member import Member
from p2p_diloco.wire.messages import No
from p2p_diloco.wire.round_messages import AskCommit, Certifies, Commit, Eta, Receipt, TookBefore

log = logging.getLogger(__name__)


class Hearing:
    """Says what the members have told one that leads now or later, and the waits for it."""

    def __init__(self, member: Member) -> None:
        self.member = member
        self.meeting = member.meeting
        self.group = member.group
        self.receipts: dict[int, Receipt] = {}
        """Member -> its newest receipt."""
        self.before: dict[int, TookBefore] = {}
        """Member -> what it has signed with a leader before me."""
        self.certified: tuple[int, Commit, Certifies] | None = None
        """A commit that is certified, and the member that has told me so."""
        self.receipts_s: list[float] = []
        """How long I have waited for the receipt of each member that was expected, when I collected them as the first
        leader."""

    def knows(self) -> bool:
        """Tells whether I know of a commit that I shall give on."""
        return self.certified is not None or self.signed_before() is not None

    def signed_before(self) -> Commit | None:
        """Returns the commit that members have signed before, as far as I know; None where there is none, or only such
        as I should not sign."""
        mine, n_parts = self.member.pledge.taken, len(self.meeting.parts)
        signed = [(self.meeting.me, mine)] if mine is not None else list(self.before.items())
        for holder, before in signed:
            commit = Commit(part_hashes=before.part_hashes, holders=[holder] * n_parts, state=before.state)
            if mine is not None or not self.member.pledge.objection(commit):
                return commit
        return None

    async def hear_members(self) -> None:
        """Waits for the receipts of the members that reach me and, unless I am the first leader, for what the others
        have taken."""
        come = self.group.reaching(self.meeting.me)
        expected = come - self.meeting.lost
        if self.member.place:
            log.info("outer step %d: settled by me, the first leader is gone", self.group.step)
            others = (come | self.group.reached_by(self.meeting.me)) - self.receipts.keys()
            await run_all(self.collect(expected, 0), *(self._ask_whether_taken(i) for i in others))
        else:
            await self._collect_or_hear(expected)

    async def collect(self, expected: Set[int], number: int) -> None:
        """Waits for the receipts of ``expected`` after butterfly ``number``, for as long as ``collects_until_s`` says
        or until a commit is heard of. Members that have sent none by then are given up, unless a commit ended the wait.
        The first leader waits for ``Recent.receipt_s``; for ``Timeouts.settle_s`` a later one, to which members come at
        different times, and whoever has had parts reduced again."""
        meeting, began_s, came_s = self.meeting, now_s(), dict[int, float]()
        wait_s = meeting.timeouts.settle_s
        if first := not self.member.place and not number:
            wait_s = meeting.recent.receipt_s(meeting.timeouts, self.member.reduced_s)
        while not self.knows():
            changed, now = meeting.changed.event, now_s()
            came = {i for i, receipt in self.receipts.items() if receipt.number >= number}
            came_s = dict.fromkeys(came, now - began_s) | came_s
            until_s = collects_until_s(
                now,
                began_s=began_s,
                wait_s=wait_s,
                timeouts=meeting.timeouts,
                all_came=not expected - came - meeting.lost,
                most=self.group.is_most({*came, meeting.me}),
            )
            if until_s is None:
                break
            await heard(changed, until_s - now)
        if self.knows():
            return
        if first:
            self.receipts_s = [came_s.get(i, meeting.timeouts.settle_s) for i in sorted(expected)]
        for member in expected - self.receipts.keys():
            if member not in meeting.lost:
                late, waited_s = self.group.members[member].peer_id[-8:], now_s() - began_s
                log.info("outer step %d: %s is late with its receipt, waited %.2f s", self.group.step, late, waited_s)
            meeting.lose(member, None)

    async def _collect_or_hear(self, expected: Set[int]) -> None:
        """Collects receipts as the first leader. When most have not come in time, it may be I that was away, and the
        others have gone on to the next leader: its commit is worth as much as mine."""
        asking = asyncio.create_task(self._ask_late())
        try:
            await self.collect(expected, 0)
            if self.knows() or asking.done():
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
        time-out: its first word has to come within ``Timeouts.heartbeat_s``, its answer within ``Timeouts.request_s``,
        and at once as well where it was silent: that has cost its time already, and who has signed says so at once.
        """
        meeting, member, timeouts = self.meeting, self.member, self.meeting.timeouts
        channel = None
        whole_s, first_s = member.left_s() / 2, timeouts.request_s
        if asked in meeting.lost:
            first_s = timeouts.heartbeat_s
            whole_s = min(first_s if asked in meeting.silent else timeouts.request_s, whole_s)
        try:
            async with deadline(whole_s):
                async with deadline(first_s):
                    channel = await meeting.open(asked)
                    ask = AskCommit(round_id=self.group.round_id)
                    word: Eta | TookBefore | Commit | No = await channel.request(ask, Eta, TookBefore, Commit, No)
                answer: TookBefore | Commit | No = await beyond_etas(
                    channel, word, TookBefore, Commit, No, timeout_s=timeouts.request_s
                )
                self._check_fits(channel.peer_id, answer)
                if isinstance(answer, Commit):
                    certifies: Certifies = await channel.receive(Certifies, timeout_s=timeouts.request_s)
        except asyncio.TimeoutError:
            meeting.lose(asked, None)
        except RemoteError as error:
            meeting.lose(asked, error)
        else:
            if isinstance(answer, TookBefore):
                self.before[asked] = answer
                meeting.changed.ring()
            if isinstance(answer, Commit):
                self.certified = asked, answer, certifies
                meeting.changed.ring()
        finally:
            if channel is not None:
                channel.close()

    def _check_fits(self, source: str, answer: TookBefore | Commit | No) -> None:
        """Raises Misbehaved of ``source`` when what it says that it has taken is no commit of this round."""
        group_size, n_parts = len(self.group.members), len(self.meeting.parts)
        if isinstance(answer, TookBefore) and len(answer.part_hashes) != n_parts:
            raise Misbehaved(source, "says that it has signed a commit that does not fit the round")
        if isinstance(answer, Commit) and not commit_fits(answer, group_size=group_size, n_parts=n_parts):
            raise Misbehaved(source, "sends a commit that does not fit the round")
