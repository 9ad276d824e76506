"""Many small peers, of which every some seconds one is killed for good and another one joins, for minutes:
``python -m benchmarks churn``; where the cores cannot start peers so often, ``python -m benchmarks.churn --every 60``.

Nothing may stand still for longer than the time-outs add up to, and nothing may grow: descriptors and memory of those
who stay, disk, processes left behind, shared memory.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from statistics import median, median_low
from typing import TypeAlias

from benchmarks.histories import rounds
from benchmarks.processes import Usage, usage_of
from benchmarks.stage import GONE_S, SPEC, Stage
from benchmarks.table import Table, markdown
from p2p_diloco.core.event import TrainerStalled, of_kind
from p2p_diloco.core.runfile import ModelSpec
from p2p_diloco.core.update import max_update_bytes
from p2p_diloco.lab.faults import RANDOM, Fault
from p2p_diloco.ledger.folder import folder_bytes
from p2p_diloco.ledger.snapshot import snapshot_bytes

TRAINERS = 16
MINUTES = 10.0
EVERY_S = 20.0
PATIENCE = 1.0
"""The usual time-outs: on two cores the starts leave so little to 16 peers that a short one ends before an answer."""
SAMPLE_EVERY_S = 5.0
SETTLING_S = 60.0
"""Of a life: what a process takes in this time is no growth. Who lives twice as long shows whether it grows."""
SPARE_MB = {"trainer": 16.0, "network": 16.0, "p2pd": 80.0}
"""What heaps go up and down by. Go collects p2pd's when it is five times what is in use."""
SPARE_DESCRIPTORS = 16
"""Streams that are open at the moment."""
SHARED_MEMORY = "/dev/shm"
Life: TypeAlias = list[tuple[float, Usage]]
"""Of a process, since its peer takes part: when, and what it held."""

SMALL = SPEC.model_copy(
    update={
        "name": "churn",
        "model": ModelSpec(
            config={
                "model_type": "llama",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "max_position_embeddings": 8,
            }
        ),
    }
)


@dataclass(frozen=True)
class Growth:
    """The most that a process of one kind has gained, from its settling to its end."""

    processes: int
    """Those that lived long enough to be looked at."""
    descriptors: int
    resident_mb: float


@dataclass(frozen=True, kw_only=True)
class Churned:
    killed: int
    outer_steps: int
    """That the swarm made."""
    stall_s: float
    """Median."""
    longest_stall_s: float
    longest_gap_s: float
    """Between two outer steps of the swarm."""
    growth: dict[str, Growth]
    """trainer, network, p2pd"""
    disk_bytes: int
    """The largest ledger."""
    shared_memory: int
    """Files in the system's shared memory, more than before."""


def churn(stage: Stage, *, seconds: float, every_s: float, settling_s: float) -> Churned:
    """RuntimeError when somebody fails, a history splits, or the swarm does not get together afterwards."""
    stage.wait_until_calm()
    shared_before, began_s = len(os.listdir(SHARED_MEMORY)), time.monotonic()
    stage.plan(Fault(action="kill", at_s=0.0, every_s=every_s, peer=[RANDOM]))
    trainers, fresh = len(stage.children.trainers), 0
    lives: dict[str, defaultdict[int, Life]] = {name: defaultdict(list) for name in SPARE_MB}
    while (now_s := time.monotonic()) < began_s + seconds:
        for child in stage.children.all:
            takes_part = child is stage.children.seed or rounds(child.tail.log)
            for name, pid in child.processes().items() if takes_part else ():
                if name in lives and (usage := usage_of(pid)):
                    lives[name][pid].append((now_s, usage))
        stage.wait_until(lambda: time.monotonic() > now_s + SAMPLE_EVERY_S, "time passes")
        while sum(not child.felled for child in stage.children.trainers) < trainers:
            fresh += 1
            stage.join(f"fresh-{fresh}")

    stage.plan()
    dead = [child for child in stage.children.trainers if child.felled]
    stage.wait_until(lambda: all(child.ended for child in dead), "nothing is left of the dead", limit_s=GONE_S)
    stage.wait_until_calm(time.monotonic())
    stage.check_heads()
    logs = stage.logs.values()
    stalls = [e.seconds for log in logs for e in of_kind(log, TrainerStalled) if e.mono_s > began_s]
    first: dict[int, float] = {}
    for event in (event for log in logs for event in rounds(log)):
        first[event.step] = min(event.mono_s, first.get(event.step, event.mono_s))
    during = sorted(mono_s for mono_s in first.values() if mono_s > began_s)
    for child in dead:
        stage.children.trainers.remove(child)
    return Churned(
        killed=len(dead),
        outer_steps=len(during),
        stall_s=median(stalls),
        longest_stall_s=max(stalls),
        longest_gap_s=max(after - before for before, after in pairwise(during)),
        growth={name: growth_of(of_kind.values(), settling_s) for name, of_kind in lives.items()},
        disk_bytes=max(folder_bytes(ledger) for ledger in stage.folder.glob("*/*/ledger")),
        shared_memory=len(os.listdir(SHARED_MEMORY)) - shared_before,
    )


