"""What is decided while a round is settled, without a round."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2p_diloco.core.config import Timeouts
from p2p_diloco.round.settle_decide import (
    Decision,
    answer_to_later_leader,
    answer_to_receipt,
    choose_parts,
    collects_until_s,
    decide,
    is_quorum,
    receipt_fits,
    without_refused,
)
from p2p_diloco.wire.messages import Again, Commit, No, Receipt
from tests.support.builders import groups_of, head, ranked

A, B = b"a" * 32, b"b" * 32
TIMEOUTS = Timeouts(settle_s=10.0, reduced_part_s=25.0)
OVER = No(reason="the round is over")
NOT_COME = No(reason="no commit has come")
COMMIT = Commit(part_hashes=[A], holders=[0])
AGAIN = Again(number=2, members=[0, 2], parts=[0])


def test_a_quorum_is_more_than_half() -> None:
    assert [size for size in range(1, 9) if is_quorum(3, size)] == [1, 2, 3, 4, 5]


# -- what a leader decides ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("held", "decided"),
    [
        ({0: [A, B], 2: [A, b""], 3: [b"", B]}, Commit(part_hashes=[A, B], holders=[0, 0])),
        ({3: [A, B], 1: [b"", b""], 0: [b"", b""]}, Commit(part_hashes=[A, B], holders=[3, 3])),
        ({3: [A, b""], 1: [b"", b""], 0: [A, b""]}, Again(number=2, members=[0, 1, 3], parts=[1])),
        ({4: [b"", b""], 1: [b"", b""], 0: [b"", b""]}, Again(number=2, members=[0, 1, 4], parts=[0, 1])),
        ({0: [A, B], 2: [A, B]}, No(reason="2 of 5 members are left, too few to commit")),
    ],
)
def test_a_leader_decides_by_the_receipts_of_a_quorum(held: dict[int, list[bytes]], decided: Decision) -> None:
    assert decide(held, group_size=5, min_group=2, n_parts=2, newest=1) == decided


def test_what_a_leader_refuses_is_held_by_nobody() -> None:
    held = {0: [A, b""], 1: [B, A]}
    assert without_refused(held, {A}) == {0: [b"", b""], 1: [B, b""]}
    assert without_refused(held, set()) == held


def test_fewer_than_the_smallest_group_commit_nothing() -> None:
    held = {0: [A], 1: [A]}
    few = No(reason="2 of 3 members are left, too few to commit")
    assert decide(held, group_size=3, min_group=3, n_parts=1, newest=0) == few
    assert decide(held, group_size=3, min_group=2, n_parts=1, newest=0) == Commit(part_hashes=[A], holders=[0])


def test_parts_are_reduced_again_less_often_than_there_are_members() -> None:
    held = {0: [A, b""], 1: [A, b""]}
    assert decide(held, group_size=3, min_group=2, n_parts=2, newest=1) == Again(number=2, members=[0, 1], parts=[1])
    lost = No(reason="1 parts were lost again and again")
    assert decide(held, group_size=3, min_group=2, n_parts=2, newest=2) == lost


@pytest.mark.parametrize(
    ("now", "all_came", "quorum", "until_s"),
    [
        (100.0, False, False, 110.0),
        (100.0, False, True, 110.0),
        (109.9, False, True, 110.0),
        (100.0, True, False, None),
        (110.0, False, True, None),
        (110.0, False, False, 135.0),
        (134.9, False, False, 135.0),
        (134.9, False, True, None),
        (135.0, False, False, None),
    ],
)
def test_a_leader_waits_for_all_and_then_for_a_quorum(
    now: float, all_came: bool, quorum: bool, until_s: float | None
) -> None:
    waits = collects_until_s(now, began_s=100.0, timeouts=TIMEOUTS, all_came=all_came, quorum=quorum)
    assert waits == until_s


# -- what is answered -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("member", "number", "decision", "taken", "over", "answer"),
    [
        (2, 0, None, None, False, None),
        (2, 0, None, COMMIT, False, None),  # of another leader: I lead only when it has failed
        (2, 0, None, COMMIT, True, COMMIT),
        (2, 0, None, None, True, OVER),
        (2, 0, COMMIT, None, False, COMMIT),
        (2, 0, No(reason="too few"), COMMIT, True, No(reason="too few")),
        (2, 1, AGAIN, None, False, AGAIN),
        (2, 2, AGAIN, None, False, None),  # it has joined that one
        (2, 3, AGAIN, None, False, None),
        (1, 1, AGAIN, None, False, None),  # it is not in it
        (1, 1, AGAIN, None, True, None),
    ],
)
def test_what_a_member_is_told_about_its_receipt(
    member: int, number: int, decision: Decision | None, taken: Commit | None, over: bool, answer: Decision | None
) -> None:
    assert answer_to_receipt(member, number, decision=decision, taken=taken, over=over) == answer


@pytest.mark.parametrize(
    ("asker", "place", "taken", "over", "answer"),
    [
        (2, 0, None, False, None),
        (2, 1, None, False, None),
        (2, 2, None, False, NOT_COME),
        (2, 3, None, False, NOT_COME),
        (2, 0, None, True, NOT_COME),
        (2, 0, COMMIT, False, COMMIT),
        (2, 3, COMMIT, True, COMMIT),
    ],
)
def test_what_a_later_leader_is_told(
    asker: int, place: int, taken: Commit | None, over: bool, answer: Commit | No | None
) -> None:
    """A commit is denied by who has given up all leaders before the one that asks, and by nobody else in a round."""
    assert answer_to_later_leader(asker, place=place, taken=taken, over=over) == answer


# -- what fits the round --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("me", "number", "n_hashes", "fits"),
    [
        (0, 1, 2, True),  # the first leader's own butterflies
        (0, 2, 2, False),
        (1, 2, 2, True),  # a later leader has not heard of all of them
        (1, 4, 2, False),
        (3, 0, 2, False),  # cannot lead
        (0, 0, 1, False),
        (0, 0, 3, False),
    ],
)
def test_receipts_that_fit(me: int, number: int, n_hashes: int, fits: bool) -> None:
    group = groups_of(ranked(head("abc"), 4), "abc", client_mode=[False, False, False, True])[me]
    receipt = Receipt(round_id=group.round_id, number=number, part_hashes=[A] * n_hashes)
    assert receipt_fits(receipt, group, newest=1, n_parts=2) == fits


# -- the choice of parts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("receipts", "hashes", "holders"),
    [
        ({0: [A], 1: [A], 2: [B]}, [A], [0]),
        ({0: [A], 1: [B], 2: [B]}, [B], [1]),
        ({5: [B], 1: [A]}, [A], [1]),
        ({1: [B], 0: [b""]}, [B], [1]),
        ({0: [A, b""], 1: [b"", B]}, [A, B], [0, 1]),
        ({0: [A]}, [A], [0]),
        ({0: [A, b""], 1: [A, b""]}, [A, b""], [0, 0]),
    ],
)
def test_choose_parts(receipts: dict[int, list[bytes]], hashes: list[bytes], holders: list[int]) -> None:
    assert choose_parts(receipts, len(hashes)) == (hashes, holders)
    assert choose_parts(dict(reversed(receipts.items())), len(hashes)) == (hashes, holders)


@given(
    st.dictionaries(
        st.integers(0, 255), st.lists(st.sampled_from([b"", A, B]), min_size=3, max_size=3), min_size=1, max_size=6
    )
)
@settings(max_examples=60)
def test_whoever_is_named_as_a_holder_said_so(receipts: dict[int, list[bytes]]) -> None:
    hashes, holders = choose_parts(receipts, 3)
    for part, (wanted, holder) in enumerate(zip(hashes, holders)):
        assert receipts[holder][part] == wanted
        assert bool(wanted) == any(held[part] for held in receipts.values())
