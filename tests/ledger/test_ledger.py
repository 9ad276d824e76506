from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from p2p_diloco.core.certificate import Certified
from p2p_diloco.core.codec import Vector
from p2p_diloco.core.codecs import CodecName, encode
from p2p_diloco.core.errors import LedgerError
from p2p_diloco.core.grid import Grid
from p2p_diloco.core.outer import OuterState, apply, genesis_state
from p2p_diloco.core.update import Part, Update, UpdateHeader, max_update_bytes, open_update, update_to_bytes
from p2p_diloco.ledger import replay, updates
from p2p_diloco.ledger.files import ABANDONED_KEPT
from p2p_diloco.ledger.ledger import Ledger
from p2p_diloco.ledger.snapshot import check_snapshot, snapshot_bytes
from tests.support.certificates import unsigned

N = 300
EVERY = 3


def open_ledger(folder: Path, n: int = N, codec: CodecName = "int8", **changes: Any) -> Ledger:
    settings_: dict[str, Any] = {"lr": 0.7, "momentum": 0.9, "snapshot_every": EVERY, "run_id": "run"}
    return Ledger(folder, grid=Grid(n=n, codec=codec), **settings_ | changes)


def genesis(n: int = N) -> OuterState:
    return genesis_state(np.linspace(-1, 1, n, dtype=np.float32))


def update_after(state: OuterState, seed: int = 0) -> Update:
    values = np.random.default_rng([state.step, seed]).standard_normal(len(state.theta)).astype(np.float32)
    part = Part(mask=b"\x01", data=encode(values, "int8"))
    header = UpdateHeader(step=state.step, parent=state.head, contributors=(("a", 5),), part_hashes=(part.hash,))
    return Update(header=header, parts=(part,))


def append(ledger: Ledger, update: Update) -> None:
    ledger.append(update, unsigned(update))


def copy_of(state: OuterState) -> OuterState:
    return replace(state, theta=state.theta.copy(), momentum=state.momentum.copy())


def advance(ledger: Ledger | None, state: OuterState, steps: int, seed: int = 0) -> list[OuterState]:
    """As a peer does: apply, append, and a snapshot when it is due. Every state on the way, the first included."""
    states = [copy_of(state)]
    for _ in range(steps):
        update = update_after(state, seed)
        apply(state, update, Grid(n=len(state.theta), codec="int8"), lr=0.7, momentum=0.9)
        if ledger is not None:
            ledger.append(update, unsigned(update))
            if ledger.newest_due(state.step) == state.step:
                ledger.write_snapshot(state)
        states.append(copy_of(state))
    return states


def history(folder: Path, steps: int = 8, seed: int = 0, **changes: Any) -> list[OuterState]:
    ledger, state = open_ledger(folder, **changes), genesis()
    ledger.write_snapshot(state)
    return advance(ledger, state, steps, seed)


def load(ledger: Ledger, at_most: int | None = None) -> OuterState | None:
    return replay.load(ledger, np.full(N, 7, np.float32), np.full(N, 7, np.float32), at_most=at_most)


def step_of(state: OuterState | None) -> int | None:
    return None if state is None else state.step


def same(state: OuterState | None, expected: OuterState) -> None:
    assert state is not None
    assert (state.step, state.head) == (expected.step, expected.head)
    assert state.digest() == expected.digest()


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def chain_in(folder: Path, steps: int) -> list[Certified]:
    entries = [open_ledger(folder).chain.entry(step) for step in range(steps)]
    return [entry for entry in entries if entry is not None]


def copied(source: Path, target: Path) -> Path:
    target.write_bytes(source.read_bytes())
    return target


UPDATE = "updates/{:010d}.update".format
SNAPSHOT = "snapshots/{:010d}.safetensors".format
SOUND = ["chain", *(SNAPSHOT(s) for s in (3, 6)), *(UPDATE(s) for s in range(3, 8))]
"""What there is after eight outer steps."""


# Writing and reading back


def test_an_empty_ledger_has_nothing(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path / "new" / "ledger")
    assert load(ledger) is None
    assert (ledger.snapshots(), ledger.heads(), ledger.header(0), ledger.update_bytes(0)) == ([], {}, None, None)


def test_replay_gives_the_same_bits_as_going_there(tmp_path: Path) -> None:
    states = history(tmp_path)
    same(load(open_ledger(tmp_path)), states[8])
    assert names(tmp_path) == SOUND


