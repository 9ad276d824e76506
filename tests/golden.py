"""What a run computes, written down once: heads, and digests of theta and momentum after every outer step.

The contributions are given, as integers over a power of two, so that no platform's torch takes part and every machine
gets the same bits. Heads may change with the PROTOCOL alone; the digests of theta and momentum never do.
``python -m tests.golden CASE`` prints what a case comes to now.
"""

from __future__ import annotations

import json
import sys
from base64 import b64decode
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, cast
from unittest import mock

import numpy as np
import torch

from p2p_diloco.core.aggregate import AGGREGATIONS
from p2p_diloco.core.codec import Vector
from p2p_diloco.core.grid import PART_VALUES, Grid
from p2p_diloco.core.outer import OuterState, apply, genesis_state
from p2p_diloco.core.update import Update, UpdateHeader
from p2p_diloco.lab.checkpoint import Origin
from p2p_diloco.lab.simulated_run import SimulatedRun, replica_names
from p2p_diloco.lab.simulation import Simulation
from p2p_diloco.lab.trainers import SimulatedTrainer
from p2p_diloco.lab.variants import OuterRule
from p2p_diloco.learn.data import Corpus
from p2p_diloco.learn.inner import InnerOptimizer
from p2p_diloco.learn.parameters import Bound
from tests.support import chronicle
from tests.support.builders import identity
from tests.support.fakes import make_manifest
from tests.support.schedules import Fault, PeerPlan, Schedule
from tests.support.small_runs import table_of
from tests.support.world import World

GOLDEN = Path(__file__).with_suffix(".json")
ROUNDS = GOLDEN.with_name("golden_rounds.json")
"""What was in the updates of the swarms in memory when they were written down: contributors and weights, what the sum
was divided by, and of each part the contributions that came, encoded."""
N = 2 * PART_VALUES + 77
"""Two whole parts and the rest of one."""

SIMULATED: dict[str, dict[str, Any]] = {
    "fp32": {"outer.codec": "fp32"},
    "fp16": {"outer.codec": "fp16"},
    "int8": {"outer.codec": "int8"},
    "int4": {"outer.codec": "int4"},
    "adopt, drops": {"outer.codec": "int8", "simulate.drop": 0.4},
    "keep, drops": {"outer.codec": "int4", "simulate.drop": 0.4, "round.on_missed": "keep"},
    "uneven speeds": {"outer.codec": "int8", "simulate.speeds": [1.0, 0.5, 0.25]},
    "pool": {"outer.codec": "fp16", "simulate.replicas": [1, 2, 4]},
}
SIMULATED_STEPS = 6

FAULTY: dict[str, Schedule] = {
    "swarm in memory": Schedule(
        seed=7,
        peers=(PeerPlan(role="seed"), PeerPlan(), PeerPlan(step_s=2.0), PeerPlan(role="client"), PeerPlan()),
        outer_steps=5,
    ),
    "swarm in memory, faults": Schedule(
        seed=8,
        peers=(PeerPlan(role="seed"), PeerPlan(), PeerPlan(step_s=1.1), PeerPlan(), PeerPlan(starts_s=1.0)),
        faults=(
            Fault(kind="kill", at_s=9.0, who=1, for_s=6.0, phase="reduce", after_s=0.03),
            Fault(kind="cut", at_s=25.0, who=2, other=3, for_s=10.0, how="reset"),
            Fault(kind="kill", at_s=45.0, who=4, for_s=5.0, phase="settle", how="silent"),
        ),
        codec="int8",
        parts=9,
    ),
    "swarm in memory, keep": Schedule(
        seed=9,
        peers=(PeerPlan(), PeerPlan(), PeerPlan(), PeerPlan()),
        faults=(Fault(kind="stop", at_s=12.0, who=2, for_s=12.0, how="whole"),),
        codec="int4",
        on_missed="keep",
    ),
}


@dataclass(frozen=True)
class Step:
    """After one outer step; digests in hex, of all bits."""

    head: str
    theta: str
    momentum: str

    @classmethod
    def of(cls, state: OuterState) -> Step:
        return cls(head=state.head.hex(), theta=bits(state.theta), momentum=bits(state.momentum))


def bits(vector: Vector) -> str:
    return blake2b(vector.astype("<f4").tobytes(), digest_size=16).hexdigest()


