from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from p2p_diloco.core.errors import LedgerError
from p2p_diloco.peer.network import keep_manifest


def test_a_manifest_that_is_there_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A seed's is the only one that the run has."""
    path = tmp_path / "run" / "manifest.json"
    keep_manifest(path, b"signed")
    written = path.stat()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    keep_manifest(path, b"signed")
    assert (path.read_bytes(), path.stat().st_ino, path.stat().st_mtime_ns) == (
        *(b"signed", written.st_ino, written.st_mtime_ns),
    )
    with pytest.raises(LedgerError, match=r"manifest\.json: disk full, free 1 MB or move the folder"):
        keep_manifest(path, b"signed anew")
    assert [file.name for file in path.parent.iterdir()] == ["manifest.json"]
    assert path.read_bytes() == b"signed"