def test_every_state_since_the_oldest_snapshot_can_be_had(tmp_path: Path) -> None:
    states = history(tmp_path)
    ledger = open_ledger(tmp_path)
    for t in range(3, 9):
        same(load(ledger, at_most=t), states[t])
    same(load(ledger, at_most=100), states[8])
    assert load(ledger, at_most=2) is None


def test_load_writes_into_the_vectors_it_is_given(tmp_path: Path) -> None:
    states = history(tmp_path)
    theta: Vector = np.zeros(N, np.float32)
    momentum: Vector = np.zeros(N, np.float32)
    state = replay.load(open_ledger(tmp_path), theta, momentum)
    assert state is not None
    assert state.theta is theta
    assert state.momentum is momentum
    np.testing.assert_array_equal(theta, states[8].theta)


def test_heads_are_those_of_every_state_that_can_be_had(tmp_path: Path) -> None:
    states = history(tmp_path)
    ledger = open_ledger(tmp_path)
    assert ledger.heads() == {t: states[t].head for t in range(3, 9)}
    (tmp_path / UPDATE(6)).unlink()
    assert open_ledger(tmp_path).heads() == {t: states[t].head for t in range(3, 7)}


def test_updates_are_served_as_they_were_appended(tmp_path: Path) -> None:
    states = history(tmp_path)
    for ledger in (open_ledger(tmp_path), open_ledger(tmp_path)):
        update = update_after(states[5])
        assert ledger.update_bytes(5) == update_to_bytes(update)
        assert ledger.header(5) == update.header
        assert ledger.update_bytes(2) is None


def test_the_same_state_makes_the_same_file_that_safetensors_reads(tmp_path: Path) -> None:
    states = history(tmp_path / "a")
    history(tmp_path / "b")
    info = open_ledger(tmp_path / "a").snapshots()[-1]
    assert (info.step, info.head, info.digest) == (6, states[6].head, states[6].digest())
    assert info.size_bytes == snapshot_bytes(N) == info.path.stat().st_size
    assert info.path.read_bytes() == (tmp_path / "b" / SNAPSHOT(6)).read_bytes()
    tensors = load_file(info.path)
    np.testing.assert_array_equal(tensors["theta"], states[6].theta)
    np.testing.assert_array_equal(tensors["momentum"], states[6].momentum)


def test_writing_again_changes_nothing(tmp_path: Path) -> None:
    states = history(tmp_path)
    ledger = open_ledger(tmp_path)
    before = {name: (tmp_path / name).stat() for name in names(tmp_path)}
    append(ledger, update_after(states[7]))
    ledger.write_snapshot(states[6])
    assert {name: (tmp_path / name).stat() for name in names(tmp_path)} == before


