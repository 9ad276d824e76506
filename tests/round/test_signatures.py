"""What a member notes of the others' signatures: who is barred for two of them, and what makes a round void."""

from __future__ import annotations

import dataclasses

import pytest

from p2p_diloco.core.barred import Barred
from p2p_diloco.core.certificate import Taken
from p2p_diloco.core.equivocation import check_proof, parse_proof
from p2p_diloco.core.identity import Identity
from p2p_diloco.round.signatures import Signatures
from tests.support.builders import RUN_ID, group_of, head, ranked

HISTORY = "abc"
MEMBERS = ranked(head(HISTORY), 4)
ME, OWNER, LIAR, OTHER = MEMBERS
GROUP = group_of(MEMBERS, HISTORY)
FIRST = Taken(round_id=GROUP.round_id, link=bytes([1]) * 32, full=b"\x0f", state=b"")
SECOND = dataclasses.replace(FIRST, link=bytes([2]) * 32)


def signatures() -> Signatures:
    barred = Barred(run_id=RUN_ID, me=ME.peer_id, owner=OWNER.peer_id)
    return Signatures(group=GROUP, owner=OWNER.peer_id, barred=barred)


def note(here: Signatures, who: Identity, taken: Taken) -> bool:
    return here.note(MEMBERS.index(who), taken, taken.sign(who))


def test_who_signs_two_commits_is_barred_with_both_and_the_round_goes_on() -> None:
    here = signatures()
    assert note(here, LIAR, FIRST)
    assert note(here, OTHER, SECOND)
    assert not list(here.barred)
    assert not note(here, LIAR, SECOND)
    assert list(here.barred) == [LIAR.peer_id]
    proof = parse_proof(here.barred.proof(LIAR.peer_id) or b"")
    assert check_proof(proof, run_id=RUN_ID, owner=OWNER.peer_id) == LIAR.peer_id
    assert (here.void, here.voided.is_set()) == ("", False)


@pytest.mark.parametrize("changes", [{}, {"full": b"\x07"}, {"state": b"s" * 32}])
def test_one_commit_is_no_lie_whatever_else_is_signed_with_it(changes: dict[str, bytes]) -> None:
    here = signatures()
    assert note(here, LIAR, FIRST)
    assert note(here, LIAR, dataclasses.replace(FIRST, **changes))
    assert not list(here.barred)


@pytest.mark.parametrize("who", [OWNER, ME], ids=["the owner, as a member and as a witness", "this peer"])
def test_against_the_owner_and_this_peer_nothing_is_noted(who: Identity) -> None:
    here = signatures()
    assert note(here, who, FIRST)
    assert note(here, who, SECOND)
    assert not list(here.barred)


def test_all_signatures_of_a_certificate_are_noted() -> None:
    here = signatures()
    for taken in (FIRST, SECOND):
        here.note_all(taken, [(MEMBERS.index(who), taken.sign(who)) for who in (LIAR, OTHER)])
    assert set(here.barred) == {LIAR.peer_id, OTHER.peer_id}


def test_a_round_is_void_for_its_first_reason() -> None:
    here = signatures()
    here.end("this")
    here.end("that")
    assert (here.void, here.voided.is_set()) == ("this", True)
