"""The events of a peer, one class for each kind, and the line of JSON that each is in the log.

A line has the fields in the order of the class, ``event`` first, which names the kind. ``pack_event`` alone writes it,
and ``parse_event`` alone reads it. Steps are outer steps, heads are hex, losses are nats per token. Each class says at
its end from which module of the network process it comes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Annotated, Literal, TypeVar

from pydantic import Field, TypeAdapter

from p2p_diloco.core.moment import Moment
from p2p_diloco.core.records import Phase, Role
from p2p_diloco.core.trust_event import (
    AnchorContradicted,
    AnchorTaken,
    BranchLeft,
    PartAudited,
    PeerBarred,
    ReducerFound,
    StateDisputed,
    WitnessAsked,
)

LoggedPhase = Phase | Literal["snapshot", "download", "serve"]
"""A phase of the record. Or: a snapshot is being written; one is being fetched; updates or a snapshot are being sent,
told once a stream."""

Uncertified = Literal["", "signatures", "witness"]
"""Why a round's update has no certificate: most of those that certify did not sign it; or the owner's witness, which it
needs, is missing. Empty where it has one, or it did not come so far."""


@dataclass(frozen=True, kw_only=True)
class PeerStarted(Moment):
    """The network process of a peer runs, and has an address. From ``network``."""

    event: Literal["started"] = "started"
    peer_id: str
    pid: int
    run_id: str
    run_name: str
    role: Role
    version: str
    maddrs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class PeerJoined(Moment):
    """The peer has the state. From ``peer``."""

    event: Literal["joined"] = "joined"
    step: int
    head: str
    from_step: int | None
    """Where its ledger stood; None for a newcomer."""
    snapshot: bool
    """Whether one had to be downloaded."""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class PhaseBegan(Moment):
    """A phase begins. From ``presence``, ``snapshots``, ``upkeep`` and ``uploads``."""

    event: Literal["phase"] = "phase"
    phase: LoggedPhase
    step: int


@dataclass(frozen=True, kw_only=True)
class InnerStepEnded(Moment):
    """The trainer has made an inner step. Told about once a second, and of the last one before an outer step. From
    ``trainer``."""

    event: Literal["inner"] = "inner"
    step: int
    inner_step: int
    """Since the last outer step."""
    planned: int
    loss: float | None
    """None where it is not finite."""
    tokens: int
    """Trained on since joining."""
    tokens_per_s: float


@dataclass(frozen=True, kw_only=True)
class OuterGradientOffered(Moment):
    """The trainer offers what it learned. From ``outer_steps``."""

    event: Literal["offered"] = "offered"
    step: int
    tokens: int
    """Learned from since it took theta."""


@dataclass(frozen=True, kw_only=True)
class RoundEnded(Moment):
    """One attempt at an outer step is over, well or not. From ``round_event``."""

    event: Literal["round"] = "round"
    step: int
    """Where the peer stands after it; so ``head``."""
    head: str
    committed: bool
    reason: str
    """Why it did not commit; empty if it did. So ``detail``."""
    detail: str
    group: tuple[str, ...]
    """Peer ids of its trainers; empty where none was found. So ``dropped`` and, but for the helper, ``lost``, which are
    some of them."""
    dropped: tuple[str, ...]
    """Who contributes nothing."""
    lost: tuple[str, ...]
    gather_s: float
    apply_s: float
    reduce_s: float
    settle_s: float
    bytes_sent: int
    bytes_received: int
    known: int
    """Peers that are known where the peer stands after it."""
    signatures: int
    """Members that have signed the update's certificate; 0 where it did not commit."""
    certifying: int
    """Members that certify: most of them have to sign. 0 where it did not commit."""
    witnessed: bool
    """The run's owner has signed it as well."""
    uncertified: Uncertified
    contribution_norm: float | None = None
    """As ``aggregate.Alignment`` has it; so the two below. None, and not in the line, where theta was not finite or
    nothing was committed."""
    update_norm: float | None = None
    cosine: float | None = None
    helper: str | None = None
    """The seed of the run's owner, where it led and reduced for the group."""
    parts: tuple[int, ...] | None = None
    """How many parts each of ``group`` was to reduce, and then the helper. None, and not in the line, where all that
    reduce had equal shares."""
    share_percent: int | None = None
    """What this peer was to reduce, in percent of an equal share; None, and not in the line, where that is 100, and
    where it does not reduce, whatever its uplink."""


