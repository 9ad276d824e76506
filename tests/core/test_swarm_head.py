"""Which head is the swarm's, against literal expectations."""

from __future__ import annotations

import dataclasses
import math
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p_diloco.core.records import Record
from p2p_diloco.core.swarm_head import (
    Evaluation,
    Standing,
    believed_losses,
    from_nowhere,
    must_catch_up,
    newest_evaluation,
    swarm_head,
    way_of,
)
from tests.support.builders import (
    head,
    identity,
    record_of,
)


def swarm(*histories: str, **changes: Any) -> list[Record]:
    return [record_of(identity(i + 1), history, **changes) for i, history in enumerate(histories)]


def standing(history: str) -> Standing:
    record = record_of(identity(1), history)
    return Standing(step=record.step, head=record.head, heads=tuple(record.heads))


@pytest.mark.parametrize(
    ("histories", "leads_to"),
    [
        (["a"], "a"),
        (["abc", "abc", "abx"], "abc"),
        (["abx", "abcd", "abcd"], "abcd"),
        (["a", "ab", "abc"], "abc"),  # most are on "ab" or beyond, and "abc" extends it
        (["a", "a", "abc"], "abc"),
        (["a", "a", "a", "abcde"], "abcde"),  # four steps on: its record still shows "a"
        (["a", "a", "a", "abcdef"], "a"),  # nobody can see that it extends "a"
        (["ab", "ab", "abx", "abx", "aby"], "abx"),  # a fork: the one with more voters
        (["ab", "ab", "ab", "abx", "abyz"], "abyz"),  # with as many: the newer
        (["ab", "ab", "xyzw"], "ab"),
        (["abcdefg", "abcdefg", "tuvwxyz", "mnopqrst"], "abcdefg"),  # no majority: most voters on one head
    ],
)
def test_the_swarms_head(histories: list[str], leads_to: str) -> None:
    records = swarm(*histories)
    for order in permutations(records):
        assert swarm_head(order, None) == (len(leads_to), head(leads_to))


def links(history: str, since: int = 0) -> dict[bytes, bytes]:
    """From each of its heads after outer step ``since`` to the one before."""
    return {head(history[:step]): head(history[: step - 1]) for step in range(since + 1, len(history) + 1)}


@pytest.mark.parametrize(
    ("histories", "known", "leads_to"),
    [
        (["a", "a", "a", "abcdefghi"], links("abcdefghi"), "abcdefghi"),
        (["a", "a", "a", "abcdefghi"], links("abcdefghi", since=5), "a"),  # from "abcde" on: not yet the whole way
        (["a", "a", "a", "abcdefghi", "axyzklmno"], links("axyzklmno"), "axyzklmno"),  # whose way is known
        (["a", "a", "a", "ax", "abcdefghi", "abcdefghi"], links("abcdefghi"), "abcdefghi"),
        (["a", "axyzklmno", "axyzklmno", "abcdefg"], links("axyzklmno") | links("abcdefg"), "axyzklmno"),
    ],
)
def test_whose_way_is_known_is_ahead_however_far_it_is(
    histories: list[str], known: dict[bytes, bytes], leads_to: str
) -> None:
    for order in permutations(swarm(*histories)):
        assert swarm_head(order, None, known) == (len(leads_to), head(leads_to))


def test_nobody_goes_back_to_where_most_still_stand() -> None:
    """My own ledger shows the way from there to me."""
    history = "abcdefghi"
    mine = dataclasses.replace(standing(history), heads=tuple(head(history[:step]) for step in range(8, -1, -1)))
    assert swarm_head(swarm("a", "a", "a", history), mine) == (9, head(history))
    assert not must_catch_up(mine, (1, head("a")))
    assert swarm_head(swarm("ax", "ax", "ax", history), mine) == (2, head("ax"))
    assert must_catch_up(mine, (2, head("ax")))


def test_who_comes_from_nowhere_is_known_by_a_way_to_where_i_was() -> None:
    records = swarm("", "abc", "abcdefg", "abcdefgh", "abx", "uvwxyz")
    steps = [record.step for record in from_nowhere(records, standing("abc"), {})]
    assert steps == [8, 6], "four steps on a record still shows where I am; who has no vote is not asked"
    assert from_nowhere(records, standing("abc"), links("abcdefgh")) == records[-1:]
    assert way_of(records[3], links("abcdefgh"))[-1] == head("")


def test_the_smaller_digest_decides_a_fork() -> None:
    x, y = sorted(["abx", "aby"], key=head)
    assert swarm_head(swarm("ab", "ab", "ab", y, x), None) == (3, head(x))
    assert swarm_head(swarm("ab", "ab", y, y, x, x), None) == (3, head(x))
    healed = ["klmnopq", "tuvwxyz"]
    assert swarm_head(swarm(*healed, *healed), None) == (7, min(map(head, healed)))


