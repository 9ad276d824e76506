"""Faults from outside, ``swarm --faults FILE.toml``: what the file says, and which of them are due. Pure.

seed = 1                    # of the choice of random peers

[[fault]]
action = "kill"             # kill, stop, cut; or one of their opposites by itself: restart, resume, restore
phase = "reduce"            # when the peer's event log says so; or at_s = 12.5
outer_step = 3
peer = "peer-2"             # "seed", "random", or a list of names
process = "network"         # trainer, network, guard, p2pd or all
for_s = 5.0                 # then the opposite

kill       SIGKILL. The death of one process ends the whole peer, except that it starts p2pd and its guard again.
stop       SIGSTOP: there, and silent
cut        the cable is pulled: silence in both directions, no reset
restart    the same command on the same folder, as soon as nothing is left of the killed peer
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from p2p_diloco.core.errors import UsageError
from p2p_diloco.core.event import Event, PhaseBegan, of_kind
from p2p_diloco.core.runfile import NotNegative, Positive, Section, explain
from p2p_diloco.core.toml import read_toml

Action = Literal["kill", "stop", "cut", "restart", "resume", "restore"]
ProcessName = Literal["trainer", "network", "guard", "p2pd", "all"]
STARTED_AGAIN: tuple[ProcessName, ...] = ("guard", "p2pd")
"""What a peer starts again by itself where one of them is killed: p2pd and its guard, neither of which outlives the
other."""
FaultPhase = Literal[
    "inner", "gather", "reduce", "settle", "apply", "snapshot", "download", "serve", "evaluate", "joining"
]

OPPOSITE: dict[Action, Action] = {"kill": "restart", "stop": "resume", "cut": "restore"}
PLIGHT: dict[Action, str] = {"kill": "killed", "stop": "stopped", "cut": "cut off"}
"""What a peer is until the opposite."""
ENDS_PLIGHT = {OPPOSITE[action]: plight for action, plight in PLIGHT.items()}
RANDOM = "random"


def as_list(value: object) -> object:
    """Returns a list of one where ``value`` is a text; a TOML file may have either."""
    return [value] if isinstance(value, str) else value


class Fault(Section):
    """An entry ``[[fault]]`` of the file."""

    action: Action
    at_s: NotNegative | None = None
    """Seconds after all trainers were started."""
    every_s: Positive | None = None
    """With ``at_s``: again and again."""
    phase: FaultPhase | None = None
    """When the event log of the peer says that this phase begins; of several the first, of random ones any."""
    outer_step: Annotated[int, Field(ge=0)] | None = None
    """With ``phase``: where the peer stands then. Without: the first time."""
    peer: Annotated[list[str], Field(min_length=1), BeforeValidator(as_list)]
    """A name, or several that are hit at the same moment; who is cut off together still reaches each other."""
    process: ProcessName | None = None
    """Of kill, stop and resume; all by default."""
    for_s: Positive | None = None
    """The opposite follows by itself so long after."""

    @model_validator(mode="after")
    def _makes_sense(self) -> Fault:
        if (self.at_s is None) == (self.phase is None):
            raise ValueError("give either at_s or phase")
        if self.outer_step is not None and self.phase is None:
            raise ValueError("outer_step goes with phase")
        if self.every_s is not None and self.at_s is None:
            raise ValueError("every_s goes with at_s")
        if self.action not in OPPOSITE and (self.phase is not None or self.for_s is not None):
            raise ValueError(f"phase and for_s go with kill, stop and cut, not with {self.action}")
        if self.process is not None and self.action not in ("kill", "stop", "resume"):
            raise ValueError(f"process goes with kill, stop and resume, not with {self.action}")
        if self.for_s is not None and self.action == "kill" and self.process in STARTED_AGAIN:
            raise ValueError("a peer starts its p2pd again by itself: leave out for_s")
        if len(set(self.peer)) < len(self.peer) or (RANDOM in self.peer and len(self.peer) > 1):
            raise ValueError("peer names somebody twice, or random and somebody else")
        return self


class FaultPlan(Section):
    """A file of faults."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Of the choice of random peers."""
    fault: list[Fault] = Field(default_factory=list)

    @property
    def cuts(self) -> bool:
        """Returns whether peers need networks of their own."""
        return any(fault.action in ("cut", "restore") for fault in self.fault)

    @classmethod
    def load(cls, path: Path, names: Collection[str]) -> FaultPlan:
        """Returns the plan in a file. ``names``: of the peers that there will be. Raises UsageError that names file,
        entry and key."""
        table = read_toml(path, "file of faults")
        try:
            plan = cls.model_validate(table)
        except ValidationError as error:
            raise UsageError(f"{path}: {explain(error, cls)}") from error
        for number, fault in enumerate(plan.fault, 1):
            for name in fault.peer:
                if name not in (*names, RANDOM):
                    raise UsageError(
                        f"{path}: key 'fault.{number}.peer': no peer {name!r}; there are {', '.join(names)}, random"
                    )
        return plan


@dataclass(frozen=True, kw_only=True)
class Act:
    """One action on one peer."""

    fault: int
    """Its place in the file, from 0."""
    action: Action
    peer: str
    process: ProcessName
    follows: bool = False
    """From ``for_s``."""
    island: str = ""
    """The same for all that are cut off together."""


