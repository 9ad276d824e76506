"""Bits that flip: in the memory of a peer and on its disk, while whole swarms run in memory. See ``fakes``."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from p2p_diloco.core.codec import Vector
from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.errors import Misbehaved
from p2p_diloco.core.event import DamageRepaired, E, PeerJoined, RoundEnded, of_kind
from p2p_diloco.core.events import read_events
from p2p_diloco.core.outer import genesis_state
from p2p_diloco.core.records import Phase
from p2p_diloco.core.runfile import OnMissed
from p2p_diloco.core.trust_event import StateDisputed
from p2p_diloco.core.update import Update
from p2p_diloco.ledger.ledger import Ledger
from p2p_diloco.ledger.replay import Replay, load
from p2p_diloco.ledger.replica import Replica
from p2p_diloco.peer.catchup import Catchup
from p2p_diloco.peer.upkeep import TRIES, Upkeep
from tests.support import library
from tests.support.builders import identity
from tests.support.fakes import FakeNetwork, SimPeer, make_manifest, run_simulated

N = 300_000  # two parts
EVERY = 5
"""Outer steps between two snapshots, in ``make_manifest``."""


Repairs = list[tuple[str, int, str]]


class Swarm:
    """A seed, which is 0 and the run's owner, and ``k`` trainers. Small steps in time, so that things are done between
    outer steps."""

    def __init__(
        self,
        folder: Path,
        k: int,
        *,
        min_group: int = 2,
        outer_steps: int = 12,
        on_missed: OnMissed = "adopt",
        owner: int = 0,
    ) -> None:
        generator = np.random.default_rng(0)
        self.folder, self.owner = folder, identity(owner)
        self.genesis, *targets = (generator.standard_normal(N).astype(np.float32) for _ in range(k + 1))
        self.targets: list[Vector | None] = [None, *targets]
        self.manifest = make_manifest(
            N,
            self.genesis,
            self.owner,
            codec="int8",
            min_group=min_group,
            outer_steps=outer_steps,
            on_missed=on_missed,
        )
        self.network = FakeNetwork()
        self.peers: list[SimPeer] = []

    def add(self, index: int, genesis: Vector | None = None) -> SimPeer:
        sim = SimPeer.create(
            self.network, self.manifest, self.owner, self.folder, index, target=self.targets[index], genesis=genesis
        )
        sim.start()
        self.peers.append(sim)
        return sim

    async def begin(self) -> None:
        """All of them, at the genesis."""
        self.add(0, self.genesis)
        await asyncio.sleep(1)
        for index in range(1, len(self.targets)):
            self.add(index)

    async def until(self, step: int, limit_s: float = 2000.0) -> None:
        """Everybody stands there, and the round is over for some seconds."""
        await until(lambda: all(sim.peer.step >= step for sim in self.peers), limit_s)
        await asyncio.sleep(3)

    def replica(self, index: int) -> Replica:
        return self.peers[index].peer.replica

    def file(self, index: int, name: str) -> Path:
        return self.replica(index).ledger.folder / name

    def events(self, index: int, kind: type[E]) -> list[E]:
        return of_kind(read_events(self.folder / str(index) / "events.jsonl"), kind)

    def repairs(self, index: int) -> Repairs:
        return [(event.what, event.step, event.how) for event in self.events(index, DamageRepaired)]

    async def check(self, hurt: int | None, repairs: Repairs) -> None:
        """In the end all have the same bits, in memory and on disk; the repairs were made where the damage was and
        nowhere else; and nobody is blamed."""
        await self.until(self.manifest.spec.outer.steps)
        states = [sim.peer.replica.loaded for sim in self.peers]
        assert len({(state.step, state.head, state.digest()) for state in states}) == 1
        assert len({sim.peer.replica.newest_snapshot().digest for sim in self.peers}) == 1
        for index, sim in enumerate(self.peers):
            assert sorted(self.repairs(index)) == (sorted(repairs) if index == hurt else [])
            assert sim.peer.replica.sound
            assert not [error for error in sim.transport.complaints if isinstance(error, Misbehaved)]
            assert not [event for event in self.events(index, RoundEnded) if event.lost]
            stored = np.full(N, 7, np.float32), np.full(N, 7, np.float32)
            state = load(sim.peer.replica.ledger, *stored)
            assert state is not None
            assert state.digest() == states[0].digest()


async def until(condition: Callable[[], bool], limit_s: float = 2000.0) -> None:
    deadline_s = asyncio.get_running_loop().time() + limit_s
    while not condition():
        assert asyncio.get_running_loop().time() < deadline_s
        await asyncio.sleep(0.25)


def flip(values: Vector, at: int, bit: int) -> None:
    values.view(np.uint32)[at] ^= np.uint32(1 << bit)


def flip_file(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


UPDATE = "updates/{:010d}.update".format
SNAPSHOT = "snapshots/{:010d}.safetensors".format


# -- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "hurt", "vector", "bit"),
    [
        (2, 1, "theta", 0),
        (2, 2, "momentum", 22),
        (2, 0, "theta", 31),
        (2, 0, "momentum", 0),
        (4, 3, "theta", 23),
        (4, 1, "momentum", 0),
    ],
)
def test_a_bit_that_flips_in_memory_is_mended_at_the_next_snapshot(
    tmp_path: Path, k: int, hurt: int, vector: str, bit: int
) -> None:
    async def main() -> None:
        swarm = Swarm(tmp_path, k)
        await swarm.begin()
        await swarm.until(7)
        flip(getattr(swarm.replica(hurt), vector), 280_000, bit)
        await swarm.until(10)
        await swarm.check(hurt, [("state", 10, "replayed")])
        # No round was missed; the trainer took theta anew right away.
        for sim in swarm.peers[1:]:
            assert [result.step for result in sim.results if result.committed] == list(range(1, 13))
            others = [(result.reason, result.step) for result in sim.results if not result.committed]
            assert others == ([("repaired", 10)] if sim is swarm.peers[hurt] else [])
            assert sim.history[10] == swarm.peers[1 + (hurt == 1)].history[10], "where the next inner steps began"

    run_simulated(main())


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("damaged", [False, True])
def test_a_theta_that_is_not_finite_is_mended_before_it_is_used(tmp_path: Path, value: float, damaged: bool) -> None:
    async def main() -> None:
        swarm, repairs = Swarm(tmp_path, 3), [("state", 7, "replayed")]
        await swarm.begin()
        await swarm.until(7)
        swarm.replica(2).theta[5] = value
        if damaged:
            flip_file(swarm.file(2, UPDATE(6)), -1)
            repairs.append(("update", 6, "fetched"))
        await swarm.until(9)
        assert sorted(swarm.repairs(2)) == sorted(repairs)
        assert next(result.reason for result in swarm.peers[2].results if not result.committed) == "diverged"
        await swarm.check(2, repairs)
        assert all(result.committed for result in swarm.peers[1].results)

    run_simulated(main())


def test_a_flip_while_a_snapshot_is_made_is_not_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes after the part has been compared: the snapshot is sound, and the next one finds it."""
    swarm, flipped = Swarm(tmp_path, 2, outer_steps=17), list[int]()
    part_of = Replay.part

    def part_then_flip(replay: Replay, part: int) -> tuple[Vector, Vector]:
        if not flipped and part == 1 and replay.step == 10 and replay.ledger is swarm.replica(1).ledger:
            flip(swarm.replica(1).theta, 3, 5)
            flipped.append(swarm.peers[1].peer.step)
        return part_of(replay, part)

    async def main() -> None:
        await swarm.begin()
        monkeypatch.setattr(Replay, "part", part_then_flip)
        await swarm.until(11)
        assert flipped == [10]
        assert len({sim.peer.replica.newest_snapshot().digest for sim in swarm.peers}) == 1
        assert swarm.repairs(1) == []
        await swarm.check(1, [("state", 15, "replayed")])

    run_simulated(main())


