"""What is decided while a round is settled, without a round."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2p_diloco.core.config import Timeouts
from p2p_diloco.round.settle_decide import (
    Decision,
    agreed_state,
    answer_to_later_leader,
    answer_to_receipt,
    choose_parts,
    collects_until_s,
    decide,
    objection_to,
    promises_s,
    receipt_fits,
    without_refused,
)
from p2p_diloco.wire.messages import No
from p2p_diloco.wire.round_messages import Again, Commit, Receipt, TookBefore
from tests.support.builders import group_of, head, ranked
from tests.support.invited import token_of

A, B = b"a" * 32, b"b" * 32
TIMEOUTS = Timeouts(settle_s=10.0, reduced_part_s=25.0)
OVER = No(reason="the round is over")
NOT_COME = No(reason="no commit has come")
COMMIT = Commit(part_hashes=[A], holders=[0])
TAKEN = TookBefore(part_hashes=[A], signature=bytes(64))
AGAIN = Again(number=2, members=[0, 2], parts=[0])


GROUPS = {count: group_of(ranked(head("abc"), count), "abc") for count in (3, 5)}


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
def test_a_leader_decides_by_the_receipts_of_most(held: dict[int, list[bytes]], decided: Decision) -> None:
    assert decide(held, GROUPS[5], min_group=2, me=0, reducers=[0, 1], newest=1, state=b"") == decided


def test_parts_of_which_no_bytes_are_held_by_most_are_reduced_again_without_their_reducer() -> None:
    held = {0: [A, A], 1: [A, B], 2: [A, B], 3: [A, A], 4: [A, b"c" * 32]}
    torn = decide(held, GROUPS[5], me=0, min_group=2, reducers=[2, 3], newest=0, state=b"")
    assert torn == Again(number=1, members=[0, 1, 2, 4], parts=[1])
    mine = decide(held, GROUPS[5], me=3, min_group=2, reducers=[2, 3], newest=0, state=b"")
    assert mine == Commit(part_hashes=[A, A], holders=[0, 0])
    most = held | {1: [A, b""]}
    assert isinstance(decide(most, GROUPS[5], me=0, min_group=2, reducers=[2, 3], newest=0, state=b""), Commit)
    few = {0: [A, A], 1: [A, B]}
    assert isinstance(decide(few, GROUPS[3], me=0, min_group=2, reducers=[0, 1], newest=0, state=b""), Commit)


def test_what_a_leader_refuses_is_held_by_nobody() -> None:
    held = {0: [A, b""], 1: [B, A]}
    assert without_refused(held, {A}) == {0: [b"", b""], 1: [B, b""]}
    assert without_refused(held, set()) == held


def test_fewer_than_the_smallest_group_commit_nothing() -> None:
    held = {0: [A], 1: [A]}
    few = No(reason="2 of 3 members are left, too few to commit")
    assert decide(held, GROUPS[3], min_group=3, me=0, reducers=[0], newest=0, state=b"") == few
    assert decide(held, GROUPS[3], min_group=2, me=0, reducers=[0], newest=0, state=b"") == Commit(
        part_hashes=[A], holders=[0]
    )


def test_parts_are_reduced_again_less_often_than_there_are_members() -> None:
    held = {0: [A, b""], 1: [A, b""]}
    assert decide(held, GROUPS[3], min_group=2, me=0, reducers=[0, 1], newest=1, state=b"") == Again(
        number=2, members=[0, 1], parts=[1]
    )
    lost = No(reason="1 parts were lost again and again")
    assert decide(held, GROUPS[3], min_group=2, me=0, reducers=[0, 1], newest=2, state=b"") == lost


@pytest.mark.parametrize(
    ("now", "wait_s", "all_came", "most", "until_s"),
    [
        (100.0, 10.0, False, False, 110.0),
        (100.0, 10.0, False, True, 110.0),
        (109.9, 10.0, False, True, 110.0),
        (100.0, 10.0, True, False, None),
        (110.0, 10.0, False, True, None),
        (110.0, 10.0, False, False, 135.0),
        (134.9, 10.0, False, False, 135.0),
        (134.9, 10.0, False, True, None),
        (135.0, 10.0, False, False, None),
        (101.9, 2.0, False, True, 102.0),
        (102.0, 2.0, False, True, None),
        (102.0, 2.0, False, False, 135.0),  # without most as long as ever
    ],
)
def test_a_leader_waits_for_all_and_then_for_most(
    now: float, wait_s: float, all_came: bool, most: bool, until_s: float | None
) -> None:
    waits = collects_until_s(now, began_s=100.0, wait_s=wait_s, timeouts=TIMEOUTS, all_came=all_came, most=most)
    assert waits == until_s


@pytest.mark.parametrize(
    ("left_s", "reduced_s", "credit_s", "has_s"),
    [
        (60.0, 0.0, 30.0, 40.0),
        (60.0, 1.0, 30.0, 43.0),  # others may have reduced longer than I
        (60.0, 0.0, 7.0, 17.0),
        (60.0, 0.0, -20.0, 10.0),  # an honest one decides in that time
        (40.0, 0.0, 30.0, 30.0),  # it is never all of the time that the round has left
        (5000.0, 900.0, 0.0, 2710.0),
    ],
)
def test_how_long_a_leader_may_only_promise(left_s: float, reduced_s: float, credit_s: float, has_s: float) -> None:
    assert promises_s(left_s, reduced_s=reduced_s, credit_s=credit_s, timeouts=TIMEOUTS) == has_s


# -- what is answered -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("member", "number", "decision", "applied", "over", "answer"),
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
    member: int, number: int, decision: Decision | None, applied: Commit | None, over: bool, answer: Decision | None
) -> None:
    assert answer_to_receipt(member, number, decision=decision, applied=applied, over=over) == answer


@pytest.mark.parametrize(
    ("asker", "place", "taken", "over", "answer"),
    [
        (2, 0, None, False, None),
        (2, 1, None, False, None),
        (2, 2, None, False, NOT_COME),
        (2, 3, None, False, NOT_COME),
        (2, 0, None, True, NOT_COME),
        (2, 0, TAKEN, False, TAKEN),
        (2, 3, TAKEN, True, TAKEN),
    ],
)
def test_what_a_later_leader_is_told(
    asker: int, place: int, taken: TookBefore | None, over: bool, answer: TookBefore | No | None
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
    group = group_of(ranked(head("abc"), 4), "abc", client_mode=[False, False, False, True])
    receipt = Receipt(round_id=group.round_id, number=number, part_hashes=[A] * n_hashes)
    assert receipt_fits(receipt, group, me=me, newest=1, n_parts=2) == fits


# -- what a member signs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reduced", "named", "mine", "state", "objection"),
    [
        ([A, B], [A, B], b"", b"", ""),
        ([A, b""], [A, B], b"", b"", ""),  # what has not come from a reducer is what the others hold
        ([A, B], [A, A], b"", b"", "part 1 is not what its reducer sent me"),
        ([b"", B], [A, A], b"", b"", "part 1 is not what its reducer sent me"),
        ([A, B], [A, B], A, A, ""),
        ([A, B], [A, B], A, b"", ""),  # the members do not agree: none is certified
        ([A, B], [A, B], A, B, "my outer state has other bits"),
        ([A, B], [A, B], b"", A, "my outer state has other bits"),
    ],
)
def test_a_member_signs_what_was_reduced_and_nothing_else(
    reduced: list[bytes], named: list[bytes], mine: bytes, state: bytes, objection: str
) -> None:
    commit = Commit(part_hashes=named, holders=[0, 0], state=state)
    assert objection_to(commit, reduced=reduced, state=mine) == objection


@pytest.mark.parametrize(
    ("states", "agreed"),
    [
        ({0: A, 1: A, 2: A}, A),
        ({0: A, 1: A, 2: B, 3: B}, b""),
        ({0: A, 1: B, 2: B, 3: B}, B),
        ({0: b"", 1: b"", 2: b""}, b""),
        ({0: A, 1: A}, b""),  # not most of five
        ({}, b""),
    ],
)
def test_the_digest_that_most_members_name(states: dict[int, bytes], agreed: bytes) -> None:
    assert agreed_state(states, GROUPS[5]) == agreed


def test_a_token_names_one_digest() -> None:
    """Of its members the first one says which."""
    token, members = token_of(places=3), GROUPS[5].members
    seated = tuple(one.model_copy(update={"seat": token.seat(one.peer_id)}) for one in members[:3])
    group = replace(GROUPS[5], members=(*seated, *members[3:]))
    assert agreed_state({0: A, 1: A, 2: A, 3: B}, group) == b""
    assert agreed_state({0: A, 1: B, 2: B, 3: A}, group) == A


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
