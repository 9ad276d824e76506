"""A round at one member, from the roster to the update: the butterfly, and how its members agree on its outcome.

    member -> leader   Receipt: the hashes of the parts I hold
    leader -> member   Eta, as often as it takes: I am still here
                       Again: some parts are held by nobody; these members reduce them once more; then a new Receipt
                       Commit: the hashes of all parts, which are the update, and who holds each
    member -> leader   Took: I shall apply this update and no other

Rules of this file:

    - The leader commits only what it holds itself, and only when more than half of the group has sent receipts. It
      applies only when more than half of the group, itself included, has taken the commit.
    - A leader that is silent or gone, or that only promises for most of the time that is left, is followed by the next
      member that can be dialled, in the order of rank. Before it decides anything, that one asks those who have not
      come for a commit that they have taken. They deny it only when they have given up all leaders before it, and
      nobody comes back to one that it has given up: who hears less than others, or pretends to, cannot take the lead
      from one whom they hear.
    - So two different commits of one round cannot both be applied by members that reach each other. Where that fails (a
      member that applied and cannot be reached), that member's head is a minority's, and it goes back (``rounds``).

A part is made again from the contributions that members still have: theta and local do not change during a round. The
death of any one member thus costs its own contribution and one time-out. Nothing here raises for what another member
does: the result is an update, or a Missed with the reason, and the members that failed are in ``Meeting.lost``.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from p2p_diloco.core.errors import Misbehaved, RemoteError, Silent
from p2p_diloco.core.update import Update
from p2p_diloco.core.waiting import deadline, heard, now_s
from p2p_diloco.round.butterfly import Butterfly, run_all
from p2p_diloco.round.meeting import Meeting
from p2p_diloco.round.missed import Missed
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.messages import Again, AskCommit, AskPart, Commit, Contribute, Eta, No, Receipt, Size, Took

log = logging.getLogger(__name__)

LEADERS_SHARE = 0.75
"""Of the time that a round has left, for one decision: the leader may reduce for half of that, and then it collects."""
HEARTBEATS = 3
"""Words of a leader within the time after which a member takes it for dead."""


@dataclass(frozen=True, kw_only=True)
class RoundCost:
    reduce_s: float = 0.0
    settle_s: float = 0.0
    bytes_sent: int = 0
    bytes_received: int = 0


class Settlement:
    """One round at one member."""

    def __init__(self, meeting: Meeting) -> None:
        self.meeting = meeting
        self.group = meeting.group
        members, parts = range(len(self.group.members)), range(len(meeting.parts))
        self.butterflies = {0: Butterfly(meeting, 0, members, parts)}
        self.receipts: dict[int, Receipt] = {}
        """Member -> its newest receipt, from whoever takes me for the leader."""
        self.answer: Again | Commit | No | None = None
        """Leader only: what members with a receipt are told."""
        self.taken: Commit | None = None
        """The commit that I have taken or, as the leader, given."""
        self.took: set[int] = set()
        """Leader only: members that took the commit, from me or from a leader before me."""
        self.place = 0
        """Of the leader that I am with, in the order of leaders: I have given up those before it."""
        self.leads = False
        """I am the one whose commit it was."""
        self.reduce_s = 0.0
        self.settle_s = 0.0
        limit_s = meeting.timeouts.round_limit_s(2 * meeting.grid.vector_bytes)
        self.started_s = now_s()
        self.ends_s = self.started_s + limit_s

    async def reduce(self) -> None:
        """Returns in time, whatever others do; what could not be reduced is missing then."""
        await self._run(self.butterflies[0])
        self.reduce_s = now_s() - self.started_s

    async def _run(self, butterfly: Butterfly) -> None:
        """At most half of the time that the round has left: who owes parts then is given up, and the other half is
        enough to do without it."""
        try:
            async with deadline((self.ends_s - now_s()) / 2):
                await butterfly.run()
        except asyncio.TimeoutError:
            for reducer in butterfly.owing():
                self.meeting.lose(reducer, None)

    async def settle(self) -> Update | Missed:
        started_s = now_s()
        try:
            async with deadline(self.ends_s - now_s()):
                return await self._settle()
        except asyncio.TimeoutError:
            return Missed(reason="failed", detail="the round took longer than its time")
        finally:
            self.settle_s = now_s() - started_s
            self.meeting.over = True
            self.meeting.changed.ring()

    def cost(self) -> RoundCost:
        return RoundCost(
            reduce_s=self.reduce_s,
            settle_s=self.settle_s,
            bytes_sent=self.meeting.meter.sent,
            bytes_received=self.meeting.meter.received,
        )

    async def _settle(self) -> Update | Missed:
        for place, leader in enumerate(self.group.reducers):
            if leader in self.meeting.lost:
                continue
            self.place = place
            self.meeting.changed.ring()
            outcome = await (self._lead() if leader == self.group.me else self._follow(leader))
            if outcome is not None:
                return outcome
        return Missed(reason="failed", detail="nobody is left to settle the round")

    # -- as a member -------------------------------------------------------------------------------------------------

    async def _follow(self, leader: int) -> Update | Missed | None:
        """Give my receipt to a leader and take its commit. None when it fails me: the next one leads."""
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
        return await self._finish(self.taken, leader)

    async def _ask_commit(self, channel: Channel) -> Commit | No:
        meeting, number = self.meeting, max(self.butterflies)
        while True:
            receipt = Receipt(round_id=self.group.round_id, number=number, part_hashes=meeting.hashes())
            answer = await self._decision(channel, receipt)
            if isinstance(answer, Again):
                self._check_again(channel, answer)
                await self._run_again(answer)
                number = answer.number
                continue
            if isinstance(answer, Commit) and not (
                len(answer.part_hashes) == len(answer.holders) == len(meeting.parts)
                and all(holder < len(self.group.members) for holder in answer.holders)
            ):
                raise Misbehaved(channel.peer_id, "sends a commit that does not fit the round")
            return answer

    async def _decision(self, channel: Channel, receipt: Receipt) -> Again | Commit | No:
        """Of who leads; Silent when it only ever promises."""
        try:
            async with deadline((self.ends_s - now_s()) * LEADERS_SHARE):
                answer: Eta | Again | Commit | No = await channel.request(receipt, Eta, Again, Commit, No)
                while isinstance(answer, Eta):
                    answer = await channel.receive(Eta, Again, Commit, No, timeout_s=self.meeting.timeouts.request_s)
                return answer
        except asyncio.TimeoutError:
            raise Silent(channel.peer_id, "promises a decision, and does not come to one") from None

    def _check_again(self, channel: Channel, again: Again) -> None:
        members, parts = again.members, again.parts
        if not (
            max(self.butterflies) < again.number < len(self.group.members)
            and members == sorted(set(members))
            and self.group.me in members
            and members[-1] < len(self.group.members)
            and parts == sorted(set(parts))
            and parts
            and parts[-1] < len(self.meeting.parts)
        ):
            raise Misbehaved(channel.peer_id, "asks to reduce again what does not fit the round")

    async def _run_again(self, again: Again) -> None:
        log.info("outer step %d: %d parts are reduced again", self.group.step, len(again.parts))
        butterfly = Butterfly(self.meeting, again.number, again.members, again.parts)
        self.butterflies[again.number] = butterfly
        self.meeting.changed.ring()
        await self._run(butterfly)

    async def _finish(self, commit: Commit, leader: int) -> Update | Missed:
        """The update of a commit that I have taken."""
        await self._fetch_missing(commit, leader)
        held = [part for part in self.meeting.parts if part is not None]
        if [part.hash for part in held] != commit.part_hashes:
            return Missed(reason="behind", detail="the round committed, but parts of the update could not be fetched")
        return Update(header=self.group.header(commit.part_hashes), parts=tuple(held))

    async def _fetch_missing(self, commit: Commit, leader: int) -> None:
        """Get the parts of the commit that I do not hold from who does, and what fails there from the leader; one
        stream at a time to each."""
        for sources in (commit.holders, [leader] * len(commit.holders)):
            wanted_from: dict[int, list[int]] = {}
            for part, (held, wanted) in enumerate(zip(self.meeting.parts, commit.part_hashes)):
                if held is None or held.hash != wanted:
                    self.meeting.parts[part] = None
                    wanted_from.setdefault(sources[part], []).append(part)
            others = [i for i in wanted_from if i != self.group.me]
            await run_all(*(self._fetch(commit, source, wanted_from[source]) for source in others))

    async def _fetch(self, commit: Commit, source: int, parts: list[int]) -> None:
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
                meeting.hold(part, received)
        except RemoteError as error:
            meeting.lose(source, error)

    # -- as the leader -----------------------------------------------------------------------------------------------

    async def _lead(self) -> Update | Missed:
        """The leaders before me have failed."""
        meeting, me, n_members = self.meeting, self.group.me, len(self.group.members)
        expected = set(range(n_members)) - meeting.lost - {me}
        number = max(self.butterflies)
        if self.place:
            log.info("outer step %d: settled by me, the first leader is gone", self.group.step)
            others = set(range(n_members)) - {me} - self.receipts.keys()
            await run_all(self._collect(expected, 0), *(self._ask_whether_taken(i) for i in others))
        else:
            await self._collect_or_hear(expected)
        while self.taken is None:
            heard_of = {i: receipt.part_hashes for i, receipt in self.receipts.items() if receipt.number >= number}
            heard_of[me] = meeting.hashes()
            if len(heard_of) < meeting.min_group or not self._is_most(len(heard_of)):
                return self._fail(f"{len(heard_of)} of {n_members} members are left, too few to commit")
            hashes, holders = choose_parts(heard_of, len(meeting.parts))
            missing = [part for part, chosen in enumerate(hashes) if not chosen]
            if missing:
                number = max(number, *(receipt.number for receipt in self.receipts.values()), 0) + 1
                again = Again(number=number, members=sorted(heard_of), parts=missing)
                if number >= n_members:
                    return self._fail(f"{len(missing)} parts were lost again and again")
                self.answer = again
                await self._run_again(again)
                await self._collect(heard_of.keys() - {me}, number)
                continue
            commit = Commit(part_hashes=hashes, holders=holders)
            await self._fetch_missing(commit, me)
            if meeting.hashes() == hashes:
                self.taken = commit
            else:
                for holder in meeting.lost & heard_of.keys():
                    self.receipts.pop(holder, None)
        return await self._give(self.taken)

    async def _give(self, commit: Commit) -> Update | Missed:
        """Hold all of the commit, give it to everybody, and wait until most have taken it."""
        outcome = await self._finish(commit, self.group.me)
        if isinstance(outcome, Missed):
            self._fail(outcome.detail)
            return outcome
        holders = [self.group.me if holder in self.meeting.lost else holder for holder in commit.holders]
        self.answer = Commit(part_hashes=commit.part_hashes, holders=holders)
        self.meeting.changed.ring()
        deadline_s = now_s() + self.meeting.timeouts.settle_s
        while not self._is_most(len(self.took) + 1):
            if now_s() >= deadline_s:
                return self._fail("most of the group did not take the commit")
            await heard(self.meeting.changed.event, deadline_s - now_s())
        self.leads = True
        return outcome

    def _is_most(self, members: int) -> bool:
        return 2 * members > len(self.group.members)

    def _fail(self, reason: str) -> Missed:
        self.answer = No(reason=reason)
        self.meeting.changed.ring()
        return Missed(reason="failed", detail=reason)

    async def _collect(self, expected: set[int], number: int) -> None:
        """Wait for the receipts of ``expected`` after butterfly ``number``: ``settle_s`` for everybody; until that can
        be no more for most of the group. Nobody is given up where a commit ends the wait."""
        timeouts, started_s = self.meeting.timeouts, now_s()
        patience_s = started_s + timeouts.settle_s
        end_s = patience_s + timeouts.reduced_part_s
        while self.taken is None:
            changed = self.meeting.changed.event
            came = {i for i, receipt in self.receipts.items() if receipt.number >= number}
            awaited = expected - came - self.meeting.lost
            now = now_s()
            if not awaited or now >= end_s or (now >= patience_s and self._is_most(len(came) + 1)):
                break
            await heard(changed, (patience_s if now < patience_s else end_s) - now)
        if self.taken is not None:
            return
        for member in expected - self.receipts.keys():
            self.meeting.lose(member, None)

    async def _collect_or_hear(self, expected: set[int]) -> None:
        """As the first leader. Where most have not come in time, it may be me who was away, and they have gone on to
        the next leader: its commit is worth as much as mine."""
        asking = asyncio.create_task(self._ask_late())
        try:
            await self._collect(expected, 0)
            if self.taken is not None or asking.done():
                await asking
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    async def _ask_late(self) -> None:
        """Those of whom I know where to find them."""
        await asyncio.sleep(self.meeting.timeouts.settle_s)
        if not self._is_most(len(self.receipts) + 1):
            late = set(self.group.reducers) - {self.group.me} - self.receipts.keys()
            await run_all(*(self._ask_whether_taken(i) for i in late))

    async def _ask_whether_taken(self, member: int) -> None:
        """Nobody's word is needed twice: the first commit that I hear of is the round's. One that has failed me before
        gets a part of the time only for its first word: it is worth a try, and not another time-out. Nobody gets more
        than half of the time that is left, for what is heard has to be given to the others."""
        meeting, request_s = self.meeting, self.meeting.timeouts.request_s
        n_parts, channel = len(meeting.parts), None
        whole_s, first_s = (self.ends_s - now_s()) / 2, request_s
        if member in meeting.lost:
            whole_s, first_s = min(request_s, whole_s), request_s / HEARTBEATS
        try:
            async with deadline(whole_s):
                async with deadline(first_s):
                    channel = await meeting.open(member)
                    ask = AskCommit(round_id=self.group.round_id)
                    answer: Eta | Commit | No = await channel.request(ask, Eta, Commit, No)
                while isinstance(answer, Eta):
                    answer = await channel.receive(Eta, Commit, No, timeout_s=request_s)
        except asyncio.TimeoutError:
            meeting.lose(member, None)
        except RemoteError as error:
            meeting.lose(member, error)
        else:
            if isinstance(answer, Commit) and len(answer.part_hashes) == len(answer.holders) == n_parts:
                if self.taken is None:
                    self.taken = Commit(part_hashes=answer.part_hashes, holders=[member] * n_parts)
                if self.taken.part_hashes == answer.part_hashes:
                    self.took.add(member)
                meeting.changed.ring()
        finally:
            if channel is not None:
                channel.close()

    # -- serving -----------------------------------------------------------------------------------------------------

    async def serve(self, channel: Channel, message: Contribute | Receipt | AskPart | AskCommit) -> None:
        """A member's stream in this round."""
        member = self.meeting.index_of(channel.peer_id)
        self.meeting.count(channel)
        if isinstance(message, Contribute):
            butterfly = await self._find_butterfly(channel, message.number)
            if butterfly is None:
                await channel.send(No(reason="the round is over"))
            else:
                await butterfly.on_contribute(channel, member)
        elif isinstance(message, Receipt):
            await self._on_receipt(channel, member, message)
        elif isinstance(message, AskPart):
            await self._on_ask_part(channel, message)
        else:
            await self._on_ask_commit(channel, member)

    async def _find_butterfly(self, channel: Channel, number: int) -> Butterfly | None:
        """A member may have heard of it a moment before me."""
        if number >= len(self.group.members):
            raise Misbehaved(channel.peer_id, f"contributes to butterfly {number} of a round")
        deadline_s = now_s() + self.meeting.timeouts.request_s
        while number not in self.butterflies:
            if self.meeting.over or now_s() >= deadline_s:
                return None
            await heard(self.meeting.changed.event, deadline_s - now_s())
        return self.butterflies[number]

    async def _on_receipt(self, channel: Channel, member: int, message: Receipt) -> None:
        """A member takes me for the leader. It is told what I decide, as soon as I lead and have decided."""
        meeting = self.meeting
        try:
            while True:
                if not self._is_sound(message):
                    raise Misbehaved(channel.peer_id, "sends a receipt that does not fit the round")
                self.receipts[member] = message
                meeting.changed.ring()
                answer = await self._answer(channel, member, message.number)
                await channel.send(answer)
                if not isinstance(answer, Again):
                    break
                patience_s = meeting.timeouts.reduced_part_s + meeting.timeouts.settle_s
                message = await channel.receive(Receipt, timeout_s=patience_s)
            if isinstance(answer, Commit):
                await channel.receive(Took, timeout_s=meeting.timeouts.request_s)
                self.took.add(member)
                meeting.changed.ring()
        except RemoteError as error:
            self.receipts.pop(member, None)
            meeting.lose(member, error)
            raise

    def _is_sound(self, receipt: Receipt) -> bool:
        """Only a leader begins butterflies: the first one knows them all, those after it at least how many there may
        be. A number that never was would use up those that are left."""
        numbers = max(self.butterflies) if self.group.leader == self.group.me else len(self.group.members) - 1
        return (
            self.group.me in self.group.reducers
            and len(receipt.part_hashes) == len(self.meeting.parts)
            and receipt.number <= numbers
        )

    async def _answer(self, channel: Channel, member: int, number: int) -> Again | Commit | No:
        """What a member with a receipt of butterfly ``number`` is told; a word from time to time until then."""
        meeting = self.meeting
        next_word_s = now_s() + meeting.timeouts.request_s / HEARTBEATS
        while True:
            changed, answer = meeting.changed.event, self.answer
            if isinstance(answer, Again):
                if answer.number > number and member in answer.members:
                    return answer
            elif answer is not None:
                return answer
            elif meeting.over:
                return self.taken or No(reason="the round is over")
            next_word_s = await self._keep_waiting(channel, changed, next_word_s)

    async def _keep_waiting(self, channel: Channel, changed: asyncio.Event, next_word_s: float) -> float:
        """Until something has changed, or it is time for a word to who waits for an answer. When the next one is due,
        on the loop's clock."""
        await heard(changed, max(next_word_s - now_s(), 0.0))
        if now_s() < next_word_s:
            return next_word_s
        every_s = self.meeting.timeouts.request_s / HEARTBEATS
        await channel.send(Eta(eta_s=every_s))
        return now_s() + every_s

    async def _on_ask_part(self, channel: Channel, message: AskPart) -> None:
        """A member misses a part that I said I hold."""
        part = self.meeting.parts[message.part] if message.part < len(self.meeting.parts) else None
        if part is None or part.hash != message.hash:
            await channel.send(No(reason="not held"))
            return
        await channel.send(Size(size_bytes=len(part.data)))
        await self.meeting.send_part(channel, part)

    async def _on_ask_commit(self, channel: Channel, member: int) -> None:
        """A later leader asks: the ones before it have failed, as it sees it. Answered when I see it so, too."""
        if member not in self.group.reducers:
            raise Misbehaved(channel.peer_id, "asks for a commit, and cannot lead")
        meeting, next_word_s = self.meeting, now_s()
        while True:
            changed = meeting.changed.event
            if self.taken is not None or meeting.over or self.place >= self.group.reducers.index(member):
                await channel.send(self.taken or No(reason="no commit has come"))
                return
            next_word_s = await self._keep_waiting(channel, changed, next_word_s)


def choose_parts(held: Mapping[int, Sequence[bytes]], n_parts: int) -> tuple[list[bytes], list[int]]:
    """The bytes of every part, by hash, and who holds them: what most hold, the smaller hash where that is even. Empty
    where nobody holds anything. ``held``: member -> its receipt."""
    chosen: list[bytes] = []
    holders: list[int] = []
    for part in range(n_parts):
        counts = Counter(hashes[part] for hashes in held.values() if hashes[part])
        if len(counts) > 1:
            log.warning("part %d: its reducer sent different bytes to different members", part)
        wanted = min(counts, key=lambda candidate: (-counts[candidate], candidate), default=b"")
        chosen.append(wanted)
        holders.append(min((member for member, hashes in held.items() if hashes[part] == wanted), default=0))
    return chosen, holders
