"""A trainer's handle on the swarm, against a network process that follows a script: what is counted, what is lost."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from p2p_diloco.core.codec import Vector
from p2p_diloco.core.config import PeerConfig
from p2p_diloco.core.errors import NetworkError, Stopped, UsageError
from p2p_diloco.learn.parameters import write_parameters
from p2p_diloco.learn.process import NetworkHandle
from p2p_diloco.learn.swarm import Swarm
from p2p_diloco.peer.control import (
    Begin,
    Evaluated,
    Failed,
    InnerStep,
    Leave,
    Moved,
    News,
    OuterResult,
    OuterStep,
    Stall,
)
from tests.support.scripted import TOKENS, ScriptedNetwork, head_at, joined, outcome, scripted_manifest
from tests.support.small_models import llama, vector_of

MANIFEST = scripted_manifest()


@dataclass
class Trainer:
    """One that has begun, at theta of seed 0; learning adds something to every parameter."""

    network: ScriptedNetwork
    swarm: Swarm
    model: torch.nn.Module

    def learn(self, inner_steps: int = 1) -> None:
        for _ in range(inner_steps):
            self.change()
            self.swarm.report(2.5, TOKENS)

    @torch.no_grad()
    def change(self) -> None:
        for parameter in self.model.parameters():
            parameter.add_(0.25)

    def outer_step(self, result: OuterResult, **choices: Any) -> OuterResult:
        self.network.outcomes.append(result)
        return self.swarm.outer_step(self.model, **choices)

    @property
    def parameters(self) -> Vector:
        return vector_of(self.model)

    def hear_news(self, **news: Any) -> None:
        """Returns when the trainer knows them."""
        self.network.say(News(**{"closes_in_s": None, "behind": False, **news}))
        self.network.say(Moved(step=0, head=""))
        self.swarm._network.wait(Moved)


@contextmanager
def training(folder: Path, *, bound: bool = True, **network_choices: Any) -> Iterator[Trainer]:
    """``bound``: as on a CPU, where the model's parameters lie in shared memory; else as on an accelerator."""
    network = ScriptedNetwork(MANIFEST, **network_choices)
    network.theta[:] = vector_of(llama(0))
    model = llama(1)
    with joined(network, MANIFEST, folder) as swarm:
        if bound:
            swarm.load_into(model)
        else:
            swarm.begin()
            write_parameters(model, swarm.local)
        yield Trainer(network, swarm, model)


@pytest.fixture(params=[True, False], ids=["bound", "copied"])
def trainer(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Trainer]:
    with training(tmp_path, bound=request.param) as one:
        yield one


# -- beginning ---------------------------------------------------------------------------------------------------------


def test_training_begins_from_theta_where_the_peer_stands(tmp_path: Path) -> None:
    with training(tmp_path, step=3, evaluate=True) as one:
        swarm = one.swarm
        assert np.array_equal(one.parameters, one.network.theta)
        assert np.array_equal(swarm.local, one.network.theta)
        assert (swarm.step, swarm.head, swarm.inner_step, swarm.planned) == (3, head_at(3), 0, 4)
        assert (swarm.tokens, swarm.tokens_since_theta, swarm.tokens_this_step, swarm.tokens_per_s) == (0, 0, 0, 0.0)
        assert swarm.folder == tmp_path
        assert swarm.maddrs == ["/ip4/127.0.0.1/tcp/1"]
        assert one.network.lines(Begin) == [Begin(planned=4)]
        assert swarm.evaluate_now
        swarm.evaluated(2.25, 640, 1.5)
        assert not swarm.evaluate_now
        swarm.evaluated(float("inf"), 640, 1.5)
        one.outer_step(outcome(4))
        told = Evaluated(step=3, held_out_loss=2.25, tokens=640, seconds=1.5)
        assert one.network.lines(Evaluated) == [told, replace(told, held_out_loss=None)]


def test_a_model_on_the_cpu_learns_in_shared_memory(tmp_path: Path) -> None:
    with training(tmp_path) as one:
        one.change()
        assert np.array_equal(one.network.local, one.network.theta + np.float32(0.25))


