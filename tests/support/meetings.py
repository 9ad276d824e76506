"""Rounds in memory: honest members, members written by hand that break one rule each, and faults from outside.

What may happen to a member: ``kill``, as SIGKILL, its streams end; ``stop`` and ``resume``, as SIGSTOP and SIGCONT, its
streams neither end nor deliver, and what comes to it waits. ``cut`` parts two members, and nobody else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from p2p_diloco.core.aggregate import AggregateName
from p2p_diloco.core.certificate import Certified, Taken, check_certificate
from p2p_diloco.core.codecs import CodecName, encode
from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.directory import Directory
from p2p_diloco.core.grid import Grid, part_slices
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.recent import LEAST_ROUNDS, Recent
from p2p_diloco.core.records import seal_record
from p2p_diloco.core.signed_part import REDUCTION_BYTES, Contribution, Inputs, Place, Reduction
from p2p_diloco.core.update import Part, Update, bits_of, contributor_mask
from p2p_diloco.core.uplinks import pack_uplinks
from p2p_diloco.core.waiting import Bell, heard, now_s
from p2p_diloco.round.meeting import Meeting
from p2p_diloco.round.outcome import Missed, Settled
from p2p_diloco.round.settle import Settlement
from p2p_diloco.wire.audit_messages import AskContributions
from p2p_diloco.wire.channel import Channel, Writer, run_protocol
from p2p_diloco.wire.message import Message
from p2p_diloco.wire.messages import No, Size
from p2p_diloco.wire.proof_messages import AskOther
from p2p_diloco.wire.round_messages import (
    Again,
    AskCommit,
    AskPart,
    Certifies,
    Commit,
    Contribute,
    Eta,
    Receipt,
    Took,
    TookBefore,
)
from tests.support.builders import NOW_S, OWNER, RUN_ID, DeafWriter, group_of, head, known, ranked, record_of, rules_of
from tests.support.fakes import FakeNetwork, FakeTransport
from tests.support.links import FakeWriter
from tests.support.simloop import SimLoop

PROTOCOL = run_protocol(RUN_ID)
HISTORY = "abc"
TIMEOUTS = Timeouts()
N_PARTS = 6
SMALL_PART_VALUES = 100
OF_A_ROUND = (Contribute, Receipt, AskPart, AskCommit, AskContributions, AskOther)
LONGEST_ROUND_S = 150.0
COMMIT_STARTS = b"\x92\xa6commit"
RECEIPT_STARTS = b"\x92\xa7receipt"


def frame_of(part: Part, reduction: bytes = bytes(REDUCTION_BYTES)) -> bytes:
    """As a reducer sends it; that it has signed nothing shows only where all else is right."""
    return bytes([len(part.mask)]) + part.mask + part.data + reduction


class Losses(list[tuple[int, int, str]]):
    """(who, whom, why), each time a member gives another one up."""

    def by(self, me: int) -> list[tuple[int, str]]:
        return [(member, why) for who, member, why in self if who == me]


@dataclass(eq=False)
class Trouble:
    """Who reads nothing, and which commits were sent."""

    deaf: dict[str, set[str]] = field(default_factory=dict)
    """Peer -> those who read nothing of what it writes."""
    closing: list[tuple[str, str]] = field(default_factory=list)
    """(from, to) of streams that are reset as soon as they are open, each once."""
    closing_s: dict[tuple[str, str], float] = field(default_factory=dict)
    """(from, to) -> so long after a receipt was written the stream of it is reset, once."""
    commits: list[tuple[str, str]] = field(default_factory=list)
    """(from, to) of every commit that was sent."""


@dataclass(eq=False)
class Line:
    """Notes the commits that are sent over it, and is reset after a receipt where that is wanted."""

    trouble: Trouble
    source: str
    target: str
    writer: Writer

    def write(self, data: bytes | memoryview, /) -> None:
        if bytes(data).startswith(COMMIT_STARTS):
            self.trouble.commits.append((self.source, self.target))
        self.writer.write(data)
        if bytes(data).startswith(RECEIPT_STARTS) and isinstance(self.writer, FakeWriter):
            after_s, pipe = self.trouble.closing_s.pop((self.source, self.target), None), self.writer.pipe
            if after_s is not None:
                asyncio.get_running_loop().call_later(after_s, pipe.reset)

    async def drain(self) -> None:
        await self.writer.drain()

    def close(self) -> None:
        self.writer.close()


@dataclass(eq=False)
class Transport(FakeTransport):
    trouble: Trouble = field(default_factory=Trouble)

    async def open(self, peer_id: str, maddrs: list[str], protocol: str) -> Channel:
        channel = await super().open(peer_id, maddrs, protocol)
        if (self.peer_id, peer_id) in self.trouble.closing:
            self.trouble.closing.remove((self.peer_id, peer_id))
            self.network.reset(self.peer_id, peer_id)
        return channel

    def _channel(self, peer_id: str, reader: asyncio.StreamReader, writer: Writer) -> Channel:
        deaf = peer_id in self.trouble.deaf.get(self.peer_id, ())
        return super()._channel(
            peer_id, reader, DeafWriter() if deaf else Line(self.trouble, self.peer_id, peer_id, writer)
        )


def calm_rounds() -> Recent:
    """As many as are needed, in which nobody was waited for."""
    recent = Recent()
    for number in range(LEAST_ROUNDS):
        recent.note_round([0.01] * 3, [0.01] * 3)
        recent.note_answer(bytes([number]), 0.01)
    return recent


@dataclass(eq=False)
class Round:
    """``count`` members in the order of rank; the first that is no client leads and settles. Each has pulled its own
    way, and member i weighs 100 (i + 1). Those in ``by_hand`` do nothing of their own accord. To be made inside the
    loop, with ``grid.PART_VALUES`` at SMALL_PART_VALUES."""

    count: int
    by_hand: tuple[int, ...] = ()
    clients: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()
    unknown: tuple[int, ...] = ()
    """Newcomers: all others are known."""
    idle: tuple[int, ...] = ()
    """Whom the roster gives no share."""
    uplinks: tuple[dict[int, int], ...] = ()
    """Of each: what it says of the uplinks of others; nobody says anything, if empty."""
    recent: Recent = field(default_factory=Recent)
    """What all have seen in earlier rounds."""
    measured: dict[int, int] = field(default_factory=dict)
    """Member -> its uplink, as all have measured it."""
    lapsed: tuple[int, ...] = ()
    """Whom all have lost in an earlier round."""
    codec: CodecName = "int8"
    n: int = (N_PARTS - 1) * SMALL_PART_VALUES + 7
    aggregate: AggregateName = "mean"
    min_group: int = 2
    weights: tuple[int, ...] = ()
    """In place of those."""
    timeouts: Timeouts = TIMEOUTS
    network: FakeNetwork = field(default_factory=FakeNetwork)
    outcomes: dict[int, Settled | Missed] = field(default_factory=dict)
    took_s: dict[int, float] = field(default_factory=dict)
    """Member -> how long the round took at it."""
    killed: set[int] = field(default_factory=set)
    stopped: set[int] = field(default_factory=set)
    failures: list[Exception] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.trouble = Trouble()
        self.members = ranked(head(HISTORY), self.count)
        self.ids = [who.peer_id for who in self.members]
        self.group = group_of(
            self.members,
            HISTORY,
            self.aggregate,
            familiar=self.familiar,
            idle=self.idle,
            weight=self.weights or [100 * (i + 1) for i in range(self.count)],
            client_mode=[i in self.clients for i in range(self.count)],
            dropped=[i in self.dropped for i in range(self.count)],
            uplinks=[
                pack_uplinks(head(HISTORY), {self.ids[other]: uplink for other, uplink in said.items()})
                for said in self.uplinks or [{}] * self.count
            ],
        )
        self.round_id = self.group.round_id
        self.slices = part_slices(self.n)
        self.theta = np.random.default_rng(0).standard_normal(self.n).astype(np.float32)
        # No two are multiples of one vector: a codec's rounding would be the same for all of them.
        pulls = np.random.default_rng(1).standard_normal((self.count, self.n)).astype(np.float32)
        self.locals = [self.theta - pull for pull in pulls]
        self.transports = [
            Transport(self.network, peer_id, self.timeouts, trouble=self.trouble) for peer_id in self.ids
        ]
        self.honest = [i for i in range(self.count) if i not in self.by_hand]
        self.settlements = {i: Settlement(self._meeting(i)) for i in self.honest}
        for i, settlement in self.settlements.items():
            self.transports[i].handlers[PROTOCOL] = server(settlement)
        self.changed = Bell()

    @property
    def familiar(self) -> list[Identity]:
        return [who for i, who in enumerate(self.members) if i not in self.unknown]

    def _meeting(self, i: int) -> Meeting:
        directory = Directory(self.ids[i], RUN_ID)
        for who in self.members:
            directory.learn(seal_record(record_of(who, HISTORY, life_s=900.0), who), NOW_S)
        return Meeting(
            group=self.group,
            identity=self.members[i],
            owner=OWNER.peer_id,
            transport=self.transports[i],
            protocol=PROTOCOL,
            directory=directory,
            timeouts=self.timeouts,
            grid=Grid(n=self.n, codec=self.codec),
            theta=self.theta,
            local=self.locals[i],
            min_group=self.min_group,
            lapsed=frozenset(self.ids[j] for j in self.lapsed),
            recent=self.recent,
            uplinks={self.ids[j]: uplink for j, uplink in self.measured.items()},
        )

    async def run(self, *by_hand: Awaitable[None]) -> None:
        """Until everybody who lives has an outcome; those who are stopped are resumed when the others are done."""

        async def one(i: int) -> None:
            settlement, began_s = self.settlements[i], now_s()
            try:
                await settlement.reduce()
                self.outcomes[i] = await settlement.settle()
            except Exception as error:
                self.failures.append(error)
            self.took_s[i] = now_s() - began_s
            self.changed.ring()

        for i in self.honest:
            self.transports[i]._spawn(one(i))
        await asyncio.gather(*by_hand)
        await self.all_ended()
        for i in tuple(self.stopped):
            self.resume(i)
        await self.all_ended()

    async def all_ended(self) -> None:
        deadline_s = now_s() + LONGEST_ROUND_S
        while awaited := set(self.honest) - self.killed - self.stopped - self.outcomes.keys():
            assert not self.failures, self.failures
            assert now_s() < deadline_s, f"members {awaited} are still busy"
            await heard(self.changed.event, deadline_s - now_s())
        assert not self.failures, self.failures

    async def all_streams_end(self, within_s: float = 120.0) -> None:
        """Nobody is served for ever, and whoever opens a stream closes it."""
        deadline_s, honest = now_s() + within_s, {self.ids[i] for i in self.honest}
        while any(self.transports[i].tasks for i in self.honest):
            assert now_s() < deadline_s, "a stream is still served"
            await asyncio.sleep(1)
        await asyncio.sleep(1)
        for pipe in self.network.pipes:
            deaf = pipe.target in self.trouble.deaf.get(pipe.source, ())  # what is written to it ends nowhere
            assert pipe.source not in honest or deaf, f"{pipe.source} has not closed its stream to {pipe.target}"

    # -- faults ----------------------------------------------------------------------------------------------------

    def kill(self, member: int) -> None:
        self.network.kill(self.ids[member])
        self.killed.add(member)
        self.changed.ring()

    def stop(self, member: int) -> None:
        self.network.stop(self.ids[member])
        self.stopped.add(member)
        self.changed.ring()

    def resume(self, member: int) -> None:
        self.stopped.discard(member)
        self.network.resume(self.ids[member])

    def cut(self, one: int, other: int) -> None:
        """For good, and silently, as when a cable is pulled."""
        self.network.cut(self.ids[one], self.ids[other], "silent")

    def watch(self, look: Callable[[], None]) -> None:
        """Call ``look`` whenever anybody has made a step: for a fault at a moment that no clock shows."""
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimLoop)
        loop.watch = look

    # -- a member's part, played by hand ---------------------------------------------------------------------------

    def parts_of(self, reducer: int) -> list[int]:
        reducers = self.group.reducers
        return list(range(len(self.slices)))[reducers.index(reducer) :: len(reducers)] if reducer in reducers else []

    def contribution(self, member: int, part: int) -> bytes:
        where = self.slices[part]
        return encode(self.theta[where] - self.locals[member][where], self.codec)

    def place(self, part: int, number: int = 0) -> Place:
        return Place(round_id=self.round_id, number=number, part=part)

    def sent(self, me: int, part: int, number: int = 0) -> Contribution:
        """A member's contribution to a part, as it signs it."""
        return Contribution.of(self.place(part, number), self.contribution(me, part), self.members[me])

    def signed(self, me: int, part: int, number: int = 0) -> bytes:
        """The frame of that."""
        sent = self.sent(me, part, number)
        return sent.data + sent.signature

    def frame(self, index: int, part: Part, senders: bytes | None = None) -> bytes:
        """A part of the update as its reducer signs it in the first butterfly, with the contributions that are in it;
        ``senders``: the mask of those that it says came, where it is another one."""
        reducers = self.group.reducers
        reducer = reducers[index % len(reducers)]
        inputs = Inputs.of({i: self.sent(i, index) for i in bits_of(part.mask) if i < self.count})
        inputs = inputs if senders is None else replace(inputs, senders=senders)
        reduction = Reduction.of(self.place(index), part, inputs, reducer, self.members[reducer])
        return frame_of(part, reduction.to_bytes())

    def mean(self, part: int, members: Sequence[int]) -> Part:
        """The part of the update to which ``members`` contributed."""
        grid, group = Grid(n=self.n, codec=self.codec), self.group
        came = {i: grid.decode(part, self.contribution(i, part)) for i in members}
        return group.aggregation.reduce(came, group.weights, part, grid, group.total_weight)

    def means(self, members: Sequence[int], *, but: Sequence[int] = (), of: Sequence[int] = ()) -> list[Part]:
        """All parts with ``members`` in them, but for those in ``but``, which have only ``of``."""
        return [self.mean(part, of if part in but else members) for part in range(len(self.slices))]

    async def say(self, me: int, to: int, message: Message) -> Channel:
        channel = await self.transports[me].open(self.ids[to], [], PROTOCOL)
        await channel.send(message)
        return channel

    async def contribute(self, me: int, to: int, parts: int | None = None, number: int = 0) -> Channel:
        """As a sender: open the stream and send the first ``parts`` parts, or all."""
        channel = await self.say(me, to, Contribute(round_id=self.round_id, number=number))
        for part in self.parts_of(to)[:parts]:
            await channel.send_frame(self.signed(me, part, number=number))
        return channel

    async def receipt(
        self, me: int, to: int, hashes: Sequence[bytes], *, number: int = 0, took: bool = True
    ) -> Again | Commit | No:
        """What the leader says in the end; ``took``: a commit is signed, and what then comes is heard."""
        channel = await self.say(me, to, Receipt(round_id=self.round_id, number=number, part_hashes=list(hashes)))
        answer = await self.word(channel)
        if took and isinstance(answer, Commit):
            await channel.send(Took(signature=self.signature(me, answer)))
            await self.last_word(channel)
        return answer

    def signature(self, me: int, commit: Commit | TookBefore) -> bytes:
        """A member's, over a commit to which all have contributed."""
        return self.taken(commit).sign(self.members[me])

    def taken(self, commit: Commit | TookBefore, full: Sequence[int] | None = None) -> Taken:
        """What is signed of a commit."""
        link = self.group.header(commit.part_hashes).link
        mask = contributor_mask(self.contributing if full is None else full)
        return Taken(round_id=self.round_id, link=link, full=mask, state=commit.state)

    @property
    def contributing(self) -> list[int]:
        return [i for i in range(self.count) if i not in self.dropped]

    async def last_word(self, channel: Channel) -> Certifies | No:
        """What comes after a signature, and any Eta."""
        while True:
            answer: Eta | Certifies | No = await channel.receive(Eta, Certifies, No, timeout_s=100.0)
            if not isinstance(answer, Eta):
                return answer

    async def word(self, channel: Channel) -> Again | Commit | No:
        """What comes after any Eta."""
        while True:
            answer: Eta | Again | Commit | No = await channel.receive(Eta, Again, Commit, No, timeout_s=100.0)
            if not isinstance(answer, Eta):
                return answer

    async def answer_part(self, channel: Channel, index: int, part: Part) -> None:
        await channel.send(Size(size_bytes=len(part.data)))
        await channel.send_frame(self.frame(index, part))

    def serve(self, me: int, hand: Callable[[Channel, Message], Awaitable[None]]) -> None:
        async def handler(channel: Channel) -> None:
            message: Message = await channel.receive(*OF_A_ROUND, timeout_s=100.0)
            if isinstance(message, AskOther):
                await channel.send(No(reason="no other one"))
                return
            await hand(channel, message)

        self.transports[me].handlers[PROTOCOL] = handler

    # -- what must be true ----------------------------------------------------------------------------------------

    def update(self, of: Sequence[int] | None = None) -> Update:
        """What all honest members have committed, or those ``of``."""
        outcomes = [self.outcomes[i] for i in self.honest if of is None or i in of]
        settled = [one for one in outcomes if isinstance(one, Settled)]
        assert len(settled) == len(outcomes), outcomes
        first = settled[0].update
        assert all(one.update == first for one in settled), outcomes
        for one in settled:
            check_certificate(
                Certified(header=first.header, certificate=one.certificate),
                rules_of(self.aggregate),
                known(*self.familiar),
            )
        assert (first.header.step, first.header.parent) == (len(HISTORY), head(HISTORY))
        return first

    def committed(self) -> list[int]:
        """Who has an update; it is the same one."""
        committed = sorted(i for i, outcome in self.outcomes.items() if isinstance(outcome, Settled))
        if committed:
            self.update(committed)
        return committed

    def missed(self, of: Sequence[int] | None = None) -> set[tuple[str, str]]:
        missed = [self.outcomes[i] for i in self.honest if of is None or i in of]
        assert all(isinstance(outcome, Missed) for outcome in missed), missed
        return {(outcome.reason, outcome.detail) for outcome in missed if isinstance(outcome, Missed)}

    def uncertified(self, of: Sequence[int] | None = None) -> set[str]:
        """What the honest members say that their updates lacked for a certificate."""
        missed = [self.outcomes[i] for i in self.honest if of is None or i in of]
        return {outcome.uncertified for outcome in missed if isinstance(outcome, Missed)}

    def lost(self, of: int) -> set[int]:
        return self.settlements[of].meeting.lost

    def complaints(self, of: int) -> list[tuple[int, str]]:
        """(whom, why) of what the handlers of a member raised."""
        return [(self.ids.index(error.peer_id), error.reason) for error in self.transports[of].complaints]

    def check_blamed(self, *offenders: int) -> None:
        """Every honest member gave up the offenders and nobody else, and counts on them no more."""
        for i, settlement in self.settlements.items():
            assert self.lost(i) == set(offenders), (i, self.lost(i))
            live = {record.peer_id for record in settlement.meeting.directory.live(NOW_S)}
            assert live == set(self.ids) - {self.ids[j] for j in (i, *offenders)}


def server(settlement: Settlement) -> Callable[[Channel], Awaitable[None]]:
    """As a peer does it."""

    async def serve(channel: Channel) -> None:
        await settlement.serve(channel, await channel.receive(*OF_A_ROUND, timeout_s=TIMEOUTS.first_message_s))

    return serve
