"""Newcomers that download the same snapshot at once, from one seed and from each other: ``python -m benchmarks
newcomers``.

25 million parameters, in an internet of namespaces; everybody has a line of 100 Mbit/s in each direction. The newcomers
mirror the run, so that nothing is computed beside the download.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import TypeVar

from benchmarks.homes import Places, run_made
from benchmarks.internet import Internet, why_no_internet
from benchmarks.loopback import Log, write_run_file
from benchmarks.situations import FAST, FAST_MBIT, Homes, hosts
from benchmarks.stage import POLL_S, SPEC, write_texts
from benchmarks.table import Cell, Table
from p2p_diloco.core.event import PeerCaughtUp, PeerJoined, PhaseBegan, latest, of_kind
from p2p_diloco.core.runfile import ModelSpec
from p2p_diloco.lab.child import Child
from p2p_diloco.lab.children import SEED, Children, names_of

T = TypeVar("T")
AT_ONCE = (1, 4)
LIMIT_S = 300.0
"""For the newcomers of one swarm to join."""
MOST_LONGER = 1.5
"""Four at once, over one."""
RUN = SPEC.model_copy(
    update={
        "name": "newcomers",
        "model": ModelSpec(
            config={
                "model_type": "llama",
                "hidden_size": 512,
                "intermediate_size": 1408,
                "num_hidden_layers": 8,
                "num_attention_heads": 8,
                "max_position_embeddings": 8,
                "tie_word_embeddings": True,
            }
        ),
    }
)


class Mirrors:
    """A seed in an internet of its own, and newcomers that mirror it. RuntimeError when one does not start."""

    def __init__(self, children: Children, homes: Homes) -> None:
        self.children, self.homes = children, homes

    def wait_until(self, condition: Callable[[], T | None], what: str) -> T:
        """Its first value that is true."""
        deadline_s = time.monotonic() + LIMIT_S
        while not (value := condition()):
            for child in self.children.all:
                child.tail.read()
                if not child.running:
                    raise RuntimeError(f"{child.name} ended: {child.last_line()}")
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"not within {LIMIT_S:.0f} s: {what}")
            time.sleep(POLL_S)
        return value

    def join(self, names: Sequence[str]) -> list[Log]:
        """The logs of newcomers that start at once, once all have joined."""
        self.children.start_seed()
        address = self.wait_until(self.children.seed_address, "the seed started")
        self.wait_until(lambda: latest(self.children.named(SEED).tail.log, PeerJoined), "the seed serves")
        for name in names:
            home = self.homes[name]
            child = Child(name, self.children.folder / name, options=home.options, enter=home.enter)
            self.children.trainers.append(child)
            child.start("-m", "p2p_diloco", SEED, "--initial-peers", address)
        logs = [child.tail.log for child in self.children.trainers]
        self.wait_until(lambda: all(latest(log, PeerJoined) for log in logs), "all have joined")
        return logs


def join_together(made: Path, newcomers: int) -> list[Log]:
    """The logs of so many newcomers. ``made``: a seed's folder."""
    names = names_of(newcomers)[1:]
    with Internet() as internet, tempfile.TemporaryDirectory(prefix="newcomers-") as folder_name:
        folder, homes = Path(folder_name), hosts(internet, (SEED, *names), FAST)
        write_texts(folder / "text")
        shutil.copytree(made, folder / SEED)
        with Children(write_run_file(RUN, folder), RUN, folder, places=Places(homes)) as children:
            return Mirrors(children, homes).join(names)


def download_s(log: Log) -> float:
    """From a newcomer's download to when it has joined."""
    joined = latest(log, PeerJoined)
    assert joined is not None
    return joined.mono_s - next(event.mono_s for event in of_kind(log, PhaseBegan) if event.phase == "download")


def served_by(log: Log) -> int:
    """How many peers a newcomer's snapshot and updates came from."""
    return sum(event.donors for event in of_kind(log, PeerCaughtUp))


def row_of(logs: Sequence[Log], alone_s: float) -> tuple[Cell, ...]:
    """``alone_s``: of a newcomer that was alone."""
    took_s = [download_s(log) for log in logs]
    return (len(logs), median(took_s), max(took_s), max(took_s) / alone_s, median(map(served_by, logs)))


def table_of(swarms: Sequence[Sequence[Log]]) -> Table:
    """``swarms``: the logs of one newcomer, and those of several that came at once."""
    alone_s = download_s(swarms[0][0])
    longer = max(download_s(log) for log in swarms[-1]) / alone_s
    missed = f"{len(swarms[-1])} newcomers at once: download to joined takes {longer:.2f} times as long as for one; "
    return Table(
        title=f"Newcomers at once, 25M parameters, a seed, lines of {FAST_MBIT:g} Mbit/s: {longer:.2f} times as long",
        columns=("newcomers", "download to joined s", "last s", "x", "peers served"),
        rows=[row_of(logs, alone_s) for logs in swarms],
        notes=("Peers served: that chunks came from, the seed and other newcomers. x: one newcomer is 1.",),
        missed=[f"{missed}at most {MOST_LONGER:g} are asked"] if longer > MOST_LONGER else [],
    )


def main() -> Table:
    """RuntimeError where there can be no internet, or somebody does not join."""
    if (reason := why_no_internet()) is not None:
        raise RuntimeError(f"no internet on this machine: {reason}")
    with run_made(RUN) as made:
        return table_of([join_together(made, newcomers) for newcomers in AT_ONCE])
