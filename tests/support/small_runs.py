"""Run files so small that a test trains them: text in a folder of its own, a model of some thousand parameters."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.stage import write_texts
from p2p_diloco.lab.simulated_run import SimulatedRun

SMALL: dict[str, Any] = {
    "name": "small",
    "model": {
        "config": {
            "model_type": "llama",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 16,
        }
    },
    "data": {"source": "path", "path": "text", "seq_len": 16, "held_out": 0.2, "eval_tokens": 512},
    "inner": {"steps": 4, "batch_size": 4, "lr": 3e-3, "warmup_steps": 2},
    "outer": {"steps": 3, "lr": 0.7, "momentum": 0.5, "codec": "fp32", "aggregate": "mean"},
    "round": {"min_group": 1, "snapshot_every": 100},
}


def table_of(changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """SMALL with some dotted keys changed."""
    table = copy.deepcopy(SMALL)
    for key, value in (changes or {}).items():
        section, _, name = key.partition(".")
        table.setdefault(section, {})[name] = value
    return table


def small_run(folder: Path, changes: Mapping[str, Any] | None = None) -> SimulatedRun:
    """Its text is written below ``folder``, which is what its paths are relative to."""
    if not (folder / "text").exists():
        folder.mkdir(exist_ok=True)
        write_texts(folder / "text")
    return SimulatedRun.parse(table_of(changes), "small")
