"""Swarms of homes: behind routers, over slow lines, with addresses that change: ``python -m benchmarks homes``; some of
its situations with ``python -m benchmarks.homes --cases PATTERN``.

Four trainers that sleep instead of computing, 4 million parameters, the usual time-outs; a swarm for each situation, in
an internet of namespaces. What is asked of all of them, ``contributions`` says.
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.contributions import (
    Connections,
    Contributions,
    Evidence,
    Figures,
    bounds_told,
    contributions_of,
    figures_of,
    in_a_row,
    in_vain,
    made_since,
    missed_bounds,
    together_s,
)
from benchmarks.internet import Internet, why_no_internet
from benchmarks.loopback import write_run_file
from benchmarks.situations import LAST, METRICS_PORT, PEERS, REFERENCE, SITUATIONS, TRAINERS, Home, Situation
from benchmarks.stage import POLL_S, SPEC, Stage, write_texts
from benchmarks.table import Cell, Table, layout
from p2p_diloco.core.event import PeerJoined, latest
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.recent import LEAST_ROUNDS
from p2p_diloco.core.runfile import InnerSpec, RoundSpec, RunSpec
from p2p_diloco.lab.children import SEED
from p2p_diloco.learn.genesis import start_run
from p2p_diloco.ledger.folder import open_ledger, run_folder

INNER_STEPS = 40
"""2 s."""
UPDATES = 6
"""That are looked at in each situation."""
UPDATES_AROUND = 2 * (LEAST_ROUNDS + 1)
"""The same, where something happens after half of them: by then peers know how long rounds take here."""
GIVEN_UP_AFTER = 10
"""Outer steps of each trainer, if nothing has been committed by then."""
LIMIT_S = 22 * 60.0
"""Of all situations. Each has its share of what those before it have left."""
END_S = 15.0
"""For the processes of a swarm to end."""
ANSWER_S = 3.0
"""Of a trainer's metrics."""
ASK = f"""
import sys, urllib.request
with urllib.request.urlopen("http://127.0.0.1:{METRICS_PORT}/metrics", timeout={ANSWER_S}) as page:
    sys.stdout.write(page.read().decode())
"""
CONNECTIONS = re.compile(r'^p2p_diloco_connections\{kind="(\w+)"\} (\S+)$', re.MULTILINE)
RUN = SPEC.model_copy(
    update={
        "name": "homes",
        "inner": InnerSpec(steps=INNER_STEPS),
        "round": RoundSpec(snapshot_every=1000),  # so that the seed keeps all updates
    }
)


@dataclass(frozen=True, kw_only=True)
class Played:
    situation: Situation
    figures: Figures


class Places:
    """Homes in which peers run."""

    def __init__(self, homes: Mapping[str, Home]) -> None:
        self.homes = homes

    def add(self, name: str) -> Home:
        return self.homes[name]


# -- one situation -----------------------------------------------------------------------------------------------------


@contextmanager
def run_made(spec: RunSpec = RUN) -> Iterator[Path]:
    """The folder of a seed that has made the run. It takes longer than to start from there, which all swarms do."""
    with tempfile.TemporaryDirectory(prefix="homes-") as name:
        folder, seed = Path(name), Path(name) / SEED
        write_texts(folder / "text")
        start_run(write_run_file(spec, folder), seed, Identity.load_or_create(seed / "identity.key"))
        yield seed


def play(situation: Situation, seed: Path, limit_s: float, *, spec: RunSpec = RUN, updates: int = UPDATES) -> Figures:
    """What became of a swarm until it had made so many updates, or the time was over. ``seed``: of ``run_made``.
    RuntimeError where the seed does not start, or something is left behind."""
    until_s = time.monotonic() + limit_s - END_S
    with Internet() as internet:
        homes = situation.lay(internet)
        with Stage(TRAINERS, spec=spec, patience=1.0, places=nullcontext(Places(homes)), seed=seed) as stage:
            happened_s = watch(stage, situation, homes, updates, until_s)
            ended_s = time.monotonic()
            connections = {name: connections_of(homes[name]) for name in stage.logs}
            stage.children.close()
            for child in stage.children.all:
                child.tail.read()
            evidence = Evidence(
                logs={name: [event for event in log if event.mono_s <= ended_s] for name, log in stage.logs.items()},
                started_s={child.name: child.started_s for child in stage.children.trainers},
                ended_s=ended_s,
                updates=updates_of_seed(stage),
                connections=connections,
                happened_s=happened_s,
                vector_bytes=stage.children.manifest.grid.vector_bytes,
            )
    return figures_of(evidence)


