from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest

from p2p_diloco.core.codecs import encode
from p2p_diloco.core.errors import UsageError
from p2p_diloco.core.grid import Grid
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.manifest import PROTOCOL, RunManifest
from p2p_diloco.core.outer import apply, genesis_state
from p2p_diloco.core.runfile import RunSpec
from p2p_diloco.core.update import Part, Update, UpdateHeader
from p2p_diloco.ledger.folder import (
    MANIFEST_FILE,
    find_run,
    folder_bytes,
    load_run,
    load_state,
    open_ledger,
    run_folder,
)
from tests.support.certificates import unsigned

OWNER = Identity.from_seed(bytes(32))
N = 1000
STEPS = 3


def manifest() -> RunManifest:
    spec = {"name": "tiny", "model": {"config": {"model_type": "llama"}}, "round": {"snapshot_every": 2}}
    return RunManifest(
        spec=RunSpec.model_validate(spec),
        model_config_json='{"model_type":"llama"}',
        n_params=N,
        layout_digest="1" * 64,
        vocab_size=256,
        data_fingerprint="",
        genesis="2" * 64,
        owner=OWNER.peer_id,
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run at outer step 3, with snapshots of outer steps 0 and 2."""
    folder = run_folder(tmp_path / "peer", manifest())
    folder.mkdir(parents=True)
    (folder / MANIFEST_FILE).write_bytes(manifest().signed(OWNER))
    ledger, state = open_ledger(folder, manifest()), genesis_state(np.linspace(-1, 1, N, dtype=np.float32))
    outer = manifest().spec.outer
    ledger.write_snapshot(state)
    for step in range(STEPS):
        part = Part(mask=b"\x01", data=encode(np.full(N, step, np.float32), outer.codec))
        header = UpdateHeader(step=step, parent=state.head, contributors=(("a", 5),), part_hashes=(part.hash,))
        update = Update(header=header, parts=(part,))
        ledger.append(update, unsigned(update))
        apply(state, update, Grid(n=len(state.theta), codec=outer.codec), lr=outer.lr, momentum=outer.momentum)
        if ledger.newest_due(state.step) == state.step:
            ledger.write_snapshot(state)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("links", [True, False])
def test_reading_changes_nothing_whatever_lies_there(run: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if not links:

        def no_links(*_: object) -> None:
            raise OSError

        monkeypatch.setattr(os, "link", no_links)
    (run / "ledger/updates/0000000003.update.tmp").write_bytes(b"being written")
    (run / "ledger/updates/0000000003.update").write_bytes(b"damaged")
    (run / "ledger/snapshots/0000000004.safetensors").write_bytes(b"damaged")
    with (run / "ledger/chain").open("ab") as file:
        file.write(b"being written")
    before = files(run)
    assert load_state(run)[1].step == STEPS
    assert files(run) == before


def test_any_outer_step_that_the_ledger_leads_to_can_be_had(run: Path) -> None:
    states = [load_state(run, step)[1] for step in range(STEPS + 1)]
    assert [state.step for state in states] == [0, 1, 2, 3]
    assert len({state.head for state in states}) == 4
    assert load_state(run)[1].head == states[3].head
    np.testing.assert_array_equal(load_state(run)[1].theta, states[3].theta)
    with pytest.raises(UsageError, match=r"--step 4: the ledger in .* leads to outer steps 0 to 3"):
        load_state(run, 4)


def test_a_state_that_no_chain_leads_to_is_read(run: Path) -> None:
    """A simulation has none."""
    (run / "ledger/chain").unlink()
    assert load_state(run)[1].step == 2
    assert not (run / "ledger/quarantine").exists()


def test_a_folder_that_cannot_be_written_to_is_read_all_the_same(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mkdtemp = tempfile.mkdtemp

    def read_only(suffix: str | None = None, prefix: str | None = None, dir: str | None = None) -> str:
        if dir is not None:
            raise PermissionError
        return mkdtemp(suffix, prefix)

    monkeypatch.setattr(tempfile, "mkdtemp", read_only)
    assert load_state(run)[1].step == STEPS


def test_a_ledger_without_a_sound_snapshot_says_so(run: Path) -> None:
    for path in (run / "ledger/snapshots").iterdir():
        path.write_bytes(b"damaged")
    for step in (None, 1):
        with pytest.raises(UsageError, match="holds no sound state yet"):
            load_state(run, step)


def test_a_run_is_found_by_its_own_folder_and_by_its_peers(run: Path) -> None:
    assert find_run(run) == find_run(run.parent) == find_run(run.parent, manifest().run_id) == run
    with pytest.raises(UsageError, match=f"no run {'0' * 40} here"):
        find_run(run.parent, "0" * 40)
    with pytest.raises(UsageError, match="no run here"):
        find_run(run.parent.parent)


def test_of_two_runs_one_is_to_be_chosen(run: Path) -> None:
    other = manifest().model_copy(update={"genesis": "3" * 64})
    (run.parent / "other").mkdir()
    (run.parent / "other" / MANIFEST_FILE).write_bytes(other.signed(OWNER))
    with pytest.raises(UsageError, match=f"there are 2 runs here; choose one: .*--run-id {manifest().run_id}"):
        find_run(run.parent)
    assert find_run(run.parent, manifest().run_id) == run


def test_a_run_of_another_protocol_is_left_alone(run: Path) -> None:
    """Beside one of this it does not count; alone, it is named in a line."""
    older = run.parent / "tiny-of-before"
    older.mkdir()
    (older / MANIFEST_FILE).write_bytes(manifest().model_copy(update={"protocol": PROTOCOL - 1}).signed(OWNER))
    before = files(older)
    assert find_run(run.parent) == run
    for path in (older, older / MANIFEST_FILE):
        with pytest.raises(UsageError, match=f"the run speaks protocol {PROTOCOL - 1}, this is p2p-diloco with"):
            load_run(path)
    assert files(older) == before


def test_what_a_folder_holds(tmp_path: Path) -> None:
    assert folder_bytes(tmp_path / "none") == 0
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(bytes(100))
    (tmp_path / "c").write_bytes(bytes(11))
    assert folder_bytes(tmp_path) == 111


def test_a_run_is_found_by_its_file_its_folder_or_its_peers_folder(run: Path) -> None:
    for path in (run / MANIFEST_FILE, run, run.parent):
        assert load_run(path) == manifest()
    assert load_run(run.parent, manifest().run_id) == manifest()
    with pytest.raises(UsageError, match="no run 00 here"):
        load_run(run.parent, "00")
    with pytest.raises(UsageError, match="no such file"):
        load_run(run / "other.json")
    (run / MANIFEST_FILE).write_bytes(manifest().signed(Identity.from_seed(bytes(31) + b"1")))
    with pytest.raises(UsageError, match="signature is not its owner's"):
        load_run(run)
