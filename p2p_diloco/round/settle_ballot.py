"""The ballot on one commit, at its leader: who has signed it, and when that is enough for a certificate.

Most of the members that certify have to sign. Where fewer of them are known than can stand for the run, the run's owner
has to witness the update, too: it is asked last, with the signatures that there are.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace

from p2p_diloco.core.certificate import Certificate, Taken, certificate_of, check_signatures, is_witnessed
from p2p_diloco.core.errors import Misbehaved, RemoteError
from p2p_diloco.core.group import Group
from p2p_diloco.core.update import Update
from p2p_diloco.round.meeting import Meeting
from p2p_diloco.round.settle_eta import beyond_etas
from p2p_diloco.wire.messages import No
from p2p_diloco.wire.proof_messages import AskOther, Other
from p2p_diloco.wire.round_messages import AskWitness, Certifies, Eta, Took, Witnessed

log = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class Ballot:
    """The signatures over one commit."""

    meeting: Meeting
    taken: Taken
    """What is signed."""
    update: Update
    signatures: dict[int, bytes] = field(default_factory=dict)
    """Member that certifies -> its signature."""
    answered: set[int] = field(default_factory=set)
    """Members that have signed, or have said that they do not."""

    def hear(self, member: int, word: Took | No) -> None:
        """Takes a member's word on the commit. Misbehaved when it has signed something else."""
        if isinstance(word, Took):
            self.count(member, word.signature)
        self.answered.add(member)
        self.meeting.changed.ring()

    def count(self, member: int, signature: bytes) -> None:
        """Counts a member's signature. Misbehaved when it is of something else, or the member has signed another commit
        as well."""
        peer_id = self.meeting.group.members[member].peer_id
        if not self.taken.is_signed(peer_id, signature):
            raise Misbehaved(peer_id, "signs something else than the commit")
        if not self.meeting.signatures.note(member, self.taken, signature):
            raise Misbehaved(peer_id, "signs two commits of one round")
        if member in self.meeting.group.voting:
            self.signatures[member] = signature

    @property
    def has_most(self) -> bool:
        """Returns whether most of the members that certify have signed."""
        return self.meeting.group.is_most(self.signatures)

    @property
    def is_over(self) -> bool:
        """Returns whether nobody's word is still to come."""
        return self.meeting.group.reaching(self.meeting.me) <= self.answered | self.meeting.lost

    async def certificate(self) -> Certificate | None:
        """Returns the certificate that the signatures make. None when the run's owner has to witness it, and does
        not."""
        meeting, group = self.meeting, self.meeting.group
        certificate = certificate_of(group, self.taken, self.signatures)
        if not group.needs_witness or is_witnessed(group, meeting.owner, self.signatures, b""):
            return certificate
        if group.helper == meeting.identity.peer_id:
            mine = None if meeting.own_witness is None else meeting.own_witness.sign(group, self.taken)
            return replace(certificate, witness=mine.signature) if isinstance(mine, Witnessed) else None
        try:
            witness = await self._ask_witness(certificate)
        except RemoteError as error:
            log.warning("outer step %d: no witness: %s", group.step, error.reason)
            meeting.transport.traffic.reject(error)
            return None
        return replace(certificate, witness=witness)

    async def _ask_witness(self, certificate: Certificate) -> bytes:
        """Returns the signature of the run's owner."""
        meeting, owner = self.meeting, self.meeting.owner
        channel = await meeting.transport.open(owner, meeting.directory.maddrs(owner), meeting.protocol)
        try:
            ask = AskWitness(link=self.update.header.link, certificate=certificate.to_bytes())
            word: Eta | Witnessed = await channel.request(ask, Eta, Witnessed)
            answer = await beyond_etas(channel, word, Witnessed, timeout_s=meeting.timeouts.request_s)
        finally:
            channel.close()
        if not self.taken.is_signed(owner, answer.signature):
            raise Misbehaved(owner, "witnesses something else than the commit")
        return answer.signature


def certifies(certificate: Certificate) -> Certifies:
    """Returns the message that gives a certificate to a member, which has its roster."""
    return Certifies(
        full=certificate.full,
        members=[member for member, _ in certificate.signatures],
        signatures=[signature for _, signature in certificate.signatures],
        witness=certificate.witness,
    )


def certificate_in(
    said: Certifies | AskOther | Other, group: Group, *, state: bytes, link: bytes, owner: str, source: str
) -> Certificate:
    """Returns the certificate in what a member says, verified for the update with this link. ``state``: as in
    ``Taken``. Misbehaved of ``source`` when it is not sound."""
    if len(said.members) != len(said.signatures):
        raise Misbehaved(source, "sends a certificate that does not fit the round")
    certificate = Certificate(
        roster=group.sealed,
        full=said.full,
        state=state,
        signatures=tuple(zip(said.members, said.signatures)),
        witness=said.witness,
    )
    try:
        check_signatures(certificate, group, link, owner)
    except ValueError as error:
        raise Misbehaved(source, f"sends {error}") from error
    return certificate
