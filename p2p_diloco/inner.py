"""Learning alone: AdamW on one peer's data, and what of it must survive a restart.

As in the paper (arXiv 2311.08105): the optimizer's moments stay local and are never reset at outer steps; the learning
rate follows warm-up and cosine over *all* inner steps of the run, by the swarm's outer step, so a peer that joins late
takes the rate that everybody has.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from p2p_diloco.codec import Vector
from p2p_diloco.data import Corpus
from p2p_diloco.manifest import InnerSpec, RunSpec
from p2p_diloco.model import loss_of
from p2p_diloco.snapshot import disk_errors, write_whole

INNER_FILE = "inner.safetensors"


def learning_rate(spec: InnerSpec, step: int, total_steps: int) -> float:
    """At inner step ``step`` of the run: linear warm-up from 0, then a cosine from ``lr`` to ``lr * min_lr_ratio``."""
    warmup = min(spec.warmup_steps, total_steps)
    if step < warmup:
        return spec.lr * (step + 1) / warmup
    progress = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
    return spec.lr * (spec.min_lr_ratio + (1 - spec.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


@contextmanager
def whole() -> Iterator[None]:
    """SIGALRM, with which Ctrl+C ends a long inner step, waits until parameters and moments fit together again."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})


class InnerOptimizer:
    """One trainer's AdamW. ``model`` is on ``device``; bf16 autocast is used on CUDA devices that compute in it."""

    def __init__(self, model: torch.nn.Module, spec: RunSpec, device: torch.device) -> None:
        self.model = model
        self.spec = spec
        self.device = device
        inner = spec.inner
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        # Vectors (norms, biases) are not decayed.
        groups = [
            {"params": [p for p in self.parameters if p.dim() >= 2], "weight_decay": inner.weight_decay},
            {"params": [p for p in self.parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=inner.lr, betas=(inner.beta1, inner.beta2)
        )
        self.autocast = device.type == "cuda" and torch.cuda.is_bf16_supported()

    def step(self, corpus: Corpus, *, peer_id: str, batch_step: int, schedule_step: int) -> float:
        """One inner step on this peer's batch ``batch_step``, at the learning rate of the run's inner step
        ``schedule_step``. Returns the mean loss, nats per token."""
        inner, data = self.spec.inner, self.spec.data
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate(inner, schedule_step, inner.steps * self.spec.outer.steps)
        total = torch.zeros((), device=self.device)
        for micro_step in range(inner.grad_accumulation):
            batch = corpus.batch(
                run_seed=self.spec.seed,
                peer_id=peer_id,
                step=batch_step,
                batch_size=inner.batch_size,
                seq_len=data.seq_len,
                micro_step=micro_step,
            )  # [batch, seq_len + 1]
            tokens = torch.from_numpy(batch).to(self.device, non_blocking=True)
            context = torch.autocast("cuda", torch.bfloat16) if self.autocast else contextlib.nullcontext()
            with context:
                loss = loss_of(self.model, tokens) / inner.grad_accumulation
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        with whole():
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, inner.clip)
            if torch.isfinite(norm):  # one gradient that is not would stay in the moments for ever
                self.adamw.step()
            self.adamw.zero_grad(set_to_none=True)
        return total.item()

    def forget(self) -> None:
        """Begin with new moments: the old ones led to parameters that are not finite."""
        self.adamw.state.clear()

    def save(self, path: Path, local: Vector, *, head: str, inner_step: int, tokens: int) -> None:
        """Moments, local parameters, and where they belong. Whole or not at all; LedgerError on a full disk."""
        tensors = {"local": torch.from_numpy(np.array(local))}
        steps = []
        for i, parameter in enumerate(self.parameters):
            state = self.adamw.state.get(parameter)
            if state:
                tensors[f"exp_avg.{i}"] = state["exp_avg"].contiguous().cpu()
                tensors[f"exp_avg_sq.{i}"] = state["exp_avg_sq"].contiguous().cpu()
                steps.append(float(state["step"]))
        metadata = {"head": head, "inner_step": str(inner_step), "tokens": str(tokens), "steps": json.dumps(steps)}
        data = save(tensors, metadata)
        with disk_errors(path, len(data)):
            write_whole(path, [data], len(data))

    def load(self, path: Path) -> tuple[Vector, str, int, int] | None:
        """Restore the moments; (local, head, inner_step, tokens), or None when there is nothing sound to restore: the
        moments then start from zero, which costs some steps and nothing else."""
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                steps = json.loads(metadata["steps"])
                moments = [
                    (file.get_tensor(f"exp_avg.{i}"), file.get_tensor(f"exp_avg_sq.{i}")) for i in range(len(steps))
                ]
                local = file.get_tensor("local").numpy()
                found = local, metadata["head"], int(metadata["inner_step"]), int(metadata["tokens"])
        except (SafetensorError, OSError, KeyError, ValueError):
            return None
        if not all(bool(torch.isfinite(m).all()) for pair in moments for m in pair):
            return None
        if [m.shape for m, _ in moments] != [p.shape for p in self.parameters[: len(moments)]]:
            return None
        for parameter, step, (exp_avg, exp_avg_sq) in zip(self.parameters, steps, moments):
            self.adamw.state[parameter] = {
                "step": torch.tensor(step),
                "exp_avg": exp_avg.to(parameter.device),
                "exp_avg_sq": exp_avg_sq.to(parameter.device),
            }
        return found
