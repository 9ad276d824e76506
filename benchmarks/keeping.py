"""How late the next inner step starts when the inner state is kept: with the write in the way, and beside training.

A model of 150 million parameters, and short batches: an inner step is mostly AdamW, which is what a write gets in the
way of.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks.table import Cell, Table
from p2p_diloco.core.codec import Vector
from p2p_diloco.core.runfile import DataSpec, InnerSpec, ModelSpec, RunSpec
from p2p_diloco.learn.architecture import resolve_config
from p2p_diloco.learn.data import Corpus
from p2p_diloco.learn.inner import INNER_FILE, InnerOptimizer, Place
from p2p_diloco.learn.keeper import Keeper
from p2p_diloco.learn.model import build_model
from p2p_diloco.learn.parameters import bind_parameters, layout_of, read_parameters

VOCABULARY = 32_000
TOKENS = 32
"""In a batch."""
SPEC = RunSpec(
    name="keeping",
    model=ModelSpec(
        config={
            "model_type": "llama",
            "hidden_size": 896,
            "head_dim": 64,
            "intermediate_size": 2400,
            "num_hidden_layers": 12,
            "num_attention_heads": 16,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
        }
    ),  # as small-150m
    data=DataSpec(seq_len=TOKENS),
    inner=InnerSpec(steps=500, batch_size=1),
)
REPEATS = 3
PLAIN_STEPS = 1
"""Before each write."""
MOST_LATE_S = 0.2


@dataclass
class Found:
    """Seconds, and bytes of memory, of one way to write."""

    late_s: list[float] = field(default_factory=list)
    """From the end of an inner step to the start of the next."""
    beside_s: list[float] = field(default_factory=list)
    """Inner steps that were made while the write went on."""
    write_s: list[float] = field(default_factory=list)
    """Beside training: until the first inner step at whose end it had ended."""
    peak_bytes: int = 0


class Trainer:
    """What ``train`` has of it, without a swarm."""

    def __init__(self, folder: Path) -> None:
        config = resolve_config(SPEC.model, base=folder, vocab_size=VOCABULARY)
        model = build_model(config, seed=0)
        self.local: Vector = np.empty(layout_of(model).n, np.float32)
        read_parameters(model, self.local)
        bind_parameters(model, self.local)
        self.inner = InnerOptimizer(model, SPEC, torch.device("cpu"))
        text = np.random.default_rng(0).integers(0, VOCABULARY, 100_000).astype(np.uint16)
        self.corpus = Corpus(train=text, held_out=text[:100], vocab_size=VOCABULARY, fingerprint="")
        self.steps = 0
        self.keeper = Keeper(self.inner, folder / INNER_FILE)
        self.path = folder / INNER_FILE

    def step(self) -> float:
        """Seconds."""
        began_s = time.monotonic()
        self.inner.step(self.corpus, peer_id="me", at=Place(self.steps, self.steps))
        self.steps += 1
        return time.monotonic() - began_s

    def nothing(self) -> None:
        """No write: what an inner step is by itself."""

    def write(self) -> None:
        self.inner.save(self.path, self.local, head="", inner_step=0, tokens=1)

    def begin_moments(self) -> None:
        """As after an outer step: local is theta."""
        self.keeper.begin(self.local, head="", inner_step=0, tokens=0)

    def begin_all(self) -> None:
        """As after a round that failed."""
        self.keeper.begin(self.local, head="", inner_step=0, tokens=1)

    def measure(self, keep: Callable[[], None], found: Found) -> None:
        for _ in range(PLAIN_STEPS):
            self.step()
        forget_peak()
        ended_s = time.monotonic()
        keep()
        found.late_s.append(time.monotonic() - ended_s)
        beside = self.keeper.writing
        found.beside_s.append(self.step())
        self.keeper.check()
        while self.keeper.writing:
            found.beside_s.append(self.step())
            self.keeper.check()
        found.write_s.append(time.monotonic() - ended_s if beside else found.late_s[-1])
        found.peak_bytes = max(found.peak_bytes, peak_bytes())


def main() -> Table:
    """RuntimeError when a write beside training makes the next inner step start more than MOST_LATE_S late."""
    with tempfile.TemporaryDirectory(prefix="p2p-diloco-bench-") as name:
        trainer = Trainer(Path(name))
        ways = {
            "no write": trainer.nothing,
            "in the way": trainer.write,
            "beside training": trainer.begin_moments,
            "beside training, after a failed round": trainer.begin_all,
        }
        found = {way: Found() for way in ways}
        trainer.step()  # allocates the moments
        for _ in range(REPEATS):
            for way, keep in ways.items():
                trainer.measure(keep, found[way])
        trainer.keeper.finish()
    late_s = max(max(found[way].late_s) for way in ways if way.startswith("beside"))
    if late_s > MOST_LATE_S:
        raise RuntimeError(f"the next inner step starts {late_s:.2f} s late, more than {MOST_LATE_S:g} s")
    n, least = len(trainer.local), found["no write"].peak_bytes
    rows: list[tuple[Cell, ...]] = [
        (
            way,
            median(one.late_s),
            max(one.late_s),
            median(one.beside_s),
            max(one.beside_s),
            median(one.write_s),
            (one.peak_bytes - least) / n,
        )
        for way, one in found.items()
    ]
    return Table(
        title=f"The inner state of {n / 1e6:.0f}M parameters is kept: when the next inner step starts",
        columns=("write", "late s", "at most", "inner step s", "at most", "write s", "bytes a parameter"),
        rows=rows,
        notes=(
            f"{REPEATS} writes each, by turns; medians. Inner steps of {TOKENS} tokens: all beside a write,",
            "which is seen to have ended when one of them ends. Bytes: the most memory, above that without a write.",
        ),
    )


def forget_peak() -> None:
    """Linux only."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The most memory since ``forget_peak``."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])
