"""All peers of a swarm, the seed too, killed with -9 at the same random moment and started again; again and again.

No committed outer step may be lost: the run goes on from the newest one that anybody had committed, with one head.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass

from benchmarks.histories import rounds
from benchmarks.stage import Stage
from benchmarks.table import Table
from p2p_diloco.lab.children import names_of
from p2p_diloco.lab.faults import Fault

TRAINERS = 4
MOMENTS = 20
WITHIN_S = 5.0
"""Moments lie up to so far behind an outer step of all: until well after the next one."""


@dataclass(frozen=True)
class Onslaught:
    phases: str
    """In which the trainers were."""
    committed: int
    """The newest outer step that any of them had committed."""
    seconds: float
    """From then until all had made the next one together."""


def kill_all(stage: Stage, generator: random.Random) -> Onslaught:
    """RuntimeError if anything is lost."""
    stage.wait_until_calm()
    names = names_of(len(stage.logs))
    stage.plan(Fault(action="kill", at_s=generator.uniform(0.0, WITHIN_S), peer=names, for_s=0.5))
    killed = stage.wait_until(lambda: stage.done[: len(names)], "all are killed")
    killed_s, phases = killed[-1].mono_s, ", ".join(done.phase for done in killed[1:])
    stage.wait_until(lambda: len(stage.done) == 2 * len(names), "all are started again")
    stage.wait_until_calm(killed_s)
    stage.check_heads()
    logs = stage.logs.values()
    committed = max(event.step for log in logs for event in rounds(log) if event.mono_s <= killed_s)
    after = [event for log in logs for event in rounds(log) if event.mono_s > killed_s]
    if min(event.step for event in after) <= committed:
        raise stage.failure(f"outer step {committed} was lost in {phases}")
    seconds = max(min(event.mono_s for event in rounds(log) if event.mono_s > killed_s) for log in logs)
    return Onslaught(phases, committed, seconds - killed_s)


def main() -> Table:
    generator, rows = random.Random(1), []
    with Stage(TRAINERS) as stage:
        for number in range(1, MOMENTS + 1):
            result = kill_all(stage, generator)
            print(number, result, file=sys.stderr, flush=True)
            rows.append((number, result.phases, result.committed, result.committed + 1, result.seconds))
    return Table(
        title=f"{TRAINERS} peers and their seed, killed with -9 at once at {MOMENTS} random moments, and started again",
        columns=("moment", "in", "newest committed", "first one after", "s until then"),
        rows=rows,
        notes=(
            "in: the phases of the four trainers. s: from the kill until all had made an outer step together again.",
        ),
    )
