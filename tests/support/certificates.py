"""Certificates that the members of a small round make, and some without signatures, for tests that verify none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from p2p_diloco.core.certificate import Certificate, Certified, Taken, certificate_of
from p2p_diloco.core.group import Group, SealedRoster, open_roster, seal_roster
from p2p_diloco.core.identity import SIGNATURE_BYTES, Identity
from p2p_diloco.core.known import Known
from p2p_diloco.core.roster import Readiness, precedence, rank, seal_readiness
from p2p_diloco.core.roster_rules import RosterRules
from p2p_diloco.core.update import Part, Update, UpdateHeader, in_most_parts


def unsigned(update: Update, state: bytes = b"") -> Certificate:
    """A well-formed certificate of an update, without any signature."""
    return Certificate(
        roster=SealedRoster(leader="a", members=(), absent=(), signature=bytes(SIGNATURE_BYTES)),
        full=in_most_parts([part.mask for part in update.parts]),
        state=state,
        signatures=(),
    )


def group_at(
    members: Sequence[Identity],
    rules: RosterRules,
    known: Known,
    head: bytes,
    *,
    weight: int = 5,
    nonce: int = 0,
    seats: Mapping[str, bytes] = MappingProxyType({}),
) -> Group:
    """The group of a round of ``members`` on a head, which the first of them gathers that may."""
    ranked = sorted(members, key=lambda who: rank(head, who.peer_id))
    leader = min(members, key=lambda who: precedence(head, who.peer_id, known))
    sealed = [
        seal_readiness(
            Readiness(
                peer_id=who.peer_id,
                run_id=rules.run_id,
                leader=leader.peer_id,
                step=known.step,
                head=head,
                weight=weight,
                client_mode=False,
                nonce=nonce.to_bytes(8, "big"),
                seat=seats.get(who.peer_id, b""),
            ),
            who,
        )
        for who in ranked
    ]
    return open_roster(seal_roster(sealed, (), leader), rules, known)


def certificate_for(
    group: Group,
    header: UpdateHeader,
    signers: Sequence[Identity],
    *,
    owner: Identity,
    full: bytes,
    state: bytes = b"",
) -> Certificate:
    """The certificate of an update that ``signers`` have signed; and the owner, where the group needs its witness."""
    taken = Taken(round_id=group.round_id, link=header.link, full=full, state=state)
    signatures = {group.index_of(who.peer_id): taken.sign(who) for who in signers}
    return certificate_of(group, taken, signatures, taken.sign(owner) if group.needs_witness else b"")


def made_by(
    members: Sequence[Identity],
    parts: Sequence[Part],
    rules: RosterRules,
    known: Known,
    head: bytes,
    *,
    owner: Identity,
    state: bytes = b"",
    seats: Mapping[str, bytes] = MappingProxyType({}),
) -> tuple[Update, Certificate]:
    """The update of a round of ``members`` that came to these parts, and its certificate, which all have signed."""
    group = group_at(members, rules, known, head, seats=seats)
    header = group.header([part.hash for part in parts])
    full = in_most_parts([part.mask for part in parts])
    certificate = certificate_for(group, header, members, owner=owner, full=full, state=state)
    return Update(header=header, parts=tuple(parts)), certificate


def certified(update: Update, certificate: Certificate) -> Certified:
    """Both, without the values."""
    return Certified(header=update.header, certificate=certificate)
