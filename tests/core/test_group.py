"""The group of a roster, against literal expectations: what makes a roster, who counts, and what follows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2p_diloco.core.admission import Admission
from p2p_diloco.core.aggregate import AGGREGATIONS, AggregateName
from p2p_diloco.core.group import Group, SealedRoster, evaluator, idle_among, open_roster, seal_roster
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.invitation import Token
from p2p_diloco.core.known import Known
from p2p_diloco.core.records import seal, seal_record
from p2p_diloco.core.roster import READINESS_CONTEXT, new_nonce, open_readiness, rank, seal_readiness
from p2p_diloco.core.roster_rules import RosterRules
from p2p_diloco.core.update import contributor_mask
from p2p_diloco.core.uplinks import pack_uplinks
from tests.support.builders import (
    RUN_ID,
    group_of,
    head,
    identity,
    known,
    ranked,
    readiness_of,
    record_of,
    rules_of,
    sealed_anyhow,
    values_of,
)
from tests.support.invited import OWNER, token_of

MAX_WEIGHT = 1000
HISTORY = "abc"
MEMBERS = ranked(head(HISTORY), 4)
LEADER = MEMBERS[0]
READINESS = [readiness_of(who, HISTORY, leader=LEADER.peer_id) for who in MEMBERS]
SEALED = [seal_readiness(readiness, who) for readiness, who in zip(READINESS, MEMBERS)]
RULES = rules_of(min_group=2, max_group=5, max_weight_tokens=MAX_WEIGHT)


def check(
    sealed: Sequence[bytes],
    *,
    absent: Sequence[bytes] = (),
    leader: Identity = LEADER,
    familiar: Known | None = None,
    **changes: Any,
) -> Group:
    rules: RosterRules = dataclasses.replace(RULES, **changes)
    return open_roster(seal_roster(sealed, absent, leader), rules, known(*MEMBERS) if familiar is None else familiar)


def with_member(i: int, **changes: Any) -> list[bytes]:
    """The roster, with what member ``i`` really signed changed."""
    readiness = readiness_of(MEMBERS[i], HISTORY, **{"leader": LEADER.peer_id} | changes)
    return [*SEALED[:i], seal_readiness(readiness, MEMBERS[i]), *SEALED[i + 1 :]]


def test_a_sound_roster_is_a_group() -> None:
    group = check(SEALED)
    assert group.members == tuple(READINESS)
    assert (group.step, group.head) == (3, head(HISTORY))
    assert [group.index_of(who.peer_id) for who in MEMBERS] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="not in"):
        group.index_of(identity(99).peer_id)


@pytest.mark.parametrize(
    ("sealed", "complaint"),
    [
        ([], "a roster of 0"),
        (SEALED[:1], "a roster of 1"),
        ([*SEALED, SEALED[0], SEALED[1]], "a roster of 6"),
        ([SEALED[0], SEALED[0], *SEALED[1:]], "names a peer twice"),
        ([SEALED[0], *with_member(0, nonce=b"another.")], "names a peer twice"),
        (with_member(2, leader=MEMBERS[2].peer_id), "ready for another leader"),
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
    sealed = [
        seal_readiness(readiness_of(who, HISTORY, leader=LEADER.peer_id, weight=weight), who)
        for who, weight in zip(members, claimed)
    ]
    group = check(sealed, aggregation=AGGREGATIONS[aggregate])
    assert (group.weights, group.aggregation) == (counted, AGGREGATIONS[aggregate])
    assert group.header([]).contributors == tuple(zip((who.peer_id for who in members), counted))


@pytest.mark.parametrize(
    ("sealed", "complaint"),
    [
        (dataclasses.replace(seal_roster(SEALED, [], LEADER), leader=MEMBERS[1].peer_id), "its leader did not sign"),
        (dataclasses.replace(seal_roster(SEALED, [], LEADER), signature=bytes(64)), "its leader did not sign"),
        (dataclasses.replace(seal_roster(SEALED, [], LEADER), members=tuple(SEALED[:3])), "its leader did not sign"),
        (seal_roster(SEALED, [], MEMBERS[1]), "ready for another leader"),
    ],
)
def test_a_roster_is_its_leaders_own(sealed: SealedRoster, complaint: str) -> None:
    open_roster(seal_roster(SEALED, [], LEADER), RULES, known(*MEMBERS))
    with pytest.raises(ValueError, match=complaint):
        open_roster(sealed, RULES, known(*MEMBERS))


def test_who_gathers_need_be_no_member() -> None:
    """Its trainer may not be ready."""
    assert len(check(SEALED[1:]).members) == 3


@pytest.mark.parametrize(
    ("familiar", "min_group", "counting", "needs_witness"),
    [
        ((0, 1, 2, 3), 2, (0, 1, 2, 3), False),
        ((0, 1, 2), 2, (0, 1, 2), False),
        ((0, 2), 2, None, False),
        ((0,), 2, (0, 1, 2, 3), True),
        ((), 2, (0, 1, 2, 3), True),
        ((), 1, (0, 1, 2, 3), True),
    ],
)
def test_who_counts(
    familiar: tuple[int, ...], min_group: int, counting: tuple[int, ...] | None, needs_witness: bool
) -> None:
    """Known members; all, where fewer than two are known: then the owner has to witness the update."""
    who = known(*(MEMBERS[i] for i in familiar))
    if counting is None:
        with pytest.raises(ValueError, match="a roster with 2 newcomers beside 2 known members"):
            check(SEALED, familiar=who, min_group=min_group)
        return
    group = check(SEALED, familiar=who, min_group=min_group)
    assert (sorted(group.counting), group.needs_witness) == (list(counting), needs_witness)
    assert set(group.reducers) == set(counting)


def test_one_known_member_is_enough_where_the_smallest_group_is_one() -> None:
    group = check(SEALED[:2], familiar=known(MEMBERS[0]), min_group=1)
    assert (set(group.counting), group.needs_witness, group.reducers) == ({0}, False, (0,))
    assert check(SEALED[:2], familiar=known(MEMBERS[0]), min_group=2).needs_witness


def test_a_newcomer_gathers_only_where_no_known_member_can() -> None:
    familiar = known(*MEMBERS[1:])
    with pytest.raises(ValueError, match="a roster that a newcomer gathered"):
        check(SEALED, familiar=familiar)
    unreachable = [
        seal_readiness(readiness_of(who, HISTORY, leader=LEADER.peer_id, client_mode=i > 0), who)
        for i, who in enumerate(MEMBERS)
    ]
    assert check(unreachable, familiar=familiar).reducers == (1, 2, 3)


@pytest.mark.parametrize(
    ("members", "most"),
    [((0,), False), ((0, 3), False), ((3,), False), ((1, 2), True), ((0, 1, 2, 3), True), ((), False)],
)
def test_most_are_most_of_those_that_count(members: tuple[int, ...], most: bool) -> None:
    """Of three known members two; 3 is a newcomer."""
    assert check(SEALED, familiar=known(*MEMBERS[:3])).is_most(members) == most


def seated(*tokens: Token | None, **changes: Any) -> list[bytes]:
    """A roster of as many members, each under its token."""
    return [
        seal_readiness(
            readiness_of(
                who,
                HISTORY,
                leader=LEADER.peer_id,
                seat=b"" if token is None else token.seat(who.peer_id),
                **changes,
            ),
            who,
        )
        for who, token in zip(MEMBERS, tokens)
    ]


INVITE = Admission(run_id=RUN_ID, owner=OWNER.peer_id, by_invitation=True)
TWO, ATTIC, BARN = token_of("two", places=2, key=2002), token_of("attic"), token_of("barn", key=2001)


def test_all_members_of_a_token_have_one_signature() -> None:
    group = check(seated(ATTIC, TWO, TWO, BARN), admission=INVITE)
    assert (sorted(group.counting), sorted(group.voting)) == ([0, 1, 2, 3], [0, 1, 3])
    assert group.reducers == (0, 1, 2, 3)
    assert group.is_most((0, 1))
    assert not group.is_most((1, 2))
    assert not group.is_most((0, 2))


def test_no_two_updates_of_a_round_are_certified_where_no_member_signs_two() -> None:
    group = check(seated(ATTIC, TWO, TWO, BARN), admission=INVITE)
    everybody = range(4)
    splits = [{i for i in everybody if bits >> i & 1} for bits in range(16)]
    assert any(map(group.is_most, splits))
    assert not any(group.is_most(one) and group.is_most(set(everybody) - one) for one in splits)


def test_known_members_of_one_token_need_a_witness() -> None:
    """They are one volunteer, however many."""
    familiar = known(MEMBERS[1], MEMBERS[2])
    group = check(seated(ATTIC, TWO, TWO), admission=INVITE, familiar=familiar)
    assert (sorted(group.counting), sorted(group.voting), group.needs_witness) == ([0, 1, 2], [0, 1], True)


@pytest.mark.parametrize(
    ("sealed", "absent", "complaint"),
    [
        (seated(ATTIC, BARN, None), [], "has not been invited"),
        (seated(ATTIC, BARN, BARN), [], "more peers of one token"),
        (seated(ATTIC, token_of(owner=LEADER)), [], "of another owner"),
        (seated(ATTIC, BARN), [seal_record(record_of(MEMBERS[3], HISTORY), MEMBERS[3])], "has not been invited"),
    ],
)
def test_a_roster_has_the_seats_that_the_run_asks_for(sealed: list[bytes], absent: list[bytes], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        check(sealed, absent=absent, admission=INVITE, on_missed="keep")


def test_a_seat_in_a_roster_may_have_expired_by_now() -> None:
    assert len(check(seated(ATTIC, token_of("old", key=2003, expires_s=1)), admission=INVITE).members) == 2


@given(
    count=st.integers(1, 6), weights=st.lists(st.integers(1, 2**40), min_size=6, max_size=6), clients=st.integers(0, 63)
)
@settings(max_examples=40)
def test_every_reader_computes_the_same_group(count: int, weights: list[int], clients: int) -> None:
    members = ranked(head(""), count)
    modes = [bool(clients >> i & 1) for i in range(count)]
    groups = [group_of(members, weight=weights[:count], client_mode=modes) for _ in range(2)]
    assert groups[0] == groups[1]
    assert groups[0].header([bytes(32)]) == groups[1].header([bytes(32)])


def test_rounds_with_the_same_members_have_different_ids() -> None:
    ids = {check(SEALED).round_id, check(with_member(3, nonce=new_nonce())).round_id}
    assert len(ids | {seal_roster(SEALED, [], MEMBERS[1]).round_id}) == 3


def test_client_mode_members_reduce_and_lead_nothing_unless_there_is_nobody_else() -> None:
    group = group_of(MEMBERS, HISTORY, client_mode=[True, False, True, False])
    assert (group.leader, group.reducers) == (1, (1, 3))
    assert group.reducers_among([0, 1, 2]) == (1,)
    assert group.reducers_among([0, 2]) == (0, 2)
    group = group_of(MEMBERS, HISTORY, client_mode=[True] * 4)
    assert (group.leader, group.reducers) == (0, (0, 1, 2, 3))


# -- shares ------------------------------------------------------------------------------------------------------------

FAST, SLOW = 1 << 20, 1 << 17
SIX = ranked(head(HISTORY), 6)


def of_uplinks(*uplinks: int, unheard: Sequence[int] = (), **options: Any) -> Group:
    """Six members, all of which but the ``unheard`` ones say these uplinks of the first ones; they say them of
    themselves, too."""
    said = pack_uplinks(head(HISTORY), {who.peer_id: uplink for who, uplink in zip(SIX, uplinks)})
    return group_of(SIX, HISTORY, uplinks=[b"" if i in unheard else said for i in range(6)], **options)


def test_equal_shares_are_dealt_out_in_turn() -> None:
    for group in (of_uplinks(), of_uplinks(*[FAST] * 6), of_uplinks(SLOW, FAST, unheard=range(6))):
        assert group.shares_among(range(6), range(15)) == {i: list(range(i, 15, 6)) for i in range(6)}
        assert group.shares_among([0, 2, 5], [3, 4, 8, 9]) == {0: [3, 9], 2: [4], 5: [8]}


def test_who_is_slow_reduces_nothing_and_leads_as_before() -> None:
    group = of_uplinks(SLOW, FAST, FAST, FAST, FAST, FAST)
    assert group.uplinks == (FAST // 4, *[FAST] * 5)
    shares = group.shares_among(range(6), range(15))
    assert shares == {0: [], **{i: list(range(i - 1, 15, 5)) for i in range(1, 6)}}
    assert (group.leader, group.reducers, group.voting) == (0, (0, 1, 2, 3, 4, 5), frozenset(range(6)))


def test_where_the_fast_ones_are_gone_the_slow_one_reduces() -> None:
    group = of_uplinks(SLOW, FAST, FAST, FAST, FAST, FAST)
    assert group.shares_among([0, 2, 3], range(4)) == {0: [], 2: [0, 2], 3: [1, 3]}
    assert group.shares_among([0], range(4)) == {0: [0, 1, 2, 3]}
    assert group.shares_among([0, 3], range(4)) == {0: [0, 2], 3: [1, 3]}, "each sends as much, whatever it reduces"


def test_only_those_that_certify_are_heard() -> None:
    """The last member calls the first one slow."""
    assert of_uplinks(SLOW, FAST, FAST, unheard=range(5)).uplinks[0] == FAST // 4
    newcomer = of_uplinks(SLOW, FAST, FAST, unheard=range(5), familiar=SIX[:5])
    assert len(set(newcomer.uplinks)) == 1


def test_no_share_is_of_the_leaders_choice() -> None:
    """It can neither change what others have signed, nor be heard about itself."""
    said = pack_uplinks(head(HISTORY), {SIX[0].peer_id: FAST, SIX[1].peer_id: SLOW})
    alone = group_of(SIX, HISTORY, uplinks=[said, *[b""] * 5])
    assert alone.uplinks[0] == alone.uplinks[2], "nobody else says anything of it"


@pytest.mark.parametrize("packed", [b"abcd", bytes(5) * 2, bytes(165)])
def test_a_readiness_whose_uplinks_are_not_sound_is_none(packed: bytes) -> None:
    who = MEMBERS[0]
    sound = readiness_of(who, HISTORY)
    forged = sealed_anyhow(values_of(sound, uplinks=packed), READINESS_CONTEXT, who)
    with pytest.raises(ValueError, match="uplinks"):
        open_readiness(forged)


# -- the seed that helps ----------------------------------------------------------------------------------------------


def helper(who: Identity = OWNER, **changes: Any) -> bytes:
    fields: dict[str, Any] = {"leader": LEADER.peer_id, "weight": 1, "dropped": True, "helps": True}
    return seal_readiness(readiness_of(who, HISTORY, **fields | changes), who)


def helped(*, clients: Sequence[int] = (0, 1, 2, 3), **options: Any) -> Group:
    """All members, of which these are in client mode, and the owner's seed, which has gathered them."""
    sealed = [
        seal_readiness(readiness_of(who, HISTORY, leader=OWNER.peer_id, client_mode=i in clients), who)
        for i, who in enumerate(MEMBERS)
    ]
    return check([*sealed, helper(leader=OWNER.peer_id)], leader=OWNER, **options)


