"""Stall of peers that sleep instead of computing: what the outer step itself costs. The workload is OpenDiLoCo's."""

from __future__ import annotations

from functools import cache

from benchmarks.asleep import sleep_and_drift
from benchmarks.loopback import Run, run_swarm
from benchmarks.stall import COLUMNS, STALL_NOTES, stall_rows
from benchmarks.table import Table
from p2p_diloco.core.runfile import InnerSpec, ModelSpec, OuterSpec, RoundSpec, RunSpec

PEERS = 4
INNER_STEPS = 50
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
