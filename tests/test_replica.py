from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import identity
from fakes import make_manifest

from p2p_diloco.codec import encode
from p2p_diloco.errors import LedgerError
from p2p_diloco.ledger import Ledger
from p2p_diloco.outer import Part, Update, UpdateHeader, apply, genesis_state
from p2p_diloco.replica import HEADS_KEPT, Replica

N = 300
GENESIS = np.linspace(-1, 1, N, dtype=np.float32)
MANIFEST = make_manifest(N, GENESIS, identity(1000), codec="int8")


def new_replica(folder: Path) -> Replica:
    outer = MANIFEST.spec.outer
    ledger = Ledger(folder, n=N, codec=outer.codec, lr=outer.lr, momentum=outer.momentum, snapshot_every=5)
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


def advance(replica: Replica, steps: int) -> None:
    for _ in range(steps):
        replica.commit(update_after(replica))
        replica.snapshot_if_due()


def test_before_anything_is_loaded(tmp_path: Path) -> None:
    fresh = new_replica(tmp_path)
    assert fresh.load() is False
    for ask in (fresh.standing, fresh.newest_snapshot, fresh.snapshot_if_due, lambda: fresh.loaded):
        with pytest.raises(LedgerError, match="holds no s"):
            ask()


def test_the_state_is_in_the_vectors_that_were_given(replica: Replica) -> None:
    assert replica.loaded.theta is replica.theta
    assert replica.loaded.momentum is replica.momentum
    np.testing.assert_array_equal(replica.theta, GENESIS)
    expected = genesis_state(GENESIS.copy())
    update = update_after(replica)
    apply(expected, update, codec="int8", lr=0.7, momentum=0.9)
    replica.commit(update)
    assert replica.loaded.digest() == expected.digest()
    assert replica.loaded.theta is replica.theta
    np.testing.assert_array_equal(replica.theta, expected.theta)


def test_where_it_stands(replica: Replica) -> None:
    standing = replica.standing()
    assert (standing.step, standing.head, standing.heads, standing.committed) == (0, replica.loaded.head, (), False)
    heads = [standing.head]
    for step in range(1, 8):
        advance(replica, 1)
        standing = replica.standing()
        assert (standing.step, standing.committed) == (step, True)
        assert standing.head == replica.loaded.head
        assert standing.heads == tuple(reversed(heads[-HEADS_KEPT:]))
        heads.append(standing.head)
    assert replica.newest_snapshot().step == 5


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
        replica.commit(update_after(replica, **changes))
    assert (replica.loaded.digest(), replica.ledger.heads()) == (digest, heads)
    assert sorted(path.name for path in replica.ledger.folder.rglob("*")) == files
    assert new_replica(replica.ledger.folder).ledger.heads() == heads


def test_an_update_that_cannot_be_written_is_not_applied(replica: Replica) -> None:
    advance(replica, 2)
    digest, standing = replica.loaded.digest(), replica.standing()
    updates = replica.ledger.folder / "updates"
    updates.rename(replica.ledger.folder / "away")
    with pytest.raises(LedgerError):
        replica.commit(update_after(replica))
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
    replica.snapshot_if_due()
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
    replica.commit(update_after(replica, seed=1))
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


def test_a_ledger_that_is_gone(replica: Replica) -> None:
    shutil.rmtree(replica.ledger.folder / "snapshots")
    assert replica.load() is False
    with pytest.raises(LedgerError, match="holds no state yet"):
        replica.standing()
