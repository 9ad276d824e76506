"""Catching up from donors of our own, and from donors that break one rule each."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest

from p2p_diloco.core.certificate import Certified
from p2p_diloco.core.digest import HASH_BYTES
from p2p_diloco.core.grid import Grid
from p2p_diloco.core.update import max_update_bytes, update_to_bytes
from p2p_diloco.core.waiting import now_s
from p2p_diloco.ledger.replica import Replica
from p2p_diloco.ledger.snapshot import snapshot_bytes
from p2p_diloco.peer import download, uploads
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.message import Message
from p2p_diloco.wire.messages import No, Size, pack
from p2p_diloco.wire.state_messages import AskChain, AskChunk, AskHeads, AskIndex, AskUpdate, Heads
from tests.support.fakes import run_simulated
from tests.support.library import (
    CHUNK_BYTES,
    CHUNKS,
    DONORS,
    EVERY,
    FRAME_BYTES,
    TIMEOUTS,
    Donor,
    Library,
    Lie,
    N,
    after,
    frames,
    new_replica,
    on,
    one_bit,
    replica_at,
    says,
    send_chunk,
    silent,
    small_parts,
    update_after,
)


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    with small_parts():
        yield


def blob_bytes(replica: Replica, step: int) -> int:
    """What an update takes on its stream: its size in a message, then frames."""
    data = replica.ledger.update_bytes(step)
    assert data is not None
    frames = math.ceil(len(data) / FRAME_BYTES)
    return 4 + len(pack(Size(size_bytes=len(data)))) + 4 * frames + len(data)


# -- honest donors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 3, 5, 13])
def test_a_newcomer(tmp_path: Path, step: int) -> None:
    async def main() -> None:
        library = Library(tmp_path, new_replica(tmp_path / "me"))
        donor = library.add(replica_at(tmp_path / "donor", step))
        caught_up = await library.to(donor.replica)
        snapshot_step = max(step - 1, 0) // EVERY * EVERY  # that of the target's own step is in no certificate yet
        assert caught_up is not None
        assert (caught_up.from_step, caught_up.to_step, caught_up.rolled_back) == (None, step, 0)
        assert (caught_up.snapshot, caught_up.donors) == (True, 1)
        assert caught_up.bytes_received >= snapshot_bytes(N) - 512
        assert (donor.count(AskIndex), sorted(donor.chunks())) == (1, list(range(CHUNKS)))
        assert donor.steps() == list(range(snapshot_step, step))
        library.check_same(donor.replica)
        assert library.phases() == [("download", snapshot_step)]
        streams = [("serve", snapshot_step)] + [("serve", snapshot_step)] * (step > snapshot_step)
        assert donor.phases() == streams

    run_simulated(main())


@pytest.mark.parametrize("mine", [0, 6, 12])
def test_who_missed_rounds_gets_the_updates(tmp_path: Path, mine: int) -> None:
    async def main() -> None:
        library = Library(tmp_path, replica_at(tmp_path / "me", mine))
        donor = library.add(replica_at(tmp_path / "donor", 13))
        caught_up = await library.to(donor.replica)
        assert caught_up is not None
        has_it = mine >= 5  # the donor keeps its updates from its second snapshot on
        assert (caught_up.from_step, caught_up.snapshot, caught_up.rolled_back) == (mine, not has_it, 0)
        assert donor.steps() == list(range(mine if has_it else 10, 13))
        if has_it:
            chain_bytes = len(msgpack.packb(donor.replica.ledger.chain.pieces(mine, 10**6)))
            updates_bytes = sum(blob_bytes(donor.replica, step) for step in range(mine, 13))
            assert caught_up.bytes_received == chain_bytes + updates_bytes
        assert (library.phases() == []) == has_it
        library.check_same(donor.replica)

    run_simulated(main())


def test_nothing_is_loaded_again_for_an_update_that_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Going back reads a snapshot, and every update since: only who stands elsewhere has to."""
    rolled_back: list[int] = []

    async def main(fork_at: int) -> None:
        library = Library(tmp_path / str(fork_at), replica_at(tmp_path / str(fork_at) / "me", 7, fork_at=fork_at))
        donor = library.add(replica_at(tmp_path / str(fork_at) / "donor", 10))
        roll_back = library.replica.roll_back

        def noted(step: int, entries: Sequence[Certified]) -> None:
            rolled_back.append(step)
            roll_back(step, entries)

        monkeypatch.setattr(library.replica, "roll_back", noted)
        assert await library.to(donor.replica) is not None
        library.check_same(donor.replica)

    run_simulated(main(8))
    assert rolled_back == []
    run_simulated(main(6))
    assert rolled_back == [6]


