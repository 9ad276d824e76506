"""What peers say to each other about a round: how its members come together, reduce, and settle on an update."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import FailFast, Field

from p2p_diloco.core.call import CALLERS
from p2p_diloco.core.certificate import MAX_CERTIFICATE_BYTES, MAX_FULL_BYTES
from p2p_diloco.core.group import MAX_ABSENT, MAX_MEMBERS, SealedRoster
from p2p_diloco.core.records import Hash, Natural
from p2p_diloco.core.signed_part import MAX_PARTS
from p2p_diloco.wire.message import MAX_FRAME_BYTES, Message, Sealed, Signature


class Ready(Message):
    """Member to leader: I am ready for a round. Answered by Eta, as often as the time changes, and then by
    Roster, TooFew, NoWitness, Redirect, Behind or No."""

    tag = "ready"
    purpose = "other"
    readiness: Sealed
    record: Sealed


class Roster(Message):
    """Leader to member: the signed readiness of every member, in the order of rank, and the leader's signature over the
    whole."""

    tag = "roster"
    members: Annotated[list[Sealed], FailFast(), Field(max_length=MAX_MEMBERS)]
    absent: Annotated[list[Sealed], FailFast(), Field(max_length=MAX_ABSENT)] = Field(default=[])
    """Records of trainers on this head that do not come. Only in runs that keep missed rounds, where they count in the
    total weight."""
    signature: Signature
    idle: Annotated[list[Annotated[int, Field(ge=0, lt=256)]], FailFast(), Field(max_length=MAX_MEMBERS)] = Field(
        default=[]
    )
    """Indices of members that neither reduce nor lead in this round, rising."""

    @classmethod
    def of(cls, roster: SealedRoster) -> Roster:
        """Returns the message that has a roster in it. Who sends it, or is asked about it, is its leader."""
        return cls(
            members=list(roster.members),
            absent=list(roster.absent),
            signature=roster.signature,
            idle=list(roster.idle),
        )

    def sealed_by(self, leader: str) -> SealedRoster:
        """Returns the roster in it, as that of ``leader``. Nothing is verified."""
        return SealedRoster(
            leader=leader,
            members=tuple(self.members),
            absent=tuple(self.absent),
            signature=self.signature,
            idle=tuple(self.idle),
        )


class TooFew(Message):
    """Leader to member: the round closed with fewer than the run's smallest group."""

    tag = "too-few"
    ready: Natural


class NoWitness(Message):
    """Leader to member: too few of those who are ready are known, and the run's owner, whose seed would have to witness
    the update, is not there."""

    tag = "no-witness"


class Redirect(Message):
    """I shall not lead: this peer precedes me and is alive."""

    tag = "redirect"
    record: Sealed


class Behind(Message):
    """The round you ask about is over: this is where I stand now. Catch up."""

    tag = "behind"
    record: Sealed


class Closing(Message):
    """Leader to a peer that is not ready: the round on this head closes in ``gather_s``, if enough are ready. Answered
    by Eta, Behind, Redirect (a leader that precedes you gathers on this head: come there) or No; a peer that is busy
    with another leader's round on this very head says so from time to time, and answers when that is over."""

    tag = "closing"
    purpose = "other"
    head: Hash
    gather_s: Annotated[float, Field(ge=0, le=600, allow_inf_nan=False)]
    record: Sealed
    """The leader's."""
    callers: Annotated[list[Sealed], FailFast(), Field(max_length=CALLERS)] = Field(default=[])
    """The records of others that are ready on this head: with the leader's, enough to call everybody."""


class Eta(Message):
    """I shall be ready (a member), or the round closes (a leader), in ``eta_s``."""

    tag = "eta"
    eta_s: Annotated[float, Field(ge=0, le=86400, allow_inf_nan=False)]
    busy: bool = False
    """I am in a round on this head, or wait for one: another word comes in ``eta_s``."""
    leader: Sealed = b""
    """The record of whom I wait for, so that two leaders on one head hear of each other."""
    uncalled: bool = False
    """Too few are ready to call the others, as far as I know: nobody knows when the round closes (a leader), or my
    trainer makes all its steps (a member)."""


class Contribute(Message):
    """Sender to reducer; then, as frames, the sender's contributions to the reducer's parts, in order. The reducer
    answers with as many frames: a byte with the mask's length, the mask, the encoded mean. Or No."""

    tag = "contribute"
    purpose = "reduce"
    bulk = True
    round_id: Hash
    number: Annotated[int, Field(ge=0, lt=256)] = 0
    """Of the butterfly: 0 is the round's own, then those for parts that were lost."""