def growth_of(lives: Iterable[Life], settling_s: float) -> Growth:
    """Between the first third and the last third of what follows the settling."""
    descriptors, resident_mb = [], []
    for life in lives:
        if life[-1][0] < life[0][0] + 2 * settling_s:
            continue
        settled = [usage for at_s, usage in life if at_s >= life[0][0] + settling_s]
        third = max(len(settled) // 3, 1)
        before, after = settled[:third], settled[-third:]
        descriptors.append(median_low(u.descriptors for u in after) - median_low(u.descriptors for u in before))
        resident_mb.append(median(u.resident_mb for u in after) - median(u.resident_mb for u in before))
    return Growth(len(descriptors), max(descriptors, default=0), max(resident_mb, default=0.0))


def figures(stage: Stage, result: Churned) -> list[tuple[str, float, float]]:
    """(what, figure, the most that it may be)"""
    values = stage.children.manifest.n_params
    ledger_bytes = 3 * snapshot_bytes(values) + (2 * stage.spec.round.snapshot_every + 1) * max_update_bytes(
        stage.children.manifest.grid
    )
    return [
        ("longest stall, s", result.longest_stall_s, stage.patience_s),
        ("longest time between two outer steps, s", result.longest_gap_s, 2 * stage.patience_s),
        *(
            (f"descriptors that a {name} gained", of.descriptors, SPARE_DESCRIPTORS)
            for name, of in result.growth.items()
        ),
        *((f"memory that a {name} gained, MB", of.resident_mb, SPARE_MB[name]) for name, of in result.growth.items()),
        ("largest ledger, MB", result.disk_bytes / 1e6, ledger_bytes / 1e6),
        ("files in shared memory, more than before", result.shared_memory, 0),
    ]


def main(every_s: float = EVERY_S) -> Table:
    with Stage(TRAINERS, spec=SMALL, patience=PATIENCE) as stage:
        result = churn(stage, seconds=60 * MINUTES, every_s=every_s, settling_s=SETTLING_S)
        measured = figures(stage, result)
        if any(figure > most for _, figure, most in measured):
            raise stage.failure(f"too much: {measured}")
    return Table(
        title=f"{TRAINERS} peers, every {every_s:.0f} s one killed and a new one joining, for {MINUTES:.0f} minutes",
        columns=("what", "figure", "limit"),
        rows=[
            ("peers killed, each replaced by a new one", result.killed, ""),
            ("outer steps made", result.outer_steps, ""),
            ("median stall, s", result.stall_s, ""),
            *measured,
            ("processes and files left behind", 0, 0),
        ],
        notes=(
            f"descriptors, memory: the most among {result.growth['trainer'].processes} peers that lived longer than "
            f"{2 * SETTLING_S:.0f} s, the first {SETTLING_S:.0f} s of each not counted.",
            "limits: what the time-outs add up to; the two snapshots that a ledger keeps, one that is being written,",
            "and the updates since; what streams and heaps go up and down by.",
        ),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.churn", description=__doc__)
    parser.add_argument("--every", type=float, default=EVERY_S, metavar="SECONDS", help="between two deaths")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended
    print(markdown(main(parser.parse_args().every)))
