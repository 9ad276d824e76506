"""The paper's ablation in real swarms, and simulated beside them: the held-out loss with contributions dropped.

Each swarm is simulated twice. Once as its peers' event logs tell, which must come to its heads; and once from the run
file alone, where replicas with other names draw other batches and other drops.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TypeAlias

from benchmarks.loopback import write_run_file
from benchmarks.table import Table
from p2p_diloco.core.runfile import RunSpec
from p2p_diloco.lab.recount import Past, past_of
from p2p_diloco.lab.simulated_run import SimulatedRun

Curve: TypeAlias = Mapping[int, float]
"""Outer step -> held-out loss, nats per token."""

STUDIES = Path(__file__).parent.parent / "peers/experiments"
PEERS = 4
DROPS = (0.0, 0.3, 0.5)
SHOWN_EVERY = 4
"""Outer steps."""
TRIES = 3
"""On a busy machine a round may fail, or begin without somebody, and a simulation cannot do that again."""
LIMIT_S = 1800.0
NOT_AGAIN = "that cannot be done again"
"""What ``simulate --recount`` says then."""


def spec_of_run() -> RunSpec:
    """The studies' model and text. Few outer steps, so a plain mean, as in ``tiny.toml``."""
    spec = SimulatedRun.load(STUDIES / "base.toml").run
    outer = spec.outer.model_copy(update={"steps": 24, "lr": 1.0, "momentum": 0.0})
    meeting = spec.round.model_copy(update={"min_group": PEERS, "gather_s": 30.0})
    return spec.model_copy(update={"name": "dropped", "outer": outer, "round": meeting})


@dataclass(frozen=True, kw_only=True)
class Curves:
    drop: float
    swarm: Curve
    recounted: Curve
    simulated: Curve
    inner_steps: float
    """That a peer of the swarm made for an outer step, on average."""
    empty: int
    """Outer steps of the swarm to which nobody contributed."""


def main() -> Table:
    """RuntimeError when a command fails, or a simulation comes to other heads than the swarm that it recounts."""
    spec = spec_of_run()
    with tempfile.TemporaryDirectory(prefix="p2p-diloco-bench-") as name:
        run_file = write_run_file(spec, Path(name))
        found = [curves(run_file, Path(name), drop) for drop in DROPS]
    return Table(
        title=f"Held-out loss of {PEERS} peers, H = {spec.inner.steps}, with contributions dropped",
        columns=("outer step", *(f"{kind}, {100 * drop:.0f} %" for drop in DROPS for kind in ("swarm", "simulated"))),
        rows=rows_of(found, spec.outer.steps),
        notes=(
            "swarm: real processes; a simulation of what they did came to the same heads at every outer step, and to",
            f"the same held-out losses within {largest_difference(found):.6f}. simulated: from the run file alone.",
            f"Inner steps that a peer made for an outer step: {', '.join(f'{of.inner_steps:.1f}' for of in found)}.",
            f"Outer steps of the swarms to which nobody contributed: {', '.join(str(of.empty) for of in found)}.",
        ),
    )


def rows_of(found: Sequence[Curves], outer_steps: int) -> list[tuple[str, ...]]:
    steps = range(SHOWN_EVERY, outer_steps + 1, SHOWN_EVERY)
    return [
        (str(step), *(f"{curve[step]:.4f}" for of in found for curve in (of.swarm, of.simulated))) for step in steps
    ]


def largest_difference(found: Sequence[Curves]) -> float:
    """Between a swarm's held-out losses and those of its recounting."""
    return max(abs(of.swarm[step] - of.recounted[step]) for of in found for step in of.swarm.keys() & of.recounted)


def curves(run_file: Path, folder: Path, drop: float) -> Curves:
    for attempt in range(TRIES):
        there = folder / f"{drop}-{attempt}"
        command("swarm", run_file, there / "swarm", "--peers", PEERS, "--drop", drop)
        try:
            command("simulate", run_file, there / "recounted", "--recount", there / "swarm", "--threads", 1)
        except RuntimeError as error:
            if NOT_AGAIN in str(error):
                continue
            raise
        command("simulate", run_file, there / "simulated", "--replicas", PEERS, "--drop", drop, "--threads", 1)
        _, past = past_of(there / "swarm")
        return Curves(
            drop=drop,
            swarm=curve_of(there / "swarm"),
            recounted=curve_of(there / "recounted"),
            simulated=curve_of(there / "simulated"),
            inner_steps=inner_steps_of(past),
            empty=empty_steps(past),
        )
    raise RuntimeError(f"in each of {TRIES} swarms a round failed or lost somebody")


def command(name: str, run_file: Path, folder: Path, *options: object) -> None:
    """Run a command of p2p-diloco as a user does. RuntimeError with what it said."""
    line = [sys.executable, "-m", "p2p_diloco", name, run_file, "--folder", folder, *options]
    try:
        done = subprocess.run([str(word) for word in line], capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"p2p-diloco {name} has not ended after {LIMIT_S:.0f} s") from error
    if done.returncode:
        raise RuntimeError(f"p2p-diloco {name} ended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")


def curve_of(folder: Path) -> Curve:
    return dict(json.loads((folder / "summary.json").read_text())["held_out"])


def inner_steps_of(past: Past) -> float:
    return mean(sum(steps) for there in past.inner_steps.values() for steps in there.values())


def empty_steps(past: Past) -> int:
    return sum(past.dropped[step] == there.keys() for step, there in past.inner_steps.items())