@dataclass(frozen=True, kw_only=True)
class TrainerStalled(Moment):
    """The trainer learns again after an outer step. From ``network``."""

    event: Literal["stall"] = "stall"
    step: int
    seconds: float
    """From the end of the last inner step to the start of the next."""


@dataclass(frozen=True, kw_only=True)
class PeerCaughtUp(Moment):
    """The peer has reached the swarm's head with what others gave it. From ``follower``."""

    event: Literal["caught_up"] = "caught_up"
    seconds: float
    from_step: int | None
    """None for a newcomer."""
    to_step: int
    rolled_back: int
    """Outer steps given up, which the swarm did not share."""
    snapshot: bool
    """Whether one had to be downloaded."""
    bytes_received: int
    donors: int
    """Peers that something came from."""


@dataclass(frozen=True, kw_only=True)
class DamageRepaired(Moment):
    """Something of the peer's was damaged, and is whole again. From ``upkeep``."""

    event: Literal["repaired"] = "repaired"
    what: str
    """"state", "snapshot" or "update"."""
    step: int
    """Where the state or snapshot stands, or which step the update ends."""
    how: str
    """"replayed" from other files, "fetched" from a peer, or "rewritten": a fresh snapshot stands in for it."""


@dataclass(frozen=True, kw_only=True)
class DaemonRestarted(Moment):
    """p2pd was lost, and is there again. From ``network``."""

    event: Literal["p2pd_restarted"] = "p2pd_restarted"
    maddrs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ThetaEvaluated(Moment):
    """The trainer has evaluated theta of ``step`` on held-out text. From ``trainer``."""

    event: Literal["evaluated"] = "evaluated"
    step: int
    held_out_loss: float | None
    """None where it is not finite."""
    tokens: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class EventsLost(Moment):
    """The disk was full, or failed. From ``events``."""

    event: Literal["unwritten"] = "unwritten"
    lines: int
    """So many before this one are lost."""


@dataclass(frozen=True, kw_only=True)
class PeerLeft(Moment):
    """The peer leaves the run. From ``peer``."""

    event: Literal["left"] = "left"
    step: int
    head: str
    reason: str
    """"done" after the run's last outer step, "asked" where it was asked to leave before, by Ctrl+C for example; "could
    not join", "the trainer is gone"; or the name of the exception that ended it."""


Event = (
    PeerStarted
    | PeerJoined
    | PhaseBegan
    | InnerStepEnded
    | OuterGradientOffered
    | RoundEnded
    | PartAudited
    | ReducerFound
    | TrainerStalled
    | PeerCaughtUp
    | BranchLeft
    | WitnessAsked
    | DamageRepaired
    | StateDisputed
    | AnchorTaken
    | AnchorContradicted
    | PeerBarred
    | DaemonRestarted
    | ThetaEvaluated
    | EventsLost
    | PeerLeft
)
E = TypeVar("E", bound=Event)
SOMETIMES = ("contribution_norm", "update_norm", "cosine", "helper", "parts", "share_percent")
"""Fields of ``RoundEnded`` that a line has only where there is something to say."""


def pack_event(event: Event) -> bytes:
    """Returns the line of an event, with its end. ValueError for what JSON cannot say."""
    table = {key: value for key, value in asdict(event).items() if value is not None or key not in SOMETIMES}
    return json.dumps(table, allow_nan=False).encode() + b"\n"


def parse_event(line: bytes) -> Event | None:
    """Returns the event that a line tells of, or None for a line that tells of none: one that is no JSON object, of a
    kind that is not known, or without a field of its kind, or with one of another type. So it is where a disk has
    damaged a line, and with most of what other versions wrote. What is there beyond the fields is ignored."""
    try:
        return reader().validate_json(line)
    except ValueError:
        return None


@cache
def reader() -> TypeAdapter[Event]:
    """Returns what checks a line. It is built by those alone who read a log."""
    return TypeAdapter(Annotated[Event, Field(discriminator="event")])


def of_kind(events: Iterable[Event], kind: type[E]) -> list[E]:
    """Returns the events of one kind, in their order."""
    return [event for event in events if isinstance(event, kind)]


def latest(events: Sequence[Event], kind: type[E]) -> E | None:
    """Returns the last event of one kind."""
    return next((event for event in reversed(events) if isinstance(event, kind)), None)