def test_the_owners_seed_leads_and_reduces_for_those_that_cannot_be_dialled() -> None:
    group = helped()
    assert (group.leader, group.reducers, group.helper) == (4, (4,), OWNER.peer_id)
    assert group.reducers_among([0, 2, 4]) == (4,)
    assert group.reducers_among([0, 2]) == (0, 2)
    assert helped(clients=(0, 2)).reducers == (1, 3, 4)


def test_a_seed_that_helps_counts_nowhere() -> None:
    group = helped()
    assert [peer_id for peer_id, _ in group.contributors] == [who.peer_id for who in MEMBERS]
    assert group.weights == (100,) * 4
    assert group.counting == group.voting == {0, 1, 2, 3}
    assert not group.is_most([0, 1, 4])
    assert group.lacks_most(contributor_mask([0, 4]))
    assert group.n_trainers([1, 4]) == 1
    assert evaluator(group, head("x")) in {who.peer_id for who in MEMBERS}
    assert helped(familiar=known(MEMBERS[0], OWNER)).needs_witness
    without = check(SEALED)
    assert without.header([]).link == dataclasses.replace(without, weights=group.weights).header([]).link


def test_the_limits_of_a_group_are_those_of_its_trainers() -> None:
    assert helped(max_group=4).weights == (100,) * 4
    wrong: tuple[dict[str, Any], ...] = ({"max_group": 2}, {"max_group": 3}, {"min_group": 5})
    for limits in wrong:
        with pytest.raises(ValueError, match=r"a roster of [45]"):
            helped(**limits)
    with pytest.raises(ValueError, match="a roster of 0"):
        check([helper(leader=OWNER.peer_id)], leader=OWNER)


