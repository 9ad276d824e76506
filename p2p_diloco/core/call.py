"""When a round calls those who still train: as soon as enough are ready. Pure.

A call ends everybody's inner phase within ``round.gather_s``, and costs whoever is ready nothing. Its word that it has
made its inner steps cannot be checked. So no peer calls alone where others are: one that says it is ready at once would
leave all others ``round.gather_s`` to learn in. As many as CALLERS can, if all of them are known: what remains possible
is that two known peers lie together.
"""

from __future__ import annotations

from collections.abc import Sequence

from p2p_diloco.core.admission import Seated, votes
from p2p_diloco.core.known import Known
from p2p_diloco.core.records import Phase

CALLERS = 2
"""So many that are ready call the others, if these are more; those of one token count once. As with the second fastest
one, by whom the others plan (``pace.planned_steps``), one liar among them changes little."""
READY_PHASES: tuple[Phase, ...] = ("gather", "reduce", "settle")
"""Of a trainer that is ready on its head, or in a round there, and has not trained since."""


def is_called(around: Sequence[Seated], ready: Sequence[Seated], known: Known, min_group: int) -> bool:
    """Returns whether those of the trainers ``around`` on a head that are ``ready`` call the others. The known ones
    alone count, where more than CALLERS of them are there; where no more than CALLERS are there in all, one calls.
    ``min_group``: no more are needed than a round has."""
    familiar = [one for one in around if one.peer_id in known.peers]
    counted = familiar if votes(familiar) > CALLERS else around
    needed = min(CALLERS, min_group) if votes(counted) > CALLERS else 1
    ids = {one.peer_id for one in counted}
    return votes(one for one in ready if one.peer_id in ids) >= needed
