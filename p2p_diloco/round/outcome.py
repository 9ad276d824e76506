"""What comes of a round, as a value: an update that is certified, or why there is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from p2p_diloco.core.certificate import Certificate
from p2p_diloco.core.event import Uncertified
from p2p_diloco.core.update import Update
from p2p_diloco.wire.round_messages import Commit

MissedReason = Literal["alone", "behind", "failed", "leaving", "diverged", "repaired"]

NOT_WITNESSED = "the run's owner, whose witness so few known members need, does not give it"
"""What a leader says when it has the signatures of most, and they do not do."""


@dataclass(frozen=True, kw_only=True)
class Missed:
    """A round that did not commit here, and why. There is nothing to clean up."""

    reason: MissedReason
    detail: str
    uncertified: Uncertified = ""
    """What its update lacked for a certificate."""


@dataclass(frozen=True, kw_only=True)
class Settled:
    """The update that a round has agreed on, and its certificate."""

    update: Update
    certificate: Certificate

    def commit(self, holder: int) -> Commit:
        """Returns the commit of the update, all of which the member ``holder`` holds."""
        hashes = list(self.update.header.part_hashes)
        return Commit(part_hashes=hashes, holders=[holder] * len(hashes), state=self.certificate.state)
