"""Token buckets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p_diloco.core.buckets import BURST_S, MAX_RATED_PEERS, Allowance, Quota, Rate


def test_a_burst_goes_at_once_and_the_rest_at_the_rate() -> None:
    rate = Rate(bytes_per_s=100.0)
    assert [rate.wait_s(size, 1000.0) for size in (60, 40, 50, 100)] == [0.0, 0.0, 0.5, 1.5]


def test_who_asks_later_waits_less_and_a_pause_is_worth_one_burst() -> None:
    rate = Rate(bytes_per_s=100.0)
    assert rate.wait_s(100, 5.0) == 0.0
    assert rate.wait_s(100, 5.4) == pytest.approx(0.6)
    assert rate.wait_s(100, 6.0) == pytest.approx(1.0)
    assert rate.wait_s(100, 1000.0) == 0.0
    assert rate.wait_s(1, 1000.0) == pytest.approx(0.01)


def test_what_is_larger_than_a_burst_waits_for_all_of_it() -> None:
    assert Rate(bytes_per_s=100.0).wait_s(1000, 0.0) == pytest.approx(9.0)


@given(
    bytes_per_s=st.floats(1.0, 1e9),
    asked=st.lists(st.tuples(st.floats(0.0, 10.0), st.integers(0, 10**6)), min_size=1, max_size=30),
)
def test_no_span_of_time_carries_more_than_the_rate(bytes_per_s: float, asked: list[tuple[float, int]]) -> None:
    rate, now_s, sent = Rate(bytes_per_s=bytes_per_s), 0.0, list[tuple[float, int]]()
    for pause_s, size in asked:
        now_s += pause_s
        wait_s = rate.wait_s(size, now_s)
        assert wait_s >= 0
        sent.append((now_s + wait_s, size))
    assert sent == sorted(sent, key=lambda one: one[0])
    for i, (from_s, first) in enumerate(sent):
        at_once, total = max(BURST_S * bytes_per_s, first), 0
        for at_s, size in sent[i:]:
            total += size
            assert total <= (at_once + (at_s - from_s) * bytes_per_s) * (1 + 1e-6) + 1e-3


@given(sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=30))
def test_who_never_pauses_gets_the_whole_rate(sizes: list[int]) -> None:
    rate, now_s = Rate(bytes_per_s=100.0), 0.0
    for size in sizes:
        now_s += rate.wait_s(size, now_s)
    assert now_s == pytest.approx(max(sum(sizes) / 100.0 - BURST_S, 0.0))


def test_a_burst_and_then_so_many_a_second() -> None:
    quota = Quota(per_s=2.0, burst=3.0)
    assert [quota.take("a", 0.0) for _ in range(5)] == [True] * 3 + [False] * 2
    assert quota.take("b", 0.0)
    assert [quota.take("a", 1.0) for _ in range(3)] == [True, True, False]


def test_the_peers_that_were_quiet_longest_are_forgotten() -> None:
    quota = Quota(per_s=2.0, burst=3.0)
    for index in range(MAX_RATED_PEERS + 10):
        quota.take(str(index), 2.0)
    assert len(quota._buckets) == MAX_RATED_PEERS
    assert "9" not in quota._buckets


def test_an_allowance_is_time_that_is_won_back_at_the_rate() -> None:
    allowance = Allowance(bytes_per_s=100.0, longest_s=10.0)
    allowance.spend(9.0, 0)
    assert allowance.left_s == 1.0
    allowance.spend(5.0, 700)
    assert allowance.left_s == 3.0
    allowance.spend(1.0, 10**9)
    assert allowance.left_s == 10.0, "however much it has taken"
    allowance.spend(12.0, 100)
    assert allowance.left_s == -1.0


@given(
    taken=st.lists(st.tuples(st.floats(0.01, 20.0), st.integers(0, 10**4)), max_size=40),
    longest_s=st.floats(0.0, 30.0),
)
def test_what_is_left_is_what_the_worst_time_up_to_now_has_left(
    taken: list[tuple[float, int]], longest_s: float
) -> None:
    allowance = Allowance(bytes_per_s=100.0, longest_s=longest_s)
    for taken_s, size in taken:
        allowance.spend(taken_s, size)
    lags = [sum(taken_s - size / 100 for taken_s, size in taken[start:]) for start in range(len(taken) + 1)]
    assert allowance.left_s == pytest.approx(longest_s - max(lags))
