"""What is told in the event log of one attempt at an outer step, whatever became of it."""

from __future__ import annotations

from p2p_diloco.core.aggregate import Alignment
from p2p_diloco.core.event import RoundEnded
from p2p_diloco.core.swarm_head import Standing
from p2p_diloco.round.outcome import Missed
from p2p_diloco.round.settle import RoundCost, Settlement


def round_ended(
    standing: Standing,
    missed: Missed | None,
    settlement: Settlement | None = None,
    *,
    gather_s: float = 0.0,
    apply_s: float = 0.0,
    alignment: Alignment | None = None,
) -> RoundEnded:
    """Returns the event of a round after which I stand at ``standing``. ``missed``: why it did not commit, if it did
    not. ``settlement``: where a group was found. ``alignment``: where it can be told."""
    members = settlement.group.members if settlement else ()
    cost = settlement.cost() if settlement else RoundCost()
    return RoundEnded(
        step=standing.step,
        head=standing.head.hex(),
        committed=missed is None,
        reason=missed.reason if missed else "",
        detail=missed.detail if missed else "",
        group=tuple(member.peer_id for member in members),
        dropped=tuple(member.peer_id for member in members if member.dropped),
        lost=tuple(members[i].peer_id for i in sorted(settlement.meeting.lost)) if settlement else (),
        gather_s=gather_s,
        apply_s=apply_s,
        reduce_s=cost.reduce_s,
        settle_s=cost.settle_s,
        bytes_sent=cost.bytes_sent,
        bytes_received=cost.bytes_received,
        contribution_norm=alignment.contribution_norm if alignment else None,
        update_norm=alignment.update_norm if alignment else None,
        cosine=alignment.cosine if alignment else None,
    )
