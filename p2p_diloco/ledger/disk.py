"""The disk: how a file gets there whole or not at all, and stays there.

    replacing     a file is written beside its place, synced, and renamed into it
    whole_file    the same for a peer's own files, whose failures are a LedgerError with a remedy
    write_whole   the same for bytes that are there already
    sync          a file's bytes, or a folder's names, go down to the disk

Rules of this file: what is at the path is the old file or the new one at every instant, also when the power fails; when
the block ends, the new one is there for good; when it raises, nothing new is left behind. A file is synced before it
is renamed, as its name may reach the disk before its bytes; its folder is synced afterwards, as a name may not reach
the disk for a while.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from p2p_diloco.core.errors import LedgerError, disk_failure

TEMPORARY = ".tmp"
"""Ends the names of files that are being written."""


@contextmanager
def replacing(path: Path, permissions: int = 0o666) -> Iterator[IO[bytes]]:
    """Yields a file under a temporary name, which takes the place of ``path`` at the end of the block. Raises OSError
    when the disk fails or is full. Whatever is raised, what was at ``path`` is still there and nothing is left
    behind. A new file has these ``permissions``, as far as the user's umask allows."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, permissions)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def whole_file(path: Path, size_bytes: int) -> Iterator[IO[bytes]]:
    """Yields a file as ``replacing`` does, and raises LedgerError when the disk fails or is full. ``size_bytes`` is how
    much will be written; the message of a full disk says how much to free."""
    with disk_errors(path, size_bytes), replacing(path) as file:
        yield file


def write_whole(path: Path, pieces: Iterable[bytes | memoryview], size_bytes: int) -> None:
    """Writes the pieces one after the other, as ``whole_file`` does."""
    with whole_file(path, size_bytes) as file:
        for piece in pieces:
            file.write(piece)


def sync(path: Path) -> None:
    """Returns when a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(path: Path, size_bytes: int = 0) -> Iterator[None]:
    """Raises LedgerError in place of an OSError of the block. ``size_bytes`` is how much is being written."""
    try:
        yield
    except OSError as error:
        raise disk_failure(error, path, size_bytes) or LedgerError(f"{path}: {error.strerror}") from error
