"""Proofs that a peer lies: two statements with its signature of which an honest peer makes only one. Pure.

    two rosters   of one leader, as members of which it has given the same readiness of its own: it signs another one
                  for every attempt at a round
    two links     of two commits, taken by one member in one round: it takes one of them
    two parts     of one part of a butterfly, as one reducer has signed it: it makes the mean once, of what came

Whoever has a proof can check it alone, from the manifest and the proof. It is about nobody but the peer that signed:
a statement that somebody else could repeat proves nothing. So the readiness that two rosters share has to be their
leader's own: another member could give an honest leader the same one twice. And nothing is proved against the run's
owner, who signs updates as a member and as their witness.

An honest peer cannot come to a second signature. It settles a round that it gave a new readiness for, whose nonce is
random, and takes one commit of it; when it is started again, no roster has its readiness. It signs a mean when it has
made it, and sends these bytes to everybody: bits that flip later do not fit the signature. A contribution is made again
for a second stream, so two of these prove nothing. A second butterfly of a round has a number of its own, under which a
part is another one; and that a leader comes back is signed by nobody.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import msgpack

from p2p_diloco.core.certificate import MAX_FULL_BYTES, Certified, Taken
from p2p_diloco.core.digest import HASH_BYTES
from p2p_diloco.core.group import SealedRoster
from p2p_diloco.core.identity import MAX_PEER_ID_CHARS, SIGNATURE_BYTES
from p2p_diloco.core.records import unpack_plain
from p2p_diloco.core.roster import open_readiness
from p2p_diloco.core.signed_part import MAX_BUTTERFLIES, MAX_PARTS, Inputs, Place, Version

MAX_PROOF_BYTES = 1024 * 1024
"""Of two rosters with 128 members and 64 absent ones each."""


@dataclass(frozen=True, kw_only=True)
class TwoRosters:
    """Two rosters that one leader has signed, with one readiness of its own in both."""

    kind = "rosters"
    what = "two rosters with one readiness"
    """That its peer has signed, as people are told."""
    rosters: tuple[SealedRoster, SealedRoster]

    @property
    def peer_id(self) -> str:
        """Returns the peer that the proof is about."""
        return self.rosters[0].leader

    def pack(self) -> list[Any]:
        """Returns what is packed of the proof, as plain values."""
        return [self.kind, *(one.pack() for one in self.rosters)]

    @classmethod
    def unpack(cls, *sides: Sequence[Any]) -> TwoRosters:
        """Returns the proof that these values are. ValueError or TypeError when they are none."""
        first, second = map(SealedRoster.unpack, sides)
        if not (first.is_sound() and second.is_sound()):
            raise ValueError("a roster with a field out of its bounds")
        return cls(rosters=(first, second))

    def check(self, run_id: str) -> None:
        """Raises ValueError unless this proves that the leader lies, in the run ``run_id``."""
        first, second = self.rosters
        if first.leader != second.leader or first.round_id == second.round_id:
            raise ValueError("a proof of one roster")
        for one in self.rosters:
            if not one.is_signed:
                raise ValueError("a proof with a roster that its leader did not sign")
        shared = set(first.members).intersection(second.members)
        if not any(_is_leaders_own(sealed, first.leader, run_id) for sealed in sorted(shared)):
            raise ValueError("a proof of two rosters without one readiness of their leader in both")


@dataclass(frozen=True, kw_only=True)
class TwoLinks:
    """Two commits of one round that one member has signed."""

    kind = "links"
    what = "two commits of one round"
    """That its peer has signed, as people are told."""
    peer_id: str
    taken: tuple[Taken, Taken]
    signatures: tuple[bytes, bytes]

    def pack(self) -> list[Any]:
        """Returns what is packed of the proof, as plain values."""
        signed = zip(self.taken, self.signatures)
        sides = [[taken.link, taken.full, taken.state, signature] for taken, signature in signed]
        return [self.kind, self.peer_id, self.taken[0].round_id, *sides]

    @classmethod
    def unpack(cls, peer_id: str, round_id: bytes, *sides: Sequence[Any]) -> TwoLinks:
        """Returns the proof that these values are. ValueError or TypeError when they are none."""
        (first, one), (second, other) = (
            (Taken(round_id=round_id, link=link, full=full, state=state), signature)
            for link, full, state, signature in sides
        )
        proof = cls(peer_id=peer_id, taken=(first, second), signatures=(one, other))
        if not proof._is_sound():
            raise ValueError("a signature with a field out of its bounds")
        return proof

    def _is_sound(self) -> bool:
        """Tells whether every field is of its type and size."""
        hashes = (self.taken[0].round_id, *(taken.link for taken in self.taken))
        states = [taken.state for taken in self.taken if taken.state != b""]
        return (
            _may_be_peer_id(self.peer_id)
            and all(type(one) is bytes and len(one) == HASH_BYTES for one in (*hashes, *states))
            and all(type(taken.full) is bytes and len(taken.full) <= MAX_FULL_BYTES for taken in self.taken)
            and all(type(one) is bytes and len(one) == SIGNATURE_BYTES for one in self.signatures)
        )

    def check(self, run_id: str) -> None:
        """Raises ValueError unless this proves that the member lies. A round id is of one run, for nobody signs the
        readiness inside for two: ``run_id`` is not looked at."""
        first, second = self.taken
        if first.round_id != second.round_id or first.link == second.link:
            raise ValueError("a proof of one commit")
        if not all(taken.is_signed(self.peer_id, one) for taken, one in zip(self.taken, self.signatures)):
            raise ValueError("a proof with a commit that its peer did not sign")


@dataclass(frozen=True, kw_only=True)
class TwoParts:
    """Two versions of one part that one reducer has signed."""

    kind = "parts"
    what = "two versions of one part"
    """That its peer has signed, as people are told."""
    peer_id: str
    place: Place
    versions: tuple[Version, Version]

    def pack(self) -> list[Any]:
        """Returns what is packed of the proof, as plain values."""
        place = [self.place.round_id, self.place.number, self.place.part]
        sides = [[one.part_hash, one.inputs.senders, one.inputs.digest, one.signature] for one in self.versions]
        return [self.kind, self.peer_id, place, *sides]

    @classmethod
    def unpack(cls, peer_id: str, place: Sequence[Any], *sides: Sequence[Any]) -> TwoParts:
        """Returns the proof that these values are. ValueError or TypeError when they are none."""
        round_id, number, part = place
        first, second = (
            Version(part_hash=part_hash, inputs=Inputs(senders=senders, digest=digest), signature=signature)
            for part_hash, senders, digest, signature in sides
        )
        if not (_may_be_peer_id(peer_id) and first.is_sound and second.is_sound):
            raise ValueError("a signature with a field out of its bounds")
        if not (type(round_id) is bytes and len(round_id) == HASH_BYTES and type(number) is type(part) is int):
            raise ValueError("a place with a field out of its bounds")
        if not (0 <= number < MAX_BUTTERFLIES and 0 <= part < MAX_PARTS):
            raise ValueError("a place with a field out of its bounds")
        return cls(peer_id=peer_id, place=Place(round_id=round_id, number=number, part=part), versions=(first, second))

    def check(self, run_id: str) -> None:
        """Raises ValueError unless this proves that the reducer lies. ``run_id`` is not looked at, as by ``TwoLinks``:
        the place names a round."""
        first, second = self.versions
        if first.is_like(second):
            raise ValueError("a proof of one version")
        if not all(one.is_signed(self.place, self.peer_id) for one in self.versions):
            raise ValueError("a proof with a part that its peer did not sign")


Proof: TypeAlias = TwoRosters | TwoLinks | TwoParts
KINDS: dict[str, type[TwoRosters] | type[TwoLinks] | type[TwoParts]] = {
    kind.kind: kind for kind in (TwoRosters, TwoLinks, TwoParts)
}


def _may_be_peer_id(value: Any) -> bool:
    """Tells whether a value has the type and size of a peer id."""
    return type(value) is str and 0 < len(value) <= MAX_PEER_ID_CHARS


def _is_leaders_own(sealed: bytes, leader: str, run_id: str) -> bool:
    """Tells whether this is a readiness of the leader itself, for a round of this run that it leads."""
    try:
        readiness = open_readiness(sealed)
    except ValueError:
        return False
    return (readiness.peer_id, readiness.leader, readiness.run_id) == (leader, leader, run_id)


def pack_proof(proof: Proof) -> bytes:
    """Returns a proof as it travels and lies on disk."""
    packed: bytes = msgpack.packb(proof.pack())
    return packed


def parse_proof(data: bytes) -> Proof:
    """Returns the proof that ``data`` is; nothing of it is verified. ValueError when ``data`` is not exactly what
    ``pack_proof`` would give."""
    if len(data) > MAX_PROOF_BYTES:
        raise ValueError("a proof that is too large")
    content: Any = unpack_plain(data)
    if not (isinstance(content, list) and content and type(content[0]) is str and content[0] in KINDS):
        raise ValueError("a proof of no known kind")
    try:
        proof = KINDS[content[0]].unpack(*content[1:])
    except (TypeError, ValueError) as error:
        raise ValueError("not a proof") from error
    if pack_proof(proof) != data:
        raise ValueError("not a proof")
    return proof


def check_proof(proof: Proof, *, run_id: str, owner: str) -> str:
    """Returns the id of the peer that has lied. ValueError where this does not prove it. ``owner``: the peer id of the
    run's, against whom nothing is proved."""
    if proof.peer_id == owner:
        raise ValueError("a proof against the run's owner")
    proof.check(run_id)
    return proof.peer_id


