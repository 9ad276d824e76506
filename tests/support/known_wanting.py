"""Which lies the protocol does not stand today: kind -> a seed of ``draw_with_liars``, and which invariant it violates.

The tests want each of them to be violated exactly so. Whoever mends the protocol takes the kind out of this table; from
then on its first schedules have to hold.
"""

from __future__ import annotations

KNOWN_WANTING: dict[str, tuple[int, str]] = {
    "zeros for a mean": (0, "astray"),
    "two means": (0, "astray"),
    "invented parts": (0, "no-invention"),
    "A-Again-B": (1, "never-lost"),
    "two rosters": (1, "never-lost"),
    "extends alone": (0, "no-invention"),
    "invented history": (2, "no-invention"),
    "invented snapshot": (0, "same-bytes"),
    "idle members": (0, "pace"),
    "Eta(86400)": (0, "pace"),
    "always busy": (0, "pace"),
}