def test_an_update_is_parsed_once_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every outer step waits for it."""
    ledger, state, parsed = open_ledger(tmp_path), genesis(), list[int]()

    def counted(start: bytes, size: int, grid: Grid) -> UpdateHeader:
        parsed.append(size)
        return open_update(start, size, grid)

    monkeypatch.setattr(updates, "open_update", counted)
    for step in range(3):
        advance(ledger, state, 1)
        assert len(parsed) == step + 1


def test_an_update_of_another_model_is_not_appended(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    with pytest.raises(ValueError, match="expected"):
        append(ledger, update_after(genesis(N + 1)))
    assert names(tmp_path) == []


def test_the_disk_in_use_stays_bounded(tmp_path: Path) -> None:
    ledger, state = open_ledger(tmp_path), genesis()
    ledger.write_snapshot(state)
    bound = 2 * snapshot_bytes(N) + 2 * EVERY * max_update_bytes(Grid(n=N, codec="int8"))
    for _ in range(20):
        advance(ledger, state, 1)
        assert sum((tmp_path / name).stat().st_size for name in names(tmp_path)) <= bound
        assert len(ledger.heads()) <= 2 * EVERY
    assert [info.step for info in ledger.snapshots()] == [15, 18]
    advance(open_ledger(tmp_path, keep_snapshots=1), state, 1)
    assert [info.step for info in open_ledger(tmp_path).snapshots()] == [21]


# Crashes and damage


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[OuterState]]:
    """A ledger to take copies of: snapshots 3 and 6, updates 3 to 7. Not to be changed."""
    folder = tmp_path_factory.mktemp("sound")
    return folder, history(folder)


@pytest.fixture
def damaged(sound: tuple[Path, list[OuterState]], tmp_path: Path) -> tuple[Path, list[OuterState]]:
    """A copy of it."""
    return shutil.copytree(sound[0], tmp_path / "copy"), sound[1]


# What is left of the history when a file is lost: the newest step that can be reached.
LEFT = {SNAPSHOT(6): 8, SNAPSHOT(3): 8, UPDATE(7): 7, UPDATE(6): 6, UPDATE(3): 8}


def expect_quarantine(folder: Path, name: str, expected: OuterState) -> Ledger:
    ledger = open_ledger(folder)
    same(load(ledger), expected)
    for t in range(ledger.snapshots()[0].step, expected.step):
        ledger.update_bytes(t)
    assert [path.name for path in ledger.quarantined] == [f"{Path(name).name}.0"]
    assert ledger.quarantined[0].parent == folder / "quarantine"
    assert not (folder / name).exists()
    again = open_ledger(folder)
    same(load(again), expected)
    assert again.quarantined == []
    return ledger


def test_what_a_crash_leaves_of_a_write_is_removed(damaged: tuple[Path, list[OuterState]]) -> None:
    folder, states = damaged
    for name in (UPDATE(8), SNAPSHOT(9), UPDATE(7)):
        (folder / f"{name}.tmp").write_bytes(b"half")
    ledger = open_ledger(folder)
    assert names(folder) == SOUND
    assert ledger.quarantined == []
    same(load(ledger), states[8])


@pytest.mark.parametrize("kill_at", ["fsync", "replace"])
def test_a_write_cut_short_was_never_there(
    damaged: tuple[Path, list[OuterState]], monkeypatch: pytest.MonkeyPatch, kill_at: str
) -> None:
    folder, states = damaged
    ledger = open_ledger(folder)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, kill_at, killed)
        with pytest.raises(KeyboardInterrupt):
            append(ledger, update_after(states[8]))
        with pytest.raises(KeyboardInterrupt):
            ledger.write_snapshot(states[8])
    assert names(folder) == SOUND
    for each in (ledger, open_ledger(folder)):
        same(load(each), states[8])
    append(ledger, update_after(states[8]))
    assert step_of(load(open_ledger(folder))) == 9


def test_nothing_is_renamed_before_it_is_synced(
    damaged: tuple[Path, list[OuterState]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, states = damaged
    ledger = open_ledger(folder)
    calls: list[str] = []
    fsync, rename = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        calls.append(f"sync {os.fstat(descriptor).st_ino}")
        fsync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        calls.append(f"rename {source.stat().st_ino} to {target.name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    append(ledger, update_after(states[8]))
    chain, update, updates = (path.stat().st_ino for path in (folder / "chain", folder / UPDATE(8), folder / "updates"))
    assert calls == [f"sync {chain}", f"sync {update}", f"rename {update} to 0000000008.update", f"sync {updates}"]
    calls.clear()
    download = copied(folder / SNAPSHOT(6), tmp_path / "download")
    ledger.adopt_snapshot(download)
    snapshot, snapshots = (path.stat().st_ino for path in (folder / SNAPSHOT(6), folder / "snapshots"))
    assert calls == [f"sync {snapshot}", f"rename {snapshot} to 0000000006.safetensors", f"sync {snapshots}"]


@pytest.mark.parametrize("name", LEFT)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.5, 0.999])
def test_a_truncated_file_costs_what_it_held(
    damaged: tuple[Path, list[OuterState]], name: str, share: float, caplog: pytest.LogCaptureFixture
) -> None:
    folder, states = damaged
    path = folder / name
    os.truncate(path, int(path.stat().st_size * share))
    expect_quarantine(folder, name, states[LEFT[name]])
    assert any(record.levelno == logging.WARNING and str(path) in record.getMessage() for record in caplog.records)


@given(name=st.sampled_from(sorted(LEFT)), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@example(SNAPSHOT(6), 0.0, 0)
@example(SNAPSHOT(6), 0.9999, 7)
@example(UPDATE(7), 0.0, 0)
@example(UPDATE(7), 0.9999, 7)
@settings(max_examples=60)
def test_a_flipped_bit_costs_what_its_file_held(
    sound: tuple[Path, list[OuterState]],
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    place: float,
    bit: int,
) -> None:
    folder = shutil.copytree(sound[0], tmp_path_factory.mktemp("flipped") / "copy")
    data = bytearray((folder / name).read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    (folder / name).write_bytes(data)
    expect_quarantine(folder, name, sound[1][LEFT[name]])


def test_a_file_that_goes_bad_after_opening_is_not_believed(damaged: tuple[Path, list[OuterState]]) -> None:
    folder, states = damaged
    ledger = open_ledger(folder)
    for name in (SNAPSHOT(6), UPDATE(7)):
        data = bytearray((folder / name).read_bytes())
        data[-1] ^= 1
        (folder / name).write_bytes(data)
    assert ledger.update_bytes(7) is None
    same(load(ledger), states[7])
    assert len(ledger.quarantined) == 2


def test_a_file_that_becomes_another_one_after_opening_is_not_believed(
    damaged: tuple[Path, list[OuterState]],
) -> None:
    folder, states = damaged
    ledger = open_ledger(folder)
    (folder / UPDATE(7)).write_bytes(update_to_bytes(update_after(states[7], seed=1)))
    assert ledger.update_bytes(7) is None
    same(load(ledger), states[7])


def test_a_file_that_is_taken_away_is_missed_and_no_more(damaged: tuple[Path, list[OuterState]]) -> None:
    folder, states = damaged
    ledger = open_ledger(folder)
    (folder / SNAPSHOT(6)).unlink()
    (folder / UPDATE(7)).unlink()
    assert ledger.update_bytes(7) is None
    same(load(ledger), states[7])
    assert ledger.quarantined == []


def test_a_gap_ends_the_replay_and_can_be_filled(damaged: tuple[Path, list[OuterState]]) -> None:
    folder, states = damaged
    (folder / SNAPSHOT(6)).unlink()
    (folder / UPDATE(5)).unlink()
    ledger = open_ledger(folder)
    same(load(ledger), states[5])
    append(ledger, update_after(states[5]))
    same(load(ledger), states[8])


def test_all_snapshots_bad_is_no_state(damaged: tuple[Path, list[OuterState]]) -> None:
    folder, _ = damaged
    for s in (3, 6):
        (folder / SNAPSHOT(s)).write_bytes(bytes(snapshot_bytes(N)))
    ledger = open_ledger(folder)
    assert load(ledger) is None
    assert len(ledger.quarantined) == 2


def test_quarantine_keeps_every_file_of_one_name(damaged: tuple[Path, list[OuterState]]) -> None:
    folder, _ = damaged
    for content in (b"one", b"two"):
        (folder / UPDATE(7)).write_bytes(content)
        assert len(open_ledger(folder).quarantined) == 1
    assert sorted(path.read_bytes() for path in (folder / "quarantine").iterdir()) == [b"one", b"two"]


@pytest.mark.parametrize(("wrong", "n_quarantined"), [({"n": N + 1}, 7), ({"codec": "int4"}, 5), ({"run_id": "x"}, 2)])
def test_the_ledger_of_another_run_is_not_taken_for_ours(
    damaged: tuple[Path, list[OuterState]], wrong: dict[str, Any], n_quarantined: int
) -> None:
    folder, states = damaged
    ledger = open_ledger(folder, **wrong)
    assert ledger.heads() == ({3: states[3].head, 6: states[6].head} if "codec" in wrong else {})
    assert len(ledger.quarantined) == n_quarantined


def test_a_file_under_another_ones_name_is_not_believed(damaged: tuple[Path, list[OuterState]]) -> None:
    folder, states = damaged
    shutil.copy(folder / UPDATE(6), folder / UPDATE(8))
    shutil.copy(folder / SNAPSHOT(6), folder / SNAPSHOT(9))
    ledger = open_ledger(folder)
    same(load(ledger), states[8])
    assert len(ledger.quarantined) == 2


def test_a_sound_update_of_a_foreign_history_is_not_applied(
    damaged: tuple[Path, list[OuterState]], tmp_path: Path
) -> None:
    folder, states = damaged
    history(tmp_path / "foreign", seed=1)
    shutil.copy(tmp_path / "foreign" / UPDATE(7), folder / UPDATE(7))
    ledger = open_ledger(folder)
    assert max(ledger.heads()) == 7
    same(load(ledger), states[7])
    assert [path.name for path in ledger.quarantined] == ["0000000007.update.0"]


def test_an_update_that_does_not_decode_is_not_applied(damaged: tuple[Path, list[OuterState]]) -> None:
    folder, states = damaged
    part = Part(mask=b"", data=b"\xff" * len(update_after(states[8]).parts[0].data))
    header = UpdateHeader(step=8, parent=states[8].head, contributors=(("a", 1),), part_hashes=(part.hash,))
    (folder / UPDATE(8)).write_bytes(update_to_bytes(Update(header=header, parts=(part,))))
    ledger = open_ledger(folder)
    same(load(ledger), states[8])
    assert len(ledger.quarantined) == 1


def test_what_is_lost_is_remembered_until_it_is_there_again_or_belongs_no_more(
    damaged: tuple[Path, list[OuterState]],
) -> None:
    folder, states = damaged
    ledger = open_ledger(folder)

    def lose(*updates: int) -> None:
        for t in updates:
            header = ledger.header(t)
            assert header is not None
            ledger.updates.lose(header, "test")
            ledger.updates.lose(header, "test")
            assert ledger.header(t) is None

    lose(3, 4, 7)
    ledger.lose_snapshot(ledger.snapshots()[0], "test")
    assert (list(ledger.updates.lost), list(ledger.lost_snapshots)) == ([3, 4, 7], [3])
    assert len(ledger.quarantined) == 4
    append(ledger, update_after(states[4]))
    ledger.write_snapshot(states[3])
    assert (list(ledger.updates.lost), list(ledger.lost_snapshots)) == ([3, 7], [])
    ledger.truncate(7)
    assert list(ledger.updates.lost) == [3]
    advance(ledger, copy_of(states[7]), 2)
    assert list(ledger.updates.lost) == []
    assert ledger.snapshots()[0].step == 6


def test_an_update_that_has_been_replaced_is_not_lost(damaged: tuple[Path, list[OuterState]]) -> None:
    """Who read it, and found it damaged, comes too late."""
    folder, states = damaged
    ledger = open_ledger(folder)
    stale, fresh = ledger.header(7), update_after(states[7], seed=1)
    assert stale is not None
    append(ledger, fresh)
    ledger.updates.lose(stale, "test")
    assert not ledger.updates.put_aside(stale, "test")
    assert (ledger.updates.lost, ledger.quarantined) == ({}, [])
    assert ledger.update_bytes(7) == update_to_bytes(fresh)


@pytest.mark.parametrize("taken", [SNAPSHOT(3), UPDATE(3)])
def test_what_somebody_took_away_need_not_be_removed(damaged: tuple[Path, list[OuterState]], taken: str) -> None:
    folder, states = damaged
    ledger = open_ledger(folder)
    (folder / taken).unlink()
    states += advance(ledger, copy_of(states[8]), 1)[1:]
    assert [snapshot.step for snapshot in ledger.snapshots()] == [6, 9]
    same(load(open_ledger(folder)), states[9])


def test_the_way_is_the_shortest_that_is_unbroken(damaged: tuple[Path, list[OuterState]]) -> None:
    folder, states = damaged
    ledger = open_ledger(folder)

    def way(t: int, head: bytes | None = None) -> list[int] | None:
        found = ledger.way_to(t, head or states[t].head)
        return None if found is None else [found[0].step, *(header.step for header in found[1])]

    assert [way(t) for t in range(2, 9)] == [None, [3], [3, 3], [3, 3, 4], [6], [6, 6], [6, 6, 7]]
    assert (way(8, states[7].head), way(9, states[8].head)) == (None, None)
    ledger.lose_snapshot(ledger.snapshots()[-1], "test")
    assert way(8) == [3, 3, 4, 5, 6, 7]
    header = ledger.header(4)
    assert header is not None
    ledger.updates.lose(header, "test")
    assert way(8) is None


# The chain


def test_an_update_without_a_certificate_is_put_aside(damaged: tuple[Path, list[OuterState]]) -> None:
    folder, states = damaged
    (folder / UPDATE(8)).write_bytes(update_to_bytes(update_after(states[8])))
    ledger = open_ledger(folder)
    same(load(ledger), states[8])
    assert [path.name for path in ledger.quarantined] == ["0000000008.update.0"]


def test_an_update_of_another_history_than_the_chains_is_put_aside(damaged: tuple[Path, list[OuterState]]) -> None:
    folder, states = damaged
    (folder / UPDATE(7)).write_bytes(update_to_bytes(update_after(states[7], seed=1)))
    ledger = open_ledger(folder)
    same(load(ledger), states[7])
    assert [path.name for path in ledger.quarantined] == ["0000000007.update.0"]
    assert ledger.chain.end == 8
    ledger.append(update_after(states[7]), unsigned(update_after(states[7])))
    same(load(open_ledger(folder)), states[8])


def test_a_snapshot_of_another_history_than_the_chains_is_put_aside(
    damaged: tuple[Path, list[OuterState]], tmp_path: Path
) -> None:
    folder, states = damaged
    history(tmp_path / "foreign", seed=1)
    shutil.copy(tmp_path / "foreign" / SNAPSHOT(6), folder / SNAPSHOT(6))
    ledger = open_ledger(folder)
    same(load(ledger), states[8])
    assert [path.name for path in ledger.quarantined] == ["0000000006.safetensors.0"]


def test_the_entry_of_an_update_that_was_not_written_any_more_changes_nothing(
    damaged: tuple[Path, list[OuterState]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The power fails between the two."""
    folder, states = damaged
    ledger = open_ledger(folder)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            append(ledger, update_after(states[8]))
    for each in (ledger, open_ledger(folder)):
        assert each.chain.end == 9
        same(load(each), states[8])
        assert each.quarantined == []
    again = open_ledger(folder)
    append(again, update_after(states[8], seed=1))  # the round was lost, and the next one came to another update
    assert names(folder) == sorted([*SOUND, UPDATE(8)])
    assert open_ledger(folder).chain.end == 9
    assert step_of(load(open_ledger(folder))) == 9


