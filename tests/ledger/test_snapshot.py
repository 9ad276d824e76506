"""A snapshot's chunks, and one that is being downloaded. Whole snapshots in a ledger: ``test_ledger``."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p_diloco.core import grid
from p2p_diloco.core.errors import LedgerError
from p2p_diloco.core.outer import OuterState
from p2p_diloco.ledger.snapshot import (
    START_BYTES,
    IncomingSnapshot,
    SnapshotInfo,
    check_snapshot,
    chunk_hash,
    chunk_slices,
    held_bytes,
    open_held,
    pack_held,
    read_chunk,
    remove_incoming,
    save_snapshot,
    snapshot_bytes,
)

N = 230
CHUNKS = 6


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 100, 100 and 30 values."""
    monkeypatch.setattr(grid, "PART_VALUES", 100)


@pytest.fixture
def info(tmp_path: Path) -> SnapshotInfo:
    generator = np.random.default_rng(0)
    theta, momentum = (generator.standard_normal(N).astype(np.float32) for _ in range(2))
    state = OuterState(step=5, head=bytes(range(32)), theta=theta, momentum=momentum)
    info = save_snapshot(state.parts(), tmp_path / "snapshot", step=5, head=state.head, n=N, run_id="run")
    assert info == check_snapshot(info.path, n=N, run_id="run")
    assert info.digest == state.digest()
    return info


def incoming(info: SnapshotInfo, folder: Path) -> IncomingSnapshot:
    folder.mkdir(exist_ok=True)
    return IncomingSnapshot(folder, step=info.step, head=info.head, chunk_hashes=info.chunk_hashes, n=N, run_id="run")


def test_chunks_are_the_file_but_for_its_start(info: SnapshotInfo) -> None:
    slices = chunk_slices(N)
    assert [where.stop - where.start for where in slices] == [400, 400, 120] * 2
    assert [where.start for where in slices] == [START_BYTES, *(where.stop for where in slices[:-1])]
    assert slices[-1].stop == snapshot_bytes(N) == info.path.stat().st_size
    chunks = [read_chunk(info.path, where) for where in slices]
    assert b"".join(chunks) == info.path.read_bytes()[START_BYTES:]
    assert tuple(chunk_hash(chunk) for chunk in chunks) == info.chunk_hashes


def test_a_file_that_is_gone_or_cut(info: SnapshotInfo, tmp_path: Path) -> None:
    os.truncate(info.path, START_BYTES + 450)
    assert [len(read_chunk(info.path, where)) for where in chunk_slices(N)[:3]] == [400, 50, 0]
    assert read_chunk(tmp_path / "nowhere", chunk_slices(N)[0]) == b""
    with pytest.raises(LedgerError):
        read_chunk(tmp_path, chunk_slices(N)[0])


@given(order=st.permutations(range(CHUNKS)))
def test_chunks_in_any_order_make_the_same_file(tmp_path_factory: pytest.TempPathFactory, order: list[int]) -> None:
    folder = tmp_path_factory.mktemp("any")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "PART_VALUES", 100)
        state = OuterState(step=5, head=bytes(32), theta=np.ones(N, np.float32), momentum=np.zeros(N, np.float32))
        info = save_snapshot(state.parts(), folder / "snapshot", step=5, head=bytes(32), n=N, run_id="run")
        download = incoming(info, folder / "joiner")
        assert download.open() == set()
        for chunk in order:
            download.write(chunk, read_chunk(info.path, download.slices[chunk]))
        assert download.path.read_bytes() == info.path.read_bytes()
        assert incoming(info, folder / "joiner").open() == set(range(CHUNKS))


@pytest.mark.parametrize("change", ["other", "short", "long", "empty"])
def test_what_is_not_the_chunk_is_not_written(info: SnapshotInfo, tmp_path: Path, change: str) -> None:
    download = incoming(info, tmp_path / "joiner")
    download.open()
    good = read_chunk(info.path, download.slices[1])
    bad = {"other": good[:-1] + bytes([good[-1] ^ 1]), "short": good[:-1], "long": good + b"\0", "empty": b""}[change]
    before = download.path.read_bytes()
    with pytest.raises(ValueError, match="chunk 1 of the snapshot of outer step 5"):
        download.write(1, bad)
    with pytest.raises(ValueError, match="chunk 0"):
        download.write(0, good)
    assert download.path.read_bytes() == before


