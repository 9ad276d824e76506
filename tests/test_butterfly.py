"""Rounds of honest butterflies, with members written by hand that break one rule each."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from builders import NOW_S, RUN_ID, DeafWriter, groups_of, head, identity, ranked, record_of
from fakes import FakeNetwork, FakeTransport, run_simulated
from hypothesis import given, settings
from hypothesis import strategies as st

from p2p_diloco import outer
from p2p_diloco.butterfly import Butterfly, choose_parts
from p2p_diloco.codec import Codec, decode, encode
from p2p_diloco.config import Timeouts
from p2p_diloco.errors import RemoteError
from p2p_diloco.outer import Part, Update, contributor_mask, part_slices, weighted_mean
from p2p_diloco.records import Directory, seal_record
from p2p_diloco.rounds import Missed
from p2p_diloco.wire import AskPart, Channel, Commit, Contribute, Message, No, Receipt, run_protocol

PROTOCOL = run_protocol(RUN_ID)
HISTORY = "abc"
TIMEOUTS = Timeouts()
N_PARTS = 6


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outer, "PART_VALUES", 100)


class Losses(list[tuple[int, int, str]]):
    """(who, whom, why), each time a butterfly gives a member up."""

    def by(self, me: int) -> list[tuple[int, str]]:
        return [(member, why) for who, member, why in self if who == me]


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> Losses:
    found, lose = Losses(), Butterfly._lose

    def noted(self: Butterfly, member: int, error: RemoteError | None) -> None:
        if member not in self.lost:
            found.append((self.group.me, member, f"{type(error).__name__}: {error.reason}" if error else "silent"))
        lose(self, member, error)

    monkeypatch.setattr(Butterfly, "_lose", noted)
    return found


@dataclass(eq=False)
class Transport(FakeTransport):
    deaf: set[str] = field(default_factory=set)
    """Peers that read nothing of what this one writes."""

    def _channel(self, peer_id: str, mine: asyncio.StreamReader, theirs: asyncio.StreamReader) -> Channel:
        channel = super()._channel(peer_id, mine, theirs)
        if peer_id in self.deaf:
            channel.writer = DeafWriter()
        return channel


@dataclass(eq=False)
class Round:
    """``count`` members in the order of rank; the first that is no client leads and settles. Member i has pulled by
    i + 1 and weighs 100 (i + 1). Those in ``by_hand`` do nothing of their own accord."""

    count: int
    by_hand: tuple[int, ...] = ()
    clients: tuple[int, ...] = ()
    codec: Codec = "int8"
    n: int = (N_PARTS - 1) * 100 + 7
    min_group: int = 2
    network: FakeNetwork = field(default_factory=FakeNetwork)
    outcomes: dict[int, Update | Missed] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.members = ranked(head(HISTORY), self.count)
        self.ids = [who.peer_id for who in self.members]
        self.groups = groups_of(
            self.members,
            HISTORY,
            weight=[100 * (i + 1) for i in range(self.count)],
            client_mode=[i in self.clients for i in range(self.count)],
        )
        self.round_id = self.groups[0].round_id
        self.theta = np.random.default_rng(0).standard_normal(self.n).astype(np.float32)
        self.gradient = np.random.default_rng(1).standard_normal(self.n).astype(np.float32)
        self.transports = [Transport(self.network, peer_id, TIMEOUTS) for peer_id in self.ids]
        self.honest = [i for i in range(self.count) if i not in self.by_hand]
        self.butterflies = {i: self._butterfly(i) for i in self.honest}
        for i, butterfly in self.butterflies.items():
            self.transports[i].handlers[PROTOCOL] = server(butterfly)

    def _butterfly(self, i: int) -> Butterfly:
        directory = Directory(self.ids[i], RUN_ID)
        for who in self.members:
            directory.learn(seal_record(record_of(who, HISTORY, life_s=900.0), who), NOW_S)
        return Butterfly(
            group=self.groups[i],
            transport=self.transports[i],
            protocol=PROTOCOL,
            directory=directory,
            timeouts=TIMEOUTS,
            codec=self.codec,
            theta=self.theta,
            local=self.theta - np.float32(i + 1) * self.gradient,
            min_group=self.min_group,
        )

    async def run(self, *by_hand: Awaitable[None]) -> None:
        async def one(i: int) -> None:
            self.outcomes[i] = await self.butterflies[i].run()

        for i in self.butterflies:
            self.transports[i]._spawn(one(i))
        running = [task for i in self.butterflies for task in self.transports[i].tasks]
        await asyncio.gather(*by_hand, *(asyncio.wait([task]) for task in running))

    async def all_streams_end(self, within_s: float = 120.0) -> None:
        """Nobody is served for ever."""
        deadline_s = now_s() + within_s
        while any(self.transports[i].tasks for i in self.honest):
            assert now_s() < deadline_s, "a stream is still served"
            await asyncio.sleep(1)

    # -- a member's part, played by hand ---------------------------------------------------------------------------

    def parts_of(self, reducer: int) -> list[int]:
        return [part for part in range(len(part_slices(self.n))) if self.groups[0].reducer_of(part) == reducer]

    def contribution(self, member: int, part: int) -> bytes:
        where = part_slices(self.n)[part]
        local = self.theta[where] - np.float32(member + 1) * self.gradient[where]
        return encode(self.theta[where] - local, self.codec)

    def mean(self, part: int, members: Sequence[int]) -> Part:
        """The part of the update to which ``members`` contributed."""
        where = part_slices(self.n)[part]
        values = [
            (100 * (i + 1), decode(self.contribution(i, part), where.stop - where.start, self.codec)) for i in members
        ]
        return Part(mask=contributor_mask(members), data=encode(weighted_mean(values), self.codec))

    def means(self, members: Sequence[int]) -> list[Part]:
        return [self.mean(part, members) for part in range(len(part_slices(self.n)))]

    async def say(self, me: int, to: int, message: Message) -> Channel:
        channel = await self.transports[me].open(self.ids[to], [], PROTOCOL)
        await channel.send(message)
        return channel

    async def contribute(self, me: int, to: int, parts: int | None = None) -> Channel:
        """As a sender: open the stream and send the first ``parts`` parts, or all."""
        channel = await self.say(me, to, Contribute(round_id=self.round_id))
        for part in self.parts_of(to)[:parts]:
            await channel.send_frame(self.contribution(me, part))
        return channel

    async def receipt(self, me: int, to: int, hashes: Sequence[bytes]) -> Commit | No:
        channel = await self.say(me, to, Receipt(round_id=self.round_id, part_hashes=list(hashes)))
        answer: Commit | No = await channel.receive(Commit, No, timeout_s=100.0)
        return answer

    def serve(self, me: int, hand: Callable[[Channel, Message], Awaitable[None]]) -> None:
        async def handler(channel: Channel) -> None:
            message: Message = await channel.receive(Contribute, Receipt, AskPart, timeout_s=100.0)
            await hand(channel, message)

        self.transports[me].handlers[PROTOCOL] = handler

    # -- what must be true ----------------------------------------------------------------------------------------

    def update(self, of: Sequence[int] | None = None) -> Update:
        """What all honest members have committed, or those ``of``."""
        updates = [self.outcomes[i] for i in of or self.honest]
        first = updates[0]
        assert isinstance(first, Update), first
        assert all(each == first for each in updates[1:]), updates
        assert (first.header.step, first.header.parent) == (len(HISTORY), head(HISTORY))
        return first

    def missed(self, of: Sequence[int] | None = None) -> set[tuple[str, str]]:
        missed = [self.outcomes[i] for i in of or self.honest]
        assert all(isinstance(outcome, Missed) for outcome in missed), missed
        return {(outcome.reason, outcome.detail) for outcome in missed if isinstance(outcome, Missed)}

    def complaints(self, of: int) -> list[tuple[int, str]]:
        """(whom, why) of what the handlers of a member raised."""
        return [(self.ids.index(error.peer_id), error.reason) for error in self.transports[of].complaints]

    def check_blamed(self, *offenders: int) -> None:
        """Every honest member gave up the offenders and nobody else, and counts on them no more."""
        for i, butterfly in self.butterflies.items():
            assert butterfly.lost == set(offenders), (i, butterfly.lost)
            live = {record.peer_id for record in butterfly.directory.live(NOW_S)}
            assert live == set(self.ids) - {self.ids[j] for j in (i, *offenders)}


def server(butterfly: Butterfly) -> Callable[[Channel], Awaitable[None]]:
    """As a peer does it."""

    async def serve(channel: Channel) -> None:
        message: Message = await channel.receive(Contribute, Receipt, AskPart, timeout_s=TIMEOUTS.first_message_s)
        if isinstance(message, Contribute):
            await butterfly.on_contribute(channel)
        elif isinstance(message, Receipt):
            await butterfly.on_receipt(channel, message)
        elif isinstance(message, AskPart):
            await butterfly.on_ask_part(channel, message)

    return serve


def now_s() -> float:
    return asyncio.get_running_loop().time()


# -- everybody is honest -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("codec", ["fp32", "int4"])
def test_all_commit_the_weighted_mean(count: int, codec: Codec) -> None:
    async def main() -> None:
        meeting = Round(count, codec=codec, min_group=1)
        await meeting.run()
        update = meeting.update()
        assert list(update.parts) == meeting.means(range(count))
        assert update.header.contributors == tuple((peer_id, 100 * (i + 1)) for i, peer_id in enumerate(meeting.ids))
        meeting.check_blamed()
        await meeting.all_streams_end(1.0)
        for i, butterfly in meeting.butterflies.items():
            assert not meeting.complaints(i)
            cost = butterfly.cost()
            assert min(cost.bytes_sent, cost.bytes_received) > 0 or count == 1

    run_simulated(main())


def test_client_mode_members_contribute_and_receive() -> None:
    async def main() -> None:
        meeting = Round(4, clients=(0, 2))
        await meeting.run()
        assert list(meeting.update().parts) == meeting.means(range(4))
        assert meeting.butterflies[1].commit is not None
        assert [i for i in meeting.honest if meeting.butterflies[i].waiting == set(meeting.butterflies[i].queues)] == [
            0,
            2,
        ]

    run_simulated(main())


# -- senders: member 2 is a client, so the parts 0, 2, 4 are member 0's to reduce and 1, 3, 5 member 1's -----------


async def nothing_more(channel: Channel) -> None:
    """Keeps the stream open and reads."""


async def close(channel: Channel) -> None:
    channel.close()


def changed(data: bytes) -> bytes:
    """With a scale that is not a number."""
    return np.float32(np.nan).tobytes() + data[4:]


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda data: data[:-1], "Misbehaved: sends a contribution that does not decode: 103 bytes for 100 values"),
        (lambda data: b"", "Misbehaved: sends a contribution that does not decode: 0 bytes"),
        (lambda data: data[:4], "Misbehaved: sends a contribution that does not decode: 4 bytes"),
        (lambda data: data + b"x", "Misbehaved: announces a frame of 105 bytes where at most 104 are due"),
        (lambda data: data * 4, "Misbehaved: announces a frame of 416 bytes where at most 104 are due"),
        (changed, "Misbehaved: sends a contribution that does not decode: a scale is not finite"),
        (lambda data: np.float32(1e30).tobytes() + data[4:], "or too large"),
        (lambda data: np.float32(-1).tobytes() + data[4:], "negative"),
    ],
)
@pytest.mark.parametrize("good_parts", [0, 2])
def test_a_contribution_that_does_not_decode(
    losses: Losses, good_parts: int, spoil: Callable[[bytes], bytes], why: str
) -> None:
    async def main() -> None:
        meeting = Round(3, by_hand=(2,), clients=(2,), n=600)

        async def send(to: int) -> None:
            channel = await meeting.contribute(2, to, good_parts)
            await asyncio.sleep(0.5)
            await channel.send_frame(spoil(meeting.contribution(2, 0)))

        began_s = now_s()
        await meeting.run(send(0), send(1))
        left_out_from = 2 * good_parts
        expected = meeting.means(range(3))[:left_out_from] + meeting.means(range(2))[left_out_from:]
        assert list(meeting.update().parts) == expected
        meeting.check_blamed(2)
        assert all(why in reason for i in (0, 1) for _, reason in losses.by(i)), losses
        assert now_s() - began_s < 5, "nobody waits for one that was caught"
        await meeting.all_streams_end()

    run_simulated(main())


@pytest.mark.parametrize(
    ("then", "why", "costs_s"),
    [(close, "Gone: closed the stream", 0.0), (nothing_more, "silent", TIMEOUTS.part_s)],
)
@pytest.mark.parametrize("k", [0, 1, 2])
def test_a_sender_that_stops_after_part_k(
    losses: Losses, k: int, then: Callable[[Channel], Awaitable[None]], why: str, costs_s: float
) -> None:
    async def main() -> None:
        meeting = Round(3, by_hand=(2,), clients=(2,))

        async def send(to: int) -> None:
            channel = await meeting.contribute(2, to, k)
            await asyncio.sleep(0.5)
            await then(channel)

        began_s = now_s()
        await meeting.run(send(0), send(1))
        assert list(meeting.update().parts) == meeting.means(range(3))[: 2 * k] + meeting.means(range(2))[2 * k :]
        meeting.check_blamed(2)
        assert losses.by(0) == losses.by(1) == [(2, why)]
        assert costs_s <= now_s() - began_s < costs_s + 3
        await meeting.all_streams_end()

    run_simulated(main())


def test_a_member_that_never_comes(losses: Losses) -> None:
    async def main() -> None:
        meeting = Round(3, by_hand=(2,), clients=(2,))
        await meeting.run()
        assert list(meeting.update().parts) == meeting.means(range(2))
        meeting.check_blamed(2)
        assert losses.by(0) == losses.by(1) == [(2, "silent")]

    run_simulated(main())


def test_a_sender_that_comes_too_late_is_served_but_not_for_ever(losses: Losses) -> None:
    """It sends all it has after the reducers gave it up: nobody takes its contributions from the queues any more."""

    async def main() -> None:
        meeting = Round(3, by_hand=(2,), clients=(2,), n=907)
        got: dict[int, list[Part]] = {}

        async def send(to: int) -> None:
            channel = await meeting.contribute(2, to, 0)
            await asyncio.sleep(TIMEOUTS.part_s + 1)
            for part in meeting.parts_of(to):
                await channel.send_frame(meeting.contribution(2, part))
            got[to] = []
            for _ in meeting.parts_of(to):
                data = await channel.receive_frame(1000, 10.0)
                got[to].append(Part(mask=data[1 : 1 + data[0]], data=data[1 + data[0] :]))

        await meeting.run(send(0), send(1))
        update = meeting.update()
        assert list(update.parts) == meeting.means(range(2))
        assert sorted(losses) == [(0, 2, "silent"), (1, 2, "silent")]
        assert (got[0], got[1]) == (list(update.parts[0::2]), list(update.parts[1::2]))
        await meeting.all_streams_end()

    run_simulated(main())


def test_a_sender_that_is_lost_while_its_contributions_wait(losses: Losses) -> None:
    """Member 1 sends nothing, so those of member 2 wait; then member 2 fails as a reducer."""

    async def main() -> None:
        meeting = Round(3, by_hand=(1, 2), n=1507)  # member 0 reduces 0, 3, 6, 9, 12
        meeting.serve(2, lambda channel, message: asyncio.sleep(1.0))

        async def send() -> None:
            await meeting.contribute(2, 0)

        await meeting.run(send())
        assert (2, "Gone: closed the stream") in losses.by(0)
        assert meeting.butterflies[0].lost == {1, 2}
        await meeting.all_streams_end(10.0)

    run_simulated(main())


def test_a_second_stream_of_one_sender(losses: Losses) -> None:
    async def main() -> None:
        meeting = Round(3, by_hand=(2,), clients=(2,))

        async def send(to: int) -> None:
            await meeting.contribute(2, to)
            await meeting.contribute(2, to)
            await meeting.receipt(2, 0, [b""] * N_PARTS)

        await meeting.run(send(0), send(1))
        assert list(meeting.update().parts) == meeting.means(range(3)), "counted, and counted once"
        for i in (0, 1):
            assert (2, "opens a second stream in a round") in meeting.complaints(i)
        assert not losses

    run_simulated(main())


def test_a_sender_that_never_reads(losses: Losses) -> None:
    async def main() -> None:
        meeting = Round(3, by_hand=(2,), clients=(2,))
        for i in (0, 1):
            meeting.transports[i].deaf.add(meeting.ids[2])

        async def send(to: int) -> None:
            await meeting.contribute(2, to)

        began_s = now_s()
        await meeting.run(send(0), send(1))
        update = meeting.update()
        assert update.parts[0] == meeting.mean(0, range(3))
        assert update.parts[4] in (meeting.mean(4, range(3)), meeting.mean(4, range(2)))
        for i in (0, 1):
            assert (2, "does not read what we send") in meeting.complaints(i)
        assert 2 in meeting.butterflies[0].lost
        assert now_s() - began_s < TIMEOUTS.write_s + TIMEOUTS.part_s + TIMEOUTS.settle_s
        await meeting.all_streams_end()

    run_simulated(main())


def test_strangers_have_no_say_in_a_round(losses: Losses) -> None:
    async def main() -> None:
        meeting = Round(2)
        stranger = Transport(meeting.network, identity(99).peer_id, TIMEOUTS)
        gone = []

        async def meddle(message: Message) -> None:
            channel = await stranger.open(meeting.ids[0], [], PROTOCOL)
            await channel.send(message)
            try:
                await channel.receive_frame(1000, 10.0)
            except RemoteError as error:
                gone.append(error.reason)

        round_id = meeting.round_id
        await meeting.run(
            meddle(Contribute(round_id=round_id)),
            meddle(Receipt(round_id=round_id, part_hashes=[bytes(32)] * N_PARTS)),
            meddle(AskPart(round_id=round_id, part=0, hash=meeting.mean(0, range(2)).hash)),
        )
        assert list(meeting.update().parts) == meeting.means(range(2))
        complaints = [(error.peer_id, error.reason) for error in meeting.transports[0].complaints]
        assert complaints == [(stranger.peer_id, "meddles with a round that it is no member of")] * 3
        assert gone == ["closed the stream"] * 3
        assert not losses

    run_simulated(main())


# -- reducers: member 2 of three has parts 2 and 5 ------------------------------------------------------------------


def frame_of(part: Part) -> bytes:
    return bytes([len(part.mask)]) + part.mask + part.data


Answers = Callable[[int, Part], bytes | None]
"""(to whom, what an honest reducer would answer) -> the frame, or None to end the stream."""


async def reduce_by_hand(
    meeting: Round, answers: Answers, receipt: Sequence[bytes] | None, held: Part | None = None
) -> None:
    """Member 2 contributes as it should, answers as a reducer what ``answers`` says, and gives ``held`` afterwards."""

    async def hand(channel: Channel, message: Message) -> None:
        if isinstance(message, AskPart):
            if held is not None:
                await channel.send_frame(frame_of(held))
            return
        for part in meeting.parts_of(2):
            await channel.receive_frame(1000, 10.0)
            frame = answers(meeting.ids.index(channel.peer_id), meeting.mean(part, range(meeting.count)))
            if frame is None:
                return
            await channel.send_frame(frame)

    meeting.serve(2, hand)
    if receipt is not None:
        await meeting.say(2, 0, Receipt(round_id=meeting.round_id, part_hashes=list(receipt)))
    for i in meeting.honest:
        await meeting.contribute(2, i)


SPOILED: list[tuple[Callable[[Part], bytes | None], str]] = [
    (lambda part: None, "Gone: closed the stream"),
    (lambda part: b"", "Misbehaved: sends part 2 with a wrong length"),
    (lambda part: frame_of(part)[:-1], "Misbehaved: sends part 2 with a wrong length"),
    (lambda part: frame_of(part) + b"x", "Misbehaved: sends part 2 with a wrong length"),
    (lambda part: frame_of(part) + bytes(200), "Misbehaved: announces a frame of 306 bytes where at most 137 are due"),
    (lambda part: bytes([33]) + bytes(32) + part.data, "Misbehaved: sends part 2 with a wrong length"),
    (
        lambda part: frame_of(Part(mask=part.mask, data=changed(part.data))),
        "Misbehaved: sends part 2 that does not decode: a scale",
    ),
    (
        lambda part: frame_of(Part(mask=b"\x0f", data=part.data)),
        "Misbehaved: sends part 2 that does not decode: a mask names others",
    ),
    (
        lambda part: frame_of(Part(mask=b"\x07\x00", data=part.data)),
        "Misbehaved: sends part 2 that does not decode: a mask names others",
    ),
]


@pytest.mark.parametrize(("spoil", "why"), SPOILED, ids=[str(i) for i in range(len(SPOILED))])
def test_a_reducer_whose_means_are_no_parts(losses: Losses, spoil: Callable[[Part], bytes | None], why: str) -> None:
    """Its parts are lost, so the round is; the two that are left then meet without it."""

    async def main() -> None:
        meeting = Round(3, by_hand=(2,))
        await meeting.run(reduce_by_hand(meeting, lambda _, part: spoil(part), receipt=None))
        assert meeting.missed([0]) == {("failed", "part 2 is lost with its reducer")}
        assert meeting.missed([1]) == {("failed", "part 2 is lost with its reducer")}
        meeting.check_blamed(2)
        assert [len(losses.by(i)) for i in (0, 1)] == [1, 1]
        assert all(reason.startswith(why) for _, _, reason in losses), losses
        await meeting.all_streams_end()

    run_simulated(main())


def test_a_reducer_that_claims_to_hold_what_it_gives_to_nobody(losses: Losses) -> None:
    async def main() -> None:
        meeting = Round(3, by_hand=(2,))
        claimed = [part.hash for part in meeting.means(range(3))]
        await meeting.run(reduce_by_hand(meeting, lambda *_: None, receipt=claimed))
        assert meeting.missed() == {("behind", "the round committed, but parts of the update could not be fetched")}
        meeting.check_blamed(2)

    run_simulated(main())


def test_a_holder_that_gives_other_bytes(losses: Losses) -> None:
    """A sound part, but not the one of the commit."""

    async def main() -> None:
        meeting = Round(3, by_hand=(2,))
        await meeting.run(
            reduce_by_hand(
                meeting,
                lambda *_: None,
                receipt=[part.hash for part in meeting.means(range(3))],
                held=meeting.mean(2, range(2)),
            )
        )
        assert meeting.missed() == {COULD_NOT_FETCH}
        assert meeting.complaints(2) == []
        meeting.check_blamed(2)
        assert all(meeting.butterflies[i].parts[2] is None for i in (0, 1))

    run_simulated(main())


def test_a_reducer_that_tells_everybody_something_else(losses: Losses, caplog: pytest.LogCaptureFixture) -> None:
    """Settling shows it, and makes one set of bytes of it."""

    async def main() -> None:
        meeting = Round(4, by_hand=(2,))  # its parts: 2
        mean = meeting.mean(2, range(4))
        told = {0: mean, 1: mean, 3: Part(mask=mean.mask, data=encode(np.zeros(100, np.float32), "int8"))}
        with caplog.at_level(logging.WARNING):
            await meeting.run(
                reduce_by_hand(
                    meeting,
                    lambda to, part: frame_of(told[to]),
                    receipt=[part.hash for part in meeting.means(range(4))],
                )
            )
        assert list(meeting.update().parts) == meeting.means(range(4))
        assert "part 2: its reducer sent different bytes to different members" in caplog.text
        assert not losses
        await meeting.all_streams_end()

    run_simulated(main())


def test_a_reducer_that_dies_after_it_told_one(losses: Losses) -> None:
    """Who has a part gives it to the others."""

    async def main() -> None:
        meeting = Round(3, by_hand=(2,))
        await meeting.run(reduce_by_hand(meeting, lambda to, part: frame_of(part) if to == 1 else None, receipt=None))
        assert list(meeting.update().parts) == meeting.means(range(3))
        assert meeting.butterflies[0].lost == {2}
        assert losses.by(0) == [(2, "Gone: closed the stream")]

    run_simulated(main())


def test_a_reducer_that_never_reads_or_answers(losses: Losses) -> None:
    async def main() -> None:
        meeting = Round(3, by_hand=(2,))
        for i in meeting.honest:
            meeting.transports[i].deaf.add(meeting.ids[2])

        async def hand(channel: Channel, message: Message) -> None:
            await asyncio.sleep(500)

        meeting.serve(2, hand)
        began_s = now_s()

        async def send(to: int) -> None:
            await meeting.contribute(2, to)

        await meeting.run(send(0), send(1))
        assert meeting.missed() == {("failed", "part 2 is lost with its reducer")}
        meeting.check_blamed(2)
        assert {reason for _, _, reason in losses} == {"Silent: does not read what we send"}
        assert now_s() - began_s < TIMEOUTS.write_s + 3
        await meeting.all_streams_end()

    run_simulated(main())


def test_a_reducer_that_takes_almost_every_time_out(losses: Losses) -> None:
    """The round as a whole has a limit, too."""

    async def main() -> None:
        meeting = Round(2, by_hand=(1,))  # its parts: 1, 3, 5

        async def hand(channel: Channel, message: Message) -> None:
            for part in meeting.parts_of(1):
                await asyncio.sleep(TIMEOUTS.reduced_part_s - 1)
                await channel.send_frame(frame_of(meeting.mean(part, range(2))))

        async def send() -> None:
            await meeting.contribute(1, 0)

        meeting.serve(1, hand)
        began_s = now_s()
        await meeting.run(send())
        assert meeting.missed() == {("failed", "the round took longer than 30 s")}
        assert now_s() - began_s == pytest.approx(TIMEOUTS.round_s, abs=1)
        assert meeting.butterflies[0].over
        await meeting.all_streams_end()

    run_simulated(main())


# -- leaders: member 0 of three -------------------------------------------------------------------------------------


async def lead_by_hand(meeting: Round, settle: Callable[[Channel, Receipt], Awaitable[None]]) -> None:
    """Member 0 contributes and reduces as it should, and settles as ``settle`` says."""

    async def hand(channel: Channel, message: Message) -> None:
        if isinstance(message, Receipt):
            await settle(channel, message)
            return
        for part in meeting.parts_of(0):
            await channel.receive_frame(1000, 10.0)
            await channel.send_frame(frame_of(meeting.mean(part, range(meeting.count))))

    meeting.serve(0, hand)
    for i in meeting.honest:
        await meeting.contribute(0, i)


async def sleeps(channel: Channel, receipt: Receipt) -> None:
    await asyncio.sleep(500)


async def dies(channel: Channel, receipt: Receipt) -> None:
    pass


async def talks_nonsense(channel: Channel, receipt: Receipt) -> None:
    await channel.send(receipt)


@pytest.mark.parametrize(
    ("settle", "why", "costs_s"),
    [
        (sleeps, "Silent: has sent nothing for 35 s", 30.0),
        (dies, "Gone: closed the stream", 0.0),
        (talks_nonsense, "Misbehaved: sends receipt out of turn", 0.0),
    ],
)
def test_a_leader_that_does_not_settle(
    losses: Losses, settle: Callable[[Channel, Receipt], Awaitable[None]], why: str, costs_s: float
) -> None:
    async def main() -> None:
        meeting = Round(3, by_hand=(0,))
        began_s = now_s()
        await meeting.run(lead_by_hand(meeting, settle))
        assert costs_s <= now_s() - began_s < costs_s + 3
        if settle is sleeps:
            assert meeting.missed() == {("failed", "the round took longer than 30 s")}
        else:
            assert meeting.missed() == {("failed", "the leader of the round is gone")}
            meeting.check_blamed(0)
            assert {why} == {reason for _, _, reason in losses}
        await meeting.all_streams_end()

    run_simulated(main())


UNKNOWN = b"\x01" * 32
COULD_NOT_FETCH = ("behind", "the round committed, but parts of the update could not be fetched")
WRONG_NUMBER = ("failed", "the leader's commit names another number of parts")


@pytest.mark.parametrize(
    ("spoil", "expected", "blamed"),
    [
        (lambda hashes: No(reason="not today"), ("failed", "not today"), ()),
        (lambda hashes: Commit(part_hashes=hashes[:-1], holders=[0] * 5), WRONG_NUMBER, ()),
        (lambda hashes: Commit(part_hashes=hashes, holders=[0] * 5), WRONG_NUMBER, ()),
        (lambda hashes: Commit(part_hashes=[*hashes, UNKNOWN], holders=[0] * 7), WRONG_NUMBER, ()),
        (lambda hashes: Commit(part_hashes=[], holders=[]), WRONG_NUMBER, ()),
        (lambda hashes: Commit(part_hashes=[UNKNOWN, *hashes[1:]], holders=[3] * 6), COULD_NOT_FETCH, ()),
        (lambda hashes: Commit(part_hashes=[UNKNOWN, *hashes[1:]], holders=[255] * 6), COULD_NOT_FETCH, ()),
        (lambda hashes: Commit(part_hashes=[UNKNOWN, *hashes[1:]], holders=[0] * 6), COULD_NOT_FETCH, (0,)),
        (lambda hashes: Commit(part_hashes=[*hashes[1:], hashes[0]], holders=[0] * 6), COULD_NOT_FETCH, (0,)),
    ],
)
def test_a_commit_that_names_what_is_not_there(
    losses: Losses,
    spoil: Callable[[list[bytes]], Commit | No],
    expected: tuple[str, str],
    blamed: tuple[int, ...],
) -> None:
    async def main() -> None:
        meeting = Round(3, by_hand=(0,))

        async def settle(channel: Channel, receipt: Receipt) -> None:
            await channel.send(spoil([part.hash for part in meeting.means(range(3))]))

        await meeting.run(lead_by_hand(meeting, settle))
        assert meeting.missed() == {expected}
        meeting.check_blamed(*blamed)
        await meeting.all_streams_end()

    run_simulated(main())


def test_a_commit_whose_holder_is_who_receives_it() -> None:
    async def main() -> None:
        meeting = Round(3, by_hand=(0,))

        async def settle(channel: Channel, receipt: Receipt) -> None:
            me = meeting.ids.index(channel.peer_id)
            await channel.send(Commit(part_hashes=[UNKNOWN, *receipt.part_hashes[1:]], holders=[me] * 6))

        await meeting.run(lead_by_hand(meeting, settle))
        assert meeting.missed() == {COULD_NOT_FETCH}
        meeting.check_blamed()

    run_simulated(main())


def test_a_leader_that_dies_between_two_commit_messages(losses: Losses) -> None:
    """One member has the update; the other knows that it has not."""

    async def main() -> None:
        meeting = Round(3, by_hand=(0,))
        hashes = [part.hash for part in meeting.means(range(3))]

        async def settle(channel: Channel, receipt: Receipt) -> None:
            if channel.peer_id == meeting.ids[1]:
                await channel.send(Commit(part_hashes=hashes, holders=[0] * 6))

        await meeting.run(lead_by_hand(meeting, settle))
        assert list(meeting.update([1]).parts) == meeting.means(range(3))
        assert meeting.missed([2]) == {("failed", "the leader of the round is gone")}
        assert losses == [(2, 0, "Gone: closed the stream")]

    run_simulated(main())


# -- members, when a round settles ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hashes", "complaint"),
    [
        ([], "sends a receipt that does not fit the round"),
        ([b""] * 5, "sends a receipt that does not fit the round"),
        ([UNKNOWN] * 7, "sends a receipt that does not fit the round"),
        ([b"\x01"] * 6, "sends a malformed message"),
        ([bytes(33)] * 6, "sends a malformed message"),
    ],
)
@pytest.mark.parametrize("count", [2, 3])
def test_a_receipt_that_does_not_fit(losses: Losses, count: int, hashes: list[bytes], complaint: str) -> None:
    async def main() -> None:
        liar = count - 1
        meeting = Round(count, by_hand=(liar,), clients=(liar,), min_group=1)

        async def misbehave() -> None:
            for i in meeting.honest:
                await meeting.contribute(liar, i)
            await asyncio.sleep(1)
            message = Receipt.model_construct(round_id=meeting.round_id, part_hashes=hashes)
            await meeting.say(liar, 0, message)

        await meeting.run(misbehave())
        assert list(meeting.update().parts) == meeting.means(range(count))
        assert [(who, reason.startswith(complaint)) for who, reason in meeting.complaints(0)] == [(liar, True)]
        assert losses.by(0) == [(liar, "silent")]
        await meeting.all_streams_end()

    run_simulated(main())


def test_a_receipt_to_who_does_not_lead() -> None:
    async def main() -> None:
        meeting = Round(3, by_hand=(2,), clients=(2,))

        async def misbehave() -> None:
            for i in meeting.honest:
                await meeting.contribute(2, i)
            await meeting.say(2, 1, Receipt(round_id=meeting.round_id, part_hashes=[b""] * N_PARTS))

        await meeting.run(misbehave())
        meeting.update()
        assert meeting.complaints(1) == [(2, "sends a receipt that does not fit the round")]

    run_simulated(main())


def test_a_false_receipt_changes_nothing_for_most(losses: Losses) -> None:
    async def main() -> None:
        meeting = Round(3, by_hand=(2,), clients=(2,))
        answers: list[Commit | No] = []

        async def misbehave() -> None:
            for i in meeting.honest:
                await meeting.contribute(2, i)
            answers.append(await meeting.receipt(2, 0, [bytes(32)] * N_PARTS))
            answers.append(await meeting.receipt(2, 0, [b""] * N_PARTS))  # late: the same answer

        await meeting.run(misbehave())
        means = meeting.means(range(3))
        assert list(meeting.update().parts) == means
        assert answers == [Commit(part_hashes=[part.hash for part in means], holders=[0] * N_PARTS)] * 2
        assert not losses

    run_simulated(main())


def test_a_false_receipt_in_a_pair_costs_the_round_and_names_the_liar(losses: Losses) -> None:
    async def main() -> None:
        meeting = Round(2, by_hand=(1,), clients=(1,))

        async def refuse(channel: Channel, message: Message) -> None:
            assert isinstance(message, AskPart)

        async def misbehave() -> None:
            await meeting.contribute(1, 0)
            await meeting.receipt(1, 0, [bytes(32)] * N_PARTS)

        meeting.serve(1, refuse)
        await meeting.run(misbehave())
        assert meeting.missed() == {COULD_NOT_FETCH}
        assert losses == [(0, 1, "Gone: closed the stream")]

    run_simulated(main())


def test_parts_are_given_to_members_who_name_them() -> None:
    async def main() -> None:
        meeting = Round(3, by_hand=(2,), clients=(2,))
        await meeting.run()
        part = meeting.mean(4, range(2))

        async def ask(at: int, wanted: bytes) -> bytes:
            channel = await meeting.say(2, 0, AskPart(round_id=meeting.round_id, part=at, hash=wanted))
            return await channel.receive_frame(1000, 10.0)

        assert await ask(4, part.hash) == frame_of(part)
        for at, wanted in ((3, part.hash), (4, UNKNOWN), (N_PARTS, part.hash), (2**59, part.hash)):
            assert b"not held" in await ask(at, wanted)

    run_simulated(main())


def test_who_asks_when_the_round_is_over_is_told_so() -> None:
    async def main() -> None:
        meeting = Round(3, by_hand=(2,))

        async def hand(channel: Channel, message: Message) -> None:
            await asyncio.sleep(500)

        meeting.serve(2, hand)
        meeting.butterflies[0].timeouts = Timeouts(round_s=5.0)
        answers: list[Commit | No] = []

        async def settle() -> None:
            answers.append(await meeting.receipt(2, 0, [b""] * N_PARTS))
            assert now_s() - NOW_S < 6

        await meeting.run(settle())
        assert answers == [No(reason="the round is over")]
        assert meeting.missed([0]) == {("failed", "the round took longer than 5 s")}
        await meeting.all_streams_end()

    run_simulated(main())


# -- death at any instant -------------------------------------------------------------------------------------------


def instants() -> Iterator[float]:
    """A round of three takes about 0.2 s; steps are shorter than a link's latency."""
    return (0.015 * i for i in range(18))


