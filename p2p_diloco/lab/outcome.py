"""What event logs tell of a swarm: where each trainer is now, and what became of the run, ``summary.json``. Pure.

A *log* is one peer's events (``event`` has them), oldest first. Steps are outer steps: where the peer stood after
the event.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from p2p_diloco.core.event import (
    Event,
    InnerStepEnded,
    PeerJoined,
    PeerLeft,
    PeerStarted,
    PhaseBegan,
    RoundEnded,
    ThetaEvaluated,
    TrainerStalled,
    latest,
    of_kind,
)
from p2p_diloco.core.swarm_head import Evaluation, Standing, believed_losses, swarm_head
from p2p_diloco.lab.faults import ToldFault

Log = Sequence[Event]

WithHead = PeerJoined | RoundEnded | PeerLeft
"""Events that say at which head the peer stands."""


@dataclass(frozen=True, kw_only=True)
class TrainerNow:
    """Says where one trainer is."""

    peer_id: str = ""
    phase: str = "starting"
    step: int = 0
    inner_step: int = 0
    planned: int = 0
    """Inner steps until the next outer step; 0 before the first inner step."""
    loss: float | None = None
    tokens_per_s: float = 0.0
    group: int = 0
    """Size of the last round's group."""
    round_s: float = 0.0
    round_bytes: int = 0


def trainer_now(log: Log, fate: str | None = None) -> TrainerNow:
    """Returns where the trainer of this log is. ``fate``: what has become of the peer, if it does not run."""
    started = latest(log, PeerStarted)
    if started is None:
        return TrainerNow(phase=fate or "starting")
    now = TrainerNow(peer_id=started.peer_id, phase=fate or phase_of(log), step=max(heads(log), default=0))
    ended = latest(log, RoundEnded)
    if ended is not None:
        now = replace(
            now,
            group=len(ended.group),
            round_s=ended.gather_s + ended.reduce_s + ended.settle_s + ended.apply_s,
            round_bytes=ended.bytes_sent + ended.bytes_received,
        )
    inner = latest(log, InnerStepEnded)
    if inner is not None:
        # The first inner step after an outer step has no speed yet.
        speeds = (event.tokens_per_s for event in reversed(log) if isinstance(event, InnerStepEnded))
        # The inner steps of an outer step that is over do not count towards the next.
        last = next(event for event in reversed(log) if isinstance(event, InnerStepEnded | RoundEnded | PeerJoined))
        now = replace(
            now,
            inner_step=inner.inner_step if last is inner else 0,
            planned=inner.planned,
            loss=inner.loss,
            tokens_per_s=0.0 if fate else next(filter(None, speeds), 0.0),
        )
    return now


def phase_of(log: Log) -> str:
    """Returns what the peer is doing, in words for a table."""
    event = next(event for event in reversed(log) if not isinstance(event, PhaseBegan | ThetaEvaluated))
    match event:
        case InnerStepEnded() if event.inner_step >= event.planned:
            return "outer step"
        case PeerStarted():
            return "joining"
        case PeerLeft():
            return "left"
    return "training"


def heads(log: Log) -> dict[int, str]:
    """Returns outer step -> head. Of a step that was rolled back and made again, the later one."""
    return {event.step: event.head for event in log if isinstance(event, WithHead)}


def held_out(logs: Mapping[str, Log]) -> list[tuple[int, float]]:
    """Returns (outer step, loss), rising, of the steps that led to the swarm's head: what was evaluated on a branch
    that was given up is left out. One loss a step, though several may have evaluated S_0."""
    histories = [history_of(log) for log in logs.values()]
    swarm = swarm_head([standing_of(history) for history in histories if history], None)
    led_there = {
        (step, head.encode())
        for history in histories
        if swarm is not None and history.get(swarm[0], "").encode() == swarm[1]
        for step, head in history.items()
        if step <= swarm[0]
    }
    evaluations = []
    for log in logs.values():
        for step, head, loss in evaluated(log):
            place = (step, head.encode())
            evaluations.append(Evaluation(step=step, loss=loss, path=led_there if place in led_there else {place}))
    return believed_losses(evaluations, swarm)


