"""What a peer's events add up to, for its metrics."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

from p2p_diloco.core.event import DamageRepaired, Event, PeerCaughtUp, RoundEnded, TrainerStalled
from p2p_diloco.core.trust_event import BranchLeft, PartAudited, PeerBarred, ReducerFound, StateDisputed, WitnessAsked

LIMITS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0)
"""Up to which durations are told apart: from a round on one machine to one that takes all of its time."""
ROUND_PHASES = ("gather", "reduce", "settle", "apply")


@dataclass(kw_only=True)
class Durations:
    """Counts durations by their length. ``counts[i]``: those of at most ``LIMITS_S[i]`` that are longer than the limit
    before; the last one: the rest."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(LIMITS_S) + 1))
    sum_s: float = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(LIMITS_S, seconds)] += 1
        self.sum_s += seconds


@dataclass(kw_only=True)
class Totals:
    """Adds up the events of this process. Events of kinds that are not named here count for nothing."""

    rounds: Counter[str] = field(default_factory=Counter)
    """By result: "committed", or why not."""
    phases: dict[str, Durations] = field(default_factory=lambda: {phase: Durations() for phase in ROUND_PHASES})
    """Of the rounds that came so far."""
    stalls: Durations = field(default_factory=Durations)
    members_lost: int = 0
    last_round: RoundEnded | None = None
    last_commit: RoundEnded | None = None
    """The last round that committed here."""
    witnessed: int = 0
    """Updates committed here that the run's owner has signed."""
    helped: int = 0
    """Updates committed here that the owner's seed has led and reduced."""
    uncertified: Counter[str] = field(default_factory=Counter)
    """Rounds whose update has no certificate, by ``event.Uncertified``."""
    uncertified_since_s: float | None = None
    """Unix time at which the first round ended in which others were there and nothing was certified, since the last
    outer step; None where none has."""
    branches_left: int = 0
    witness_asked: Counter[bool] = field(default_factory=Counter)
    """Times that this peer, the run's owner, was asked to witness an update, by whether it signed."""
    catch_ups: int = 0
    rolled_back: int = 0
    """Outer steps given up."""
    audits: Counter[str] = field(default_factory=Counter)
    """Parts that others have reduced and this peer has looked at, by result."""
    found: Counter[str] = field(default_factory=Counter)
    """Times that something was found of a reducer, by kind."""
    disputes: int = 0
    """Times that others named another digest of a state."""
    equivocations: Counter[str] = field(default_factory=Counter)
    """Peers that were barred, by what they have signed two of."""
    repairs: Counter[str] = field(default_factory=Counter)
    """By what was repaired."""

    def add(self, event: Event) -> None:
        """Counts one event."""
        match event:
            case RoundEnded():
                self._add_round(event)
            case TrainerStalled():
                self.stalls.add(event.seconds)
            case PeerCaughtUp():
                self.catch_ups += 1
                self.rolled_back += event.rolled_back
                self.uncertified_since_s = None
            case BranchLeft():
                self.branches_left += 1
            case WitnessAsked():
                self.witness_asked[event.signed] += 1
            case PartAudited():
                self.audits[event.result] += 1
            case ReducerFound():
                self.found[event.kind] += 1
            case StateDisputed():
                self.disputes += 1
            case PeerBarred():
                self.equivocations[event.why] += 1
            case DamageRepaired():
                self.repairs[event.what] += 1

    def _add_round(self, event: RoundEnded) -> None:
        self.rounds["committed" if event.committed else event.reason] += 1
        self.members_lost += len(event.lost)
        self.phases["gather"].add(event.gather_s)
        if event.group:
            self.phases["reduce"].add(event.reduce_s)
            self.phases["settle"].add(event.settle_s)
        if event.committed:
            self.phases["apply"].add(event.apply_s)
            self.last_commit, self.uncertified_since_s = event, None
            self.witnessed += event.witnessed
            self.helped += event.helper is not None
        elif (event.group or event.uncertified) and self.uncertified_since_s is None:
            self.uncertified_since_s = event.wall_s
        if event.uncertified:
            self.uncertified[event.uncertified] += 1
        self.last_round = event
