"""The contributions that a reducer keeps: in a file that nobody sees, and for no longer than they are asked for."""

from __future__ import annotations

import errno
import gc
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from p2p_diloco.core.audit import pack_contributions
from p2p_diloco.core.signed_part import Contribution
from p2p_diloco.round import kept as kept_module
from p2p_diloco.round.kept import Kept

CAME = {0: Contribution(data=b"a" * 100, signature=bytes(64)), 3: Contribution(data=b"b" * 7, signature=bytes(64))}


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def keep(kept: Kept, number: int, part: int, came: Mapping[int, Contribution]) -> None:
    """Keeps a part, and writes all that is in memory to the file."""
    kept.hold(number, part, came)
    kept.spill()


@pytest.mark.parametrize("spills", [False, True])
def test_each_part_of_each_butterfly_is_kept_until_the_round_is_forgotten(tmp_path: Path, spills: bool) -> None:
    kept, before = Kept(tmp_path), descriptors()
    assert kept.read(0, 7) is None
    assert not kept.hold(0, 7, CAME)
    assert not kept.hold(1, 7, {})
    if spills:
        kept.spill()
    assert len(descriptors()) == len(before) + spills
    assert not kept.hold(0, 8, {3: CAME[3]})
    assert list(tmp_path.iterdir()) == []
    assert kept.read(0, 7) == pack_contributions(CAME)
    assert kept.read(1, 7) == pack_contributions({})
    assert kept.read(0, 8) == pack_contributions({3: CAME[3]})
    assert kept.read(1, 8) is None
    kept.close()
    assert [kept.read(0, 7), kept.read(0, 8)] == [None, None]
    assert descriptors() == before
    assert not kept.hold(0, 9, CAME)
    kept.spill()
    kept.close()
    assert kept.read(0, 9) is None


def test_no_more_is_held_in_memory_than_has_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_module, "MAX_HELD_BYTES", 2 * 107)
    kept = Kept(tmp_path)
    assert [kept.hold(0, part, CAME) for part in range(3)] == [False, False, True]
    kept.spill()
    assert [kept.hold(0, part, CAME) for part in range(3, 6)] == [False, False, True]
    assert all(kept.read(0, part) == pack_contributions(CAME) for part in range(6))
    kept.close()


def test_a_round_that_nobody_closes_leaves_no_file_open(tmp_path: Path) -> None:
    gc.collect()  # what tests before have left
    before = descriptors()
    kept = Kept(tmp_path)
    keep(kept, 0, 0, CAME)
    assert len(descriptors()) == len(before) + 1
    del kept
    gc.collect()
    assert descriptors() == before


def test_no_more_is_kept_than_there_is_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_module, "MAX_KEPT_BYTES", 300)
    kept = Kept(tmp_path)
    keep(kept, 0, 0, CAME)
    keep(kept, 0, 1, CAME)
    keep(kept, 0, 2, {})
    assert [kept.read(0, part) is not None for part in range(3)] == [True, False, True]
    kept.close()


def test_a_disk_that_is_full_costs_what_is_kept_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    kept = Kept(tmp_path)
    keep(kept, 0, 0, CAME)
    monkeypatch.setattr(os, "pwrite", full)
    keep(kept, 0, 1, CAME)
    keep(kept, 0, 2, CAME)
    assert kept.read(0, 1) is None
    assert kept.read(0, 0) == pack_contributions(CAME)
    assert caplog.text.count("nobody can audit what I reduce now: No space left on device") == 1
    kept.close()
