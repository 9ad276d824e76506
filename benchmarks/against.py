"""The same cases in an old commit and in this tree, by turns: what the changes between the two cost.

    python -m benchmarks --against COMMIT CASE ...

The old commit gets a worktree of its own in a temporary folder. Each side runs its own ``benchmarks`` with its own
``p2p_diloco``, in processes of its own, with this interpreter. Seven pairs of runs, every other one of which begins
with the new side, so that a machine that becomes slower meanwhile meets both.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

from benchmarks.processes import started_below
from benchmarks.table import Cell, Table
from p2p_diloco.core.errors import UsageError

TREE = Path(__file__).resolve().parents[1]
PAIRS = 7
MAX_TIME_RATIO = 1.05
MAX_CPU_RATIO = 1.03
LIMIT_S = 900.0
"""For one run, in place of the case's own limit: beside other work peers may take minutes to start."""
TIMED = {
    "sleepers": "next(row for row in sleepers.main().rows if row[0] == 'all but the first')[2]",
    "averager": "sum(averager.butterfly_seconds().values())",
    "compute": "sum(row[1] for row in compute.main().rows)",
    "stall": "next(row for row in stall.main().rows if row[0] == 'all but the first')[2]",
}
"""Case -> its seconds, as an expression over the module of that name. Each side computes it with its own module, so it
may use only what both have. Of the averager, our butterfly alone: hivemind's is the same on both sides."""
PROGRAM = """\
import sys
from pathlib import Path
import benchmarks, p2p_diloco
tree, figure = map(Path, sys.argv[1:])
for package in (benchmarks, p2p_diloco):
    if tree not in Path(package.__file__).resolve().parents:
        sys.exit(f"{{package.__name__}} was imported from {{package.__file__}}")
from benchmarks import {case}
{case}.LIMIT_S = {limit_s}
figure.write_text(repr(float({timed})))
"""
"""What one run is. Another p2p_diloco may be installed, and must not be the one that is measured."""

Side = Literal["old", "new"]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one run of a case."""

    seconds: float
    """What the case times."""
    cpu_s: float
    """Of all its processes, from their start to their end."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Pair i is ``old[i]`` and ``new[i]``."""

    case: str
    load: float
    """Load average before it."""
    old: tuple[Cost, ...]
    new: tuple[Cost, ...]

    def series(self, what: str) -> tuple[list[float], list[float]]:
        """Returns the seconds or the cpu_s of the old runs and of the new ones, pair by pair."""
        return [getattr(cost, what) for cost in self.old], [getattr(cost, what) for cost in self.new]

    def ratio(self, what: str) -> float:
        """Returns the new side's median over the old side's."""
        old, new = self.series(what)
        return median(new) / median(old)

    @property
    def within_bounds(self) -> bool:
        """Whether one of the two ratios is: time is noisy where other work runs, and CPU seconds hide waiting."""
        return self.ratio("seconds") <= MAX_TIME_RATIO or self.ratio("cpu_s") <= MAX_CPU_RATIO


