"""Studies from end to end, on simulations of a second."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from p2p_diloco.core.errors import LocalError, UsageError
from p2p_diloco.lab.child import children_of, read_proc
from p2p_diloco.lab.experiment import Work, Worker, check_made_alike, check_study_names, find_study
from p2p_diloco.lab.simulation_result import SUMMARY_FILE, Point, TrialResult
from p2p_diloco.lab.study import Study
from tests.support.small_runs import small_run

pytest.importorskip("matplotlib")

MODULE = b"p2p_diloco.lab.experiment"
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


def start(folder: Path, *names: str, jobs: int = 2) -> subprocess.Popen[str]:
    """As a user does it: a pool of processes leaves traces in the process that had it, which is not to be this one."""
    files = [str(folder / f"{name}.toml") for name in names]
    flags = ["--folder", str(folder / "out"), "--jobs", str(jobs), "--device", "cpu"]
    return subprocess.Popen(
        [sys.executable, "-m", "p2p_diloco", "experiment", *files, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(folder: Path, *names: str, code: int = 0) -> str:
    process = start(folder, *names)
    said, _ = process.communicate(timeout=150)
    assert (process.returncode, "Traceback" in said) == (code, False), said
    return said


def long_run(folder: Path) -> None:
    """It does not end before it is ended."""
    (folder / "base.toml").write_text(BASE.replace("[outer]\nsteps = 3", "[outer]\nsteps = 30000"))


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

    damaged = next(iter(written))
    damaged.write_text("{")
    assert f"{SUMMARY_FILE}: cannot be read" in run(folder, "drops", code=1)


def test_a_simulation_that_fails_ends_the_others_with_its_name_and_message(folder: Path) -> None:
    (folder / "base.toml").write_text(BASE.replace('path = "text"', 'path = "nowhere"'))
    said = run(folder, "drops", code=1)
    assert "nowhere: no such file or folder" in said
    assert "error: none, seed 0: " in said or "error: half, seed 0: " in said


def test_names_with_dots_and_brackets(folder: Path) -> None:
    """Each study has results of its own; no text is taken for markup."""
    for name in ("a.v1", "a.v2"):
        (folder / f"{name}.toml").write_text(STUDY.replace('"half"', '"[/b] half"').replace("[0, 1]", "[0]"))
    assert "[/b] half, seed 0: " in run(folder, "a.v1", "a.v2")
    assert {path.name for path in (folder / "out").glob("a.*")} == {
        f"a.{version}.{kind}" for version in ("v1", "v2") for kind in ("md", "png", "json")
    }
    with pytest.raises(UsageError, match="two studies are named drops"):
        check_study_names([Study.load(folder / "drops.toml", "full")] * 2)


def test_simulations_of_another_torch_or_device_are_not_mixed_with(folder: Path) -> None:
    last = Point(step=1, head="ab", held_out_loss=None, loss=None, tokens=1, sent_bytes=1)
    here = TrialResult(last=last, held_out=(), digest="ab", torch=torch.__version__, device="cuda:1", wall_s=1.0)
    check_made_alike(here, folder, "cuda")
    with pytest.raises(UsageError, match=r"made with torch 2\.11\.0, and these would be with .*; choose another"):
        check_made_alike(replace(here, torch="2.11.0"), folder, "cuda")
    with pytest.raises(UsageError, match="has simulations made on cuda, and these would be on cpu; choose another"):
        check_made_alike(here, folder, "cpu")


def test_two_at_a_time_share_the_work(folder: Path) -> None:
    (folder / "drops.toml").write_text(STUDY.replace("[0, 1]", "[0]"))
    both = [start(folder, "drops", jobs=1) for _ in range(2)]
    said = [process.communicate(timeout=150)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert len({text[text.index("| arm") :] for text in said}) == 1


def test_names_are_looked_up_where_the_studies_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_study("some/where.toml") == Path("some/where.toml")
    monkeypatch.chdir(folder)
    with pytest.raises(UsageError, match="no study 'drop'; there is no folder peers/experiments here; give a path"):
        find_study("drop")
    monkeypatch.chdir(Path(__file__).parents[2])
    assert find_study("drop") == Path("peers/experiments/drop.toml")
    with pytest.raises(UsageError, match="no study 'dorp'; known here: codecs, drop, "):
        find_study("dorp")


def test_a_process_that_dies_between_two_works_is_told(folder: Path) -> None:
    worker = Worker()
    try:
        worker._process.kill()
        worker._process.wait()
        trial = Study.load(folder / "drops.toml", "full").trials[0]
        worker.give(Work(trial=trial, base=folder, folder=folder / "out", device="cpu", threads=None))
        with pytest.raises(LocalError, match="a simulation was killed"):
            worker.answer()
    finally:
        worker.kill()


def test_a_process_that_is_killed_is_told(folder: Path) -> None:
    long_run(folder)
    process = start(folder, "drops", jobs=1)
    try:
        limit_s, workers = time.monotonic() + 150, list[int]()
        while not workers:
            assert time.monotonic() < limit_s
            time.sleep(0.1)
            children = children_of(process.pid)
            workers = [pid for pid in children if MODULE in read_proc(pid, "cmdline").split(b"\0")]
        os.kill(workers[0], signal.SIGKILL)
        said, _ = process.communicate(timeout=60)
        assert (process.returncode, "Traceback" in said) == (1, False), said
        assert "error: a simulation was killed (memory?); the same command goes on" in said
    finally:
        end(process.pid)


def is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def end(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def test_interrupted_it_leaves_no_process(folder: Path) -> None:
    """Ctrl+C reaches all processes of the group."""
    long_run(folder)
    process = start(folder, "drops")
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
        end(process.pid)
