"""The certificate of an update: the roster of its round, and the signatures of most of the members that certify.

    taken        what a member signs when it takes a commit: the round, the update's link, who contributed to most of
                 its parts and, where a snapshot is due, the digest of the state that the update leads on from
    certificate  the signed roster, and those signatures; it stands beside the update, outside what the head hashes

A member signs one link under one round id, so no two updates of one round can both be certified. Of two rosters on one
head without a member in common, both may be: a certificate says who has made an update, not that there is no other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import msgpack

from p2p_diloco.core.digest import HASH_BYTES, digest
from p2p_diloco.core.group import Group, SealedRoster, open_roster
from p2p_diloco.core.identity import SIGNATURE_BYTES, Identity, verify
from p2p_diloco.core.known import Known
from p2p_diloco.core.records import unpack_plain
from p2p_diloco.core.roster_rules import RosterRules
from p2p_diloco.core.update import MAX_CONTRIBUTORS, UpdateHeader, check_mask

TAKEN_CONTEXT = b"p2p-diloco taken\0"
MAX_FULL_BYTES = MAX_CONTRIBUTORS // 8
MAX_CERTIFICATE_BYTES = 512 * 1024
"""Of 128 members, 64 absent ones, and all of their signatures."""


@dataclass(frozen=True, kw_only=True)
class Taken:
    """Is what a member of a round signs when it takes a commit, and the owner's seed when it witnesses one."""

    round_id: bytes
    link: bytes
    """The update's, as ``UpdateHeader.link`` has it."""
    full: bytes
    """Little-endian bit set over the contributors: those that are in most of the update's parts."""
    state: bytes
    """The digest of ``S_t`` for update ``U_t``, where a snapshot of it is due; empty elsewhere, and where the members
    do not agree on it."""

    @cached_property
    def signed_bytes(self) -> bytes:
        """Returns the bytes under the signature."""
        return TAKEN_CONTEXT + digest(self.round_id, self.link, self.full, self.state)

    def sign(self, identity: Identity) -> bytes:
        """Returns a member's signature."""
        return identity.sign(self.signed_bytes)

    def is_signed(self, peer_id: str, signature: bytes) -> bool:
        """Returns whether ``signature`` is that of ``peer_id``."""
        return verify(peer_id, self.signed_bytes, signature)


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """Says who has made an update, and holds their signatures over it."""

    roster: SealedRoster
    full: bytes
    """As in ``Taken``."""
    state: bytes
    """As in ``Taken``."""
    signatures: tuple[tuple[int, bytes], ...]
    """(index in the roster, signature), rising."""
    witness: bytes = b""
    """The signature of the run's owner, where it has witnessed the update and is no member."""

    def to_bytes(self) -> bytes:
        """Returns the certificate as it travels and lies on disk."""
        packed: bytes = msgpack.packb(
            [
                self.roster.pack(),
                self.full,
                self.state,
                [[member, signature] for member, signature in self.signatures],
                self.witness,
            ]
        )
        return packed

    @classmethod
    def from_bytes(cls, data: bytes) -> Certificate:
        """Returns the certificate that ``data`` is; nothing of it is verified. ValueError when ``data`` is not exactly
        what ``to_bytes`` would give."""
        if len(data) > MAX_CERTIFICATE_BYTES:
            raise ValueError("a certificate that is too large")
        content: Any = unpack_plain(data)
        try:
            roster, full, state, signatures, witness = content
            certificate = cls(
                roster=SealedRoster.unpack(roster),
                full=full,
                state=state,
                signatures=tuple((member, one) for member, one in signatures),
                witness=witness,
            )
        except (TypeError, ValueError) as error:
            raise ValueError("not a certificate") from error
        if not certificate._is_sound() or certificate.to_bytes() != data:
            raise ValueError("not a certificate: a field is out of its bounds")
        return certificate

    def _is_sound(self) -> bool:
        """Tells whether every field is of its type and size."""
        who = [member for member, _ in self.signatures]
        return (
            self.roster.is_sound()
            and type(self.full) is bytes
            and len(self.full) <= MAX_FULL_BYTES
            and type(self.state) is bytes
            and len(self.state) in (0, HASH_BYTES)
            and all(type(member) is int and 0 <= member < MAX_CONTRIBUTORS for member in who)
            and all(earlier < later for earlier, later in pairwise(who))
            and all(type(one) is bytes and len(one) == SIGNATURE_BYTES for _, one in self.signatures)
            and type(self.witness) is bytes
            and len(self.witness) in (0, SIGNATURE_BYTES)
        )

    def taken(self, link: bytes) -> Taken:
        """Returns what is signed here, if it is the certificate of the update with this link."""
        return Taken(round_id=self.roster.round_id, link=link, full=self.full, state=self.state)


