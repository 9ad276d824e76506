from __future__ import annotations

import dataclasses
import math
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2p_diloco.core.records import Record, seal, seal_record
from p2p_diloco.core.rounds import (
    READINESS_CONTEXT,
    Dispute,
    Evaluation,
    Group,
    Progress,
    Standing,
    announces_run,
    believed_losses,
    check_roster,
    disputed,
    evaluator,
    form_roster,
    from_nowhere,
    leader_order,
    must_catch_up,
    new_nonce,
    newest_evaluation,
    on_head,
    open_readiness,
    outer_step_due,
    planned_steps,
    rank,
    ready_in_s,
    seal_readiness,
    swarm_head,
    way_of,
)
from tests.support.builders import (
    damaged,
    groups_of,
    head,
    identity,
    plain_values,
    ranked,
    readiness_of,
    record_of,
    sealed_anyhow,
    values_of,
)

MAX_WEIGHT = 1000
HISTORY = "abc"
MEMBERS = ranked(head(HISTORY), 4)
READINESS = [readiness_of(who, HISTORY) for who in MEMBERS]
SEALED = [seal_readiness(readiness, who) for readiness, who in zip(READINESS, MEMBERS)]


def check(sealed: list[bytes], me: int = 0, **changes: Any) -> Group:
    limits: dict[str, Any] = {"min_group": 2, "max_group": 5, "max_weight": MAX_WEIGHT}
    return check_roster(sealed, READINESS[me], **limits | changes)


def with_member(i: int, **changes: Any) -> list[bytes]:
    """The roster, with what member ``i`` really signed changed."""
    return [*SEALED[:i], seal_readiness(readiness_of(MEMBERS[i], HISTORY, **changes), MEMBERS[i]), *SEALED[i + 1 :]]


# -- rosters -------------------------------------------------------------------------------------------------------


def test_a_sound_roster_is_the_same_group_for_every_member() -> None:
    groups = [check(SEALED, me) for me in range(4)]
    assert [group.me for group in groups] == [0, 1, 2, 3]
    assert len({dataclasses.replace(group, me=0) for group in groups}) == 1
    assert groups[0].members == tuple(READINESS)
    assert (groups[0].step, groups[0].head) == (3, head(HISTORY))


