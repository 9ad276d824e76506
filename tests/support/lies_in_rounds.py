"""Lies of the members of a round: what one contributes, what a reducer sends back, whom a leader tells what."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from p2p_diloco.core.certificate import Taken, certificate_of
from p2p_diloco.core.codec import Vector
from p2p_diloco.core.digest import digest
from p2p_diloco.core.group import seal_roster
from p2p_diloco.core.roster import open_readiness
from p2p_diloco.core.signed_part import Inputs, Place, Reduction
from p2p_diloco.core.update import Part, Update, in_most_parts
from p2p_diloco.core.waiting import heard, now_s
from p2p_diloco.round.meeting import Meeting
from p2p_diloco.round.outcome import Missed, Settled
from p2p_diloco.round.settle import Settlement
from p2p_diloco.round.settle_ballot import Ballot, certifies
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.message import Message
from p2p_diloco.wire.messages import No, Size
from p2p_diloco.wire.proof_messages import AskOther
from p2p_diloco.wire.round_messages import Again, AskPart, Commit, Eta, Roster, Took
from tests.support.lying import FOR_EVER_S, IDLES_S, Liar, in_rounds, override

TENFOLD = np.float32(-10)
HUGE = np.float32(1e30)
BALLOT_S = 5.0
"""So long one that commits twice waits for the second ballot."""

# -- contributions -----------------------------------------------------------------------------------------------------


def contributes(change: Callable[[Vector], Vector]) -> Callable[[Liar], None]:
    def lie(_: Liar, settlement: Settlement) -> None:
        grid = settlement.meeting.grid

        def contribution(real: Callable[[int], bytes]) -> Callable[[int], bytes]:
            return lambda part: grid.encode(change(grid.decode(part, real(part))))

        override(settlement.meeting, "contribution", contribution)

    return in_rounds(lie)


flipped = contributes(lambda values: -values)
hundredfold = contributes(lambda values: np.float32(100) * values)
huge = contributes(lambda values: np.full_like(values, HUGE))


def heavy(liar: Liar) -> None:
    """A flipped contribution at the largest weight."""
    claims_weight(liar)
    flipped(liar)


def claims_weight(liar: Liar) -> None:
    def find(real: Callable[..., Any]) -> Callable[..., Any]:
        async def found(weight: int, **rest: Any) -> Any:
            largest = liar.peer.manifest.spec.max_weight_tokens
            return await real(largest if liar.lying() else weight, **rest)

        return found

    override(liar.peer.matchmaker, "find_group", find)


def stale(liar: Liar) -> None:
    """It contributes the same in every round: what it had learned in the first one."""
    first: dict[int, bytes] = {}

    def lie(_: Liar, settlement: Settlement) -> None:
        def contribution(real: Callable[[int], bytes]) -> Callable[[int], bytes]:
            return lambda part: first.setdefault(part, real(part))

        override(settlement.meeting, "contribution", contribution)

    in_rounds(lie)(liar)


# -- reducers ----------------------------------------------------------------------------------------------------------


def signed_by(meeting: Meeting, index: int, part: Part) -> Reduction:
    """What a liar signs that says to have reduced a part."""
    place, held = Place(round_id=meeting.group.round_id, number=0, part=index), meeting.reductions[index]
    inputs = Inputs.of({}) if held is None else held.inputs
    return Reduction.of(place, part, inputs, meeting.me, meeting.identity)


async def send_signed(meeting: Meeting, channel: Channel, index: int, part: Part) -> None:
    """As an honest reducer sends a part of its own."""
    reduction = signed_by(meeting, index, part)
    await channel.send_frame(bytes([len(part.mask)]), part.mask, part.data, reduction.to_bytes())


def reduces(
    change: Callable[[Vector], Vector], lies_about: Callable[[bytes, int], bool] = lambda head, part: True
) -> Callable[[Liar], None]:
    """The same false mean to everybody, in those of its parts that it ``lies_about``."""

    def lie(_: Liar, settlement: Settlement) -> None:
        meeting, first = settlement.meeting, settlement.member.butterflies[0]
        mine = {part for part in first._parts_of(first.me) if lies_about(settlement.group.head, part)}

        def hold(real: Callable[[Place, Part, Inputs], None]) -> Callable[[Place, Part, Inputs], None]:
            def held(place: Place, reduced: Part, inputs: Inputs) -> None:
                if place.part in mine:
                    mine.remove(place.part)
                    values = change(meeting.grid.decode(place.part, reduced.data))
                    reduced = Part(mask=reduced.mask, data=meeting.grid.encode(values))
                real(place, reduced, inputs)

            return held

        override(meeting, "hold_own", hold)

    return in_rounds(lie)


reduces_tenfold = reduces(lambda mean: TENFOLD * mean)
reduces_to_zeros = reduces(np.zeros_like)
reduces_a_quarter_to_zeros = reduces(np.zeros_like, lambda head, part: digest(head, bytes([part]))[0] % 4 == 0)


def with_a_flipped_bit(mean: Vector) -> Vector:
    """The exponent of the first value that is not zero: what faulty memory does to an honest peer."""
    bits = mean.copy().view(np.uint32)
    bits[np.flatnonzero(mean)[:1]] ^= np.uint32(1 << 24)
    return bits.view(np.float32)


flips_a_bit = reduces(with_a_flipped_bit)


@in_rounds
def masks_away(_: Liar, settlement: Settlement) -> None:
    """A reducer that hears the others' contributions, and takes only its own and those of every second member."""
    meeting = settlement.meeting
    for butterfly in settlement.member.butterflies.values():
        for sender in butterfly.intake.due[::2]:
            butterfly.intake.senders[sender].gone = True
    meeting.changed.ring()


