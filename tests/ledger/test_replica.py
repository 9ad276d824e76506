from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from p2p_diloco.core.certificate import Certified
from p2p_diloco.core.codec import Vector
from p2p_diloco.core.codecs import encode
from p2p_diloco.core.errors import Gap, LedgerError
from p2p_diloco.core.grid import Grid
from p2p_diloco.core.known import Known
from p2p_diloco.core.outer import apply, genesis_state
from p2p_diloco.core.update import Part, Update, UpdateHeader
from p2p_diloco.ledger.ledger import Ledger
from p2p_diloco.ledger.replay import Replay
from p2p_diloco.ledger.replica import Replica
from tests.support.builders import identity
from tests.support.certificates import unsigned
from tests.support.fakes import make_manifest

N = 300
GENESIS = np.linspace(-1, 1, N, dtype=np.float32)
MANIFEST = make_manifest(N, GENESIS, identity(1000), codec="int8")


def new_replica(folder: Path) -> Replica:
    outer = MANIFEST.spec.outer
    ledger = Ledger(folder, grid=Grid(n=N, codec=outer.codec), lr=outer.lr, momentum=outer.momentum, snapshot_every=5)
    return Replica(MANIFEST, ledger, np.full(N, 7, np.float32), np.full(N, 7, np.float32))


@pytest.fixture
def replica(tmp_path: Path) -> Replica:
    """At the genesis."""
    fresh = new_replica(tmp_path)
    fresh.ledger.write_snapshot(genesis_state(GENESIS.copy()))
    assert fresh.load()
    return fresh


def update_after(replica: Replica, seed: int = 0, **changes: Any) -> Update:
    state = replica.loaded
    values = np.random.default_rng([state.step, seed]).standard_normal(N).astype(np.float32)
    part = Part(mask=b"\x01", data=changes.pop("data", None) or encode(values, "int8"))
    fields: dict[str, Any] = {
        "step": state.step,
        "parent": state.head,
        "contributors": (("a", 5),),
        "part_hashes": (part.hash,),
    }
    return Update(header=UpdateHeader(**fields | changes), parts=(part,))


def commit(replica: Replica, update: Update) -> None:
    replica.commit(update, unsigned(update, replica.digest_due()))


def advance(replica: Replica, steps: int) -> None:
    for _ in range(steps):
        commit(replica, update_after(replica))
        replica.make_snapshots()


def test_before_anything_is_loaded(tmp_path: Path) -> None:
    fresh = new_replica(tmp_path)
    assert fresh.load() is False
    for ask in (fresh.standing, fresh.newest_snapshot, fresh.make_snapshots, lambda: fresh.loaded):
        with pytest.raises(LedgerError, match="holds no s"):
            ask()


def test_the_state_is_in_the_vectors_that_were_given(replica: Replica) -> None:
    assert replica.loaded.theta is replica.theta
    assert replica.loaded.momentum is replica.momentum
    np.testing.assert_array_equal(replica.theta, GENESIS)
    expected = genesis_state(GENESIS.copy())
    update = update_after(replica)
    apply(expected, update, Grid(n=len(expected.theta), codec="int8"), lr=0.7, momentum=0.9)
    commit(replica, update)
    assert replica.loaded.digest() == expected.digest()
    assert replica.loaded.theta is replica.theta
    np.testing.assert_array_equal(replica.theta, expected.theta)


def test_where_it_stands(replica: Replica) -> None:
    standing = replica.standing()
    assert (standing.step, standing.head, standing.heads, standing.beyond_genesis) == (
        0,
        replica.loaded.head,
        (),
        False,
    )
    heads = [standing.head]
    for step in range(1, 8):
        advance(replica, 1)
        standing = replica.standing()
        assert (standing.step, standing.beyond_genesis) == (step, True)
        assert standing.head == replica.loaded.head
        assert standing.heads == tuple(reversed(heads))
        heads.append(standing.head)
    assert replica.newest_snapshot().step == 5


def test_who_contributed_to_the_last_updates(replica: Replica) -> None:
    assert replica.contributors(2) == set()
    for names in ("ab", "bc", "ad"):
        commit(replica, update_after(replica, contributors=tuple((name, 5) for name in names)))
    assert [replica.contributors(steps) for steps in (0, 1, 2, 99)] == [set(), set("ad"), set("abcd"), set("abcd")]
    replica.roll_back(1)
    assert replica.contributors(2) == set("ab")


