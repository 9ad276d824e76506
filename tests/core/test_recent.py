"""Waits that follow from recent rounds: against a textbook's median and deviation, and against those that lie."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.recent import LEAST_ROUNDS, LINK_MARGIN, MAX_ANSWERS, SPREADS, WINDOW_ROUNDS, Recent, wait_s

FLOOR_S, CAP_S = 2.0, 10.0
TIMEOUTS = Timeouts(least_wait_s=FLOOR_S, part_s=CAP_S, settle_s=12.0, request_s=11.0)
SECONDS = st.floats(0.0, 100.0)
MEMBERS = st.lists(SECONDS, min_size=1, max_size=6)
ROUNDS = st.lists(MEMBERS, min_size=LEAST_ROUNDS, max_size=WINDOW_ROUNDS)


@given(ROUNDS, st.floats(0.0, 20.0))
def test_a_wait_is_the_median_and_some_deviations(rounds_s: list[list[float]], need_s: float) -> None:
    times_s = np.concatenate(rounds_s)
    deviation_s = np.median(np.abs(times_s - np.median(times_s)))
    usual_s = float(np.median(times_s) + SPREADS * deviation_s)
    waits_s = wait_s(rounds_s, floor_s=FLOOR_S, cap_s=CAP_S, need_s=need_s)
    assert waits_s == pytest.approx(np.clip(max(usual_s, LINK_MARGIN * need_s), FLOOR_S, CAP_S))


@given(st.lists(MEMBERS, max_size=LEAST_ROUNDS - 1))
def test_a_wait_is_the_constant_before_enough_is_seen(rounds_s: list[list[float]]) -> None:
    assert wait_s(rounds_s, floor_s=FLOOR_S, cap_s=CAP_S) == CAP_S


@given(
    st.lists(st.lists(st.floats(0.5, 1.5), min_size=3, max_size=3), min_size=LEAST_ROUNDS, max_size=WINDOW_ROUNDS),
    st.sampled_from((0.0, 0.5, CAP_S, 1e9)),
)
def test_fewer_than_half_change_little(rounds_s: list[list[float]], lie_s: float) -> None:
    """Two liars beside three honest members, who take 0.5 to 1.5 s: neither is anybody honest dropped, nor is a wait
    longer than honest members could have made it."""
    waits_s = wait_s([[*times_s, lie_s, lie_s] for times_s in rounds_s], floor_s=0.0, cap_s=CAP_S)
    assert waits_s <= 1.5 + SPREADS * 1.0
    assert waits_s >= 0.5
    lied_down_s = wait_s([[*times_s, 0.0, 0.0] for times_s in rounds_s], floor_s=FLOOR_S, cap_s=CAP_S)
    assert lied_down_s >= FLOOR_S > max(map(max, rounds_s))


def noted(contributions: int = 0, receipts: int = 0, took_s: float = 0.1) -> Recent:
    recent = Recent()
    for _ in range(contributions):
        recent.note_round([took_s] * 3, [])
    for _ in range(receipts):
        recent.note_round([], [took_s] * 3)
    return recent


def test_each_wait_has_its_constant_and_one_floor() -> None:
    calm = noted(contributions=LEAST_ROUNDS)
    assert (Recent().contribution_s(TIMEOUTS, 0.0), calm.contribution_s(TIMEOUTS, 0.0)) == (CAP_S, FLOOR_S)
    assert calm.contribution_s(TIMEOUTS, 5.0) == 5.0 * LINK_MARGIN
    assert calm.contribution_s(TIMEOUTS, 1000.0) == CAP_S
    assert (Recent().receipt_s(TIMEOUTS, 0.0), calm.receipt_s(TIMEOUTS, 0.0)) == (12.0, FLOOR_S)
    assert calm.receipt_s(TIMEOUTS, 5.0) == 5.0 * LINK_MARGIN
    assert Recent().answer_s(TIMEOUTS) == calm.answer_s(TIMEOUTS) == 11.0


def test_a_leader_learns_from_receipts_and_contributions_together() -> None:
    both = noted(contributions=LEAST_ROUNDS - 1, receipts=1)
    assert both.receipt_s(TIMEOUTS, 0.0) == FLOOR_S
    assert both.contribution_s(TIMEOUTS, 0.0) == CAP_S


def test_where_nobody_was_waited_for_there_was_no_round() -> None:
    recent = Recent()
    for _ in range(WINDOW_ROUNDS):
        recent.note_round([], [])
    assert not recent.contributions
    assert recent.receipt_s(TIMEOUTS, 0.0) == 12.0


def test_a_failed_round_is_as_if_nothing_had_been_seen() -> None:
    recent = noted(contributions=LEAST_ROUNDS, receipts=LEAST_ROUNDS)
    recent.forget_rounds()
    assert (recent.contribution_s(TIMEOUTS, 0.0), recent.receipt_s(TIMEOUTS, 0.0)) == (CAP_S, 12.0)


def test_answers_of_one_round_are_counted_once() -> None:
    recent = Recent()
    for number in range(LEAST_ROUNDS):
        assert recent.answer_s(TIMEOUTS) == 11.0
        for _ in range(2 * MAX_ANSWERS):
            recent.note_answer(bytes([number]), 0.1)
    assert recent.answer_s(TIMEOUTS) == FLOOR_S
    assert all(len(times_s) == MAX_ANSWERS for times_s in recent.answers)


def test_where_most_become_slower_waits_become_longer() -> None:
    """They are waited for in vain first, which counts as the constant."""
    recent = Recent()
    for number in range(WINDOW_ROUNDS):
        recent.note_answer(bytes([number]), 0.1)
    assert recent.answer_s(TIMEOUTS) == FLOOR_S
    for number in range(WINDOW_ROUNDS // 2 + 1):
        recent.note_answer(bytes([100 + number]), TIMEOUTS.request_s)
    assert recent.answer_s(TIMEOUTS) == TIMEOUTS.request_s
