"""How many inner steps, and until when, against literal expectations."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p_diloco.core.pace import Progress, outer_step_due, planned_steps, ready_in_s


@pytest.mark.parametrize(
    ("remaining", "step_s", "since_s", "gather_s", "expected"),
    [
        (0, 2.0, 0.0, 5.0, 0.0),
        (-3, 2.0, 0.0, 5.0, 0.0),
        (3, 2.0, 0.0, 6.0, 6.0),  # finishes just in time
        (3, 2.0, 0.0, 5.99, 4.0),  # stops one step before
        (3, 2.0, 1.5, 5.99, 4.5),
        (9, 2.0, 0.0, 2.0, 2.0),
        (9, 2.0, 0.0, 1.99, 2.0),  # not before a step ends
        (9, 2.0, 7.0, 5.0, 4.0),  # a step that takes longer than usual ends any moment
        (9, 100.0, 30.0, 5.0, 70.0),
        (9, 0.0, 0.0, 5.0, 5.0),  # no step measured yet
        (0, 0.0, 0.0, 5.0, 0.0),  # and none needed
    ],
)
def test_ready_in(remaining: int, step_s: float, since_s: float, gather_s: float, expected: float) -> None:
    ready = ready_in_s(remaining_steps=remaining, step_s=step_s, since_step_s=since_s, gather_s=gather_s)
    assert ready == expected
    progress = Progress(inner_step=4, planned=4 + remaining, step_s=step_s, reported_s=50.0)
    assert progress.ready_in_s(50.0 + since_s, gather_s) == expected


@given(
    planned=st.integers(1, 20),
    done=st.integers(0, 19),
    step_s=st.integers(1, 8),
    since_s=st.integers(0, 7),
    gather_s=st.integers(0, 60),
)
def test_a_trainer_is_ready_when_it_said(planned: int, done: int, step_s: int, since_s: int, gather_s: int) -> None:
    """What matchmaking is told agrees with what the training loop does."""
    done, since_s = min(done, planned - 1), min(since_s, step_s)
    told_s = ready_in_s(
        remaining_steps=planned - done, step_s=float(step_s), since_step_s=float(since_s), gather_s=float(gather_s)
    )
    now_s = step_s - since_s
    done += 1
    while not outer_step_due(
        inner_step=done, planned=planned, step_s=step_s, closes_in_s=gather_s - now_s, behind=False
    ):
        now_s += step_s
        done += 1
    assert told_s == now_s


@pytest.mark.parametrize(
    ("inner_step", "closes_in_s", "behind", "due"),
    [
        (10, None, False, True),
        (11, None, False, True),
        (9, None, False, False),
        (9, 2.0, False, False),  # another step ends just in time
        (9, 1.99, False, True),
        (9, -5.0, False, True),
        (1, 0.0, False, True),
        (0, 0.0, False, False),  # nothing to offer
        (0, None, True, True),
        (1, 100.0, True, True),
    ],
)
def test_outer_step_due(inner_step: int, closes_in_s: float | None, behind: bool, due: bool) -> None:
    assert outer_step_due(inner_step=inner_step, planned=10, step_s=2.0, closes_in_s=closes_in_s, behind=behind) is due


@pytest.mark.parametrize(
    ("mine", "others", "planned"),
    [
        (10.0, [], 100),
        (0.0, [10.0, 20.0], 100),  # I do not know my own speed
        (10.0, [0.0, 0.0], 100),  # nor that of anybody else
        (10.0, [10.0, 10.0], 100),
        (20.0, [10.0, 10.0], 100),  # H is what the fastest makes
        (5.0, [10.0, 10.0], 50),
        (2.5, [10.0, 5.0], 25),
        (9.0, [10.0], 100),  # nearly as fast
        (8.9, [10.0], 89),
        (0.001, [10.0, 10.0], 1),
        (10.0, [10.0, 10.0, 1e9], 25),  # as if it were four times as fast as most
        (10.0, [1e300], 25),
        (10.0, [1e-300, 1e-300, 1e-300], 100),
        (10.0, [10.0, 0.0, 40.0], 25),
    ],
)
def test_planned_steps(mine: float, others: list[float], planned: int) -> None:
    assert planned_steps(100, mine, others) == planned


speeds = st.floats(0, 1e300, allow_nan=False)


@given(inner_steps=st.integers(1, 10_000), mine=speeds, others=st.lists(speeds, max_size=8))
def test_whatever_others_claim_a_peer_plans_one_to_h_steps(inner_steps: int, mine: float, others: list[float]) -> None:
    assert 1 <= planned_steps(inner_steps, mine, others) <= inner_steps


@given(
    honest=st.lists(st.floats(1.0, 2.0), min_size=3, max_size=9),
    claims=st.lists(st.sampled_from([0.0, 1e-9, 50.0, 1e9]), max_size=1),
)
def test_one_false_claim_makes_nobody_four_times_slower_than_without_it(
    honest: list[float], claims: list[float]
) -> None:
    for i, mine in enumerate(honest):
        others = honest[:i] + honest[i + 1 :]
        without, with_claim = planned_steps(1000, mine, others), planned_steps(1000, mine, others + claims)
        assert with_claim >= without / 8
        assert with_claim <= max(without, 1000 * mine / max(honest) + 1) or mine >= 0.9 * max(honest)


@given(steps=st.integers(50, 1000), speed=st.floats(1.0, 1000.0), slower=st.sampled_from([1.0, 0.5, 0.25]))
def test_who_plans_by_speed_finishes_with_the_fastest(steps: int, speed: float, slower: float) -> None:
    planned = planned_steps(steps, speed * slower, [speed, speed])
    assert planned / slower == pytest.approx(steps, abs=0.5 / slower)
