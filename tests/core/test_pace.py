"""How many inner steps, and until when, against literal expectations."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p_diloco.core.pace import (
    Phase,
    Progress,
    claimed_steps,
    outer_step_due,
    planned_steps,
    ready_in_s,
    second_most_steps,
)


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
    ("trained_s", "second", "step_s", "planned"),
    [
        (100.0, 100, 1.0, 100),
        (100.0, 100, 0.5, 100),  # H is what the fastest make
        (100.0, 100, 2.0, 50),
        (100.0, 100, 4.0, 25),
        (100.0, 100, 1.1, 100),  # nearly as fast
        (100.0, 100, 1.12, 89),
        (100.0, 100, 1e6, 1),
        (50.0, 50, 1.0, 100),  # all were stopped half way
        (50.0, 50, 2.0, 50),
        (100.0, 50, 2.0, 100),  # the second fastest is as slow as I am
        (100.0, 300, 2.0, 50),  # it has kept the steps of several rounds
        (0.0, 100, 1.0, 100),  # not known
        (100.0, 0, 1.0, 100),
        (100.0, 100, 0.0, 100),
    ],
)
def test_planned_steps(trained_s: float, second: int, step_s: float, planned: int) -> None:
    assert planned_steps(100, trained_s=trained_s, second=second, step_s=step_s) == planned


@pytest.mark.parametrize(
    ("weights", "second"), [([], 0), ([800], 100), ([800, 400], 50), ([8, 800, 400], 50), ([800, 800, 8], 100)]
)
def test_second_most_steps(weights: list[int], second: int) -> None:
    assert second_most_steps(weights, 8) == second


@given(
    inner_steps=st.integers(1, 10_000),
    trained_s=st.floats(0, 1e300),
    step_s=st.floats(0, 1e300),
    second=st.integers(0, 2**60),
)
def test_whatever_others_claim_a_peer_plans_one_to_h_steps(
    inner_steps: int, trained_s: float, step_s: float, second: int
) -> None:
    assert 1 <= planned_steps(inner_steps, trained_s=trained_s, second=second, step_s=step_s) <= inner_steps


@given(
    made=st.lists(st.integers(1, 1000), min_size=2, max_size=9),
    claim=st.integers(1, 2**60),
    step_s=st.floats(0.1, 10.0),
)
def test_one_false_weight_takes_nobody_below_what_the_fastest_true_one_makes(
    made: list[int], claim: int, step_s: float
) -> None:
    """However large or small it is; and not at all where the two fastest make as many."""
    without = planned_steps(1000, trained_s=1000.0, second=max(made), step_s=step_s)
    claimed = second_most_steps([*made, claim], 1)
    assert planned_steps(1000, trained_s=1000.0, second=claimed, step_s=step_s) >= without
    assert second_most_steps([*made, max(made), claim], 1) == max(made)


def simulated(steps_s: Sequence[float], phases: int, *, inner_steps: int = 100, noise: float = 0.0) -> list[list[int]]:
    """What peers plan whose inner steps take ``steps_s``, where the first that is ready calls the others, and these
    stop at the last step that ends within 2 s. A row for each phase; a step time of 0: the peer has left."""
    generator = random.Random(0)
    peers = [Phase(inner_steps=inner_steps) for _ in steps_s]
    for peer in peers:
        peer.go_on(0.0, moved=True)
    planned, now_s = [], 0.0
    for _ in range(phases):
        took_s = [step_s * (1 + noise * generator.uniform(-1, 1)) for step_s in steps_s]
        called_s = now_s + min(peer.planned * each_s for peer, each_s in zip(peers, took_s))
        ended_s, made = [], []
        for peer, each_s in zip(peers, took_s):
            steps = max(min(peer.planned, int((called_s + 2.0 - now_s) // each_s)), 1)
            made.append(steps)
            ended_s.append(now_s + steps * each_s)
            peer.end(ended_s[-1], called_s if ended_s[-1] > called_s else None, steps * each_s)
        now_s = max(ended_s) + 1.0
        for peer, each_s in zip(peers, took_s):
            peer.plan(second_most_steps([8 * steps for steps in made], 8), each_s)
            peer.go_on(now_s, moved=True)
        planned.append([peer.planned for peer in peers])
    return planned


@pytest.mark.parametrize("speeds", [(1, 1, 1, 1), (1, 1, 0.5), (1, 1, 0.5, 0.25, 0.1), (2, 2, 1, 0.7), (1, 0.95, 0.5)])
def test_peers_of_uneven_speed_come_to_plan_in_proportion(speeds: tuple[float, ...]) -> None:
    for row in simulated([1.0 / speed for speed in speeds], 8)[2:]:
        assert row == pytest.approx([100 if s >= 0.9 * max(speeds) else 100 * s / max(speeds) for s in speeds], abs=2.1)


def test_the_only_fastest_one_calls_the_others_whatever_they_plan() -> None:
    """It alone is no measure: one peer that is fast, or says so, makes nobody plan fewer."""
    assert simulated([1.0, 2.0, 2.0, 4.0], 8)[-1] == pytest.approx([100, 100, 100, 50], abs=2)


def test_when_the_fastest_leave_the_others_make_all() -> None:
    before = simulated([1.0, 1.0, 2.0, 2.0], 5)[-1]
    assert before == pytest.approx([100, 100, 50, 50], abs=1)
    peers = [Phase(inner_steps=100) for _ in range(2)]
    for peer in peers:
        peer.planned = 50
        peer.go_on(0.0, moved=True)
        peer.end(100.0, None, 100.0)
        peer.plan(50, 2.0)
    assert [peer.planned for peer in peers] == [100, 100]


def test_noise_of_a_shared_processor_changes_little() -> None:
    rows = simulated([1.0, 1.0, 1.0, 2.0], 50, noise=0.04)[3:]
    assert {steps for row in rows for steps in row[:3]} == {100}
    assert all(44 <= row[3] <= 56 for row in rows)


def test_one_liar_that_calls_early_makes_nobody_plan_fewer() -> None:
    """All are stopped early, and plan in proportion to what the second fastest made meanwhile."""
    peer = Phase(inner_steps=100)
    peer.go_on(0.0, moved=True)
    peer.end(6.0, 1.0, 6.0)
    peer.plan(6, 1.0)
    assert peer.planned == 100


def test_a_round_that_was_called_before_anybody_was_ready_halves_a_plan_at_most() -> None:
    peer = Phase(inner_steps=4)
    peer.go_on(0.0, moved=True)
    peer.end(4.0, 0.0, 4.0)
    peer.plan(4, 1.0)
    assert peer.planned == 2


def test_what_came_before_the_first_head_is_not_known() -> None:
    """A trainer may come back with inner steps that it made before."""
    peer = Phase(inner_steps=100)
    peer.end(5.0, None, 5.0)
    peer.plan(100, 1.0)
    assert peer.planned == 100
    peer.go_on(10.0, moved=False)
    peer.end(20.0, None, 10.0)
    peer.plan(100, 1.0)
    assert peer.planned == 100
    peer.go_on(20.0, moved=True)
    peer.end(60.0, None, 40.0)
    peer.plan(100, 1.0)
    assert peer.planned == 40


@given(claims=st.lists(st.floats(0, 1e300), max_size=4), step_s=st.floats(0.1, 100.0))
def test_no_claim_makes_anybody_plan_fewer(claims: list[float], step_s: float) -> None:
    def plan(claimed: int) -> int:
        peer = Phase(inner_steps=100)
        peer.go_on(0.0, moved=True)
        peer.end(100.0, None, 100.0)
        peer.plan(100, step_s, claimed)
        return peer.planned

    assert plan(1) <= plan(claimed_steps(100, 8 / step_s, claims)) <= 100


def test_steps_from_before_it_joined_say_nothing_about_the_time() -> None:
    peer = Phase(inner_steps=100)
    peer.go_on(0.0, moved=True)
    peer.end(10.0, None, 100.0)
    peer.plan(100, 1.0)
    assert peer.planned == 100
    peer.go_on(20.0, moved=True)
    peer.end(120.0, None, 100.0)
    peer.plan(100, 2.0)
    assert peer.planned == 50


def test_time_adds_up_over_rounds_that_fail() -> None:
    peer = Phase(inner_steps=100)
    peer.go_on(0.0, moved=True)
    peer.end(30.0, None, 30.0)
    peer.go_on(50.0, moved=False)
    peer.end(80.0, 70.0, 60.0)
    assert (peer.trained_s, peer.called_s) == (60.0, 50.0)
    peer.plan(60, 2.0)
    assert peer.planned == 50


@pytest.mark.parametrize(
    ("mine", "others", "planned"),
    [
        (10.0, [], 100),
        (0.0, [10.0, 20.0], 100),  # I do not know my own speed
        (10.0, [0.0, 0.0], 100),  # nor that of anybody else
        (5.0, [10.0, 10.0], 50),
        (9.0, [10.0, 10.0], 100),
        (8.9, [10.0], 89),
        (0.001, [10.0, 10.0], 1),
        (10.0, [10.0, 10.0, 1e9], 25),  # as if it were four times as fast as most
    ],
)
def test_claimed_steps(mine: float, others: list[float], planned: int) -> None:
    assert claimed_steps(100, mine, others) == planned


def planned_after(came_s: float, called_s: float, *, step_s: float = 3.0, called_at_s: float | None = None) -> int:
    """What a phase of 10 inner steps plans next: the second fastest made all of them. ``came_s``: when the trainer came
    to the round; ``called_at_s``: when it was called to it; ``called_s``: when the round was called, as it hears."""
    phase = Phase(inner_steps=10)
    phase.go_on(0.0, moved=True)
    phase.end(came_s, called_at_s, came_s)
    phase.wait(called_s)
    phase.plan(10, step_s)
    return phase.planned


def test_who_comes_by_itself_plans_by_when_the_round_was_called() -> None:
    """Whoever has planned 8 steps where there was time for 10 would plan 8 again for ever."""
    assert planned_after(24.0, 24.0) == 8
    assert planned_after(24.0, 30.0) == 10
    assert planned_after(24.0, 12.0) == 8, "a round that was called before does not make the time shorter"
    assert planned_after(30.0, 30.0, step_s=3.75) == 8, "who is slower and comes with the others plans fewer again"


def test_who_was_called_plans_by_that() -> None:
    assert planned_after(32.0, 31.0, called_at_s=30.0, step_s=3.75) == 8


def test_what_was_waited_counts_once() -> None:
    phase = Phase(inner_steps=10)
    phase.go_on(0.0, moved=True)
    phase.end(20.0, None, 20.0)
    phase.wait(24.0)
    phase.wait(30.0)  # another attempt of the same outer step
    assert (phase.trained_s, phase.called_s) == (24.0, 24.0)