def given(*names: object) -> Vector:
    """float32 [N]: multiples of 2**-17 in (-2**-10, 2**-10), other ones for other names."""
    block = b"".join(blake2b(f"{names} {i}".encode()).digest() for i in range(1024))
    values = np.frombuffer(block, np.int8).astype(np.float32) / np.float32(2**17)  # [65536]
    stretches = [values * np.float32(1 + i % 3) for i in range(-(-N // len(values)))]
    return np.concatenate(stretches)[:N]


class GivenTrainer(SimulatedTrainer):
    """One that trains without a model: where it gets to is given."""

    def learn(self, what: SimulatedRun, state: OuterState, inner_steps: Any) -> list[float]:
        self.local -= given(self.name, state.step) * np.float32(sum(inner_steps))
        self.tokens += sum(inner_steps) * what.run.tokens_per_inner_step
        return [1.0]


def simulated(case: str) -> list[Step]:
    """The outer steps of a simulation, whose contributions are given."""
    changes = {"outer.steps": 2 * SIMULATED_STEPS, "simulate.evaluate_every": 2 * SIMULATED_STEPS, **SIMULATED[case]}
    what = SimulatedRun.parse(table_of(changes), "golden")
    theta, spec = given("theta") * np.float32(64), what.run
    state = genesis_state(theta)
    replicas: list[SimulatedTrainer] = [
        GivenTrainer(
            name=name,
            corpus=cast(Corpus, None),
            inner=cast(InnerOptimizer, None),
            parameters=Bound(local := theta.copy()),
            local=local,
        )
        for name in replica_names(what.simulate.most_replicas)
    ]
    simulation = Simulation(
        what=what,
        manifest=make_manifest(N, theta, identity(0), codec=spec.outer.codec),
        folder=Path(),
        device=torch.device("cpu"),
        state=state,
        replicas=replicas,
        rule=OuterRule(
            spec=what.simulate,
            grid=Grid(n=N, codec=spec.outer.codec),
            lr=spec.outer.lr,
            momentum=spec.outer.momentum,
            second=np.zeros_like(theta),
        ),
        held_out=cast(Corpus, None),
        model=cast(torch.nn.Module, None),
        origin=cast(Origin, None),
    )
    steps = [Step.of(state)]
    for _ in range(SIMULATED_STEPS):
        simulation.outer_step()
        steps.append(Step.of(state))
    return steps


def in_memory(case: str) -> list[Step]:
    """The states that a swarm of real peers came to, faults and all, on a clock and links that are simulated, from the
    contributions that were in its updates. Who trained for how long, and came to which round, depends on the messages
    of the protocol to the millisecond; what becomes of given contributions does not."""
    schedule = FAULTY[case]
    world = World(schedule, Path())
    state = genesis_state(world.genesis.copy())
    steps = [Step.of(state)]
    with mock.patch("p2p_diloco.core.grid.PART_VALUES", chronicle.PART_VALUES):
        outer, grid = world.manifest.spec.outer, Grid(n=world.n, codec=schedule.codec)
        for one in json.loads(ROUNDS.read_text())[case]:
            contributors = tuple((peer_id, weight) for peer_id, weight in one["contributors"])
            weights = [weight for _, weight in contributors]
            parts = []
            for part, encoded in enumerate(one["came"]):
                came = {int(i): grid.decode(part, b64decode(data)) for i, data in encoded.items()}
                parts.append(AGGREGATIONS["mean"].reduce(came, weights, part, grid, one["total_weight"]))
            hashes = tuple(part.hash for part in parts)
            header = UpdateHeader(step=state.step, parent=state.head, contributors=contributors, part_hashes=hashes)
            update = Update(header=header, parts=tuple(parts))
            apply(state, update, grid, lr=outer.lr, momentum=outer.momentum)
            steps.append(Step.of(state))
    return steps


def outcome(case: str) -> list[Step]:
    return simulated(case) if case in SIMULATED else in_memory(case)


def main() -> None:
    cases = sys.argv[1:] or [*SIMULATED, *FAULTY]
    print(json.dumps({case: [vars(step) for step in outcome(case)] for case in cases}, indent=1))


if __name__ == "__main__":
    main()
