"""The snapshot: one outer state as a safetensors file.

The tensors are ``theta`` and ``momentum``; the metadata names step, head, digest and run. The same state makes the same
bytes, so a joiner can put a snapshot together from several donors, and its size follows from the model alone. A chunk
is one part of theta or of momentum; it is verified by its hash, which the digest vouches for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import blake3
import numpy as np

from p2p_diloco.core.codec import Vector
from p2p_diloco.core.digest import HASH_BYTES
from p2p_diloco.core.grid import part_slices
from p2p_diloco.core.outer import state_digest
from p2p_diloco.ledger.disk import disk_errors, whole_file

START_BYTES = 512
"""The safetensors header, padded; the values follow."""


@dataclass(frozen=True, kw_only=True)
class SnapshotInfo:
    """Holds what is known of a snapshot that was verified."""

    step: int
    head: bytes
    digest: bytes
    """``OuterState.digest`` of the state in it."""
    chunk_hashes: tuple[bytes, ...]
    size_bytes: int
    path: Path


def snapshot_bytes(n: int) -> int:
    """Returns the size of a snapshot of ``n`` values."""
    return START_BYTES + 2 * 4 * n


def chunk_slices(n: int) -> list[slice]:
    """Returns where the chunks lie, in bytes, in the file of a snapshot of ``n`` values, in the order of their
    hashes."""
    starts = (START_BYTES, START_BYTES + 4 * n)
    return [slice(start + 4 * where.start, start + 4 * where.stop) for start in starts for where in part_slices(n)]


def save_snapshot(
    parts: Iterable[tuple[Vector, Vector]], path: Path, *, step: int, head: bytes, n: int, run_id: str
) -> SnapshotInfo:
    """Writes a snapshot, which is durable on return, and returns what is known of it. ``parts``: (theta, momentum) of
    every part of the state in order, which may be made as they are taken: an exception that comes out of there leaves
    the disk as it was."""
    slices = chunk_slices(n)
    hashes = [b""] * len(slices)
    with whole_file(path, snapshot_bytes(n)) as file:
        for part, pair in enumerate(parts):
            for chunk, values in zip((part, len(hashes) // 2 + part), pair):
                hashes[chunk] = chunk_hash(values.data.cast("B"))
                file.seek(slices[chunk].start)
                file.write(values.data.cast("B"))
        digest = state_digest(step, head, hashes)
        file.seek(0)
        file.write(_start(n, step, head, digest, run_id))
    return SnapshotInfo(
        step=step, head=head, digest=digest, chunk_hashes=tuple(hashes), size_bytes=snapshot_bytes(n), path=path
    )


def check_snapshot(path: Path, *, n: int, run_id: str) -> SnapshotInfo:
    """Reads all of the file, a chunk at a time, and returns what is known of the snapshot. Raises ValueError unless it
    is a snapshot of ``n`` values, of this run, whose content has the digest that it names."""
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
        hashes = tuple(chunk_hash(file.read(where.stop - where.start)) for where in chunk_slices(n))
    if state_digest(step, head, hashes) != digest:
        raise ValueError("the snapshot's content does not have the digest that it names")
    return SnapshotInfo(step=step, head=head, digest=digest, chunk_hashes=hashes, size_bytes=size, path=path)


def starts_soundly(info: SnapshotInfo, *, n: int, run_id: str) -> bool:
    """Returns whether the file still has the size and the header of that snapshot. Reads no values."""
    return begins_with(info.path, _start(n, info.step, info.head, info.digest, run_id), info.size_bytes)


def begins_with(path: Path, start: bytes, size_bytes: int) -> bool:
    """Returns whether the file is there, has this size, and begins like this."""
    with disk_errors(path):
        try:
            with path.open("rb") as file:
                return file.read(len(start)) == start and file.seek(0, os.SEEK_END) == size_bytes
        except FileNotFoundError:
            return False


def chunk_hash(chunk: bytes | memoryview) -> bytes:
    """Returns the hash of a chunk, as ``OuterState.chunk_hashes`` has it."""
    return blake3.blake3(chunk).digest()


def read_chunk(path: Path, where: slice) -> bytes:
    """Returns the bytes of the file there: none when the file is gone, too few when it has been cut."""
    with disk_errors(path):
        try:
            with path.open("rb") as file:
                file.seek(where.start)
                return file.read(where.stop - where.start)
        except FileNotFoundError:
            return b""


def pack_held(held: bytes | bytearray) -> bytes:
    """Returns which chunks of a snapshot are here, as others are told: a bit for each, that of chunk 0 the lowest of
    the first byte. ``held``: for each chunk 1 if it is here, else 0."""
    return np.packbits(np.frombuffer(bytes(held), np.uint8), bitorder="little").tobytes()


def open_held(data: bytes, chunks: int) -> int:
    """Returns what ``pack_held`` was told of a snapshot of so many chunks, as a number whose bit ``chunk`` is set for
    each that is there. Raises ValueError for anything that it does not make."""
    bits = int.from_bytes(data, "little")
    if len(data) != held_bytes(chunks) or bits.bit_length() > chunks:
        raise ValueError(f"another number of chunks than the {chunks} that there are")
    return bits


def held_bytes(chunks: int) -> int:
    """Returns how many bytes ``pack_held`` makes for a snapshot of so many chunks."""
    return (chunks + 7) // 8


class IncomingSnapshot:
    """A snapshot that is being downloaded: its chunks come in any order, and what is in the file already, left by a
    download that broke off, counts as far as it is sound. Others may have what is here. Methods block (disk,
    hashing)."""

    def __init__(
        self, folder: Path, *, step: int, head: bytes, chunk_hashes: tuple[bytes, ...], n: int, run_id: str
    ) -> None:
        self.step = step
        self.head = head
        self.digest = state_digest(step, head, chunk_hashes)
        self.path = folder / f"incoming-{step}-{self.digest.hex()[:16]}.part"
        self.slices = chunk_slices(n)
        self.held = bytearray(len(chunk_hashes))
        """For each chunk 1 once it is here: a byte, so that threads that write two chunks need no lock."""
        self._chunk_hashes = chunk_hashes
        self._size_bytes = snapshot_bytes(n)
        self._start = _start(n, step, head, self.digest, run_id)

    def open(self) -> set[int]:
        """Returns the chunks that are there. What is left of other snapshots' downloads is removed: they are
        overtaken."""
        remove_incoming(self.path.parent, but=self.path)
        with disk_errors(self.path, self._size_bytes):
            self.path.touch()
            with self.path.open("r+b") as file:
                file.write(self._start)
                for chunk, where in enumerate(self.slices):
                    file.seek(where.start)
                    self.held[chunk] = chunk_hash(file.read(where.stop - where.start)) == self._chunk_hashes[chunk]
        return {chunk for chunk, here in enumerate(self.held) if here}

    def write(self, chunk: int, data: bytes) -> None:
        """Writes one chunk. Raises ValueError, with nothing written, when ``data`` is not that chunk."""
        if chunk_hash(data) != self._chunk_hashes[chunk]:
            raise ValueError(f"chunk {chunk} of the snapshot of outer step {self.step} with another hash than it has")
        with disk_errors(self.path, self._size_bytes), self.path.open("r+b") as file:
            file.seek(self.slices[chunk].start)
            file.write(data)
        self.held[chunk] = 1

    def read(self, chunk: int) -> bytes | None:
        """Returns one chunk for somebody else, verified again; None where it is not here, or not any more."""
        if not (chunk < len(self.held) and self.held[chunk]):
            return None
        data = read_chunk(self.path, self.slices[chunk])
        return data if chunk_hash(data) == self._chunk_hashes[chunk] else None


def remove_incoming(folder: Path, but: Path | None = None) -> None:
    """Removes what downloads that broke off have left, but for the file ``but``."""
    with disk_errors(folder):
        for path in folder.glob("incoming-*.part"):
            if path != but:
                path.unlink(missing_ok=True)


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
