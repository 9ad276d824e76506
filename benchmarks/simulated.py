"""What it costs to simulate four replicas in one process, beside four simulations of one: the same inner steps."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks.table import Table
from p2p_diloco.lab.simulate import open_simulation
from p2p_diloco.lab.simulated_run import SimulatedRun
from p2p_diloco.lab.simulation import Simulation

RUN_FILE = Path(__file__).parent.parent / "peers/runs/tiny.toml"
REPLICAS = 4
INNER_STEPS = 10
REPEATS = 5
"""Outer steps, of the four and of the ones in turn: whatever else the machine does meets both."""
LIMIT = 1.05


def main() -> Table:
    """RuntimeError when four cost more than LIMIT times what four times one does."""
    with tempfile.TemporaryDirectory() as folder:
        together = simulation(REPLICAS, Path(folder) / "together")
        alone = [simulation(1, Path(folder) / f"alone-{k}") for k in range(REPLICAS)]
        outer_step_s(together, *alone)  # the first of each allocates moments
        four_s, ones_s = [], []
        for _ in range(REPEATS):
            four_s.append(outer_step_s(together))
            ones_s.append(outer_step_s(*alone))
    ratio = median(four / ones for four, ones in zip(four_s, ones_s))
    if ratio > LIMIT:
        raise RuntimeError(f"four replicas cost {ratio:.3f} times what four simulations of one do, more than {LIMIT}")
    return Table(
        title=f"One outer step of {INNER_STEPS} inner steps of tiny, simulated; median of {REPEATS}",
        columns=("what", "CPU s", "ratio"),
        rows=[
            (f"{REPLICAS} simulations of 1 replica", median(ones_s), 1.0),
            (f"1 simulation of {REPLICAS} replicas", median(four_s), ratio),
        ],
        notes=("CPU time of this process, one thread, without evaluations; the ratio is the median of pairs.",),
    )


def simulation(replicas: int, folder: Path) -> Simulation:
    what = SimulatedRun.load(RUN_FILE).with_flags(replicas=replicas, drop=None)
    inner = what.run.inner.model_copy(update={"steps": INNER_STEPS})
    simulate = what.simulate.model_copy(update={"evaluate_every": 1000})
    what = what.model_copy(update={"run": what.run.model_copy(update={"inner": inner}), "simulate": simulate})
    return open_simulation(what, folder, base=RUN_FILE.parent, device="cpu", threads=1)


def outer_step_s(*simulations: Simulation) -> float:
    began_s = time.process_time()
    for one in simulations:
        one.outer_step()
    return time.process_time() - began_s