def test_another_model_is_refused_and_so_is_one_before_theta_is_here(tmp_path: Path) -> None:
    network = ScriptedNetwork(MANIFEST)
    with joined(network, MANIFEST, tmp_path) as swarm:
        with pytest.raises(UsageError, match="not the run's: its parameters have other names or shapes"):
            swarm.load_into(llama(num_hidden_layers=1))
        swarm.peer_id = ""
        with pytest.raises(RuntimeError, match="wait_for_state comes before"):
            swarm.begin()


# -- outer steps -------------------------------------------------------------------------------------------------------

COMMITTED = outcome(1)
ADOPTED = outcome(1, committed=False, adopted=True, reason="behind")
KEPT = replace(ADOPTED, kept=True)
LEFT_OUT = outcome(1, kept=True)
DIVERGED = replace(ADOPTED, reason="diverged")
FAILED = outcome(0, committed=False, reason="no leader")
ALONE = outcome(0, committed=False, reason="alone")


@pytest.mark.parametrize(
    ("result", "since_theta", "this_step"),
    [
        (COMMITTED, 0, 0),
        (ADOPTED, 0, 0),
        (DIVERGED, 0, 0),
        (KEPT, 3 * TOKENS, 0),
        (LEFT_OUT, 3 * TOKENS, 0),
        (FAILED, 3 * TOKENS, 3 * TOKENS),
        (ALONE, 3 * TOKENS, 3 * TOKENS),
    ],
    ids=["committed", "adopted", "diverged", "kept", "left out", "failed", "alone"],
)
def test_what_a_contribution_stands_for(
    trainer: Trainer, result: OuterResult, since_theta: int, this_step: int
) -> None:
    """Tokens and parameters go together: what is still in the parameters is offered again, with all its tokens."""
    swarm = trainer.swarm
    trainer.learn(3)
    assert (swarm.inner_step, swarm.tokens_since_theta, swarm.tokens_this_step) == (3, 3 * TOKENS, 3 * TOKENS)
    learned = trainer.parameters
    theta = np.full_like(learned, 7.0)
    trainer.network.becomes = theta
    found = trainer.outer_step(result)
    assert found.moved == result.moved
    assert np.array_equal(trainer.parameters, learned if since_theta else theta)
    assert (swarm.step, swarm.head, swarm.inner_step) == (result.step, result.head, 0)
    assert (swarm.tokens_since_theta, swarm.tokens_this_step) == (since_theta, this_step)

    trainer.learn(2)
    assert (swarm.inner_step, swarm.tokens_this_step) == (2, this_step + 2 * TOKENS)
    offered = trainer.parameters
    trainer.outer_step(outcome(swarm.step + 1))
    first, second = trainer.network.lines(OuterStep)
    assert (first.tokens, second.tokens) == (3 * TOKENS, since_theta + 2 * TOKENS)
    assert trainer.network.offered == [learned.tobytes(), offered.tobytes()]
    assert swarm.tokens_since_theta == 0
    assert swarm.tokens == 5 * TOKENS


def test_a_contribution_may_be_dropped_and_one_without_tokens_weighs_something(trainer: Trainer) -> None:
    trainer.outer_step(outcome(1), dropped=True)
    trainer.learn()
    trainer.outer_step(outcome(2))
    assert [(line.tokens, line.dropped) for line in trainer.network.lines(OuterStep)] == [
        (1, True),
        (TOKENS, False),
    ]


def test_as_many_inner_steps_as_the_last_outer_step_planned(trainer: Trainer) -> None:
    trainer.learn(3)
    assert not trainer.swarm.outer_step_due()
    trainer.learn()
    assert trainer.swarm.outer_step_due()
    trainer.outer_step(outcome(1, planned=2))
    assert trainer.swarm.planned == 2
    trainer.learn()
    assert not trainer.swarm.outer_step_due()
    trainer.learn()
    assert trainer.swarm.outer_step_due()
    trainer.outer_step(outcome(2, evaluate=True))
    said = [(line.inner_step, line.planned) for line in trainer.network.lines(InnerStep)]
    assert said == [(1, 4), (2, 4), (3, 4), (4, 4), (1, 2), (2, 2)]
    assert trainer.swarm.evaluate_now