@pytest.mark.parametrize(
    ("sealed", "complaint"),
    [
        ([], "a roster of 0"),
        (SEALED[:1], "a roster of 1"),
        ([*SEALED, SEALED[0], SEALED[1]], "a roster of 6"),
        ([SEALED[0], SEALED[0], *SEALED[1:]], "names a peer twice"),
        ([SEALED[0], *with_member(0, nonce=b"another.")], "names a peer twice"),
        (SEALED[1:], "without me"),
        (with_member(0, weight=99), "without me"),
        (with_member(0, nonce=b"an older"), "without me"),
        (with_member(1, head=head("abd")), "on another head"),
        (with_member(1, step=4), "on another head"),
        (with_member(1, run_id="cd" * 20), "on another head"),
        (with_member(2, weight=MAX_WEIGHT + 1), "with a weight of 1001"),
        (SEALED[::-1], "order of rank"),
        ([SEALED[0], SEALED[2], SEALED[1], SEALED[3]], "order of rank"),
        ([*SEALED[:3], seal_readiness(READINESS[3], identity(99))], "not signed by its peer"),
        ([*SEALED[:3], seal(READINESS[3], b"another context", MEMBERS[3])], "not signed by its peer"),
        ([*SEALED[:3], seal_record(record_of(MEMBERS[3], HISTORY), MEMBERS[3])], "another version"),
        ([*SEALED[:3], b""], "not plain msgpack"),
    ],
)
def test_a_roster_is_believed_only_as_far_as_its_members_signed_it(sealed: list[bytes], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        check(sealed)


def test_the_limits_of_a_roster_are_inclusive() -> None:
    assert check(SEALED, min_group=4, max_group=4).weights == (100,) * 4
    assert check(with_member(1, weight=MAX_WEIGHT)).members[1].weight == MAX_WEIGHT


@pytest.mark.parametrize(
    ("claimed", "counted"),
    [
        ([100, 100, 100, 400], (100, 100, 100, 400)),
        ([100, 100, 100, 401], (100, 100, 100, 400)),
        ([1, 10, 1000, 1000], (1, 10, 40, 40)),
        ([1, 1, 1, 1], (1, 1, 1, 1)),
        ([1, 1000], (1, 4)),
    ],
)
def test_a_weight_counts_for_at_most_four_times_the_lower_median(claimed: list[int], counted: tuple[int, ...]) -> None:
    members = MEMBERS[: len(claimed)]
    readiness = [readiness_of(who, HISTORY, weight=weight) for who, weight in zip(members, claimed)]
    sealed = [seal_readiness(one, who) for one, who in zip(readiness, members)]
    group = check_roster(sealed, readiness[0], min_group=2, max_group=5, max_weight=MAX_WEIGHT)
    assert group.weights == counted
    assert group.header([]).contributors == tuple(zip((who.peer_id for who in members), counted))


@given(
    count=st.integers(1, 6), weights=st.lists(st.integers(1, 2**40), min_size=6, max_size=6), clients=st.integers(0, 63)
)
@settings(max_examples=40)
def test_every_member_computes_the_same_group(count: int, weights: list[int], clients: int) -> None:
    members = ranked(head(""), count)
    modes = [bool(clients >> i & 1) for i in range(count)]
    groups = groups_of(members, weight=weights[:count], client_mode=modes)
    assert [group.members[group.me].peer_id for group in groups] == [who.peer_id for who in members]
    assert len({dataclasses.replace(group, me=0) for group in groups}) == 1
    assert len({(group.leader, group.reducers, group.header([bytes(32)])) for group in groups}) == 1
    assert len({evaluator(group, head("x")) for group in groups}) == 1


def test_rounds_with_the_same_members_have_different_ids() -> None:
    assert new_nonce() != new_nonce()
    assert check(SEALED).round_id != check(with_member(3, nonce=new_nonce())).round_id


def test_client_mode_members_reduce_and_lead_nothing_unless_there_is_nobody_else() -> None:
    group = groups_of(MEMBERS, HISTORY, client_mode=[True, False, True, False])[0]
    assert (group.leader, group.reducers) == (1, (1, 3))
    assert group.reducers_among([0, 1, 2]) == (1,)
    assert group.reducers_among([0, 2]) == (0, 2)
    group = groups_of(MEMBERS, HISTORY, client_mode=[True] * 4)[0]
    assert (group.leader, group.reducers) == (0, (0, 1, 2, 3))


def test_too_many_that_are_ready_are_cut_to_the_best_ranked() -> None:
    for order in permutations(SEALED):
        assert form_roster(order, head(HISTORY), 5) == SEALED
        assert form_roster(order, head(HISTORY), 3) == SEALED[:3]


# -- absent peers, where missed rounds are kept --------------------------------------------------------------------

AWAY = [identity(i) for i in (51, 52, 53)]


def away(i: int = 0, history: str = HISTORY, **changes: Any) -> bytes:
    return seal_record(record_of(AWAY[i], history, **changes), AWAY[i])


def test_the_divisor_is_all_who_train_where_missed_rounds_are_kept() -> None:
    """Those who are absent at the lower median of those who came."""
    sealed = with_member(1, weight=60)
    assert check(sealed, 0).divisor is None
    assert check(sealed, 0, on_missed="keep").divisor == 360
    for count in (1, 2, 3):
        group = check(sealed, 0, on_missed="keep", absent=[away(i) for i in range(count)])
        assert group.divisor == 360 + 100 * count
        assert group.weights == (100, 60, 100, 100)
    light = [seal_readiness(readiness_of(who, HISTORY, weight=w), who) for who, w in zip(MEMBERS, (100, 1, 30, 500))]
    assert check(light, 0, on_missed="keep", absent=[away()]).divisor == 100 + 1 + 30 + 120 + 30


def test_who_was_absent_is_part_of_what_a_round_is() -> None:
    """Else two rosters of one round could divide by different sums."""
    ids = {
        check(SEALED, 0, on_missed="keep", absent=absent).round_id
        for absent in ([], [away(0)], [away(1)], [away(0), away(1)], [away(0, issued_s=2_000_000.0)])
    }
    assert len(ids) == 5


@pytest.mark.parametrize(
    ("absent", "complaint"),
    [
        ([seal_record(record_of(AWAY[0], HISTORY), AWAY[1])], "not signed by its peer"),
        ([b"garbage"], "not plain msgpack"),
        ([b""], "not plain msgpack"),
        ([SEALED[1]], "record"),
        ([away(history="abd")], "does not train on this head"),
        ([away(history="abcd")], "does not train on this head"),
        ([away(role="seed")], "does not train on this head"),
        ([away(phase="joining")], "does not train on this head"),
        ([away(phase="left")], "does not train on this head"),
        ([away(run_id="cd" * 20)], "does not train on this head"),
        ([away(), away()], "names an absent peer twice"),
        ([away(), away(issued_s=1_000_001.0)], "names an absent peer twice"),
        ([seal_record(record_of(MEMBERS[2], HISTORY), MEMBERS[2])], "names an absent peer twice"),
    ],
)
def test_an_absent_peer_has_signed_that_it_trains_on_this_head(absent: list[bytes], complaint: str) -> None:
    check(SEALED, on_missed="keep", absent=[away(2)])
    with pytest.raises(ValueError, match=complaint):
        check(SEALED, on_missed="keep", absent=[away(2), *absent])


def test_nobody_is_absent_where_missed_rounds_are_lost() -> None:
    with pytest.raises(ValueError, match="a roster with absent peers"):
        check(SEALED, absent=[away()])


# -- readiness as bytes --------------------------------------------------------------------------------------------


def test_readiness_comes_back_as_it_was_signed() -> None:
    assert [open_readiness(sealed) for sealed in SEALED] == READINESS


@given(st.binary(max_size=400) | damaged(SEALED[0]))
def test_bytes_that_nobody_signed_are_no_readiness(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"readiness|msgpack"):
        open_readiness(data)


FIELDS = list(READINESS[0].model_dump())


@given(
    changes=st.dictionaries(st.sampled_from(FIELDS), plain_values, max_size=3), rest=st.lists(plain_values, max_size=1)
)
def test_whatever_a_peer_signs_is_sound_readiness_or_a_value_error(
    changes: dict[str, object], rest: list[object]
) -> None:
    values = [*values_of(READINESS[0], **changes), *rest]
    try:
        opened = open_readiness(sealed_anyhow(values, READINESS_CONTEXT, MEMBERS[0]))
    except ValueError:
        return
    assert values_of(opened) == values


@pytest.mark.parametrize("weight", [0, -1, True, 1.5, float("nan"), 1e30, 2**60, "7", None])
def test_a_weight_is_a_positive_whole_number(weight: object) -> None:
    with pytest.raises(ValueError, match="weight"):
        open_readiness(sealed_anyhow(values_of(READINESS[0], weight=weight), READINESS_CONTEXT, MEMBERS[0]))


# -- who leads, who evaluates, who announces -----------------------------------------------------------------------


def test_leaders_are_ranked_among_those_who_will_come() -> None:
    here = [record_of(who, HISTORY) for who in MEMBERS]
    ids, me, at = [who.peer_id for who in MEMBERS], MEMBERS[2].peer_id, head(HISTORY)
    others = [here[0], here[1], here[3]]
    assert leader_order(others, at, me, client_mode=False) == ids
    assert leader_order(reversed(others), at, me, client_mode=False) == ids
    assert leader_order(others, at, me, client_mode=True) == [ids[0], ids[1], ids[3]]
    assert leader_order([], at, me, client_mode=False) == [me]
    assert leader_order([], at, me, client_mode=True) == []


@pytest.mark.parametrize(
    ("changes", "comes", "leads"),
    [
        ({"phase": "inner"}, True, True),
        ({"phase": "reduce"}, True, True),
        ({"client_mode": True}, True, False),
        ({"phase": "joining"}, False, False),
        ({"phase": "left"}, False, False),
        ({"role": "seed"}, False, False),
        ({"head": head("abd")}, False, False),
    ],
)
def test_who_comes_and_who_leads(changes: dict[str, Any], comes: bool, leads: bool) -> None:
    record = record_of(MEMBERS[0], HISTORY, **changes)
    assert on_head([record], head(HISTORY)) == [record] * comes
    assert (record.peer_id in leader_order([record], head(HISTORY), MEMBERS[1].peer_id, False)) == leads


def test_nobody_leads_or_evaluates_for_long() -> None:
    group = groups_of(MEMBERS, HISTORY)[0]
    records = [record_of(who) for who in MEMBERS]
    heads = [head("x" * i) for i in range(40)]
    assert {evaluator(group, at) for at in heads} == {who.peer_id for who in MEMBERS}
    firsts = {min(records, key=lambda r: rank(at, r.peer_id)).peer_id for at in heads}
    assert firsts == {who.peer_id for who in MEMBERS}


@pytest.mark.parametrize("count", [1, 8, 9, 20])
def test_eight_peers_announce_a_run(count: int) -> None:
    ids = sorted(identity(i).peer_id for i in range(count))
    records = {peer_id: record_of(identity(i)) for i in range(count) for peer_id in [identity(i).peer_id]}
    announcing = [
        me for me in ids if announces_run((record for peer_id, record in records.items() if peer_id != me), me)
    ]
    assert announcing == ids[:8]


# -- the swarm's head ----------------------------------------------------------------------------------------------


def swarm(*histories: str, **changes: Any) -> list[Record]:
    return [record_of(identity(i + 1), history, **changes) for i, history in enumerate(histories)]


def standing(history: str) -> Standing:
    record = record_of(identity(1), history)
    return Standing(step=record.step, head=record.head, heads=tuple(record.heads), committed=record.committed)


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


# -- when a trainer is ready ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("remaining", "step_s", "since_s", "gather_s", "expected"),
    [
        (0, 2.0, 0.0, 5.0, 0.0),
        (-3, 2.0, 0.0, 5.0, 0.0),
        (3, 2.0, 0.0, 6.0, 6.0),  # finishes just in time
        (3, 2.0, 0.0, 5.99, 4.0),  # stops one step before
        (3, 2.0, 1.5, 5.99, 4.5),
        (9, 2.0, 0.0, 2.0, 2.0),
        (9, 2.0, 0.0, 1.99, 2.0),  # not before a step ends
        (9, 2.0, 7.0, 5.0, 4.0),  # a step that takes longer than usual ends any moment
        (9, 100.0, 30.0, 5.0, 70.0),
        (9, 0.0, 0.0, 5.0, 5.0),  # no step measured yet
        (0, 0.0, 0.0, 5.0, 0.0),  # and none needed
    ],
)
def test_ready_in(remaining: int, step_s: float, since_s: float, gather_s: float, expected: float) -> None:
    ready = ready_in_s(remaining_steps=remaining, step_s=step_s, since_step_s=since_s, gather_s=gather_s)
    assert ready == expected
    progress = Progress(inner_step=4, planned=4 + remaining, step_s=step_s, reported_s=50.0)
    assert progress.ready_in_s(50.0 + since_s, gather_s) == expected