def test_several_donors_give_a_part_each(tmp_path: Path) -> None:
    """And the download is the faster for it."""

    async def download_from(count: int) -> float:
        library = Library(tmp_path / str(count), new_replica(tmp_path / str(count) / "me"))
        swarm = replica_at(tmp_path / str(count) / "swarm", 14)
        began_s: list[float] = []

        async def note(donor: Donor, channel: Channel, message: Message) -> bool:
            """The chain comes from one donor, before."""
            if isinstance(message, AskIndex):
                began_s.append(now_s())
            return False

        for _ in range(count):
            library.add(swarm, note, max_bytes_per_s=5 * CHUNK_BYTES)
        caught_up = await library.to(swarm)
        took_s = now_s() - began_s[0]
        assert caught_up is not None
        assert caught_up.donors == count
        assert sorted(chunk for donor in library.donors for chunk in donor.chunks()) == list(range(CHUNKS))
        assert sorted(step for donor in library.donors for step in donor.steps()) == [10, 11, 12, 13]
        assert min(donor.count(AskChunk) for donor in library.donors) >= CHUNKS // count - 1
        assert min(donor.count(AskUpdate) for donor in library.donors) >= 1
        assert library.suspects() == []
        library.check_same(swarm)
        return took_s

    async def main() -> None:
        alone_s, four_s = await download_from(1), await download_from(4)
        assert four_s < 0.5 * alone_s

    run_simulated(main())


def test_four_donors_at_a_time_are_enough(tmp_path: Path) -> None:
    async def main() -> None:
        library = Library(tmp_path, new_replica(tmp_path / "me"))
        swarm = replica_at(tmp_path / "swarm", 6)
        for _ in DONORS:
            library.add(swarm)
        assert await library.to(swarm) is not None
        assert [donor.count(AskChunk) > 0 for donor in library.donors] == [True] * 4 + [False] * 2

    run_simulated(main())


def test_no_more_updates_are_on_their_way_than_there_is_memory_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> list[int]:
        ahead: list[int] = []

        async def note(donor: Donor, channel: Channel, message: Message) -> bool:
            if isinstance(message, AskUpdate):
                ahead.append(message.step - library.replica.loaded.step)
            return False

        library = Library(tmp_path, replica_at(tmp_path / "me", 5))
        swarm = replica_at(tmp_path / "swarm", 14)
        for _ in range(4):
            library.add(swarm, note)
        assert await library.to(swarm) is not None
        library.check_same(swarm)
        return ahead

    ahead = run_simulated(main())
    assert len(ahead) == 9
    assert max(ahead) >= 2
    monkeypatch.setattr(download, "AHEAD_BYTES", 0)
    for folder in ("me", "swarm"):
        (tmp_path / folder).rename(tmp_path / f"first-{folder}")
    assert max(run_simulated(main())) == 1


def test_on_the_way_to_a_target_the_donor_has_passed(tmp_path: Path) -> None:
    async def main() -> None:
        library = Library(tmp_path, replica_at(tmp_path / "me", 6))
        donor = library.add(replica_at(tmp_path / "donor", 9))
        target = replica_at(tmp_path / "target", 8)
        assert await library.to(target) is not None
        assert donor.steps() == [6, 7]
        library.check_same(target)

    run_simulated(main())


@pytest.mark.parametrize(
    ("mine", "fork_at", "theirs", "snapshot"),
    [
        (7, 6, 8, False),
        (8, 6, 7, False),  # and further than the swarm
        (9, 2, 13, True),  # no snapshot from before the fork is left at the donor
        (24, 1, 3, True),  # nor here: all my snapshots are newer than where the swarm is
        (24, 1, 9, True),
        (14, 3, 14, True),
    ],
)
def test_who_went_another_way_returns(tmp_path: Path, mine: int, fork_at: int, theirs: int, snapshot: bool) -> None:
    async def main() -> None:
        library = Library(tmp_path, replica_at(tmp_path / "me", mine, fork_at=fork_at))
        donor = library.add(replica_at(tmp_path / "donor", theirs))
        caught_up = await library.to(donor.replica)
        assert caught_up is not None
        assert (caught_up.from_step, caught_up.to_step, caught_up.snapshot) == (mine, theirs, snapshot)
        assert caught_up.rolled_back == mine - fork_at if not snapshot else 0 < caught_up.rolled_back <= mine - fork_at
        library.check_same(donor.replica)
        kept = [path.name for path in (tmp_path / "me" / "abandoned").rglob("*")]
        assert {f"{mine - 1:010d}.update", "chain"} <= set(kept)
        assert library.suspects() == []

    run_simulated(main())


