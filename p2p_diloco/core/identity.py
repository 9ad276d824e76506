"""One Ed25519 key per peer: it names the peer in libp2p, signs its records, and signs the runs that it owns.

The key file is libp2p's private-key protobuf, so p2pd reads the same file. With Ed25519 the peer id *contains* the
public key (an "identity" multihash), so anything signed can be checked against the peer id alone.
Format: https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from p2p_diloco.core.errors import UsageError, disk_failure

PRIVATE_KEY_PREFIX = b"\x08\x01\x12\x40"  # protobuf: field 1 = 1 (Ed25519), field 2 = 64 bytes (seed, public key)
PEER_ID_PREFIX = b"\x00\x24\x08\x01\x12\x20"  # multihash identity, 36 bytes: field 1 = 1, field 2 = 32 bytes
SIGNATURE_BYTES = 64
MAX_PEER_ID_CHARS = 64
KEYS_KEPT = 4096
"""To decode an id costs as much as to check a signature, and the same peers sign again and again."""


@dataclass(frozen=True)
class Identity:
    key: Ed25519PrivateKey
    peer_id: str

    @classmethod
    def generate(cls) -> Identity:
        return cls.from_key(Ed25519PrivateKey.generate())

    @classmethod
    def from_seed(cls, seed: bytes) -> Identity:
        """Returns the identity that belongs to 32 bytes: always the same one for the same bytes."""
        return cls.from_key(Ed25519PrivateKey.from_private_bytes(seed))

    @classmethod
    def from_key(cls, key: Ed25519PrivateKey) -> Identity:
        return cls(key=key, peer_id=base58.b58encode(PEER_ID_PREFIX + key.public_key().public_bytes_raw()).decode())

    @classmethod
    def load_or_create(cls, path: Path) -> Identity:
        """Raises UsageError when the file is there but is no Ed25519 identity, or cannot be written; LedgerError on a
        full disk."""
        identity = cls.load(path)
        if identity is None:
            identity = cls.generate()
            identity.save(path)
        return identity

    @classmethod
    def load(cls, path: Path) -> Identity | None:
        """Returns the identity in a file; None where there is none. Raises UsageError when it is no Ed25519
        identity."""
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UsageError(f"identity {path}: cannot be read ({error.strerror})") from error
        if len(data) != 68 or not data.startswith(PRIVATE_KEY_PREFIX):
            raise UsageError(f"identity {path}: not an Ed25519 libp2p key; name another file, or move this one away")
        identity = cls.from_seed(data[4:36])
        if identity.to_bytes() != data:
            raise UsageError(f"identity {path}: damaged, its two halves do not match; restore it, or move it away")
        return identity

    def save(self, path: Path) -> None:
        """Writes the file whole, for this user alone. Raises UsageError when it cannot be written, LedgerError when the
        disk is full."""
        # By hand what ``ledger.disk.replacing`` does, as core imports nothing from the packages above it.
        temporary = path.with_name(path.name + ".tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(self.to_bytes())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            full = disk_failure(error, f"identity {path}")
            raise full or UsageError(f"identity {path}: cannot be written ({error.strerror})") from error

    def to_bytes(self) -> bytes:
        return PRIVATE_KEY_PREFIX + self.key.private_bytes_raw() + self.key.public_key().public_bytes_raw()

    def sign(self, message: bytes) -> bytes:
        return self.key.sign(message)


def verify(peer_id: str, message: bytes, signature: bytes) -> bool:
    """Returns whether ``signature`` is that of the key inside ``peer_id``. False, too, for anything that is no such
    id."""
    public_key = public_key_of(peer_id)
    if public_key is None or len(signature) != SIGNATURE_BYTES:
        return False
    try:
        public_key.verify(signature, message)
    except InvalidSignature:
        return False
    return True


@lru_cache(maxsize=KEYS_KEPT)
def public_key_of(peer_id: str) -> Ed25519PublicKey | None:
    """Returns the key inside a peer id; None when ``peer_id`` is not *the* id of an Ed25519 key (RSA ids, garbage,
    another spelling of an id)."""
    if not 0 < len(peer_id) <= MAX_PEER_ID_CHARS:
        return None
    try:
        data = base58.b58decode(peer_id)
    except ValueError:
        return None
    if len(data) != len(PEER_ID_PREFIX) + 32 or not data.startswith(PEER_ID_PREFIX):
        return None
    if base58.b58encode(data).decode() != peer_id:  # the decoder passes over white space at the end
        return None
    try:
        return Ed25519PublicKey.from_public_bytes(data[len(PEER_ID_PREFIX) :])
    except ValueError:
        return None
