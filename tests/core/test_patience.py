from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p_diloco.core.patience import LATE_SHARE, late_senders, spare_s
from tests.support.builders import group_of, head, ranked


@given(st.lists(st.tuples(st.floats(0.0, 100.0), st.floats(0.0, 200.0)), max_size=20), st.sampled_from((0.0, 0.2, 1.0)))
def test_all_that_is_waited_for_the_late_is_a_share_of_what_the_others_take(
    parts: list[tuple[float, float]], floor_s: float
) -> None:
    """Part by part: how long the others take, and how long the late would. A simulation of the rule is the oracle."""
    elapsed_s = waited_s = alone_s = 0.0
    for others_s, late_s in parts:
        elapsed_s, alone_s = elapsed_s + others_s, alone_s + others_s
        left_s = spare_s(elapsed_s, waited_s, floor_s)
        assert left_s >= 0.0
        assert waited_s + left_s == pytest.approx(max(LATE_SHARE * alone_s, floor_s, waited_s))
        waited_s, elapsed_s = waited_s + min(late_s, left_s), elapsed_s + min(late_s, left_s)
    assert elapsed_s <= alone_s + max(LATE_SHARE * alone_s, floor_s) + 1e-6


@pytest.mark.parametrize(
    ("count", "lapsed", "dropped", "late"),
    [
        (5, (), (), ()),
        (5, (1,), (), (1,)),
        (5, (1, 2), (), (1, 2)),
        (5, (1, 2, 3), (), ()),
        (4, (1, 2), (), ()),
        (2, (1,), (), ()),
        (4, (1,), (2,), (1,)),
        (4, (1,), (2, 3), ()),
    ],
)
def test_who_is_late(count: int, lapsed: tuple[int, ...], dropped: tuple[int, ...], late: tuple[int, ...]) -> None:
    members = ranked(head(""), count)
    group = group_of(members, dropped=[i in dropped for i in range(count)])
    ids = [members[i].peer_id for i in lapsed]
    assert late_senders(group, range(1, count), ids) == set(late)
    assert late_senders(group, [], ids) == set()
