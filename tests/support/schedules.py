"""What shall go wrong, and when: schedules of faults, drawn from a seed, written down as JSON, and made smaller.

Nothing here runs anything: see ``explorer``. Times are simulated seconds since the swarm began.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar

from p2p_diloco.core.aggregate import AggregateName
from p2p_diloco.core.codecs import CodecName
from p2p_diloco.core.runfile import OnMissed

T = TypeVar("T")
Kind = Literal[
    "kill",
    "blackout",
    "leave",
    "join",
    "stop",
    "cut",
    "partition",
    "slow",
    "disk",
    "echo",
    "dht",
    "liar",
    "misled",
    "reset",
    "address",
]
"""Only in schedules that are written by hand: reset, of the stream over which a message is being sent; and address, a
home's new one."""
Role = Literal["trainer", "client", "seed"]
Travelling = Literal["", "contribute", "receipt", "again", "commit", "took", "ask-commit"]
"""Tags of messages between the members of a round."""

KINDS: tuple[tuple[Kind, int], ...] = (
    ("kill", 8),
    ("stop", 4),
    ("cut", 4),
    ("partition", 3),
    ("join", 3),
    ("disk", 3),
    ("slow", 3),
    ("leave", 2),
    ("blackout", 2),
    ("echo", 2),
    ("dht", 2),
    ("liar", 2),
)
"""How often a schedule has a kind of fault, relative to the others."""
ORDERLY: frozenset[Kind] = frozenset(
    ("kill", "blackout", "leave", "join", "slow", "disk", "echo", "dht", "liar", "misled")
)
"""Faults after which nobody takes a living peer for dead: who died did so for all."""
EVERYBODYS: frozenset[Kind] = frozenset(("blackout", "partition", "echo", "dht", "liar", "misled"))
"""Faults that do not happen to one peer."""
AMBUSHES: tuple[tuple[Kind, int], ...] = (("kill", 4), ("partition", 6), ("stop", 2), ("cut", 6), ("slow", 3))
"""How often each kind of fault waits for a message, where one does."""
WAITED_FOR: tuple[tuple[Travelling, int], ...] = (
    ("contribute", 4),
    ("receipt", 3),
    ("commit", 5),
    ("took", 3),
    ("ask-commit", 1),
    ("again", 1),
)
PHASES = ("inner", "gather", "gather", "reduce", "reduce", "settle", "settle", "apply", "apply", "joining")
WINDOWS = (4, 4, 4, 16)
"""Few schedules come to the sixteenth outer step: in most of them peers are known sooner."""
FIRST_FAULT_S = 8.0
LAST_FAULT_S = 80.0
MAX_PEERS = 12
"""Those that join later included."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    kind: Kind
    at_s: float
    who: int = 0
    """Index of the peer that it happens to, or at one end of the link."""
    other: int = 0
    """At the other end of the link."""
    side: tuple[int, ...] = ()
    """Of a partition. misled: liars, and newcomers who hear of nobody else as long as it lasts."""
    for_s: float = 0.0
    """Until it is over: the link restored, the peer started again. 0: for good."""
    phase: str = ""
    """Waits, from ``at_s`` on, until ``who`` is in this phase."""
    message: Travelling = ""
    """Waits, from ``at_s`` on, until a message of this kind is sent in a round, and strikes just before: ``who`` is the
    one that sends it, ``other`` the one that it is sent to. Where ``other`` is a liar, only one that is sent to it
    counts."""
    after_s: float = 0.0
    """Since the phase began, or the message was sent."""
    how: str = ""
    """kill: "silent", "wiped": comes back with an empty folder, or "disk": at the ``nth`` operation of its disk; stop:
    "whole"; cut, partition: "silent" or "reset"; slow: "uplink", all that ``who`` sends."""
    nth: int = 0
    """Operation of a disk; message of its kind in a round, whoever sends it. From 1 on."""
    amount: float = 0.0
    """slow: seconds; echo and dht: how probable."""

    def __str__(self) -> str:
        shown = {
            name: value for name, value in asdict(self).items() if value not in ("", 0, 0.0, ()) and name != "kind"
        }
        who = "" if self.kind in EVERYBODYS or self.message else f" {self.who}"
        return f"{self.kind}{who} " + " ".join(f"{k}={v}" for k, v in shown.items() if k != "who")


@dataclass(frozen=True, kw_only=True)
class PeerPlan:
    role: Role = "trainer"
    step_s: float = 1.0
    starts_s: float = 0.0
    thread_s: float = 0.01
    """How slow its disk and processor are: the time that each work of a thread takes."""
    clock_s: float = 0.0
    """How fast its clock is."""
    lie: str = ""
    """What it does other than the protocol says, one of ``liars.LIES``. Empty: it is honest."""
    lies_from_s: float = 0.0
    """Until then it is honest."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    seed: int
    peers: tuple[PeerPlan, ...]
    """The last ones, as many as there are faults of kind join, come with those."""
    faults: tuple[Fault, ...] = ()
    codec: CodecName = "fp32"
    aggregate: AggregateName = "mean"
    on_missed: OnMissed = "adopt"
    min_group: int = 2
    max_group: int = 64
    snapshot_every: int = 5
    parts: int = 5
    inner_steps: int = 6
    outer_steps: int = 1
    """Made after all have agreed again, before the end."""
    latency_s: float = 0.03
    jitter: float = 3.0
    buffer_bytes: int = 65536
    window_steps: int = 16
    """In place of ``known.WINDOW_STEPS``: so many outer steps are made before anybody is known."""
    lasts_s: float = 0.0
    """So long it goes on at least, also where nothing is planned any more."""

    @property
    def owner(self) -> int:
        """The run's owner: the first honest seed, or the first peer where there is none."""
        seeds = (i for i, plan in enumerate(self.peers) if plan.role == "seed" and not plan.lie)
        return next(seeds, 0)

    @property
    def liars(self) -> frozenset[int]:
        """The peers that lie."""
        return frozenset(i for i, plan in enumerate(self.peers) if plan.lie)

    @property
    def orderly(self) -> bool:
        """Whether nobody goes on without a living peer. A reducer hears one stream of a sender: if that is an echo, the
        two take each other for dead until they look again, which one that needs nobody else does not wait for."""
        kinds = ORDERLY - {"echo"} if self.min_group == 1 else ORDERLY
        return all(fault.kind in kinds for fault in self.faults)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        fields: dict[str, Any] = json.loads(text)
        fields["peers"] = tuple(PeerPlan(**plan) for plan in fields["peers"])
        fields["faults"] = tuple(Fault(**fault | {"side": tuple(fault["side"])}) for fault in fields["faults"])
        return cls(**fields)


