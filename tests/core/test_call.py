"""How many have to be ready before a round calls the others, against literal expectations."""

from __future__ import annotations

import pytest

from p2p_diloco.core.admission import Claim
from p2p_diloco.core.call import CALLERS, is_called
from p2p_diloco.core.known import NOBODY_KNOWN, Known
from tests.support.builders import identity
from tests.support.invited import token_of


def claims(ids: str) -> list[Claim]:
    return [Claim(peer_id=peer_id, seat=b"") for peer_id in ids]


def known(ids: str) -> Known:
    return Known(step=99, peers=frozenset(ids))


@pytest.mark.parametrize(
    ("around", "ready", "familiar", "called"),
    [
        ("ab", "", "ab", False),
        ("a", "a", "a", True),
        ("ab", "a", "ab", True),  # of two, one calls the other
        ("abc", "a", "abc", False),
        ("abc", "ab", "abc", True),
        ("abcdefgh", "ab", "abcdefgh", True),
        ("abcd", "ad", "abc", False),  # one that is not known does not count
        ("abcd", "d", "abc", False),
        ("abcde", "de", "abc", False),
        ("abcd", "ab", "abc", True),
        ("abcd", "d", "ab", False),  # too few known ones: all count
        ("abcd", "cd", "ab", True),
        ("abcd", "cd", "", True),
        ("abcd", "c", "", False),
        ("ab", "b", "a", True),
        ("ab", "b", "abc", True),  # who is known and not here does not count
        ("abc", "xy", "abcxy", False),  # nor who says that it is ready and is not here
    ],
)
def test_so_many_call(around: str, ready: str, familiar: str, called: bool) -> None:
    assert is_called(claims(around), claims(ready), known(familiar), min_group=2) is called


def test_no_more_are_needed_than_a_round_has() -> None:
    assert is_called(claims("abc"), claims("a"), NOBODY_KNOWN, min_group=1)
    assert not is_called(claims("abc"), claims(""), NOBODY_KNOWN, min_group=1)
    assert is_called(claims("abcde"), claims("ab"), NOBODY_KNOWN, min_group=4)


def test_those_of_one_token_count_once() -> None:
    barn, attic = token_of("barn", places=4, key=2001), token_of("attic")
    two = [Claim(peer_id=who.peer_id, seat=barn.seat(who.peer_id)) for who in map(identity, (1, 2))]
    others = [Claim(peer_id=identity(3).peer_id, seat=attic.seat(identity(3).peer_id)), *claims("x")]
    assert not is_called([*two, *others], two, NOBODY_KNOWN, min_group=2)
    assert is_called([*two, *others], [two[0], others[0]], NOBODY_KNOWN, min_group=2)
    assert is_called([*two, others[0]], two, NOBODY_KNOWN, min_group=2), "two are there in all"


def test_two_are_enough() -> None:
    """Where one liar counts, one honest peer decides."""
    assert CALLERS == 2
