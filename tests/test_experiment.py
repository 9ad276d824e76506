"""Studies from end to end, on simulations of a second."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from small_runs import small_run

from p2p_diloco.errors import DataError, LocalError, UsageError
from p2p_diloco.experiment import find_study, run_studies
from p2p_diloco.simulate import SUMMARY_FILE
from p2p_diloco.study import Study

pytest.importorskip("matplotlib")

BASE = """
name = "small"
[model.config]
model_type = "llama"
hidden_size = 16
intermediate_size = 32
num_hidden_layers = 1
num_attention_heads = 2
max_position_embeddings = 16
[data]
source = "path"
path = "text"
seq_len = 16
held_out = 0.2
eval_tokens = 512
[inner]
steps = 4
batch_size = 4
warmup_steps = 2
[outer]
steps = 3
[round]
min_group = 1
[simulate]
replicas = 2
"""
STUDY = """
title = "Drops"
paper = "none"
base = "base.toml"
seeds = [0, 1]
reference = "none"
[[arm]]
name = "none"
[[arm]]
name = "half"
set = { "simulate.drop" = 0.5 }
"""
OTHER = STUDY.replace("Drops", "Pruned").replace('"half"', '"pruned"').replace('"simulate.drop"', '"simulate.prune"')


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    small_run(tmp_path)
    (tmp_path / "base.toml").write_text(BASE)
    (tmp_path / "drops.toml").write_text(STUDY)
    (tmp_path / "pruned.toml").write_text(OTHER)
    return tmp_path


def run(folder: Path, *names: str, jobs: int = 2) -> str:
    console = Console(file=io.StringIO(), width=200)
    studies = [Study.load(folder / f"{name}.toml", "full") for name in names]
    run_studies(studies, folder / "out", jobs=jobs, device="cpu", threads=1, console=console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_studies_share_what_they_have_in_common_and_are_not_made_twice(folder: Path) -> None:
    said = run(folder, "drops")
    assert "### Drops" in said
    assert "| half |" in said
    out = folder / "out"
    figures = json.loads((out / "drops.json").read_text())
    assert [(trial["arm"], trial["seed"]) for trial in figures["trials"]] == [
        ("none", 0), ("half", 0), ("none", 1), ("half", 1),
    ]  # fmt: skip
    assert (out / "drops.md").read_text() in said
    assert (out / "drops.png").read_bytes().startswith(b"\x89PNG")
    written = {path: path.stat().st_mtime_ns for path in out.glob(f"trials/*/{SUMMARY_FILE}")}
    assert len(written) == 4

    run(folder, "drops", "pruned")
    after = {path: path.stat().st_mtime_ns for path in out.glob(f"trials/*/{SUMMARY_FILE}")}
    assert len(after) == 6, "the arms without drops and without pruning are the same"
    assert after.items() >= written.items()


def test_a_simulation_that_fails_ends_the_others_with_its_message(folder: Path) -> None:
    (folder / "base.toml").write_text(BASE.replace('path = "text"', 'path = "nowhere"'))
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        run(folder, "drops")


def test_a_summary_that_is_damaged_is_named(folder: Path) -> None:
    run(folder, "drops")
    path = next((folder / "out").glob(f"trials/*/{SUMMARY_FILE}"))
    path.write_text("{")
    with pytest.raises(DataError, match=r"summary\.json: cannot be read"):
        run(folder, "drops")


def test_names_are_looked_up_where_the_studies_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_study("some/where.toml") == Path("some/where.toml")
    monkeypatch.chdir(folder)
    with pytest.raises(UsageError, match="no study 'drop'; there is no folder peers/experiments here; give a path"):
        find_study("drop")
    monkeypatch.chdir(Path(__file__).parent.parent)
    assert find_study("drop") == Path("peers/experiments/drop.toml")
    with pytest.raises(UsageError, match="no study 'dorp'; known here: codecs, drop, "):
        find_study("dorp")


def test_a_process_that_is_killed_is_told(folder: Path) -> None:
    """From outside: the pool's processes are this one's children."""
    (folder / "base.toml").write_text(BASE.replace("[outer]\nsteps = 3", "[outer]\nsteps = 600"))
    study = Study.load(folder / "drops.toml", "full")
    killer = subprocess.Popen(
        [sys.executable, "-c", KILL_A_CHILD, str(os.getpid())], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    console = Console(file=io.StringIO())
    with pytest.raises(LocalError, match="a simulation was killed"):
        run_studies([study], folder / "out", jobs=1, device="cpu", threads=1, console=console)
    assert killer.communicate()[0] == b"killed\n"


KILL_A_CHILD = r"""
import os, signal, sys, time
from pathlib import Path
parent, limit_s = int(sys.argv[1]), time.monotonic() + 120
while time.monotonic() < limit_s:
    for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        try:
            working = b"--multiprocessing-fork" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if working:
            os.kill(int(pid), signal.SIGKILL)
            print("killed")
            sys.exit()
    time.sleep(0.05)
"""


def is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_interrupted_it_leaves_no_process_and_goes_on(folder: Path) -> None:
    """As a user does it: Ctrl+C reaches all processes of the group."""
    (folder / "base.toml").write_text(BASE.replace("[outer]\nsteps = 3", "[outer]\nsteps = 30000"))
    command = [sys.executable, "-m", "p2p_diloco", "experiment", str(folder / "drops.toml"), "--device", "cpu"]
    process = subprocess.Popen(
        [*command, "--folder", str(folder / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        limit_s = time.monotonic() + 150
        while len(list((folder / "out").glob("trials/*/identity.key"))) < 2:
            assert process.poll() is None
            assert time.monotonic() < limit_s
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        said, _ = process.communicate(timeout=60)
        assert (process.returncode, "Traceback" in said) == (130, False), said
        limit_s = time.monotonic() + 5
        while is_alive(process.pid) and time.monotonic() < limit_s:
            time.sleep(0.05)
        assert not is_alive(process.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
