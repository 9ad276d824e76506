"""Every fault in every phase of a peer, on a running swarm: ``python -m benchmarks.matrix [--cases PATTERN]``.

A case is a phase, one process of a peer, or its cable, and what happens to that: killed, stopped, pulled. A swarm of
four takes them one after another, with another victim each time. In every case

    the three others make that outer step or the next one, within what the time-outs of a round add up to
    every outer step has one head, on all
    the victim, started again, resumed or connected again, is on the swarm's head within two outer steps

or the case fails. Where the fault came too late for its phase, the case is tried again.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.histories import began, first, first_commit, first_stall, missed_rounds, on_head, rounds, swarm_step
from benchmarks.loopback import Log
from benchmarks.stage import Stage
from benchmarks.table import Cell, Table, markdown
from p2p_diloco.core.event import DaemonRestarted, PeerJoined
from p2p_diloco.lab import namespaces
from p2p_diloco.lab.faults import RANDOM, Action, Done, Fault, FaultPhase, ProcessName
from p2p_diloco.lab.namespaces import Network

PHASES: tuple[FaultPhase, ...] = ("inner", "gather", "reduce", "settle", "apply", "snapshot", "download", "serve")
PROCESSES: tuple[ProcessName, ...] = ("trainer", "network", "p2pd")
WITHOUT_END = ("snapshot", "download", "serve")
"""They end without a word, and beside others."""
LATE_S = 0.1
"""A fault that comes later than this may have missed them."""
TRAINERS = 4
DOWN_S = 8.0
"""Of who is stopped or cut off: longer than the others wait for it."""
JOINER_DOWN_S = 4.0
"""Of a joiner: shorter than it waits for others where nothing has come yet, after which it gives up with an error."""
DEAD_S = 1.0
"""From the death of a peer until it is started again, if nothing is left of it by then."""
TRIES = 4
BACK_WITHIN = 2
"""Outer steps."""
MOST_MISSED = 1
"""Rounds: that outer step is made, or the next one."""
WAIT_S = 120.0
"""For each of the waits of a case, on a machine that does other things, too."""


@dataclass(frozen=True)
class Case:
    phase: FaultPhase
    action: Action
    process: ProcessName | None = None
    """None for the cable."""

    def __str__(self) -> str:
        return f"{self.phase}-{self.action}-{self.process or 'cable'}"

    def fault(self, victim: str, down_s: float) -> Fault:
        if self.action != "kill":
            for_s: float | None = min(down_s, JOINER_DOWN_S) if self.phase == "download" else down_s
        else:
            for_s = DEAD_S if self.process != "p2pd" else None
        return Fault(action=self.action, phase=self.phase, peer=[victim], process=self.process, for_s=for_s)


KILLS_AND_STOPS: tuple[Action, ...] = ("kill", "stop")
ALL_CASES = [
    case
    for phase in PHASES
    for case in (
        *(Case(phase, action, process) for process in PROCESSES for action in KILLS_AND_STOPS),
        Case(phase, "cut"),
    )
]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    case: Case
    victim: str
    late_s: float
    """From the beginning of the phase to the fault."""
    hit: bool
    """The victim was still in that phase."""
    commit_s: float
    """From the fault until the last of the others had committed an outer step."""
    missed: int
    """Rounds that one of them tried in vain before."""
    stall_s: float
    """Median over the others."""
    worst_s: float
    """The largest of theirs."""
    calm_s: float
    """The same, one outer step before the fault."""
    back_s: float
    """From when the victim could do something again until it was on the swarm's head."""
    back_steps: int
    """Outer steps that the swarm made meanwhile."""


@dataclass(frozen=True)
class Failure:
    case: Case
    why: str


# -- one case ----------------------------------------------------------------------------------------------------------


def run_case(stage: Stage, case: Case, number: int, *, down_s: float = DOWN_S) -> Outcome:
    """``number``: chooses the victim. RuntimeError where a promise is broken."""
    for attempt in range(TRIES):
        victim = f"peer-{1 + (number + attempt) % TRAINERS}"
        outcome = try_case(stage, case, victim, f"joiner-{number}-{attempt}", down_s)
        if outcome.hit:
            break
    else:
        raise stage.failure(f"{case}: too late for its phase {TRIES} times")
    if outcome.worst_s > stage.patience_s:
        raise stage.failure(f"{case}: the others stood still for {outcome.worst_s:.1f} s")
    if outcome.missed > MOST_MISSED:
        raise stage.failure(f"{case}: the others missed {outcome.missed} rounds")
    if outcome.back_steps > BACK_WITHIN:
        raise stage.failure(f"{case}: the victim was back after {outcome.back_steps} outer steps")
    return outcome


