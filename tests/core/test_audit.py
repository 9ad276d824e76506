"""Audits: who looks at which part, what proves a part wrong, and what proves nothing."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p_diloco.core.audit import (
    Evidence,
    drawn_parts,
    is_what_was_reduced,
    is_wrong,
    max_contributions_bytes,
    max_evidence_bytes,
    pack_contributions,
    parse_contributions,
)
from p2p_diloco.core.digest import digest
from p2p_diloco.core.grid import Grid
from p2p_diloco.core.group import Group
from p2p_diloco.core.signed_part import Contribution, Inputs, Place, Reduction
from p2p_diloco.core.update import Part
from tests.support.builders import group_of, head, identity, ranked, rules_of

GRID = Grid(n=100, codec="int8")
MEMBERS = ranked(head("a"), 5)
GROUP = group_of(MEMBERS, "a", "robust", weight=[100, 200, 300, 400, 500])
RULES = rules_of("robust")
REDUCER = 3
PLACE = Place(round_id=GROUP.round_id, number=2, part=0)


def contribution(i: int, *, place: Place = PLACE) -> Contribution:
    values = np.random.default_rng(i).standard_normal(GRID.n).astype(np.float32) + 1
    return Contribution.of(place, GRID.encode(values), MEMBERS[i])


CAME = {i: contribution(i) for i in range(5)}
MEAN = GROUP.aggregation.reduce({i: GRID.decode(0, one.data) for i, one in CAME.items()}, GROUP.weights, 0, GRID, None)
ZEROS = Part(mask=MEAN.mask, data=GRID.encode(np.zeros(GRID.n, np.float32)))


def evidence(part: Part = ZEROS, came: dict[int, Contribution] | None = None) -> Evidence:
    """As the reducer has signed it."""
    came = CAME if came is None else came
    reduction = Reduction.of(PLACE, part, Inputs.of(came), REDUCER, MEMBERS[REDUCER])
    return Evidence(roster=GROUP.sealed, index=0, part=part, reduction=reduction, came=came)


# -- who looks at what ---------------------------------------------------------------------------------------------


def reducers(count: int, parts: int) -> dict[int, str]:
    return {part: identity(part % count).peer_id for part in range(parts)}


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_every_reducer_is_audited_once_by_somebody_else_when_each_audits_one_part(count: int) -> None:
    for step in range(50):
        reducer_of = reducers(count, 3 * count)
        drawn = {i: drawn_parts(digest(bytes([step])), identity(i).peer_id, reducer_of, 1) for i in range(count)}
        assert all(len(parts) == 1 for parts in drawn.values())
        assert all(reducer_of[parts[0]] != identity(i).peer_id for i, parts in drawn.items())
        assert len({reducer_of[parts[0]] for parts in drawn.values()}) == count


def test_more_parts_are_of_other_reducers_first_and_never_more_than_there_are() -> None:
    reducer_of = reducers(4, 10)
    me = identity(0).peer_id
    drawn = drawn_parts(digest(b"head"), me, reducer_of, 16)
    assert sorted(drawn) == sorted(part for part, reducer in reducer_of.items() if reducer != me)
    assert len({reducer_of[part] for part in drawn[:3]}) == 3
    assert drawn_parts(digest(b"head"), me, reducer_of, 4) == drawn[:4]
    assert drawn_parts(digest(b"head"), me, dict.fromkeys(range(5), me), 4) == []
    assert drawn_parts(digest(b"head"), me, {}, 4) == []


def test_parts_follow_from_the_head_and_from_who_looks() -> None:
    reducer_of = dict.fromkeys(range(100), identity(9).peer_id)
    drawn = [drawn_parts(digest(bytes([i])), identity(j).peer_id, reducer_of, 1)[0] for i in range(40) for j in (1, 2)]
    assert len(set(drawn)) > 50
    assert max(Counter(drawn).values()) < 8


def outer_steps_until_all_know(seed: int, count: int, lies_in: Sequence[int], parts: int = 60) -> int:
    """One member of ``count`` lies in some of every four of its parts, others in each round. Who has found it tells
    the others after the same round, and they leave it idle from the next round on."""
    r = random.Random(f"{seed} {count}")
    names = [identity(1000 * seed % 9000 + i).peer_id for i in range(count)]
    reducer_of = {part: names[part % count] for part in range(parts)}
    for step in range(1000):
        drawn_head = r.randbytes(32)
        own = [part for part, reducer in reducer_of.items() if reducer == names[0]]
        r.shuffle(own)
        wrong = {part for i, part in enumerate(own) if i % 4 in lies_in}
        if any(wrong.intersection(drawn_parts(drawn_head, me, reducer_of, 1)) for me in names[1:]):
            return step + 1
    raise AssertionError("never")


@pytest.mark.parametrize("count", [4, 5])
def test_how_soon_all_know_of_a_reducer_that_lies(count: int) -> None:
    """In all of its parts: in the first round. In a quarter of them: in 95 of 100 within 12 rounds."""
    assert {outer_steps_until_all_know(seed, count, (0, 1, 2, 3)) for seed in range(100)} == {1}
    quarter = sorted(outer_steps_until_all_know(seed, count, (0,)) for seed in range(100))
    assert quarter[94] <= 12, quarter


# -- what is shown -------------------------------------------------------------------------------------------------


def test_contributions_travel_as_they_are() -> None:
    packed = pack_contributions(CAME)
    assert parse_contributions(packed, 5) == CAME
    assert len(packed) <= max_contributions_bytes(GRID, 0, 5)
    for members, data in ((4, packed), (5, packed[:-1]), (5, packed + b"x"), (5, b""), (5, b"\xc0"), (5, b"\x91\x00")):
        with pytest.raises(ValueError, match=r"contributions|msgpack"):
            parse_contributions(data, members)


@given(st.binary(max_size=300))
def test_any_bytes_are_contributions_or_a_value_error(data: bytes) -> None:
    try:
        came = parse_contributions(data, 5)
    except ValueError:
        return
    assert pack_contributions(came) == data


# -- what is wrong -------------------------------------------------------------------------------------------------


def wrong(group: Group, part: Part, came: dict[int, Contribution]) -> bool:
    return is_wrong(group, GRID, 0, part, evidence(part, came).reduction, came)


def test_the_mean_of_what_was_contributed_is_right_to_the_bit() -> None:
    assert not wrong(GROUP, MEAN, CAME)
    assert wrong(GROUP, ZEROS, CAME)
    assert wrong(GROUP, replace(MEAN, mask=b"\x0f"), CAME)
    changed = MEAN.data[:-1] + bytes([MEAN.data[-1] ^ 1])
    assert wrong(GROUP, replace(MEAN, data=changed), CAME)
    assert wrong(GROUP, MEAN, {i: CAME[i] for i in range(4)})


def test_a_reducer_that_leaves_out_what_it_has_signed_for_is_wrong() -> None:
    """A mask that the rule might have made, and a mean that goes with it: members take it, and an audit does not."""
    some = {i: GRID.decode(0, CAME[i].data) for i in (1, 3, 4)}
    of_some = GROUP.aggregation.reduce(some, GROUP.weights, 0, GRID, None)
    assert GROUP.may_have_made(of_some.mask, Inputs.of(CAME).senders)
    assert wrong(GROUP, of_some, CAME)
    assert evidence(of_some).accused(RULES, GRID) == (MEMBERS[REDUCER].peer_id, 1)


def test_a_reducer_that_claims_contributions_that_did_not_come_cannot_show_them() -> None:
    some = {i: CAME[i] for i in (1, 3, 4)}
    claimed = replace(Inputs.of(some), senders=Inputs.of(CAME).senders)
    reduction = Reduction.of(PLACE, MEAN, claimed, REDUCER, MEMBERS[REDUCER])
    assert not is_what_was_reduced(some, reduction)
    assert not is_what_was_reduced(CAME, reduction)
    assert is_what_was_reduced(CAME, evidence().reduction)


def test_a_reducer_that_signs_for_what_nobody_has_sent_is_wrong() -> None:
    for forged in (
        replace(CAME[1], signature=bytes(64)),
        contribution(1, place=replace(PLACE, number=1)),
        Contribution.of(PLACE, b"", MEMBERS[1]),
    ):
        came = CAME | {1: forged}
        assert wrong(GROUP, MEAN, came)


def test_evidence_proves_that_a_part_is_wrong() -> None:
    data = evidence().to_bytes()
    assert Evidence.from_bytes(data) == evidence()
    assert Evidence.from_bytes(data).accused(RULES, GRID) == (MEMBERS[REDUCER].peer_id, 1)
    assert len(data) <= max_evidence_bytes(GRID, 5)


def test_evidence_is_sound_whoever_is_known_to_who_reads_it() -> None:
    """The known members are in client mode, so they reduce, and one of them is left idle; who knows nobody would take
    the stranger, which can be dialled, for the only reducer."""
    stranger, idle, liar = MEMBERS[:3]
    clients = [False, True, True]
    group = group_of([stranger, idle, liar], "a", "robust", familiar=[idle, liar], idle=[1], client_mode=clients)
    place = Place(round_id=group.round_id, number=0, part=0)
    came = {i: contribution(i, place=place) for i in range(3)}
    reduction = Reduction.of(place, ZEROS, Inputs.of(came), 2, liar)
    shown = Evidence(roster=group.sealed, index=0, part=ZEROS, reduction=reduction, came=came)
    assert group.reducers == (2,)
    assert shown.accused(RULES, GRID) == (liar.peer_id, 1)


def test_what_proves_nothing() -> None:
    """Whoever brings it cannot make an honest reducer look wrong, not even with what others sign twice."""
    sound = evidence()
    other = contribution(1)
    twice = CAME | {1: Contribution.of(PLACE, other.data[:-1] + bytes([other.data[-1] ^ 1]), MEMBERS[1])}
    by_another = Reduction.of(PLACE, ZEROS, Inputs.of(CAME), 2, MEMBERS[REDUCER])
    for nothing, why in (
        (evidence(MEAN), "right"),
        (replace(evidence(MEAN), came=twice), "other contributions"),
        (replace(sound, came={}), "other contributions"),
        (replace(sound, part=MEAN), "not signed"),
        (replace(sound, index=1), "is none"),
        (replace(sound, reduction=replace(sound.reduction, reducer=5)), "is none"),
        (replace(sound, reduction=by_another), "not signed"),
        (replace(sound, reduction=replace(sound.reduction, number=1)), "not signed"),
        (replace(sound, roster=replace(GROUP.sealed, signature=bytes(64))), "did not sign"),
        (replace(sound, roster=replace(GROUP.sealed, members=GROUP.sealed.members[:4])), "did not sign"),
    ):
        with pytest.raises(ValueError, match=why):
            nothing.accused(RULES, GRID)
    with pytest.raises(ValueError, match="another head"):
        sound.accused(rules_of("robust", run_id="cd" * 20), GRID)


def proves(data: bytes) -> bool:
    try:
        Evidence.from_bytes(data).accused(RULES, GRID)
    except ValueError:
        return False
    return True


@given(st.binary(max_size=300) | st.integers(0, 400).map(lambda cut: evidence().to_bytes()[:cut]))
def test_any_bytes_are_evidence_or_a_value_error(data: bytes) -> None:
    assert not proves(data)


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_evidence_with_any_byte_changed_proves_nothing_of_anybody_else(at: int, change: int) -> None:
    data = bytearray(evidence().to_bytes())
    data[at % len(data)] ^= change
    assert not proves(bytes(data))