# -- drawing -------------------------------------------------------------------------------------------------------


def draw(seed: int) -> Schedule:
    """The same schedule for the same seed, on every machine."""
    r = random.Random(seed)
    count = r.choice((3, 3, 4, 4, 5, 5, 6, 7, 8))
    step_s = r.choice((1.0, 1.5, 2.0))
    roles: list[Role] = ["trainer"] * count
    if count > 3 and r.random() < 0.4:
        roles[0] = "seed"
    if count > 3 and r.random() < 0.25:
        roles[1:2] = ["client"]
        roles[2] = r.choice(("trainer", "client")) if count > 4 else "trainer"
    trainers = sum(role != "seed" for role in roles)
    plain = Schedule(
        seed=seed,
        peers=tuple(_draw_peer(r, role, step_s) for role in roles),
        codec=r.choice(("fp32", "fp32", "fp32", "int8", "int4")),
        on_missed=r.choice(("adopt", "adopt", "adopt", "keep")),
        min_group=r.choice([g for g in (1, 2, 2, 2, 3) if g < trainers]),
        max_group=r.choice((64, 64, 64, 64, 64, max(trainers - 1, 2))),
        snapshot_every=r.choice((2, 5)),
        parts=r.choice((1, 3, 5, 9)),
        inner_steps=r.choice((5, 8, 12)),
        latency_s=r.choice((0.01, 0.03, 0.1)),
        jitter=r.choice((0.0, 2.0, 6.0)),
        buffer_bytes=r.choice((300, 65536)),
    )
    # A catch-up takes some ten messages, and DiLoCo's outer steps are long against that.
    plain = replace(plain, jitter=min(plain.jitter, 0.2 / plain.latency_s))
    # Few kinds in one schedule, but often: all at once would hide each other.
    kinds = r.choices([kind for kind, _ in KINDS], [often for _, often in KINDS], k=r.choice((1, 2, 2, 3)))
    mortal = max(trainers - max(plain.min_group, 2), 0) // 2
    faults: list[Fault] = []
    for at_s in sorted(r.uniform(FIRST_FAULT_S, LAST_FAULT_S) for _ in range(r.choice((1, 1, 2, 3, 4, 6)))):
        kind = r.choice(kinds)
        fault = _draw_fault(r, kind, round(at_s, 2), plain)
        if kind == "join":
            if len(plain.peers) >= MAX_PEERS:
                continue
            plain = replace(plain, peers=(*plain.peers, _draw_peer(r, "trainer", step_s)))
            fault = replace(fault, who=len(plain.peers) - 1)
        if kind in ("kill", "leave") and mortal > 0 and r.random() < 0.25 and fault.who != plain.owner:
            mortal -= 1
            fault = replace(fault, for_s=0.0)
        faults.append(fault)
        if r.random() < 0.3:
            # Trouble comes in pairs: something else at about the same time.
            second = _draw_fault(r, r.choice(("kill", "stop", "cut", kind)), fault.at_s, plain)
            if second.kind != "join":
                faults.append(replace(second, at_s=round(second.at_s + r.choice((0.0, 0.0, 1.0, 5.0)) * r.random(), 2)))
    if r.random() < 0.5:
        # Others would mostly keep a round from coming as far as the messages that these wait for.
        faults = [fault for fault in faults if fault.kind == "join"] + _draw_ambushes(r, plain)
    return replace(plain, faults=tuple(faults), window_steps=r.choice(WINDOWS))


