"""What inner steps come to; with a swarm around them: ``test_swarm``."""

from __future__ import annotations

import math

import pytest

from p2p_diloco.learn.inner_steps import InnerSteps
from p2p_diloco.peer.control import InnerStep


def counted(steps: InnerSteps) -> tuple[int, int, int]:
    return steps.tokens, steps.tokens_since_theta, steps.tokens_this_step


def test_tokens_are_counted_since_joining_since_theta_and_since_the_outer_step() -> None:
    steps = InnerSteps()
    steps.begin(0.0)
    for _ in range(3):
        steps.ended(2.0, 10, 1.0)
    assert counted(steps) == (30, 30, 30)
    steps.moved(kept=True)
    assert counted(steps) == (30, 30, 0)
    steps.ended(2.0, 10, 2.0)
    assert counted(steps) == (40, 40, 10)
    steps.moved(kept=False)
    assert counted(steps) == (40, 0, 0)


def test_what_an_earlier_process_has_trained_on_counts_since_theta() -> None:
    steps = InnerSteps()
    steps.resume(70)
    steps.ended(2.0, 10, 1.0)
    assert counted(steps) == (10, 80, 80)


def test_what_is_told_of_an_inner_step() -> None:
    steps = InnerSteps()
    steps.begin(100.0)
    steps.ended(3.0, 10, 102.0)
    steps.ended(2.5, 30, 106.0)
    told = InnerStep(inner_step=2, planned=5, step_s=3.0, loss=2.5, tokens=40, tokens_per_s=10.0)
    assert steps.line(2, 5) == told
    assert (steps.loss, steps.tokens_per_s) == (2.5, 10.0)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_not_told(loss: float) -> None:
    steps = InnerSteps()
    assert steps.line(0, 5).loss is None
    steps.ended(loss, 10, 1.0)
    assert steps.line(1, 5).loss is None
