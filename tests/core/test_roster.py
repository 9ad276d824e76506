"""Who may meet: readiness, who is drawn, leaders, against literal expectations."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p_diloco.core.reach import BOTH, Ways
from p2p_diloco.core.roster import (
    READINESS_CONTEXT,
    announces_run,
    form_roster,
    has_place,
    leader_order,
    new_nonce,
    on_head,
    open_readiness,
    seal_readiness,
)
from tests.support.builders import (
    damaged,
    head,
    identity,
    known,
    plain_values,
    ranked,
    readiness_of,
    record_of,
    sealed_anyhow,
    values_of,
)
from tests.support.invited import token_of

HISTORY = "abc"
MEMBERS = ranked(head(HISTORY), 4)
READINESS = [readiness_of(who, HISTORY) for who in MEMBERS]
SEALED = [seal_readiness(readiness, who) for readiness, who in zip(READINESS, MEMBERS)]


def test_too_many_that_are_ready_are_cut_to_the_best_ranked() -> None:
    for order in permutations(SEALED):
        for familiar in (known(), known(*MEMBERS)):
            assert form_roster(order, head(HISTORY), 5, familiar, 2) == SEALED
            assert form_roster(order, head(HISTORY), 3, familiar, 2) == SEALED[:3]


@pytest.mark.parametrize(
    ("familiar", "max_group", "least_known", "drawn"),
    [
        ((), 6, 2, (0, 1, 2, 3, 4, 5)),  # nobody: all are newcomers
        ((5,), 6, 2, (0, 1, 2, 3, 4, 5)),  # too few to do without the owner
        ((5,), 6, 1, (0, 5)),
        ((4, 5), 6, 2, (0, 4, 5)),
        ((3, 4, 5), 6, 2, (0, 3, 4, 5)),
        ((1, 2, 3, 4, 5), 6, 2, (0, 1, 2, 3, 4, 5)),
        ((2, 3, 4, 5), 4, 2, (2, 3, 4, 5)),  # known ones first
        ((3, 4, 5), 2, 2, (3, 4)),
    ],
)
def test_newcomers_are_few_and_drawn_by_rank(
    familiar: tuple[int, ...], max_group: int, least_known: int, drawn: tuple[int, ...]
) -> None:
    members = ranked(head(HISTORY), 6)
    sealed = [seal_readiness(readiness_of(who, HISTORY), who) for who in members]
    who = known(*(members[i] for i in familiar))
    assert form_roster(reversed(sealed), head(HISTORY), max_group, who, least_known) == [sealed[i] for i in drawn]


@pytest.mark.parametrize("familiar", [*((*range(count),) for count in range(6)), (0, 5), (3, 4, 5)])
@pytest.mark.parametrize(("max_group", "least_known"), [(6, 2), (4, 2), (2, 2), (6, 1)])
def test_a_roster_has_a_place_for_whoever_would_be_taken_in_beside_its_members(
    familiar: tuple[int, ...], max_group: int, least_known: int
) -> None:
    members = ranked(head(HISTORY), 6)
    sealed = [seal_readiness(readiness_of(who, HISTORY), who) for who in members]
    who = known(*(members[i] for i in familiar))
    for size in range(1, 6):
        taken = form_roster(sealed[:size], head(HISTORY), max_group, who, least_known)
        with_the_last = form_roster([*taken, sealed[5]], head(HISTORY), max_group, who, least_known)
        place = has_place(members[5].peer_id, [*map(open_readiness, taken)], max_group, who, least_known)
        assert place == (len(taken) < max_group and sealed[5] in with_the_last)


def test_nonces_differ() -> None:
    assert new_nonce() != new_nonce()


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
    ids, me, at = [who.peer_id for who in MEMBERS], READINESS[2], head(HISTORY)
    others = [here[0], here[1], here[3]]
    assert leader_order(others, at, me, Ways(), known(), 2) == ids
    assert leader_order(reversed(others), at, me, Ways(), known(), 2) == ids
    assert leader_order(others, at, me, Ways(client_mode=True), known(), 2) == [ids[0], ids[1], ids[3]]
    assert leader_order([], at, me, Ways(), known(), 2) == [ids[2]]
    assert leader_order([], at, me, Ways(client_mode=True), known(), 2) == []


@pytest.mark.parametrize(
    ("familiar", "clients", "leaders"),
    [
        ((), (), (0, 1, 2, 3)),
        ((3,), (), (3, 0, 1, 2)),  # one is too few to do without the others, and comes first
        ((1, 3), (), (1, 3)),
        ((1, 3), (1,), (3,)),
        ((1, 3), (1, 3), (0, 2)),  # none of the known ones can be dialled
        ((2, 3), (), (2, 3)),  # I am one of them
    ],
)
def test_known_members_lead(familiar: tuple[int, ...], clients: tuple[int, ...], leaders: tuple[int, ...]) -> None:
    records = [record_of(who, HISTORY, client_mode=i in clients) for i, who in enumerate(MEMBERS) if i != 2]
    who = known(*(MEMBERS[i] for i in familiar))
    order = leader_order(records, head(HISTORY), READINESS[2], Ways(client_mode=2 in clients), who, 2)
    assert order == [MEMBERS[i].peer_id for i in leaders]


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
    assert (record.peer_id in leader_order([record], head(HISTORY), READINESS[1], Ways(), known(), 2)) == leads


def test_known_members_of_one_token_are_too_few() -> None:
    """They are one volunteer, however many: then all are taken in, and may lead."""
    two, other = token_of("two", places=2), token_of("other", key=2001)
    tokens, who = (two, two, other, token_of("newcomer", key=2002)), known(*MEMBERS[:2])
    seats = [token.seat(member.peer_id) for token, member in zip(tokens, MEMBERS)]
    sealed = [seal_readiness(readiness_of(one, HISTORY, seat=seat), one) for one, seat in zip(MEMBERS, seats)]
    records = [record_of(one, HISTORY, seat=seat) for one, seat in zip(MEMBERS, seats)]
    assert form_roster(sealed, head(HISTORY), 5, who, 2) == sealed
    assert form_roster(SEALED, head(HISTORY), 5, who, 2) == SEALED[:3]
    assert leader_order(records[1:], head(HISTORY), records[0], Ways(), who, 2) == [one.peer_id for one in MEMBERS]
    assert leader_order(records[1:], head(HISTORY), records[0], Ways(), known(*MEMBERS[1:3]), 2) == [
        one.peer_id for one in MEMBERS[1:3]
    ]


@pytest.mark.parametrize("count", [1, 8, 9, 20])
def test_eight_peers_announce_a_run(count: int) -> None:
    ids = sorted(identity(i).peer_id for i in range(count))
    records = {peer_id: record_of(identity(i)) for i in range(count) for peer_id in [identity(i).peer_id]}
    announcing = [
        me for me in ids if announces_run((record for peer_id, record in records.items() if peer_id != me), me)
    ]
    assert announcing == ids[:8]


@pytest.mark.parametrize(
    ("over", "leaders", "lone"),
    [
        ((1, 1, 1, 2), (0, 1, 2), ()),
        ((3, 1, 3, 2), (0, 1, 2), (0, 2)),
        ((2, 2, 1, 2), (0, 1, 3), (0, 1, 3)),
    ],
)
def test_those_lead_that_most_reach_and_one_asks_whom_it_reaches(
    over: tuple[int, ...], leaders: tuple[int, ...], lone: tuple[int, ...]
) -> None:
    """``over``: the family of each, or both. ``lone``: whom the last one asks."""
    ways = [Ways(reached_over=one, reaches_over=one) for one in over]
    records = [record_of(who, HISTORY, **fields_of(way)) for who, way in zip(MEMBERS, ways)]
    wide = leader_order(records[1:], head(HISTORY), READINESS[0], replace(ways[0], reaches_over=BOTH), known(), 2)
    assert set(wide) == {MEMBERS[i].peer_id for i in leaders}
    last = leader_order(records[:3], head(HISTORY), READINESS[3], ways[3], known(), 2)
    assert set(last) == {MEMBERS[i].peer_id for i in lone}


def fields_of(ways: Ways) -> dict[str, int]:
    return {"reached_over": ways.reached_over, "reaches_over": ways.reaches_over}