@in_rounds
def reduces_differently(_: Liar, settlement: Settlement) -> None:
    """One mean to every second member, another one to the others."""
    meeting = settlement.meeting

    def send_part(real: Callable[..., Any]) -> Callable[..., Any]:
        async def sent(channel: Channel, part: Part, reduction: Reduction) -> None:
            if meeting.index_of(channel.peer_id) % 2 and part in meeting.parts:
                index = meeting.parts.index(part)
                other = meeting.grid.encode(-meeting.grid.decode(index, part.data))
                await send_signed(meeting, channel, index, Part(mask=part.mask, data=other))
                return
            await real(channel, part, reduction)

        return sent

    override(meeting, "send_part", send_part)


# -- leaders -----------------------------------------------------------------------------------------------------------


def invented_part(settlement: Settlement, part: int) -> Part:
    """Something that nobody has reduced, for a part that is held."""
    meeting, held = settlement.meeting, settlement.meeting.parts[part]
    assert held is not None
    values = TENFOLD * meeting.grid.decode(part, held.data)
    return Part(mask=held.mask, data=meeting.grid.encode(values))


@in_rounds
def commits_invented(_: Liar, settlement: Settlement) -> None:
    """A leader that commits parts of its own making."""
    meeting = settlement.meeting

    def give(real: Callable[[Commit], Any]) -> Callable[[Commit], Any]:
        async def given(commit: Commit) -> Settled | Missed:
            for part in range(len(meeting.parts)):
                invented = meeting.parts[part] = invented_part(settlement, part)
                meeting.reductions[part] = signed_by(meeting, part, invented)
            hashes = meeting.hashes()
            holders = [meeting.me] * len(hashes)
            outcome: Settled | Missed = await real(Commit(part_hashes=hashes, holders=holders, state=commit.state))
            return outcome

        return given

    override(settlement.leader, "_give", give)


def commit_of(meeting: Meeting, parts: Sequence[Part], state: bytes) -> Commit:
    """A commit of these parts, all of which the liar has."""
    return Commit(part_hashes=[part.hash for part in parts], holders=[meeting.me] * len(parts), state=state)


def ballot_on(meeting: Meeting, parts: Sequence[Part], state: bytes) -> Ballot:
    """A ballot on the commit of these parts, which the liar has signed."""
    update = Update(header=meeting.group.header([part.hash for part in parts]), parts=tuple(parts))
    full = in_most_parts([part.mask for part in parts])
    taken = Taken(round_id=meeting.group.round_id, link=update.header.link, full=full, state=state)
    ballot = Ballot(meeting=meeting, taken=taken, update=update)
    ballot.count(meeting.me, taken.sign(meeting.identity))
    return ballot


@dataclass(eq=False)
class Twin:
    """The second commit of a leader that gives two: another mean of a part that it has reduced."""

    settlement: Settlement
    part: int
    first: Part | None = None
    """What the others get."""
    second: Part | None = None
    commit: Commit | None = None
    ballot: Ballot | None = None

    def is_for(self, member: int) -> bool:
        """Every second member."""
        return member % 2 != self.settlement.meeting.me % 2

    def of(self, part: Part) -> Part:
        if self.second is None:
            grid = self.settlement.meeting.grid
            self.first = part
            self.second = Part(mask=part.mask, data=grid.encode(-grid.decode(self.part, part.data)))
        return self.second

    def begin(self, commit: Commit) -> Commit:
        """Both commits; the first one is returned."""
        meeting = self.settlement.meeting
        held = [part for part in meeting.parts if part is not None]
        if self.first is None or self.second is None:
            return commit
        held[self.part] = self.second
        self.commit, self.ballot = commit_of(meeting, held, commit.state), ballot_on(meeting, held, commit.state)
        meeting.parts[self.part] = held[self.part] = self.first
        return commit_of(meeting, held, commit.state)