@pytest.mark.parametrize("step", [4, 1_000_000])
@pytest.mark.parametrize("pretends", [[], [head("ab")], [head("abc")], [head("zz"), head("abc")]])
def test_a_lone_loud_claim_changes_nothing(step: int, pretends: list[bytes]) -> None:
    """Neither from nowhere, nor with a history that does not lead to the step it claims."""
    loud = record_of(identity(9), step=step, head=head("loud"), heads=pretends, committed=True)
    believed = (3, head("abc"))
    if step == 4 and pretends[:1] == [head("abc")]:  # nothing is wrong with this one
        believed = (4, head("loud"))
    assert swarm_head([*swarm("abc", "abc"), loud], None) == believed
    assert swarm_head([*swarm("abc"), loud], standing("abc")) == believed


def test_who_never_committed_has_no_vote() -> None:
    newcomers = swarm(*["xyz"] * 5, committed=False)
    assert swarm_head([*newcomers, record_of(identity(9), "abc")], None) == (3, head("abc"))
    assert swarm_head(newcomers, standing("abc")) == (3, head("abc"))
    assert swarm_head(newcomers, standing("")) == (3, head("xyz"))  # at the genesis nobody has committed


def test_alone_or_with_nobody() -> None:
    assert swarm_head([], None) is None
    assert swarm_head([], standing("")) == (0, head(""))
    assert swarm_head([], standing("abc")) == (3, head("abc"))


def test_my_own_vote_counts() -> None:
    assert swarm_head(swarm("abc", "abx"), standing("abx")) == (3, head("abx"))


@pytest.mark.parametrize(
    ("mine", "target", "catch_up"),
    [
        ("abc", None, False),
        ("abc", "abc", False),
        ("abc", "abcd", True),
        ("abc", "ab", False),
        ("abc", "", False),
        ("abcde", "", True),  # too long ago to remember: as good as another history
        ("abx", "abc", True),
        ("abxyz", "abc", True),
    ],
)
def test_whoever_is_not_beyond_the_swarms_head_catches_up(mine: str, target: str | None, catch_up: bool) -> None:
    where = None if target is None else (len(target), head(target))
    assert must_catch_up(standing(mine), where) is catch_up


# -- evaluations -------------------------------------------------------------------------------------------------------

SWARM = (3, head("abc"))


def says(index: int, history: str, of_step: int, loss: float, **changes: Any) -> Record:
    return record_of(identity(index), history, held_out_step=of_step, held_out_loss=loss, **changes)


def test_the_newest_evaluation_is_that_of_who_stands_on_the_swarms_head() -> None:
    records = [says(1, "abc", 1, 3.0), says(2, "abc", 2, 2.5), record_of(identity(3), "abc")]
    assert newest_evaluation(records, SWARM) == (2, 2.5)
    assert newest_evaluation([*records, says(4, "abcd", 3, 2.0)], SWARM) == (3, 2.0), "it has passed the head"
    assert newest_evaluation([record_of(identity(3), "abc")], SWARM) is None
    assert newest_evaluation([], SWARM) is None
    assert newest_evaluation(records, None) is None


@pytest.mark.parametrize(
    "liar",
    [
        says(9, "abc", 10**6, 0.1),
        says(9, "abcd", 4, 0.1),
        says(9, "abc", 3, 0.1, step=10**6, head=head("zz")),
        says(9, "abx", 3, 0.1),
        says(9, "abx", 3, 0.1, heads=[head("abc"), head("ab")]),
        says(9, "abc", 3, 0.1, step=10**6),
        says(9, "ab", 2, 0.1),
        says(9, "abc", 3, -1e300),
        says(9, "abc", 3, -0.001),
    ],
    ids=["far-ahead", "ahead", "far-away", "other-head", "false-way", "other-step", "behind", "absurd", "below-0"],
)
def test_who_lies_about_an_evaluation_owns_no_line(liar: Record) -> None:
    honest = [says(1, "abc", 2, 2.5), record_of(identity(2), "abc"), record_of(identity(3), "abc")]
    assert newest_evaluation([*honest, liar], SWARM) == (2, 2.5)
    assert newest_evaluation([liar], SWARM) is None


def test_of_several_losses_of_a_step_the_middle_one_is_believed() -> None:
    path = {SWARM, (2, head("ab"))}
    said = [Evaluation(step=3, loss=loss, path=path) for loss in (2.2, 1e300, math.nan, math.inf, -math.inf, 2.1)]
    assert believed_losses([*said, Evaluation(step=1, loss=4.0, path=path)], SWARM) == [(1, 4.0), (3, 2.2)]
    assert believed_losses(said[2:5], SWARM) == []


@given(st.lists(st.tuples(st.integers(0, 2**60 - 1), st.floats(allow_nan=False, allow_infinity=False)), max_size=5))
def test_whatever_others_say_the_loss_is_one_that_a_model_can_have(said: list[tuple[int, float]]) -> None:
    newest = newest_evaluation([says(i, "abc", step, loss) for i, (step, loss) in enumerate(said, 1)], SWARM)
    assert newest is None or (newest[0] <= 3 and 0 <= newest[1] < math.inf)