def test_without_its_chain_a_ledger_keeps_its_snapshots_until_it_has_one_again(
    damaged: tuple[Path, list[OuterState]],
) -> None:
    folder, states = damaged
    entries = chain_in(folder, 8)
    (folder / "chain").unlink()
    ledger = open_ledger(folder)
    assert [info.step for info in ledger.snapshots()] == [3, 6]
    assert [path.name for path in ledger.quarantined] == [f"{step:010d}.update.0" for step in range(3, 8)]
    ledger.extend(entries)
    for each in (ledger, open_ledger(folder)):
        same(load(each), states[6])
    advance(ledger, copy_of(states[6]), 2)
    same(load(open_ledger(folder)), states[8])


def test_a_chain_that_leads_elsewhere_puts_what_it_contradicts_aside(
    damaged: tuple[Path, list[OuterState]], tmp_path: Path
) -> None:
    folder, _ = damaged
    other = history(tmp_path / "other", seed=1)
    (folder / "chain").unlink()
    ledger = open_ledger(folder)
    ledger.extend(chain_in(tmp_path / "other", 5))
    assert [info.step for info in ledger.snapshots()] == [6], "the chain says nothing of that one yet"
    ledger.extend(chain_in(tmp_path / "other", 6))
    assert (ledger.snapshots(), ledger.chain.head_at(6)) == ([], other[6].head)


