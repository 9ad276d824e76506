"""Lies of the members of a round: what one contributes, what a reducer sends back, whom a leader tells what."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np

from p2p_diloco.core.codec import Vector
from p2p_diloco.core.roster import open_readiness
from p2p_diloco.core.update import Part
from p2p_diloco.round.outcome import Missed, Settled
from p2p_diloco.round.settle import Settlement
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.message import Message
from p2p_diloco.wire.messages import Again, AskPart, Commit, Roster, Size
from tests.support.lying import FOR_EVER_S, IDLES_S, Liar, in_rounds, override

TENFOLD = np.float32(-10)
HUGE = np.float32(1e30)

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
            largest = liar.sim.peer.manifest.spec.max_weight_tokens
            return await real(largest if liar.lying() else weight, **rest)

        return found

    override(liar.sim.peer.matchmaker, "find_group", find)


def stale(liar: Liar) -> None:
    """It contributes the same in every round: what it had learned in the first one."""
    first: dict[int, bytes] = {}

    def lie(_: Liar, settlement: Settlement) -> None:
        def contribution(real: Callable[[int], bytes]) -> Callable[[int], bytes]:
            return lambda part: first.setdefault(part, real(part))

        override(settlement.meeting, "contribution", contribution)

    in_rounds(lie)(liar)


# -- reducers ----------------------------------------------------------------------------------------------------------


def reduces(change: Callable[[Vector], Vector]) -> Callable[[Liar], None]:
    """The same false mean to everybody."""

    def lie(_: Liar, settlement: Settlement) -> None:
        meeting, first = settlement.meeting, settlement.member.butterflies[0]
        mine = set(first._parts_of(first.me))

        def hold(real: Callable[[int, Part], None]) -> Callable[[int, Part], None]:
            def held(part: int, reduced: Part) -> None:
                if part in mine:
                    mine.remove(part)
                    values = change(meeting.grid.decode(part, reduced.data))
                    reduced = Part(mask=reduced.mask, data=meeting.grid.encode(values))
                real(part, reduced)

            return held

        override(meeting, "hold", hold)

    return in_rounds(lie)


reduces_tenfold = reduces(lambda mean: TENFOLD * mean)
reduces_to_zeros = reduces(np.zeros_like)


@in_rounds
def reduces_differently(_: Liar, settlement: Settlement) -> None:
    """One mean to every second member, another one to the others."""
    meeting = settlement.meeting

    def send_part(real: Callable[[Channel, Part], Any]) -> Callable[[Channel, Part], Any]:
        async def sent(channel: Channel, part: Part) -> None:
            if meeting.index_of(channel.peer_id) % 2 and part in meeting.parts:
                index = meeting.parts.index(part)
                other = meeting.grid.encode(-meeting.grid.decode(index, part.data))
                part = Part(mask=part.mask, data=other)
            await real(channel, part)

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

    def give(real: Callable[[Commit], Any]) -> Callable[[Commit], Any]:
        async def given(commit: Commit) -> Settled | Missed:
            meeting = settlement.meeting
            for part in range(len(meeting.parts)):
                meeting.parts[part] = invented_part(settlement, part)
            me, hashes = settlement.meeting.me, meeting.hashes()
            settlement.member.taken = Commit(part_hashes=hashes, holders=[me] * len(hashes))
            outcome: Settled | Missed = await real(settlement.member.taken)
            return outcome

        return given

    override(settlement.leader, "_give", give)


@in_rounds
def commits_twice(_: Liar, settlement: Settlement) -> None:
    """A leader that gives every second member another commit."""
    meeting, group, others = settlement.meeting, settlement.group, list[Part]()

    def decided(real: Callable[..., Any]) -> Callable[..., Any]:
        async def told(channel: Channel, sender: int, number: int) -> Message:
            answer: Message = await real(channel, sender, number)
            if not isinstance(answer, Commit) or sender % 2 == settlement.meeting.me % 2:
                return answer
            if not others:
                others.append(invented_part(settlement, 0))
            hashes, holders = [others[0].hash, *answer.part_hashes[1:]], [settlement.meeting.me, *answer.holders[1:]]
            return Commit(part_hashes=hashes, holders=holders)

        return told

    def on_ask_part(real: Callable[..., Any]) -> Callable[..., Any]:
        async def answered(channel: Channel, message: AskPart) -> None:
            if not others or message.hash != others[0].hash:
                await real(channel, message)
                return
            await channel.send(Size(size_bytes=len(others[0].data)))
            await meeting.send_part(channel, others[0])

        return answered

    override(settlement.leader, "_decided", decided)
    override(settlement.member, "on_ask_part", on_ask_part)


@in_rounds
def commits_and_asks_again(_: Liar, settlement: Settlement) -> None:
    """A-Again-B: a first leader that gives its commit to one member, asks the others to reduce everything again, and is
    silent from then on."""
    leader, meeting, group = settlement.leader, settlement.meeting, settlement.group
    committing = asyncio.Event()

    def decided(real: Callable[..., Any]) -> Callable[..., Any]:
        async def told(channel: Channel, sender: int, number: int) -> Message:
            if number:
                await asyncio.sleep(FOR_EVER_S)
            answer: Message = await real(channel, sender, number)
            others = sorted(leader.receipts.keys() - {settlement.meeting.me})
            if not committing.is_set() or len(others) < 2 or sender == others[0]:
                return answer
            return Again(number=1, members=others[1:], parts=list(range(len(meeting.parts))))

        return told

    def give(real: Callable[[Commit], Any]) -> Callable[[Commit], Any]:
        async def given(commit: Commit) -> Settled | Missed:
            if settlement.member.place or group.leader != settlement.meeting.me:
                later: Settled | Missed = await real(commit)
                return later
            committing.set()
            leader.decision = commit
            meeting.changed.ring()
            await asyncio.sleep(IDLES_S)
            return Missed(reason="failed", detail="silent")

        return given

    async def silent(*_: Any) -> None:
        await asyncio.sleep(FOR_EVER_S)

    override(leader, "_decided", decided)
    override(leader, "_give", give)
    override(settlement.member, "on_ask_commit", lambda real: silent)


def sends_two_rosters(liar: Liar) -> None:
    """A leader that sends one half of those that are ready a roster, and the other half another one."""
    gatherings = liar.sim.peer.matchmaker.gatherings

    def half(roster: Roster, who: int) -> Roster:
        """The liar is in both: its readiness is."""
        others = [one for one in roster.members if open_readiness(one).peer_id != liar.me]
        kept = set(others[who::2])
        return Roster(members=[one for one in roster.members if one in kept or one not in others], absent=roster.absent)

    def join(real: Callable[..., Any]) -> Callable[..., Any]:
        async def joined(channel: Channel, head: bytes, sealed: bytes) -> None:
            def send(really: Callable[[Message], Any]) -> Callable[[Message], Any]:
                async def sent(message: Message) -> None:
                    if isinstance(message, Roster) and liar.lying() and len(message.members) > 3:
                        message = next(one for one in map(half, [message] * 2, (0, 1)) if sealed in one.members)
                    await really(message)

                return sent

            override(channel, "send", send)
            await real(channel, head, sealed)

        return joined

    def lead(real: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
        async def led(sealed: bytes) -> Any:
            answer = await real(sealed)
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
