"""How long training stands still for an outer step: the demo's model, four peers."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median

from benchmarks import tiny
from benchmarks.loopback import Log, Run
from benchmarks.table import Cell, Table

PHASES = ("gather_s", "reduce_s", "settle_s", "apply_s")
COLUMNS = ("outer steps", "stalls", "median s", "max s", "gather", "reduce", "settle", "apply", "rest")


def main() -> Table:
    return Table(
        title=f"Stall per outer step: the demo's model, {tiny.PEERS} peers, {tiny.DEMO.inner.steps} inner steps",
        columns=COLUMNS,
        rows=stall_rows(tiny.swarm_run()),
        notes=STALL_NOTES,
    )


STALL_NOTES = (
    "From the end of a peer's last inner step to the start of its next, evaluation excluded.",
    "gather to rest: medians of its parts, in seconds; gather is above all waiting for slower peers.",
)


def stall_rows(run: Run) -> list[tuple[Cell, ...]]:
    """All outer steps, and those without the first: peers start training at different times."""
    stalls = [stall for log in run.logs for stall in stalls_of(log)]
    later = [stall for stall in stalls if stall["step"] > 1]
    return [stall_row("all", stalls), stall_row("all but the first", later)]


def stalls_of(log: Log) -> list[dict[str, float]]:
    """Every stall with its parts; a stall may hold several rounds."""
    stalls, parts = [], dict.fromkeys(PHASES, 0.0)
    for event in log:
        if event["event"] == "round":
            parts = {phase: parts[phase] + event[phase] for phase in PHASES}
        elif event["event"] == "stall":
            rest_s = event["seconds"] - sum(parts.values())
            stalls.append({"step": event["step"], "seconds": event["seconds"], **parts, "rest_s": rest_s})
            parts = dict.fromkeys(PHASES, 0.0)
    return stalls


def stall_row(name: str, stalls: list[dict[str, float]]) -> tuple[Cell, ...]:
    def of(field: str) -> Iterable[float]:
        return (stall[field] for stall in stalls)

    return (
        name,
        len(stalls),
        median(of("seconds")),
        max(of("seconds")),
        *(median(of(phase)) for phase in (*PHASES, "rest_s")),
    )
