"""Files that are on the disk whole, or not at all. What a power failure leaves of them: ``test_ledger``."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from p2p_diloco.core.errors import LedgerError
from p2p_diloco.ledger.disk import disk_errors, replacing, whole_file, write_whole


@pytest.mark.parametrize(
    ("size_bytes", "need_mb"), [(0, 1), (10**6, 1), (10**6 + 1, 2), (1_240_000_000, 1240), (1_240_000_001, 1241)]
)
def test_a_full_disk_says_how_much_is_needed(tmp_path: Path, size_bytes: int, need_mb: int) -> None:
    with (
        pytest.raises(LedgerError, match=f"file: disk full, free {need_mb} MB or"),
        disk_errors(tmp_path / "file", size_bytes),
    ):
        raise OSError(errno.ENOSPC, "No space left")


def test_a_file_is_replaced_at_the_end_of_the_block_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, [b"o", memoryview(b"ld")], 3)
    with replacing(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_raised_in_the_block_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, [b"old"], 3)
    with pytest.raises(KeyboardInterrupt), whole_file(path, 3) as file:  # noqa: PT012 - raised inside the block
        file.write(b"new")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failing_disk_is_an_os_error_or_for_whole_files_a_line(tmp_path: Path) -> None:
    missing = tmp_path / "missing" / "file"
    with pytest.raises(FileNotFoundError), replacing(missing):
        pass
    with pytest.raises(LedgerError, match=f"{missing}: No such file"), whole_file(missing, 3):
        pass


def test_a_private_file_is_so_from_its_first_byte(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replacing(path, 0o600) as file:
        assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == 0o600
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_bytes_then_name_then_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order in which they reach the disk."""
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        fsync(descriptor)
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else f"{os.fstat(descriptor).st_size} bytes")

    def noted_replace(source: Path, target: Path) -> None:
        replace(source, target)
        done.append("name")

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write_whole(tmp_path / "file", [b"new"], 3)
    assert done == ["3 bytes", "name", "folder"]