@pytest.mark.parametrize("result", [COMMITTED, ADOPTED, KEPT, FAILED], ids=["committed", "adopted", "kept", "failed"])
@pytest.mark.parametrize("news", [{"closes_in_s": 0.0}, {"behind": True}], ids=["closing", "behind"])
def test_news_make_an_outer_step_due_and_are_none_after_it(
    trainer: Trainer, news: dict[str, Any], result: OuterResult
) -> None:
    trainer.learn()
    assert not trainer.swarm.outer_step_due()
    trainer.hear_news(**news)
    assert trainer.swarm.outer_step_due()
    trainer.outer_step(result)
    trainer.learn()
    assert not trainer.swarm.outer_step_due()


def test_news_may_be_taken_back_and_a_round_that_closes_late_is_no_hurry(trainer: Trainer) -> None:
    trainer.learn()
    trainer.hear_news(closes_in_s=0.0, behind=True)
    trainer.hear_news()
    assert not trainer.swarm.outer_step_due()
    trainer.hear_news(closes_in_s=1e6)
    assert not trainer.swarm.outer_step_due()


def test_speeds_are_those_of_the_last_inner_steps_without_what_came_between(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now_s=float(math.ceil(time.monotonic())))  # a clock is never set back
    monkeypatch.setattr("p2p_diloco.learn.swarm.time", SimpleNamespace(monotonic=lambda: clock.now_s))
    network, swarm = trainer.network, trainer.swarm

    def learn(*seconds: float) -> None:
        for lasted_s in seconds:
            clock.now_s += lasted_s
            trainer.learn()

    trainer.outer_step(outcome(1))
    learn(1.0, 3.0)
    assert swarm.tokens_per_s == TOKENS / 2
    clock.now_s += 50.0
    trainer.outer_step(outcome(2))
    clock.now_s += 50.0
    swarm.evaluated(2.0, 64, 50.0)
    learn(1.0)
    assert swarm.tokens_per_s == TOKENS
    result = trainer.outer_step(outcome(3))
    assert result.stall_s == 0.0
    assert [line.step_s for line in network.lines(InnerStep)] == [1.0, 2.0, 1.0]
    assert [line.tokens_per_s for line in network.lines(InnerStep)] == [TOKENS, TOKENS / 2, TOKENS]
    assert [line.pace for line in network.lines(OuterStep)][1:] == [2 * TOKENS / 4, 3 * TOKENS / 5]
    trainer.outer_step(outcome(4))
    assert [(line.step, line.seconds) for line in network.lines(Stall)][1:3] == [(2, 50.0), (3, 0.0)]


def test_a_loss_that_is_not_finite_is_told_as_none(trainer: Trainer) -> None:
    trainer.swarm.report(float("nan"), TOKENS)
    trainer.learn()
    trainer.outer_step(outcome(1))
    assert [(line.loss, line.tokens) for line in trainer.network.lines(InnerStep)] == [
        (None, TOKENS),
        (2.5, 2 * TOKENS),
    ]


def test_the_run_ends_with_its_last_outer_step(trainer: Trainer) -> None:
    trainer.outer_step(outcome(9))
    assert not trainer.swarm.done
    trainer.outer_step(outcome(10))
    assert trainer.swarm.done


# -- parameters that come and go ---------------------------------------------------------------------------------------


def test_what_an_earlier_start_has_learned_is_offered_with_what_this_one_learns(trainer: Trainer) -> None:
    saved = trainer.parameters + np.float32(1.0)
    trainer.swarm.restore_local(saved, trainer.model, inner_step=2, tokens=2 * TOKENS)
    assert np.array_equal(trainer.parameters, saved)
    assert (trainer.swarm.inner_step, trainer.swarm.tokens_since_theta) == (2, 2 * TOKENS)
    assert trainer.swarm.tokens_this_step == 2 * TOKENS
    trainer.learn()
    assert not trainer.swarm.outer_step_due()
    trainer.learn()
    assert trainer.swarm.outer_step_due()
    trainer.outer_step(outcome(1))
    assert [line.inner_step for line in trainer.network.lines(InnerStep)] == [3, 4]
    assert [line.tokens for line in trainer.network.lines(OuterStep)] == [4 * TOKENS]
    assert np.array_equal(np.frombuffer(trainer.network.offered[0], np.float32), saved + np.float32(0.25) * 2)


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_is_theta_for_a_while(trainer: Trainer, fails: bool) -> None:
    trainer.learn(2)
    learned = trainer.parameters
    theta = trainer.swarm.theta.copy()

    def look() -> None:
        with trainer.swarm.theta_in(trainer.model):
            assert np.array_equal(trainer.parameters, theta)
            if fails:
                raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            look()
    else:
        look()
    assert np.array_equal(trainer.parameters, learned)
    assert trainer.swarm.tokens_since_theta == 2 * TOKENS
    trainer.outer_step(outcome(1))
    assert trainer.network.offered == [learned.tobytes()]


