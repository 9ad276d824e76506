"""The seed of the run's owner as a helper: whether it is there, whether it leads before the trainers, and what it signs
as a member of their round.

Trainers that can be dialled lead before it, and it takes no part, unless the run has it help always, or one that trains
does not reach all that would average for it (``reach.leaves_out``): it has IPv6 alone, say, and they have IPv4. Then
the seed leads, as the one that all reach, and reduces beside the others. The seed itself decides whether it is needed,
for everybody, and says so in its record: views of who is there differ, and two leaders would part the others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from p2p_diloco.core.reach import leaves_out, reaches
from p2p_diloco.core.records import Record
from p2p_diloco.core.roster import Readiness, new_nonce
from p2p_diloco.core.roster_rules import RosterRules
from p2p_diloco.round.here import Here


@dataclass(frozen=True, kw_only=True, eq=False)
class Helper:
    """Says what a peer knows of the owner's seed."""

    here: Here
    rules: RosterRules

    def is_on(self, head: bytes) -> bool:
        """Returns whether the seed is on ``head``, can be dialled by me, and may help."""
        seat, owner = self.here.seat, self.rules.owner
        if self.rules.seeds_reduce == "never":
            return False
        if self.here.peer_id == owner:
            return not seat.role_trainer and not seat.client_mode and seat.standing.head == head
        return any(
            record.peer_id == owner and record.role == "seed" and not record.client_mode and reaches(seat.ways, record)
            for record in self.here.live()
            if record.head == head
        )

    def comes_first(self) -> bool:
        """Returns whether the seed, where it is on a head, leads there before all trainers: if the run has it help
        always, or, as far as I have heard from the seed, because it is needed."""
        owner, seat = self.rules.owner, self.here.seat
        if self.rules.seeds_reduce != "auto":
            return self.rules.seeds_reduce == "always"
        if self.here.peer_id != owner:
            record = self.here.directory.get(owner)
            return record is not None and record.role == "seed" and record.helps
        own = replace(seat.ways, client_mode=seat.client_mode)
        return not seat.role_trainer and leaves_out(self._trainers(), own)

    def _trainers(self) -> list[Record]:
        """Returns the records of those that train, on whatever head: one that has IPv6 alone is heard of late."""
        live = self.here.live()
        return [record for record in live if record.role == "trainer" and record.phase not in ("joining", "left")]

    def readiness_beside(self, member: Readiness) -> Readiness:
        """Returns what I sign as the seed that helps in the round of this member."""
        return member.model_copy(
            update={
                "peer_id": self.here.peer_id,
                "weight": 1,
                "client_mode": False,
                "dropped": True,
                "tokens_per_s": 0.0,
                "nonce": new_nonce(),
                "seat": b"",
                "helps": True,
                "uplinks": b"",
                "reached_over": self.here.seat.ways.reached_over,
                "reaches_over": self.here.seat.ways.reaches_over,
            }
        )
