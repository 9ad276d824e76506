"""What senders and reducers sign of the parts that they send, so that whoever keeps them can show who has sent what.

A contribution is signed by its sender. A reduced part is signed by its reducer, together with the contributions that it
says are in it: from then on it cannot choose which ones to show.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import blake3

from p2p_diloco.core.digest import HASH_BYTES, digest
from p2p_diloco.core.identity import SIGNATURE_BYTES, Identity, verify
from p2p_diloco.core.update import Part

CONTRIBUTION_CONTEXT = b"p2p-diloco contribution\0"
REDUCTION_CONTEXT = b"p2p-diloco reduction\0"
REDUCTION_BYTES = 1 + 1 + HASH_BYTES + SIGNATURE_BYTES


@dataclass(frozen=True, kw_only=True)
class Place:
    """Says which part of which butterfly of which round is meant."""

    round_id: bytes
    number: int
    """Of the butterfly."""
    part: int

    def to_bytes(self) -> bytes:
        """Returns the place as it is signed."""
        return digest(self.round_id, bytes([self.number]), self.part.to_bytes(4, "big"))


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """Is what a sender sends to the reducer of a part."""

    data: bytes
    """The encoded outer gradient."""
    signature: bytes

    @classmethod
    def of(cls, place: Place, data: bytes, identity: Identity) -> Contribution:
        """Returns a contribution as its sender signs it."""
        unsigned = cls(data=data, signature=b"")
        return cls(data=data, signature=identity.sign(unsigned.signed_bytes(place)))

    @classmethod
    def from_frame(cls, frame: bytes) -> Contribution:
        """Returns the contribution in a frame: the encoded values, then the signature. Nothing is checked."""
        return cls(data=frame[:-SIGNATURE_BYTES], signature=frame[-SIGNATURE_BYTES:])

    @cached_property
    def hash(self) -> bytes:
        """Returns BLAKE3 of the data: a reducer hashes as many bytes as it receives, while others wait for it."""
        return blake3.blake3(self.data).digest()

    def signed_bytes(self, place: Place) -> bytes:
        """Returns the bytes under the signature."""
        return CONTRIBUTION_CONTEXT + digest(place.to_bytes(), self.hash)

    def is_signed(self, place: Place, peer_id: str) -> bool:
        """Returns whether ``peer_id`` has signed it for this place."""
        return verify(peer_id, self.signed_bytes(place), self.signature)


def inputs_of(came: Mapping[int, Contribution]) -> bytes:
    """Returns 32 bytes that stand for the contributions to a part. ``came``: index in the roster -> contribution."""
    pieces = (bytes([i]) + came[i].hash + came[i].signature for i in sorted(came))
    return digest(*pieces)


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """Says who has reduced a part, and of which contributions."""

    number: int
    """Of the butterfly."""
    reducer: int
    """Its index in the roster."""
    inputs: bytes
    """As ``inputs_of`` has it: of all contributions that it took, also those that its rule left out."""
    signature: bytes
    """The reducer's, over this and the part."""

    @classmethod
    def of(cls, place: Place, part: Part, inputs: bytes, reducer: int, identity: Identity) -> Reduction:
        """Returns what a reducer signs of a part."""
        signature = identity.sign(reduction_bytes(place, part, inputs))
        return cls(number=place.number, reducer=reducer, inputs=inputs, signature=signature)

    @classmethod
    def from_bytes(cls, data: bytes) -> Reduction:
        """Returns what ``to_bytes`` has packed. ``data``: REDUCTION_BYTES of any content; nothing is verified."""
        number, reducer = data[:2]
        return cls(number=number, reducer=reducer, inputs=data[2 : 2 + HASH_BYTES], signature=data[2 + HASH_BYTES :])

    def to_bytes(self) -> bytes:
        """Returns the reduction as it travels behind its part."""
        return bytes([self.number, self.reducer]) + self.inputs + self.signature

    def is_signed(self, round_id: bytes, index: int, part: Part, peer_id: str) -> bool:
        """Returns whether ``peer_id`` has signed that it has reduced this part, the one at ``index``."""
        place = Place(round_id=round_id, number=self.number, part=index)
        return verify(peer_id, reduction_bytes(place, part, self.inputs), self.signature)


def reduction_bytes(place: Place, part: Part, inputs: bytes) -> bytes:
    """Returns the bytes under a reducer's signature."""
    return REDUCTION_CONTEXT + digest(place.to_bytes(), inputs, part.hash)
