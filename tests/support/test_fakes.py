"""The fakes are truthful: what the operating system and the network do to a peer, they do to one in memory."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable
from typing import Any

import pytest

from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.errors import Gone, Silent
from p2p_diloco.core.records import seal_record
from p2p_diloco.core.waiting import now_s
from p2p_diloco.wire.channel import Channel
from tests.support.builders import identity, record_of
from tests.support.links import LATE_S, SILENT_RESET_S, FakeNetwork, FakeTransport
from tests.support.simloop import NOBODY, RUNNING, THREAD_S, Cut, Incarnation, run_simulated

TIMEOUTS = Timeouts()
A, B, C = (identity(i).peer_id for i in (1, 2, 3))
KEY = "records"


class Two:
    """Peer A opens streams to peer B, which hands them over to the test."""

    def __init__(self, **network: float) -> None:
        self.network = FakeNetwork(**network)  # type: ignore[arg-type]
        self.a, self.b = (FakeTransport(self.network, peer_id, TIMEOUTS) for peer_id in (A, B))
        self.served: asyncio.Queue[Channel] = asyncio.Queue()
        self.b.handlers["test"] = self._serve

    async def _serve(self, channel: Channel) -> None:
        self.served.put_nowait(channel)
        await asyncio.sleep(1000)

    async def stream(self) -> tuple[Channel, Channel]:
        mine = await self.a.open(B, [], "test")
        return mine, await self.served.get()


# -- incarnations ----------------------------------------------------------------------------------------------------


def test_the_dead_run_nothing_not_even_a_finally() -> None:
    done: list[str] = []

    async def work() -> None:
        asyncio.get_running_loop().call_later(2.0, done.append, "timer")
        thread = asyncio.ensure_future(asyncio.to_thread(done.append, "thread"))
        try:
            await asyncio.sleep(THREAD_S / 2)
            done.append("before")
            await thread
            await asyncio.sleep(1)
        finally:
            done.append("finally")

    async def main() -> None:
        network = FakeNetwork()
        peer = FakeTransport(network, A, TIMEOUTS)
        peer._spawn(work())
        await asyncio.sleep(THREAD_S * 0.75)
        network.kill(A)
        await asyncio.sleep(10)
        assert done == ["before"]
        assert peer.tasks == []

    run_simulated(main())


def test_what_runs_for_a_peer_belongs_to_it() -> None:
    """Also what its tasks, timers and threads begin, and what others make happen."""
    seen: list[Incarnation | None] = []

    def look() -> None:
        seen.append(RUNNING.get())

    async def main() -> None:
        two = Two()

        async def deep() -> None:
            await asyncio.to_thread(look)
            asyncio.get_running_loop().call_soon(look)
            await asyncio.sleep(1)
            look()

        async def handler(channel: Channel) -> None:
            look()

        await two.a._spawn(deep())
        two.b.handlers["test"] = handler
        opening = two.a._spawn(two.a.open(B, [], "test"))
        await opening
        await asyncio.sleep(1)
        look()
        assert seen == [two.a.incarnation] * 3 + [two.b.incarnation, None]

    run_simulated(main())


def test_a_thread_that_is_cut_ends_its_peer_there() -> None:
    done: list[str] = []

    async def main() -> None:
        network = FakeNetwork()
        peer = FakeTransport(network, A, TIMEOUTS)

        def write() -> None:
            done.append("file written")
            network.kill(A)
            raise Cut

        async def work() -> None:
            await asyncio.to_thread(write)
            done.append("state applied")

        await peer.incarnation.end_of(peer._spawn(work()))
        await asyncio.sleep(1)
        assert done == ["file written"]

    run_simulated(main())


def test_a_thread_ends_its_work_although_nobody_waits_for_it_any_more() -> None:
    done: list[str] = []

    async def main() -> None:
        task = asyncio.ensure_future(asyncio.to_thread(done.append, "written"))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(1)
        assert done == ["written"]
        assert task.cancelled()

    run_simulated(main())


def test_a_stopped_peer_does_everything_later_in_order_but_nothing_that_it_calls_off() -> None:
    done: list[tuple[str, float]] = []

    async def main() -> None:
        network = FakeNetwork()
        peer = FakeTransport(network, A, TIMEOUTS)
        began_s, loop = now_s(), asyncio.get_running_loop()

        def do(what: str) -> None:
            done.append((what, now_s() - began_s))

        async def work() -> None:
            called_off = loop.call_later(3.0, do, "called off")
            loop.call_later(2.0, called_off.cancel)
            loop.call_later(4.0, do, "third")
            loop.call_later(1.5, do, "first")
            await asyncio.sleep(2.5)
            do("second")
            await asyncio.sleep(10)
            do("fourth")

        peer._spawn(work())
        await asyncio.sleep(1)
        network.stop(A)
        await asyncio.sleep(5)
        assert done == []
        network.resume(A)
        await asyncio.sleep(20)
        assert done == [("first", 6.0), ("third", 6.0), ("second", 6.0), ("fourth", 16.0)]

    run_simulated(main())


def test_an_exception_that_nobody_hears_of_fails_the_test() -> None:
    async def fail() -> None:
        raise RuntimeError("unheard")

    async def main() -> None:
        peer = FakeTransport(FakeNetwork(), A, TIMEOUTS)
        peer._spawn(fail())
        await asyncio.sleep(1)

    with pytest.raises(AssertionError, match="unheard"):
        run_simulated(main())


def test_the_dead_are_buried_whatever_they_were_doing() -> None:
    async def stubborn() -> None:
        try:
            await asyncio.sleep(100)
        finally:
            await asyncio.sleep(1)
            raise RuntimeError("never seen")

    async def main() -> None:
        network = FakeNetwork()
        peer = FakeTransport(network, A, TIMEOUTS)
        peer._spawn(stubborn())
        await asyncio.sleep(1)
        peer._spawn(stubborn())
        network.kill(A)

    run_simulated(main())


# -- streams ---------------------------------------------------------------------------------------------------------


def test_bytes_stay_in_order_in_a_stream_and_streams_overtake_each_other() -> None:
    async def main() -> None:
        two = Two(latency_s=0.1, jitter=5.0)
        streams = [await two.stream() for _ in range(8)]
        came: list[tuple[int, bytes]] = []

        async def read(i: int, channel: Channel) -> None:
            for _ in range(5):
                came.append((i, await channel.reader.readexactly(1)))

        readers = [asyncio.ensure_future(read(i, theirs)) for i, (_, theirs) in enumerate(streams)]
        for letter in b"abcde":
            for mine, _ in streams:
                mine.writer.write(bytes([letter]))
        await asyncio.gather(*readers)
        assert all(b"".join(byte for j, byte in came if j == i) == b"abcde" for i in range(8))
        assert [i for i, byte in came if byte == b"a"] != list(range(8))

    run_simulated(main())


def test_who_is_not_read_waits() -> None:
    async def main() -> None:
        two = Two(buffer_bytes=100)
        mine, theirs = await two.stream()

        async def write() -> None:
            for _ in range(10):
                mine.writer.write(bytes(100))
                await mine.writer.drain()

        writing = asyncio.ensure_future(write())
        await asyncio.sleep(50)
        assert not writing.done()
        assert two.network.pipes
        assert await theirs.reader.readexactly(1000) == bytes(1000)
        await writing

    run_simulated(main())


def test_what_is_sent_to_a_stopped_peer_lies_there_until_it_goes_on() -> None:
    async def main() -> None:
        two = Two()
        mine, theirs = await two.stream()
        came: list[float] = []

        async def read() -> None:
            await theirs.reader.readexactly(3)
            came.append(now_s())

        two.b._spawn(read())
        await asyncio.sleep(1)
        two.network.stop(B)
        mine.writer.write(b"abc")
        await mine.writer.drain()
        await two.a.open(B, [], "test")  # its machine accepts streams
        await asyncio.sleep(5)
        assert not came
        assert two.served.empty()
        two.network.resume(B)
        await asyncio.sleep(1)
        assert len(came) == 1
        assert not two.served.empty()

    run_simulated(main())


def test_streams_of_the_killed_end_after_what_they_had_sent() -> None:
    async def main() -> None:
        two = Two(latency_s=0.5)
        mine, theirs = await two.stream()
        mine.writer.write(b"last words")
        two.network.kill(A)
        mine.writer.write(b"never written")
        began_s = now_s()
        assert await theirs.reader.read() == b"last words"
        assert now_s() - began_s == 0.5
        with pytest.raises(ConnectionResetError):
            await theirs.writer.drain()
        with pytest.raises(Gone):
            await two.b.open(A, [], "test")
        assert not two.network.pipes

    run_simulated(main())


def test_who_loses_its_power_says_nothing() -> None:
    async def main() -> None:
        two = Two()
        _, theirs = await two.stream()
        two.network.kill(A, silent=True)
        began_s = now_s()
        with pytest.raises(Silent):
            await two.b.open(A, [], "test")
        assert now_s() - began_s == TIMEOUTS.connect_s
        assert await theirs.reader.read() == b""
        assert now_s() - began_s == SILENT_RESET_S

    run_simulated(main())


@pytest.mark.parametrize("whole", [False, True])
def test_a_machine_that_is_stopped_as_a_whole_accepts_nothing(whole: bool) -> None:
    async def main() -> None:
        two = Two()
        two.network.stop(B, whole=whole)
        opening = asyncio.ensure_future(two.a.open(B, [], "test"))
        await asyncio.sleep(5)
        assert opening.done() != whole
        two.network.resume(B)
        await opening

    run_simulated(main())


def test_a_link_that_is_cut_and_restored() -> None:
    async def main() -> None:
        two = Two(latency_s=0.5)
        mine, theirs = await two.stream()
        mine.writer.write(b"on its way")
        two.network.cut(A, B, "reset")
        assert await theirs.reader.read() == b""
        assert await mine.reader.read() == b""
        with pytest.raises(ConnectionResetError):
            await mine.writer.drain()
        with pytest.raises(Gone):
            await two.a.open(B, [], "test")
        two.network.restore(A, B)
        await two.stream()

    run_simulated(main())


@pytest.mark.parametrize("longer", [False, True])
def test_a_pulled_cable_keeps_what_is_on_its_way_for_some_time(longer: bool) -> None:
    async def main() -> None:
        two = Two()
        mine, theirs = await two.stream()
        two.network.cut(A, B, "silent")
        mine.writer.write(b"patience")
        await mine.writer.drain()
        opening = asyncio.ensure_future(two.a.open(B, [], "test"))
        await asyncio.sleep(TIMEOUTS.connect_s + 1)
        assert isinstance(opening.exception(), Silent)
        reading = asyncio.ensure_future(theirs.reader.read(8))
        await asyncio.sleep(SILENT_RESET_S if longer else 1)
        assert reading.done() == longer
        two.network.restore(A, B)
        assert await reading == (b"" if longer else b"patience")

    run_simulated(main())


def test_one_direction_of_a_link_is_slow() -> None:
    async def main() -> None:
        two = Two(latency_s=0.5)
        mine, theirs = await two.stream()
        two.network.slow(A, B, 3.0)
        began_s = now_s()
        mine.writer.write(b"a")
        theirs.writer.write(b"b")
        await mine.reader.readexactly(1)
        assert now_s() - began_s == 0.5
        await theirs.reader.readexactly(1)
        assert now_s() - began_s == 3.5

    run_simulated(main())


def test_the_network_knows_since_when_all_is_well_between_two_peers() -> None:
    async def main() -> list[float]:
        two = Two()
        network, began_s = two.network, now_s()
        seen = [network.well_since_s(A, B)]
        story: list[tuple[Callable[[], object], Callable[[], object]]] = [
            (lambda: network.slow(B, A, 0.5), lambda: network.slow(B, A, 0.0)),
            (lambda: network.cut(A, B, "silent"), lambda: network.restore(B, A)),
            (lambda: network.stop(B), lambda: network.resume(B)),
            (lambda: network.kill(A), lambda: FakeTransport(network, A, TIMEOUTS)),
        ]
        for trouble, end in story:
            await asyncio.sleep(1)
            trouble()
            seen.append(network.well_since_s(A, B))
            await asyncio.sleep(1)
            end()
            seen.append(network.well_since_s(B, A) - began_s)
        return seen

    always, *later = run_simulated(main())
    assert always < 0
    assert later[::2] == [math.inf] * 4
    assert later[1::2] == [2, 4, 6, 8]


def test_who_cannot_be_dialled_can_be_called_back() -> None:
    async def main() -> None:
        two = Two()
        two.a.dialable = False
        two.a.handlers["test"] = two.b.handlers["test"]
        with pytest.raises(Gone):
            await two.b.open(A, [], "test")
        await two.a.open(B, [], "test")
        await two.b.open(A, [], "test")
        two.network.cut(A, B, "reset")
        two.network.restore(A, B)
        with pytest.raises(Gone):
            await two.b.open(A, [], "test")

    run_simulated(main())


@pytest.mark.parametrize("all_of_it", [False, True])
def test_an_echo_says_the_same_in_a_stream_of_its_own(all_of_it: bool) -> None:
    async def main() -> None:
        two = Two(echo=1.0)
        two.network.random = Choosing(all_of_it)
        mine = await two.a.open(B, [], "test")
        await mine.send_frame(b"first")
        await mine.send_frame(b"second")
        mine.close()
        heard = [await (await two.served.get()).reader.read() for _ in range(2)]
        first, both = b"\0\0\0\x05first", b"\0\0\0\x05first\0\0\0\x06second"
        assert sorted(heard) == sorted([both, both if all_of_it else first])

    run_simulated(main())


class Choosing(random.Random):
    """The last of what there is to choose, or the first."""

    def __init__(self, last: bool) -> None:
        super().__init__(0)
        self.last = last

    def choice(self, options: Any) -> Any:
        return options[-1 if self.last else 0]


# -- the DHT ---------------------------------------------------------------------------------------------------------


def record(index: int, number: int) -> bytes:
    who = identity(index)
    return seal_record(record_of(who, issued_s=now_s() + number), who)


def test_records_of_the_other_side_of_a_partition_are_not_found() -> None:
    async def main() -> None:
        network = FakeNetwork()
        a, b, c = (FakeTransport(network, peer_id, TIMEOUTS) for peer_id in (A, B, C))
        for i, node in enumerate((a, b, c), start=1):
            await node.publish(KEY, record(i, 0), now_s() + 100)
        network.cut(A, B, "reset")
        assert len(await a.look_up(KEY)) == 3, "C tells A of B"
        network.cut(B, C, "reset")
        assert len(await a.look_up(KEY)) == 2
        assert len(await b.look_up(KEY)) == 1
        network.kill(C)
        assert len(await a.look_up(KEY)) == 2, "others keep the record of one that died"
        network.restore(A, B)
        assert len(await a.look_up(KEY)) == 3
        await asyncio.sleep(100)
        assert await a.look_up(KEY) == []

    run_simulated(main())


def test_a_dht_in_trouble_loses_records_and_brings_them_late_and_out_of_order() -> None:
    async def main() -> None:
        network = FakeNetwork(dht_trouble=1.0)
        a = FakeTransport(network, A, TIMEOUTS)
        found: list[bytes] = []
        records = [record(1, number) for number in range(40)]
        for one in records:
            await a.publish(KEY, one, now_s() + 1000)
            found += await a.look_up(KEY)
        await asyncio.sleep(LATE_S)
        numbers = [records.index(one) for one in found]
        assert 0 < len(numbers) < 40, "some look-ups find nothing"
        assert set(range(40)) - set(numbers), "some records are lost"
        assert numbers != sorted(numbers), "some come after newer ones"

    run_simulated(main())


def test_the_network_is_nobody() -> None:
    assert NOBODY.run(RUNNING.get) is None