@pytest.mark.parametrize("victim", [0, 1, 3])
def test_one_member_dies_at_any_instant(victim: int) -> None:
    """Who commits commits the same bytes; who does not knows it; it takes a time-out or two; nobody else is blamed."""
    committed: list[int] = []

    async def main(instant_s: float) -> None:
        meeting = Round(4, clients=(3,))

        async def kill() -> None:
            await asyncio.sleep(instant_s)
            meeting.network.kill(meeting.ids[victim])

        began_s = now_s()
        await meeting.run(kill())
        assert now_s() - began_s < TIMEOUTS.part_s + TIMEOUTS.settle_s + 2
        survivors = [i for i in range(4) if i != victim]
        updates = [i for i in survivors if isinstance(meeting.outcomes[i], Update)]
        if updates:
            meeting.update(updates)
        for i in survivors:
            assert meeting.butterflies[i].lost <= {victim} or 0 in meeting.butterflies[i].lost
        await meeting.all_streams_end()
        committed.append(len(updates))

    for instant_s in instants():
        run_simulated(main(instant_s))
    if victim == 3:
        assert set(committed) == {3}, "one that only contributes is never missed"
    else:
        assert {0, 3} <= set(committed)


# -- the choice of parts --------------------------------------------------------------------------------------------

A, B = b"a" * 32, b"b" * 32