class Receipt(Message):
    """Member to leader: the hashes of the parts I hold after butterfly ``number``; empty where I hold none. Answered by
    Eta, as often as it takes, and then by Again, Commit or No."""

    tag = "receipt"
    purpose = "reduce"
    max_bytes = MAX_FRAME_BYTES
    round_id: Hash
    number: Annotated[int, Field(ge=0, lt=256)] = 0
    part_hashes: Annotated[list[Hash | Literal[b""]], FailFast(), Field(max_length=MAX_PARTS)]
    state: Hash | Literal[b""] = b""
    """The digest of my outer state, at an outer step at which a snapshot is due."""


class Again(Message):
    """Leader to member: nobody holds ``parts``. ``members`` reduce them in a butterfly of this number, among
    themselves. Answered by a new Receipt."""

    tag = "again"
    max_bytes = MAX_FRAME_BYTES
    number: Annotated[int, Field(gt=0, lt=256)]
    members: Annotated[list[Annotated[int, Field(ge=0, lt=256)]], FailFast(), Field(max_length=256)]
    parts: Annotated[list[Annotated[int, Field(ge=0, lt=MAX_PARTS)]], FailFast(), Field(max_length=MAX_PARTS)]


class Commit(Message):
    """Leader to member: this is the update. ``holders[i]`` is the index in the roster of one who holds part ``i``.
    Answered by Took, when the member holds all of it and signs it, or by No, when it does not sign; then by Eta, any
    number, and Certifies or No."""

    tag = "commit"
    max_bytes = MAX_FRAME_BYTES
    part_hashes: Annotated[list[Hash], FailFast(), Field(max_length=MAX_PARTS)]
    holders: Annotated[list[Annotated[int, Field(ge=0, lt=256)]], FailFast(), Field(max_length=MAX_PARTS)]
    state: Hash | Literal[b""] = b""
    """The digest of the state that the update leads on from, where a snapshot is due and most members agree on it."""


class Took(Message):
    """Member to leader: my signature over the update (``core.certificate.Taken``). I sign no other in this round."""

    tag = "took"
    signature: Signature


class AskCommit(Message):
    """A later leader to a member that has not come: have you taken a commit? Answered by Eta while the member is with
    an earlier leader, and then by TookBefore; by Commit and Certifies, when the member knows that it is certified; or
    by No: then the member signs none of an earlier leader any more."""

    tag = "ask-commit"
    purpose = "reduce"
    round_id: Hash


class TookBefore(Message):
    """Member to a later leader: the commit that I have taken, and my signature over it."""

    tag = "took-before"
    max_bytes = MAX_FRAME_BYTES
    part_hashes: Annotated[list[Hash], FailFast(), Field(max_length=MAX_PARTS)]
    state: Hash | Literal[b""] = b""
    signature: Signature


class Certifies(Message):
    """Leader to member: the update is certified by these. Who has it applies the update."""

    tag = "certifies"
    full: Annotated[bytes, Field(max_length=MAX_FULL_BYTES)]
    members: Annotated[list[Annotated[int, Field(ge=0, lt=256)]], FailFast(), Field(max_length=MAX_MEMBERS)]
    """Indices in the roster of those who have signed, rising."""
    signatures: Annotated[list[Signature], FailFast(), Field(max_length=MAX_MEMBERS)]
    """In the order of ``members``."""
    witness: Signature | Literal[b""] = b""
    """Of the run's owner, where it has witnessed the update and is no member."""


class AskWitness(Message):
    """Leader to the owner's seed: too few of us are known; witness this update. Answered by Eta while the seed catches
    up, and then by Witnessed or No: it witnesses one update on a head."""

    tag = "ask-witness"
    purpose = "reduce"
    link: Hash
    """The update's."""
    certificate: Annotated[bytes, Field(max_length=MAX_CERTIFICATE_BYTES)]
    """As it would be without a witness."""
    max_bytes = MAX_CERTIFICATE_BYTES + 1024


class Witnessed(Message):
    """The owner's seed to a leader: my signature over the update that you named."""

    tag = "witnessed"
    signature: Signature


class AskPart(Message):
    """Member to member: send me one part of the round's update. Answered by Size and one frame, as in Contribute, or by
    No."""

    tag = "ask-part"
    purpose = "reduce"
    bulk = True
    round_id: Hash
    part: Natural
    hash: Hash