@pytest.mark.parametrize(("served", "stays_at"), [(0, 8), (1, 7)])
def test_nothing_is_given_up_before_there_is_something_in_its_place(tmp_path: Path, served: int, stays_at: int) -> None:
    """And what was given up for a way that then broke off is told with the catch-up that succeeds."""

    async def refuse(donor: Donor, channel: Channel, message: Message) -> bool:
        refused = isinstance(message, AskUpdate) and message.step >= 6 + served
        if refused:
            await channel.send(No(reason="busy serving others"))
        return refused

    async def main() -> None:
        library = Library(tmp_path, replica_at(tmp_path / "me", 8, fork_at=6))
        swarm = replica_at(tmp_path / "swarm", 9)
        library.add(swarm, refuse)
        mine = library.replica.loaded.head
        assert await library.to(swarm) is None
        assert library.replica.loaded.step == stays_at
        assert (library.replica.loaded.head == mine) == (served == 0)
        library.add(swarm)
        caught_up = await library.to(swarm)
        assert caught_up is not None
        assert caught_up.rolled_back == 2
        library.check_same(swarm)

    run_simulated(main())


@pytest.mark.parametrize("mine", [9, 10])
def test_who_returned_first_helps_those_who_had_gone_with_it(tmp_path: Path, mine: int) -> None:
    async def main() -> None:
        swarm = replica_at(tmp_path / "swarm", 13)
        first = Library(tmp_path / "1", replica_at(tmp_path / "first", mine, fork_at=2))
        first.add(swarm)
        assert await first.to(swarm) is not None
        second = Library(tmp_path / "2", replica_at(tmp_path / "second", mine, fork_at=2))
        second.add(first.replica)
        assert await second.to(swarm) is not None
        second.check_same(swarm)
        assert second.suspects() == []

    run_simulated(main())


def test_a_donor_that_is_elsewhere_is_passed_over(tmp_path: Path) -> None:
    async def main() -> None:
        library = Library(tmp_path, replica_at(tmp_path / "me", 3))
        swarm = replica_at(tmp_path / "donor", 6)
        library.add(replica_at(tmp_path / "other", 4), step=6, head=swarm.loaded.head)
        assert await library.to(swarm) is None
        assert library.replica.loaded.step == 3
        library.add(swarm)
        assert await library.to(swarm) is not None
        library.check_same(swarm)
        assert library.suspects() == []

    run_simulated(main())


@pytest.mark.parametrize("changes", [{"phase": "joining"}, {"phase": "left"}, {"head": bytes(32), "heads": []}])
def test_who_cannot_help_is_not_asked(tmp_path: Path, changes: dict[str, Any]) -> None:
    async def main() -> None:
        library = Library(tmp_path, replica_at(tmp_path / "me", 3))
        donor = library.add(replica_at(tmp_path / "donor", 6), **changes)
        assert await library.to(donor.replica) is None
        assert donor.asked == []
        assert not library.catchup.promising

    run_simulated(main())


def test_nobody_is_asked_for_an_outer_step_that_the_run_does_not_have(tmp_path: Path) -> None:
    async def main() -> None:
        library = Library(tmp_path, replica_at(tmp_path / "me", 3))
        donor = library.add(replica_at(tmp_path / "donor", 6), step=51)
        assert await library.catchup.to((51, donor.replica.loaded.head)) is None
        assert donor.asked == []

    run_simulated(main())


# -- donors that lie: the first one asked does, the second one helps ------------------------------------------------


def size(size_bytes: int) -> bytes:
    packed: bytes = msgpack.packb(["size", {"size_bytes": size_bytes}])
    return packed


async def trickle(donor: Donor, channel: Channel, message: Message) -> None:
    await channel.send(Size(size_bytes=CHUNK_BYTES))
    channel.writer.write(CHUNK_BYTES.to_bytes(4, "big"))
    for _ in range(CHUNK_BYTES):
        channel.writer.write(b"x")
        await asyncio.sleep(1)


