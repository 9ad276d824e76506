"""What one liar of each kind costs a whole swarm in memory: honest outer steps, invented updates, honest peers blamed.

Peers and protocol are the real ones, clock, links and DHT those of the fault explorer (``tests/support``), and so are
the liars. Each lies from the beginning, and once more after some twenty outer steps in which it did what all do; the
run averages by the robust rule, as is the default. The case fails when honest peers make fewer outer steps than
LEAST_STEPS of those that they make without the liars, or fewer inner steps in each, apply an update that was invented,
or blame one another. What a lie costs in held-out loss is measured with a language model, by ``benchmarks/hostile.py``.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.table import Cell, Table
from p2p_diloco.core.event import RoundEnded, of_kind
from p2p_diloco.core.events import EVENTS_FILE, read_events
from tests.explorer import workers
from tests.support.builders import identity
from tests.support.chronicle import MAX_PEERS, Violation
from tests.support.instruments import instrumented
from tests.support.liars import GHOSTS, HISTORIES, HURRIES, IDLE, INVENTED_SNAPSHOT, SILENT
from tests.support.schedules import Fault, PeerPlan, Schedule
from tests.support.schedules_with_liars import without_liars
from tests.support.simloop import START_S, run_simulated
from tests.support.world import POLL_S, World

HONEST = 4
INNER_STEPS = 10
STEP_S = 3.0
"""Of an inner step: 30 s between two rounds, three times ``Timeouts.settle_s``."""
OUTER_STEPS = 50
ROUND_S = 1.0
"""About this long an outer step takes beside its inner steps."""
KNOWN_AFTER = 20
"""Outer steps."""
JOINS_AFTER = 4
"""A newcomer comes so many outer steps after the lying has begun, where there is room for one."""
INVENTS_EVERY_S = 10.0
"""Seconds for an outer step of a history that is invented."""
LEAST_STEPS = 0.9
"""Of the outer steps without the liars."""
LEAST_STEPS_OF_MANY = 0.8
"""The same with eight liars that are members: twice as many as there are honest peers."""
LEAST_INNER = 0.9
"""Of the inner steps in each of them."""
OUTER_S = INNER_STEPS * STEP_S + ROUND_S


@dataclass(frozen=True, kw_only=True)
class Case:
    """A kind of lie, the row of ``THREATS.md`` that it is, and how many tell it."""

    row: int
    kind: str
    liars: int = 1
    least_steps: float = LEAST_STEPS

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.liars}" if self.liars > 1 else self.kind


CASES: tuple[Case, ...] = (
    Case(row=18, kind="flipped"),
    Case(row=18, kind="flipped, largest weight"),
    Case(row=18, kind="stale"),
    Case(row=19, kind="1e30"),
    Case(row=19, kind="x100"),
    Case(row=20, kind="mean x-10"),
    Case(row=20, kind="zeros for a mean"),
    Case(row=20, kind="two means"),
    Case(row=20, kind="tells no other"),
    Case(row=21, kind="invented parts"),
    Case(row=21, kind="two commits"),
    Case(row=21, kind="two rosters"),
    Case(row=21, kind="A-Again-B"),
    Case(row=21, kind="decides nothing"),
    Case(row=22, kind="extends alone"),
    Case(row=23, kind=GHOSTS, liars=2),
    Case(row=24, kind=INVENTED_SNAPSHOT, liars=6),
    Case(row=25, kind=SILENT, liars=5),
    Case(row=25, kind=SILENT, liars=50),
    Case(row=26, kind=IDLE, liars=8, least_steps=LEAST_STEPS_OF_MANY),
    Case(row=27, kind="slow readers"),
    Case(row=29, kind="claimed speed"),
    Case(row=29, kind=HURRIES),
    Case(row=29, kind="Eta(86400)"),
    Case(row=29, kind="always busy"),
)
"""Not in memory: all slots for streams taken (row 27), and the directory's places (row 28)."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a swarm did in its time."""

    steps: int
    """Outer steps of honest peers."""
    inner_steps: float
    """Of one honest peer, in one of those."""
    invented: int
    """Updates that honest peers have applied, and that no round of theirs made."""
    blamed: int
    """Times that an honest peer took another one for one that misbehaves."""
    violated: str
    """The invariant that was violated first; empty where none was."""
    joined_s: float | None
    """How long the newcomer took; None where it was there at no time."""
    lost_after: int | None
    """Outer steps from the first lie until an honest peer lost a liar in a round; None where none ever did."""


