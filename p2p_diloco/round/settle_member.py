"""One member of a round: it reduces, gives its receipt to a leader, fetches what it misses, and signs one commit.

A member holds to one leader at a time, in the order of ``Group.reducers``, and never goes back to one that it has given
up. It signs one commit in a round, and only when it holds all of its parts. When a later leader asks, the member tells
the commit that it has signed, or denies it as soon as it has given up all leaders before that one. It applies what is
certified, whether it has signed that or not.

What it says and answers is here; whether a word fits the round is decided in ``settle_decide``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

from p2p_diloco.core.certificate import Certificate, Taken, check_signatures
from p2p_diloco.core.errors import Misbehaved, Refused, RemoteError, Silent
from p2p_diloco.core.update import Update, in_most_parts
from p2p_diloco.core.waiting import deadline, heard, now_s
from p2p_diloco.round.butterfly import Butterfly, run_all
from p2p_diloco.round.meeting import Meeting
from p2p_diloco.round.outcome import Missed, Settled
from p2p_diloco.round.settle_ballot import certifies
from p2p_diloco.round.settle_decide import (
    again_fits,
    answer_to_later_leader,
    commit_fits,
    objection_to,
)
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.message import Message
from p2p_diloco.wire.messages import Again, AskPart, Certifies, Commit, Eta, No, Receipt, Size, Took, TookBefore

log = logging.getLogger(__name__)
M = TypeVar("M", bound=Message)
T = TypeVar("T")

COULD_NOT_FETCH = "the round committed, but parts of the update could not be fetched"
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
        self.taken: TookBefore | None = None
        """The commit that I have signed. There is never another one in this round."""
        self.settled: Settled | None = None
        """What the round has come to, as soon as I know that it is certified."""
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
        try:
            async with deadline(self.left_s() / 2):
                await butterfly.run()
        except asyncio.TimeoutError:
            for reducer in butterfly.owing():
                self.meeting.lose(reducer, None)

    # -- with a leader -----------------------------------------------------------------------------------------------

    async def follow(self, leader: int) -> Settled | Missed | None:
        """Gives my receipt to a leader, signs its commit, and returns the update with its certificate. None when the
        leader fails me before that, or most do not sign: the next one leads."""
        meeting = self.meeting
        try:
            channel = await meeting.open(leader)
            try:
                commit = await self._ask_commit(channel)
                if isinstance(commit, No):
                    return Missed(reason="failed", detail=commit.reason)
                return await self._take(channel, commit, leader)
            finally:
                channel.close()
        except RemoteError as error:
            meeting.lose(leader, error)
            return None

    async def _ask_commit(self, channel: Channel) -> Commit | No:
        """Returns a leader's last word, after as many butterflies as it asks for. Misbehaved when a word of it does not
        fit the round."""
        meeting, group_size, number = self.meeting, len(self.group.members), max(self.butterflies)
        while True:
            hashes, round_id = meeting.hashes(), self.group.round_id
            await channel.send(Receipt(round_id=round_id, number=number, part_hashes=hashes, state=meeting.state))
            answer: Again | Commit | No = await self._hear(channel, Again, Commit)
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

    async def _hear(self, channel: Channel, *kinds: type[M]) -> M | No:
        """Returns a leader's next word but any Eta. Silent when none comes for ``Timeouts.request_s``, or only promises
        do for LEADERS_SHARE of the time that the round has left."""
        request_s = self.meeting.timeouts.request_s
        try:
            async with deadline(self.left_s() * LEADERS_SHARE):
                answer: Eta | M | No = await channel.receive(Eta, *kinds, No, timeout_s=request_s)
                while isinstance(answer, Eta):
                    answer = await channel.receive(Eta, *kinds, No, timeout_s=request_s)
                return answer
        except asyncio.TimeoutError:
            raise Silent(channel.peer_id, "promises a word, and does not come to it") from None

    # -- with a commit -----------------------------------------------------------------------------------------------

    async def _take(self, channel: Channel, commit: Commit, leader: int) -> Settled | Missed:
        """Fetches what I miss of a commit, signs it if I may, and waits until it is certified. Refused when it is
        not, whether I have signed it or not: the next leader may do better, and all members think the same of this one.
        It is not to blame, for a reducer may have sent it something else."""
        objection = self.objection(commit)
        update = None if objection else await self._telling(channel, self.complete(commit, leader))
        if update is None and not objection:
            await channel.send(No(reason="parts of it do not come"))
            return Missed(reason="behind", detail=COULD_NOT_FETCH)
        word = No(reason=objection) if objection else self.sign(commit)
        await channel.send(word)
        answer = await self._hear(channel, Certifies)
        if isinstance(answer, No):
            why = word.reason if isinstance(word, No) else answer.reason
            raise Refused(channel.peer_id, f"commits what most do not sign: {why}")
        return await self.certify(commit, answer, leader)

    def sign(self, commit: Commit) -> Took | No:
        """Returns my signature over a commit that I hold all of and do not object to; No when I have signed another one
        in this round."""
        taken = self.taken
        if taken is None:
            signature = self.what_is_taken(commit).sign(self.meeting.identity)
            taken = TookBefore(part_hashes=commit.part_hashes, state=commit.state, signature=signature)
            self.taken = taken
            self.meeting.changed.ring()
        if (taken.part_hashes, taken.state) != (commit.part_hashes, commit.state):
            return No(reason="I have signed another commit in this round")
        return Took(signature=taken.signature)

    def objection(self, commit: Commit) -> str:
        """Returns what speaks against signing a commit; empty where nothing does."""
        objection = objection_to(commit, reduced=self.meeting.reduced, state=self.meeting.state)
        if objection:
            log.warning("outer step %d: not signed: %s", self.group.step, objection)
        return objection

    def what_is_taken(self, commit: Commit) -> Taken:
        """Returns what is signed of a commit, all of which I hold."""
        link = self.group.header(commit.part_hashes).link
        full = in_most_parts([part.mask for part in self.meeting.parts if part is not None])
        return Taken(round_id=self.group.round_id, link=link, full=full, state=commit.state)

    async def certify(self, commit: Commit, certifies: Certifies, source: int) -> Settled | Missed:
        """Takes in what certifies a commit, and returns its update, after fetching the parts that I do not hold.
        Misbehaved of ``source``, a member, when it is not certified so."""
        peer_id, link = self.group.members[source].peer_id, self.group.header(commit.part_hashes).link
        if len(certifies.members) != len(certifies.signatures):
            raise Misbehaved(peer_id, "sends a certificate that does not fit the round")
        certificate = Certificate(
            roster=self.group.sealed,
            full=certifies.full,
            state=commit.state,
            signatures=tuple(zip(certifies.members, certifies.signatures)),
            witness=certifies.witness,
        )
        try:
            check_signatures(certificate, self.group, link, self.meeting.owner)
        except ValueError as error:
            raise Misbehaved(peer_id, f"sends {error}") from error
        update = await self.complete(commit, source)
        if update is None:
            return Missed(reason="behind", detail=COULD_NOT_FETCH)
        if certificate.full != in_most_parts([part.mask for part in update.parts]):
            raise Misbehaved(peer_id, "sends a certificate that names other contributors than the update has")
        self.settled = Settled(update=update, certificate=certificate)
        self.meeting.changed.ring()
        return self.settled

    async def _telling(self, channel: Channel, work: Coroutine[Any, Any, T]) -> T:
        """Does what may take a while; the other side hears every ``Timeouts.heartbeat_s`` that I am still here."""
        task, every_s = asyncio.create_task(work), self.meeting.timeouts.heartbeat_s
        try:
            while not task.done():
                await asyncio.wait((task,), timeout=every_s)
                if not task.done():
                    await channel.send(Eta(eta_s=every_s))
            return task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def complete(self, commit: Commit, leader: int) -> Update | None:
        """Returns the update of a commit, after fetching the parts that I do not hold. None when some do not come."""
        await self.fetch_missing(commit, leader)
        held = [part for part in self.meeting.parts if part is not None]
        if [part.hash for part in held] != commit.part_hashes:
            return None
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
            others = [i for i in wanted_from if i != self.meeting.me]
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
                    received, reduction = await meeting.receive_part(channel, part, meeting.timeouts.request_s)
                finally:
                    channel.close()
                if received.hash != wanted:
                    raise Misbehaved(channel.peer_id, f"sends other bytes for part {part} than it said that it holds")
                if objection := meeting.objection(part):
                    log.warning("outer step %d: the group holds what I refuse: %s", self.group.step, objection)
                    meeting.refused.add(wanted)
                    continue
                meeting.hold(part, received, reduction)
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
        await self.meeting.send_part(channel, message.part, part)

    async def on_ask_commit(self, channel: Channel, asker: int) -> None:
        """Tells a later leader which commit I have signed, as soon as ``answer_to_later_leader`` has an answer. Until
        then it hears from time to time that I am still here."""
        if asker not in self.group.reducers:
            raise Misbehaved(channel.peer_id, "asks for a commit, and cannot lead")
        meeting, next_word_s = self.meeting, now_s()
        asker_place = self.group.reducers.index(asker)
        while True:
            changed = meeting.changed.event
            if self.settled is not None:
                await channel.send(self.settled.commit(meeting.me))
                await channel.send(certifies(self.settled.certificate))
                return
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
