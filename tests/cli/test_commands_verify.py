"""verify: what it prints of a run that is sound, of one that is not, and of one that its owner has not anchored."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2p_diloco.cli import cli
from p2p_diloco.core import grid
from p2p_diloco.core.manifest import RunManifest
from tests.support.builders import OWNER
from tests.support.whole_runs import whole_run

STEPS = 20


@pytest.fixture(scope="module", autouse=True)
def small_parts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "PART_VALUES", 100)
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def made(small_parts: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunManifest]:
    folder = tmp_path_factory.mktemp("made") / "simulated"
    return folder, whole_run(folder, n=250, steps=STEPS, snapshot_every=5)


@pytest.fixture
def run(made: tuple[Path, RunManifest], tmp_path: Path) -> Path:
    """The folder of a run in a peer's folder; it may be spoilt."""
    return Path(shutil.copytree(made[0], tmp_path / "peer" / "simulated"))


def verify(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = cli.main(["verify", *words])
    said = capsys.readouterr()
    return code, said.out, said.err


def verified(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, object]]:
    code, out, _ = verify(str(folder), "--json", capsys=capsys)
    found: dict[str, object] = json.loads(out)
    return code, found


def spoil(run: Path, step: int) -> None:
    path = run / "ledger" / "updates" / f"{step:010d}.update"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")


def test_a_run_that_is_sound(run: Path, made: tuple[Path, RunManifest], capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    code, out, _ = verify(str(run.parent), capsys=capsys)
    assert code == 0
    assert [line.split(maxsplit=1)[0] for line in out.splitlines()] == [
        *("run", "manifest", "chain", "updates", "snapshots", "replayed", "anchors", "head", "sound")
    ]
    assert "outer steps 0 to 20, 20 certificates" in out
    assert "5, outer steps 15 to 19" in out
    assert out.endswith("sound        anchored up to outer step 10\n")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert not list(run.glob(".view-*"))
    code, found = verified(run, capsys)
    assert (code, str(found.pop("head")) in out) == (0, True)
    assert found == {
        "ok": True,
        "anchored": True,
        "run_id": made[1].run_id,
        "owner": OWNER.peer_id,
        "step": STEPS,
        "certificates": STEPS,
        "updates": 5,
        "snapshots": [15, 20],
        "replayed_from": 15,
        "replayed_to": 20,
        "anchors": 2,
        "anchored_step": 10,
        "wrong_step": None,
        "reason": "",
    }


def test_a_run_that_is_not(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(run, 17)
    code, out, _ = verify(str(run), capsys=capsys)
    assert code == 1
    last = out.splitlines()[-1]
    assert last.startswith(
        "wrong        outer step 17: 0000000017.update: part 2 does not have the hash that its header"
    )
    code, found = verified(run, capsys)
    assert (code, found["ok"], found["anchored"], found["wrong_step"]) == (1, False, True, 17)


def test_a_run_that_is_not_anchored(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "ledger" / "anchors").unlink()
    code, out, _ = verify(str(run), capsys=capsys)
    assert code == 1
    assert out.splitlines()[-1].startswith("not anchored no anchor of the run's owner is here, so certificates alone")
    code, found = verified(run, capsys)
    assert (code, found["ok"], found["anchored"], found["anchored_step"]) == (1, True, False, None)
    assert "while the run's seed is there" in str(found["reason"])


def test_a_manifest_that_somebody_has_changed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"steps":20', b'"steps":21'))
    for folder in (run, run.parent):
        code, _, err = verify(str(folder), capsys=capsys)
        assert code == 1
        assert "the manifest's signature is not its owner's; somebody changed it" in err


def test_a_program_hears_in_json_why_nothing_could_be_verified(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the same object as ever; people hear the same on stderr, and the exit code is the same as without."""
    _, sound = verified(run, capsys)
    path = run / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"steps":20', b'"steps":21'))
    for folder, code in ((run, 1), (tmp_path / "attic", 2)):
        plain = verify(str(folder), capsys=capsys)
        assert plain[:2] == (code, "")
        found = verify(str(folder), "--json", capsys=capsys)
        assert (found[0], found[2]) == (code, plain[2])
        told: dict[str, object] = json.loads(found[1])
        assert told.keys() == sound.keys()
        assert (told["ok"], told["anchored"], told["certificates"]) == (False, False, 0)
        assert f"error: {told['reason']}\n" == plain[2]


def test_what_is_no_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    shutil.rmtree(run / "ledger")
    for words, message in (
        ([str(tmp_path / "attic")], "attic: no such folder"),
        ([str(tmp_path / "empty")], "empty: no run here"),
        ([str(run)], f"error: {run}: its ledger holds nothing of the run yet"),
        ([str(run), "--run-id", "ab" * 20], "no run " + "ab" * 20),
        ([], "FOLDER"),
    ):
        code, _, err = verify(*words, capsys=capsys)
        assert (code, message in err, len(err.splitlines())) == (2, True, 1), err
