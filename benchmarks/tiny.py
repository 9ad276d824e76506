"""The demo's model, in a swarm and in plain training processes that know of no network."""

from __future__ import annotations

import time
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.loopback import Log, Run, run_swarm
from benchmarks.workers import Workers
from p2p_diloco.core.config import cache_folder
from p2p_diloco.core.event import InnerStepEnded, ThetaEvaluated, TrainerStalled, latest
from p2p_diloco.core.interruption import Stop
from p2p_diloco.core.runfile import RunSpec
from p2p_diloco.learn.architecture import resolve_config
from p2p_diloco.learn.data import open_corpus
from p2p_diloco.learn.inner import InnerOptimizer, Place
from p2p_diloco.learn.model import build_model
from p2p_diloco.learn.swarm import Swarm
from p2p_diloco.learn.tokenizer import open_tokenizer
from p2p_diloco.learn.train import TrainConfig, train

RUN_FILE = Path(__file__).parents[1] / "peers" / "runs" / "tiny.toml"
DEMO = RunSpec.load(RUN_FILE)
PEERS = 4
OUTER_STEPS = 5
LIMIT_S = 300.0
PLAIN_S = 15.0


def shortened() -> RunSpec:
    """The demo with fewer outer steps."""
    return DEMO.model_copy(update={"outer": DEMO.outer.model_copy(update={"steps": OUTER_STEPS})})


@cache
def swarm_run() -> Run:
    """Several cases look at one swarm."""
    return run_swarm(shortened(), train_in_swarm, peers=PEERS, limit_s=LIMIT_S)


def train_in_swarm(swarm: Swarm) -> None:
    train(swarm, TrainConfig(device="cpu", threads=1), Stop())


def swarm_tokens_per_s(run: Run) -> tuple[float, float]:
    """All peers together, from the end of the first outer step to the end of the last: in whole cycles of inner steps,
    outer step and evaluation; and in the inner steps alone."""
    in_cycles, in_inner_steps = 0.0, 0.0
    for log in run.logs:
        ends = [i for i, event in enumerate(log) if isinstance(event, TrainerStalled)]
        first, last = ends[0], ends[-1]
        tokens = tokens_until(log, last) - tokens_until(log, first)
        cycle = log[first + 1 : last + 1]
        other_s = sum(event.seconds for event in cycle if isinstance(event, TrainerStalled | ThetaEvaluated))
        seconds = log[last].mono_s - log[first].mono_s
        in_cycles += tokens / seconds
        in_inner_steps += tokens / (seconds - other_s)
    return in_cycles, in_inner_steps


def tokens_until(log: Log, i: int) -> int:
    """That the peer had trained on, by its last word before event ``i``."""
    inner = latest(log[:i], InnerStepEnded)
    return inner.tokens if inner else 0


def plain_tokens_per_s() -> float:
    """All processes together; every one trains alone, on the same data, with the same inner optimizer."""
    with Workers(LIMIT_S) as workers:
        for i in range(PEERS):
            workers.start(train_alone, f"plain{i}")
        workers.receive_all()
        workers.send_all(PLAIN_S)
        return float(sum(workers.receive_all()))


def train_alone(pipe: Connection, name: str) -> None:
    torch.set_num_threads(1)
    spec = shortened()
    corpus = open_corpus(spec.data, base=RUN_FILE.parent, cache=cache_folder())
    model = build_model(
        resolve_config(spec.model, base=RUN_FILE.parent, vocab_size=open_tokenizer("").vocab_size), seed=spec.seed
    )
    inner = InnerOptimizer(model, spec, torch.device("cpu"))
    inner.step(corpus, peer_id=name, at=Place(0, 0))
    pipe.send("ready")
    seconds, step = pipe.recv(), 0
    started_s = time.monotonic()
    while time.monotonic() - started_s < seconds:
        step += 1
        inner.step(corpus, peer_id=name, at=Place(step, step))
    pipe.send(step * spec.tokens_per_inner_step / (time.monotonic() - started_s))
