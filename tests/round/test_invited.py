"""Whom a peer meets in a run by invitation, and what counts beside its own vote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest

from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.directory import Directory
from p2p_diloco.core.electors import NoHistory
from p2p_diloco.core.errors import Misbehaved, Refused
from p2p_diloco.core.group import seal_roster
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.invitation import Token, open_revocations
from p2p_diloco.core.records import seal_record
from p2p_diloco.core.roster import open_readiness, rank, seal_readiness
from p2p_diloco.core.swarm_head import Standing
from p2p_diloco.round.company import Company
from p2p_diloco.round.here import Here
from p2p_diloco.round.seat import Seat
from p2p_diloco.wire.round_messages import Ready, Roster
from tests.core.test_barred import proof_of
from tests.support.builders import NOW_S, head, identity, known, readiness_of, record_of
from tests.support.fakes import make_manifest
from tests.support.invited import EXPIRES_S, OWNER, revocations_of, token_of

A, B, C = (identity(i + 1) for i in range(3))
MANIFEST = make_manifest(1000, np.zeros(1000, np.float32), OWNER, membership="invite", on_missed="keep")
RUN_ID = MANIFEST.run_id
ATTIC, BARN = token_of("attic", run_id=RUN_ID), token_of("barn", key=2001, run_id=RUN_ID)
CELLAR = token_of("cellar", key=2003, run_id=RUN_ID)
FOR_EVER = token_of("for-ever", key=2004, run_id=RUN_ID, places=2, expires_s=10**11)


def here_of(seat: bytes = b"", now_s: float = NOW_S) -> Here:
    standing = Standing(step=0, head=head(""), heads=())
    return Here(
        transport=cast(Any, None),
        identity=A,
        directory=Directory(A.peer_id, RUN_ID, admission=MANIFEST.admission()),
        seat=Seat(standing=standing, history=NoHistory(), role_trainer=True, client_mode=False),
        timeouts=Timeouts(),
        wall_s=lambda: now_s,
        sealed_seat=seat,
    )


def company_of(now_s: float = NOW_S) -> Company:
    return Company(here=here_of(now_s=now_s), manifest=MANIFEST)


def readiness(who: Identity, token: Token | None, leader: Identity = A) -> bytes:
    seat = b"" if token is None else token.seat(who.peer_id)
    return seal_readiness(readiness_of(who, run_id=RUN_ID, leader=leader.peer_id, seat=seat), who)


def ranked_claims(*claims: tuple[Identity, Token | None]) -> list[tuple[Identity, Token | None]]:
    return sorted(claims, key=lambda claim: rank(head(""), claim[0].peer_id))


def roster_of(*claims: tuple[Identity, Token | None], absent: Sequence[bytes] = ()) -> Roster:
    """As ``B`` gathers it."""
    sealed = seal_roster([readiness(who, token, B) for who, token in ranked_claims(*claims)], absent, B)
    return Roster(members=list(sealed.members), absent=list(sealed.absent), signature=sealed.signature)


def sealed_record(who: Identity, token: Token | None) -> bytes:
    seat = b"" if token is None else token.seat(who.peer_id)
    return seal_record(record_of(who, run_id=RUN_ID, seat=seat), who)


def test_a_roster_with_all_seats_is_taken() -> None:
    roster = roster_of((A, ATTIC), (B, BARN), (OWNER, None), absent=[sealed_record(C, CELLAR)])
    group = company_of().group_of(B.peer_id, roster)
    assert {member.peer_id for member in group.members} == {A.peer_id, B.peer_id, OWNER.peer_id}


@pytest.mark.parametrize(
    ("claims", "absent"),
    [
        ([(A, ATTIC), (B, None)], []),
        ([(A, ATTIC), (B, ATTIC)], []),
        ([(A, ATTIC), (B, BARN)], [sealed_record(C, None)]),
        ([(A, ATTIC), (B, BARN)], [sealed_record(C, ATTIC)]),
    ],
)
def test_a_leader_lies_that_brings_somebody_in(
    claims: list[tuple[Identity, Token | None]], absent: list[bytes]
) -> None:
    with pytest.raises(Misbehaved, match=r"has not been invited|more peers of one token"):
        company_of().group_of(B.peer_id, roster_of(*claims, absent=absent))


@pytest.mark.parametrize("absent", [(), (sealed_record(C, CELLAR),)])
def test_a_leader_that_has_not_heard_of_the_end_of_a_seat_has_not_lied(absent: tuple[bytes, ...]) -> None:
    """Only this round is not with it."""
    late = company_of(now_s=EXPIRES_S + 1000)
    roster = roster_of((A, FOR_EVER), (B, FOR_EVER), absent=absent) if absent else roster_of((A, ATTIC), (B, BARN))
    with pytest.raises(Refused, match="its roster has a peer whose invitation has expired"):
        late.group_of(B.peer_id, roster)


def test_a_leader_that_has_not_heard_of_a_revocation_has_not_lied() -> None:
    company, roster = company_of(), roster_of((A, ATTIC), (B, BARN))
    directory = company.here.directory
    sealed = revocations_of({BARN.invitation.token: 0}, run_id=RUN_ID)
    listed = open_revocations(sealed, run_id=RUN_ID, owner=OWNER.peer_id)
    directory.admission = replace(directory.admission, revocations=listed)
    with pytest.raises(Refused, match="its roster has a peer whose invitation was revoked"):
        company.group_of(B.peer_id, roster)


def test_a_barred_leader_gathers_nobody_also_where_it_is_no_member() -> None:
    company = company_of()
    ready = [readiness(who, token, B) for who, token in ranked_claims((A, ATTIC), (OWNER, None))]
    sealed = seal_roster(ready, (), B)
    roster = Roster(members=list(sealed.members), absent=[], signature=sealed.signature)
    assert company.group_of(B.peer_id, roster).sealed.leader == B.peer_id
    company.here.directory.barred.add(proof_of(B))
    with pytest.raises(Refused, match="it is barred"):
        company.group_of(B.peer_id, roster)


@pytest.mark.parametrize(("known_members", "lacks"), [((A, B), True), ((A, C), False)])
def test_known_members_of_one_token_lack_a_witness(known_members: tuple[Identity, ...], lacks: bool) -> None:
    company = company_of()
    company.here.seat.known = known(*known_members)
    seats = [(A, FOR_EVER), (B, FOR_EVER), (C, CELLAR)]
    ready = [open_readiness(readiness(who, token)) for who, token in seats]
    assert company.lacks_witness(ready) == lacks


def test_readiness_needs_the_seat_of_its_peer() -> None:
    company = company_of()
    sound = Ready(readiness=readiness(B, BARN), record=sealed_record(B, BARN))
    assert company.readiness_of(B.peer_id, sound).peer_id == B.peer_id
    for token in (None, token_of("x", key=2002)):  # none, and one to another run
        with pytest.raises(Misbehaved):
            company.readiness_of(B.peer_id, Ready(readiness=readiness(B, token), record=sealed_record(B, BARN)))


def test_places_in_a_round_go_by_rank() -> None:
    ready = [readiness(who, ATTIC) for who in (A, B, C)]
    first = min((A, B, C), key=lambda who: rank(head(""), who.peer_id))
    assert company_of().with_places(head(""), ready) == {first.peer_id}
    assert company_of(now_s=EXPIRES_S).with_places(head(""), ready) == set()


def test_the_others_of_my_token_have_no_vote_beside_mine() -> None:
    here = here_of(ATTIC.seat(A.peer_id))
    for who, token in ((B, ATTIC), (C, BARN)):
        here.directory.learn(sealed_record(who, token), NOW_S)
    voters, mine = here.voters()
    assert ([record.peer_id for record in voters], mine) == ([C.peer_id], here.seat.standing)
    assert {record.peer_id for record in here.directory.believed(NOW_S)} == {B.peer_id, C.peer_id}
