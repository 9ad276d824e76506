"""Stall of peers that sleep instead of computing: what the outer step itself costs. The workload is OpenDiLoCo's."""

from __future__ import annotations

import time
from functools import cache

import numpy as np

from benchmarks.loopback import Run, run_swarm
from benchmarks.stall import COLUMNS, STALL_NOTES, stall_rows
from benchmarks.table import Table
from p2p_diloco.manifest import InnerSpec, ModelSpec, OuterSpec, RoundSpec, RunSpec
from p2p_diloco.model import build_model
from p2p_diloco.swarm import Swarm

PEERS = 4
INNER_STEPS = 50
INNER_STEP_S = 0.05
OUTER_STEPS = 8
LIMIT_S = 150.0

SPEC = RunSpec(
    name="sleepers",
    model=ModelSpec(
        config={
            "model_type": "llama",
            "hidden_size": 256,
            "intermediate_size": 704,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "tie_word_embeddings": True,
        }
    ),  # 4.08 million parameters
    inner=InnerSpec(steps=INNER_STEPS),
    outer=OuterSpec(steps=OUTER_STEPS, codec="int8"),
    round=RoundSpec(gather_s=1.0),
)


def main() -> Table:
    return Table(
        title=f"Stall per outer step, {PEERS} peers asleep: 4M parameters, {INNER_STEPS} inner steps of 50 ms, int8",
        columns=COLUMNS,
        rows=stall_rows(swarm_run()),
        notes=(
            *STALL_NOTES,
            "OpenDiLoCo (hivemind 1.1.12) took 5.3 to 9.6 s for this workload, measured elsewhere: 4 peers, 2 cores.",
        ),
    )


@cache
def swarm_run() -> Run:
    return run_swarm(SPEC, sleep_and_drift, peers=PEERS, limit_s=LIMIT_S)


def sleep_and_drift(swarm: Swarm) -> None:
    """Every inner step moves a share of the parameters a little, so that all have moved by the outer step."""
    model = build_model(swarm.manifest.transformers_config, seed=None)
    swarm.load_into(model)
    generator = np.random.default_rng()
    shares = np.array_split(np.arange(len(swarm.local)), INNER_STEPS)
    while not swarm.done:
        time.sleep(INNER_STEP_S)
        share = shares[swarm.inner_step % INNER_STEPS]
        drift = generator.standard_normal(len(share), np.float32)
        swarm.local[share[0] : share[-1] + 1] += np.float32(1e-3) * drift
        swarm.report(0.0, swarm.manifest.spec.tokens_per_inner_step)
        if swarm.outer_step_due():
            swarm.outer_step(model)
