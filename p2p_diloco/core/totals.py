"""What a peer's event log has said so far, added up: counts, and how long things took. Pure.

Every fact is counted where it is written down (``events.EventLog``), so that figures and log cannot disagree.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LIMITS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0)
"""Up to which durations are told apart: from a round on one machine to one that takes all of its time."""

ROUND_PHASES = ("gather", "reduce", "settle", "apply")


@dataclass(kw_only=True)
class Durations:
    """``counts[i]``: those of at most ``LIMITS_S[i]`` that are longer than the limit before; the last one: the rest."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(LIMITS_S) + 1))
    sum_s: float = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(LIMITS_S, seconds)] += 1
        self.sum_s += seconds


@dataclass(frozen=True, kw_only=True)
class LastCommit:
    """Of the last round that committed here, as its event says."""

    wall_s: float
    contribution_norm: float | None
    """None where theta was not finite; so the two below."""
    update_norm: float | None
    cosine: float | None


@dataclass(kw_only=True)
class Totals:
    """Of this process's events. Events of other kinds, or with other fields, count for nothing."""

    rounds: Counter[str] = field(default_factory=Counter)
    """By result: "committed", or why not."""
    phases: dict[str, Durations] = field(default_factory=lambda: {phase: Durations() for phase in ROUND_PHASES})
    """Of the rounds that came so far."""
    stalls: Durations = field(default_factory=Durations)
    members_lost: int = 0
    last_commit: LastCommit | None = None
    catch_ups: int = 0
    rolled_back: int = 0
    """Outer steps given up."""
    disputes: int = 0
    """Times that others named another digest of a state."""
    repairs: Counter[str] = field(default_factory=Counter)
    """By what was repaired."""

    def add(self, line: Mapping[str, Any]) -> None:
        """``line``: one event, as it stands in the log."""
        match line:
            case {"event": "round", "group": group, "lost": lost, "committed": committed, "reason": reason}:
                self.rounds["committed" if committed else reason] += 1
                self.members_lost += len(lost)
                ran = ROUND_PHASES if committed else ROUND_PHASES[:3] if group else ROUND_PHASES[:1]
                for phase in ran:
                    self.phases[phase].add(line[f"{phase}_s"])
                if committed:
                    self.last_commit = LastCommit(
                        wall_s=line["wall_s"],
                        contribution_norm=line.get("contribution_norm"),
                        update_norm=line.get("update_norm"),
                        cosine=line.get("cosine"),
                    )
            case {"event": "stall", "seconds": seconds}:
                self.stalls.add(seconds)
            case {"event": "caught_up", "rolled_back": rolled_back}:
                self.catch_ups += 1
                self.rolled_back += rolled_back
            case {"event": "disputed"}:
                self.disputes += 1
            case {"event": "repaired", "what": what}:
                self.repairs[what] += 1
