"""Which lies the protocol does not stand today: kind -> a seed of ``draw_with_liars``, and which invariant it violates.

The tests want each of them to be violated exactly so. Whoever mends the protocol takes the kind out of this table; from
then on its first schedules have to hold. Those that are left violate ``pace`` alone, in inner phases that are
shorter than those for which a pace is promised (``explorer``); what they cost in these, ``benchmarks/liars.py`` says.
"""

from __future__ import annotations

KNOWN_WANTING: dict[str, tuple[int, str]] = {
    "idle members": (2, "pace"),
    "decides nothing": (5, "pace"),
}
