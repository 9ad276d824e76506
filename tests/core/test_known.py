"""Who is known, against literal expectations."""

from __future__ import annotations

import pytest

from p2p_diloco.core.known import LEAST_STEPS, NOBODY_KNOWN, WINDOW_STEPS, known_at, most_unknown


def test_nobody_is_known_before_the_window_is_full() -> None:
    last = [["a", "b"]] * (WINDOW_STEPS - 1)
    assert known_at(WINDOW_STEPS - 1, last).peers == frozenset()
    assert known_at(WINDOW_STEPS, [*last, ["a"]]).peers == {"a", "b"}
    assert NOBODY_KNOWN.peers == frozenset()


def test_who_has_contributed_often_enough_is_known() -> None:
    last: list[list[str]] = [["often"]] * WINDOW_STEPS
    last = [[*who, "just", "rarely"] if i < LEAST_STEPS - 1 else who for i, who in enumerate(last)]
    last[-1] = [*last[-1], "just"]
    assert known_at(100, last).peers == {"often", "just"}


def test_an_update_counts_once() -> None:
    """However often a header names a peer."""
    assert known_at(100, [["a"] * LEAST_STEPS] + [["b"]] * (WINDOW_STEPS - 1)).peers == {"b"}


@pytest.mark.parametrize(
    ("known", "most"), [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 2), (7, 3), (8, 3), (20, 9), (21, 10)]
)
def test_newcomers_are_fewer_than_half_of_the_known_ones_but_one(known: int, most: int) -> None:
    assert most_unknown(known) == most
    assert 2 * most < known or most == 1
