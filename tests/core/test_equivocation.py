"""Proofs that a peer lies: what proves it, and everything that looks like it and does not."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p_diloco.core.certificate import Certified, Taken, certificate_of
from p2p_diloco.core.equivocation import (
    KINDS,
    MAX_PROOF_BYTES,
    Proof,
    TwoLinks,
    TwoParts,
    TwoRosters,
    between,
    check_proof,
    pack_proof,
    parse_proof,
    proved,
)
from p2p_diloco.core.group import MAX_ABSENT, MAX_MEMBERS, SealedRoster, seal_roster
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.records import MAX_RECORD_BYTES
from p2p_diloco.core.roster import seal_readiness
from p2p_diloco.core.signed_part import Inputs, Place, Reduction, Version
from p2p_diloco.core.update import MAX_MASK_BYTES, Part
from tests.support.builders import OWNER, RUN_ID, damaged, group_of, head, ranked, readiness_of

HISTORY = "abc"
MEMBERS = ranked(head(HISTORY), 5)
LEADER = MEMBERS[0]
ROUND_ID = bytes([9]) * 32
RULES = {"run_id": RUN_ID, "owner": OWNER.peer_id}


def ready(who: Identity, nonce: int = 1, leader: Identity = LEADER, **changes: Any) -> bytes:
    readiness = readiness_of(who, HISTORY, leader=leader.peer_id, nonce=bytes([nonce]) * 8, **changes)
    return seal_readiness(readiness, who)


def roster(*members: bytes, leader: Identity = LEADER) -> SealedRoster:
    return seal_roster(members, (), leader)


def taken(link: int, round_id: bytes = ROUND_ID, **changes: bytes) -> Taken:
    return Taken(**{"round_id": round_id, "link": bytes([link]) * 32, "full": b"\x1f", "state": b""} | changes)


def two_links(first: Taken, second: Taken, who: Identity = LEADER) -> TwoLinks:
    signatures = first.sign(who), second.sign(who)
    return TwoLinks(peer_id=who.peer_id, taken=(first, second), signatures=signatures)


MINE, OTHERS = ready(LEADER), [ready(who) for who in MEMBERS[1:]]
ROSTERS = TwoRosters(rosters=(roster(MINE, *OTHERS[:2]), roster(MINE, *OTHERS[2:])))
LINKS = two_links(taken(1), taken(2))
PLACE = Place(round_id=ROUND_ID, number=0, part=3)
CAME = Inputs(senders=b"\x1f", digest=bytes(32))


def version(values: int, inputs: Inputs = CAME, place: Place = PLACE, who: Identity = LEADER) -> Version:
    part = Part(mask=b"\x1f", data=bytes([values]) * 8)
    return Version.of(part, Reduction.of(place, part, inputs, 0, who))


def two_parts(first: Version, second: Version, place: Place = PLACE, who: Identity = LEADER) -> TwoParts:
    return TwoParts(peer_id=who.peer_id, place=place, versions=(first, second))


PARTS = two_parts(version(1), version(2))
PROOFS: list[Proof] = [ROSTERS, LINKS, PARTS]


def check(proof: Proof) -> str:
    return check_proof(parse_proof(pack_proof(proof)), **RULES)


@pytest.mark.parametrize("proof", PROOFS)
def test_a_proof_is_about_who_has_signed_twice(proof: Proof) -> None:
    assert check(proof) == LEADER.peer_id
    assert parse_proof(pack_proof(proof)) == proof


def test_two_rosters_with_other_absent_ones_prove_it_as_well() -> None:
    other = seal_roster((MINE, *OTHERS), (b"somebody",), LEADER)
    assert check(TwoRosters(rosters=(roster(MINE, *OTHERS), other))) == LEADER.peer_id


HONEST = {
    "a round that is tried again, by the same leader": (roster(MINE, OTHERS[0]), roster(ready(LEADER, 2), OTHERS[0])),
    "the same roster, sent again": (roster(MINE, OTHERS[0]), roster(MINE, OTHERS[0])),
    "a readiness that its member has given an honest leader twice": (
        roster(MINE, OTHERS[0]),
        roster(ready(LEADER, 2), OTHERS[0], OTHERS[1]),
    ),
    "a leader that is in neither": (roster(OTHERS[0]), roster(OTHERS[0], OTHERS[1])),
    "two leaders, one after the other": (
        roster(MINE, OTHERS[0]),
        roster(ready(MEMBERS[1], leader=MEMBERS[1]), ready(LEADER, leader=MEMBERS[1]), leader=MEMBERS[1]),
    ),
    "a readiness for another run": (
        roster(ready(LEADER, run_id="0" * 40)),
        roster(ready(LEADER, run_id="0" * 40), OTHERS[0]),
    ),
    "a readiness for another leader": (
        roster(ready(LEADER, leader=MEMBERS[1])),
        roster(ready(LEADER, leader=MEMBERS[1]), OTHERS[0]),
    ),
    "something that is no readiness": (roster(b"x"), roster(b"x", OTHERS[0])),
}


@pytest.mark.parametrize("rosters", HONEST.values(), ids=HONEST)
def test_what_honest_leaders_sign_proves_nothing(rosters: tuple[SealedRoster, SealedRoster]) -> None:
    assert proved(rosters[0], rosters[1], **RULES) is None
    with pytest.raises(ValueError, match=r"proof|plain msgpack"):
        check_proof(TwoRosters(rosters=rosters), **RULES)


@pytest.mark.parametrize("side", [0, 1])
def test_a_roster_that_the_leader_did_not_sign_proves_nothing(side: int) -> None:
    rosters = list(ROSTERS.rosters)
    rosters[side] = dataclasses.replace(rosters[side], signature=bytes(64))
    with pytest.raises(ValueError, match="did not sign"):
        check(TwoRosters(rosters=(rosters[0], rosters[1])))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (taken(1), taken(1)),
        (taken(1), taken(1, state=b"s" * 32)),
        (taken(1), taken(1, full=b"\x01")),
        (taken(1), taken(2, round_id=bytes(32))),
    ],
    ids=["one commit", "with another state", "with another mask", "of two rounds"],
)
def test_one_link_in_a_round_proves_nothing(first: Taken, second: Taken) -> None:
    with pytest.raises(ValueError, match="a proof of one commit"):
        check_proof(two_links(first, second), **RULES)


@pytest.mark.parametrize("side", [0, 1])
def test_a_commit_that_somebody_else_signed_proves_nothing(side: int) -> None:
    signatures = list(LINKS.signatures)
    signatures[side] = LINKS.taken[side].sign(MEMBERS[1])
    with pytest.raises(ValueError, match="did not sign"):
        check(dataclasses.replace(LINKS, signatures=(signatures[0], signatures[1])))


def test_a_mean_of_other_contributions_is_another_version() -> None:
    other = Inputs(senders=b"\x0f", digest=bytes(32))
    assert check(two_parts(version(1), version(1, other))) == LEADER.peer_id


@pytest.mark.parametrize(
    "place", [replace(PLACE, part=2), replace(PLACE, number=1), replace(PLACE, round_id=bytes(32))]
)
def test_a_part_that_is_reduced_again_proves_nothing(place: Place) -> None:
    """Each place has its own: the next part, a second butterfly for what was lost, another round."""
    for named in (PLACE, place):
        with pytest.raises(ValueError, match="did not sign"):
            check(two_parts(version(1), version(2, place=place), named))


def test_a_part_that_is_sent_twice_proves_nothing() -> None:
    with pytest.raises(ValueError, match="a proof of one version"):
        check(two_parts(version(1), version(1)))


@pytest.mark.parametrize("side", [0, 1])
def test_a_part_that_somebody_else_signed_proves_nothing(side: int) -> None:
    versions = [version(1), version(2)]
    versions[side] = version(3, who=MEMBERS[1])
    with pytest.raises(ValueError, match="did not sign"):
        check(two_parts(versions[0], versions[1]))


OUT_OF_BOUNDS: dict[str, Callable[[list[Any]], None]] = {
    "an id that is too long": lambda proof: proof.__setitem__(1, "p" * 65),
    "a short round id": lambda proof: proof[2].__setitem__(0, bytes(31)),
    "a butterfly too many": lambda proof: proof[2].__setitem__(1, 256),
    "a part too many": lambda proof: proof[2].__setitem__(2, 1 << 16),
    "a part below all": lambda proof: proof[2].__setitem__(2, -1),
    "true for a number": lambda proof: proof[2].__setitem__(1, True),
    "a short hash": lambda proof: proof[3].__setitem__(0, bytes(31)),
    "too many senders": lambda proof: proof[3].__setitem__(1, b"\1" * (MAX_MASK_BYTES + 1)),
    "senders with a zero": lambda proof: proof[4].__setitem__(1, b"\x1f\0"),
    "a short digest": lambda proof: proof[4].__setitem__(2, bytes(31)),
    "a short signature": lambda proof: proof[4].__setitem__(3, bytes(63)),
    "text for a signature": lambda proof: proof[4].__setitem__(3, "s" * 64),
}


@pytest.mark.parametrize("change", OUT_OF_BOUNDS.values(), ids=OUT_OF_BOUNDS)
def test_a_proof_of_two_parts_with_a_field_out_of_its_bounds_is_none(change: Callable[[list[Any]], None]) -> None:
    content = msgpack.unpackb(pack_proof(PARTS))
    change(content)
    with pytest.raises(ValueError, match="not a proof"):
        parse_proof(msgpack.packb(content))


def test_nothing_is_proved_against_the_owner() -> None:
    """It may sign as a member and as a witness."""
    with pytest.raises(ValueError, match="owner"):
        check(two_links(taken(1), taken(2), OWNER))
    with pytest.raises(ValueError, match="owner"):
        check(two_parts(version(1, who=OWNER), version(2, who=OWNER), who=OWNER))
    mine = ready(OWNER, leader=OWNER)
    assert proved(roster(mine, leader=OWNER), roster(mine, OTHERS[0], leader=OWNER), **RULES) is None


# -- bytes -----------------------------------------------------------------------------------------------------------


@given(st.one_of([damaged(pack_proof(proof)) for proof in PROOFS]))
def test_what_is_damaged_proves_nothing_else(data: bytes) -> None:
    """Whatever comes of the bytes, nobody but who has signed is named."""
    with contextlib.suppress(ValueError):
        assert check_proof(parse_proof(data), **RULES) == LEADER.peer_id


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.binary(max_size=70) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=12,
)


@given(st.sampled_from([*KINDS, "other"]), st.lists(VALUES, max_size=5))
def test_no_values_pass_that_are_no_proof(kind: str, values: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"proof|plain msgpack"):
        check_proof(parse_proof(msgpack.packb([kind, *values])), **RULES)


@given(st.binary(max_size=200))
def test_no_bytes_pass_that_are_no_proof(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"proof|plain msgpack"):
        parse_proof(data)


def test_the_largest_rosters_fit_and_nothing_beyond() -> None:
    largest = SealedRoster(
        leader="p" * 64,
        members=(bytes(MAX_RECORD_BYTES),) * MAX_MEMBERS,
        absent=(bytes(MAX_RECORD_BYTES),) * MAX_ABSENT,
        signature=bytes(64),
        idle=tuple(range(MAX_MEMBERS)),
    )
    data = pack_proof(TwoRosters(rosters=(largest, largest)))
    assert parse_proof(data) == TwoRosters(rosters=(largest, largest))
    with pytest.raises(ValueError, match="too large"):
        parse_proof(data + bytes(MAX_PROOF_BYTES - len(data) + 1))


# -- two updates -----------------------------------------------------------------------------------------------------


def certified(hashes: int, *signers: int) -> Certified:
    group = group_of(MEMBERS, HISTORY, familiar=MEMBERS)
    header = group.header([bytes([hashes]) * 32])
    signed = Taken(round_id=group.round_id, link=header.link, full=b"\x1f", state=b"")
    signatures = {i: signed.sign(MEMBERS[i]) for i in signers}
    return Certified(header=header, certificate=certificate_of(group, signed, signatures))


def test_two_updates_of_one_round_prove_who_has_signed_both() -> None:
    proofs = list(between(certified(1, 0, 1, 2), certified(2, 2, 3, 4), **RULES))
    assert [check(proof) for proof in proofs] == [MEMBERS[2].peer_id]
    assert not list(between(certified(1, 0, 1, 2), certified(1, 2, 3, 4), **RULES))


def test_two_updates_of_two_rounds_prove_what_their_rosters_do() -> None:
    def of(sealed: SealedRoster) -> Certified:
        one = certified(1, 0)
        return dataclasses.replace(one, certificate=dataclasses.replace(one.certificate, roster=sealed))

    first, second = ROSTERS.rosters
    assert list(between(of(first), of(second), **RULES)) == [ROSTERS]
    first, second = HONEST["a round that is tried again, by the same leader"]
    assert not list(between(of(first), of(second), **RULES))
