"""Who may take part: seats, times, places and votes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from p2p_diloco.core.admission import (
    EXPIRY_LEEWAY_S,
    Admission,
    Claim,
    Lapsed,
    counts_as,
    invited_as,
    one_vote_each,
)
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.invitation import Token, open_revocations
from p2p_diloco.core.records import Record, Unsound
from p2p_diloco.core.swarm_head import swarm_head
from tests.support.builders import NOW_S, RUN_ID, head, identity, record_of
from tests.support.invited import EXPIRES_S, OWNER, revocations_of, token_of

OPEN = Admission.to_all(RUN_ID)
INVITE = Admission(run_id=RUN_ID, owner=OWNER.peer_id, by_invitation=True)
A, B, C, D, E = (identity(i + 1) for i in range(5))
ATTIC, BARN = token_of("attic"), token_of("barn", places=2, key=2001)
CLAIM_A = Claim(peer_id=A.peer_id, seat=ATTIC.seat(A.peer_id))


def claims(token: Token, *peers: Identity) -> list[Claim]:
    return [Claim(peer_id=who.peer_id, seat=token.seat(who.peer_id)) for who in peers]


def seated(who: Identity, token: Token, history: str = "") -> Record:
    return record_of(who, history, seat=token.seat(who.peer_id))


def revoked(token: Token, step: int) -> Admission:
    sealed = revocations_of({token.invitation.token: step})
    listed = open_revocations(sealed, run_id=RUN_ID, owner=OWNER.peer_id)
    return Admission(run_id=RUN_ID, owner=OWNER.peer_id, by_invitation=True, revocations=listed)


def test_an_open_run_knows_no_seats() -> None:
    assert OPEN.check(Claim(peer_id=A.peer_id, seat=b""), now_s=NOW_S, step=0) is None
    with pytest.raises(Unsound, match="needs none"):
        OPEN.check(CLAIM_A, now_s=NOW_S, step=0)


def test_in_a_run_by_invitation_all_but_the_owner_need_a_seat() -> None:
    assert INVITE.check(Claim(peer_id=OWNER.peer_id, seat=b""), now_s=NOW_S, step=0) is None
    assert INVITE.check(CLAIM_A, now_s=NOW_S, step=0) == ATTIC.invitation
    with pytest.raises(Unsound, match="has not been invited"):
        INVITE.check(Claim(peer_id=A.peer_id, seat=b""), now_s=NOW_S, step=0)
    with pytest.raises(Unsound, match="needs none"):
        INVITE.check(claims(ATTIC, OWNER)[0], now_s=NOW_S, step=0)


def test_a_seat_is_of_this_run_by_this_owner() -> None:
    for token in (token_of(run_id="cd" * 20), token_of(owner=A)):
        with pytest.raises(Unsound, match="of another run, or of another owner"):
            INVITE.check(claims(token, B)[0], now_s=NOW_S, step=0)
    with pytest.raises(Unsound, match="has not signed for this peer"):
        INVITE.check(Claim(peer_id=B.peer_id, seat=CLAIM_A.seat), now_s=NOW_S, step=0)


def test_expiry_stops_admission_and_not_history() -> None:
    assert INVITE.admits(CLAIM_A, now_s=EXPIRES_S - 0.1, step=0)
    assert not INVITE.admits(CLAIM_A, now_s=EXPIRES_S, step=0)
    with pytest.raises(Lapsed, match="has expired"):
        INVITE.check(CLAIM_A, now_s=EXPIRES_S, step=0)
    assert INVITE.check(CLAIM_A, now_s=None, step=0) == ATTIC.invitation


def test_a_revocation_is_from_an_outer_step_on() -> None:
    later = revoked(ATTIC, 7)
    assert later.admits(CLAIM_A, now_s=NOW_S, step=6)
    assert not later.admits(CLAIM_A, now_s=NOW_S, step=7)
    assert later.admits(claims(BARN, B)[0], now_s=NOW_S, step=7)
    with pytest.raises(Lapsed, match="was revoked"):
        later.check(CLAIM_A, now_s=None, step=7)
    assert (later.number, INVITE.number) == (1, 0)


# -- rosters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "absent"),
    [
        ([*claims(ATTIC, A), *claims(BARN, B, C), Claim(peer_id=OWNER.peer_id, seat=b"")], []),
        ([*claims(ATTIC, A), *claims(BARN, B)], claims(BARN, C)),
    ],
)
def test_a_roster_within_all_places(members: Sequence[Claim], absent: Sequence[Claim]) -> None:
    INVITE.check_roster(members, absent, now_s=NOW_S, step=0)


@pytest.mark.parametrize(
    ("members", "absent", "why"),
    [
        (claims(ATTIC, A, B), [], "than it has places"),
        (claims(BARN, A, B, C), [], "than it has places"),
        (claims(ATTIC, A), claims(ATTIC, B), "than it has places"),
        ([*claims(ATTIC, A), Claim(peer_id=B.peer_id, seat=b"")], [], "has not been invited"),
        (claims(ATTIC, A), [Claim(peer_id=B.peer_id, seat=b"")], "has not been invited"),
        ([Claim(peer_id=B.peer_id, seat=CLAIM_A.seat)], [], "has not signed"),
    ],
)
def test_a_roster_that_is_not_believed(members: Sequence[Claim], absent: Sequence[Claim], why: str) -> None:
    with pytest.raises(Unsound, match=why) as error:
        INVITE.check_roster(members, absent, now_s=NOW_S, step=0)
    assert not isinstance(error.value, Lapsed)


def test_a_roster_is_believed_a_little_longer_than_a_seat_lasts() -> None:
    """Its leader's clock may be behind; one that forms it does not take the leeway."""
    INVITE.check_roster([CLAIM_A], [], now_s=EXPIRES_S + EXPIRY_LEEWAY_S - 0.1, step=0)
    with pytest.raises(Lapsed, match="has expired"):
        INVITE.check_roster([CLAIM_A], [], now_s=EXPIRES_S + EXPIRY_LEEWAY_S, step=0)
    assert INVITE.within_places([CLAIM_A], now_s=EXPIRES_S, step=0) == set()


