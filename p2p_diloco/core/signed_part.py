"""What senders and reducers sign of the parts that they send, so that whoever keeps them can show who has sent what.

A contribution is signed by its sender. A reduced part is signed by its reducer, together with the contributions that it
says came to it: from then on it cannot choose which ones to show.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import blake3

from p2p_diloco.core.digest import HASH_BYTES, digest
from p2p_diloco.core.identity import SIGNATURE_BYTES, Identity, verify
from p2p_diloco.core.update import MAX_MASK_BYTES, Part, contributor_mask

CONTRIBUTION_CONTEXT = b"p2p-diloco contribution\0"
REDUCTION_CONTEXT = b"p2p-diloco reduction\0"
MAX_BUTTERFLIES = 256
"""Of a round."""
MAX_PARTS = 1 << 16
"""A model of 17 billion parameters."""
INPUTS_BYTES = MAX_MASK_BYTES + HASH_BYTES
REDUCTION_BYTES = 1 + 1 + INPUTS_BYTES + SIGNATURE_BYTES


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


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Stands for the contributions that came to a part, also those that the run's rule leaves out of it."""

    senders: bytes
    """The mask of whose contributions they are."""
    digest: bytes
    """Of the contributions themselves."""

    @classmethod
    def of(cls, came: Mapping[int, Contribution]) -> Inputs:
        """Returns what stands for these contributions. ``came``: index in the roster -> contribution."""
        pieces = (bytes([i]) + came[i].hash + came[i].signature for i in sorted(came))
        return cls(senders=contributor_mask(came), digest=digest(*pieces))

    @classmethod
    def from_bytes(cls, data: bytes) -> Inputs:
        """Returns what ``to_bytes`` has packed. ``data``: INPUTS_BYTES of any content; nothing is verified."""
        return cls(senders=data[:MAX_MASK_BYTES].rstrip(b"\0"), digest=data[MAX_MASK_BYTES:])

    def to_bytes(self) -> bytes:
        """Returns the inputs as they are signed."""
        return self.senders.ljust(MAX_MASK_BYTES, b"\0") + self.digest


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """Says who has reduced a part, and of which contributions."""

    number: int
    """Of the butterfly."""
    reducer: int
    """Its index in the roster."""
    inputs: Inputs
    signature: bytes
    """The reducer's, over this and the part."""

    @classmethod
    def of(cls, place: Place, part: Part, inputs: Inputs, reducer: int, identity: Identity) -> Reduction:
        """Returns what a reducer signs of a part."""
        signature = identity.sign(reduction_bytes(place, part.hash, inputs))
        return cls(number=place.number, reducer=reducer, inputs=inputs, signature=signature)

    @classmethod
    def from_bytes(cls, data: bytes) -> Reduction:
        """Returns what ``to_bytes`` has packed. ``data``: REDUCTION_BYTES of any content; nothing is verified."""
        (number, reducer), signature = data[:2], data[2 + INPUTS_BYTES :]
        inputs = Inputs.from_bytes(data[2 : 2 + INPUTS_BYTES])
        return cls(number=number, reducer=reducer, inputs=inputs, signature=signature)

    def to_bytes(self) -> bytes:
        """Returns the reduction as it travels behind its part."""
        return bytes([self.number, self.reducer]) + self.inputs.to_bytes() + self.signature

    def is_signed(self, round_id: bytes, index: int, part: Part, peer_id: str) -> bool:
        """Returns whether ``peer_id`` has signed that it has reduced this part, the one at ``index``."""
        place = Place(round_id=round_id, number=self.number, part=index)
        return Version.of(part, self).is_signed(place, peer_id)


@dataclass(frozen=True, kw_only=True)
class Version:
    """One version of a part, as its reducer has signed it."""

    part_hash: bytes
    inputs: Inputs
    signature: bytes

    @classmethod
    def of(cls, part: Part, reduction: Reduction) -> Version:
        """Returns what is signed of a part that has come with what its reducer has signed."""
        return cls(part_hash=part.hash, inputs=reduction.inputs, signature=reduction.signature)

    def is_like(self, other: Version) -> bool:
        """Returns whether another one says the same of a part, whatever its signature is."""
        return (self.part_hash, self.inputs) == (other.part_hash, other.inputs)

    def is_signed(self, place: Place, peer_id: str) -> bool:
        """Returns whether ``peer_id`` has signed that it has reduced the part at this place to this version."""
        return verify(peer_id, reduction_bytes(place, self.part_hash, self.inputs), self.signature)

    @property
    def is_sound(self) -> bool:
        """Returns whether every field is of its type and size."""
        inputs = self.inputs
        return (
            all(type(one) is bytes for one in (self.part_hash, inputs.senders, inputs.digest, self.signature))
            and (len(self.part_hash), len(inputs.digest)) == (HASH_BYTES, HASH_BYTES)
            and (len(inputs.senders) <= MAX_MASK_BYTES and not inputs.senders.endswith(b"\0"))
            and len(self.signature) == SIGNATURE_BYTES
        )


def reduction_bytes(place: Place, part_hash: bytes, inputs: Inputs) -> bytes:
    """Returns the bytes under a reducer's signature. ``part_hash``: ``Part.hash`` of what it has made."""
    return REDUCTION_CONTEXT + digest(place.to_bytes(), inputs.to_bytes(), part_hash)
