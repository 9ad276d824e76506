"""``p2p-diloco experiment``: all simulations of some studies, several at a time, each in a process of its own.

    FOLDER/trials/KEY/          one simulation: checkpoint and summary; the same arm of several studies is one
    FOLDER/NAME[-SIZE].md, .png, .json

What is there is not made again, and what was interrupted goes on: the same command does what is left.
"""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import cast

import torch
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from p2p_diloco.core.errors import DataError, LocalError, UsageError, disk_failure
from p2p_diloco.core.interpreter import python_command
from p2p_diloco.core.paths import at_home
from p2p_diloco.lab.report import arm_results, check_plots, figures_json, markdown, plot
from p2p_diloco.lab.simulation_result import SUMMARY_FILE, TrialResult
from p2p_diloco.lab.study import Study, Trial
from p2p_diloco.learn.data import locked
from p2p_diloco.learn.model import pick_device
from p2p_diloco.ledger.disk import disk_errors, write_whole
from p2p_diloco.wire.guard import die_with_parent

STUDIES = Path("peers/experiments")
BASES = ("base", "large")
"""Run files beside them, which they vary."""
TRIALS = "trials"
POLL_S = 1.0
"""A signal that another thread takes, as after a stop, does not wake the one that waits."""


def find_study(name: str) -> Path:
    """Returns the file of a study that is given by path, or by name: one of the repository's. UsageError names
    those."""
    path = at_home(name, "study")
    if path.suffix == ".toml":
        return path
    known = sorted(file.stem for file in STUDIES.glob("*.toml") if file.stem not in BASES)
    if name not in known:
        there = f"known here: {', '.join(known)}" if known else f"there is no folder {STUDIES} here; give a path"
        raise UsageError(f"no study {name!r}; {there}")
    return STUDIES / f"{name}.toml"


@dataclass(frozen=True, kw_only=True)
class Work:
    """One simulation, as a process gets it."""

    trial: Trial
    base: Path
    folder: Path
    device: str
    threads: int | None

    @property
    def of_trial(self) -> Path:
        """Returns the folder of this simulation."""
        return self.folder / TRIALS / self.trial.key


def run_studies(
    studies: Sequence[Study], folder: Path, *, jobs: int, device: str, threads: int | None, console: Console
) -> None:
    """Makes all simulations of the studies that are not there yet, ``jobs`` at a time, and writes the results of each
    study. Raises LocalError; what was finished by then is kept."""
    check_plots()
    check_study_names(studies)
    with disk_errors(folder):
        (folder / TRIALS).mkdir(parents=True, exist_ok=True)
    works = {
        trial.key: Work(trial=trial, base=study.base, folder=folder, device=device, threads=threads)
        for study in studies
        for trial in study.trials
    }
    missing = [work for work in works.values() if not (work.of_trial / SUMMARY_FILE).exists()]
    made = works.keys() - {work.trial.key for work in missing}
    results = {key: read_result(works[key].of_trial) for key in made}
    if missing:
        kind = pick_device(device).type
        for result in results.values():
            check_made_alike(result, folder, kind)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    ) as progress:
        task = progress.add_task("simulations", total=len(works))
        progress.advance(task, len(works) - len(missing))
        for work, loss in simulate_all(missing, jobs):
            progress.console.print(f"{work.trial.name}: {loss:.4f}", highlight=False, markup=False)
            progress.advance(task)
    results |= {work.trial.key: read_result(work.of_trial) for work in missing}
    for study in studies:
        write_results(study, results, folder, console)


def write_results(study: Study, results: Mapping[str, TrialResult], folder: Path, console: Console) -> None:
    """Writes table, plot and raw figures, one process at a time, and prints the table; what is not there yet is left
    out."""
    stem = study.name if study.size == "full" else f"{study.name}-{study.size}"
    table, picture = folder / f"{stem}.md", folder / f"{stem}.png"
    text = markdown(study, arm_results(study, results))
    drawn = io.BytesIO()
    plot(study, results, drawn)
    written = (
        (table, text.encode()),
        (folder / f"{stem}.json", figures_json(study, results).encode()),
        (picture, drawn.getvalue()),
    )
    lock = folder / TRIALS / "results.lock"
    with disk_errors(lock):
        lock.touch()
    with locked(lock):
        for path, data in written:
            write_whole(path, [data], len(data))
    console.print(Markdown(text) if console.is_terminal else text, markup=False, soft_wrap=True)
    console.print(f"{table}\n{picture}\n", soft_wrap=True)


