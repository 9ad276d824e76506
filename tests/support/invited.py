"""Invitations for tests: tokens that are the same every time, and what peers show under them."""

from __future__ import annotations

from dataclasses import dataclass

from p2p_diloco.core.admission import Admission, Seated
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.invitation import Invitation, Revocations, Token, make_token, open_seat, seal_revocations
from tests.support.builders import NOW_S, RUN_ID, identity

OWNER = identity(1000)
EXPIRES_S = int(NOW_S) + 86_400


@dataclass(frozen=True, kw_only=True)
class Shameless(Admission):
    """That of a peer that takes part whether it may or not, and meets anybody."""

    def invitation_of(self, peer: Seated) -> Invitation | None:
        return open_seat(peer.seat, peer.peer_id) if peer.seat else None

    def check(self, peer: Seated, *, now_s: float | None, step: int) -> Invitation | None:
        return self.invitation_of(peer)

    def check_roster(self, *_: object, **__: object) -> None:
        pass


def token_of(
    name: str = "attic",
    *,
    places: int = 1,
    expires_s: int = EXPIRES_S,
    run_id: str = RUN_ID,
    owner: Identity = OWNER,
    key: int = 2000,
) -> Token:
    """The same key for the same number."""
    return make_token(owner, run_id=run_id, name=name, places=places, expires_s=expires_s, key=identity(key))


def revocations_of(steps: dict[str, int], *, number: int = 1, run_id: str = RUN_ID, owner: Identity = OWNER) -> bytes:
    """Sealed. ``steps``: token's id -> outer step."""
    listed = Revocations(
        peer_id=owner.peer_id, run_id=run_id, number=number, tokens=list(steps), steps=list(steps.values())
    )
    return seal_revocations(listed, owner)