class Onlooker(World):
    """A swarm that goes on for its time, whatever is violated."""

    def __init__(self, schedule: Schedule, folder: Path) -> None:
        super().__init__(schedule, folder)
        self.violated: Counter[str] = Counter()
        """In the order in which they were violated first."""
        self.joined_s: float | None = None

    def fail(self, violation: Violation) -> None:
        self.violated[violation.invariant] += 1

    async def _story(self, faults: asyncio.Future[list[None]]) -> None:
        joins = [fault for fault in self.schedule.faults if fault.kind == "join"]
        while not faults.done():
            await asyncio.sleep(POLL_S)
            if joins and self.joined_s is None and (sim := self.sims.get(joins[0].who)) and sim.head is not None:
                self.joined_s = self.now_s - joins[0].at_s
        faults.result()
        self._take_stock()
        self._end_liars()

    def figures(self) -> Figures:
        heads = {head for peer, came in self.chronicle.committed.items() for head in came}
        updates = [self.chronicle.updates[head] for head in heads]
        return Figures(
            steps=self.honest_steps,
            inner_steps=self.inner_steps,
            invented=sum(not self.witness.is_made(update) for update in updates) if self.liars else 0,
            blamed=self.violated["no-blame"],
            violated=next((name for name, count in self.violated.items() if count), ""),
            joined_s=self.joined_s,
            lost_after=self._lost_after(),
        )

    def _lost_after(self) -> int | None:
        lies_from_s = min((self.schedule.peers[liar].lies_from_s for liar in self.liars), default=0.0)
        ids, honest = {identity(liar).peer_id for liar in self.liars}, set(self.sims) - self.liars
        logs = [of_kind(read_events(self.disks[i].folder / EVENTS_FILE), RoundEnded) for i in honest]
        rounds = sorted((one for log in logs for one in log), key=lambda one: one.mono_s)
        rounds = [one for one in rounds if one.mono_s >= START_S + lies_from_s]
        lost = next((one for one in rounds if ids.intersection(one.lost)), None)
        return None if lost is None else lost.step - rounds[0].step


def schedule_of(case: Case, *, known: bool) -> Schedule:
    """``known``: the liar has taken part in KNOWN_AFTER outer steps."""
    lies_from_s = KNOWN_AFTER * OUTER_S if known else 0.0
    honest = [PeerPlan(step_s=STEP_S, starts_s=0.5 * i) for i in range(HONEST)]
    liar = PeerPlan(
        lie=case.kind,
        role="seed" if case.kind == INVENTED_SNAPSHOT else "trainer",
        step_s=INVENTS_EVERY_S if case.kind in HISTORIES else STEP_S,
        starts_s=lies_from_s if case.kind == SILENT else 2.0,
        lies_from_s=lies_from_s,
    )
    liars, faults, comes_s = [liar] * case.liars, list[Fault](), lies_from_s + JOINS_AFTER * OUTER_S
    if case.kind == GHOSTS:
        side = tuple(range(HONEST, HONEST + case.liars))
        apart_s = max(lies_from_s, JOINS_AFTER * OUTER_S)
        faults.append(Fault(kind="misled", at_s=0.0, side=side, for_s=apart_s, how="reset"))
        liars = [replace(liar, lies_from_s=0.0)] * case.liars
    if MAX_PEERS - case.liars > HONEST:
        honest.append(PeerPlan(step_s=STEP_S))
        faults.append(Fault(kind="join", at_s=comes_s, who=HONEST + case.liars))
    peers = (*honest[:HONEST], *liars, *honest[HONEST:])
    return Schedule(
        seed=1,
        peers=peers,
        faults=tuple(faults),
        aggregate="robust",
        inner_steps=INNER_STEPS,
        snapshot_every=2,
        lasts_s=OUTER_STEPS * OUTER_S,
    )


