"""What is told in the event log of one attempt at an outer step, whatever became of it."""

from __future__ import annotations

from p2p_diloco.core.aggregate import Alignment
from p2p_diloco.core.certificate import is_witnessed
from p2p_diloco.core.event import RoundEnded
from p2p_diloco.round.outcome import Missed, Settled
from p2p_diloco.round.seat import Seat
from p2p_diloco.round.settle import RoundCost, Settlement


def round_ended(
    seat: Seat,
    outcome: Settled | Missed,
    settlement: Settlement | None = None,
    *,
    gather_s: float = 0.0,
    apply_s: float = 0.0,
    alignment: Alignment | None = None,
) -> RoundEnded:
    """Returns the event of a round after which I stand where ``seat`` has it. ``settlement``: where a group was found.
    ``alignment``: where it can be told."""
    members = settlement.group.members if settlement else ()
    trainers = settlement.group.trainers if settlement else ()
    missed = outcome if isinstance(outcome, Missed) else None
    certificate = None if isinstance(outcome, Missed) else outcome.certificate
    witnessed = False
    if certificate is not None and settlement is not None:
        signers = (member for member, _ in certificate.signatures)
        witnessed = is_witnessed(settlement.group, settlement.meeting.owner, signers, certificate.witness)
    cost = settlement.cost() if settlement else RoundCost()
    return RoundEnded(
        step=seat.standing.step,
        head=seat.standing.head.hex(),
        committed=missed is None,
        reason=missed.reason if missed else "",
        detail=missed.detail if missed else "",
        group=tuple(member.peer_id for member in trainers),
        dropped=tuple(member.peer_id for member in trainers if member.dropped),
        lost=tuple(members[i].peer_id for i in sorted(settlement.meeting.lost)) if settlement else (),
        gather_s=gather_s,
        apply_s=apply_s,
        reduce_s=cost.reduce_s,
        settle_s=cost.settle_s,
        bytes_sent=cost.bytes_sent,
        bytes_received=cost.bytes_received,
        known=len(seat.known.peers),
        signatures=len(certificate.signatures) if certificate else 0,
        certifying=len(settlement.group.voting) if certificate and settlement else 0,
        witnessed=witnessed,
        uncertified=missed.uncertified if missed else "",
        contribution_norm=alignment.contribution_norm if alignment else None,
        update_norm=alignment.update_norm if alignment else None,
        cosine=alignment.cosine if alignment else None,
        helper=(settlement.group.helper or None) if settlement else None,
        parts=settlement.part_counts if settlement else None,
        share_percent=settlement.share_percent if settlement else None,
    )