@pytest.mark.parametrize(
    ("receipts", "expected"),
    [
        ({0: [A], 1: [A], 2: [B]}, Commit(part_hashes=[A], holders=[0])),
        ({0: [A], 1: [B], 2: [B]}, Commit(part_hashes=[B], holders=[1])),
        ({5: [B], 1: [A]}, Commit(part_hashes=[A], holders=[1])),
        ({1: [B], 0: [b""]}, Commit(part_hashes=[B], holders=[1])),
        ({0: [A, b""], 1: [b"", B]}, Commit(part_hashes=[A, B], holders=[0, 1])),
        ({0: [A]}, No(reason="1 of the group answered, 2 needed")),
        ({0: [A, b""], 1: [A, b""]}, No(reason="part 1 is lost with its reducer")),
    ],
)
def test_choose_parts(receipts: dict[int, list[bytes]], expected: Commit | No) -> None:
    n_parts = len(next(iter(receipts.values())))
    assert choose_parts(receipts, n_parts, 2) == expected
    assert choose_parts(dict(reversed(receipts.items())), n_parts, 2) == expected


@given(
    st.dictionaries(
        st.integers(0, 255), st.lists(st.sampled_from([b"", A, B]), min_size=3, max_size=3), min_size=1, max_size=6
    )
)
@settings(max_examples=60)
def test_whoever_is_named_as_a_holder_said_so(receipts: dict[int, list[bytes]]) -> None:
    commit = choose_parts(receipts, 3, 1)
    if isinstance(commit, No):
        assert any(not any(hashes[part] for hashes in receipts.values()) for part in range(3))
    else:
        for part, (wanted, holder) in enumerate(zip(commit.part_hashes, commit.holders)):
            assert receipts[holder][part] == wanted
