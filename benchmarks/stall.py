"""How long training stands still for an outer step: the demo's model, four peers."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from benchmarks import tiny
from benchmarks.loopback import Log, Run
from benchmarks.table import Cell, Table
from p2p_diloco.core.event import RoundEnded, TrainerStalled

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


@dataclass(frozen=True, kw_only=True)
class StallParts:
    """A stall, and what it was made of."""

    step: int
    seconds: float
    gather_s: float
    """Of all rounds in it; so the three below."""
    reduce_s: float
    settle_s: float
    apply_s: float

    @property
    def rest_s(self) -> float:
        return self.seconds - (self.gather_s + self.reduce_s + self.settle_s + self.apply_s)


def stall_rows(run: Run) -> list[tuple[Cell, ...]]:
    """All outer steps, and those without the first: peers start training at different times."""
    stalls = [stall for log in run.logs for stall in stalls_of(log)]
    later = [stall for stall in stalls if stall.step > 1]
    return [stall_row("all", stalls), stall_row("all but the first", later)]


def stalls_of(log: Log) -> list[StallParts]:
    """Every stall with its parts; a stall may hold several rounds."""
    stalls: list[StallParts] = []
    rounds: list[RoundEnded] = []
    for event in log:
        if isinstance(event, RoundEnded):
            rounds.append(event)
        elif isinstance(event, TrainerStalled):
            stall = StallParts(
                step=event.step,
                seconds=event.seconds,
                gather_s=sum(ended.gather_s for ended in rounds),
                reduce_s=sum(ended.reduce_s for ended in rounds),
                settle_s=sum(ended.settle_s for ended in rounds),
                apply_s=sum(ended.apply_s for ended in rounds),
            )
            stalls.append(stall)
            rounds = []
    return stalls


def stall_row(name: str, stalls: list[StallParts]) -> tuple[Cell, ...]:
    return (
        name,
        len(stalls),
        median(stall.seconds for stall in stalls),
        max(stall.seconds for stall in stalls),
        median(stall.gather_s for stall in stalls),
        median(stall.reduce_s for stall in stalls),
        median(stall.settle_s for stall in stalls),
        median(stall.apply_s for stall in stalls),
        median(stall.rest_s for stall in stalls),
    )
