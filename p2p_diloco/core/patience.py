"""How long a reducer waits for senders: for those that keep up, and for those that were late before. Pure: times are
arguments."""

from __future__ import annotations

from collections.abc import Collection

from p2p_diloco.core.group import Group

LATE_SHARE = 0.2
"""Of the time that a reducer takes with all others: so long it waits for those that were late before."""


def spare_s(elapsed_s: float, waited_s: float, floor_s: float) -> float:
    """Returns how long a reducer still waits for senders that were late before, now that the contributions of all
    others to a part are there: in all of a butterfly for LATE_SHARE of what it takes without that, or for ``floor_s``,
    in which whoever is as fast as the others comes.

    ``elapsed_s``: since the butterfly began. ``waited_s``: of that, for such senders alone.
    """
    return max(max(LATE_SHARE * (elapsed_s - waited_s), floor_s) - waited_s, 0.0)


def late_senders(group: Group, senders: Collection[int], lapsed: Collection[str]) -> frozenset[int]:
    """Returns those of the senders that are waited for as ``spare_s`` has it: those that were lost in an earlier round,
    by their peer ids in ``lapsed``. Nobody where the others are not more than half of those that count and contribute:
    two sides of a network that was cut have lost each other, and no part is taken without most."""
    due = {i for i in group.counting if not group.members[i].dropped}
    late = frozenset(i for i in senders if group.members[i].peer_id in lapsed)
    return late if 2 * len(due - late) > len(due) else frozenset()