def test_going_back_to_lead_on_by_another_chain(damaged: tuple[Path, list[OuterState]], tmp_path: Path) -> None:
    """What both chains have stays in the chain, also where the updates are given up."""
    folder, states = damaged
    ledger = open_ledger(tmp_path / "other")
    ledger.write_snapshot(states[3])
    ours = advance(None, copy_of(states[6]), 3, seed=1)
    entries = chain_in(folder, 6)
    for state in ours[:-1]:
        update = update_after(state, seed=1)
        entries.append(Certified(header=update.header, certificate=unsigned(update)))
    mine = open_ledger(folder)
    mine.go_back(5, entries)
    for each in (mine, open_ledger(folder)):
        same(load(each), states[5])
        assert each.chain.end == 9
        assert [each.chain.head_at(step) for step in (6, 9)] == [states[6].head, ours[3].head]
    kept = folder / "abandoned" / "000001"
    assert [path.name for path in sorted(kept.iterdir())] == [
        "0000000005.update",
        "0000000006.safetensors",
        "0000000006.update",
        "0000000007.update",
        "chain",
    ]
    mine.go_back(4, [])
    assert mine.chain.end == 9


# Histories that the swarm did not share


def test_truncate_forgets_what_came_after(damaged: tuple[Path, list[OuterState]]) -> None:
    folder, states = damaged
    ledger = open_ledger(folder)
    ledger.truncate(5)
    for each in (ledger, open_ledger(folder)):
        same(load(each), states[5])
        assert max(each.heads()) == 5
    assert names(folder / "abandoned" / "000001") == [
        "0000000005.update",
        "0000000006.safetensors",
        "0000000006.update",
        "0000000007.update",
        "chain",
    ]
    assert open_ledger(folder).chain.end == 5
    ledger.truncate(5)
    assert len(list((folder / "abandoned").iterdir())) == 1


