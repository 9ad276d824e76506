"""Catching up from donors of our own, and from donors written by hand that break one rule each."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from builders import NOW_S, identity, record_of
from fakes import FakeNetwork, FakeTransport, make_manifest, run_simulated

from p2p_diloco import catchup, wire
from p2p_diloco.catchup import Catchup, CaughtUp
from p2p_diloco.codec import encode
from p2p_diloco.config import Timeouts
from p2p_diloco.errors import Gone, Refused
from p2p_diloco.identity import Identity
from p2p_diloco.ledger import Ledger
from p2p_diloco.outer import Part, Update, UpdateHeader, genesis_state, max_update_bytes, update_to_bytes
from p2p_diloco.records import Directory, seal_record
from p2p_diloco.replica import Replica
from p2p_diloco.rounds import rank
from p2p_diloco.snapshot import snapshot_bytes
from p2p_diloco.wire import AskHeads, AskSnapshot, AskUpdate, Channel, Heads, Message, No, Size, run_protocol

N = 300
EVERY = 5
CHUNK_BYTES = 1000
GENESIS = np.linspace(-1, 1, N, dtype=np.float32)
MANIFEST = make_manifest(N, GENESIS, identity(1000), codec="int8")
PROTOCOL = run_protocol(MANIFEST.run_id)
TIMEOUTS = Timeouts()
ME = identity(1)
DONORS = sorted((identity(i) for i in range(2, 6)), key=lambda who: rank(ME.peer_id.encode(), who.peer_id))
"""In the order in which ME asks them."""

Lie = Callable[["Donor", Channel, Message], Awaitable[bool]]
"""Whether it has answered; if not, the donor answers as it should."""


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot takes three chunks."""
    monkeypatch.setattr(wire, "CHUNK_BYTES", CHUNK_BYTES)
    monkeypatch.setattr(catchup, "CHUNK_BYTES", CHUNK_BYTES)


def new_replica(folder: Path) -> Replica:
    outer = MANIFEST.spec.outer
    ledger = Ledger(
        folder,
        n=N,
        codec=outer.codec,
        lr=outer.lr,
        momentum=outer.momentum,
        snapshot_every=EVERY,
        run_id=MANIFEST.run_id,
    )
    return Replica(MANIFEST, ledger, np.full(N, 7, np.float32), np.full(N, 7, np.float32))


def update_after(replica: Replica, seed: int = 0) -> Update:
    state = replica.loaded
    values = np.random.default_rng([state.step, seed]).standard_normal(N).astype(np.float32)
    part = Part(mask=b"\x01", data=encode(values, "int8"))
    header = UpdateHeader(step=state.step, parent=state.head, contributors=(("a", 5),), part_hashes=(part.hash,))
    return Update(header=header, parts=(part,))


def advance(replica: Replica, to_step: int, seed: int = 0) -> Replica:
    while replica.loaded.step < to_step:
        replica.commit(update_after(replica, seed))
        replica.snapshot_if_due()
    return replica


def replica_at(folder: Path, step: int, *, fork_at: int = 10**6, seed: int = 1) -> Replica:
    """One that made ``step`` outer steps from the genesis, those from ``fork_at`` on as the swarm did not."""
    replica = new_replica(folder)
    replica.ledger.write_snapshot(genesis_state(GENESIS.copy()))
    replica.load()
    advance(replica, min(step, fork_at))
    return advance(replica, step, seed)


@dataclass(eq=False)
class Donor:
    who: Identity
    replica: Replica
    catchup: Catchup
    lie: Lie | None
    asked: list[Message] = field(default_factory=list)

    async def serve(self, channel: Channel) -> None:
        message: Message = await channel.receive(AskHeads, AskUpdate, AskSnapshot, timeout_s=10.0)
        self.asked.append(message)
        if self.lie is not None and await self.lie(self, channel, message):
            return
        if isinstance(message, AskHeads):
            await self.catchup.on_ask_heads(channel, message)
        elif isinstance(message, AskUpdate):
            await self.catchup.on_ask_update(channel, message)
        elif isinstance(message, AskSnapshot):
            await self.catchup.on_ask_snapshot(channel, message)

    def count(self, kind: type[Message]) -> int:
        return sum(isinstance(message, kind) for message in self.asked)