@dataclass(frozen=True, kw_only=True)
class Done:
    """An act, and what it met."""

    act: Act
    at_s: float
    """Seconds after all trainers were started."""
    mono_s: float
    """The same moment on the clock of the event logs."""
    pids: tuple[int, ...]
    """Of the processes that it hit, or started."""
    phase: str
    """The last that the peer's event log had said; empty if none."""
    step: int
    """The outer step at which that began."""

    @property
    def told(self) -> ToldFault:
        """Returns what ``summary.json`` says of it."""
        return ToldFault(
            at_s=self.at_s,
            action=self.act.action,
            peer=self.act.peer,
            process=self.act.process,
            pids=self.pids,
            phase=self.phase,
            step=self.step,
        )


@dataclass(frozen=True, kw_only=True)
class ToldFault:
    """A fault in ``summary.json``; fields as in ``Act`` and ``Done``."""

    at_s: float
    action: Action
    peer: str
    process: ProcessName
    pids: tuple[int, ...]
    phase: str
    step: int


def due(
    plan: FaultPlan,
    now_s: float,
    *,
    fresh: Mapping[str, Sequence[Event]],
    done: Sequence[Done],
    trainers: Sequence[str],
    running: Collection[str],
) -> list[Act]:
    """Returns what is to be done now. ``now_s``: seconds after all trainers were started. ``fresh``: every peer's
    events that no call has been given yet. ``running``: peers that have not ended. What is not done, or finds nobody to
    be done to, stays due."""
    plight = plights(done)
    acts = []
    for number, fault in enumerate(plan.fault):
        begun = [past for past in done if past.act.fault == number and not past.act.follows]
        if fault.peer == [RANDOM]:
            order = random.Random(f"{plan.seed} {number} {len(begun)}").sample(trainers, len(trainers))
            fit = [name for name in order if may_be_chosen(fault.action, plight.get(name), name in running)]
            names = [name for name in fit if is_time(fault, len(begun), now_s, fresh.get(name, ()))][:1]
        else:
            turns = {name: sum(past.act.peer == name for past in begun) for name in fault.peer}
            leading = fresh.get(fault.peer[0], ())
            names = [name for name, turn in turns.items() if is_time(fault, turn, now_s, leading)]
        acts += [act_of(fault, number, fault.action, name) for name in names]
        for past in begun:
            if fault.for_s is not None and now_s >= past.at_s + fault.for_s and not is_undone(past, done):
                acts.append(act_of(fault, number, OPPOSITE[fault.action], past.act.peer, follows=True))
    return acts


def act_of(fault: Fault, number: int, action: Action, peer: str, *, follows: bool = False) -> Act:
    """Returns an act of this fault, entry ``number`` of the file, on one peer."""
    island = f"island-{number}" if len(fault.peer) > 1 else ""
    return Act(fault=number, action=action, peer=peer, process=fault.process or "all", follows=follows, island=island)


def is_time(fault: Fault, turn: int, now_s: float, fresh: Sequence[Event]) -> bool:
    """Returns whether this fault is due. ``turn``: how often it has been done before. ``fresh``: events that are new
    since the last call."""
    if turn and fault.every_s is None:
        return False
    if fault.at_s is not None:
        return now_s >= fault.at_s + turn * (fault.every_s or 0.0)
    begun = (event.step for event in of_kind(fresh, PhaseBegan) if event.phase == fault.phase)
    return any(fault.outer_step in (None, step) for step in begun)


def may_be_chosen(action: Action, plight: str | None, running: bool) -> bool:
    """Returns whether it makes sense to do this to a peer of that plight."""
    return plight == ENDS_PLIGHT[action] if action in ENDS_PLIGHT else plight is None and running


def is_undone(past: Done, done: Sequence[Done]) -> bool:
    """Returns whether the opposite has followed; nor has it to where nothing was hit."""
    if past.act.action != "cut" and not past.pids:
        return True
    mine = [later for later in done if later.act.follows and later.at_s >= past.at_s]
    return any((later.act.fault, later.act.peer) == (past.act.fault, past.act.peer) for later in mine)


def plights(done: Sequence[Done]) -> dict[str, str]:
    """Returns the peers that are down because of a fault, and how. One that has lost its p2pd is not: it starts
    another."""
    plight: dict[str, str] = {}
    for past in done:
        act = past.act
        if act.action not in PLIGHT:
            plight.pop(act.peer, None)
        elif act.action != "kill" or act.process not in STARTED_AGAIN:
            plight[act.peer] = PLIGHT[act.action]
    return plight


def restarts_to_come(plan: FaultPlan, done: Sequence[Done]) -> bool:
    """Returns whether a peer that is killed now will be started again."""
    if PLIGHT["kill"] not in plights(done).values():
        return False
    for number, fault in enumerate(plan.fault):
        begun = [past for past in done if past.act.fault == number and not past.act.follows]
        if fault.action == "restart" and (fault.every_s is not None or len(begun) < len(fault.peer)):
            return True
        if fault.action == "kill" and fault.for_s is not None and not all(is_undone(past, done) for past in begun):
            return True
    return False


def waits_for_phase(plan: FaultPlan, done: Sequence[Done]) -> bool:
    """Returns whether a moment in an event log still has to be caught."""
    begun = {past.act.fault for past in done}
    return any(fault.phase is not None and number not in begun for number, fault in enumerate(plan.fault))
