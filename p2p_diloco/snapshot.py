"""The snapshot: one outer state as a safetensors file, and how a file gets onto the disk whole or not at all.

The tensors are ``theta`` and ``momentum``; the metadata names step, head, digest and run. The same state makes the same
bytes, so a joiner can put a snapshot together from several donors, and its size follows from the model alone.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import blake3

from p2p_diloco.errors import LedgerError
from p2p_diloco.outer import HASH_BYTES, OuterState

START_BYTES = 512
"""The safetensors header, padded; the values follow."""
CHUNK_BYTES = 1024 * 1024
TEMPORARY = ".tmp"


@dataclass(frozen=True, kw_only=True)
class SnapshotInfo:
    step: int
    head: bytes
    digest: bytes
    """``OuterState.digest`` of the state in it."""
    size_bytes: int
    path: Path


def snapshot_bytes(n: int) -> int:
    """Size of a snapshot of ``n`` values."""
    return START_BYTES + 2 * 4 * n


def save_snapshot(state: OuterState, digest: bytes, path: Path, *, run_id: str) -> SnapshotInfo:
    """Durable on return. ``digest`` is the state's, which must not change meanwhile."""
    size, start = snapshot_bytes(len(state.theta)), _start(len(state.theta), state.step, state.head, digest, run_id)
    write_whole(path, (start, state.theta.data.cast("B"), state.momentum.data.cast("B")), size)
    return SnapshotInfo(step=state.step, head=state.head, digest=digest, size_bytes=size, path=path)


def check_snapshot(path: Path, *, n: int, run_id: str) -> SnapshotInfo:
    """Reads the file, all of it, a chunk at a time. ValueError unless it is a snapshot of ``n`` values, of this run,
    whose content has the digest that it names."""
    size = path.stat().st_size
    if size != snapshot_bytes(n):
        raise ValueError(f"a snapshot of {size} bytes, expected {snapshot_bytes(n)}")
    with path.open("rb") as file:
        start = file.read(START_BYTES)
        try:
            metadata = json.loads(start[8:])["__metadata__"]
            step, run = int(metadata["step"]), metadata["run"]
            head, digest = bytes.fromhex(metadata["head"]), bytes.fromhex(metadata["digest"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(f"not a snapshot ({type(error).__name__})") from error
        if run != run_id:
            raise ValueError(f"a snapshot of another run, {run!r}")
        sound = 0 <= step < 2**40 and len(head) == len(digest) == HASH_BYTES
        if not sound or start != _start(n, step, head, digest, run_id):
            raise ValueError("the snapshot's header is damaged")
        content = blake3.blake3(step.to_bytes(8, "big") + head)
        while chunk := file.read(CHUNK_BYTES):
            content.update(chunk)
    if content.digest() != digest:
        raise ValueError("the snapshot's content does not have the digest that it names")
    return SnapshotInfo(step=step, head=head, digest=digest, size_bytes=size, path=path)


def read_snapshot(info: SnapshotInfo, state: OuterState) -> None:
    """Into the state's vectors, in place. ValueError, the vectors garbage, when the file changed since its check."""
    with info.path.open("rb") as file:
        file.seek(START_BYTES)
        file.readinto(state.theta.data.cast("B"))
        file.readinto(state.momentum.data.cast("B"))
    state.step, state.head = info.step, info.head
    if state.digest() != info.digest:
        raise ValueError("the snapshot's content does not have the digest that it names")


def _start(n: int, step: int, head: bytes, digest: bytes, run_id: str) -> bytes:
    content: dict[str, object] = {
        "__metadata__": {"digest": digest.hex(), "head": head.hex(), "run": run_id, "step": str(step)},
        "theta": {"dtype": "F32", "shape": [n], "data_offsets": [0, 4 * n]},
        "momentum": {"dtype": "F32", "shape": [n], "data_offsets": [4 * n, 8 * n]},
    }
    text = json.dumps(content, separators=(",", ":")).encode()
    length = START_BYTES - 8
    assert len(text) <= length, "a run id is 40 characters"
    return length.to_bytes(8, "little") + text.ljust(length)


def write_whole(path: Path, pieces: Iterable[bytes | memoryview], size_bytes: int) -> None:
    """Under a temporary name, synced, renamed. LedgerError when the disk fails or is full, nothing left behind then."""
    temporary = path.with_name(path.name + TEMPORARY)
    with disk_errors(path, size_bytes):
        try:
            with temporary.open("wb") as file:
                for piece in pieces:
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)


def sync(path: Path) -> None:
    """A file's bytes, or a folder's names, down to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(path: Path, size_bytes: int = 0) -> Iterator[None]:
    """OSError as LedgerError. ``size_bytes``: what is being written."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            need = max(1, -(-size_bytes // 10**6))
            raise LedgerError(f"{path}: disk full, free {need} MB or move the folder") from error
        raise LedgerError(f"{path}: {error.strerror}") from error