@dataclass(frozen=True, kw_only=True)
class Certified:
    """An update without its values: its header, and the certificate beside it."""

    header: UpdateHeader
    certificate: Certificate

    def in_most_parts(self) -> list[str]:
        """Returns the peers whose contributions are in most parts of the update."""
        full = int.from_bytes(self.certificate.full, "little")
        return [peer_id for i, (peer_id, _) in enumerate(self.header.contributors) if full >> i & 1]

    def to_bytes(self) -> bytes:
        """Returns both as they travel and lie on disk."""
        packed: bytes = msgpack.packb([self.header.to_bytes(), self.certificate.to_bytes()])
        return packed

    @classmethod
    def from_bytes(cls, data: bytes) -> Certified:
        """Returns what ``to_bytes`` has packed; no signature is verified. ValueError for any other bytes."""
        content: Any = unpack_plain(data)
        if not (isinstance(content, list) and len(content) == 2 and all(type(piece) is bytes for piece in content)):
            raise ValueError("not a header and its certificate")
        certified = cls(header=UpdateHeader.from_bytes(content[0]), certificate=Certificate.from_bytes(content[1]))
        if certified.to_bytes() != data:
            raise ValueError("not a header and its certificate")
        return certified


def is_witnessed(group: Group, owner: str, signers: Iterable[int], witness: bytes) -> bool:
    """Returns whether the run's owner is among those who have signed. ``witness``: its signature as no member; empty
    where there is none."""
    return bool(witness) or any(group.members[member].peer_id == owner for member in signers)


def check_certificate(certified: Certified, rules: RosterRules, known: Known) -> Group:
    """Returns the group that has made an update. ValueError unless its certificate is sound: the roster, the signatures
    of most of the members that certify, and the owner's where that is needed. ``known``: at the update's parent."""
    header, certificate = certified.header, certified.certificate
    group = open_roster(certificate.roster, rules, known)
    if (group.step, group.head) != (header.step, header.parent) or group.contributors != header.contributors:
        raise ValueError("a certificate of another update")
    check_signatures(certificate, group, header.link, rules.owner)
    return group


def check_signatures(certificate: Certificate, group: Group, link: bytes, owner: str) -> None:
    """Raises ValueError unless these signatures, all of them sound, certify the update with this link. ``owner``: the
    peer id of the run's."""
    check_most(certificate, group, link, owner)
    signers = [member for member, _ in certificate.signatures]
    if group.needs_witness and not is_witnessed(group, owner, signers, certificate.witness):
        raise ValueError("a certificate without the witness of the run's owner, which so few known members need")


def check_most(certificate: Certificate, group: Group, link: bytes, owner: str) -> None:
    """Does the same as ``check_signatures``, but for the owner's witness, which may be missing."""
    check_mask(certificate.full, len(group.weights))
    taken = certificate.taken(link)
    for member, signature in certificate.signatures:
        if member >= len(group.members) or not taken.is_signed(group.members[member].peer_id, signature):
            raise ValueError(f"a certificate with a signature that is not that of member {member}")
    if certificate.witness and not taken.is_signed(owner, certificate.witness):
        raise ValueError("a certificate with a witness that is not the run's owner")
    signers = [member for member, _ in certificate.signatures]
    if not group.is_most(signers):
        raise ValueError(f"a certificate with {len(signers)} signatures, too few of those that certify")


def certificate_of(group: Group, taken: Taken, signatures: Mapping[int, bytes], witness: bytes = b"") -> Certificate:
    """Returns the certificate that these signatures over ``taken`` make: member -> signature."""
    return Certificate(
        roster=group.sealed,
        full=taken.full,
        state=taken.state,
        signatures=tuple(sorted(signatures.items())),
        witness=witness,
    )