@given(
    planned=st.integers(1, 20),
    done=st.integers(0, 19),
    step_s=st.integers(1, 8),
    since_s=st.integers(0, 7),
    gather_s=st.integers(0, 60),
)
def test_a_trainer_is_ready_when_it_said(planned: int, done: int, step_s: int, since_s: int, gather_s: int) -> None:
    """What matchmaking is told agrees with what the training loop does."""
    done, since_s = min(done, planned - 1), min(since_s, step_s)
    told_s = ready_in_s(
        remaining_steps=planned - done, step_s=float(step_s), since_step_s=float(since_s), gather_s=float(gather_s)
    )
    now_s = step_s - since_s
    done += 1
    while not outer_step_due(
        inner_step=done, planned=planned, step_s=step_s, closes_in_s=gather_s - now_s, behind=False
    ):
        now_s += step_s
        done += 1
    assert told_s == now_s


@pytest.mark.parametrize(
    ("inner_step", "closes_in_s", "behind", "due"),
    [
        (10, None, False, True),
        (11, None, False, True),
        (9, None, False, False),
        (9, 2.0, False, False),  # another step ends just in time
        (9, 1.99, False, True),
        (9, -5.0, False, True),
        (1, 0.0, False, True),
        (0, 0.0, False, False),  # nothing to offer
        (0, None, True, True),
        (1, 100.0, True, True),
    ],
)
def test_outer_step_due(inner_step: int, closes_in_s: float | None, behind: bool, due: bool) -> None:
    assert outer_step_due(inner_step=inner_step, planned=10, step_s=2.0, closes_in_s=closes_in_s, behind=behind) is due


