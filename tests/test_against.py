"""An old commit against this tree: who runs when, what is made of the figures, and what is left behind."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from benchmarks import against, compute, sleepers, tiny
from benchmarks.__main__ import ALL, compare
from benchmarks.against import TIMED, Comparison, Cost, Side, order
from benchmarks.loopback import Run
from benchmarks.processes import started_below
from p2p_diloco.core.errors import UsageError
from p2p_diloco.core.event import TrainerStalled
from tests.support.events import COMMITTED

ROOT = Path(__file__).parents[1]


def comparison(old: list[tuple[float, float]], new: list[tuple[float, float]]) -> Comparison:
    """Of (seconds, CPU seconds)."""
    before, after = (tuple(Cost(seconds=s, cpu_s=cpu_s) for s, cpu_s in costs) for costs in (old, new))
    return Comparison(case="averager", load=0.5, old=before, new=after)


def test_every_other_pair_begins_with_the_new_side() -> None:
    assert order(3) == ["old", "new", "new", "old", "old", "new"]
    assert len(order(against.PAIRS)) == 14


def test_ratios_are_of_medians_and_not_medians_of_ratios() -> None:
    compared = comparison([(1.0, 10.0), (2.0, 10.0), (4.0, 10.0)], [(4.0, 5.0), (1.0, 6.0), (3.0, 70.0)])
    assert compared.ratio("seconds") == 1.5  # the median of the pairs' ratios is 0.75
    assert compared.ratio("cpu_s") == 0.6
    assert list(against.rows_of(compared)) == [
        ("averager", "seconds", 2.0, 3.0, 1.5, 1.05, 0.5, 4.0),
        ("averager", "CPU s", 10.0, 6.0, 0.6, 1.03, 0.5, 7.0),
    ]


@pytest.mark.parametrize(
    ("seconds", "cpu_s", "within"),
    [(105.0, 200.0, True), (200.0, 103.0, True), (105.5, 103.5, False), (90.0, 90.0, True)],
)
def test_one_ratio_within_its_bound_is_enough(
    seconds: float, cpu_s: float, within: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    costs: dict[Side, Cost] = {
        "old": Cost(seconds=100.0, cpu_s=100.0),
        "new": Cost(seconds=seconds, cpu_s=cpu_s),
    }
    monkeypatch.setattr(against, "run", lambda side, *_: costs[side])
    assert comparison([(100.0, 100.0)], [(seconds, cpu_s)]).within_bounds is within
    assert compare("HEAD", ["averager"], None, lambda table: "\n".join(table.notes)) == (0 if within else 1)
    assert ("averager is within the bounds" in capsys.readouterr().out) is within


def test_what_is_timed_is_what_the_cases_return(monkeypatch: pytest.MonkeyPatch) -> None:
    stalls = [TrainerStalled(step=step, seconds=s) for step, s in ((1, 9.0), (2, 0.5), (3, 0.7), (4, 0.6))]
    swarm = Run(spec=sleepers.SPEC, values=1, logs=[[COMMITTED, *stalls]])
    monkeypatch.setattr(sleepers, "swarm_run", lambda: swarm)
    monkeypatch.setattr(tiny, "swarm_run", lambda: swarm)
    monkeypatch.setattr(compute, "VALUES", 1000)
    assert set(TIMED) <= set(ALL)
    modules = {case: sys.modules[f"benchmarks.{case}"] for case in TIMED}
    assert eval(TIMED["sleepers"], {"sleepers": modules["sleepers"]}) == 0.6
    assert eval(TIMED["stall"], {"stall": modules["stall"]}) == 0.6
    assert 0.0 < eval(TIMED["compute"], {"compute": modules["compute"]}) < 60.0
    monkeypatch.setattr(modules["averager"], "butterfly_seconds", lambda: {(1, "fp32"): 0.5, (2, "int8"): 0.25})
    assert eval(TIMED["averager"], {"averager": modules["averager"]}) == 0.75


# -- a repository whose benchmark says a number ------------------------------------------------------------------------


def git(repository: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=test", "-c", "user.email=test@localhost")
    return subprocess.run(
        ["git", "-C", str(repository), *identity, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def commit(repository: Path, averager: str) -> str:
    (repository / "benchmarks" / "averager.py").write_text(averager)
    git(repository, "add", "--all")
    git(repository, "commit", "--quiet", "--message", "as it was")
    return git(repository, "rev-parse", "HEAD")


def averager_of(seconds: float, log: Path) -> str:
    return (
        "def butterfly_seconds():\n"
        f"    with open({str(log)!r}, 'a') as log:\n"
        "        print(__file__, file=log)\n"
        f"    return {{'all': {seconds}}}\n"
    )


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """It is what is compared. Temporary folders are made beside it."""
    repository, temporary = tmp_path / "repository", tmp_path / "temporary"
    temporary.mkdir()
    for package in ("benchmarks", "p2p_diloco"):
        (repository / package).mkdir(parents=True)
        (repository / package / "__init__.py").touch()
    git(repository, "init", "--quiet")
    monkeypatch.setattr(against, "TREE", repository)
    monkeypatch.setattr(against, "PAIRS", 2)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    return repository


def assert_nothing_left(repository: Path) -> None:
    assert len(git(repository, "worktree", "list").splitlines()) == 1
    assert not list(repository.glob(".git/worktrees/*"))
    assert not list((repository.parent / "temporary").iterdir())


def test_each_side_runs_its_own_tree_by_turns(repository: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    old = commit(repository, averager_of(2.0, log))
    (repository / "benchmarks" / "averager.py").write_text(averager_of(3.0, log))  # what is not committed counts
    table, (compared,) = against.main(old, ["averager"])
    assert compared.ratio("seconds") == 1.5
    assert all(cost.cpu_s > 0.0 for cost in (*compared.old, *compared.new))
    here = str(repository / "benchmarks" / "averager.py")
    assert [path == here for path in log.read_text().splitlines()] == [False, True, True, False]
    assert old[:12] in table.title
    assert_nothing_left(repository)


def test_what_the_old_tree_lacks_is_said(repository: Path, tmp_path: Path) -> None:
    old = commit(repository, "butterflies_per_second = 1\n")
    with pytest.raises(RuntimeError, match=r"averager in the old tree: AttributeError: .*'butterfly_seconds'"):
        against.main(old, ["averager"])
    assert_nothing_left(repository)


def test_an_installed_package_is_not_measured_in_place_of_the_trees(repository: Path, tmp_path: Path) -> None:
    (repository / "p2p_diloco" / "__init__.py").unlink()
    old = commit(repository, averager_of(2.0, tmp_path / "log"))
    with pytest.raises(RuntimeError, match=r"averager in the old tree: p2p_diloco was imported from .*p2p_diloco"):
        against.main(old, ["averager"])


def test_a_commit_and_a_case_that_are_none(repository: Path, tmp_path: Path) -> None:
    commit(repository, averager_of(2.0, tmp_path / "log"))
    with pytest.raises(UsageError, match=r"no such commit in .*: HEAD~1"):
        against.resolve("HEAD~1")
    with pytest.raises(UsageError, match=r"no such commit in .*: --all"):
        against.resolve("--all")
    with pytest.raises(UsageError, match="can be compared: churn; there are: sleepers, averager"):
        against.check_cases(["averager", "churn"])
    with pytest.raises(UsageError, match="none was named"):
        against.check_cases([])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_it_leaves_nothing(repository: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Not the process that it has started, nor the one that this has started, nor the worktree."""
    running = tmp_path / "running"
    os.mkfifo(running)
    reader = os.open(running, os.O_RDONLY | os.O_NONBLOCK)  # can be read once the benchmark has closed its end
    old = commit(
        repository,
        "import subprocess, sys, time\n"
        "def butterfly_seconds():\n"
        "    subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
        f"    open({str(running)!r}, 'w').close()\n"
        "    time.sleep(600)\n",
    )
    temporary = tmp_path / "temporary"
    command = (
        # Who starts these tests in the background of a shell has told all their children to ignore Ctrl+C.
        "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from pathlib import Path; from benchmarks import against; "
        f"against.TREE = Path({str(repository)!r}); sys.argv[1:] = ['--against', {old!r}, 'averager']; "
        "runpy.run_module('benchmarks', run_name='__main__')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", command], cwd=ROOT, env=os.environ | {"TMPDIR": str(temporary)}, stderr=subprocess.PIPE
    )
    try:
        assert select.select([reader], [], [], 120.0)[0], "it does not run"
        (worktree,) = temporary.glob("against-*/old")
        assert (worktree / "benchmarks" / "averager.py").exists()
        process.send_signal(number)
        process.communicate(timeout=60)
    finally:
        process.kill()
        os.close(reader)
    assert process.returncode != 0
    assert_nothing_left(repository)
    assert not started_below(worktree.parent / "tmp")


def test_the_command_refuses_in_one_line() -> None:
    command = [sys.executable, "-m", "benchmarks", "--against", "no-such-commit", "averager"]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == f"error: no such commit in {ROOT}: no-such-commit\n"
