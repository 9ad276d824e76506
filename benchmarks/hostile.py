"""One hostile replica of five, simulated: what it costs above its absence, by each rule for the mean.

Hostile replicas train as the others do, and offer something else. The rows without one say what a rule costs where all
are honest.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Literal, TypeAlias

import numpy as np

from benchmarks.table import Table
from p2p_diloco.core.aggregate import AGGREGATIONS, AggregateName
from p2p_diloco.core.codec import Vector
from p2p_diloco.core.outer import OuterState
from p2p_diloco.lab.simulate import open_simulation
from p2p_diloco.lab.simulated_run import SimulatedRun
from p2p_diloco.lab.simulation import Simulation
from p2p_diloco.lab.trainers import SimulatedTrainer

BASE = Path(__file__).parent.parent / "peers/experiments/base.toml"
HONEST = 4
SEEDS = (0, 1, 2)

Lie: TypeAlias = Callable[[Vector, Sequence[Vector]], Vector]
"""What is offered in place of the last of one's own outer gradients; all of them, the last one too."""


def noise(mine: Vector, all_mine: Sequence[Vector]) -> Vector:
    """Ten times as long as it would be, in a direction of its own."""
    drawn = np.random.default_rng(len(all_mine)).standard_normal(len(mine)).astype(np.float32)
    return drawn * np.float32(10 * np.linalg.norm(mine) / np.linalg.norm(drawn))


LIES: Mapping[str, Lie] = {
    "flip": lambda mine, all_mine: -mine,
    "x100": lambda mine, all_mine: mine * np.float32(100),
    "noise x10": noise,
    "stale": lambda mine, all_mine: all_mine[0],
    "largest weight, flip": lambda mine, all_mine: -mine,
}
HEAVY = "largest weight, flip"


@dataclass(kw_only=True)
class HostileTrainer(SimulatedTrainer):
    """Trains as everybody does, and then puts its parameters where its outer gradient is what it wants to offer."""

    lie: str
    made: list[Vector] = field(default_factory=list)

    def learn(self, what: SimulatedRun, state: OuterState, inner_steps: Sequence[int]) -> list[float]:
        losses = super().learn(what, state, inner_steps)
        self.made = [*self.made[:1], state.theta - self.local]
        self.local[:] = state.theta - LIES[self.lie](self.made[-1], self.made)
        if self.lie == HEAVY:
            self.tokens = what.run.max_weight_tokens
        return losses


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What is simulated. ``lie`` empty: ``replicas`` honest ones; else the last of them is hostile."""

    aggregate: AggregateName = "mean"
    lie: str = ""
    replicas: int = HONEST
    shards: Literal["iid", "non-iid"] = "iid"
    speeds: tuple[float, ...] = ()

    def run(self, seed: int, steps: Mapping[str, int]) -> SimulatedRun:
        what = SimulatedRun.load(BASE)
        inner = what.run.inner.model_copy(update={"steps": steps["inner"]})
        outer = what.run.outer.model_copy(update={"steps": steps["outer"], "aggregate": self.aggregate})
        run = what.run.model_copy(update={"seed": seed, "inner": inner, "outer": outer})
        changes: dict[str, object] = {"replicas": (self.replicas,), "shards": self.shards, "speeds": self.speeds}
        changes |= {"warm_steps": steps["warm"], "evaluate_every": steps["outer"]}
        return what.model_copy(update={"run": run, "simulate": what.simulate.model_copy(update=changes)})

    def loss(self, seed: int, steps: Mapping[str, int], folder: Path) -> float:
        """Returns the held-out loss at the end; infinite where theta is not finite. ``folder``: for warm starts, which
        arms share."""
        with tempfile.TemporaryDirectory(dir=folder) as name:
            simulation = open_simulation(
                self.run(seed, steps), Path(name), base=BASE.parent, device="cpu", threads=1, warm_folder=folder
            )
            if self.lie:
                corrupt(simulation, self.lie)
            while not simulation.done:
                simulation.outer_step()
        loss = simulation.curve[-1].held_out_loss
        return float("inf") if loss is None else loss


def corrupt(simulation: Simulation, lie: str) -> None:
    """Makes the last replica hostile."""
    simulation.replicas[-1] = HostileTrainer(**vars(simulation.replicas[-1]), lie=lie)


def arms() -> dict[str, list[Arm]]:
    """Each row's arms: by ``mean``, by ``robust``, and what both are compared with."""
    rows: dict[str, list[Arm]] = {}
    for lie in LIES:
        rows[f"{lie}, above absence"] = [
            *(Arm(aggregate=rule, lie=lie, replicas=HONEST + 1) for rule in AGGREGATIONS),
            Arm(aggregate="mean"),
        ]
    for title, arm in HONEST_ROWS.items():
        rows[title] = [arm, replace(arm, aggregate="robust"), arm]
    return rows


HONEST_ROWS: Mapping[str, Arm] = {
    "all honest": Arm(replicas=HONEST + 1),
    "all honest, non-i.i.d.": Arm(replicas=HONEST + 1, shards="non-iid"),
    "all honest, speeds 1 to 1/4": Arm(replicas=HONEST + 1, speeds=(1.0, 0.75, 0.5, 0.5, 0.25)),
}


def main(seeds: Sequence[int] = SEEDS, steps: Mapping[str, int] | None = None) -> Table:
    """``steps``: of the warm start, and of each outer step and the whole, where they differ from the studies'."""
    steps = {"warm": 3000, "inner": 25, "outer": 48} if steps is None else steps
    losses: dict[tuple[Arm, int], float] = {}
    rows = []
    with tempfile.TemporaryDirectory(prefix="p2p-diloco-bench-") as name:
        for title, compared in arms().items():
            for arm in compared:
                for seed in seeds:
                    if (arm, seed) not in losses:
                        losses[arm, seed] = arm.loss(seed, steps, Path(name))
            by_mean, by_robust, without = (mean(losses[arm, seed] for seed in seeds) for arm in compared)
            rows.append((title, f"{by_mean - without:+.4f}", f"{by_robust - without:+.4f}", f"{without:.4f}"))
            print(*rows[-1], sep="  ", flush=True)
    return Table(
        title=f"Held-out loss of {HONEST + 1} replicas above that of the last column",
        columns=("the fifth replica", "mean", "robust", "compared with"),
        rows=rows,
        notes=(
            f"{steps['outer']} outer steps of {steps['inner']} inner steps, {steps['warm']} before; seeds {seeds}.",
        ),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hostile")
    for key, value in (("warm", 3000), ("inner", 25), ("outer", 48), ("seeds", len(SEEDS))):
        parser.add_argument(f"--{key}", type=int, default=value)
    given = vars(parser.parse_args())
    main(range(given.pop("seeds")), given)
