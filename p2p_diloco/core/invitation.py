"""Invitations: what the owner of a run signs for a volunteer, and what the volunteer's peers show for it.

    token       a key that the run's owner makes for somebody, and the invitation of that key: a text, kept secret
    invitation  the owner's signed word that peers of this key may take part: in so many places, until then
    seat        the invitation, and the key's signature over the id of one peer: in that peer's records, for all to see
    revocations the owner's signed, numbered list of keys whose peers take no part from an outer step on

What is signed by hand here, the seat, is bound to its context as ``records.seal`` does it. Who may take part, which
follows from all that and from the time, is ``admission``.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, ClassVar

import msgpack
from pydantic import Field

from p2p_diloco.core.errors import UsageError
from p2p_diloco.core.identity import MAX_PEER_ID_CHARS, Identity, verify
from p2p_diloco.core.records import Natural, Signed, Unsound, seal, unpack_plain, unseal

INVITATION_CONTEXT = b"p2p-diloco invitation\0"
SEAT_CONTEXT = b"p2p-diloco seat\0"
REVOCATIONS_CONTEXT = b"p2p-diloco revocations\0"
MAX_PLACES = 100
"""As many as the members of the largest group that a run may have."""
MAX_REVOCATIONS = 1024
MAX_REVOCATIONS_BYTES = 65536
SEATS_KEPT = 8192
INVITATION_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,31}$"
TOKEN_HEADER = "p2p-diloco-invitation-1"
"""The first word of a token's text."""
MAX_TOKEN_CHARS = 2048
KEY_BYTES = 32

RunId = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
TokenId = Annotated[str, Field(min_length=1, max_length=MAX_PEER_ID_CHARS)]
"""The public key of a token, written as a peer id."""


class Invitation(Signed):
    """The owner's signed word that peers of one token may take part in a run. ``peer_id`` is the owner's."""

    run_id: RunId
    token: TokenId
    name: Annotated[str, Field(pattern=INVITATION_NAME)]
    """What the owner calls it. Everybody can see it."""
    places: Annotated[int, Field(gt=0, le=MAX_PLACES)]
    """Members of one round that may be of this token."""
    expires_s: Annotated[int, Field(ge=0, le=10**11)]
    """Unix time from which its peers are in no new round."""


class Revocations(Signed):
    """The owner's signed list of all tokens that are revoked in a run. ``peer_id`` is the owner's."""

    max_bytes: ClassVar[int] = MAX_REVOCATIONS_BYTES
    run_id: RunId
    number: Annotated[int, Field(gt=0, lt=2**60)]
    """One more than that of the list before: of two lists the one with the larger number counts."""
    tokens: Annotated[list[TokenId], Field(max_length=MAX_REVOCATIONS)]
    steps: Annotated[list[Natural], Field(max_length=MAX_REVOCATIONS)]
    """For each token, the first outer step from which no round may be with its peers."""


@dataclass(frozen=True, kw_only=True)
class Token:
    """Is what a volunteer is given: who has it can bring in peers. Its ``repr`` holds no secret."""

    key: Identity
    invitation: Invitation
    sealed: bytes
    """The invitation as the owner signed it."""

    def text(self) -> str:
        """Returns the token as the text of a file: a header line, the private key, the invitation."""
        secret = base64.urlsafe_b64encode(self.key.key.private_bytes_raw()).decode()
        return f"{TOKEN_HEADER}\n{secret}\n{base64.urlsafe_b64encode(self.sealed).decode()}\n"

    def seat(self, peer_id: str) -> bytes:
        """Returns the seat of one peer under this token."""
        signature = self.key.sign(seat_statement(self.invitation.run_id, peer_id))
        seat: bytes = msgpack.packb([self.sealed, signature])
        return seat


def make_token(owner: Identity, *, run_id: str, name: str, places: int, expires_s: int, key: Identity) -> Token:
    """Returns a token of ``key``, a fresh one, that the owner of a run certifies. ValueError for a name, a number of
    places or a time that an invitation cannot have."""
    invitation = Invitation(
        peer_id=owner.peer_id, run_id=run_id, token=key.peer_id, name=name, places=places, expires_s=expires_s
    )
    return Token(key=key, invitation=invitation, sealed=seal(invitation, INVITATION_CONTEXT, owner))


