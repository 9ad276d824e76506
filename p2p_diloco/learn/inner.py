"""Learning alone: AdamW on one peer's data, and what of it must survive a restart.

As in the paper (arXiv 2311.08105): the optimizer's moments stay local and are never reset at outer steps; the learning
rate follows warm-up and cosine over *all* inner steps of the run, by the swarm's outer step, so a peer that joins late
takes the rate that everybody has.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import random
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from p2p_diloco.core.codec import Vector
from p2p_diloco.core.runfile import InnerSpec, RunSpec
from p2p_diloco.learn.data import Corpus
from p2p_diloco.learn.model import losses_of
from p2p_diloco.ledger.disk import whole_file

log = logging.getLogger(__name__)

INNER_FILE = "inner.safetensors"
DAMAGED = ".damaged"
"""Ends the name of one that cannot be used."""
MOST_STEPS = 1e15
"""No parameter has made more inner steps: the file's header has room for that number."""


def learning_rate(spec: InnerSpec, step: int, total_steps: int) -> float:
    """Returns the learning rate at inner step ``step`` of the run: a linear warm-up from 0, then a cosine from ``lr``
    to ``lr * min_lr_ratio``."""
    warmup = min(spec.warmup_steps, total_steps)
    if step < warmup:
        return spec.lr * (step + 1) / warmup
    progress = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
    return spec.lr * (spec.min_lr_ratio + (1 - spec.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass(frozen=True)
class Place:
    """One inner step of a peer, counted over all inner steps of the run."""

    batch_step: int
    """Which of its batches it takes."""
    schedule_step: int
    """Whose learning rate."""


def place_in_run(spec: RunSpec, outer_step: int, batch_step: int, inner_step: int) -> Place:
    """Returns the place of a peer that stands at ``outer_step`` and has taken ``batch_step`` batches and made
    ``inner_step`` inner steps there. A round that failed has made these two differ."""
    first = outer_step * spec.inner.steps
    return Place(batch_step=first + batch_step, schedule_step=first + min(inner_step, spec.inner.steps - 1))


def draws_drop(seed: int, peer_id: str, step: int, probability: float) -> bool:
    """Returns whether this peer's contribution to outer step ``step`` is dropped, as in the paper's ablation (arXiv
    2311.08105, section 3): another draw for every peer and outer step, the same whenever it is asked for."""
    return random.Random(f"{seed} {peer_id} {step}").random() < probability


def file_header(
    shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str], steps: Mapping[str, float]
) -> bytes:
    """Returns the header of a safetensors file of float32 tensors that lie there in this order. ``steps``: how many
    each parameter has made, by its number."""
    content: dict[str, object] = {"__metadata__": {**metadata, "steps": json.dumps(steps)}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        content[name] = {"dtype": "F32", "shape": shape, "data_offsets": (begin, end)}
    return json.dumps(content).encode()


@contextmanager
def whole() -> Iterator[None]:
    """Holds back SIGALRM, with which Ctrl+C ends a long inner step, until parameters and moments fit together again.
    The signal is noted and not blocked: the system may give it to any thread, and its handler runs in the main thread
    even so."""
    if threading.current_thread() is not threading.main_thread():
        yield  # no handler runs in this thread
        return
    came: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)
    if came:
        signal.raise_signal(signal.SIGALRM)


def computes_in_bf16(capability: tuple[int, int]) -> bool:
    """Returns whether a GPU of this CUDA capability has units for bf16, which Ampere (8.0) was the first to have.
    Earlier ones (V100, T4, RTX 20) imitate it, more slowly than float32."""
    return capability >= (8, 0)


class InnerOptimizer:
    """The optimizer of one trainer: AdamW, or SGD. ``model`` is on ``device``; bf16 autocast is used where CUDA
    computes in it."""

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
        groups = [group for group in groups if group["params"]]
        self.optimizer: torch.optim.Optimizer
        if inner.optimizer == "adamw":
            self.optimizer = torch.optim.AdamW(groups, lr=inner.lr, betas=(inner.beta1, inner.beta2))
        else:
            self.optimizer = torch.optim.SGD(groups, lr=inner.lr)
        self.autocast = device.type == "cuda" and computes_in_bf16(torch.cuda.get_device_capability(device))
        self.changing = threading.Lock()
        """Held while parameters and moments change, and by another thread while it copies some of them."""

    def step(self, corpus: Corpus, *, peer_id: str, at: Place) -> float:
        """Makes one inner step on this peer's batch of that place. Returns the mean cross-entropy, nats per token."""
        inner, data = self.spec.inner, self.spec.data
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(inner, at.schedule_step, inner.steps * self.spec.outer.steps)
        total = torch.zeros((), device=self.device)
        for micro_step in range(inner.grad_accumulation):
            batch = corpus.batch(
                run_seed=self.spec.seed,
                peer_id=peer_id,
                step=at.batch_step,
                batch_size=inner.batch_size,
                seq_len=data.seq_len,
                micro_step=micro_step,
            )  # [batch, seq_len + 1]
            tokens = torch.from_numpy(batch).to(self.device, non_blocking=True)
            context = torch.autocast("cuda", torch.bfloat16) if self.autocast else contextlib.nullcontext()
            with context:
                losses = losses_of(self.model, tokens)
                loss = losses.trained / inner.grad_accumulation
            loss.backward()  # type: ignore[no-untyped-call]
            total += losses.cross_entropy.detach() / inner.grad_accumulation
        with whole(), self.changing:
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, inner.clip)
            if torch.isfinite(norm):  # one gradient that is not would stay in the moments for ever
                self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return total.item()

    def forget(self) -> None:
        """Begins with new moments: the old ones led to parameters that are not finite."""
        with self.changing:
            self.optimizer.state.clear()

    def save(self, path: Path, local: Vector, *, head: str, inner_step: int, tokens: int) -> None:
        """Writes the moments, local parameters, and where they belong: whole or not at all. LedgerError on a full disk.

        Another thread may make inner steps meanwhile, and waits at most for the moments of one parameter to be copied.
        They are then not all of one inner step, but those of one parameter are, and so is the number of its steps,
        which is known only at the end: the file's header is written last.
        """
        with self.changing:
            states = {
                str(i): state
                for i, parameter in enumerate(self.parameters)
                if "exp_avg" in (state := self.optimizer.state.get(parameter, {}))
            }
        shapes = {"local": local.shape}
        for i, state in states.items():
            shapes[f"exp_avg.{i}"] = shapes[f"exp_avg_sq.{i}"] = tuple(state["exp_avg"].shape)
        metadata = {"head": head, "inner_step": str(inner_step), "tokens": str(tokens)}
        room = len(file_header(shapes, metadata, dict.fromkeys(states, MOST_STEPS)))
        room += -room % 8
        steps: dict[str, float] = {}
        with whole_file(path, 8 + room + sum(4 * math.prod(shape) for shape in shapes.values())) as file:
            file.write(bytes(8 + room))
            file.write(local.data)
            for i, state in states.items():
                with self.changing:
                    moments = [state[name].to("cpu", copy=True) for name in ("exp_avg", "exp_avg_sq")]
                    steps[i] = float(state["step"])
                for moment in moments:
                    file.write(moment.contiguous().numpy().data)
            file.seek(0)
            file.write(room.to_bytes(8, "little") + file_header(shapes, metadata, steps).ljust(room))

    def moments(self) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """Returns AdamW's state: two moments a parameter, on the CPU, and how many steps each has made, by its number.
        Empty before the first step, and for SGD; a parameter that never had a gradient has none."""
        tensors, steps = {}, {}
        for i, parameter in enumerate(self.parameters):
            state = self.optimizer.state.get(parameter, {})
            if "exp_avg" in state:
                tensors[f"exp_avg.{i}"] = state["exp_avg"].contiguous().cpu()
                tensors[f"exp_avg_sq.{i}"] = state["exp_avg_sq"].contiguous().cpu()
                steps[str(i)] = float(state["step"])
        return tensors, steps

    def restore(self, tensors: Mapping[str, torch.Tensor], steps: Mapping[str, float]) -> bool:
        """Takes what ``moments`` gave. Returns False, with nothing changed, when it is another model's or not finite.
        Raises KeyError when some of it is missing."""
        numbered = {str(i): parameter for i, parameter in enumerate(self.parameters)}
        pairs = {i: (tensors[f"exp_avg.{i}"], tensors[f"exp_avg_sq.{i}"]) for i in steps}
        if not all(bool(torch.isfinite(moment).all()) for pair in pairs.values() for moment in pair):
            return False
        if any(i not in numbered or moment.shape != numbered[i].shape for i in pairs for moment in pairs[i]):
            return False
        for i, (exp_avg, exp_avg_sq) in pairs.items():
            parameter = numbered[i]
            self.optimizer.state[parameter] = {
                "step": torch.tensor(steps[i]),
                "exp_avg": exp_avg.to(parameter.device),
                "exp_avg_sq": exp_avg_sq.to(parameter.device),
            }
        return True

    def load(self, path: Path) -> tuple[Vector, str, int, int] | None:
        """Restores the moments, and returns (local, head, inner_step, tokens), or None when there is nothing sound to
        restore: the moments then start from zero, which costs some steps and nothing else. A file that is not sound is
        put aside, with a warning."""
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                steps = json.loads(metadata["steps"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                local = tensors["local"].numpy()
                found = local, metadata["head"], int(metadata["inner_step"]), int(metadata["tokens"])
            if not isinstance(steps, dict) or not all(map(is_finite_number, steps.values())):
                raise ValueError("how many steps each parameter has made is not told")
            if not self.restore(tensors, steps):
                raise ValueError("the moments are not finite, or of another model")
        except OSError as error:
            put_aside(path, error.strerror or str(error))
        except KeyError as error:
            put_aside(path, f"{error} is missing")
        except (SafetensorError, ValueError) as error:
            put_aside(path, str(error))
        else:
            return found
        return None


def is_finite_number(value: object) -> bool:
    """Returns whether a value of JSON is a number, and finite."""
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def put_aside(path: Path, reason: str) -> None:
    """Moves a file of inner state that cannot be used out of the way of the next one. The one that was put aside before
    it, if any, is deleted: it may be as large as four models."""
    aside = path.with_name(path.name + DAMAGED)
    try:
        os.replace(path, aside)
    except OSError as error:
        log.warning("inner state: %s cannot be used (%s), nor moved (%s)", path, reason, error.strerror)
    else:
        log.warning("inner state: %s moved to %s: %s; the moments start from zero", path, aside, reason)