@pytest.mark.parametrize("steps", [1, 5, 7])
def test_memory_and_disk_move_together(replica: Replica, steps: int) -> None:
    advance(replica, steps)
    again = new_replica(replica.ledger.folder)
    assert again.load()
    assert again.loaded.digest() == replica.loaded.digest()
    assert again.standing() == replica.standing()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"step": 3}, "update 3 does not follow from the state at outer step 2"),
        ({"step": 1}, "update 1 does not follow from the state at outer step 2"),
        ({"parent": bytes(32)}, "update 2 does not follow from the state at outer step 2"),
        ({"data": b"\0" * 10}, "part 0 has 10 bytes"),
        ({"data": np.float32(np.nan).tobytes() + b"\0" * 304}, "not finite"),
    ],
)
def test_an_update_that_does_not_fit_changes_nothing(replica: Replica, changes: dict[str, Any], complaint: str) -> None:
    advance(replica, 2)
    digest, heads = replica.loaded.digest(), replica.ledger.heads()
    files = sorted(path.name for path in replica.ledger.folder.rglob("*"))
    with pytest.raises(ValueError, match=complaint):
        commit(replica, update_after(replica, **changes))
    assert (replica.loaded.digest(), replica.ledger.heads()) == (digest, heads)
    assert sorted(path.name for path in replica.ledger.folder.rglob("*")) == files
    assert new_replica(replica.ledger.folder).ledger.heads() == heads


def test_an_update_that_cannot_be_written_is_not_applied(replica: Replica) -> None:
    advance(replica, 2)
    digest, standing = replica.loaded.digest(), replica.standing()
    updates = replica.ledger.folder / "updates"
    updates.rename(replica.ledger.folder / "away")
    with pytest.raises(LedgerError):
        commit(replica, update_after(replica))
    assert (replica.loaded.digest(), replica.standing()) == (digest, standing)
    (replica.ledger.folder / "away").rename(updates)
    advance(replica, 1)
    assert replica.loaded.step == 3


def test_a_snapshot_is_written_where_one_is_due_and_once(replica: Replica) -> None:
    for step in range(1, 11):
        advance(replica, 1)
        assert replica.newest_snapshot().step == step // 5 * 5
    info = replica.newest_snapshot()
    written_ns = info.path.stat().st_mtime_ns
    replica.make_snapshots()
    assert info.path.stat().st_mtime_ns == written_ns
    assert info.digest == replica.loaded.digest()


@pytest.mark.parametrize("step", [5, 6, 8, 9])
def test_roll_back(replica: Replica, step: int) -> None:
    digests = {}
    for _ in range(9):
        advance(replica, 1)
        digests[replica.loaded.step] = replica.loaded.digest()
    replica.roll_back(step)
    assert (replica.loaded.step, replica.loaded.digest()) == (step, digests[step])
    assert max(replica.ledger.heads()) == step
    again = new_replica(replica.ledger.folder)
    assert again.load()
    assert again.loaded.digest() == digests[step]
    commit(replica, update_after(replica, seed=1))
    assert replica.loaded.step == step + 1


def test_roll_back_to_where_the_ledger_does_not_lead(replica: Replica) -> None:
    advance(replica, 12)
    with pytest.raises(LedgerError, match="no longer leads to outer step 3; restart to download it"):
        replica.roll_back(3)


def test_load_at_an_earlier_step(replica: Replica) -> None:
    advance(replica, 7)
    assert replica.load(at_most=6)
    assert replica.loaded.step == 6
    assert replica.load()
    assert replica.loaded.step == 7


# -- certificates ------------------------------------------------------------------------------------------------------


def test_a_certificate_that_names_others_than_the_update_changes_nothing(replica: Replica) -> None:
    advance(replica, 2)
    digest, update = replica.loaded.digest(), update_after(replica)
    for full in (b"", b"\x02", b"\x03"):
        with pytest.raises(ValueError, match="update 2 has others in most of its parts than its certificate"):
            replica.commit(update, dataclasses.replace(unsigned(update), full=full))
    assert (replica.loaded.digest(), replica.ledger.chain.end) == (digest, 2)


def test_who_is_known_where_the_state_stands(replica: Replica) -> None:
    assert replica.known() == Known(step=0, peers=frozenset())
    advance(replica, 17)
    replica.extend([entry_after(replica)])
    assert replica.known() == Known(step=17, peers=frozenset("a")), "whatever the chain has beyond"
    assert (replica.rules.run_id, replica.rules.owner) == (MANIFEST.run_id, identity(1000).peer_id)


