"""What event logs tell of a swarm in which faults happen. Pure. ``log``: one peer's; ``others``: those of several."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from benchmarks.loopback import Log
from p2p_diloco.core.event import (
    E,
    Event,
    PeerCaughtUp,
    PeerJoined,
    PhaseBegan,
    RoundEnded,
    TrainerStalled,
    latest,
    of_kind,
)


def rounds(log: Log) -> list[RoundEnded]:
    """Those that committed."""
    return [event for event in of_kind(log, RoundEnded) if event.committed]


def newest(log: Log) -> int:
    """The outer step that a peer stands at."""
    return next((step for step in map(standing, reversed(log)) if step is not None), 0)


def standing(event: Event) -> int | None:
    """The outer step that the peer stands at, if this event says."""
    match event:
        case PeerJoined() | RoundEnded() | PhaseBegan():
            return event.step
        case PeerCaughtUp():
            return event.to_step
    return None


def calm_stall(logs: Sequence[Log], since_s: float = 0.0) -> float | None:
    """Median stall of the newest outer step, once all have made it together."""
    last = [latest(log, RoundEnded) for log in logs]
    whole = [event for event in last if event and len(event.group) == len(logs) and event.committed]
    if len(whole) < len(logs) or any(event.lost or event.mono_s < since_s for event in whole):
        return None
    stalls = [stall_after(log, event.mono_s) for log, event in zip(logs, whole)]
    if None in stalls or len({event.step for event in whole}) > 1:
        return None
    return median(stall for stall in stalls if stall is not None)


def stall_after(log: Log, since_s: float) -> float | None:
    stall = first(log, TrainerStalled, since_s)
    return stall.seconds if stall else None


def first(log: Log, kind: type[E], since_s: float) -> E | None:
    return next((event for event in of_kind(log, kind) if event.mono_s > since_s), None)


def first_commit(log: Log, step: int) -> RoundEnded | None:
    """Its first round that went beyond an outer step."""
    return next((event for event in rounds(log) if event.step > step), None)


def first_stall(log: Log, step: int) -> float | None:
    commit = first_commit(log, step)
    return None if commit is None else stall_after(log, commit.mono_s)


def missed_rounds(log: Log, since_s: float, step: int) -> int:
    """Before the first that went beyond an outer step."""
    commit = first_commit(log, step)
    until_s = since_s if commit is None else commit.mono_s
    return sum(since_s < event.mono_s < until_s for event in of_kind(log, RoundEnded))


def swarm_step(others: Sequence[Log], at_s: float) -> int:
    steps = (event.step for log in others for event in rounds(log) if event.mono_s <= at_s)
    return max(steps, default=0)


def on_head(log: Log, others: Sequence[Log], able_s: float, step: int) -> Event | None:
    """Its first event since then that shows it where the swarm is, beyond the outer step at which it was hit."""
    for event in log:
        stands_at = standing(event)
        if event.mono_s < able_s or stands_at is None:
            continue
        moved = isinstance(event, PeerJoined | PeerCaughtUp) or stands_at > step
        if moved and stands_at >= swarm_step(others, event.mono_s):
            return event
    return None


def began(log: Log, phase: str, before_s: float) -> float:
    """When a phase last began."""
    begun = (event for event in reversed(of_kind(log, PhaseBegan)) if event.phase == phase)
    return next(event.mono_s for event in begun if event.mono_s <= before_s)