def test_a_flip_that_is_found_in_the_middle_of_a_round_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The snapshot takes longer than the inner steps: memory is mended before the update is applied."""
    swarm = Swarm(tmp_path, 2)
    write = Upkeep._write_snapshot

    async def write_slowly(upkeep: Upkeep) -> None:
        if upkeep is swarm.peers[1].peer.upkeep:
            await until(lambda: swarm.peers[1].peer.seat.phase == "apply")
        await write(upkeep)

    async def main() -> None:
        await swarm.begin()
        await swarm.until(7)
        flip(swarm.replica(1).momentum, 3, 5)
        monkeypatch.setattr(Upkeep, "_write_snapshot", write_slowly)
        await swarm.check(1, [("state", 10, "replayed")])
        assert all(result.committed for sim in swarm.peers for result in sim.results)

    run_simulated(main())


@pytest.mark.parametrize("phase", ["inner", "evaluate"])
def test_a_trainer_whose_theta_is_wrong_is_called_at_once(tmp_path: Path, phase: Phase) -> None:
    async def main() -> None:
        swarm = Swarm(tmp_path, 2)
        await swarm.begin()
        await swarm.until(6)
        sim = swarm.peers[1]
        sim.peer.seat.phase = phase
        flip(sim.peer.replica.theta, 3, 5)
        sim.peer.replica.sound = False
        await until(lambda: len(sim.results) > 6, limit_s=5)
        assert (sim.results[-1].reason, sim.results[-1].moved) == ("repaired", True)
        assert [event.reason for event in swarm.events(1, RoundEnded)].count("repaired") == 1
        await swarm.check(1, [("state", 6, "replayed")])

    run_simulated(main())


def test_what_was_learned_from_a_wrong_theta_is_not_kept(tmp_path: Path) -> None:
    """Where it missed a round besides, and the run keeps what was learned in missed rounds."""

    async def main() -> None:
        swarm = Swarm(tmp_path, 4, on_missed="keep")
        await swarm.begin()
        await swarm.until(6)
        sim, healthy = swarm.peers[1], swarm.peers[2]
        for late in (sim, healthy):
            late.step_s = 100.0
        await until(lambda: swarm.peers[3].peer.step == 7)
        sim.peer.replica.sound = False
        flip(sim.peer.replica.theta, 3, 5)
        await until(lambda: len(sim.results) > 6 and len(healthy.results) > 6)
        for late, reason in ((sim, "repaired"), (healthy, "behind")):
            assert (late.results[6].reason, late.results[6].moved) == (reason, True)
        assert (sim.results[6].kept, healthy.results[6].kept) == (False, True)

    run_simulated(main())


def test_a_flip_before_anybody_trains(tmp_path: Path) -> None:
    """The peer follows the swarm; nobody uses its theta."""

    async def main() -> None:
        swarm = Swarm(tmp_path, 3)
        swarm.add(0, swarm.genesis)
        await asyncio.sleep(1)
        for index in (1, 2):
            swarm.add(index)
        await swarm.until(6)
        late = swarm.add(3)
        begin, may_begin = late.peer.begin, asyncio.Event()

        async def begin_late() -> None:
            await may_begin.wait()
            await begin()

        late.peer.begin = begin_late  # type: ignore[method-assign]
        await swarm.until(8)
        flip(swarm.replica(3).theta, 100, 3)
        await swarm.until(11)
        assert swarm.repairs(3) == [("state", 10, "replayed")]
        may_begin.set()
        await swarm.check(3, [("state", 10, "replayed")])
        assert [result.committed for result in late.results] == [True]

    run_simulated(main())


# -- disk ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "hurt", "names", "repairs"),
    [
        (2, 1, [UPDATE(7)], [("update", 7, "fetched")]),
        (2, 0, [UPDATE(5)], [("update", 5, "fetched")]),
        (4, 4, [UPDATE(5), UPDATE(6)], [("update", 5, "fetched"), ("update", 6, "fetched")]),
        (2, 1, [SNAPSHOT(5)], [("snapshot", 5, "replayed")]),
        (2, 0, [SNAPSHOT(5)], [("snapshot", 5, "replayed")]),
        (4, 4, [SNAPSHOT(5), UPDATE(6)], [("update", 6, "fetched"), ("snapshot", 5, "replayed")]),
    ],
)
@pytest.mark.parametrize("at", [20, -1])
def test_a_bit_that_flips_on_the_disk_is_mended_at_the_next_snapshot(
    tmp_path: Path, k: int, hurt: int, names: list[str], repairs: Repairs, at: int
) -> None:
    async def main() -> None:
        swarm = Swarm(tmp_path, k)
        await swarm.begin()
        await swarm.until(8)
        before = {name: swarm.file(hurt, name).read_bytes() for name in names}
        for name in names:
            flip_file(swarm.file(hurt, name), at)
        await swarm.until(10)
        assert {name: swarm.file(hurt, name).read_bytes() for name in names} == before
        assert sorted(path.name for path in swarm.file(hurt, "quarantine").iterdir()) == sorted(
            f"{Path(name).name}.0" for name in names
        )
        assert swarm.replica(hurt).newest_snapshot().step == 10
        await swarm.check(hurt, repairs)
        assert all(result.committed for sim in swarm.peers for result in sim.results)

    run_simulated(main())


def test_a_damaged_update_that_is_asked_for_is_mended_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        swarm = Swarm(tmp_path, 2)
        await swarm.begin()
        await swarm.until(6)
        flip_file(swarm.file(1, UPDATE(5)), -1)
        assert swarm.replica(1).ledger.update_bytes(5) is None
        await asyncio.sleep(2 * swarm.peers[1].transport.timeouts.record_every_s)
        assert swarm.replica(1).ledger.update_bytes(5) is not None
        assert swarm.peers[1].peer.step < 10
        await swarm.check(1, [("update", 5, "fetched")])

    run_simulated(main())


def test_a_damaged_update_that_is_asked_for_is_mended_at_the_next_outer_step(tmp_path: Path) -> None:
    """Not when a record or a snapshot is due: outer steps may be short, and the others delete what they have."""

    async def main() -> None:
        swarm = Swarm(tmp_path, 2)
        await swarm.begin()
        await swarm.until(6)
        upkeep = swarm.peers[1].peer.upkeep
        upkeep.here = dataclasses.replace(upkeep.here, timeouts=Timeouts(record_every_s=1000.0))
        await asyncio.sleep(Timeouts().record_every_s)
        step = swarm.peers[1].peer.step
        flip_file(swarm.file(1, UPDATE(step - 1)), -1)
        assert swarm.replica(1).ledger.update_bytes(step - 1) is None
        await swarm.until(step + 1)
        await asyncio.sleep(1.0)
        assert swarm.replica(1).ledger.update_bytes(step - 1) is not None
        await swarm.check(1, [("update", step - 1, "fetched")])

    run_simulated(main())


@pytest.mark.parametrize(("failures", "how"), [(TRIES - 1, "fetched"), (TRIES, "rewritten")])
def test_a_damaged_update_is_asked_for_some_times_before_it_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int, how: str
) -> None:
    swarm, asked_s = Swarm(tmp_path, 2), list[float]()
    fetch = Catchup.fetch_update

    async def fetch_at_last(catchup: Catchup, step: int, head: bytes) -> Update | None:
        asked_s.append(asyncio.get_running_loop().time())
        return await fetch(catchup, step, head) if len(asked_s) > failures else None

    async def main() -> None:
        await swarm.begin()
        monkeypatch.setattr(Catchup, "fetch_update", fetch_at_last)
        await swarm.until(8)
        flip_file(swarm.file(1, UPDATE(7)), -1)
        await until(lambda: len(swarm.repairs(1)) > 0)
        await swarm.until(12)
        assert swarm.repairs(1) == [("update", 7, how)]
        assert len(asked_s) == TRIES
        assert np.diff(asked_s).min() > 0.9 * swarm.peers[1].transport.timeouts.record_every_s
        assert len({sim.peer.replica.loaded.digest() for sim in swarm.peers}) == 1

    run_simulated(main())


@pytest.mark.parametrize(
    ("names", "repairs"),
    [
        ([UPDATE(7)], [("update", 7, "rewritten")]),
        ([UPDATE(6), UPDATE(8)], [("update", 6, "rewritten")]),
        ([SNAPSHOT(5)], [("snapshot", 5, "replayed")]),
        ([SNAPSHOT(5), SNAPSHOT(0)], [("snapshot", 5, "rewritten"), ("snapshot", 0, "rewritten")]),
    ],
)
def test_what_nobody_else_has_is_made_up_for_by_a_fresh_snapshot(
    tmp_path: Path, names: list[str], repairs: Repairs
) -> None:
    """One peer alone. It never loses an outer step, wherever it is killed after that."""

    async def main() -> None:
        swarm = Swarm(tmp_path, 1, min_group=1, outer_steps=15, owner=1)
        swarm.add(1, swarm.genesis)
        await swarm.until(9)
        for name in names:
            flip_file(swarm.file(0, name), -1)
        await until(lambda: len(swarm.repairs(1)) == len(repairs))
        assert swarm.peers[0].peer.step < 14
        step, head = swarm.peers[0].peer.step, swarm.peers[0].peer.seat.standing.head
        swarm.network.kill(swarm.peers[0].peer.identity.peer_id)
        assert swarm.repairs(1) == repairs
        await asyncio.sleep(60)
        swarm.network.dead.clear()
        swarm.peers.clear()
        swarm.add(1)
        await asyncio.sleep(1)
        joined = swarm.events(1, PeerJoined)[-1]
        assert (joined.from_step, joined.head) == (step, head.hex())
        await swarm.until(15)

    run_simulated(main())


def test_a_flip_in_the_memory_of_a_peer_alone(tmp_path: Path) -> None:
    async def main() -> None:
        swarm = Swarm(tmp_path, 1, min_group=1, outer_steps=11, owner=1)
        swarm.add(1, swarm.genesis)
        await swarm.until(7)
        flip(swarm.replica(0).theta, 11, 12)
        await swarm.until(11)
        assert swarm.repairs(1) == [("state", 10, "replayed")]

    run_simulated(main())


def test_memory_and_disk_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        swarm = Swarm(tmp_path, 2)
        await swarm.begin()
        await swarm.until(8)
        flip(swarm.replica(1).theta, 280_000, 4)
        flip_file(swarm.file(1, UPDATE(6)), -1)
        flip_file(swarm.file(1, SNAPSHOT(5)), -1)
        expected = [("update", 6, "fetched"), ("snapshot", 5, "replayed"), ("state", 10, "replayed")]
        await swarm.check(1, expected)

    run_simulated(main())


# -- disputes ------------------------------------------------------------------------------------------------------


def test_a_peer_whose_state_was_wrong_from_the_start_takes_that_of_the_others(tmp_path: Path) -> None:
    """Its own files agree with its memory, and its heads with everybody's; the manifest names other bits."""

    async def main() -> None:
        swarm = Swarm(tmp_path, 3)
        swarm.add(0, swarm.genesis)
        await asyncio.sleep(1)
        for index in (1, 2):
            swarm.add(index)
        wrong = genesis_with_a_flip(swarm, tmp_path / "3")
        swarm.add(3)
        await swarm.until(2)
        assert swarm.replica(3).loaded.theta.tobytes() == swarm.replica(1).loaded.theta.tobytes()
        await swarm.check(3, [("snapshot", 0, "fetched"), ("state", 0, "replayed")])
        [aside] = swarm.file(3, "quarantine").iterdir()
        assert wrong in aside.read_bytes()

    run_simulated(main())


