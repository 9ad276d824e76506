"""How the seed of the run's owner helps trainers of which none can be dialled, or not by all of them: it leads their
rounds and reduces for them, beside those that can be, and contributes nothing.

Those that are ready come to it, for there is nobody else to lead, or it says that it is needed; it gathers as any
leader does, and adds itself to the roster, behind the trainers (``Readiness.helps``). Then it takes part in the round
like a trainer whose contribution was dropped, but counts nowhere. What each trainer sends and receives is one vector;
the seed, where it is alone, receives and sends as many as there are trainers. Only the owner's seed does so: a reducer
can cheat, and the owner has nobody to cheat.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from p2p_diloco.core.errors import Misbehaved, Refused
from p2p_diloco.peer.attempts import Attempts
from p2p_diloco.peer.follower import Follower

log = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class Helping:
    """Takes part in the rounds that the owner's seed has formed."""

    attempts: Attempts
    follower: Follower

    async def run(self) -> None:
        """Takes part in one round after the other, until it is cancelled."""
        gatherings = self.attempts.matchmaker.gatherings
        while True:
            forms = gatherings.forms.event
            await self._help()
            await forms.wait()

    async def _help(self) -> None:
        """Takes part in the round that was formed last, if there is one and I still stand where it begins."""
        here, presence, matchmaker = self.attempts.here, self.attempts.presence, self.attempts.matchmaker
        roster, matchmaker.gatherings.formed = matchmaker.gatherings.formed, None
        if roster is None:
            return
        async with self.follower.moving:  # the state moves by this round alone, as long as it lasts
            try:
                group = matchmaker.company.group_of(here.peer_id, roster)
            except (Misbehaved, Refused) as error:  # somebody was barred meanwhile, or I have moved on
                log.info("a round that was formed here is not held: %s", error.reason)
                return
            if group.head != here.seat.standing.head:
                log.info("outer step %d: formed too late to help", group.step)
                return
            result = await self.attempts.hold(group)
            presence.enter("inner")
            if result.committed:
                presence.publish_now.ring()
