"""What others may cost, with a clock that the tests set."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p_diloco.core import credit
from p2p_diloco.core.credit import CREDIT_SHARE, Credit

FULL_S = 30.0


def test_who_has_cost_nothing_has_all_its_credit() -> None:
    known = Credit(FULL_S)
    assert known.left_s("a", 0.0) == known.left_s("a", 1e9) == FULL_S
    assert known.is_good("a", 0.0)
    assert not known.in_debt("a", 0.0)


def test_nobody_is_in_debt_after_one_misfortune_and_everybody_is_after_the_next() -> None:
    known = Credit(FULL_S)
    known.charge("a", 1000.0, 100.0)
    assert known.left_s("a", 100.0) == 0.0
    assert not known.in_debt("a", 100.0)
    assert not known.is_good("a", 100.0)
    known.charge("a", 10.0, 140.0)
    assert known.left_s("a", 140.0) == pytest.approx(40 * CREDIT_SHARE - 10.0)
    assert known.in_debt("a", 140.0)
    known.charge("a", 1000.0, 140.0)
    assert known.left_s("a", 140.0) == -FULL_S
    assert known.left_s("b", 140.0) == FULL_S, "nobody pays for another one"


def test_credit_comes_back_with_time() -> None:
    known = Credit(FULL_S)
    for _ in range(2):
        known.charge("a", 1000.0, 0.0)
    assert known.in_debt("a", FULL_S / CREDIT_SHARE - 1)
    assert not known.in_debt("a", FULL_S / CREDIT_SHARE + 1)
    assert not known.is_good("a", 1.5 * FULL_S / CREDIT_SHARE - 1)
    assert known.is_good("a", 1.5 * FULL_S / CREDIT_SHARE + 1)
    assert known.left_s("a", 1e6) == FULL_S


def test_only_so_many_debtors_are_remembered_the_worst_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credit, "MAX_DEBTORS", 2)
    known = Credit(FULL_S)
    for peer_id, cost_s in (("a", 20.0), ("b", 5.0), ("c", 10.0)):
        known.charge(peer_id, cost_s, 0.0)
    assert [known.left_s(peer_id, 0.0) for peer_id in "abc"] == [10.0, FULL_S, 20.0]


@given(
    costs_s=st.lists(st.floats(0.0, 40.0), min_size=1, max_size=200),
    every_s=st.floats(1.0, 60.0),
)
def test_whoever_is_waited_for_only_while_it_has_credit_costs_a_share_of_the_time(
    costs_s: list[float], every_s: float
) -> None:
    """Whatever it does, and however often: beside its share, one full credit, and one cost more than that."""
    known, now_s, cost_s = Credit(FULL_S), 0.0, 0.0
    for each_s in costs_s:
        now_s += every_s
        if not known.in_debt("a", now_s):
            known.charge("a", each_s, now_s)
            cost_s += each_s
        # A full credit pays for one cost that is larger, each time that it is full again.
        pardons = 1 + CREDIT_SHARE * now_s / FULL_S
        assert cost_s <= FULL_S + CREDIT_SHARE * now_s + 40.0 + pardons * 10.0 + 1e-6