def test_a_roster_of_the_past_is_checked_without_a_clock() -> None:
    INVITE.check_roster([CLAIM_A], [], now_s=None, step=10**6)
    with pytest.raises(Lapsed, match="was revoked"):
        revoked(ATTIC, 7).check_roster([CLAIM_A], [], now_s=None, step=7)
    revoked(ATTIC, 7).check_roster([CLAIM_A], [], now_s=None, step=6)


def test_places_go_to_those_who_stand_first() -> None:
    asked = [*claims(BARN, C, A, B), *claims(ATTIC, E, D), Claim(peer_id=OWNER.peer_id, seat=b"")]
    placed = INVITE.within_places(asked, now_s=NOW_S, step=0)
    assert placed == {who.peer_id for who in (C, A, E, OWNER)}
    INVITE.check_roster([one for one in asked if one.peer_id in placed], [], now_s=NOW_S, step=0)
    stranger = Claim(peer_id=identity(9).peer_id, seat=b"")
    assert INVITE.within_places([stranger], now_s=NOW_S, step=0) == set()
    assert OPEN.within_places([stranger], now_s=NOW_S, step=0) == {stranger.peer_id}


# -- votes ---------------------------------------------------------------------------------------------------------


def test_all_peers_of_a_token_count_once() -> None:
    records = [seated(A, BARN), seated(B, BARN), seated(C, ATTIC), record_of(OWNER)]
    assert {counts_as(record) for record in records} == {
        BARN.invitation.token,
        ATTIC.invitation.token,
        OWNER.peer_id,
    }
    assert [invited_as(record) for record in records] == ["barn", "barn", "attic", ""]


def test_the_one_that_is_furthest_votes_for_its_token() -> None:
    behind, ahead, other = seated(A, BARN, "ab"), seated(B, BARN, "abc"), seated(C, ATTIC, "ab")
    ordered = sorted((ahead, other), key=lambda record: record.peer_id)
    assert one_vote_each([behind, ahead, other]) == ordered
    assert one_vote_each([other, ahead, behind]) == ordered
    assert one_vote_each([behind, ahead, other], but={BARN.invitation.token}) == [other]


def test_ids_under_one_token_are_no_majority() -> None:
    """Three peers of one volunteer against two volunteers."""
    crowd = [seated(who, token_of("crowd", places=9, key=2002), "xyz") for who in (A, B, C)]
    others = [seated(D, ATTIC, "ab"), seated(E, BARN, "ab")]
    assert swarm_head([*crowd, *others], None) == (3, head("xyz"))
    assert swarm_head(one_vote_each([*crowd, *others]), None) == (2, head("ab"))


def test_without_invitations_everybody_votes() -> None:
    records = [record_of(who, "ab") for who in (A, B, C)]
    assert one_vote_each(records) == sorted(records, key=lambda record: record.peer_id)