def main(commit: str, cases: Sequence[str]) -> tuple[Table, list[Comparison]]:
    """``commit`` by its full name. RuntimeError where a run fails."""
    with tempfile.TemporaryDirectory(prefix="against-", ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve()
        with worktree(commit, folder / "old") as old:
            compared = [compare(case, {"old": old, "new": TREE}, folder) for case in cases]
    return table(commit, compared), compared


def check_cases(cases: Sequence[str]) -> None:
    """UsageError where one of them cannot be compared, or none is named."""
    if not cases or set(cases) - set(TIMED):
        wrong = ", ".join(sorted(set(cases) - set(TIMED))) or "none was named"
        raise UsageError(f"not a case that can be compared: {wrong}; there are: {', '.join(TIMED)}")


def table(commit: str, compared: Sequence[Comparison]) -> Table:
    return Table(
        title=f"This tree against {commit[:12]}: medians of {PAIRS} pairs",
        columns=("case", "what", "old", "new", "ratio", "at most", "lowest pair", "highest pair"),
        rows=[row for comparison in compared for row in rows_of(comparison)],
        notes=(
            "ratio: new over old, of the medians. A case is within the bounds when one of its two ratios is.",
            *(
                f"{comparison.case} is {'within the bounds' if comparison.within_bounds else 'ABOVE BOTH BOUNDS'}; "
                f"load average before it {comparison.load:.1f}"
                for comparison in compared
            ),
        ),
    )


def rows_of(comparison: Comparison) -> Iterator[tuple[Cell, ...]]:
    for what, label, bound in (("seconds", "seconds", MAX_TIME_RATIO), ("cpu_s", "CPU s", MAX_CPU_RATIO)):
        old, new = comparison.series(what)
        pairs = [after / before for before, after in zip(old, new)]
        ratio = comparison.ratio(what)
        yield (comparison.case, label, median(old), median(new), ratio, bound, min(pairs), max(pairs))


# -- runs --------------------------------------------------------------------------------------------------------------


def compare(case: str, trees: dict[Side, Path], folder: Path) -> Comparison:
    load, costs = os.getloadavg()[0], dict[Side, list[Cost]](old=[], new=[])
    for number, side in enumerate(order(PAIRS)):
        cost = run(side, case, trees[side], folder)
        costs[side].append(cost)
        print(f"{case}, pair {number // 2 + 1}, {side}: {cost.seconds:.3f} s, {cost.cpu_s:.1f} CPU s", flush=True)
    return Comparison(case=case, load=load, old=tuple(costs["old"]), new=tuple(costs["new"]))


def order(pairs: int) -> list[Side]:
    """Returns who runs, one after the other: old, new, new, old, old, new, ..."""
    sides: list[Side] = []
    for pair in range(pairs):
        sides += ("new", "old") if pair % 2 else ("old", "new")
    return sides


def run(side: Side, case: str, tree: Path, folder: Path) -> Cost:
    """RuntimeError when it fails. Whatever happens, none of its processes outlives it."""
    figure, temporary, errors = folder / "figure", folder / "tmp", folder / "errors"
    figure.unlink(missing_ok=True)
    temporary.mkdir(exist_ok=True)
    program = PROGRAM.format(case=case, timed=TIMED[case], limit_s=LIMIT_S)
    before_s = children_cpu_s()
    with errors.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(tree), str(figure)],
            cwd=tree,
            env=os.environ | {"PYTHONPATH": str(tree), "TMPDIR": str(temporary)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        code = process.wait()
    finally:
        end_below(temporary)
        process.wait()
    if code != 0:
        said = errors.read_text(errors="replace").strip().rpartition("\n")[2]
        raise RuntimeError(f"{case} in the {side} tree: {said or f'exit code {code}'}")
    return Cost(seconds=float(figure.read_text()), cpu_s=children_cpu_s() - before_s)


def children_cpu_s() -> float:
    """Of those that have ended, and of their own that they have waited for: Python's benchmarks wait for all."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def end_below(temporary: Path) -> None:
    """Kill what runs with this temporary folder until nothing does: a process may start another meanwhile."""
    while pids := started_below(temporary):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


# -- git ---------------------------------------------------------------------------------------------------------------


def resolve(commit: str) -> str:
    """Returns its full name. UsageError where there is none."""
    found = git("rev-parse", "--quiet", "--verify", "--end-of-options", f"{commit}^{{commit}}")
    if found.returncode != 0:
        said = found.stderr.strip().rpartition("\n")[2]
        raise UsageError(f"no such commit in {TREE}: {commit}" + (f" ({said})" if said else ""))
    return found.stdout.strip()


@contextmanager
def worktree(commit: str, path: Path) -> Iterator[Path]:
    """The commit's files below ``path``; git forgets them at the end, however that comes."""
    try:
        made = git("worktree", "add", "--quiet", "--detach", str(path), commit)
        if made.returncode != 0:
            raise RuntimeError(f"git made no worktree: {made.stderr.strip()}")
        yield path
    finally:
        git("worktree", "remove", "--force", str(path))
        git("worktree", "prune")


def git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(TREE), *arguments], capture_output=True, text=True)
