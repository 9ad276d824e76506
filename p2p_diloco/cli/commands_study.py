"""Commands that train without a network: simulate, experiment."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from p2p_diloco.cli.options import OUTPUT, AtLeastOne, Flag, Output, Probability
from p2p_diloco.core.errors import UsageError
from p2p_diloco.core.interruption import importing
from p2p_diloco.look.display import STDOUT

if TYPE_CHECKING:
    from collections.abc import Mapping

    from p2p_diloco.lab.recount import Past
    from p2p_diloco.lab.simulated_run import SimulatedRun
    from p2p_diloco.lab.simulation import Simulation
    from p2p_diloco.lab.study import Size


def simulate(
    run_file: Path,
    /,
    *,
    replicas: AtLeastOne | None = None,
    folder: Path | None = None,
    recount: Path | None = None,
    drop: Probability | None = None,
    device: str = "auto",
    threads: AtLeastOne | None = None,
    output: Output = OUTPUT,
) -> int:
    """Train K replicas in this process, without a network: what a swarm of K peers would do.

    Parameters
    ----------
    run_file
        RUN.toml, perhaps with a table [simulate] of what only simulations vary.
    replicas
        How many; 4 by default, or what [simulate] says.
    folder
        What it leaves: checkpoint, summary.json, the trained model; a new folder in runs/ by default. The same folder
        goes on where the last start was interrupted.
    recount
        The folder of a swarm of this run: do what its peers did, and compare the heads.
    drop
        Probability that a contribution is dropped.
    device
        auto, cpu, cuda, cuda:1 or mps.
    threads
        Of the CPU.
    """
    with importing("simulate"):
        from p2p_diloco.core.config import keep_cache_near
        from p2p_diloco.lab.checkpoint import alone_in
        from p2p_diloco.lab.simulate import open_simulation
        from p2p_diloco.lab.simulated_run import SimulatedRun

    what, past = SimulatedRun.load(run_file), None
    if recount is not None:
        past = past_to_recount(what, run_file, recount, given={"--replicas": replicas, "--drop": drop})
    what = what.with_flags(replicas=replicas, drop=drop)
    if folder is None:
        folder = Path("runs") / f"{what.run.name}-simulated-{time.strftime('%Y%m%d-%H%M%S')}"
    with alone_in(folder):
        keep_cache_near(folder)
        simulation = open_simulation(what, folder, base=run_file.parent, device=device, threads=threads, past=past)
        count, step = len(simulation.replicas), simulation.state.step
        STDOUT.print(f"{what.run.name}: {count} replicas in {folder}, outer step {step}", soft_wrap=True)
        show_curve(simulation, STDOUT)
    return 0 if recount is None else compare_heads(simulation, recount)


def past_to_recount(what: SimulatedRun, run_file: Path, recount: Path, given: Mapping[str, object]) -> Past:
    """Returns what the swarm in the folder ``recount`` did. UsageError where it cannot be done again, or something else
    is asked for. ``given``: flags and their values."""
    from p2p_diloco.lab.recount import past_of

    check_recount(what, run_file, given)
    manifest, past = past_of(recount)
    if manifest.spec != what.run:
        raise UsageError(f"--recount {recount}: a swarm of another run than {run_file}, or before that was changed")
    return past


def compare_heads(simulation: Simulation, recount: Path) -> int:
    """Says whether the simulation came to the heads of the swarm in ``recount``, and returns the exit code."""
    differing = simulation.differing_heads()
    if not differing:
        made = simulation.state.step
        STDOUT.print(f"heads           those of {recount} at all {made} outer steps", soft_wrap=True)
        return 0
    print(f"error: other heads than in {recount} from outer step {differing[0]} on", file=sys.stderr)
    return 1


def check_recount(what: SimulatedRun, run_file: Path, given: Mapping[str, object]) -> None:
    """Raises UsageError where something is asked for that a swarm's peers cannot have done, or that they decided."""
    flags = [flag for flag, value in given.items() if value is not None]
    if flags:
        raise UsageError(f"--recount does what the swarm's peers did: leave out {' and '.join(flags)}")
    changed = what.simulate.model_fields_set - {"evaluate_every"}
    if changed:
        keys = ", ".join(sorted(changed))
        raise UsageError(f"{run_file}: [simulate]: {keys}: not with --recount, for a swarm's peers have no such keys")


def experiment(
    *names: str,
    quick: Flag = False,
    large: Flag = False,
    jobs: AtLeastOne | None = None,
    folder: Path = Path("runs/experiments"),
    device: str = "auto",
    threads: AtLeastOne | None = 1,
    output: Output = OUTPUT,
) -> None:
    """Make the simulations of studies, several at a time; write a table, a plot and the raw figures of each.

    Parameters
    ----------
    names
        Studies in peers/experiments/, or paths of some.
    quick
        Their small variant: at most ten minutes on two cores.
    large
        Their large variant: for a GPU.
    jobs
        Simulations at the same time; as many as there are processors by default.
    folder
        Where everything is kept; what is there is not made again.
    device
        auto, cpu, cuda, cuda:1 or mps.
    threads
        Of the CPU, for each simulation.
    """
    if quick and large:
        raise UsageError("give either --quick or --large")

    with importing("experiment"):
        from p2p_diloco.core.config import keep_cache_near
        from p2p_diloco.lab.experiment import find_study, run_studies
        from p2p_diloco.lab.study import Study
        from p2p_diloco.ledger.disk import disk_errors

    if not names:
        raise UsageError("give the name of a study, like drop, or the path of one")
    size: Size = "quick" if quick else "large" if large else "full"
    studies = [Study.load(find_study(name), size) for name in names]
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    keep_cache_near(folder)
    run_studies(studies, folder, jobs=jobs or os.cpu_count() or 1, device=device, threads=threads, console=STDOUT)


def show_curve(simulation: Simulation, console: Console) -> None:
    """Makes the outer steps that are left, and shows them: a bar with the time that is left; without a terminal, a line
    for every point with an evaluation."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from p2p_diloco.lab.simulate import run

    columns = (TextColumn("outer step"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=simulation.what.run.outer.steps, completed=simulation.state.step)
        for point in run(simulation):
            progress.advance(task)
            if point.held_out_loss is not None or simulation.done:
                progress.console.print(point.line(), soft_wrap=True)
    head, digest = simulation.state.head.hex(), simulation.state.digest().hex()
    console.print(f"head            {head}\ndigest          {digest}", soft_wrap=True)