# -- how many inner steps are planned ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mine", "others", "planned"),
    [
        (10.0, [], 100),
        (0.0, [10.0, 20.0], 100),  # I do not know my own speed
        (10.0, [0.0, 0.0], 100),  # nor that of anybody else
        (10.0, [10.0, 10.0], 100),
        (20.0, [10.0, 10.0], 100),  # H is what the fastest makes
        (5.0, [10.0, 10.0], 50),
        (2.5, [10.0, 5.0], 25),
        (9.0, [10.0], 100),  # nearly as fast
        (8.9, [10.0], 89),
        (0.001, [10.0, 10.0], 1),
        (10.0, [10.0, 10.0, 1e9], 25),  # as if it were four times as fast as most
        (10.0, [1e300], 25),
        (10.0, [1e-300, 1e-300, 1e-300], 100),
        (10.0, [10.0, 0.0, 40.0], 25),
    ],
)
def test_planned_steps(mine: float, others: list[float], planned: int) -> None:
    assert planned_steps(100, mine, others) == planned


speeds = st.floats(0, 1e300, allow_nan=False)


@given(inner_steps=st.integers(1, 10_000), mine=speeds, others=st.lists(speeds, max_size=8))
def test_whatever_others_claim_a_peer_plans_one_to_h_steps(inner_steps: int, mine: float, others: list[float]) -> None:
    assert 1 <= planned_steps(inner_steps, mine, others) <= inner_steps