@pytest.fixture
def small() -> Iterator[None]:
    with library.small_parts():
        yield


def upkeep_of(me: library.Library) -> Upkeep:
    return Upkeep(here=me.catchup.here, replica=me.replica, catchup=me.catchup, events=me.events)


def disputes(me: library.Library) -> list[tuple[int, tuple[str, ...]]]:
    return [(event.step, event.others) for event in of_kind(read_events(me.events.path), StateDisputed)]


def with_a_wrong_snapshot(folder: Path, step: int) -> Replica:
    """At outer step 7, with snapshots of 0 and 5. Its files and its memory agree."""
    replica = library.replica_at(folder, 7)
    info = next(info for info in replica.ledger.snapshots() if info.step == step)
    theta, momentum = np.empty(library.N, np.float32), np.empty(library.N, np.float32)
    state = load(replica.ledger, theta, momentum, at_most=step)
    assert state is not None
    flip(state.theta, 9, 9)
    replica.ledger.write_snapshot(state)
    assert info.digest not in [other.digest for other in replica.ledger.snapshots()]
    replica.load()
    return replica


@pytest.mark.parametrize("step", [0, 5])
@pytest.mark.usefixtures("small")
def test_a_snapshot_that_differs_from_what_is_certified_is_replaced(tmp_path: Path, step: int) -> None:
    """However many others have the same wrong bits."""

    async def main() -> None:
        me = library.Library(tmp_path, with_a_wrong_snapshot(tmp_path / "me", step))
        swarm = library.replica_at(tmp_path / "swarm", 7)
        for index in range(2):
            me.add(with_a_wrong_snapshot(tmp_path / f"wrong-{index}", step))
        me.add(swarm)
        upkeep = upkeep_of(me)
        await upkeep._compare()
        entry = swarm.ledger.chain.entry(step)
        assert entry is not None
        signers = tuple(peer_id for peer_id, _ in entry.header.contributors)
        assert disputes(me) == [(step, signers)]
        assert not me.replica.sound
        assert [(repair.what, repair.step, repair.how) for repair in me.replica.repairs] == [
            ("snapshot", step, "fetched")
        ]
        me.replica.mend()
        await upkeep._compare()
        assert len(disputes(me)) == 1
        assert me.replica.loaded.digest() == swarm.loaded.digest()
        assert [info.digest for info in me.replica.ledger.snapshots()] == [
            info.digest for info in swarm.ledger.snapshots()
        ]

    run_simulated(main())