def try_case(stage: Stage, case: Case, victim: str, joiner_name: str, down_s: float) -> Outcome:
    calm_s = stage.wait_until_calm()
    regulars = list(stage.logs)
    joiner = stage.join(joiner_name) if case.phase in ("download", "serve") else None
    if case.phase == "serve":  # to the joiner: seeds are served all the time
        stage.wait_until(lambda: joiner is None or joiner.address, f"{case}: the joiner starts", limit_s=WAIT_S)
    stage.plan(case.fault({"download": joiner_name, "serve": RANDOM}.get(case.phase, victim), down_s))
    fault = stage.wait_until(lambda: next(iter(stage.done), None), f"{case}: the phase came", limit_s=WAIT_S)

    others = [stage.logs[name] for name in regulars if name != fault.act.peer]
    log = stage.logs[fault.act.peer]
    step = fault.step if joiner is None else swarm_step(others, fault.mono_s)
    stage.wait_until(
        lambda: all(first_stall(other, step) for other in others), f"{case}: the others go on", limit_s=WAIT_S
    )
    able_s = stage.wait_until(lambda: able_since(stage.done, log), f"{case}: the victim can act", limit_s=WAIT_S)
    back = stage.wait_until(lambda: on_head(log, others, able_s, step), f"{case}: the victim is back", limit_s=WAIT_S)
    if joiner is not None:
        stage.wait_until(lambda: rounds(joiner.tail.log), f"{case}: the joiner takes part", limit_s=WAIT_S)
        stage.leave(joiner)
    stage.check_heads()
    began_s = began(log, case.phase, fault.mono_s)
    commits = [first_commit(other, step) for other in others]
    stalls = [first_stall(other, step) or 0.0 for other in others]
    return Outcome(
        case=case,
        victim=fault.act.peer,
        late_s=fault.mono_s - began_s,
        hit=fault.mono_s - began_s < LATE_S if case.phase in WITHOUT_END else fault.phase == case.phase,
        commit_s=max(0.0, *(commit.mono_s - fault.mono_s for commit in commits if commit)),
        missed=max(missed_rounds(other, fault.mono_s, step) for other in others),
        stall_s=median(stalls),
        worst_s=max(stalls),
        calm_s=calm_s,
        back_s=back.mono_s - able_s,
        back_steps=swarm_step(others, back.mono_s) - swarm_step(others, able_s),
    )


def able_since(done: Sequence[Done], log: Log) -> float | None:
    """When the victim was there again: resumed, connected, started again and joined, its p2pd started again."""
    fault, *opposite = done
    if (fault.act.action, fault.act.process) == ("kill", "p2pd"):
        restarted = first(log, DaemonRestarted, fault.mono_s)
        return restarted.mono_s if restarted else None
    if not opposite or fault.act.action != "kill":
        return opposite[0].mono_s if opposite else None
    joined = first(log, PeerJoined, opposite[0].mono_s)
    return joined.mono_s if joined else None


# -- all of them -------------------------------------------------------------------------------------------------------


def run_cases(cases: Sequence[Case]) -> Iterator[Outcome | Failure]:
    """In one swarm; after a case that failed, in another one. RuntimeError if a swarm does not even start."""
    cables, left = namespaces.why_not() is None, deque(enumerate(cases))
    while left:
        with Stage(TRAINERS, places=Network() if cables else None) as stage:
            while left:
                number, case = left.popleft()
                try:
                    if case.process is None and not cables:
                        yield Failure(case, "not run: no network namespaces here")
                    else:
                        yield run_case(stage, case, number)
                except RuntimeError as error:
                    yield Failure(case, str(error))
                    break


def table_of(results: Iterable[Outcome | Failure]) -> Table:
    return Table(
        title=f"A fault in a swarm of {TRAINERS} and a seed, time-outs a fifth of the usual",
        columns=(
            "phase",
            "of",
            "fault",
            "after ms",
            "committed s",
            "missed",
            "stall s",
            "worst s",
            "calm s",
            "back s",
            "back steps",
        ),
        rows=[row_of(result) for result in results],
        notes=(
            "after: from the beginning of the phase to the fault. committed: from the fault until the last of the",
            "three others had committed an outer step; missed: rounds that one of them tried in vain before. stall:",
            "the median of theirs; worst: the largest; calm: the median one outer step before. back: from when the",
            "victim can act again until it is on the swarm's head, in seconds and in outer steps that the swarm made",
            "meanwhile.",
        ),
    )


def row_of(result: Outcome | Failure) -> tuple[Cell, ...]:
    print(result, file=sys.stderr, flush=True)
    case = result.case
    name = (case.phase, case.process or "cable", case.action)
    if isinstance(result, Failure):
        return (*name, f"FAILED: {result.why}", *([""] * 7))
    times = (result.stall_s, result.worst_s, result.calm_s, result.back_s, result.back_steps)
    return (*name, round(1000 * result.late_s), result.commit_s, result.missed, *times)


def main() -> Table:
    return table_of(run_cases(ALL_CASES))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.matrix", description=f"{len(ALL_CASES)} cases.")
    parser.add_argument("--cases", default="", metavar="PATTERN", help="those whose name it matches: reduce|kill-p2pd")
    pattern = parser.parse_args().cases
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended
    print(markdown(table_of(run_cases([case for case in ALL_CASES if re.search(pattern, str(case))]))))