def test_a_truncation_cut_short_leaves_an_unbroken_history(
    damaged: tuple[Path, list[OuterState]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, states = damaged
    ledger, rename, moves = open_ledger(folder), os.replace, 0

    def killed_in_the_middle(source: Path, target: Path) -> None:
        nonlocal moves
        moves += 1
        if moves == 3:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "replace", killed_in_the_middle)
    with pytest.raises(KeyboardInterrupt):
        ledger.truncate(4)
    for each in (ledger, open_ledger(folder)):
        same(load(each), states[7])


def test_only_the_last_abandoned_histories_are_kept(tmp_path: Path) -> None:
    states = history(tmp_path)
    for seed in range(1, 5):
        ledger = open_ledger(tmp_path)
        ledger.truncate(7)
        assert len(list((tmp_path / "abandoned").iterdir())) == min(seed, ABANDONED_KEPT)
        append(ledger, update_after(states[7], seed))
    assert sorted(path.name for path in (tmp_path / "abandoned").iterdir()) == ["000003", "000004"]


def test_an_update_that_contradicts_the_history_replaces_it(damaged: tuple[Path, list[OuterState]]) -> None:
    folder, states = damaged
    ledger, ours = open_ledger(folder), advance(None, copy_of(states[5]), 1, seed=1)
    append(ledger, update_after(states[5], seed=1))
    assert ledger.heads() == {t: s.head for t, s in enumerate([*states[3:6], ours[1]], 3)}
    same(load(open_ledger(folder)), ours[1])


@pytest.mark.parametrize("lost", [[UPDATE(5)], [UPDATE(5), UPDATE(6)]])
def test_an_update_before_a_gap_decides_about_what_comes_after(
    damaged: tuple[Path, list[OuterState]], lost: list[str]
) -> None:
    folder, states = damaged
    for name in lost:
        (folder / name).unlink()
    ledger, ours = open_ledger(folder), advance(None, copy_of(states[5]), 1, seed=1)
    append(ledger, update_after(states[5], seed=1))
    same(load(ledger), ours[1])
    assert [info.step for info in ledger.snapshots()] == [3]
    ledger.write_snapshot(ours[1])
    same(load(open_ledger(folder)), ours[1])


# Snapshots from donors


def test_a_downloaded_snapshot_is_adopted(sound: tuple[Path, list[OuterState]], tmp_path: Path) -> None:
    folder, states = sound
    ledger = open_ledger(tmp_path / "joiner")
    download = copied(folder / SNAPSHOT(6), tmp_path / "download")
    with pytest.raises(ValueError, match="the chain does not lead to the snapshot of outer step 6"):
        ledger.adopt_snapshot(download)
    ledger.extend(chain_in(folder, 6))
    info = ledger.adopt_snapshot(download)
    assert (info.step, info.path) == (6, tmp_path / "joiner" / SNAPSHOT(6))
    assert not download.exists()
    for t in (6, 7):
        append(ledger, update_after(states[t]))
    same(load(open_ledger(tmp_path / "joiner")), states[8])


def test_an_adopted_snapshot_puts_an_end_to_another_history(
    sound: tuple[Path, list[OuterState]], tmp_path: Path
) -> None:
    folder, states = sound
    history(tmp_path / "diverged", steps=10, seed=1)
    ledger = open_ledger(tmp_path / "diverged")
    ledger.extend(chain_in(folder, 6))
    assert ledger.heads() == {}, "nothing is left of the other one"
    ledger.adopt_snapshot(copied(folder / SNAPSHOT(6), tmp_path / "download"))
    same(load(ledger), states[6])
    assert max(ledger.heads()) == 6


def test_an_adopted_snapshot_of_the_same_head_with_other_bits_puts_mine_aside(
    damaged: tuple[Path, list[OuterState]], tmp_path: Path
) -> None:
    folder, states = damaged
    wrong = copy_of(states[6])
    wrong.theta[5] += 1
    ledger = open_ledger(folder)
    ledger.write_snapshot(wrong)
    mine = (folder / SNAPSHOT(6)).read_bytes()
    other = open_ledger(tmp_path / "other")
    other.write_snapshot(states[6])
    ledger.adopt_snapshot(copied(other.snapshots()[-1].path, tmp_path / "download"), states[6].digest())
    assert [path.read_bytes() for path in ledger.quarantined] == [mine]
    assert names(folder / "updates") == [Path(name).name for name in SOUND if "updates" in name]
    for each in (ledger, open_ledger(folder)):
        same(load(each), states[8])


@pytest.mark.parametrize("found", ["while it ran", "while it ran, and an update, too", "when it was opened"])
def test_an_adopted_snapshot_takes_the_place_of_a_damaged_one(tmp_path: Path, found: str) -> None:
    """Nothing of what came after it is given up."""
    folder = tmp_path / "mine"
    states = history(folder)
    download = copied(folder / SNAPSHOT(3), tmp_path / "download")
    ledger = open_ledger(folder)
    if found == "when it was opened":
        os.truncate(folder / SNAPSHOT(3), 100)
        ledger = open_ledger(folder)
    else:
        ledger.lose_snapshot(ledger.snapshots()[0], "a bit flipped")
    if found == "while it ran, and an update, too":
        header = ledger.header(4)
        assert header is not None
        ledger.updates.lose(header, "a bit flipped")
    assert [info.step for info in ledger.snapshots()] == [6]
    ledger.adopt_snapshot(download, states[3].digest())
    for each in (ledger, open_ledger(folder)):
        assert [info.step for info in each.snapshots()] == [3, 6]
        assert max(each.heads()) == 8
        same(load(each), states[8])


@pytest.mark.parametrize("place", [0, 20, 120, 200, 511, 512, 512 + 4 * N, 511 + 8 * N])
def test_a_damaged_download_is_refused_and_left_alone(
    sound: tuple[Path, list[OuterState]], tmp_path: Path, place: int
) -> None:
    download = copied(sound[0] / SNAPSHOT(6), tmp_path / "download")
    data = bytearray(download.read_bytes())
    data[place] ^= 1
    download.write_bytes(data)
    ledger = open_ledger(tmp_path / "joiner")
    with pytest.raises(ValueError, match="snapshot"):
        ledger.adopt_snapshot(download)
    assert download.read_bytes() == data
    assert ledger.snapshots() == []


@given(st.binary(max_size=504))
@example(b'{"__metadata__":{"step":Infinity,"run":"run","head":"","digest":""}}')
@example(b'{"__metadata__":{"step":"-1","run":"run","head":"' + b"00" * 32 + b'","digest":"' + b"00" * 32 + b'"}}')
@example(b'{"__metadata__":{"step":"1","run":"run","head":"' + b"00" * 32 + b'","digest":"' + b"00" * 150 + b'"}}')
@example(b'{"__metadata__":[]}')
@example(b"[" * 504)
def test_any_header_is_refused(tmp_path_factory: pytest.TempPathFactory, header: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes((504).to_bytes(8, "little") + header.ljust(504) + bytes(8 * N))
    with pytest.raises(ValueError, match="snapshot"):
        check_snapshot(path, n=N, run_id="run")


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "huge"
    path.touch()
    os.truncate(path, 10**12)
    with pytest.raises(ValueError, match="expected"):
        check_snapshot(path, n=N, run_id="run")


# A disk that is full or fails


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting takes root")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_full_disk_is_said_and_harms_nothing(small_disk: Path) -> None:
    states = history(small_disk)
    ledger = open_ledger(small_disk)
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file:
        while shutil.disk_usage(small_disk).free:
            file.write(bytes(4096))
    with pytest.raises(LedgerError, match=r"8\.update: disk full, free 1 MB or move the folder"):
        append(ledger, update_after(states[8]))
    with pytest.raises(LedgerError, match=r"8\.safetensors: disk full"):
        ledger.write_snapshot(states[8])
    assert [name for name in names(small_disk) if name != "filler"] == SOUND
    for each in (ledger, open_ledger(small_disk)):
        same(load(each), states[8])
    filler.unlink()
    state = copy_of(states[8])
    same(load(ledger), advance(ledger, state, 1)[0])
    assert step_of(load(open_ledger(small_disk))) == 9


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.ENOSPC, "disk full, free 1 MB"), (errno.EDQUOT, "disk full"), (errno.EIO, "Input/output")],
)
def test_a_failing_disk_is_said_and_harms_nothing(
    damaged: tuple[Path, list[OuterState]], monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    folder, states = damaged
    ledger = open_ledger(folder)

    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(LedgerError, match=message):
            append(ledger, update_after(states[8]))
        with pytest.raises(LedgerError, match=message):
            ledger.write_snapshot(states[8])
    assert names(folder) == SOUND
    same(load(ledger), states[8])


def test_a_folder_that_cannot_be_one_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(LedgerError, match="file"):
        open_ledger(tmp_path / "file")