def at_home(schedule: Schedule) -> Schedule:
    """The same schedule, in which nobody but the owner's seed can be dialled."""
    roles: list[Role] = ["seed" if i == schedule.owner else "client" for i in range(len(schedule.peers))]
    return replace(schedule, peers=tuple(replace(plan, role=role) for plan, role in zip(schedule.peers, roles)))


def _draw_ambushes(r: random.Random, plain: Schedule) -> list[Fault]:
    """Faults in the middle of rounds, often two in one."""
    others = sum(plan.role != "seed" for plan in plain.peers) - 1
    faults: list[Fault] = []
    if r.random() < 0.7:  # somebody's uplink is slow, as at home
        slow = Fault(kind="slow", at_s=FIRST_FAULT_S, who=r.randrange(len(plain.peers)), how="uplink")
        faults.append(replace(slow, for_s=round(r.uniform(20, 80), 2), amount=r.choice((0.2, 0.5, 1.0))))
    for at_s in sorted(r.uniform(FIRST_FAULT_S, LAST_FAULT_S) for _ in range(r.choice((1, 2, 3, 5)))):
        message = _one_of(r, WAITED_FOR)
        for _ in range(r.choice((1, 1, 2, 3))):
            fault = _draw_fault(r, _one_of(r, AMBUSHES), round(at_s, 2), plain)
            nth = r.randint(1, others * (others + 1) if message == "contribute" else others)
            after_s = round(r.choice((0.0, 0.0, 12 * plain.latency_s)) * r.random(), 3)
            ambush = replace(fault, who=0, other=0, phase="", message=message, nth=nth, after_s=after_s)
            if fault.kind == "partition" and r.random() < 0.7:
                ambush = replace(ambush, side=_half(r, plain))
            elif fault.kind == "kill" and fault.how in ("disk", "wiped"):
                ambush = replace(ambush, how="silent")
            elif fault.kind == "slow":
                ambush = replace(ambush, how=r.choice(("", "uplink")))
            faults.append(ambush)
            if r.random() < 0.5:
                message = _one_of(r, WAITED_FOR)
    return faults


def _one_of(r: random.Random, choices: Sequence[tuple[T, int]]) -> T:
    """Each as often as it says."""
    return r.choices([choice for choice, _ in choices], [often for _, often in choices])[0]