def watch(stage: Stage, situation: Situation, homes: Mapping[str, Home], updates: int, until_s: float) -> float | None:
    """Waits for so many updates, or until then; less where nothing comes of it. When that came to pass which happens
    after half of the updates, if it did."""
    happened_s = None
    while time.monotonic() < until_s:
        for child in stage.children.all:
            child.tail.read()
        logs = list(stage.logs.values()) if all_have_begun(stage) else []
        made = made_since(logs, together_s(logs))
        if situation.happens is not None and happened_s is None and made >= updates // 2:
            happened_s = time.monotonic()
            situation.happens(homes)
        if made >= updates or in_vain(logs, together_s(logs)) >= GIVEN_UP_AFTER:
            break
        if not any(child.running for child in stage.children.trainers):
            break
        time.sleep(POLL_S)
    return happened_s


def all_have_begun(stage: Stage) -> bool:
    """Whether each trainer has joined, or has ended without."""
    return all(latest(child.log, PeerJoined) or not child.running for child in stage.children.trainers)


def connections_of(home: Home) -> Connections | None:
    """What the metrics of a trainer tell; None where it does not answer."""
    command = [*home.enter, sys.executable, "-I", "-c", ASK]
    try:
        page = subprocess.run(command, capture_output=True, text=True, check=True, timeout=4 * ANSWER_S).stdout
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return None
    told = {kind: int(float(number)) for kind, number in CONNECTIONS.findall(page)}
    return Connections(direct=told["direct"], relayed=told["relay"]) if told else None


def updates_of_seed(stage: Stage) -> dict[int, Contributions]:
    """Outer step -> who contributed to the update that ends it. The seed must have ended."""
    manifest = stage.children.manifest
    ledger = open_ledger(run_folder(stage.children.named(SEED).folder, manifest), manifest)
    updates = {step: ledger.update(step) for step in range(ledger.chain.end)}
    return {step: contributions_of(update) for step, update in updates.items() if update is not None}


# -- all of them -------------------------------------------------------------------------------------------------------


def play_all(situations: Sequence[Situation]) -> Iterator[Played]:
    """One after another, all within LIMIT_S."""
    until_s = time.monotonic() + LIMIT_S
    with run_made() as seed:
        for number, situation in enumerate(situations):
            limit_s = (until_s - time.monotonic()) / (len(situations) - number)
            updates = UPDATES if situation.happens is None else UPDATES_AROUND
            played = Played(situation=situation, figures=play(situation, seed, limit_s, updates=updates))
            told = (*row_of(played, None), *missed_bounds(situation, played.figures))
            print(*told, sep="; ", file=sys.stderr, flush=True)
            yield played


def row_of(played: Played, reference: Figures | None) -> tuple[Cell, ...]:
    """``reference``: of a swarm without NAT; None where there was none."""
    figures = played.figures
    joined = [seconds for seconds in figures.joined_s.values() if seconds is not None]
    stalls = [seconds for one in figures.stalls.values() for seconds in one]
    usual_s = None if reference is None else reference.stall_s
    return (
        played.situation.name,
        median(joined) if joined else "never",
        "never" if len(joined) < len(figures.joined_s) else max(joined),
        figures.updates,
        " ".join(f"{share:.0%}" for share in figures.shares.values()),
        "" if figures.stall_s is None else figures.stall_s,
        max(stalls, default=""),
        "" if figures.stall_s is None or usual_s is None else figures.stall_s / usual_s,
        in_a_row(list(figures.paths.values())),
    )


NOTES = (
    "joined: from the start of a trainer's process, median and the last one. updates: those in the seed's ledger that",
    "all could contribute to from their first inner step on. shares: of the parts of these updates, those that the",
    f"contributions of {PEERS[0]} to {LAST} are in. stall: median of all trainers', since all had joined; one that is",
    f"not over counts as far as it has come. x: {REFERENCE.name} is 1. path: how a trainer and the others are",
    "connected at the end; client: it lets nobody dial it.",
)


def table_of(all_played: Sequence[Played]) -> Table:
    reference = next((played.figures for played in all_played if played.situation is REFERENCE), None)
    return Table(
        title=f"Swarms of {TRAINERS} in an internet of homes: 4M parameters, {INNER_STEPS} inner steps of 50 ms, int8",
        columns=("situation", "joined s", "last s", "updates", "shares", "stall s", "longest s", "x", "path"),
        rows=[row_of(played, reference) for played in all_played],
        notes=(*NOTES, *bounds_told()),
        missed=[bound for played in all_played for bound in missed_bounds(played.situation, played.figures)],
    )


def main(pattern: str = "") -> Table:
    """RuntimeError where there can be no internet, or a swarm does not even start."""
    if (reason := why_no_internet()) is not None:
        raise RuntimeError(f"no internet on this machine: {reason}")
    return table_of(list(play_all([one for one in SITUATIONS if re.search(pattern, one.name)])))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.homes", description=f"{len(SITUATIONS)} situations.")
    parser.add_argument("--cases", default="", metavar="PATTERN", help="those whose name it matches: NAT|IPv6")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended
    table = main(arguments.cases)
    print(layout(table), *(f"missed: {bound}" for bound in table.missed), sep="\n")
    sys.exit(bool(table.missed))