def history_of(log: Log) -> dict[int, str]:
    """Returns outer step -> head of where the peer stands and of the way there, rising; without what it has given
    up."""
    history: dict[int, str] = {}
    for event in log:
        if isinstance(event, WithHead):
            while history and next(reversed(history)) >= event.step:
                history.popitem()
            history[event.step] = event.head
    return history


def standing_of(history: Mapping[int, str]) -> Standing:
    """Returns where a peer of this history stands; of its way there, what has no gap."""
    newest = max(history)
    way = itertools.takewhile(lambda step: step in history, range(newest - 1, -1, -1))
    earlier = tuple(history[step].encode() for step in way)
    return Standing(step=newest, head=history[newest].encode(), heads=earlier)


def evaluated(log: Log) -> Iterator[tuple[int, str, float]]:
    """Yields (outer step, head at that time, held-out loss) of every evaluation that is a number."""
    known: dict[int, str] = {}
    for event in log:
        if isinstance(event, WithHead):
            known[event.step] = event.head
        elif isinstance(event, ThetaEvaluated) and event.held_out_loss is not None and event.step in known:
            yield event.step, known[event.step], event.held_out_loss


def tokens_per_s(log: Log) -> float:
    """Returns the mean speed from the first to the last event about inner steps, stalls and evaluation included, times
    between a stop and the next start not."""
    tokens, seconds = 0, 0.0
    before: InnerStepEnded | None = None
    for event in log:
        if isinstance(event, PeerStarted):
            before = None
        elif isinstance(event, InnerStepEnded):
            if before is not None:
                tokens += event.tokens - before.tokens
                seconds += event.mono_s - before.mono_s
            before = event
    return tokens / seconds if seconds else 0.0


def per_step(figures: Iterable[tuple[int, float]]) -> dict[int, float]:
    """Returns outer step -> sum of its figures. ``figures``: (outer step, figure)."""
    sums: dict[int, float] = {}
    for step, figure in figures:
        sums[step] = sums.get(step, 0) + figure
    return sums


def stalled_s(log: Log) -> dict[int, float]:
    """Returns outer step -> seconds for which the trainer waited at it."""
    return per_step((event.step, event.seconds) for event in of_kind(log, TrainerStalled))


def evaluated_s(log: Log) -> dict[int, float]:
    """Returns outer step -> seconds that its evaluation took."""
    return per_step((event.step, event.seconds) for event in of_kind(log, ThetaEvaluated))


def sent(log: Log) -> dict[int, float]:
    """Returns outer step -> bytes sent in rounds after which the peer stood there."""
    return per_step((event.step, event.bytes_sent) for event in of_kind(log, RoundEnded))


def received(log: Log) -> dict[int, float]:
    """Returns outer step -> bytes received in rounds after which the peer stood there."""
    return per_step((event.step, event.bytes_received) for event in of_kind(log, RoundEnded))


def guests(logs: Mapping[str, Log]) -> dict[str, int]:
    """Returns the peers met in rounds that keep no log here, with the last outer step that each was in the group of."""
    own = {trainer_now(log).peer_id for log in logs.values()}
    met: dict[str, int] = {}
    for log in logs.values():
        for event in of_kind(log, RoundEnded):
            if event.committed:
                for peer_id in set(event.group) - own:
                    met[peer_id] = max(met.get(peer_id, 0), event.step)
    return met


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """Tokens per second, of all and of each."""

    total: float
    peers: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Stalls:
    """Seconds for which trainers waited at outer steps."""

    median: float
    peers: Mapping[str, Mapping[int, float]]
    """Name -> outer step -> seconds."""


@dataclass(frozen=True, kw_only=True)
class LostMember:
    """Somebody who was lost in a round."""

    step: int
    peer: str


