"""Tokens, invitations, seats and revocations: what comes back, and what is refused."""

from __future__ import annotations

import base64

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p_diloco.core import invitation
from p2p_diloco.core.addresses import MAX_MADDRS
from p2p_diloco.core.digest import HASH_BYTES
from p2p_diloco.core.errors import UsageError
from p2p_diloco.core.identity import SIGNATURE_BYTES
from p2p_diloco.core.invitation import (
    INVITATION_CONTEXT,
    MAX_REVOCATIONS,
    MAX_REVOCATIONS_BYTES,
    MAX_TOKEN_CHARS,
    REVOCATIONS_CONTEXT,
    SEAT_CONTEXT,
    TOKEN_HEADER,
    Revocations,
    open_invitation,
    open_revocations,
    open_seat,
    open_token,
    seal_revocations,
    with_revoked,
)
from p2p_diloco.core.records import (
    BARRED_DIGEST_BYTES,
    MAX_BARRED,
    MAX_RECORD_BYTES,
    MAX_SEAT_BYTES,
    SIGNATURE_CONTEXT,
    Record,
    Unsound,
    open_record,
    seal,
    seal_record,
)
from p2p_diloco.core.roster import READINESS_CONTEXT, seal_readiness
from p2p_diloco.peer.presence import MADDRS_BYTES
from p2p_diloco.wire.message import MAX_MESSAGE_BYTES
from p2p_diloco.wire.messages import pack
from p2p_diloco.wire.round_messages import Roster
from tests.support.builders import RUN_ID, damaged, identity, plain_values, readiness_of, record_of
from tests.support.invited import OWNER, revocations_of, token_of

ME, OTHER = identity(1), identity(2)
TOKEN = token_of()
SEAT = TOKEN.seat(ME.peer_id)
LIST = revocations_of({TOKEN.invitation.token: 7})


# -- the token -----------------------------------------------------------------------------------------------------


def test_a_token_comes_back_from_its_text() -> None:
    again = open_token(TOKEN.text(), "file")
    assert (again.invitation, again.sealed, again.key.peer_id) == (TOKEN.invitation, TOKEN.sealed, TOKEN.key.peer_id)
    assert TOKEN.text().splitlines()[0] == TOKEN_HEADER
    assert len(TOKEN.text()) < MAX_TOKEN_CHARS
    assert open_token(" ".join(TOKEN.text().split()), "a variable in one line").seat(ME.peer_id) == SEAT


def test_a_token_does_not_show_its_secret() -> None:
    secret = TOKEN.key.key.private_bytes_raw()
    shown = f"{TOKEN!r} {TOKEN}"
    assert base64.urlsafe_b64encode(secret).decode() not in shown
    assert secret.hex() not in shown
    assert repr(secret) not in shown


@given(st.text(max_size=200) | damaged(TOKEN.text().encode()).map(lambda data: data.decode("latin-1")))
def test_any_other_text_is_no_token_and_is_not_quoted(text: str) -> None:
    said = ""
    try:
        assert open_token(text, "file").text() == TOKEN.text()  # white space, and nothing else, was changed
    except UsageError as error:
        said = str(error)
    assert not any(word in said for word in text.split() if len(word) > 30)


def test_a_token_whose_invitation_is_of_another_key() -> None:
    other = token_of(key=2001)
    header, secret, _ = TOKEN.text().split()
    mixed = f"{header}\n{secret}\n{other.text().split()[2]}\n"
    with pytest.raises(UsageError, match="for another key than the one in it"):
        open_token(mixed, "file")


def test_a_text_that_is_too_long_is_not_looked_at() -> None:
    with pytest.raises(UsageError, match="not an invitation"):
        open_token(TOKEN.text() + " " * MAX_TOKEN_CHARS, "file")


