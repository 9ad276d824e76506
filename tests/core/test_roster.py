"""Who meets: readiness, rosters, leaders, weights, against literal expectations."""

from __future__ import annotations

import dataclasses
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2p_diloco.core.aggregate import AGGREGATIONS, AggregateName
from p2p_diloco.core.records import seal, seal_record
from p2p_diloco.core.roster import (
    READINESS_CONTEXT,
    Group,
    announces_run,
    check_roster,
    evaluator,
    form_roster,
    leader_order,
    new_nonce,
    on_head,
    open_readiness,
    rank,
    seal_readiness,
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
    limits: dict[str, Any] = {
        "min_group": 2,
        "max_group": 5,
        "max_weight": MAX_WEIGHT,
        "aggregation": AGGREGATIONS["mean"],
    }
    return check_roster(sealed, READINESS[me], **limits | changes)


def with_member(i: int, **changes: Any) -> list[bytes]:
    """The roster, with what member ``i`` really signed changed."""
    return [*SEALED[:i], seal_readiness(readiness_of(MEMBERS[i], HISTORY, **changes), MEMBERS[i]), *SEALED[i + 1 :]]


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
    ("aggregate", "claimed", "counted"),
    [
        ("mean", [100, 100, 100, 400], (100, 100, 100, 400)),
        ("mean", [100, 100, 100, 401], (100, 100, 100, 400)),
        ("mean", [1, 10, 1000, 1000], (1, 10, 40, 40)),
        ("mean", [1, 1, 1, 1], (1, 1, 1, 1)),
        ("mean", [1, 1000], (1, 4)),
        ("robust", [100, 100, 100, 150], (100, 100, 100, 150)),
        ("robust", [100, 100, 100, 151], (100, 100, 100, 150)),
        ("robust", [3, 1000], (3, 4)),
        ("robust", [1, 1000], (1, 1)),
    ],
)
def test_a_weight_counts_for_so_many_times_the_lower_median_at_most(
    aggregate: AggregateName, claimed: list[int], counted: tuple[int, ...]
) -> None:
    members = MEMBERS[: len(claimed)]
    readiness = [readiness_of(who, HISTORY, weight=weight) for who, weight in zip(members, claimed)]
    sealed = [seal_readiness(one, who) for one, who in zip(readiness, members)]
    aggregation = AGGREGATIONS[aggregate]
    group = check_roster(sealed, readiness[0], min_group=2, max_group=5, max_weight=MAX_WEIGHT, aggregation=aggregation)
    assert (group.weights, group.aggregation) == (counted, aggregation)
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


def test_the_total_weight_is_that_of_all_who_train_where_missed_rounds_are_kept() -> None:
    """Those who are absent at the lower median of those who came."""
    sealed = with_member(1, weight=60)
    assert check(sealed, 0).total_weight is None
    assert check(sealed, 0, on_missed="keep").total_weight == 360
    for count in (1, 2, 3):
        group = check(sealed, 0, on_missed="keep", absent=[away(i) for i in range(count)])
        assert group.total_weight == 360 + 100 * count
        assert group.weights == (100, 60, 100, 100)
    light = [seal_readiness(readiness_of(who, HISTORY, weight=w), who) for who, w in zip(MEMBERS, (100, 1, 30, 500))]
    assert check(light, 0, on_missed="keep", absent=[away()]).total_weight == 100 + 1 + 30 + 120 + 30


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
