"""Certificates: what makes one, and everything about one that can be wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p_diloco.core.certificate import (
    Certificate,
    Certified,
    Taken,
    certificate_of,
    check_certificate,
    check_most,
    is_witnessed,
)
from p2p_diloco.core.group import Group, seal_roster
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.update import UpdateHeader, bits_of, in_most_parts
from tests.support.builders import OWNER, damaged, group_of, head, identity, known, ranked, rules_of

HISTORY = "abc"
MEMBERS = ranked(head(HISTORY), 5)
HASHES = [bytes([i]) * 32 for i in (1, 2, 3)]
FULL = b"\x1f"
STATE = b"s" * 32
RULES = rules_of(min_group=2)


def group_with(familiar: int = 5) -> Group:
    """Of five; the first ``familiar`` of them are known."""
    return group_of(MEMBERS, HISTORY, familiar=MEMBERS[:familiar])


def certified(
    *signers: int, group: Group | None = None, full: bytes = FULL, witness: Identity | None = None, **changes: Any
) -> Certified:
    group = group or group_with()
    header = group.header(HASHES)
    taken = Taken(**{"round_id": group.round_id, "link": header.link, "full": full, "state": STATE} | changes)
    signatures = {i: taken.sign(MEMBERS[i]) for i in signers}
    signed = b"" if witness is None else taken.sign(witness)
    return Certified(header=header, certificate=certificate_of(group, taken, signatures, signed))


def check(one: Certified, familiar: int = 5) -> Group:
    return check_certificate(one, RULES, known(*MEMBERS[:familiar]))


@pytest.mark.parametrize("signers", [(0, 1, 2), (2, 3, 4), (0, 1, 2, 3, 4)])
def test_most_of_the_members_certify_an_update(signers: tuple[int, ...]) -> None:
    assert check(certified(*signers)) == group_with()


@pytest.mark.parametrize("signers", [(), (0,), (0, 4)])
def test_fewer_do_not(signers: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=f"a certificate with {len(signers)} signatures, too few of those that certify"
    ):
        check(certified(*signers))


def test_a_newcomers_signature_does_not_count() -> None:
    group = group_with(4)
    assert check(certified(0, 1, 2, group=group), familiar=4).counting == {0, 1, 2, 3}
    with pytest.raises(ValueError, match="too few of those that certify"):
        check(certified(0, 1, 4, group=group), familiar=4)


@pytest.mark.parametrize("witness", [None, OWNER, MEMBERS[0], identity(99)])
def test_where_nobody_is_known_the_owner_has_to_witness_it(witness: Identity | None) -> None:
    one = certified(0, 1, 2, group=group_with(0), witness=witness)
    if witness is OWNER:
        assert check(one, familiar=0).needs_witness
        check_most(one.certificate, group_with(0), one.header.link, OWNER.peer_id)
        return
    with pytest.raises(ValueError, match="without the witness" if witness is None else "not the run's owner"):
        check(one, familiar=0)


def test_a_witness_does_not_stand_for_the_members() -> None:
    with pytest.raises(ValueError, match="too few of those that certify"):
        check(certified(0, 1, group=group_with(0), witness=OWNER), familiar=0)


def test_an_owner_among_the_members_is_a_witness() -> None:
    group = group_with(0)
    assert is_witnessed(group, MEMBERS[1].peer_id, [0, 1], b"")
    assert not is_witnessed(group, MEMBERS[1].peer_id, [0, 2], b"")
    assert is_witnessed(group, OWNER.peer_id, [0, 2], b"w" * 64)
    rules = dataclasses.replace(RULES, owner=MEMBERS[1].peer_id)
    assert check_certificate(certified(0, 1, 2, group=group), rules, known()).needs_witness
    with pytest.raises(ValueError, match="without the witness"):
        check_certificate(certified(0, 2, 3, group=group), rules, known())


def forged(change: Callable[[Certified], Certified]) -> Certified:
    return change(certified(0, 1, 2))


def with_certificate(one: Certified, **changes: Any) -> Certified:
    return dataclasses.replace(one, certificate=dataclasses.replace(one.certificate, **changes))


def with_header(one: Certified, **changes: Any) -> Certified:
    return dataclasses.replace(one, header=dataclasses.replace(one.header, **changes))


NOT_SIGNED = "a signature that is not that of member 0"
SPOILED: dict[str, tuple[Callable[[Certified], Certified], str]] = {
    "another step": (lambda c: with_header(c, step=4), "of another update"),
    "another parent": (lambda c: with_header(c, parent=head("abd")), "of another update"),
    "other weights": (
        lambda c: with_header(c, contributors=tuple((peer, weight + 1) for peer, weight in c.header.contributors)),
        "of another update",
    ),
    "a contributor less": (lambda c: with_header(c, contributors=c.header.contributors[:-1]), "of another update"),
    "another part": (lambda c: with_header(c, part_hashes=(bytes(32), *c.header.part_hashes[1:])), NOT_SIGNED),
    "a part less": (lambda c: with_header(c, part_hashes=c.header.part_hashes[1:]), NOT_SIGNED),
    "others in most parts": (lambda c: with_certificate(c, full=b"\x0f"), NOT_SIGNED),
    "more than all in most parts": (lambda c: with_certificate(c, full=b"\x3f"), "names others than"),
    "another state": (lambda c: with_certificate(c, state=bytes(32)), NOT_SIGNED),
    "no state": (lambda c: with_certificate(c, state=b""), NOT_SIGNED),
    "another roster": (
        lambda c: with_certificate(c, roster=group_of(MEMBERS, HISTORY, nonce=[b"another."] * 5).sealed),
        NOT_SIGNED,
    ),
    "a roster of another leader": (
        lambda c: with_certificate(c, roster=seal_roster(c.certificate.roster.members, [], MEMBERS[1])),
        "ready for another leader",
    ),
    "signatures exchanged": (
        lambda c: with_certificate(
            c, signatures=tuple((i, c.certificate.signatures[2 - i][1]) for i, _ in c.certificate.signatures)
        ),
        NOT_SIGNED,
    ),
    "one for another": (
        lambda c: with_certificate(c, signatures=((0, c.certificate.signatures[0][1]), (4, bytes(64)))),
        "not that of member 4",
    ),
    "of a member beyond": (
        lambda c: with_certificate(c, signatures=(*c.certificate.signatures, (5, bytes(64)))),
        "not that of member 5",
    ),
    "a witness that is none": (lambda c: with_certificate(c, witness=bytes(64)), "not the run's owner"),
}


@pytest.mark.parametrize(("spoil", "complaint"), SPOILED.values(), ids=SPOILED)
def test_everything_is_under_the_signatures(spoil: Callable[[Certified], Certified], complaint: str) -> None:
    check(certified(0, 1, 2))
    with pytest.raises(ValueError, match=complaint):
        check(forged(spoil))


@pytest.mark.parametrize("field", ["round_id", "link", "full", "state"])
def test_two_things_that_are_taken_have_other_signed_bytes(field: str) -> None:
    taken = Taken(round_id=b"r" * 32, link=b"l" * 32, full=b"\x01", state=STATE)
    other = dataclasses.replace(taken, **{field: b"\x02" if field == "full" else b"x" * 32})
    assert taken.signed_bytes != other.signed_bytes
    assert not other.is_signed(MEMBERS[0].peer_id, taken.sign(MEMBERS[0]))
    assert taken.is_signed(MEMBERS[0].peer_id, taken.sign(MEMBERS[0]))


# -- bytes ----------------------------------------------------------------------------------------------------------

WHOLE = certified(0, 1, 2, witness=OWNER)


def test_it_comes_back_as_it_was() -> None:
    assert Certificate.from_bytes(WHOLE.certificate.to_bytes()) == WHOLE.certificate
    assert Certified.from_bytes(WHOLE.to_bytes()) == WHOLE


@given(st.binary(max_size=300) | damaged(WHOLE.to_bytes()))
def test_whatever_bytes_come_they_are_a_value_error_or_come_back(data: bytes) -> None:
    try:
        assert Certified.from_bytes(data).to_bytes() == data
    except ValueError:
        return
    # What is well-formed is not therefore true.
    with pytest.raises(ValueError, match=r"roster|certificate|readiness|mask|msgpack"):
        check_certificate(Certified.from_bytes(data), RULES, known(*MEMBERS))


@pytest.mark.parametrize(
    "changes",
    [
        {"full": b"f" * 33},
        {"state": b"short"},
        {"signatures": ((1, bytes(64)), (0, bytes(64)))},
        {"signatures": ((1, bytes(64)), (1, bytes(64)))},
        {"signatures": ((0, bytes(63)),)},
        {"signatures": ((256, bytes(64)),)},
        {"signatures": ((-1, bytes(64)),)},
        {"signatures": ((True, bytes(64)),)},
        {"witness": bytes(63)},
        {"roster": dataclasses.replace(WHOLE.certificate.roster, leader="")},
        {"roster": dataclasses.replace(WHOLE.certificate.roster, signature=bytes(10))},
        {"roster": dataclasses.replace(WHOLE.certificate.roster, members=(b"",) * 129)},
        {"roster": dataclasses.replace(WHOLE.certificate.roster, absent=(b"",) * 65)},
    ],
)
def test_a_field_out_of_its_bounds(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not a certificate"):
        Certificate.from_bytes(dataclasses.replace(WHOLE.certificate, **changes).to_bytes())


# -- who is in most parts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("masks", "full"),
    [
        ([b"\x07", b"\x07", b"\x07"], b"\x07"),
        ([b"\x07", b"\x03", b"\x01"], b"\x03"),
        ([b"\x03", b"\x01"], b"\x01"),  # half is not most
        ([b"", b"", b"\x01"], b""),
        ([b"\x00\x01", b"\x00\x01"], b"\x00\x01"),
    ],
)
def test_who_is_in_most_parts(masks: list[bytes], full: bytes) -> None:
    assert in_most_parts(masks) == full


def test_in_most_parts_names_peers() -> None:
    header = UpdateHeader(step=0, parent=bytes(32), contributors=(("a", 1), ("b", 1), ("c", 1)), part_hashes=())
    certificate = dataclasses.replace(WHOLE.certificate, full=b"\x05")
    assert Certified(header=header, certificate=certificate).in_most_parts() == ["a", "c"]
    assert bits_of(b"\x05\x80") == [0, 2, 15]
