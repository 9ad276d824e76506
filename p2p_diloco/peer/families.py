"""What the families of others' addresses mean for a peer: the owner's seed leads before the trainers where one does not
reach the others; and a trainer that does not reach all that average is told so, with the remedy."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from p2p_diloco.core.reach import BOTH, IPV4, Reachable, fit_to_average, reaches
from p2p_diloco.round.company import Company
from p2p_diloco.round.here import Here

log = logging.getLogger(__name__)

ALL_REACHED = "all that average can be reached now"


@dataclass(kw_only=True, eq=False)
class Families:
    """Holds what one peer makes of the families in the others' records."""

    here: Here
    company: Company
    helps: bool = False
    """As in the record: the owner's seed leads before the trainers."""
    _missing: str = ""
    """What the user was told last."""

    def note(self) -> None:
        """Takes in what the records that are there now say. A trainer tells its user once when it does not reach all
        that average, and when it does again."""
        directory, seat, rules = self.here.directory, self.here.seat, self.company.rules
        if not seat.role_trainer:
            self.helps = self.here.peer_id == rules.owner and self.company.helper.comes_first()
            return
        trainers = [record for record in directory.current(self.here.wall_s()) if record.role == "trainer"]
        helper = None if rules.seeds_reduce == "never" else directory.get(rules.owner)
        missing = missing_note(seat.ways, trainers, helper)
        if missing != self._missing:
            self._missing = missing
            log.info(missing or ALL_REACHED)


def missing_note(mine: Reachable, trainers: Sequence[Reachable], helper: Reachable | None) -> str:
    """Returns how much a trainer contributes that does not reach all that average, and the remedy; empty where it
    reaches them. ``helper``: the owner's seed, where the run lets it help."""
    average = fit_to_average(trainers, [mine, *trainers])
    missed = [one for one in average if not reaches(mine, one)]
    if not missed or mine.reaches_over == BOTH:
        return ""
    own, other = ("IPv4", "IPv6") if mine.reaches_over == IPV4 else ("IPv6", "IPv4")
    why = f"this machine has {own} alone, and {len(missed)} of {len(average)} that average have {other} alone"
    if len(missed) < len(average):
        return f"{why}: it contributes to what the others average; give it {other} for the rest"
    if helper is not None and not helper.client_mode and reaches(mine, helper):
        return f"{why}: it contributes to what the owner's seed averages; give it {other} for the rest"
    return f"{why}: it contributes nothing; give it {other}, or ask the run's owner to give the seed {own}"
