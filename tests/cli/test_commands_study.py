"""``simulate`` and ``experiment`` through the command line: what they refuse, and what they say at the end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest

from p2p_diloco.cli.cli import main
from p2p_diloco.lab import recount
from p2p_diloco.lab.recount import Past
from p2p_diloco.lab.simulated_run import SimulatedRun
from p2p_diloco.ledger.folder import find_run, load_state
from tests.support.small_runs import small_run, table_of
from tests.test_degenerate import as_toml

ON_CPU = ("--device", "cpu", "--threads", "1")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    small_run(tmp_path)
    return tmp_path


def run_file(folder: Path, changes: dict[str, Any] | None = None) -> Path:
    path = folder / "run.toml"
    path.write_text(as_toml(table_of(changes)))
    return path


def recounts(monkeypatch: pytest.MonkeyPatch, path: Path, past: Past) -> None:
    """Every folder is that of a swarm of this run file, whose peers did this."""
    run = SimpleNamespace(spec=SimulatedRun.load(path).run)
    monkeypatch.setattr(recount, "past_of", lambda _: (run, past))


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        ({}, ("--drop", "0.5"), "--recount does what the swarm's peers did: leave out --drop"),
        ({}, ("--drop", "0.5", "--replicas", "2"), "leave out --replicas and --drop"),
        (
            {"simulate.prune": 0.5, "simulate.evaluate_every": 2},
            (),
            "run.toml: [simulate]: prune: not with --recount, for a swarm's peers have no such keys",
        ),
        ({"inner.steps": 5}, (), "SWARM: a swarm of another run than"),
    ],
)
def test_what_no_swarm_can_have_done_is_not_recounted(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    flags: tuple[str, ...],
    message: str,
) -> None:
    past = Past(names=("a",), inner_steps={0: {"a": (4,)}}, dropped={0: frozenset()}, heads={})
    recounts(monkeypatch, run_file(folder), past)
    arguments = ["simulate", str(run_file(folder, changes)), "--recount", "SWARM", "--folder", str(folder / "out")]
    assert main([*arguments, *flags, *ON_CPU]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert len(said.err.splitlines()) == 1
    assert not (folder / "out").exists()


def test_other_heads_than_the_swarms_are_a_failure(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_file(folder)
    steps = {step: {"a": (4,), "b": (3,)} for step in range(2)}
    past = Past(names=("a", "b"), inner_steps=steps, dropped=dict.fromkeys(steps, frozenset()), heads={1: "00" * 32})
    recounts(monkeypatch, path, past)
    arguments = ["simulate", str(path), "--recount", "SWARM", *ON_CPU, "--folder"]
    assert main([*arguments, str(folder / "out")]) == 1
    said = capsys.readouterr()
    assert said.err.endswith("error: other heads than in SWARM from outer step 1 on\n")
    heads = [line.split()[1] for line in said.out.splitlines() if line.startswith("head ")]
    recounts(monkeypatch, path, replace(past, heads={2: heads[0]}))
    assert main([*arguments, str(folder / "again")]) == 0
    assert "those of SWARM at all 2 outer steps" in capsys.readouterr().out


def test_a_data_set_of_the_hubs_kind_is_simulated_end_to_end(folder: Path) -> None:
    """Everybody reads documents of its own; or one reader's are divided."""
    texts = [f"document {i:04d} says {'abc' * (i % 5)} and ends" for i in range(300)]
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(folder / "set")
    digests = set()
    for shards in ("iid", "non-iid"):
        changes = {"data.source": "hub", "data.path": "set", "data.max_documents": 150, "simulate.shards": shards}
        out = folder / shards
        arguments = ["simulate", str(run_file(folder, changes)), "--replicas", "2", "--folder", str(out)]
        assert main([*arguments, *ON_CPU]) == 0
        digests.add(load_state(find_run(out))[1].digest())
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["drop", "--quick", "--large"], "give either --quick or --large"),
        ([], "give the name of a study, like drop, or the path of one"),
        (["dropp"], "no study 'dropp'"),
    ],
)
def test_which_studies_is_said_clearly(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["experiment", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert message in said.err
    assert len(said.err.splitlines()) == 1


@pytest.mark.parametrize("command", ["swarm", "seed", "manifest"])
def test_a_run_has_no_table_of_simulations(folder: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    path = run_file(folder, {"simulate.replicas": 2})
    assert main([command, str(path), *(["--peers", "2"] if command == "swarm" else [])]) == 2
    assert "[simulate] is for simulations alone; take it out" in capsys.readouterr().err