@dataclass(frozen=True, kw_only=True)
class SwarmOutcome:
    """Says what became of a swarm, as its trainers' logs tell. Every outer step is a key, which JSON writes as a
    string."""

    outer_steps: int
    """Made by whoever came furthest."""
    peers: Mapping[str, str]
    """Name -> peer id; so the keys below."""
    guests: Mapping[str, int]
    heads: Mapping[str, Mapping[int, str]]
    identical: bool
    """All heads at the same outer step are."""
    held_out: Sequence[tuple[int, float]]
    tokens_per_s: Speeds
    stalled_s: Stalls
    evaluate_s: Mapping[str, Mapping[int, float]]
    bytes_sent: Mapping[str, Mapping[int, float]]
    bytes_received: Mapping[str, Mapping[int, float]]
    group: Mapping[int, int]
    """Outer step -> how many made it together."""
    lost: Sequence[LostMember]
    missed_rounds: int
    certified: Mapping[int, tuple[int, int]]
    """Outer step -> how many members have signed its certificate, and how many certify."""
    witnessed: Sequence[int]
    """Outer steps that the run's owner has witnessed, rising."""
    helped: Sequence[int]
    """Outer steps that the owner's seed has led and reduced, rising."""
    uncertified_rounds: Mapping[str, int]
    """Rounds of single peers without a certificate, by what was missing (``event.Uncertified``)."""


def outcome_of(logs: Mapping[str, Log]) -> SwarmOutcome:
    """Returns what became of the swarm of these trainers."""
    rounds = [event for log in logs.values() for event in of_kind(log, RoundEnded)]
    trainers = {name: trainer_now(log) for name, log in logs.items()}
    all_heads = {name: heads(log) for name, log in logs.items()}
    of_step: dict[int, set[str]] = {}
    for peer_heads in all_heads.values():
        for step, head in peer_heads.items():
            of_step.setdefault(step, set()).add(head)
    stalls = {name: stalled_s(log) for name, log in logs.items()}
    speeds = {name: tokens_per_s(log) for name, log in logs.items()}
    lost = {(event.step, peer_id) for event in rounds for peer_id in event.lost}
    waited_s = [seconds for steps in stalls.values() for seconds in steps.values()]
    return SwarmOutcome(
        outer_steps=max((trainer.step for trainer in trainers.values()), default=0),
        peers={name: trainer.peer_id for name, trainer in trainers.items()},
        guests=guests(logs),
        heads=all_heads,
        identical=bool(of_step) and all(len(found) == 1 for found in of_step.values()),
        held_out=held_out(logs),
        tokens_per_s=Speeds(total=sum(speeds.values()), peers=speeds),
        stalled_s=Stalls(median=statistics.median(waited_s or [0.0]), peers=stalls),
        evaluate_s={name: evaluated_s(log) for name, log in logs.items()},
        bytes_sent={name: sent(log) for name, log in logs.items()},
        bytes_received={name: received(log) for name, log in logs.items()},
        group={event.step: len(event.group) for event in rounds if event.committed},
        lost=[LostMember(step=step, peer=peer_id) for step, peer_id in sorted(lost)],
        missed_rounds=sum(not event.committed for event in rounds),
        certified={event.step: (event.signatures, event.certifying) for event in rounds if event.committed},
        witnessed=sorted({event.step for event in rounds if event.witnessed}),
        helped=sorted({event.step for event in rounds if event.committed and event.helper is not None}),
        uncertified_rounds=Counter(event.uncertified for event in rounds if event.uncertified),
    )


@dataclass(frozen=True, kw_only=True)
class LocalRun:
    """Says what ``swarm`` itself knows of a run, beside its trainers' logs."""

    run_id: str | None
    """None where no trainer was started."""
    run_name: str
    command: str
    wall_s: float
    exit_codes: Mapping[str, int | None]
    faults: Sequence[ToldFault]


def summary_json(run: LocalRun, outcome: SwarmOutcome) -> bytes:
    """Returns the bytes of ``summary.json``, whose keys are the fields of both."""
    return (json.dumps(asdict(run) | asdict(outcome), indent=2) + "\n").encode()