@dataclass(eq=False)
class Library:
    """One joiner and its donors."""

    folder: Path
    replica: Replica
    """The joiner's."""
    donors: list[Donor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.network = FakeNetwork()
        self.directory = Directory(ME.peer_id, MANIFEST.run_id)
        self.transport = FakeTransport(self.network, ME.peer_id, TIMEOUTS)
        self.catchup = self._catchup(ME, self.transport, self.directory, self.replica)

    def _catchup(self, who: Identity, transport: FakeTransport, directory: Directory, replica: Replica) -> Catchup:
        return Catchup(
            transport=transport,
            identity=who,
            directory=directory,
            replica=replica,
            timeouts=TIMEOUTS,
            wall_s=lambda: NOW_S,
        )

    def add(self, replica: Replica, lie: Lie | None = None, **record: Any) -> Donor:
        """The next one to be asked."""
        who = DONORS[len(self.donors)]
        transport = FakeTransport(self.network, who.peer_id, TIMEOUTS)
        mine = self._catchup(who, transport, Directory(who.peer_id, MANIFEST.run_id), replica)
        donor = Donor(who, replica, mine, lie)
        transport.handlers[PROTOCOL] = donor.serve
        self.donors.append(donor)
        standing, snapshot = replica.standing(), replica.newest_snapshot()
        fields: dict[str, Any] = {
            "run_id": MANIFEST.run_id,
            "step": standing.step,
            "head": standing.head,
            "heads": list(standing.heads),
            "committed": standing.committed,
            "snapshot_step": snapshot.step,
            "snapshot_digest": snapshot.digest,
            "life_s": 900.0,
        }
        self.directory.learn(seal_record(record_of(who, **fields | record), who), NOW_S)
        return donor

    async def to(self, target: Replica) -> CaughtUp | None:
        return await self.catchup.to((target.loaded.step, target.loaded.head))

    def suspects(self) -> list[int]:
        live = {record.peer_id for record in self.directory.live(NOW_S)}
        return [i for i, donor in enumerate(self.donors) if donor.who.peer_id not in live]

    def check_same(self, swarm: Replica) -> None:
        """In memory, and after a restart from the disk."""
        for replica in (self.replica, new_replica(self.replica.ledger.folder)):
            replica.load()
            assert (replica.loaded.step, replica.loaded.head) == (swarm.loaded.step, swarm.loaded.head)
            assert replica.loaded.digest() == swarm.loaded.digest()
            assert replica.ledger.quarantined == []
        assert not list(self.replica.ledger.folder.glob("incoming-*"))


# -- honest donors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 3, 5, 13])
def test_a_newcomer(tmp_path: Path, step: int) -> None:
    async def main() -> None:
        library = Library(tmp_path, new_replica(tmp_path / "me"))
        donor = library.add(replica_at(tmp_path / "donor", step))
        caught_up = await library.to(donor.replica)
        snapshot_step = step // EVERY * EVERY
        assert caught_up is not None
        assert (caught_up.from_step, caught_up.to_step, caught_up.rolled_back, caught_up.snapshot) == (
            None,
            step,
            0,
            True,
        )
        assert caught_up.bytes_received >= snapshot_bytes(N)
        assert (donor.count(AskSnapshot), donor.count(AskUpdate)) == (1, step - snapshot_step)
        library.check_same(donor.replica)

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
        assert donor.count(AskUpdate) == (13 - mine if has_it else 3)
        library.check_same(donor.replica)

    run_simulated(main())


def test_on_the_way_to_a_target_the_donor_has_passed(tmp_path: Path) -> None:
    async def main() -> None:
        library = Library(tmp_path, replica_at(tmp_path / "me", 6))
        donor = library.add(replica_at(tmp_path / "donor", 9))
        target = replica_at(tmp_path / "target", 8)
        assert await library.to(target) is not None
        assert donor.count(AskUpdate) == 2
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
        if not snapshot:
            assert caught_up.rolled_back == mine - fork_at
        library.check_same(donor.replica)
        kept = [path.name for path in (tmp_path / "me" / "abandoned").rglob("*.update")]
        assert (f"{mine - 1:010d}.update" in kept) == (mine > theirs // EVERY * EVERY)
        assert library.suspects() == []

    run_simulated(main())


@pytest.mark.parametrize("mine", [9, 10])
def test_who_returned_first_helps_those_who_had_gone_with_it(tmp_path: Path, mine: int) -> None:
    async def main() -> None:
        swarm = replica_at(tmp_path / "swarm", 13)
        first = Library(tmp_path, replica_at(tmp_path / "first", mine, fork_at=2))
        first.add(swarm)
        assert await first.to(swarm) is not None
        second = Library(tmp_path, replica_at(tmp_path / "second", mine, fork_at=2))
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

    run_simulated(main())


def test_heads_come_in_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catchup, "MAX_HEADS", 3)

    async def main() -> None:
        library = Library(tmp_path, replica_at(tmp_path / "me", 6))
        donor = library.add(replica_at(tmp_path / "donor", 13))  # it holds 5 to 13
        assert await library.to(donor.replica) is not None
        assert [message.since for message in donor.asked if isinstance(message, AskHeads)] == [0, 8, 11]
        library.check_same(donor.replica)

    run_simulated(main())


def test_a_donor_with_a_gap_in_its_ledger(tmp_path: Path) -> None:
    """It was away itself: it holds what was before, and what has been since."""

    async def main() -> None:
        swarm = replica_at(tmp_path / "donor", 12)
        away = Library(tmp_path, replica_at(tmp_path / "away", 3))
        away.add(swarm)
        assert await away.to(swarm) is not None
        assert sorted(away.replica.ledger.heads()) == [0, 1, 2, 3, 10, 11, 12]
        for name, mine in (("newcomer", None), ("early", 2)):
            replica = new_replica(tmp_path / name) if mine is None else replica_at(tmp_path / name, mine)
            library = Library(tmp_path, replica)
            library.add(away.replica)
            assert await library.to(swarm) is not None
            library.check_same(swarm)

    run_simulated(main())


def test_a_download_goes_on_at_the_next_donor(tmp_path: Path) -> None:
    async def breaks_off(donor: Donor, channel: Channel, message: Message) -> bool:
        if isinstance(message, AskSnapshot):
            await channel.send(Size(size_bytes=snapshot_bytes(N)))
            await channel.send_frame(donor.replica.newest_snapshot().path.read_bytes()[:CHUNK_BYTES])
            return True
        return False

    async def main() -> None:
        library = Library(tmp_path, new_replica(tmp_path / "me"))
        library.add(replica_at(tmp_path / "first", 6), breaks_off)
        second = library.add(replica_at(tmp_path / "second", 6))
        assert await library.to(second.replica) is not None
        asked = [message.offset for message in second.asked if isinstance(message, AskSnapshot)]
        assert asked == [CHUNK_BYTES]
        assert library.suspects() == [0]
        library.check_same(second.replica)

    run_simulated(main())


def test_a_download_that_was_begun_wrongly_is_begun_again(tmp_path: Path) -> None:
    """The donor that finishes it is not taken for the liar."""

    async def begins_wrongly(donor: Donor, channel: Channel, message: Message) -> bool:
        if isinstance(message, AskSnapshot):
            await channel.send(Size(size_bytes=snapshot_bytes(N)))
            await channel.send_frame(bytes(CHUNK_BYTES))
            return True
        return False

    async def main() -> None:
        library = Library(tmp_path, new_replica(tmp_path / "me"))
        library.add(replica_at(tmp_path / "first", 6), begins_wrongly)
        second = library.add(replica_at(tmp_path / "second", 6))
        assert await library.to(second.replica) is not None
        asked = [message.offset for message in second.asked if isinstance(message, AskSnapshot)]
        assert asked == [CHUNK_BYTES, 0]
        assert library.suspects() == [0]
        library.check_same(second.replica)

    run_simulated(main())


def test_what_a_crash_left_of_a_download_is_used_or_removed(tmp_path: Path) -> None:
    async def main() -> None:
        library = Library(tmp_path, new_replica(tmp_path / "me"))
        donor = library.add(replica_at(tmp_path / "donor", 6))
        info = donor.replica.newest_snapshot()
        (tmp_path / "me" / f"incoming-5-{info.digest.hex()[:16]}.part").write_bytes(info.path.read_bytes())
        (tmp_path / "me" / "incoming-0-0123456789abcdef.part").write_bytes(bytes(10))
        assert await library.to(donor.replica) is not None
        asked = [message.offset for message in donor.asked if isinstance(message, AskSnapshot)]
        assert asked == [snapshot_bytes(N)]
        library.check_same(donor.replica)

    run_simulated(main())


# -- donors that lie: the first one asked does, the second one helps ------------------------------------------------


def on(kind: type[Message], lie: Callable[[Donor, Channel, Any], Awaitable[object]]) -> Lie:
    async def answer(donor: Donor, channel: Channel, message: Message) -> bool:
        if isinstance(message, kind):
            await lie(donor, channel, message)
            return True
        return False

    return answer


def frames(*pieces: bytes) -> Callable[[Donor, Channel, Any], Awaitable[None]]:
    async def lie(donor: Donor, channel: Channel, message: Message) -> None:
        for piece in pieces:
            await channel.send_frame(piece)

    return lie


def says(*messages: Message) -> Callable[[Donor, Channel, Any], Awaitable[None]]:
    async def lie(donor: Donor, channel: Channel, message: Message) -> None:
        for answer in messages:
            await channel.send(answer)

    return lie


def size(size_bytes: int) -> bytes:
    packed: bytes = msgpack.packb(["size", {"size_bytes": size_bytes}])
    return packed


async def silent(donor: Donor, channel: Channel, message: Message) -> None:
    await asyncio.sleep(1000)


async def trickle(donor: Donor, channel: Channel, message: Message) -> None:
    await channel.send(Size(size_bytes=snapshot_bytes(N)))
    for _ in range(snapshot_bytes(N)):
        await channel.send_frame(b"x")
        await asyncio.sleep(20)


async def the_file(more: int, donor: Donor, channel: Channel, message: AskSnapshot) -> None:
    """As it is, but announced as a larger or smaller one."""
    data = donor.replica.newest_snapshot().path.read_bytes()
    await send_file(channel, data[message.offset :], len(data) + more)


async def file_changed(donor: Donor, channel: Channel, message: AskSnapshot) -> None:
    data = bytearray(donor.replica.newest_snapshot().path.read_bytes())
    data[-1] ^= 1
    await send_file(channel, bytes(data[message.offset :]), len(data))


async def send_file(channel: Channel, data: bytes, size_bytes: int) -> None:
    await channel.send(Size(size_bytes=size_bytes))
    for start in range(0, len(data), CHUNK_BYTES):
        await channel.send_frame(data[start : start + CHUNK_BYTES])


async def heads_without_end(donor: Donor, channel: Channel, message: AskHeads) -> None:
    await channel.send(Heads(first=message.since, heads=[bytes(32)] * 1024))


async def heads_in_a_circle(donor: Donor, channel: Channel, message: AskHeads) -> None:
    await channel.send(Heads(first=0, heads=[bytes(32)]))


async def heads_with_a_gap(donor: Donor, channel: Channel, message: AskHeads) -> None:
    """What the joiner has, and then, a page later, the target."""
    mine = donor.replica.ledger.heads()
    if message.since == 0:
        await channel.send(Heads(first=0, heads=[mine[0]]))
    else:
        last = max(mine)
        await channel.send(Heads(first=last, heads=[mine[last]]))


async def heads_of_its_own(donor: Donor, channel: Channel, message: AskHeads) -> None:
    """The target's is right; those on the way are not."""
    mine = donor.replica.ledger.heads()
    last = max(mine)
    heads = [bytes([step]) * 32 for step in range(last)] + [mine[last]]
    await channel.send(Heads(first=0, heads=heads))


async def other_update(donor: Donor, channel: Channel, message: AskUpdate) -> None:
    """Sound, and following from the joiner's state, but another one."""
    folder = donor.replica.ledger.folder.parent / f"own-{message.step}"
    own = replica_at(folder, message.step)
    await channel.send_blob(update_to_bytes(update_after(own, seed=9)))


async def another_steps_update(donor: Donor, channel: Channel, message: AskUpdate) -> None:
    data = donor.replica.ledger.update_bytes(max(message.step - 1, 5))
    assert data is not None
    await channel.send_blob(data)


async def update_with_other_parts(donor: Donor, channel: Channel, message: AskUpdate) -> None:
    data = donor.replica.ledger.update_bytes(message.step)
    assert data is not None
    await channel.send_blob(data[:-1] + bytes([data[-1] ^ 1]))


SNAPSHOT_LIES: dict[str, Lie] = {
    "closes": on(AskSnapshot, says()),
    "refuses": on(AskSnapshot, says(No(reason="not in my ledger"))),
    "is silent": on(AskSnapshot, silent),
    "trickles": on(AskSnapshot, trickle),
    "out of turn": on(AskSnapshot, says(Heads(first=0, heads=[]))),
    "endless": on(AskSnapshot, frames(size(2**59), *[bytes(CHUNK_BYTES)] * 9)),
    "too large": on(AskSnapshot, lambda *asked: the_file(1, *asked)),
    "too small": on(AskSnapshot, lambda *asked: the_file(-1, *asked)),
    "chunk too long": on(AskSnapshot, frames(size(snapshot_bytes(N)), bytes(CHUNK_BYTES + 1))),
    "chunk too short": on(AskSnapshot, frames(size(snapshot_bytes(N)), bytes(CHUNK_BYTES - 1))),
    "chunk empty": on(AskSnapshot, frames(size(snapshot_bytes(N)), b"")),
    "last chunk too long": on(AskSnapshot, frames(size(snapshot_bytes(N)), *[bytes(CHUNK_BYTES)] * 3)),
    "zeros": on(AskSnapshot, frames(size(snapshot_bytes(N)), *[bytes(CHUNK_BYTES)] * 2, bytes(912))),
    "one bit": on(AskSnapshot, file_changed),
}
HEAD_LIES: dict[str, Lie] = {
    "heads: closes": on(AskHeads, says()),
    "heads: silent": on(AskHeads, silent),
    "heads: empty": on(AskHeads, says(Heads(first=0, heads=[]))),
    "heads: of its own": on(AskHeads, heads_of_its_own),
}
UPDATE_LIES: dict[str, Lie] = {
    "update: closes": on(AskUpdate, says()),
    "update: refuses": on(AskUpdate, says(No(reason="found damaged"))),
    "update: silent": on(AskUpdate, silent),
    "update: endless": on(AskUpdate, frames(size(2**59), *[bytes(CHUNK_BYTES)] * 9)),
    "update: too large": on(AskUpdate, frames(size(max_update_bytes(N, "int8") + 1))),
    "update: nothing": on(AskUpdate, frames(size(0))),
    "update: garbage": on(AskUpdate, frames(size(500), bytes(500))),
    "update: another one": on(AskUpdate, other_update),
    "update: of another step": on(AskUpdate, another_steps_update),
    "update: other parts": on(AskUpdate, update_with_other_parts),
}


@pytest.mark.parametrize("lie", SNAPSHOT_LIES.values(), ids=SNAPSHOT_LIES)
def test_a_newcomer_is_not_kept_by_a_donor_that_lies(tmp_path: Path, lie: Lie) -> None:
    async def main() -> None:
        library = Library(tmp_path, new_replica(tmp_path / "me"))
        liar = library.add(replica_at(tmp_path / "liar", 7), lie)
        donor = library.add(replica_at(tmp_path / "donor", 7))
        began_s = asyncio.get_running_loop().time()
        caught_up = await library.to(donor.replica)
        assert caught_up is not None
        assert caught_up.snapshot
        library.check_same(donor.replica)
        assert liar.count(AskSnapshot) == 1
        assert library.suspects() == ([] if lie is SNAPSHOT_LIES["refuses"] else [0])
        assert [info.step for info in library.replica.ledger.snapshots()] == [5]
        assert asyncio.get_running_loop().time() - began_s < TIMEOUTS.reduced_part_s + 5

    run_simulated(main())


@pytest.mark.parametrize("own_step", [5, 500])
def test_a_sound_snapshot_of_something_else_is_not_adopted(tmp_path: Path, own_step: int) -> None:
    """With as many outer steps, it would be loaded at the next start; with more, it would be the newest one."""

    async def main() -> None:
        library = Library(tmp_path, new_replica(tmp_path / "me"))
        own = replica_at(tmp_path / "own", min(own_step, 10), fork_at=0)
        if own_step > 10:
            own.loaded.step = own_step
            own.ledger.write_snapshot(own.loaded)
        data = own.newest_snapshot().path.read_bytes()

        async def own_file(donor: Donor, channel: Channel, message: AskSnapshot) -> None:
            await send_file(channel, data[message.offset :], len(data))

        library.add(replica_at(tmp_path / "liar", 7), on(AskSnapshot, own_file))
        assert await library.to(library.donors[0].replica) is None
        assert library.replica.ledger.snapshots() == []
        assert new_replica(tmp_path / "me").load() is False
        assert not list((tmp_path / "me").glob("incoming-*"))
        assert library.suspects() == [0]
        donor = library.add(replica_at(tmp_path / "donor", 7))
        assert await library.to(donor.replica) is not None
        library.check_same(donor.replica)

    run_simulated(main())


@pytest.mark.parametrize("lie", (HEAD_LIES | UPDATE_LIES).values(), ids=HEAD_LIES | UPDATE_LIES)
def test_who_missed_rounds_is_not_kept_by_a_donor_that_lies(tmp_path: Path, lie: Lie) -> None:
    async def main() -> None:
        library = Library(tmp_path, replica_at(tmp_path / "me", 6))
        library.add(replica_at(tmp_path / "liar", 9), lie)
        donor = library.add(replica_at(tmp_path / "donor", 9))
        began_s = asyncio.get_running_loop().time()
        caught_up = await library.to(donor.replica)
        assert caught_up is not None
        library.check_same(donor.replica)
        assert asyncio.get_running_loop().time() - began_s < TIMEOUTS.reduced_part_s + 5
        assert donor.count(AskUpdate) == 3
        honest = (HEAD_LIES["heads: empty"], UPDATE_LIES["update: refuses"])
        assert library.suspects() == ([] if lie in honest else [0])
        assert not (tmp_path / "me" / "abandoned").exists()

    run_simulated(main())


def test_heads_without_end_with_a_gap_or_in_a_circle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        library = Library(tmp_path, replica_at(tmp_path / "me", 3))
        endless = library.add(replica_at(tmp_path / "endless", 4), on(AskHeads, heads_without_end))
        assert await library.catchup.to((4, endless.replica.loaded.head)) is None
        assert endless.count(AskHeads) == 1
        monkeypatch.setattr(catchup, "MAX_HEADS", 1)
        library = Library(tmp_path, new_replica_of(library.replica))
        gap = library.add(replica_at(tmp_path / "gap", 4), on(AskHeads, heads_with_a_gap))
        assert await library.to(gap.replica) is None
        circle = library.add(gap.replica, on(AskHeads, heads_in_a_circle))
        assert await library.to(gap.replica) is None
        assert (gap.count(AskHeads), circle.count(AskHeads)) == (2, 2)
        assert library.suspects() == [0, 1]

    run_simulated(main())


def new_replica_of(replica: Replica) -> Replica:
    again = new_replica(replica.ledger.folder)
    again.load()
    return again


def test_what_most_donors_do_not_have_is_not_downloaded(tmp_path: Path) -> None:
    """A snapshot's digest is believed when most name it; that at outer step 0 when the manifest does."""

    async def main() -> None:
        library = Library(tmp_path, new_replica(tmp_path / "me"))
        swarm = replica_at(tmp_path / "swarm", 7)
        liar = library.add(swarm, snapshot_digest=bytes(32))
        for i in range(2):
            library.add(replica_at(tmp_path / str(i), 7))
        assert await library.to(swarm) is not None
        assert liar.count(AskSnapshot) == 0
        assert library.suspects() == [0]
        library.check_same(swarm)

        library = Library(tmp_path, new_replica(tmp_path / "again"))
        for _ in range(3):
            library.add(replica_at(tmp_path / "genesis", 1), snapshot_digest=bytes(32))
        assert await library.to(library.donors[0].replica) is None
        assert [donor.count(AskSnapshot) for donor in library.donors] == [0, 0, 0]
        assert library.suspects() == [0, 1, 2]

        library = Library(tmp_path, new_replica(tmp_path / "last"))
        beyond = library.add(replica_at(tmp_path / "beyond", 7), snapshot_step=10)
        assert await library.to(beyond.replica) is None
        assert beyond.count(AskSnapshot) == 0

    run_simulated(main())


# -- serving -------------------------------------------------------------------------------------------------------


def test_a_donor_refuses_what_it_does_not_have(tmp_path: Path) -> None:
    async def main() -> None:
        library = Library(tmp_path, new_replica(tmp_path / "me"))
        donor = library.add(replica_at(tmp_path / "donor", 13))
        ledger, info = donor.replica.ledger, donor.replica.newest_snapshot()
        head = ledger.heads()[12]

        async def ask(message: Message) -> Message:
            channel = await library.transport.open(donor.who.peer_id, [], PROTOCOL)
            return await channel.request(message, Size, Heads)

        for message in (
            AskUpdate(step=11, head=bytes(32)),
            AskUpdate(step=12, head=head),
            AskUpdate(step=2, head=head),
            AskUpdate(step=2**59, head=head),
            AskSnapshot(step=10, digest=bytes(32), offset=0),
            AskSnapshot(step=5, digest=info.digest, offset=0),
            AskSnapshot(step=10, digest=info.digest, offset=info.size_bytes + 1),
        ):
            with pytest.raises(Refused, match="not in my ledger"):
                await ask(message)
        assert await ask(AskUpdate(step=11, head=head)) == Size(size_bytes=len(ledger.update_bytes(11) or b""))
        assert await ask(AskSnapshot(step=10, digest=info.digest, offset=info.size_bytes)) == Size(
            size_bytes=info.size_bytes
        )
        assert await ask(AskHeads(since=14)) == Heads(first=14, heads=[])
        assert await ask(AskHeads(since=2**59)) == Heads(first=2**59, heads=[])
        path = tmp_path / "donor" / "updates" / "0000000011.update"
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        with pytest.raises(Refused, match="found damaged"):
            await ask(AskUpdate(step=11, head=head))

    run_simulated(main())


def test_a_snapshot_that_is_pruned_while_it_is_served(tmp_path: Path) -> None:
    async def main() -> None:
        library = Library(tmp_path, new_replica(tmp_path / "me"))
        donor = library.add(replica_at(tmp_path / "donor", 6))
        info = donor.replica.newest_snapshot()
        channel = await library.transport.open(donor.who.peer_id, [], PROTOCOL)
        info.path.unlink()
        await channel.request(AskSnapshot(step=5, digest=info.digest, offset=0), Size)
        with pytest.raises(Gone):
            await channel.receive_frame(CHUNK_BYTES, 10.0)

    run_simulated(main())


def test_a_few_uploads_at_a_time(tmp_path: Path) -> None:
    async def main() -> None:
        library = Library(tmp_path, new_replica(tmp_path / "me"))
        donor = library.add(replica_at(tmp_path / "donor", 6))
        info = donor.replica.newest_snapshot()
        channels = [await library.transport.open(donor.who.peer_id, [], PROTOCOL) for _ in range(7)]
        busy: list[str] = []

        async def download(channel: Channel) -> None:
            try:
                await channel.request(AskSnapshot(step=5, digest=info.digest, offset=0), Size)
            except Refused as error:
                busy.append(error.reason)
                return
            for _ in range(3):
                await channel.receive_frame(CHUNK_BYTES, 10.0)

        await asyncio.gather(*(download(channel) for channel in channels))
        assert busy == ["busy serving others"] * (7 - catchup.UPLOADS)

    run_simulated(main())
