"""What DiLoCo is where it is something simpler, through the command line from end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from p2p_diloco.cli.cli import main
from p2p_diloco.core.codec import Vector
from p2p_diloco.core.manifest import RunManifest
from p2p_diloco.core.runfile import RunSpec
from p2p_diloco.learn.data import Corpus, open_corpus
from p2p_diloco.learn.inner import InnerOptimizer, place_in_run
from p2p_diloco.learn.model import build_model, loss_of
from p2p_diloco.learn.parameters import layout_of, read_parameters
from p2p_diloco.ledger.folder import find_run, load_state
from tests.support.small_runs import small_run, table_of

MEAN = {"outer.lr": 1.0, "outer.momentum": 0.0}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    small_run(tmp_path)
    return tmp_path


def simulated(folder: Path, changes: dict[str, Any], replicas: int) -> tuple[RunManifest, Vector]:
    """Theta at the end of ``p2p-diloco simulate``."""
    (folder / "run.toml").write_text(as_toml(table_of(changes)))
    out = folder / f"out-{replicas}"
    arguments = ["simulate", str(folder / "run.toml"), "--replicas", str(replicas), "--folder", str(out)]
    assert main([*arguments, "--device", "cpu", "--threads", "1"]) == 0
    manifest, state = load_state(find_run(out))
    return manifest, state.theta


def as_toml(table: dict[str, Any]) -> str:
    """Of tables of numbers and strings, which JSON writes as TOML does."""
    lines, tables = [], []
    for key, value in table.items():
        if isinstance(value, dict):
            tables.append((key, value))
        else:
            lines.append(f"{key} = {json.dumps(value)}")
    for key, value in tables:
        inline = "\n".join(f"{name} = {inline_toml(entry)}" for name, entry in value.items())
        lines.append(f"[{key}]\n{inline}")
    return "\n".join(lines)


def inline_toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {inline_toml(entry)}" for name, entry in value.items()) + " }"
    return json.dumps(value)


def corpus_of(folder: Path, spec: RunSpec) -> Corpus:
    return open_corpus(spec.data, base=folder, cache=folder / "cache" / "p2p-diloco")


def trained_alone(manifest: RunManifest, corpus: Corpus, name: str) -> Vector:
    """float32 [n]: what replica ``name`` makes of S_0 in the inner steps before the first outer step."""
    spec = manifest.spec
    model = build_model(manifest.transformers_config, seed=spec.seed)
    inner = InnerOptimizer(model, spec, CPU)
    for k in range(spec.inner.steps):
        inner.step(corpus, peer_id=name, at=place_in_run(spec, 0, k, k))
    local: Vector = np.empty(layout_of(model).n, np.float32)
    read_parameters(model, local)
    return local


def test_one_outer_step_with_a_plain_mean_is_a_soup(folder: Path) -> None:
    """The mean of models that were trained independently; and so is federated averaging, a round of it."""
    manifest, theta = simulated(folder, MEAN | {"outer.steps": 1, "inner.steps": 12}, replicas=3)
    corpus = corpus_of(folder, manifest.spec)
    alone = [trained_alone(manifest, corpus, f"replica-{k}") for k in (1, 2, 3)]
    np.testing.assert_allclose(theta, np.mean(alone, axis=0), rtol=0, atol=1e-6)
    assert max(float(np.abs(theta - one).max()) for one in alone) > 1e-3, "they differ"


def test_outer_sgd_with_lr_1_is_federated_averaging(folder: Path) -> None:
    """For several rounds: each starts from the mean of all, and AdamW's moments stay with who made them."""
    manifest, theta = simulated(folder, MEAN, replicas=2)
    spec, corpus = manifest.spec, corpus_of(folder, manifest.spec)
    models = [build_model(manifest.transformers_config, seed=spec.seed) for _ in range(2)]
    inners = [InnerOptimizer(model, spec, CPU) for model in models]
    for step in range(spec.outer.steps):
        for name, inner in zip(("replica-1", "replica-2"), inners):
            for k in range(spec.inner.steps):
                inner.step(corpus, peer_id=name, at=place_in_run(spec, step, k, k))
        with torch.no_grad():
            for one, other in zip(*(model.parameters() for model in models)):
                mean = (one + other) / 2
                one.copy_(mean)
                other.copy_(mean)
    expected = np.empty_like(theta)
    read_parameters(models[0], expected)
    np.testing.assert_allclose(theta, expected, rtol=0, atol=2e-6)


def test_one_inner_step_of_sgd_is_training_on_a_large_batch(folder: Path) -> None:
    changes = MEAN | {"inner.steps": 1, "outer.steps": 20, "inner.optimizer": "sgd", "inner.lr": 0.1}
    changes |= {"inner.clip": 1e9, "inner.weight_decay": 0.0, "inner.warmup_steps": 0, "inner.min_lr_ratio": 1.0}
    manifest, theta = simulated(folder, changes, replicas=4)
    spec, corpus = manifest.spec, corpus_of(folder, manifest.spec)
    model = build_model(manifest.transformers_config, seed=spec.seed)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(20):
        batches = [
            corpus.batch(
                run_seed=spec.seed,
                peer_id=f"replica-{k}",
                step=step,
                batch_size=spec.inner.batch_size,
                seq_len=spec.data.seq_len,
            )
            for k in (1, 2, 3, 4)
        ]
        sgd.zero_grad()
        loss_of(model, torch.from_numpy(np.concatenate(batches))).backward()  # type: ignore[no-untyped-call]
        sgd.step()
    expected = np.empty_like(theta)
    read_parameters(model, expected)
    np.testing.assert_allclose(theta, expected, rtol=0, atol=1e-6)