@in_rounds
def commits_twice(_: Liar, settlement: Settlement) -> None:
    """A leader that gives every second member another commit, signs both, and certifies both as far as it can: they
    differ in a part that it has reduced, of which these members got another mean."""
    meeting, leader = settlement.meeting, settlement.leader
    mine = settlement.member.butterflies[0]._parts_of(meeting.me)
    if settlement.group.leader != meeting.me or not mine:
        return
    twin = Twin(settlement, mine[0])

    def send_part(real: Callable[..., Any]) -> Callable[..., Any]:
        async def sent(channel: Channel, part: Part, reduction: Reduction) -> None:
            if part in (meeting.parts[twin.part], twin.first):
                part = twin.of(part) if twin.is_for(meeting.index_of(channel.peer_id)) else part
                await send_signed(meeting, channel, twin.part, part)
                return
            await real(channel, part, reduction)

        return sent

    def give(real: Callable[[Commit], Any]) -> Callable[[Commit], Any]:
        return lambda commit: real(twin.begin(commit))

    def decided(real: Callable[..., Any]) -> Callable[..., Any]:
        async def told(channel: Channel, sender: int, number: int) -> Message:
            answer: Message = await real(channel, sender, number)
            return twin.commit if isinstance(answer, Commit) and twin.commit and twin.is_for(sender) else answer

        return told

    def hear_signature(real: Callable[..., Any]) -> Callable[..., Any]:
        async def heard_it(channel: Channel, sender: int) -> None:
            if twin.ballot is None or leader.ballot is None or not twin.is_for(sender):
                await real(channel, sender)
                return
            word: Eta | Took | No = await channel.receive(Eta, Took, No, timeout_s=meeting.timeouts.request_s)
            twin.ballot.hear(sender, word) if not isinstance(word, Eta) else None
            leader.ballot.answered.add(sender)

        return heard_it

    def last_word(real: Callable[..., Any]) -> Callable[..., Any]:
        async def told(channel: Channel) -> Message:
            if twin.ballot is None or not twin.is_for(meeting.index_of(channel.peer_id)):
                word: Message = await real(channel)
                return word
            until_s = now_s() + BALLOT_S
            while not twin.ballot.has_most and now_s() < until_s:
                await heard(meeting.changed.event, until_s - now_s())
            if not twin.ballot.has_most:
                return No(reason="most of the group did not sign the update")
            return certifies(certificate_of(settlement.group, twin.ballot.taken, twin.ballot.signatures))

        return told

    def on_ask_part(real: Callable[..., Any]) -> Callable[..., Any]:
        async def answered(channel: Channel, message: AskPart) -> None:
            if twin.second is None or message.hash != twin.second.hash:
                await real(channel, message)
                return
            await channel.send(Size(size_bytes=len(twin.second.data)))
            await send_signed(meeting, channel, twin.part, twin.second)

        return answered

    override(meeting, "send_part", send_part)
    override(leader, "_give", give)
    override(settlement.leader_answers, "_decided", decided)
    override(settlement.leader_answers, "_hear_signature", hear_signature)
    override(settlement.leader_answers, "_last_word", last_word)
    override(settlement.member_answers, "on_ask_part", on_ask_part)


@in_rounds
def decides_nothing(_: Liar, settlement: Settlement) -> None:
    """A leader that comes to no decision, while those that wait for it hear that it is still there."""

    async def undecided() -> None:
        await asyncio.sleep(FOR_EVER_S)

    override(settlement.leader, "lead", lambda real: undecided)


@in_rounds
def tells_no_other(_: Liar, settlement: Settlement) -> None:
    """A member that does all that is its own, and leaves those without an answer that ask about another update."""

    async def say_nothing(channel: Channel, message: AskOther) -> None:
        await asyncio.sleep(FOR_EVER_S)

    override(settlement.once, "on_ask_other", lambda real: say_nothing)