@given(
    honest=st.lists(st.floats(1.0, 2.0), min_size=3, max_size=9),
    claims=st.lists(st.sampled_from([0.0, 1e-9, 50.0, 1e9]), max_size=1),
)
def test_one_false_claim_makes_nobody_four_times_slower_than_without_it(
    honest: list[float], claims: list[float]
) -> None:
    for i, mine in enumerate(honest):
        others = honest[:i] + honest[i + 1 :]
        without, with_claim = planned_steps(1000, mine, others), planned_steps(1000, mine, others + claims)
        assert with_claim >= without / 8
        assert with_claim <= max(without, 1000 * mine / max(honest) + 1) or mine >= 0.9 * max(honest)


@given(steps=st.integers(50, 1000), speed=st.floats(1.0, 1000.0), slower=st.sampled_from([1.0, 0.5, 0.25]))
def test_who_plans_by_speed_finishes_with_the_fastest(steps: int, speed: float, slower: float) -> None:
    planned = planned_steps(steps, speed * slower, [speed, speed])
    assert planned / slower == pytest.approx(steps, abs=0.5 / slower)


# -- the bits behind a head ----------------------------------------------------------------------------------------

MINE, THEIRS, A_THIRD = bytes([1] * 32), bytes([2] * 32), bytes([3] * 32)
WAY = "abcdefg"
MY_HEADS = {step: head(WAY[:step]) for step in range(len(WAY) + 1)}