# -- what is found ---------------------------------------------------------------------------------------------------


def proved(one: SealedRoster, other: SealedRoster, *, run_id: str, owner: str) -> TwoRosters | None:
    """Returns the proof that two rosters make; None where they make none, as those of two attempts do."""
    proof = TwoRosters(rosters=(one, other))
    try:
        check_proof(proof, run_id=run_id, owner=owner)
    except ValueError:
        return None
    return proof


def between(one: Certified, other: Certified, *, run_id: str, owner: str) -> Iterator[Proof]:
    """Yields what two updates with sound certificates prove together: who has signed both, in one round; or that their
    leader has signed both rosters."""
    rosters = one.certificate.roster, other.certificate.roster
    if rosters[0].round_id != rosters[1].round_id:
        proof = proved(*rosters, run_id=run_id, owner=owner)
        if proof is not None:
            yield proof
        return
    members = [peer_id for peer_id, _ in one.header.contributors]
    taken = tuple(side.certificate.taken(side.header.link) for side in (one, other))
    signed = [dict(side.certificate.signatures) for side in (one, other)]
    if taken[0].link != taken[1].link:
        for member in sorted(signed[0].keys() & signed[1].keys()):
            if members[member] != owner:
                signatures = signed[0][member], signed[1][member]
                yield TwoLinks(peer_id=members[member], taken=(taken[0], taken[1]), signatures=signatures)