def _half(r: random.Random, plain: Schedule) -> tuple[int, ...]:
    """Half of those who train, and perhaps the seed."""
    trainers = [i for i, plan in enumerate(plain.peers) if plan.role != "seed"]
    seeds = [i for i, plan in enumerate(plain.peers) if plan.role == "seed" and r.random() < 0.5]
    return tuple(sorted(seeds + r.sample(trainers, len(trainers) // 2)))


def _draw_peer(r: random.Random, role: Role, step_s: float) -> PeerPlan:
    return PeerPlan(
        role=role,
        step_s=step_s * r.choice((0.9, 1.0, 1.1, 2.0)),
        starts_s=round(r.uniform(0, 2), 2),
        thread_s=r.choice((0.003, 0.01, 0.01, 0.3)),
        clock_s=r.choice((0.0, 0.0, -4.0, 4.0)),
    )


def _draw_fault(r: random.Random, kind: Kind, at_s: float, plain: Schedule) -> Fault:
    count = len(plain.peers)
    who, other = r.sample(range(count), 2)
    if kind in EVERYBODYS:
        who = 0
    fault = Fault(kind=kind, at_s=at_s, who=who, for_s=round(r.choice((0.5, 3.0, 15.0, 35.0)) * r.uniform(0.5, 1), 2))
    if kind in ("kill", "stop", "cut", "disk", "leave", "slow") and r.random() < 0.7:
        # A round takes some ten latencies.
        after_s = round(r.uniform(0, 12) * plain.latency_s, 3)
        fault = replace(fault, phase=r.choice(PHASES), after_s=after_s)
    if kind == "kill":
        fault = replace(fault, how=r.choice(("", "", "silent", "wiped", "disk")))
        if fault.how == "disk":
            fault = replace(fault, nth=r.randint(1, 8), phase="", after_s=0.0)
    elif kind == "stop":
        fault = replace(fault, how=r.choice(("", "whole")))
    elif kind in ("cut", "partition"):
        fault = replace(fault, how=r.choice(("reset", "silent")), other=other if kind == "cut" else 0)
    elif kind == "slow":
        fault = replace(fault, other=other, amount=r.choice((0.2, 1.0, 3.0)))
    elif kind in ("echo", "dht"):
        fault = replace(fault, amount=r.choice((0.1, 0.3, 0.7)))
    if kind == "partition":
        side = tuple(sorted(r.sample(range(count), r.randint(1, count - 1))))
        fault = replace(fault, side=side)
    return fault


# -- making smaller ------------------------------------------------------------------------------------------------


def shrink(schedule: Schedule, fails: Callable[[Schedule], bool], *, tries: int = 400) -> Schedule:
    """A schedule that still fails, and that none of the changes of ``smaller`` makes smaller without it passing."""
    found = True
    while found:
        found = False
        for candidate in smaller(schedule):
            if tries == 0:
                return schedule
            tries -= 1
            if fails(candidate):
                schedule, found = candidate, True
                break
    return schedule


def smaller(schedule: Schedule) -> Iterator[Schedule]:
    """Largest steps first."""
    faults = schedule.faults
    if len(faults) > 2:
        yield replace(schedule, faults=faults[: len(faults) // 2])
        yield replace(schedule, faults=faults[len(faults) // 2 :])
    for i in range(len(faults)):
        yield replace(schedule, faults=faults[:i] + faults[i + 1 :])
    for i in reversed(range(len(schedule.peers))):
        if (fewer := without_peer(schedule, i)) is not None:
            yield fewer
    plainer: dict[str, Any] = {
        "codec": "fp32",
        "on_missed": "adopt",
        "max_group": 64,
        "snapshot_every": 5,
        "parts": 1,
        "jitter": 0.0,
        "buffer_bytes": 65536,
        "outer_steps": 1,
        "min_group": 2,
        "latency_s": 0.03,
        "inner_steps": 6,
    }
    for name, value in plainer.items():
        if getattr(schedule, name) != value:
            yield replace(schedule, **{name: value})
    for i, plan in enumerate(schedule.peers):
        plain = replace(plan, step_s=1.0, thread_s=0.01)
        for simpler in (replace(plan, role="trainer"), plain, replace(plan, starts_s=0.0), replace(plan, clock_s=0.0)):
            if simpler != plan:
                yield replace(schedule, peers=(*schedule.peers[:i], simpler, *schedule.peers[i + 1 :]))
    for i, fault in enumerate(faults):
        changes: tuple[dict[str, Any], ...] = ({"phase": "", "after_s": 0.0}, {"how": "reset"}, {"after_s": 0.0})
        if fault.message and fault.nth > 1:
            changes = ({"nth": 1}, *changes)
        for change in changes:
            simpler_fault = replace(fault, **change)
            if simpler_fault != fault and (fault.how or "how" not in change) and fault.how != "disk":
                yield replace(schedule, faults=(*faults[:i], simpler_fault, *faults[i + 1 :]))


def without_peer(schedule: Schedule, index: int) -> Schedule | None:
    """None where that leaves no swarm."""
    peers = schedule.peers[:index] + schedule.peers[index + 1 :]
    if sum(plan.role != "seed" and not plan.lie for plan in peers) < 2:
        return None
    faults = []
    for fault in schedule.faults:
        ends = {"kill", "stop", "cut", "slow", "disk", "leave", "join"}
        struck = (fault.kind in ends and fault.who == index) or (fault.kind in ("cut", "slow") and fault.other == index)
        if struck and not fault.message:
            continue
        who, other = (i - (i > index) for i in (fault.who, fault.other))
        side = tuple(i - (i > index) for i in fault.side if i != index)
        faults.append(replace(fault, who=who, other=other, side=side))
    return replace(schedule, peers=peers, faults=tuple(faults))
