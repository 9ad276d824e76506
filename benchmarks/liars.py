"""What one liar of each kind costs a whole swarm in memory: honest outer steps, invented updates, honest peers blamed.

Peers and protocol are the real ones, clock, links and DHT those of the fault explorer (``tests/support``), and so are
the liars. Each lies from the beginning, and once more after some twenty outer steps in which it did what all do. No
bound fails this case yet.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from benchmarks.table import Cell, Table
from tests.support.chronicle import MAX_PEERS, Violation
from tests.support.instruments import instrumented
from tests.support.liars import GHOSTS, HISTORIES, IDLE, INVENTED_SNAPSHOT, SILENT
from tests.support.schedules import Fault, PeerPlan, Schedule
from tests.support.schedules_with_liars import without_liars
from tests.support.simloop import run_simulated
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
OUTER_S = INNER_STEPS * STEP_S + ROUND_S


@dataclass(frozen=True, kw_only=True)
class Case:
    """A kind of lie, the row of ``THREATS.md`` that it is, and how many tell it."""

    row: int
    kind: str
    liars: int = 1


CASES: tuple[Case, ...] = (
    Case(row=18, kind="flipped"),
    Case(row=18, kind="flipped, largest weight"),
    Case(row=18, kind="stale"),
    Case(row=19, kind="1e30"),
    Case(row=19, kind="x100"),
    Case(row=20, kind="mean x-10"),
    Case(row=20, kind="zeros for a mean"),
    Case(row=20, kind="two means"),
    Case(row=21, kind="invented parts"),
    Case(row=21, kind="two commits"),
    Case(row=21, kind="two rosters"),
    Case(row=21, kind="A-Again-B"),
    Case(row=22, kind="extends alone"),
    Case(row=23, kind=GHOSTS, liars=2),
    Case(row=24, kind=INVENTED_SNAPSHOT, liars=6),
    Case(row=25, kind=SILENT, liars=5),
    Case(row=25, kind=SILENT, liars=50),
    Case(row=26, kind=IDLE, liars=8),
    Case(row=27, kind="slow readers"),
    Case(row=29, kind="claimed speed"),
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
        )


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
        inner_steps=INNER_STEPS,
        snapshot_every=2,
        lasts_s=OUTER_STEPS * OUTER_S,
    )


@cache
def play(schedule: Schedule) -> Figures:
    """Plays a schedule. Most kinds of liars are compared with the same swarm without them, which is played once."""
    with tempfile.TemporaryDirectory() as folder, np.errstate(all="ignore"):
        world = Onlooker(schedule, Path(folder))
        with instrumented(world):
            run_simulated(world.run())
        return world.figures()


def row_of(case: Case, *, known: bool) -> tuple[Cell, ...]:
    schedule = schedule_of(case, known=known)
    lied_to, alone = play(schedule), play(without_liars(schedule))
    joined: Cell = "" if not any(fault.kind == "join" for fault in schedule.faults) else "never"
    return (
        f"{case.kind}, {case.liars}" if case.liars > 1 else case.kind,
        case.row,
        "known" if known else "new",
        lied_to.steps,
        alone.steps,
        lied_to.inner_steps,
        lied_to.invented,
        lied_to.blamed,
        joined if lied_to.joined_s is None else lied_to.joined_s,
        lied_to.violated,
    )


def table_of(rows: Sequence[tuple[Cell, ...]]) -> Table:
    return Table(
        title=f"{HONEST} honest peers in memory for {OUTER_STEPS * OUTER_S:.0f} s, with liars and without",
        columns=("liar", "row", "as", "steps", "without", "inner", "invented", "blamed", "joined s", "violated"),
        rows=rows,
        notes=(
            f"steps, without: outer steps of honest rounds; inner: inner steps in each, of {INNER_STEPS} planned.",
            f"known: lies after {KNOWN_AFTER} outer steps. joined: a newcomer, {JOINS_AFTER} outer steps after that.",
            "invented: updates that honest peers applied, and no round of theirs made; blamed: honest peers, by such.",
            "violated: the first invariant of the explorer that was.",
        ),
    )


def main() -> Table:
    return table_of([row_of(case, known=known) for case in CASES for known in (False, True)])
