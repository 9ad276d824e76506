"""The one hash of the project: blake2b over pieces, so that no two lists of pieces collide."""

from __future__ import annotations

from hashlib import blake2b

HASH_BYTES = 32


def digest(*pieces: bytes) -> bytes:
    """Returns blake2b, 32 bytes, over the lengths and the pieces, so that no two lists of pieces collide."""
    h = blake2b(digest_size=HASH_BYTES)
    for piece in pieces:
        h.update(len(piece).to_bytes(8, "big"))
        h.update(piece)
    return h.digest()
