"""Who is barred, and who has a place among them."""

from __future__ import annotations

import pytest

from p2p_diloco.core.admission import Admission, Claim, Lapsed
from p2p_diloco.core.barred import Barred
from p2p_diloco.core.certificate import Taken
from p2p_diloco.core.equivocation import TwoLinks, pack_proof
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.records import BARRED_DIGEST_BYTES, MAX_BARRED
from tests.support.builders import OWNER, RUN_ID, identity

ME = identity(99)


def proof_of(who: Identity, links: tuple[int, int] = (1, 2)) -> TwoLinks:
    first, second = (Taken(round_id=bytes(32), link=bytes([link]) * 32, full=b"", state=b"") for link in links)
    signatures = first.sign(who), second.sign(who)
    return TwoLinks(peer_id=who.peer_id, taken=(first, second), signatures=signatures)


def barred(*favoured: Identity) -> Barred:
    return Barred(run_id=RUN_ID, me=ME.peer_id, owner=OWNER.peer_id, favoured={who.peer_id for who in favoured})


def test_a_peer_is_barred_once_and_with_the_first_proof() -> None:
    here, liar = barred(), identity(1)
    rung = here.changed.event
    assert liar.peer_id not in here
    assert here.digest() == b""
    assert here.take(pack_proof(proof_of(liar))) == liar.peer_id
    assert rung.is_set()
    assert liar.peer_id in here
    assert list(here) == [liar.peer_id]
    assert here.take(pack_proof(proof_of(liar, (3, 4)))) is None
    assert not here.add(proof_of(liar, (3, 4)))
    assert here.proof(liar.peer_id) == pack_proof(proof_of(liar))
    assert here.proof(identity(2).peer_id) is None


def test_what_proves_nothing_bars_nobody() -> None:
    here = barred()
    for data in (b"", pack_proof(proof_of(OWNER)), pack_proof(proof_of(identity(1), (1, 1)))):
        with pytest.raises(ValueError, match=r"proof|plain msgpack"):
            here.take(data)
    assert len(here) == 0


def test_a_peer_bars_itself_for_nothing_and_says_that_others_do(caplog: pytest.LogCaptureFixture) -> None:
    here = barred()
    assert here.take(pack_proof(proof_of(ME))) is None
    assert ME.peer_id not in here
    assert "meet it no more" in caplog.text


def test_strangers_fill_no_more_places_than_there_are_and_make_room_for_contributors() -> None:
    known, late = identity(1), identity(2)
    here = barred(known)
    strangers = [identity(100 + i) for i in range(MAX_BARRED + 1)]
    assert [here.add(proof_of(who)) for who in strangers] == [True] * MAX_BARRED + [False]
    assert not here.add(proof_of(late))
    assert here.add(proof_of(known))
    assert len(here) == MAX_BARRED
    assert known.peer_id in here
    assert strangers[0].peer_id not in here


def test_contributors_make_room_for_nobody() -> None:
    contributors = [identity(100 + i) for i in range(MAX_BARRED + 1)]
    here = barred(*contributors)
    assert [here.add(proof_of(who)) for who in contributors] == [True] * MAX_BARRED + [False]


def test_the_digest_names_the_barred_in_whatever_order_they_came() -> None:
    one, other = barred(), barred()
    for who in (identity(1), identity(2)):
        one.add(proof_of(who))
    assert len(one.digest()) == BARRED_DIGEST_BYTES
    other.add(proof_of(identity(2)))
    assert one.digest() != other.digest()
    other.add(proof_of(identity(1), (3, 4)))
    assert one.digest() == other.digest()


def test_who_is_barred_takes_no_part_in_a_run_from_now_on() -> None:
    here, liar = barred(), identity(1)
    admission = Admission(run_id=RUN_ID, owner=OWNER.peer_id, by_invitation=False, barred=here)
    claim = Claim(peer_id=liar.peer_id, seat=b"")
    assert admission.admits(claim, now_s=0.0, step=0)
    here.add(proof_of(liar))
    assert not admission.admits(claim, now_s=0.0, step=0)
    assert admission.within_places([claim], now_s=0.0, step=0) == set()
    with pytest.raises(Lapsed):
        admission.check_roster([claim], [], now_s=0.0, step=0)