@pytest.mark.parametrize(
    ("sealed", "complaint"),
    [
        ([*SEALED, helper(MEMBERS[0])], "a helper that the run has not"),
        ([*SEALED, helper(identity(60))], "a helper that the run has not"),
        ([*SEALED, helper(dropped=False)], "cannot be dialled, or contributes"),
        ([*SEALED, helper(client_mode=True)], "cannot be dialled, or contributes"),
        ([*SEALED, helper(leader=MEMBERS[1].peer_id)], "ready for another leader"),
        ([*SEALED, helper(head=head("abd"))], "on another head"),
        ([*SEALED, helper(run_id="f" * 40)], "on another head"),
        ([helper(), *SEALED], "a peer that helps, and is not the last one"),
        ([*SEALED, helper(), helper()], "a peer that helps, and is not the last one"),
    ],
)
def test_nobody_else_helps(sealed: list[bytes], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        check(sealed)


def test_a_run_may_have_no_helper() -> None:
    with pytest.raises(ValueError, match="a helper that the run has not"):
        helped(seeds_reduce="never")


def test_a_seed_that_helps_is_not_left_idle() -> None:
    sealed = [*SEALED, helper()]
    for idle in ((4,), (0, 4)):
        with pytest.raises(ValueError, match=r"leaves \d members idle"):
            open_roster(seal_roster(sealed, [], LEADER, idle), RULES, known(*MEMBERS))
    assert open_roster(seal_roster(sealed, [], LEADER, (0,)), RULES, known(*MEMBERS)).reducers == (1, 2, 3, 4)


# -- absent peers, where missed rounds are kept --------------------------------------------------------------------

AWAY = [identity(i) for i in (51, 52, 53)]


def away(i: int = 0, history: str = HISTORY, **changes: Any) -> bytes:
    return seal_record(record_of(AWAY[i], history, **changes), AWAY[i])


def test_the_total_weight_is_that_of_all_who_train_where_missed_rounds_are_kept() -> None:
    """Those who are absent at the lower median of those who came."""
    sealed = with_member(1, weight=60)
    assert check(sealed).total_weight is None
    assert check(sealed, on_missed="keep").total_weight == 360
    for count in (1, 2, 3):
        group = check(sealed, on_missed="keep", absent=[away(i) for i in range(count)])
        assert group.total_weight == 360 + 100 * count
        assert group.weights == (100, 60, 100, 100)
    light = [
        seal_readiness(readiness_of(who, HISTORY, leader=LEADER.peer_id, weight=w), who)
        for who, w in zip(MEMBERS, (100, 1, 30, 500))
    ]
    assert check(light, on_missed="keep", absent=[away()]).total_weight == 100 + 1 + 30 + 120 + 30


def test_who_was_absent_is_part_of_what_a_round_is() -> None:
    """Else two rosters of one round could divide by different sums."""
    ids = {
        check(SEALED, on_missed="keep", absent=absent).round_id
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


def test_nobody_leads_or_evaluates_for_long() -> None:
    group = group_of(MEMBERS, HISTORY)
    records = [record_of(who) for who in MEMBERS]
    heads = [head("x" * i) for i in range(40)]
    assert {evaluator(group, at) for at in heads} == {who.peer_id for who in MEMBERS}
    firsts = {min(records, key=lambda r: rank(at, r.peer_id)).peer_id for at in heads}
    assert firsts == {who.peer_id for who in MEMBERS}


# -- members without a share ----------------------------------------------------------------------------------------


def with_idle(idle: Sequence[int], *, clients: Sequence[int] = (), unknown: Sequence[int] = ()) -> Group:
    members = ranked(head("a"), 6)
    sealed = [
        seal_readiness(readiness_of(who, "a", leader=members[0].peer_id, client_mode=i in clients), who)
        for i, who in enumerate(members)
    ]
    familiar = [who for i, who in enumerate(members) if i not in unknown]
    return open_roster(seal_roster(sealed, [], members[0], idle), rules_of(), known(*familiar))


def test_members_that_a_roster_leaves_idle_neither_reduce_nor_lead() -> None:
    group = with_idle([0, 2, 3])
    assert group.reducers == (1, 4, 5)
    assert group.leader == 1
    assert group.voting == group.counting == frozenset(range(6)), "they certify, and contribute"
    assert group.reducers_among([0, 1, 2]) == (1,)
    assert group.reducers_among([0, 2, 3]) == (0, 2, 3), "somebody has to"
    assert group.round_id != with_idle([0, 2]).round_id
    assert with_idle([1], clients=(0, 5), unknown=(4,)).reducers == (2, 3)


@pytest.mark.parametrize(
    ("idle", "clients", "unknown"),
    [
        ([0, 1, 2, 3], (), ()),
        ([0, 1, 2], (3,), ()),
        ([3], (3,), ()),
        ([4], (), (4,)),
        ([1, 0], (), ()),
        ([1, 1], (), ()),
        ([6], (), ()),
    ],
    ids=["too many", "too many that can be dialled", "a client", "a newcomer", "falling", "twice", "nobody"],
)
def test_rosters_that_leave_the_wrong_ones_idle(
    idle: Sequence[int], clients: Sequence[int], unknown: Sequence[int]
) -> None:
    with pytest.raises(ValueError, match=f"leaves {len(idle)} members idle"):
        with_idle(idle, clients=clients, unknown=unknown)


def test_a_leader_leaves_the_worst_idle_as_far_as_it_may() -> None:
    group = with_idle([])
    ids = [member.peer_id for member in group.members]
    familiar, rules = known(*ranked(head("a"), 6)), rules_of()
    for unfit, idle in (
        ([], []),
        ([identity(99).peer_id], []),
        ([ids[5], ids[0]], [0, 5]),
        ([ids[5], ids[4], ids[0], ids[1]], [0, 4, 5]),
    ):
        assert idle_among(group.members, familiar, rules.least_known, unfit) == idle
        assert with_idle(idle).sealed.idle == tuple(idle)


def test_a_part_that_most_of_the_known_contributors_have_not_sent_to() -> None:
    group = with_idle([], unknown=(5,))
    for sent, most in (((), False), ((0, 1), False), ((0, 1, 5), False), ((1, 2, 4), True), ((0, 1, 2, 3), True)):
        assert group.lacks_most(contributor_mask(sent)) == (not most)


@pytest.mark.parametrize("aggregate", ["mean", "robust"])
def test_a_mask_that_the_rule_may_have_made(aggregate: AggregateName) -> None:
    """All that sent or, where the rule leaves some out, most of five and more."""
    group = group_of(ranked(head("a"), 6), "a", aggregate)
    subsets = [frozenset(one) for size in range(7) for one in combinations(range(6), size)]
    for sent, inside in product(subsets, subsets):
        some_out = aggregate == "robust" and inside < sent and len(sent) >= 5 and len(inside) > len(sent - inside)
        assert group.may_have_made(contributor_mask(inside), contributor_mask(sent)) == (inside == sent or some_out)