def check_study_names(studies: Sequence[Study]) -> None:
    """Raises UsageError where the results of one study would replace another's."""
    names = [study.name for study in studies]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two studies are named {name}: simulate one after the other, each with its own --folder")


def check_made_alike(result: TrialResult, folder: Path, kind: str) -> None:
    """Raises UsageError when what is there was made with another torch, whose sources are the built-in text, too, or on
    another kind of device, which computes in other numbers: nothing is made to stand beside it."""
    for made, here in (
        (f"with torch {result.torch}", f"with torch {torch.__version__}"),
        (f"on {result.device.partition(':')[0]}", f"on {kind}"),
    ):
        if made != here:
            raise UsageError(
                f"{folder}: has simulations made {made}, and these would be {here}; choose another --folder"
            )


def read_result(folder: Path) -> TrialResult:
    """Returns what a simulation left in ``folder``. DataError when it cannot be read."""
    path = folder / SUMMARY_FILE
    try:
        return TrialResult.parse(json.loads(path.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: cannot be read ({type(error).__name__}); delete its folder to make it anew"
        ) from error


# -- processes ---------------------------------------------------------------------------------------------------------


def simulate_all(works: Sequence[Work], jobs: int) -> Iterator[tuple[Work, float]]:
    """Yields each work with its final loss, as they end. Raises the LocalError of the first one that fails, which ends
    the others."""
    waiting, busy = list(works), dict[Connection, tuple[Worker, Work]]()
    workers = [Worker() for _ in range(min(jobs, len(works)))]
    try:
        for worker in workers:
            work = waiting.pop(0)
            worker.give(work)
            busy[worker.pipe] = worker, work
        while busy:
            for pipe in wait(list(busy), timeout=POLL_S):
                worker, work = busy.pop(cast("Connection", pipe))
                yield work, worker.answer()
                if waiting:
                    work = waiting.pop(0)
                    worker.give(work)
                    busy[worker.pipe] = worker, work
    finally:
        for worker in workers:
            worker.kill()


class Worker:
    """A process that makes one simulation after the other. It can be killed at any time: what it was at goes on from
    its checkpoint."""

    def __init__(self) -> None:
        self.pipe, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                python_command("-m", "p2p_diloco.lab.experiment", str(theirs.fileno())),
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                preexec_fn=leave_signals_to_parent,
            )

    def give(self, work: Work) -> None:
        """Hands over the next work. That the process has died meanwhile is told by ``answer``."""
        with suppress(ConnectionError):
            self.pipe.send(work)

    def answer(self) -> float:
        """Returns the final loss of the work that it was given last. Raises the LocalError that ended it."""
        try:
            answer = self.pipe.recv()
        except (EOFError, ConnectionError) as error:
            code = self._process.wait()
            raise LocalError(
                f"a simulation was killed (memory?); the same command goes on: exit code {code}"
            ) from error
        if isinstance(answer, LocalError):
            raise answer
        return float(answer)

    def kill(self) -> None:
        """Ends the process at once."""
        self._process.kill()
        self._process.wait()
        self.pipe.close()


def leave_signals_to_parent() -> None:
    """Ignores Ctrl+C and the end of the terminal, which reach all processes: the parent ends this one."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_parent(signal.SIGKILL)


def work_for(pipe: Connection) -> None:
    """Makes one simulation after the other for the parent at the other end of ``pipe``, until that is closed."""
    while True:
        try:
            work = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(simulate_one(work))
        except LocalError as error:
            pipe.send(error)
        except OSError as error:
            full = disk_failure(error)
            if full is None:
                raise
            pipe.send(full)


def simulate_one(work: Work) -> float:
    """Makes a simulation, unless another process has; returns the final held-out loss, infinite where theta is not
    finite."""
    lock = work.of_trial.with_suffix(".lock")
    try:
        with disk_errors(lock):
            lock.touch()
        with locked(lock):
            if not (work.of_trial / SUMMARY_FILE).exists():
                simulate_to_end(work)
    except LocalError as error:
        raise type(error)(f"{work.trial.name}: {error}") from error
    return read_result(work.of_trial).loss


def simulate_to_end(work: Work) -> None:
    """Makes a simulation in this process, from where an interrupted one was. Raises LocalError."""
    from p2p_diloco.lab.simulate import open_simulation, run

    simulation = open_simulation(
        work.trial.what,
        work.of_trial,
        base=work.base,
        device=work.device,
        threads=work.threads,
        warm_folder=work.folder,
    )
    for _ in run(simulation):
        pass


if __name__ == "__main__":
    work_for(Connection(int(sys.argv[1])))