async def half_a_chunk(donor: Donor, channel: Channel, message: Message) -> None:
    """The frame breaks off in the middle."""
    await channel.send(Size(size_bytes=CHUNK_BYTES))
    channel.writer.write(CHUNK_BYTES.to_bytes(4, "big") + bytes(CHUNK_BYTES // 2))


async def another_chunk(donor: Donor, channel: Channel, message: AskChunk) -> None:
    await send_chunk(donor.replica, channel, (message.chunk + 1) % CHUNKS)


async def another_steps_chunk(donor: Donor, channel: Channel, message: AskChunk) -> None:
    other = replica_at(donor.replica.ledger.folder.parent / f"{donor.who.peer_id}-other", 10)
    await send_chunk(other, channel, message.chunk)


async def index_of_another_step(donor: Donor, channel: Channel, message: AskIndex) -> None:
    other = replica_at(donor.replica.ledger.folder.parent / f"{donor.who.peer_id}-other", 10).newest_snapshot()
    await channel.send_blob(b"".join((other.head, *other.chunk_hashes)))


async def index_with_one_hash_changed(donor: Donor, channel: Channel, message: AskIndex) -> None:
    info = donor.replica.newest_snapshot()
    await channel.send_blob(b"".join((info.head, bytes(32), *info.chunk_hashes[1:])))


async def other_update(donor: Donor, channel: Channel, message: AskUpdate) -> None:
    """Sound, and following from the joiner's state, but another one."""
    folder = donor.replica.ledger.folder.parent / f"own-{message.step}"
    await channel.send_blob(update_to_bytes(update_after(replica_at(folder, message.step), seed=9)[0]))


async def another_steps_update(donor: Donor, channel: Channel, message: AskUpdate) -> None:
    data = donor.replica.ledger.update_bytes(message.step + 1 if message.step < 8 else 5)
    assert data is not None
    await channel.send_blob(data)


async def update_with_other_parts(donor: Donor, channel: Channel, message: AskUpdate) -> None:
    data = donor.replica.ledger.update_bytes(message.step)
    assert data is not None
    await channel.send_blob(data[:-1] + bytes([data[-1] ^ 1]))


INDEX_BYTES = HASH_BYTES * (1 + CHUNKS)
CHUNK_LIES: dict[str, Lie] = {
    "closes": on(AskChunk, says()),
    "refuses": on(AskChunk, says(No(reason="not in my ledger"))),
    "is silent": on(AskChunk, silent),
    "trickles": on(AskChunk, trickle),
    "out of turn": on(AskChunk, says(Heads(first=0, head=bytes(32), links=[]))),
    "endless": on(AskChunk, frames(size(2**59), *[bytes(FRAME_BYTES)] * 9)),
    "too large": on(AskChunk, frames(size(CHUNK_BYTES + 1), bytes(CHUNK_BYTES + 1))),
    "too small": on(AskChunk, frames(size(CHUNK_BYTES - 1), bytes(CHUNK_BYTES - 1))),
    "nothing": on(AskChunk, frames(size(0))),
    "frame too long": on(AskChunk, frames(size(CHUNK_BYTES), bytes(CHUNK_BYTES + 1))),
    "frame too short": on(AskChunk, frames(size(CHUNK_BYTES), bytes(CHUNK_BYTES - 1))),
    "frame empty": on(AskChunk, frames(size(CHUNK_BYTES), b"")),
    "stops in the middle": on(AskChunk, half_a_chunk),
    "zeros": on(AskChunk, frames(size(CHUNK_BYTES), bytes(CHUNK_BYTES))),
    "another chunk": on(AskChunk, another_chunk),
    "of another step": on(AskChunk, another_steps_chunk),
    "one bit": on(AskChunk, one_bit),
    "one bit later": after(3, AskChunk, on(AskChunk, one_bit)),
    "dies later": after(3, AskChunk, on(AskChunk, says())),
}
INDEX_LIES: dict[str, Lie] = {
    "index: closes": on(AskIndex, says()),
    "index: refuses": on(AskIndex, says(No(reason="not in my ledger"))),
    "index: is silent": on(AskIndex, silent),
    "index: endless": on(AskIndex, frames(size(2**59), *[bytes(FRAME_BYTES)] * 9)),
    "index: too long": on(AskIndex, frames(size(INDEX_BYTES + 32), bytes(INDEX_BYTES + 32))),
    "index: too short": on(AskIndex, frames(size(INDEX_BYTES - 32), bytes(FRAME_BYTES), bytes(128))),
    "index: nothing": on(AskIndex, frames(size(0))),
    "index: zeros": on(AskIndex, frames(size(INDEX_BYTES), bytes(FRAME_BYTES), bytes(160))),
    "index: of another step": on(AskIndex, index_of_another_step),
    "index: one hash": on(AskIndex, index_with_one_hash_changed),
}
UPDATE_LIES: dict[str, Lie] = {
    "closes": on(AskUpdate, says()),
    "refuses": on(AskUpdate, says(No(reason="gone or found damaged"))),
    "silent": on(AskUpdate, silent),
    "endless": on(AskUpdate, frames(size(2**59), *[bytes(FRAME_BYTES)] * 9)),
    "too large": on(AskUpdate, frames(size(max_update_bytes(Grid(n=N, codec="int8")) + 1))),
    "nothing": on(AskUpdate, frames(size(0))),
    "garbage": on(AskUpdate, frames(size(500), bytes(FRAME_BYTES), bytes(500 - FRAME_BYTES))),
    "another one": on(AskUpdate, other_update),
    "of another step": on(AskUpdate, another_steps_update),
    "other parts": on(AskUpdate, update_with_other_parts),
}
HONEST = {"refuses", "index: refuses"}
SLOWLY = {"is silent", "trickles", "silent"}
"""They owe it to the end: somebody else gives it before their time is up."""


@pytest.mark.parametrize("name", [*CHUNK_LIES, *INDEX_LIES])
def test_a_newcomer_is_not_kept_by_a_donor_that_lies(tmp_path: Path, name: str) -> None:
    async def main() -> None:
        library = Library(tmp_path, new_replica(tmp_path / "me"))
        liar = library.add(replica_at(tmp_path / "liar", 7), (CHUNK_LIES | INDEX_LIES)[name])
        donor = library.add(replica_at(tmp_path / "donor", 7))
        began_s = now_s()
        caught_up = await library.to(donor.replica)
        assert caught_up is not None
        assert caught_up.snapshot
        library.check_same(donor.replica)
        assert liar.count(AskIndex) == 1
        if name in CHUNK_LIES:
            assert 0 < liar.count(AskChunk) <= 5
        assert library.suspects() == ([] if name in HONEST | SLOWLY else [0])
        assert name in HONEST | SLOWLY or library.transport.traffic.rejected.total() == 1
        assert [info.step for info in library.replica.ledger.snapshots()] == [5]
        assert now_s() - began_s < TIMEOUTS.reduced_part_s + 5

    run_simulated(main())


@pytest.mark.parametrize("name", UPDATE_LIES)
def test_who_missed_rounds_is_not_kept_by_a_donor_that_lies(tmp_path: Path, name: str) -> None:
    async def main() -> None:
        library = Library(tmp_path, replica_at(tmp_path / "me", 6))
        liar = library.add(replica_at(tmp_path / "liar", 9), UPDATE_LIES[name])
        donor = library.add(replica_at(tmp_path / "donor", 9))
        began_s = now_s()
        assert await library.to(donor.replica) is not None
        library.check_same(donor.replica)
        assert liar.count(AskUpdate) == 1
        assert sorted(donor.steps()) == [6, 7, 8]
        assert library.suspects() == ([] if name in HONEST | SLOWLY else [0])
        assert not (tmp_path / "me" / "abandoned").exists()
        assert now_s() - began_s < TIMEOUTS.reduced_part_s + 5

    run_simulated(main())


async def in_the_end(donor: Donor, channel: Channel, message: Message) -> bool:
    """A donor that gives all but its last chunk or update at once, and that one a byte at a time."""
    if isinstance(message, AskChunk) and message.chunk == CHUNKS - 1:
        await trickle(donor, channel, message)
    return False


def test_a_slow_donor_does_not_hold_up_the_end(tmp_path: Path) -> None:
    async def main() -> None:
        swarm = replica_at(tmp_path / "swarm", 5)
        took_s = []
        for name, lie in (("honest", None), ("slow", in_the_end)):
            library = Library(tmp_path / name, new_replica(tmp_path / name / "me"))
            for _ in range(2):
                library.add(swarm, lie)
                lie = None
            began_s = now_s()
            assert await library.to(swarm) is not None
            took_s.append(now_s() - began_s)
            library.check_same(swarm)
            last = [CHUNKS - 1 in donor.chunks() for donor in library.donors]
            assert last in ([[True, False], [False, True]] if name == "honest" else [[True, True], [False, True]])
        assert took_s[1] < took_s[0] + 2 * 2 * CHUNK_BYTES / TIMEOUTS.slow_rate_bytes_per_s

    run_simulated(main())


def test_a_donor_that_has_nothing_to_give_is_left_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the last chunk of another one is awaited, its only slot is free."""
    monkeypatch.setattr(uploads, "UPLOADS", 1)

    async def main() -> None:
        library = Library(tmp_path, new_replica(tmp_path / "me"))
        swarm = replica_at(tmp_path / "swarm", 5)
        stalled: list[Donor] = []
        served: list[Message] = []

        async def stall(donor: Donor, channel: Channel, message: Message) -> bool:
            if isinstance(message, AskChunk) and message.chunk == CHUNKS - 1:
                stalled.append(donor)
                await asyncio.sleep(0.5)
                stream = await library.open(next(other for other in library.donors if other is not donor))
                chunk = AskChunk(step=5, digest=swarm.newest_snapshot().digest, chunk=0)
                served.append(await stream.request(chunk, Size))
                stream.close()
            return False

        for _ in range(2):
            library.add(swarm, stall)
        assert await library.to(swarm) is not None
        assert served == [Size(size_bytes=CHUNK_BYTES)]
        assert len(stalled) == 1
        library.check_same(swarm)

    run_simulated(main())


def test_a_guide_that_is_silent_costs_little_where_another_one_answers(tmp_path: Path) -> None:
    """A home whose connection is dead, and nobody was told: the seed takes the update from others in time for the next
    round."""

    async def main() -> None:
        library = Library(tmp_path, replica_at(tmp_path / "me", 8))
        dead = library.add(replica_at(tmp_path / "dead", 9), on(AskHeads, silent))
        donor = library.add(replica_at(tmp_path / "donor", 9))
        began_s = now_s()
        caught_up = await library.to(donor.replica)
        assert caught_up is not None
        assert TIMEOUTS.least_wait_s <= now_s() - began_s < TIMEOUTS.least_wait_s + 1
        assert [type(message) for message in dead.asked[:1]] == [AskHeads]
        library.check_same(donor.replica)

    run_simulated(main())


def test_a_guide_that_is_slow_to_answer_is_asked_once_more_where_there_is_no_other(tmp_path: Path) -> None:
    async def slow(donor: Donor, channel: Channel, message: Message) -> bool:
        if isinstance(message, AskHeads):
            await asyncio.sleep(2 * TIMEOUTS.least_wait_s)
        return False

    async def main() -> None:
        library = Library(tmp_path, replica_at(tmp_path / "me", 8))
        donor = library.add(replica_at(tmp_path / "donor", 9), slow)
        assert await library.to(donor.replica) is not None
        assert library.suspects() == []
        library.check_same(donor.replica)

    run_simulated(main())


def test_a_slow_donor_does_not_hold_up_an_update(tmp_path: Path) -> None:
    """A donor that stalls in the middle of one: it is asked from another one, long before the time is up."""

    async def main() -> None:
        late_s = max_update_bytes(Grid(n=N, codec="int8")) / 20_000
        library = Library(
            tmp_path, replica_at(tmp_path / "me", 8), timeouts=replace(TIMEOUTS, slow_rate_bytes_per_s=20_000)
        )
        stalled = library.add(replica_at(tmp_path / "stalled", 9), on(AskUpdate, silent))
        donor = library.add(replica_at(tmp_path / "donor", 9))
        began_s = now_s()
        caught_up = await library.to(donor.replica)
        assert caught_up is not None
        assert (stalled.steps(), donor.steps(), caught_up.donors) == ([8], [8], 1)
        assert late_s < now_s() - began_s < late_s + 1 < TIMEOUTS.reduced_part_s
        library.check_same(donor.replica)

    run_simulated(main())


def test_a_busy_donor_is_left_alone_and_asked_another_time(tmp_path: Path) -> None:
    async def main() -> None:
        library = Library(tmp_path, new_replica(tmp_path / "me"))
        donor = library.add(replica_at(tmp_path / "donor", 6))
        info = donor.replica.newest_snapshot()
        others = [await library.open(donor, 100 + i) for i in range(uploads.UPLOADS)]
        for channel in others:
            await channel.request(AskChunk(step=5, digest=info.digest, chunk=0), Size)
        assert await library.to(donor.replica) is None
        assert library.suspects() == []
        assert library.catchup.promising
        assert [type(event) for event in donor.asked[uploads.UPLOADS :]] == [AskHeads, AskChain, AskIndex, AskChunk]
        others[0].close()
        await asyncio.sleep(1)
        assert await library.to(donor.replica) is not None
        library.check_same(donor.replica)

    run_simulated(main())


def test_one_that_is_busy_beside_one_that_is_not(tmp_path: Path) -> None:
    async def main() -> None:
        library = Library(tmp_path, new_replica(tmp_path / "me"))
        busy = library.add(
            replica_at(tmp_path / "busy", 6), after(2, AskChunk, on(AskChunk, says(No(reason="busy serving others"))))
        )
        donor = library.add(replica_at(tmp_path / "donor", 6))
        caught_up = await library.to(donor.replica)
        assert caught_up is not None
        assert caught_up.donors == 2
        assert busy.count(AskChunk) >= 3
        assert library.suspects() == []
        library.check_same(donor.replica)

    run_simulated(main())


# -- fetching without committing -----------------------------------------------------------------------------------


def test_one_update_from_whoever_has_it(tmp_path: Path) -> None:
    async def main() -> None:
        library = Library(tmp_path, replica_at(tmp_path / "me", 6))
        swarm = replica_at(tmp_path / "swarm", 12)
        fork = library.add(replica_at(tmp_path / "fork", 12, fork_at=3))
        liar = library.add(swarm, on(AskUpdate, update_with_other_parts))
        behind = library.add(replica_at(tmp_path / "behind", 7))
        donor = library.add(swarm)
        head = swarm.ledger.heads()[8]
        update = await library.catchup.fetch_update(7, head)
        assert update is not None
        assert (update.header.step, update.header.head) == (7, head)
        assert [each.count(AskUpdate) for each in (fork, liar, behind, donor)] == [1, 1, 0, 1]
        assert library.suspects() == [1]
        assert library.replica.loaded.step == 6
        assert await library.catchup.fetch_update(7, bytes(32)) is None
        assert await library.catchup.fetch_update(40, head) is None

    run_simulated(main())


@pytest.mark.parametrize(("mine", "fork_at", "ahead"), [(7, 8, True), (6, 8, False), (7, 3, False)])
def test_the_one_update_that_is_missing_is_there_before_it_is_asked_for(
    tmp_path: Path, mine: int, fork_at: int, ahead: bool
) -> None:
    """Nobody need be asked for anything then; where more is missing, or I am elsewhere, all goes as without it."""

    async def main() -> None:
        library = Library(tmp_path, replica_at(tmp_path / "me", mine, fork_at=fork_at))
        liar = library.add(replica_at(tmp_path / "liar", 8), on(AskUpdate, update_with_other_parts))
        donor = library.add(replica_at(tmp_path / "donor", 8))
        target = (8, donor.replica.loaded.head)
        await library.fetch_ahead(target)
        await library.fetch_ahead(target)
        assert library.replica.loaded.step == mine
        asked = [len(each.asked) for each in (liar, donor)]
        caught_up = await library.catchup.to(target)
        assert caught_up is not None
        assert (caught_up.from_step, caught_up.to_step) == (mine, 8)
        assert ([len(each.asked) for each in (liar, donor)] == asked) == ahead
        assert (caught_up.bytes_received == 0) == ahead
        assert caught_up.donors == 1
        library.check_same(donor.replica)

    run_simulated(main())


def test_an_update_that_was_fetched_ahead_and_cannot_be_applied_is_its_donors_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        library = Library(tmp_path, replica_at(tmp_path / "me", 7))
        donor = library.add(replica_at(tmp_path / "donor", 8))
        target = (8, donor.replica.loaded.head)
        await library.fetch_ahead(target)

        def refuse(update: object, certificate: object) -> None:
            raise ValueError("an update that leads nowhere")

        monkeypatch.setattr(library.replica, "commit", refuse)
        assert await library.catchup.to(target) is None
        assert library.suspects() == [0]
        assert library.replica.loaded.step == 7

    run_simulated(main())
