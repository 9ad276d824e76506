"""The file of the anchors: it is read up to the first that is not sound, and is no larger in memory than on disk."""

from __future__ import annotations

import tracemalloc
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest

from p2p_diloco.core.anchor import Anchors
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.manifest import RunManifest
from p2p_diloco.ledger import anchors as file_of_anchors
from p2p_diloco.ledger.anchors import LENGTH_BYTES, anchors_path, keep_anchors, read_anchors
from tests.support.builders import OWNER, identity
from tests.support.fakes import make_manifest

GARBAGE_BYTES = 4_000_000


@pytest.fixture(scope="module")
def manifest() -> RunManifest:
    return make_manifest(10, np.zeros(10, np.float32), OWNER)


@pytest.fixture
def kept(tmp_path: Path, manifest: RunManifest) -> Anchors:
    """Three of them, on the disk."""
    chain = Anchors()
    for step in (2, 4, 6):
        one = chain.next(manifest.run_id, step=step, head=bytes([step]) * 32, state=bytes(32), owner=OWNER)
        chain = Anchors(chain=(*chain.chain, one))
    keep_anchors(tmp_path, chain)
    return chain


def test_what_is_kept_is_read(tmp_path: Path, manifest: RunManifest, kept: Anchors) -> None:
    assert read_anchors(tmp_path, manifest) == (kept, "")
    assert read_anchors(tmp_path / "elsewhere", manifest) == (Anchors(), "")


def test_a_file_that_was_cut_off_is_read_as_far_as_it_goes(
    tmp_path: Path, manifest: RunManifest, kept: Anchors
) -> None:
    path = anchors_path(tmp_path)
    whole = path.read_bytes()
    ends = [0, *accumulate(LENGTH_BYTES + len(anchor.to_bytes()) for anchor in kept.chain)]
    assert ends[-1] == len(whole)
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        found, problem = read_anchors(tmp_path, manifest)
        assert found.chain == kept.chain[: bisect_right(ends, length) - 1]
        assert (problem == "") == (length in ends)


@pytest.mark.parametrize(("there", "sound"), [((1, 2), 0), ((0, 2), 1), ((0, 1, 1), 2)])
def test_a_file_is_read_up_to_the_first_that_does_not_name_the_one_before(
    tmp_path: Path, manifest: RunManifest, kept: Anchors, there: tuple[int, ...], sound: int
) -> None:
    chain = tuple(kept.chain[i] for i in there)
    keep_anchors(tmp_path, Anchors(chain=chain))
    found, problem = read_anchors(tmp_path, manifest)
    assert found.chain == chain[:sound]
    assert problem == f"anchor {chain[sound].number} does not name the one before it"


@pytest.mark.parametrize(
    ("owner", "run_id", "complaint"), [(identity(7), None, "is not signed"), (OWNER, "0" * 40, "of another run")]
)
def test_anchors_of_another_owner_or_run_are_not_read(
    tmp_path: Path, manifest: RunManifest, owner: Identity, run_id: str | None, complaint: str
) -> None:
    one = Anchors().next(run_id or manifest.run_id, step=2, head=bytes(32), state=bytes(32), owner=owner)
    keep_anchors(tmp_path, Anchors(chain=(one,)))
    found, problem = read_anchors(tmp_path, manifest)
    assert found == Anchors()
    assert complaint in problem


def test_the_file_is_held_in_memory_once(tmp_path: Path, manifest: RunManifest, kept: Anchors) -> None:
    with anchors_path(tmp_path).open("ab") as file:
        file.write(bytes(GARBAGE_BYTES))
    tracemalloc.start()
    try:
        found, problem = read_anchors(tmp_path, manifest)
        _, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == kept
    assert problem
    assert most_bytes < 1.5 * GARBAGE_BYTES


def test_a_file_beyond_all_bounds_is_not_read(
    tmp_path: Path, manifest: RunManifest, kept: Anchors, monkeypatch: pytest.MonkeyPatch
) -> None:
    size_bytes = anchors_path(tmp_path).stat().st_size
    monkeypatch.setattr(file_of_anchors, "MAX_FILE_BYTES", size_bytes)
    assert read_anchors(tmp_path, manifest) == (kept, "")
    monkeypatch.setattr(file_of_anchors, "MAX_FILE_BYTES", size_bytes - 1)
    assert read_anchors(tmp_path, manifest) == (Anchors(), f"it has more than {size_bytes - 1} bytes")