def play(schedule: Schedule) -> Figures:
    with tempfile.TemporaryDirectory() as folder, np.errstate(all="ignore"):
        world = Onlooker(schedule, Path(folder))
        with instrumented(world):
            run_simulated(world.run())
        return world.figures()


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A case, and the same swarm without its liars."""

    case: Case
    known: bool
    lied_to: Figures
    alone: Figures

    @property
    def told_as(self) -> str:
        return "known" if self.known else "new"

    @property
    def row(self) -> tuple[Cell, ...]:
        lied_to, schedule = self.lied_to, schedule_of(self.case, known=self.known)
        joined: Cell = "" if not any(fault.kind == "join" for fault in schedule.faults) else "never"
        return (
            self.case.name,
            self.case.row,
            self.told_as,
            lied_to.steps,
            self.alone.steps,
            lied_to.steps / max(self.alone.steps, 1),
            lied_to.inner_steps,
            lied_to.invented,
            lied_to.blamed,
            "never" if lied_to.lost_after is None else lied_to.lost_after,
            joined if lied_to.joined_s is None else lied_to.joined_s,
            lied_to.violated,
        )

    def missed(self) -> list[str]:
        """The bounds that it misses, each in words."""
        steps, without, least = self.lied_to.steps, self.alone.steps, self.case.least_steps
        who = f"{self.case.name}, {self.told_as}"
        missed = []
        if steps < least * without:
            missed.append(f"{who}: {steps} honest outer steps of {without}, fewer than {least:.0%}")
        if self.lied_to.inner_steps < LEAST_INNER * self.alone.inner_steps:
            made, planned = self.lied_to.inner_steps, self.alone.inner_steps
            missed.append(f"{who}: {made:.1f} inner steps in each of {planned:.1f}, fewer than {LEAST_INNER:.0%}")
        if self.lied_to.invented:
            missed.append(f"{who}: {self.lied_to.invented} invented updates applied by honest peers")
        if self.lied_to.blamed:
            missed.append(f"{who}: honest peers blamed {self.lied_to.blamed} times")
        return missed


def compare(cases: Sequence[Case], jobs: int) -> list[Compared]:
    """Plays all cases, as newcomers and known. Most are compared with the same swarm, which is played once."""
    asked = [(case, known, schedule_of(case, known=known)) for case in cases for known in (False, True)]
    schedules = list(dict.fromkeys(one for _, _, lied_to in asked for one in (lied_to, without_liars(lied_to))))
    with workers(jobs) as pool:
        figures = dict(zip(schedules, pool.map(play, schedules, chunksize=1)))
    return [
        Compared(case=case, known=known, lied_to=figures[lied_to], alone=figures[without_liars(lied_to)])
        for case, known, lied_to in asked
    ]


def table_of(compared: Sequence[Compared]) -> Table:
    return Table(
        title=f"{HONEST} honest peers in memory for {OUTER_STEPS * OUTER_S:.0f} s, with liars and without",
        columns=(
            *("liar", "row", "as", "steps", "without", "share", "inner", "invented", "blamed", "lost after"),
            *("joined s", "violated"),
        ),
        rows=[one.row for one in compared],
        notes=(
            f"steps, without: outer steps of honest rounds; inner: inner steps in each, of {INNER_STEPS} planned.",
            f"known: lies after {KNOWN_AFTER} outer steps. joined: a newcomer, {JOINS_AFTER} outer steps after that.",
            "invented: updates that honest peers applied, and no round of theirs made; blamed: honest peers, by such.",
            "lost after: outer steps from the first lie until an honest peer lost a liar in a round.",
            "violated: the first invariant of the explorer that was.",
            f"bounds: share {LEAST_STEPS:.0%}, of eight members {LEAST_STEPS_OF_MANY:.0%}; invented 0; blamed 0;",
            f"inner {LEAST_INNER:.0%} of those without the liars.",
        ),
        missed=[bound for one in compared for bound in one.missed()],
    )


def main() -> Table:
    return table_of(compare(CASES, jobs=os.cpu_count() or 1))