@pytest.mark.parametrize(
    "changes",
    [
        {"name": ""},
        {"name": "a b"},
        {"name": "-x"},
        {"name": "x" * 33},
        {"name": "x\n"},
        {"places": 0},
        {"places": 101},
        {"expires_s": -1},
        {"expires_s": 10**11 + 1},
    ],
)
def test_what_an_invitation_cannot_say(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        token_of(**changes)  # type: ignore[arg-type]


# -- the seat ------------------------------------------------------------------------------------------------------


def test_a_seat_is_of_one_peer() -> None:
    assert open_seat(SEAT, ME.peer_id) == TOKEN.invitation
    with pytest.raises(Unsound, match="has not signed for this peer"):
        open_seat(SEAT, OTHER.peer_id)


def test_a_seat_needs_the_tokens_own_signature() -> None:
    """The invitation stands in every record: who has read it cannot bring in a peer of its own."""
    statement = SEAT_CONTEXT + msgpack.packb([RUN_ID, OTHER.peer_id])
    for signer in (OTHER, OWNER):
        forged = msgpack.packb([TOKEN.sealed, signer.sign(statement)])
        with pytest.raises(Unsound, match="has not signed"):
            open_seat(forged, OTHER.peer_id)


def test_a_seat_under_another_context_is_none() -> None:
    for context in (b"", INVITATION_CONTEXT, SIGNATURE_CONTEXT):
        signed = TOKEN.key.sign(context + msgpack.packb([RUN_ID, ME.peer_id]))
        with pytest.raises(Unsound, match="has not signed"):
            open_seat(msgpack.packb([TOKEN.sealed, signed]), ME.peer_id)


@given(st.binary(max_size=600) | damaged(SEAT) | plain_values.map(msgpack.packb))
def test_any_other_bytes_are_no_seat(data: bytes) -> None:
    with pytest.raises(Unsound):
        open_seat(data, ME.peer_id)


@given(st.binary(max_size=600) | damaged(TOKEN.sealed) | plain_values.map(msgpack.packb))
def test_any_other_bytes_are_no_invitation(data: bytes) -> None:
    with pytest.raises(Unsound):
        open_invitation(data)


def test_contexts_are_of_one_kind_each() -> None:
    contexts = [INVITATION_CONTEXT, SEAT_CONTEXT, REVOCATIONS_CONTEXT, SIGNATURE_CONTEXT, READINESS_CONTEXT]
    assert len(set(contexts)) == len(contexts)
    assert all(context.endswith(b"\0") for context in contexts)


# -- bounds --------------------------------------------------------------------------------------------------------

WIDEST = token_of("n" * 32, places=100, expires_s=10**11).seat(ME.peer_id)


def fullest_record() -> Record:
    """Everything that a record of ours can hold at once, each number as large as it may be."""
    share = MADDRS_BYTES // MAX_MADDRS
    return record_of(
        ME,
        "abcdefgh",
        run_name="r" * 64,
        issued_s=1e11,
        life_s=900.0,
        step=2**60 - 1,
        snapshot_step=2**60 - 1,
        maddrs=["x" * share] * MAX_MADDRS,
        name="\N{DNA DOUBLE HELIX}" * 16,
        version="v" * 16,
        inner_step=2**60 - 1,
        inner_steps_planned=2**60 - 1,
        loss=1.5,
        held_out_loss=1.5,
        held_out_step=2**60 - 1,
        tokens=2**60 - 1,
        tokens_per_s=1.5,
        group_size=2**60 - 1,
        round_s=1.5,
        round_bytes=2**60 - 1,
        seat=WIDEST,
        revocations=2**60 - 1,
        known_members=2**60 - 1,
        signatures=2**60 - 1,
        certifying=2**60 - 1,
        anchored_step=2**60 - 1,
        anchor=bytes(HASH_BYTES),
        barred=MAX_BARRED,
        barred_digest=bytes(BARRED_DIGEST_BYTES),
        found_wrong=2**60 - 1,
    )


def test_the_fullest_record_has_room() -> None:
    """A tenth is left for what will come to it."""
    sealed = seal_record(fullest_record(), ME)
    assert open_record(sealed) == fullest_record()
    assert len(sealed) < 0.9 * MAX_RECORD_BYTES
    assert len(WIDEST) < 0.75 * MAX_SEAT_BYTES


def test_the_fullest_roster_is_a_message() -> None:
    """Of the largest group, with as many absent peers as are named."""
    readiness = readiness_of(ME, weight=2**60 - 1, step=2**60 - 1, tokens_per_s=1.5, seat=WIDEST)
    member, absent = seal_readiness(readiness, ME), seal_record(fullest_record(), ME)
    assert (
        len(pack(Roster(members=[member] * 100, absent=[absent] * 64, signature=bytes(SIGNATURE_BYTES))))
        < MAX_MESSAGE_BYTES
    )


# -- revocations ---------------------------------------------------------------------------------------------------


def test_a_list_comes_back_and_is_of_one_run_and_owner() -> None:
    opened = open_revocations(LIST, run_id=RUN_ID, owner=OWNER.peer_id)
    assert (opened.number, opened.tokens, opened.steps) == (1, [TOKEN.invitation.token], [7])
    with pytest.raises(Unsound, match="of another owner, or of another run"):
        open_revocations(LIST, run_id="cd" * 20, owner=OWNER.peer_id)
    with pytest.raises(Unsound, match="of another owner, or of another run"):
        open_revocations(LIST, run_id=RUN_ID, owner=ME.peer_id)
    other = revocations_of({TOKEN.invitation.token: 7}, owner=ME)
    with pytest.raises(Unsound, match="of another owner"):
        open_revocations(other, run_id=RUN_ID, owner=OWNER.peer_id)


@pytest.mark.parametrize(("tokens", "steps"), [(["a", "b"], [1]), (["a"], [1, 2]), (["a", "a"], [1, 2])])
def test_a_list_has_one_step_for_each_token(tokens: list[str], steps: list[int]) -> None:
    listed = Revocations(peer_id=OWNER.peer_id, run_id=RUN_ID, number=1, tokens=tokens, steps=steps)
    with pytest.raises(Unsound, match="without an outer step, or with two"):
        open_revocations(seal_revocations(listed, OWNER), run_id=RUN_ID, owner=OWNER.peer_id)


@given(st.binary(max_size=600) | damaged(LIST) | plain_values.map(msgpack.packb))
def test_any_other_bytes_are_no_list(data: bytes) -> None:
    with pytest.raises(Unsound):
        open_revocations(data, run_id=RUN_ID, owner=OWNER.peer_id)


def test_the_longest_list_can_be_sealed_and_no_longer_one_is_made() -> None:
    tokens = [f"{i:052d}" for i in range(MAX_REVOCATIONS)]
    longest = Revocations(
        peer_id=OWNER.peer_id, run_id=RUN_ID, number=2**60 - 1, tokens=tokens, steps=[2**60 - 1] * MAX_REVOCATIONS
    )
    sealed = seal_revocations(longest, OWNER)
    assert len(sealed) <= MAX_REVOCATIONS_BYTES
    assert open_revocations(sealed, run_id=RUN_ID, owner=OWNER.peer_id) == longest
    with pytest.raises(ValueError, match="more than 1024 revocations"):
        with_revoked(longest, run_id=RUN_ID, owner=OWNER.peer_id, token=TOKEN.invitation.token, step=1)
    with pytest.raises(Unsound, match="too large"):
        open_revocations(bytes(MAX_REVOCATIONS_BYTES + 1), run_id=RUN_ID, owner=OWNER.peer_id)


def test_each_list_has_all_of_the_one_before() -> None:
    first = with_revoked(None, run_id=RUN_ID, owner=OWNER.peer_id, token="a", step=5)
    second = with_revoked(first, run_id=RUN_ID, owner=OWNER.peer_id, token="b", step=9)
    again = with_revoked(second, run_id=RUN_ID, owner=OWNER.peer_id, token="a", step=1)
    assert [listed.number for listed in (first, second, again)] == [1, 2, 3]
    assert dict(zip(again.tokens, again.steps)) == {"a": 5, "b": 9}


def test_what_is_signed_by_hand_is_bound_to_its_context() -> None:
    assert len(invitation.pieces_of(SEAT)[1]) == SIGNATURE_BYTES
    assert TOKEN.sealed == seal(TOKEN.invitation, INVITATION_CONTEXT, OWNER)