@in_rounds
def commits_and_asks_again(_: Liar, settlement: Settlement) -> None:
    """A-Again-B: a first leader that gives its commit to as few members as can certify it, and the certificate to them
    alone. It asks the others to reduce everything again, and is silent from then on."""
    leader, meeting, group, me = settlement.leader, settlement.meeting, settlement.group, settlement.meeting.me
    if group.leader != me:
        return
    committing = asyncio.Event()

    def takers() -> list[int]:
        others = sorted(leader.hearing.receipts.keys() - {me})
        enough = (count for count in range(1, len(others)) if group.is_most({me, *others[:count]}))
        return others[: next(enough, 1)]

    def decided(real: Callable[..., Any]) -> Callable[..., Any]:
        async def told(channel: Channel, sender: int, number: int) -> Message:
            if number:
                await asyncio.sleep(FOR_EVER_S)
            answer: Message = await real(channel, sender, number)
            others = sorted(leader.hearing.receipts.keys() - {me})
            if not committing.is_set() or len(others) < 2 or sender in takers():
                return answer
            again = [member for member in others if member not in takers()]
            return Again(number=1, members=again, parts=list(range(len(meeting.parts))))

        return told

    def give(real: Callable[[Commit], Any]) -> Callable[[Commit], Any]:
        async def given(commit: Commit) -> Settled | Missed:
            held = [part for part in meeting.parts if part is not None]
            leader.ballot = ballot_on(meeting, held, commit.state)
            committing.set()
            leader.decision = commit
            meeting.changed.ring()
            await asyncio.sleep(IDLES_S)
            return Missed(reason="failed", detail="silent")

        return given

    def last_word(real: Callable[..., Any]) -> Callable[..., Any]:
        async def told(channel: Channel) -> Message:
            while leader.ballot is None or not leader.ballot.has_most:
                await meeting.changed.event.wait()
            return certifies(certificate_of(group, leader.ballot.taken, leader.ballot.signatures))

        return told

    async def silent(*_: Any) -> None:
        await asyncio.sleep(FOR_EVER_S)

    override(settlement.leader_answers, "_decided", decided)
    override(leader, "_give", give)
    override(settlement.leader_answers, "_last_word", last_word)
    override(settlement.member_answers, "on_ask_commit", lambda real: silent)


def sends_two_rosters(liar: Liar) -> None:
    """A leader that sends one half of those that are ready a roster, and the other half another one; it signs both."""
    gatherings = liar.peer.matchmaker.gatherings

    def half(roster: Roster, who: int) -> Roster:
        """The liar is in both: its readiness is."""
        others = [one for one in roster.members if open_readiness(one).peer_id != liar.me]
        kept = set(others[who::2])
        members = [one for one in roster.members if one in kept or one not in others]
        sealed = seal_roster(members, roster.absent, liar.peer.identity)
        return Roster(members=members, absent=roster.absent, signature=sealed.signature)

    def join(real: Callable[..., Any]) -> Callable[..., Any]:
        async def joined(channel: Channel, head: bytes, sealed: bytes) -> bool:
            def send(really: Callable[[Message], Any]) -> Callable[[Message], Any]:
                async def sent(message: Message) -> None:
                    if isinstance(message, Roster) and liar.lying() and len(message.members) > 3:
                        message = next(
                            (one for one in map(half, [message] * 2, (0, 1)) if sealed in one.members), message
                        )
                    await really(message)

                return sent

            override(channel, "send", send)
            answered: bool = await real(channel, head, sealed)
            return answered

        return joined

    def lead(real: Callable[[bytes, float], Any]) -> Callable[[bytes, float], Any]:
        async def led(sealed: bytes, alone_s: float) -> Any:
            answer = await real(sealed, alone_s)
            splits = isinstance(answer, Roster) and liar.lying() and len(answer.members) > 3
            return half(answer, 0) if splits else answer

        return led

    override(gatherings, "join", join)
    override(gatherings, "lead", lead)


# -- neither ----------------------------------------------------------------------------------------------------------


@in_rounds
def idle(_: Liar, settlement: Settlement) -> None:
    """A member that is ready, gets into rosters, and is silent in the round."""

    async def nothing(*_: Any) -> None:
        pass

    async def settle() -> Missed:
        await asyncio.sleep(IDLES_S)
        settlement.meeting.over = True
        return Missed(reason="failed", detail="idle")

    async def silent(*_: Any) -> None:
        await asyncio.sleep(FOR_EVER_S)

    override(settlement, "reduce", lambda real: nothing)
    override(settlement, "settle", lambda real: settle)
    override(settlement, "serve", lambda real: silent)