def open_token(text: str, source: str) -> Token:
    """Returns the token that a text is. Raises UsageError, which names ``source`` and quotes nothing, for any other
    text. Whether its owner is that of the run, only the run's manifest tells."""
    words = text.split() if len(text) <= MAX_TOKEN_CHARS else []
    if len(words) != 3 or words[0] != TOKEN_HEADER:
        raise UsageError(f"{source}: not an invitation; it has three lines, of which the first is {TOKEN_HEADER}")
    try:
        secret, sealed = (base64.b64decode(word, altchars=b"-_", validate=True) for word in words[1:])
        if len(secret) != KEY_BYTES:
            raise ValueError("a key of another length")
        key, invitation = Identity.from_seed(secret), open_invitation(sealed)
    except (ValueError, binascii.Error) as error:
        raise UsageError(f"{source}: a damaged invitation; copy the whole file, or ask for another one") from error
    if invitation.token != key.peer_id:
        raise UsageError(f"{source}: a damaged invitation, for another key than the one in it; ask for another one")
    return Token(key=key, invitation=invitation, sealed=sealed)


def open_invitation(sealed: bytes) -> Invitation:
    """Returns a sealed invitation, which is signed by whoever it says is the owner. Unsound for any other bytes."""
    return unseal(sealed, Invitation, INVITATION_CONTEXT)


def seat_statement(run_id: str, peer_id: str) -> bytes:
    """Returns what a token signs for a peer."""
    signed: bytes = SEAT_CONTEXT + msgpack.packb([run_id, peer_id])
    return signed


@lru_cache(maxsize=SEATS_KEPT)
def open_seat(seat: bytes, peer_id: str) -> Invitation:
    """Returns the invitation under which a seat is this peer's. Unsound unless the invitation's token has signed the
    peer's id for the invitation's run, and its owner the invitation."""
    sealed, signature = pieces_of(seat)
    invitation = open_invitation(sealed)
    if not verify(invitation.token, seat_statement(invitation.run_id, peer_id), signature):
        raise Unsound("seat", "a seat that its token has not signed for this peer")
    return invitation


def pieces_of(seat: bytes) -> tuple[bytes, bytes]:
    """Returns the sealed invitation in a seat, and the token's signature. Unsound where there are none."""
    pieces = unpack_plain(seat)
    if not (isinstance(pieces, list) and len(pieces) == 2 and all(isinstance(piece, bytes) for piece in pieces)):
        raise Unsound("seat", "not a seat")
    return pieces[0], pieces[1]


def seal_revocations(revocations: Revocations, owner: Identity) -> bytes:
    """Returns a list of revocations as the owner signs it."""
    return seal(revocations, REVOCATIONS_CONTEXT, owner)


def open_revocations(sealed: bytes, *, run_id: str, owner: str) -> Revocations:
    """Returns a sealed list of revocations. Unsound unless this owner has signed it for this run."""
    revocations = unseal(sealed, Revocations, REVOCATIONS_CONTEXT)
    if (revocations.peer_id, revocations.run_id) != (owner, run_id):
        raise Unsound("other", "revocations of another owner, or of another run")
    if len(revocations.tokens) != len(revocations.steps) or len(set(revocations.tokens)) != len(revocations.tokens):
        raise Unsound("field", "revocations with a token without an outer step, or with two")
    return revocations


def with_revoked(before: Revocations | None, *, run_id: str, owner: str, token: str, step: int) -> Revocations:
    """Returns the list that follows when one more token is revoked from ``step`` on. ValueError when the list is
    full. A token that is in the list keeps its step."""
    steps = {} if before is None else dict(zip(before.tokens, before.steps))
    steps.setdefault(token, step)
    number = 1 if before is None else before.number + 1
    if len(steps) > MAX_REVOCATIONS:
        raise ValueError(f"more than {MAX_REVOCATIONS} revocations")
    return Revocations(peer_id=owner, run_id=run_id, number=number, tokens=list(steps), steps=list(steps.values()))