def test_local_is_what_the_model_is_when_it_is_read(trainer: Trainer) -> None:
    trainer.learn()
    trainer.swarm.read_local(trainer.model)
    assert np.array_equal(trainer.swarm.local, trainer.parameters)


def test_theta_is_not_the_trainers_to_write(trainer: Trainer) -> None:
    with pytest.raises(ValueError, match="read-only"):
        trainer.swarm.theta[0] = 1.0


# -- the network process fails -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("exit_code", "kind"), [(1, NetworkError), (2, UsageError)])
def test_what_ended_the_network_process_ends_the_trainer(tmp_path: Path, exit_code: int, kind: type[Exception]) -> None:
    with training(tmp_path) as one:
        one.network.last_words = Failed(message="port 7 is taken", exit_code=exit_code)
        one.learn()
        with pytest.raises(kind, match="port 7 is taken"):
            one.swarm.outer_step(one.model)


def test_it_is_told_at_the_next_inner_step_at_the_latest(tmp_path: Path) -> None:
    with training(tmp_path) as one:
        one.hear_news()
        one.network.say(Failed(message="disk full", exit_code=1))
        one.network.say(News(closes_in_s=1.0, behind=False))
        while one.swarm._network.closes_s is None:
            pass
        with pytest.raises(NetworkError, match="disk full"):
            one.learn()
        with pytest.raises(NetworkError, match="disk full"):
            one.learn()


def test_a_seed_follows_until_its_network_process_fails(tmp_path: Path) -> None:
    network = ScriptedNetwork(MANIFEST)
    with joined(network, MANIFEST, tmp_path) as swarm:
        for step in (5, 6):
            network.say(Moved(step=step, head=head_at(step)))
        network.say(Failed(message="disk full", exit_code=1))
        with pytest.raises(NetworkError, match="disk full"):
            swarm.serve()
        assert (swarm.step, swarm.head) == (6, head_at(6))


def test_a_run_that_is_not_found(tmp_path: Path) -> None:
    network = ScriptedNetwork(MANIFEST)
    network.say(Failed(message="no run there", exit_code=2))
    with pytest.raises(UsageError, match="no run there"), joined(network, MANIFEST, tmp_path):
        pass
    assert network.lines(Leave) == [Leave(reason="UsageError")]


def test_what_is_no_address_is_said_before_anything_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NetworkHandle, "start", None)
    with pytest.raises(UsageError, match=r"address 'garbage': it begins with no '/'"):
        Swarm.join(PeerConfig(folder=tmp_path / "me", initial_peers=("garbage",)))
    assert list(tmp_path.iterdir()) == []


def test_nothing_of_the_shared_memory_is_left_open(tmp_path: Path) -> None:
    network = ScriptedNetwork(MANIFEST)
    with joined(network, MANIFEST, tmp_path):
        os.fstat(network.memory)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(network.memory)


@pytest.mark.parametrize(
    ("step", "error", "said"),
    [
        (10, None, "done"),
        (9, None, "asked"),
        (9, Stopped("stopped"), "asked"),
        (10, Stopped("stopped"), "asked"),
        (10, NetworkError("x"), "NetworkError"),
    ],
)
def test_who_leaves_says_why(tmp_path: Path, step: int, error: Exception | None, said: str) -> None:
    """A reader of the log tells the end of the run, after 10 outer steps, from Ctrl+C."""
    with suppress(Stopped, NetworkError), training(tmp_path, step=step) as one:
        network = one.network
        if error is not None:
            raise error
    assert network.lines(Leave) == [Leave(reason=said)]
    assert not network.killed