@pytest.mark.usefixtures("small")
def test_where_nobody_gives_the_certified_one_it_is_said_once(tmp_path: Path) -> None:
    async def main() -> None:
        me = library.Library(tmp_path, with_a_wrong_snapshot(tmp_path / "me", 5))
        upkeep = upkeep_of(me)
        for _ in range(3):
            await upkeep._compare()
        assert [step for step, _ in disputes(me)] == [5]
        assert me.replica.sound
        assert me.replica.repairs == []

    run_simulated(main())


@pytest.mark.parametrize("certified", [True, False])
@pytest.mark.usefixtures("small")
def test_what_no_certificate_names_is_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, certified: bool
) -> None:
    """The next update is not there yet, or its members did not agree."""

    async def main() -> None:
        replica = library.replica_at(tmp_path / "me", 5)
        flip(replica.theta, 9, 9)
        replica.ledger.write_snapshot(replica.loaded)
        monkeypatch.setattr(Replica, "digest_due", lambda replica: b"")
        if not certified:
            library.advance(replica, 6)
        me = library.Library(tmp_path, replica)
        me.add(library.replica_at(tmp_path / "swarm", 5))
        await upkeep_of(me)._compare()
        assert disputes(me) == []
        assert me.replica.sound

    run_simulated(main())


def genesis_with_a_flip(swarm: Swarm, folder: Path) -> bytes:
    """Theta of a genesis that has the right head and other bits, on the disk in ``folder``."""
    outer = swarm.manifest.spec.outer
    ledger = Ledger(
        folder,
        grid=swarm.manifest.grid,
        lr=outer.lr,
        momentum=outer.momentum,
        snapshot_every=EVERY,
        run_id=swarm.manifest.run_id,
    )
    state = genesis_state(swarm.genesis.copy())
    flip(state.theta, 9, 9)
    ledger.write_snapshot(state)
    return state.theta.tobytes()