def test_what_a_broken_off_download_left_counts_as_far_as_it_is_sound(info: SnapshotInfo, tmp_path: Path) -> None:
    download = incoming(info, tmp_path / "joiner")
    download.open()
    for chunk in (0, 2, 4):
        download.write(chunk, read_chunk(info.path, download.slices[chunk]))
    assert incoming(info, tmp_path / "joiner").open() == {0, 2, 4}
    with download.path.open("r+b") as file:
        file.seek(download.slices[2].start)
        file.write(b"\xff")
    assert incoming(info, tmp_path / "joiner").open() == {0, 4}
    os.truncate(download.path, download.slices[4].stop - 1)
    assert incoming(info, tmp_path / "joiner").open() == {0}


def test_downloads_of_other_snapshots_are_removed(info: SnapshotInfo, tmp_path: Path) -> None:
    old = incoming(info, tmp_path / "joiner")
    old.open()
    other = IncomingSnapshot(
        tmp_path / "joiner", step=10, head=info.head, chunk_hashes=info.chunk_hashes, n=N, run_id="run"
    )
    other.open()
    assert list((tmp_path / "joiner").iterdir()) == [other.path]
    remove_incoming(tmp_path / "joiner")
    assert list((tmp_path / "joiner").iterdir()) == []


@pytest.mark.parametrize(("step", "sound"), [(0, True), (2**40 - 1, True), (2**40, False)])
def test_an_outer_step_has_at_most_forty_bits(tmp_path: Path, step: int, sound: bool) -> None:
    zeros = np.zeros(N, np.float32)
    state = OuterState(step=step, head=bytes(32), theta=zeros, momentum=zeros)
    info = save_snapshot(state.parts(), tmp_path / "snapshot", step=step, head=bytes(32), n=N, run_id="run")
    if sound:
        assert check_snapshot(info.path, n=N, run_id="run").step == step
    else:
        with pytest.raises(ValueError, match="header is damaged"):
            check_snapshot(info.path, n=N, run_id="run")


def test_a_full_disk_is_said(info: SnapshotInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    download = incoming(info, tmp_path / "joiner")
    download.open()

    def full(*_: object, **__: object) -> object:
        raise OSError(errno.ENOSPC, "No space left")

    data = read_chunk(info.path, download.slices[0])
    monkeypatch.setattr(Path, "open", full)
    for work in (lambda: download.write(0, data), download.open):
        with pytest.raises(LedgerError, match="disk full, free 1 MB"):
            work()


@given(held=st.lists(st.integers(0, 1), min_size=1, max_size=100))
def test_what_is_here_is_told_in_bits(held: list[int]) -> None:
    data = pack_held(bytes(held))
    assert len(data) == held_bytes(len(held))
    assert [open_held(data, len(held)) >> chunk & 1 for chunk in range(len(held))] == held


@given(data=st.binary(max_size=5), chunks=st.integers(1, 40))
def test_what_others_tell_is_of_as_many_chunks_as_there_are(data: bytes, chunks: int) -> None:
    try:
        bits = open_held(data, chunks)
    except ValueError:
        padding = data[-1] >> chunks % 8 if chunks % 8 and data else 0
        assert len(data) != -(-chunks // 8) or padding
    else:
        assert pack_held(bytes(bits >> chunk & 1 for chunk in range(chunks))) == data


def test_others_may_have_what_is_here_of_a_download(info: SnapshotInfo, tmp_path: Path) -> None:
    download = incoming(info, tmp_path / "joiner")
    assert download.read(0) is None
    download.open()
    chunk = read_chunk(info.path, download.slices[4])
    download.write(4, chunk)
    assert list(download.held) == [0, 0, 0, 0, 1, 0]
    assert [download.read(i) for i in (3, 4, 5, 6, 2**59)] == [None, chunk, None, None, None]
    again = incoming(info, tmp_path / "joiner")
    again.open()
    assert again.read(4) == chunk
    with download.path.open("r+b") as file:
        file.seek(download.slices[4].start)
        file.write(bytes([chunk[0] ^ 1]))
    assert again.read(4) is None
    download.path.unlink()
    assert download.read(4) is None
