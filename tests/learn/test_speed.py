"""How fast a trainer is; with a swarm around it: ``test_swarm``."""

from __future__ import annotations

from p2p_diloco.learn.speed import PACE_ROUNDS, SPEED_STEPS, Speed


def test_the_speed_is_that_of_the_last_inner_steps() -> None:
    speed = Speed()
    assert (speed.step_s, speed.ended_s(7.0)) == (0.0, 7.0)
    speed.begin(10.0, tokens=0)
    assert (speed.step_s, speed.ended_s(11.0)) == (0.0, 10.0)
    for k in range(SPEED_STEPS):
        speed.step_ended(12.0 + 2 * k)
    assert speed.step_s == 2.0
    for k in range(1, SPEED_STEPS + 1):
        speed.step_ended(10.0 + 2 * SPEED_STEPS + k)
    assert speed.step_s == 1.0, "those before have been forgotten"
    speed.begin(500.0, tokens=0)
    assert speed.step_s == 0.0


def test_the_pace_is_that_of_the_last_outer_steps_without_what_came_between() -> None:
    speed = Speed()
    speed.begin(0.0, tokens=0)
    assert speed.offered(0.0, tokens=0) == 0.0, "no time has passed"
    paces = []
    for k in range(PACE_ROUNDS + 1):
        speed.begin(100.0 * k, tokens=60 * k)
        paces.append(speed.offered(100.0 * k + (2.0 if k else 10.0), tokens=60 * (k + 1)))
    assert paces[0] == 6.0
    assert paces[1] == 120 / 12.0
    assert paces[-1] == 30.0, "the slow one at the beginning has been forgotten"