def names(digest: bytes, way: str = WAY, step: int = 5, **changes: Any) -> dict[str, Any]:
    """What the record of a peer that came that way says."""
    return {"history": way, "snapshot_step": step, "snapshot_digest": digest, **changes}


def dispute_among(*claims: dict[str, Any]) -> Dispute | None:
    return disputed(5, MINE, MY_HEADS, [record_of(identity(i + 1), **claim) for i, claim in enumerate(claims)])


@pytest.mark.parametrize(
    "claims",
    [
        [],
        [names(MINE)] * 3,
        # Of another outer step: those are other states.
        [names(THEIRS, step=0)] * 3,
        [names(THEIRS, step=6)] * 3,
        # Of another way: those are other states, too, and their heads say so.
        [names(THEIRS, way="abxdefg")] * 3,
        [names(THEIRS, way="abcdx")] * 3,
        # One that parted after the snapshot, where its record does not go back far enough to tell.
        [names(THEIRS, way="abcdexyzuv")] * 3,
        # One that stands before it.
        [names(THEIRS, way="abcd")] * 3,
        # One that has never committed.
        [names(THEIRS, committed=False)] * 3,
    ],
)
def test_no_dispute(claims: list[dict[str, Any]]) -> None:
    assert dispute_among(*claims) is None


@pytest.mark.parametrize("way", [WAY, "abcde", "abcdef", "abcdefgh", "abcdefghijk"[:9], "abcdexyz"])
def test_who_came_by_my_heads_to_the_snapshot_has_my_bits_there_or_there_is_a_dispute(way: str) -> None:
    assert dispute_among(names(MINE, way)) is None
    assert dispute_among(names(THEIRS, way)) == Dispute(others=(identity(1).peer_id,), majority=None)


@pytest.mark.parametrize(
    ("digests", "majority"),
    [
        ([THEIRS], None),
        ([THEIRS, MINE], None),
        ([THEIRS, A_THIRD], None),
        ([THEIRS, THEIRS], THEIRS),
        ([THEIRS, THEIRS, MINE], None),
        ([THEIRS, THEIRS, A_THIRD], None),
        ([THEIRS, A_THIRD, A_THIRD, A_THIRD], A_THIRD),
        ([THEIRS, THEIRS, THEIRS, MINE], THEIRS),
        ([THEIRS, THEIRS, THEIRS, MINE, MINE], None),
    ],
)
def test_more_than_half_of_all_and_two_at_least_outvote_me(digests: list[bytes], majority: bytes | None) -> None:
    dispute = dispute_among(*map(names, digests))
    assert dispute is not None
    assert dispute.majority == majority
    assert dispute.others == tuple(identity(i + 1).peer_id for i, digest in enumerate(digests) if digest != MINE)


@given(st.lists(st.tuples(st.sampled_from([MINE, THEIRS, A_THIRD]), st.booleans()), max_size=9))
def test_whoever_is_asked_the_same_digest_wins(peers: list[tuple[bytes, bool]]) -> None:
    """No two peers with different bits are each told to take the other's, and nobody yields to a minority; those who
    came another way change nothing."""
    ways = [WAY if same else "abxdefg" for _, same in peers]
    records = [
        record_of(identity(i + 1), **names(digest, way)) for i, ((digest, _), way) in enumerate(zip(peers, ways))
    ]
    here = [(i, digest) for i, (digest, same) in enumerate(peers) if same]
    taken = set()
    for me, digest in here:
        dispute = disputed(5, digest, MY_HEADS, records[:me] + records[me + 1 :])
        assert (dispute is None) == (len({other for _, other in here}) == 1)
        if dispute is not None and dispute.majority is not None:
            taken.add(dispute.majority)
            assert 2 * sum(other == dispute.majority for _, other in here) > len(here)
            assert dispute.majority != digest
    assert len(taken) <= 1


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