def entry_after(replica: Replica) -> Certified:
    update = update_after(replica)
    return Certified(header=update.header, certificate=unsigned(update))


def test_a_state_beyond_the_chain_is_not_loaded(replica: Replica) -> None:
    """Nobody could tell who is known there."""
    advance(replica, 7)
    entries = [entry for step in range(7) if (entry := replica.ledger.chain.entry(step)) is not None]
    replica.ledger.chain.path.unlink()
    again = new_replica(replica.ledger.folder)
    assert again.load()
    assert again.loaded.step == 0
    again.extend(entries[:4])
    assert again.load()
    assert again.loaded.step == 0
    again.extend(entries)
    assert again.load()
    assert again.loaded.step == 5


def test_the_digest_that_is_due(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    assert replica.digest_due() == genesis_state(GENESIS.copy()).digest()
    for step in range(1, 11):
        commit(replica, update_after(replica))
        assert replica.digest_due() == (replica.loaded.digest() if step % 5 == 0 else b"")
        replica.make_snapshots()
    flip(replica.theta)
    assert replica.digest_due() == replica.newest_snapshot().digest, "it is made from the files"
    assert replica.digest_due() != replica.loaded.digest()


def test_the_digests_that_are_certified(replica: Replica) -> None:
    digests = {0: replica.loaded.digest()}
    assert replica.history.certified_digest(0) == bytes.fromhex(MANIFEST.genesis) == digests[0]
    for step in range(1, 7):
        advance(replica, 1)
        digests[step] = replica.loaded.digest()
    assert [replica.history.certified_digest(step) for step in range(7)] == [digests[0], *[b""] * 4, digests[5], b""]


# -- what flips ----------------------------------------------------------------------------------------------------


def flip(values: Vector, at: int = 7, bit: int = 3) -> None:
    values.view(np.uint32)[at] ^= np.uint32(1 << bit)


def flip_file(replica: Replica, name: str) -> Path:
    path = replica.ledger.folder / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return path


def repairs(replica: Replica) -> list[tuple[str, int, str]]:
    return [(repair.what, repair.step, repair.how) for repair in replica.repairs]


@pytest.mark.parametrize("vector", ["theta", "momentum"])
@pytest.mark.parametrize("bit", [0, 31])
def test_a_snapshot_shows_what_has_flipped_in_memory_and_has_none_of_it(
    replica: Replica, tmp_path: Path, vector: str, bit: int
) -> None:
    other = new_replica(tmp_path / "other")
    other.ledger.write_snapshot(genesis_state(GENESIS.copy()))
    other.load()
    advance(replica, 3)
    advance(other, 5)
    flip(getattr(replica, vector), bit=bit)
    advance(replica, 1)
    assert replica.sound
    advance(replica, 1)
    assert not replica.sound
    assert replica.newest_snapshot().digest == other.newest_snapshot().digest
    assert replica.loaded.digest() != other.loaded.digest()
    assert repairs(replica) == []
    assert replica.mend()
    assert replica.sound
    assert replica.loaded.digest() == other.loaded.digest()
    assert repairs(replica) == [("state", 5, "replayed")]
    assert not replica.mend()
    assert len(replica.repairs) == 1


def test_the_snapshot_of_a_step_that_was_passed_is_made_later(replica: Replica) -> None:
    for _ in range(7):
        commit(replica, update_after(replica))
    head = replica.ledger.heads()[5]
    assert replica.missing_snapshots() == [(5, head)]
    flip(replica.theta)
    replica.make_snapshots()
    assert (replica.newest_snapshot().step, replica.newest_snapshot().head) == (5, head)
    assert replica.sound, "it was not compared with anything: memory stands elsewhere"
    assert replica.missing_snapshots() == []


def test_an_error_of_the_replay_is_no_flip_in_memory(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    part_of, calls = Replay.part, 0

    def wrong_once(replay: Replay, part: int) -> tuple[Vector, Vector]:
        nonlocal calls
        calls += 1
        pair = part_of(replay, part)
        if calls == 1:
            flip(pair[0])
        return pair

    monkeypatch.setattr(Replay, "part", wrong_once)
    advance(replica, 5)
    assert calls == 2
    assert replica.sound
    assert replica.newest_snapshot().digest == replica.loaded.digest()


def test_a_machine_that_computes_differently_each_time_is_said_so(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    part_of, calls = Replay.part, 0

    def wrong_always(replay: Replay, part: int) -> tuple[Vector, Vector]:
        nonlocal calls
        calls += 1
        pair = part_of(replay, part)
        flip(pair[0], bit=calls)
        return pair

    advance(replica, 4)
    files = sorted(path.name for path in replica.ledger.folder.rglob("*"))
    monkeypatch.setattr(Replay, "part", wrong_always)
    with pytest.raises(LedgerError, match=r"computes part 0 of outer step 5 differently each time"):
        advance(replica, 1)
    assert sorted(path.name for path in replica.ledger.folder.rglob("*")) == sorted([*files, "0000000004.update"])


def test_a_damaged_update_is_filled_in_and_no_other(replica: Replica) -> None:
    advance(replica, 3)
    update = update_after(replica)
    advance(replica, 4)
    digest = replica.loaded.digest()
    flip_file(replica, "updates/0000000003.update")
    flip_file(replica, "snapshots/0000000005.safetensors")
    with pytest.raises(Gap):
        replica.mend()
    assert replica.loaded.digest() == digest
    assert replica.lost_updates() == [update.header]
    replica.fill(update_after(replica))
    assert replica.lost_updates() == [update.header]
    replica.fill(update)
    replica.fill(update)
    assert replica.lost_updates() == []
    assert not replica.mend()
    replica.make_snapshots()
    assert repairs(replica) == [("update", 3, "fetched"), ("snapshot", 5, "replayed")]
    again = new_replica(replica.ledger.folder)
    assert again.load()
    assert (again.loaded.digest(), again.ledger.quarantined) == (digest, [])


def test_what_nobody_has_is_made_up_for_by_the_state_in_memory(replica: Replica) -> None:
    advance(replica, 8)
    flip_file(replica, "updates/0000000006.update")
    assert replica.ledger.update_bytes(6) is None
    replica.sound = False
    replica.do_without()
    assert replica.newest_snapshot().step == 5, "not from a memory that is known to be wrong"
    replica.sound = True
    replica.do_without()
    assert repairs(replica) == [("update", 6, "rewritten")]
    assert replica.lost_updates() == []
    again = new_replica(replica.ledger.folder)
    assert again.load()
    assert again.loaded.digest() == replica.loaded.digest()
    advance(replica, 2)
    assert replica.newest_snapshot().step == 10


def test_what_is_lost_and_not_needed_is_let_go(replica: Replica) -> None:
    advance(replica, 8)
    flip_file(replica, "updates/0000000003.update")
    assert replica.ledger.update_bytes(3) is None
    replica.do_without()
    assert (repairs(replica), replica.lost_updates()) == ([], [])
    assert [snapshot.step for snapshot in replica.ledger.snapshots()] == [0, 5]


def test_heads_that_did_not_lead_to_mine_are_not_named(replica: Replica, tmp_path: Path) -> None:
    """What led elsewhere is put aside with the chain that led there."""
    advance(replica, 4)
    other = new_replica(tmp_path / "other")
    other.ledger.write_snapshot(genesis_state(GENESIS.copy()))
    other.load()
    for _ in range(5):
        commit(other, update_after(other, seed=1))
    other.make_snapshots()
    snapshot = other.newest_snapshot()
    copy = Path(shutil.copy(snapshot.path, replica.ledger.folder / "copy"))
    entries = [entry for step in range(5) if (entry := other.ledger.chain.entry(step)) is not None]
    replica.adopt_snapshot(copy, snapshot.digest, entries)
    assert replica.load()
    assert sorted(replica.ledger.heads()) == [0, 5]
    assert (replica.standing().step, replica.standing().heads) == (5, ())


def test_heads_before_a_gap_are_not_named(replica: Replica) -> None:
    """Others take them for consecutive."""
    advance(replica, 8)
    flip_file(replica, "updates/0000000006.update")
    assert replica.ledger.update_bytes(6) is None
    assert (replica.standing().step, replica.standing().heads) == (8, ())
    replica.do_without()
    advance(replica, 1)
    assert len(replica.standing().heads) == 1


def test_what_is_loaded_is_sound(replica: Replica) -> None:
    for again in (replica.load, lambda: replica.roll_back(6)):
        advance(replica, 7)
        replica.sound = False
        again()
        assert replica.sound


def test_a_ledger_that_is_gone(replica: Replica) -> None:
    shutil.rmtree(replica.ledger.folder / "snapshots")
    assert replica.load() is False
    with pytest.raises(LedgerError, match="holds no state yet"):
        replica.standing()
