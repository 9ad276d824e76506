"""Small models, and what a manifest says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from p2p_diloco.core.manifest import RunManifest, canonical_json
from p2p_diloco.core.runfile import ModelSpec, RunSpec
from p2p_diloco.learn.architecture import resolve_config
from p2p_diloco.learn.model import build_model
from p2p_diloco.learn.parameters import Layout, layout_of, read_parameters

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def resolved(**changed: Any) -> dict[str, Any]:
    return resolve_config(ModelSpec(config=LLAMA | changed), base=Path(), vocab_size=256)


def llama(seed: int = 0, **changed: Any) -> torch.nn.Module:
    return build_model(resolved(**changed), seed=seed)


def vector_of(model: torch.nn.Module) -> np.ndarray:
    vector = np.empty(layout_of(model).n, np.float32)
    read_parameters(model, vector)
    return vector


def random_batch(rows: int = 3, seq_len: int = 12, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, seq_len + 1))


def manifest_of(config: dict[str, Any], layout: Layout) -> RunManifest:
    return RunManifest(
        spec=RunSpec(name="tiny", model=ModelSpec(config=LLAMA)),
        model_config_json=canonical_json(config).decode(),
        n_params=layout.n,
        layout_digest=layout.digest,
        vocab_size=256,
        data_fingerprint="",
        genesis="0" * 64,
        owner="owner",
    )
