"""Invitations for tests: tokens that are the same every time, and what peers show under them."""

from __future__ import annotations

from p2p_diloco.core.identity import Identity
from p2p_diloco.core.invitation import Revocations, Token, make_token, seal_revocations
from tests.support.builders import NOW_S, RUN_ID, identity

OWNER = identity(1000)
EXPIRES_S = int(NOW_S) + 86_400


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
