"""Who is known, against literal expectations."""

from __future__ import annotations

import pytest

from p2p_diloco.core.known import LEAST_STEPS, NOBODY_KNOWN, WINDOW_STEPS, carried_to, known_at, most_unknown


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


def test_known_is_who_is_in_four_of_the_last_sixteen_updates() -> None:
    """In figures, for all peers have to agree on them."""
    last = [["often", "just", "rarely"]] * 3 + [["often", "just"]] + [["often"]] * 12
    assert known_at(16, last).peers == {"often", "just"}
    assert known_at(15, last).peers == frozenset()


def test_an_update_counts_once() -> None:
    """However often a header names a peer."""
    assert known_at(100, [["a"] * LEAST_STEPS] + [["b"]] * (WINDOW_STEPS - 1)).peers == {"b"}


@pytest.mark.parametrize(
    ("known", "most"), [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 2), (7, 3), (8, 3), (20, 9), (21, 10)]
)
def test_newcomers_are_fewer_than_half_of_the_known_ones_but_one(known: int, most: int) -> None:
    assert most_unknown(known) == most
    assert 2 * most < known or most == 1


# -- how far a history is carried on -----------------------------------------------------------------------------------


def updates(*stretches: tuple[int, str]) -> dict[int, str]:
    """(updates, their contributors), one stretch after the other, from outer step 0 on."""
    made = [who for count, who in stretches for _ in range(count)]
    return dict(enumerate(made))


@pytest.mark.parametrize(
    ("stretches", "carried"),
    [
        ([(10, "abc")], 10),  # the owner has witnessed all of it
        ([(40, "abcde")], 39),
        ([(40, "abcde"), (40, "abc")], 79),
        ([(40, "abcde"), (40, "ab")], 39),  # however long they go on alone
        ([(40, "abcde"), (40, "ab"), (1, "abc")], 80),  # and when one of the others is back
        ([(40, "abcde"), (40, "abxyz")], 39),  # or strangers come
        ([(40, "abcd"), (40, "ab")], 39),  # nor is a half of them enough
        ([(40, "abc"), (40, "a")], 39),
        ([(40, "ab"), (40, "a")], 80),  # the one that is away can do nothing without the owner
        ([(40, "abc"), (20, "abx"), (20, "axy"), (20, "xyz")], 99),  # one after another leaves
    ],
)
def test_how_far_most_of_those_known_carry_a_history(stretches: list[tuple[int, str]], carried: int) -> None:
    made = updates(*stretches)
    assert carried_to(0, made, 2) == carried
    since = 30 if carried > 30 else 0
    assert carried_to(since, {at: who for at, who in made.items() if at >= since - WINDOW_STEPS}, 2) == carried


def test_where_one_may_go_on_alone_two_carry_a_history_together() -> None:
    assert carried_to(0, updates((40, "ab"), (40, "a")), 1) == 39
    assert carried_to(0, updates((40, "a")), 1) == 39
    assert carried_to(50, updates((40, "a")), 1) == 50
