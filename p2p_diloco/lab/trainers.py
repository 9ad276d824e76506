"""The trainers of a simulation, and what they start from."""

from __future__ import annotations

import json
import logging
import mmap
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from p2p_diloco.core.codec import Vector
from p2p_diloco.core.digest import digest
from p2p_diloco.core.manifest import RunManifest, canonical_json
from p2p_diloco.core.outer import OuterState
from p2p_diloco.lab.checkpoint import open_checkpoint, write_checkpoint
from p2p_diloco.lab.simulated_run import SimulatedRun
from p2p_diloco.learn.data import Corpus, locked
from p2p_diloco.learn.inner import InnerOptimizer, place_in_run
from p2p_diloco.learn.model import build_model
from p2p_diloco.learn.parameters import Parameters, tie
from p2p_diloco.ledger.disk import disk_errors, write_whole

log = logging.getLogger(__name__)

WARM_NAME = "warm-up"
"""Whose batches the one worker takes that makes the start."""
WARM_KEPT_EVERY = 500
"""Steps of it between two checkpoints."""


@dataclass(kw_only=True)
class SimulatedTrainer:
    """Is what a trainer is in a simulation: its text, its model with an inner optimizer, and what it has learned since
    it took theta. On the CPU the model's parameters lie in ``local``, as a peer's do."""

    name: str
    corpus: Corpus
    inner: InnerOptimizer
    parameters: Parameters
    local: Vector
    """float32 [n]: the parameters, after ``read_local``."""
    tokens: int = 0
    """Since it took theta: what its next contribution stands for."""
    late: bool = False
    """It goes on from its own parameters for now, and takes theta when ``delay`` inner steps are over."""

    def read_local(self) -> None:
        """Makes ``local`` what the model's parameters are."""
        self.parameters.read(self.local)

    def write_local(self) -> None:
        """Makes the model's parameters what ``local`` is."""
        self.parameters.write(self.local)

    def learn(self, what: SimulatedRun, state: OuterState, inner_steps: Sequence[int]) -> list[float]:
        """Makes the inner steps before the outer step that follows ``state``, and returns their losses, nats per token.
        They are counted anew (``inner.place_in_run``) after each offer of a peer that came to nothing."""
        spec, options = what.run, what.simulate
        seed_dropout(spec.seed, self.name, state.step)
        losses = []
        total = sum(inner_steps)
        counted = (k for offered in inner_steps for k in range(offered))
        for batch_step, inner_step in enumerate(counted):
            if self.late and batch_step == min(options.delay, total - 1):
                self.read_local()
                self.local *= np.float32(options.merge)
                self.local += np.float32(1 - options.merge) * state.theta
                self.write_local()
                self.late = False
            place = place_in_run(spec, state.step, batch_step, inner_step)
            losses.append(self.inner.step(self.corpus, peer_id=self.name, at=place))
            self.tokens += spec.tokens_per_inner_step
        self.read_local()
        return losses


def seed_dropout(seed: int, name: str, step: int) -> None:
    """Seeds torch for models with dropout, so that draws are the same in whatever order, and after a restart. Peers do
    not share theirs."""
    drawn = digest(b"dropout", seed.to_bytes(8, "big"), name.encode(), step.to_bytes(8, "big"))
    torch.manual_seed(int.from_bytes(drawn[:8], "big") >> 1)


def new_trainer(
    manifest: RunManifest, name: str, corpus: Corpus, theta: Vector, device: torch.device
) -> SimulatedTrainer:
    """Returns a trainer that stands at theta, float32 [n]."""
    n = len(theta)
    # A peer's local begins after theta in one mapping: where vectors begin may decide how a sum is vectorized.
    local: Vector = np.frombuffer(mmap.mmap(-1, 2 * 4 * n), np.float32)[n:]
    local[:] = theta
    model = build_model(manifest.transformers_config, seed=None).to(device)
    parameters = tie(model, local)
    inner = InnerOptimizer(model, manifest.spec, device)
    return SimulatedTrainer(name=name, corpus=corpus, inner=inner, parameters=parameters, local=local)


def warm_start(
    what: SimulatedRun, manifest: RunManifest, theta: Vector, corpus: Corpus, device: torch.device, folder: Path
) -> Vector:
    """Returns theta, float32 [n], after one worker's ``warm_steps``. After its warm-up the learning rate stays, for
    training goes on; gradients are not accumulated, so that what has larger batches afterwards starts where others do.
    Kept in ``folder`` under a name that says what it depends on. Of several processes, one makes it; where it is
    interrupted, the next one goes on from its last checkpoint."""
    steps, spec = what.simulate.warm_steps, what.run
    constant = spec.inner.model_copy(update={"steps": steps, "min_lr_ratio": 1.0, "grad_accumulation": 1})
    outer = spec.outer.model_copy(update={"steps": 1})
    spec = spec.model_copy(update={"inner": constant, "outer": outer})
    depends = [spec.seed, spec.inner.model_dump(), spec.data.model_dump(), corpus.identity]
    depends += [manifest.model_config_json, manifest.genesis, device.type, torch.__version__]
    path = folder / f"warm-{digest(b'warm start', canonical_json(depends))[:8].hex()}.float32"
    with locked(path.with_suffix(".lock")):
        if not path.exists():
            warm = new_trainer(manifest.model_copy(update={"spec": spec}), WARM_NAME, corpus, theta, device)
            make_warm(warm, steps, path.with_suffix(""))
            with disk_errors(path, 4 * len(theta)):
                write_whole(path, [warm.local.data.cast("B")], 4 * len(theta))
        shutil.rmtree(path.with_suffix(""), ignore_errors=True)
    kept: Vector = np.fromfile(path, np.float32)
    return kept


def make_warm(warm: SimulatedTrainer, steps: int, folder: Path) -> None:
    """Has a trainer learn alone; ``folder`` is for its checkpoints."""
    inner, first = warm.inner, 0
    with open_checkpoint(folder) as checkpoint:
        if checkpoint is not None:
            first = checkpoint.facts["step"]
            warm.local[:] = checkpoint.file.get_tensor("local").numpy()
            warm.write_local()
            inner.restore(checkpoint.tensors("exp_avg"), checkpoint.facts["steps"])
    for step in range(first, steps):
        kept = step % WARM_KEPT_EVERY == 0
        if kept or step == first:
            log.info("one worker's steps before: %d of %d", step, steps)
        if kept and step > first:
            warm.read_local()
            moments, counts = inner.moments()
            tensors = {**moments, "local": torch.from_numpy(warm.local)}
            with disk_errors(folder):
                folder.mkdir(exist_ok=True)
            write_checkpoint(folder, tensors, json.dumps({"step": step, "steps": counts}))
        seed_dropout(inner.spec.seed, WARM_NAME, step)
        inner.step(warm.corpus, peer_id=WARM_NAME, at=place_in_run(inner.spec, 0, step, step))
    warm.read_local()
