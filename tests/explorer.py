"""A fault explorer: seeded random schedules of faults on whole swarms in memory, and what must be true after each.

    python -m tests.explorer --seeds 0:5000 --jobs 2      which seeds fail; exit code 1 when any does
    python -m tests.explorer --seed 123 --verbose         one of them, with what each peer did
    python -m tests.explorer --seed 123 --shrink          the smallest schedule that fails in the same way
    python -m tests.explorer --broken                     after how many schedules it finds protocols broken on purpose
    python -m tests.explorer --liars --seeds 0:200        for each kind of lie, which seeds fail, and how
    python -m tests.explorer --liars "two commits" --seed 3 --verbose       one of them

Peers, ledgers and protocol are the real ones; clock, links and DHT are ``fakes``. The invariants:

    same-bytes      the same head means the same theta and momentum, at every state that any peer ever stood at
    agreement       peers that can talk reach one head within AGREE_STEPS outer steps after the last fault, or, where
                    those are over sooner, within AGREE_S: outer steps are short here, and a time-out is not
    certified       nobody stands where no certificate leads: one that holds by the members that are known at the
                    update's own parent, as the updates before make them known, and by the owner where it has to witness
    one-outcome     no two updates of one round are certified, whoever can reach whom. Whoever leads a round in place of
                    others settles it as a member did that applied their commit, where the two could talk all the
                    time. Who has told such a leader that it has signed no commit signs none from those before it
    head-choice     nobody gives up what it has committed for less: the others must have most of the voters that it
                    knows, or more than it has, or as many on a newer head, or on one as new with the smaller digest
    counted-once    no inner step of any peer counts twice in the history that remains. Seen with fp32 only: what other
                    codecs round away cannot be told from what is missing
    never-lost      a committed outer step stays in the history while one peer that holds it lives. Where peers may take
                    living ones for dead (cut links, stopped processes), it may be given up for another's, and the log
                    says so. What takes its place was there before it was given up
    no-honest-barred    nobody holds a proof that an honest peer has signed two of what is signed once
    durable         what a peer has committed is on its disk when it is started again
    progress        while ``min_group`` trainers can reach each other, and enough of them are known or all of them reach
                    the run's owner, outer steps follow each other in bounded time
    waits-end       no outer step takes longer than the time-outs add up to; nothing is left behind by what is over;
                    nothing but a failing disk ends a peer; no exception is unheard

With liars among the peers (``liars``) all of these judge honest peers alone, and there are more (``witness``):

    same-bytes      also: the state at a head is what the updates that lead there make of S_0
    one-outcome     also: no two honest members of a round that could talk all the time take two updates of it
    no-invention    an honest peer that has taken part in a round, not as the only honest one, applies no update unless
                    each of its parts came out of a butterfly to an honest member of its round
    bounded         no part of an update is more than LARGEST_OVER_HONEST times as large as the largest honest
                    contribution to it, or that part of the update before
    astray          at most ASTRAY_STEPS updates of rounds with a liar go against honest peers: in some part, less than
                    LEAST_SHARE of what they contributed on average is left
    no-blame        no honest peer takes another honest peer for one that misbehaves
    pace            honest peers make at least LEAST_PACE of the outer steps that they make without the liars. More, and
                    that for inner phases of at least three times ``Timeouts.settle_s`` alone, is promised and judged by
                    ``benchmarks/liars.py``: phases are shorter here, and one wait takes several of them
    work            and in each of them at least LEAST_WORK of the inner steps

docs/reliability.md says which of them protocol 3 cannot hold against which lie. counted-once is not judged where liars
make values up.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from itertools import islice
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

from p2p_diloco.core.events import EVENTS_FILE
from tests.support.broken import SEEN_WITH_LIARS, VARIANTS
from tests.support.builders import identity
from tests.support.chronicle import MAX_PEERS, Violation
from tests.support.events import lines_of
from tests.support.instruments import instrumented
from tests.support.liars import KINDS
from tests.support.schedules import Schedule, at_home, draw, shrink
from tests.support.schedules_with_liars import draw_with_liars, without_liars
from tests.support.simloop import START_S, run_simulated
from tests.support.world import World

PROGRESS_EVERY = 100
BROKEN_WITHIN = 500
"""So many schedules at most find a broken protocol."""
BROKEN_SEEDS = 3
"""So many that do are named: which ones they are changes with every message that the protocol sends."""
LEAST_PACE = 0.5
"""Outer steps take some ten seconds here, and so do time-outs: a liar that is waited for once in a while costs much."""
LEAST_WORK = 0.7
SHARED_MEMORY = Path("/dev/shm")
FOLDER_OF_ALL = "P2P_DILOCO_EXPLORER_FOLDER"
"""Set in workers."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    schedule: Schedule
    invariant: str
    """The first that was violated; empty when all held."""
    text: str
    timeline: tuple[str, ...]
    fingerprint: str
    """Over everything that any peer logged: equal for equal runs."""
    outer_steps: int
    slowest_step_s: float
    """The longest call of ``outer_step``."""
    longest_stall_s: float
    """Between two outer steps of trainers that could reach each other."""
    agreed_s: float
    """From the last fault until all stood on one head."""
    honest_steps: int
    """Outer steps that honest peers had made when all that is planned was over."""
    stock_s: float
    """When that was."""
    inner_steps: float
    """Of one honest peer, in one of those outer steps."""

    @property
    def ok(self) -> bool:
        return not self.invariant


# -- running a schedule ----------------------------------------------------------------------------------------------


def explore(schedule: Schedule, *, keep_timeline: bool = False) -> Verdict:
    """Run a schedule on a SimLoop, and tell what was violated, if anything was."""
    with scratch_folder() as folder:
        world = World(schedule, Path(folder))
        violation: Violation | None = None
        try:
            with instrumented(world):
                run_simulated(world.run())
        except Violation as error:
            violation = error
        except AssertionError as error:
            violation = Violation("waits-end", str(error))
        return _verdict(world, world.violation or violation, keep_timeline)


def _is_plenty(verdict: Verdict) -> bool:
    """Whether honest peers did so much that they could not have done too much more without liars."""
    schedule = verdict.schedule
    fastest_s = schedule.inner_steps * min(plan.step_s for plan in schedule.peers if not plan.lie)
    steps_enough = verdict.honest_steps >= LEAST_PACE * verdict.stock_s / fastest_s
    return steps_enough and verdict.inner_steps >= LEAST_WORK * schedule.inner_steps


def _verdict(world: World, violation: Violation | None, keep_timeline: bool) -> Verdict:
    logs = [world.disks[i].folder / EVENTS_FILE for i in range(MAX_PEERS)]
    told = blake2b("\n".join(world.timeline).encode(), digest_size=8)
    for path in logs:
        told.update(path.read_bytes() if path.exists() else b"")
    return Verdict(
        schedule=world.schedule,
        invariant=violation.invariant if violation else "",
        text=str(violation or ""),
        timeline=tuple(timeline(world, logs)) if keep_timeline else (),
        fingerprint=told.hexdigest(),
        outer_steps=max((sim.peer.step for i, sim in world.sims.items() if i not in world.liars), default=0),
        slowest_step_s=world.slowest_step_s,
        longest_stall_s=world.longest_stall_s,
        agreed_s=world.agreed_s,
        honest_steps=world.honest_steps,
        stock_s=world.stock_s,
        inner_steps=world.inner_steps,
    )


def explore_with_liars(schedule: Schedule, *, keep_timeline: bool = False) -> Verdict:
    """Run a schedule with liars and, where that violates nothing, once more without them: they may not cost much."""
    verdict = explore(schedule, keep_timeline=keep_timeline)
    if not verdict.ok or not schedule.liars or _is_plenty(verdict):
        return verdict
    alone = explore(without_liars(schedule))
    if not alone.ok:
        return replace(verdict, invariant=alone.invariant, text=f"without liars: {alone.text}")
    for invariant, least, with_them, without in (
        ("pace", LEAST_PACE, verdict.honest_steps, alone.honest_steps),
        ("work", LEAST_WORK, verdict.inner_steps, min(alone.inner_steps, schedule.inner_steps)),
    ):
        if with_them < least * without:
            what = "outer steps" if invariant == "pace" else "inner steps in each of them"
            text = f"{invariant}: honest peers make {with_them:.3g} {what}, and {without:.3g} without the liars"
            return replace(verdict, invariant=invariant, text=text)
    return verdict


def timeline(world: World, logs: list[Path]) -> list[str]:
    """What was done to the peers, and what they did, in order."""
    names = {identity(i).peer_id: str(i) for i in range(MAX_PEERS)}
    lines = [(float(line[:8]), line) for line in world.timeline]
    for i, path in enumerate(logs):
        for event in lines_of(path) if path.exists() else ():
            at_s = event["mono_s"] - START_S
            shown = [
                f"{key}={_shown(value, names)}"
                for key, value in event.items()
                if key not in ("event", "wall_s", "mono_s")
            ]
            lines.append((at_s, f"{at_s:8.3f}  [{i}] {event['event']:<9} {' '.join(shown)}"))
    return [line for _, line in sorted(lines, key=lambda one: one[0])]


def _shown(value: Any, names: dict[str, str]) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, list):
        return "[" + ",".join(names.get(str(one), str(one)) for one in value) + "]"
    if isinstance(value, str) and len(value) == 64:
        return value[:8]
    return str(value)


# -- the command -----------------------------------------------------------------------------------------------------


def explore_seed(seed: int) -> Verdict:
    return explore(draw(seed))


def explore_at_home(seed: int) -> Verdict:
    return explore(at_home(draw(seed)))


def explore_lie(lie: tuple[str, int]) -> tuple[str, Verdict]:
    """``lie``: its kind, and a seed."""
    return lie[0], explore_with_liars(draw_with_liars(*lie))


def explore_lies(kinds: list[str], seeds: range, jobs: int) -> list[str]:
    """Says of each kind of lie how many of the schedules of ``seeds`` fail, and how. The kinds that have any."""
    failed: dict[str, list[Verdict]] = {kind: [] for kind in kinds}
    with workers(jobs) as pool:
        work = [(kind, seed) for kind in kinds for seed in seeds]
        for kind, verdict in pool.imap(explore_lie, work, chunksize=4):
            failed[kind] += [] if verdict.ok else [verdict]
            if verdict.schedule.seed == seeds[-1]:
                print(told_of_lie(kind, failed[kind], len(seeds)), flush=True)
    return [kind for kind, verdicts in failed.items() if verdicts]


def told_of_lie(kind: str, failed: list[Verdict], count: int) -> str:
    """One line: the invariants that were violated, the most frequent one first, each with its first schedule."""
    firsts: dict[str, list[int]] = {}
    for verdict in sorted(failed, key=lambda one: one.schedule.seed):
        firsts.setdefault(verdict.invariant, []).append(verdict.schedule.seed)
    ways = sorted(firsts.items(), key=lambda one: -len(one[1]))
    told = ", ".join(f"{invariant} {len(found)} (first {found[0]})" for invariant, found in ways)
    return f"{kind}: {len(failed)} of {count} schedules fail" + (f": {told}" if told else "")


def explore_many(seeds: range, jobs: int, one: Callable[[int], Verdict] = explore_seed) -> list[Verdict]:
    """Those of the schedules of ``seeds`` that failed. Says how far it is."""
    failed: list[Verdict] = []
    began_s = time.monotonic()
    with workers(jobs) as pool:
        for done, verdict in enumerate(pool.imap_unordered(one, seeds, chunksize=4), start=1):
            if not verdict.ok:
                failed.append(verdict)
                print(f"seed {verdict.schedule.seed}: {verdict.text}", flush=True)
            if done % PROGRESS_EVERY == 0 or done == len(seeds):
                each_s = (time.monotonic() - began_s) / done
                print(f"{done} of {len(seeds)} schedules, {len(failed)} failed, {each_s:.2f} s each", flush=True)
    return failed


def find_broken(jobs: int) -> list[str]:
    """Says which schedules find each protocol that is broken on purpose, the first BROKEN_SEEDS of them. Those that
    none finds."""
    missed = []
    for name in VARIANTS:
        with workers(jobs) as pool:  # the end of it is that of its queue
            found = (one for one in pool.imap(partial(explore_broken, name), range(BROKEN_WITHIN)) if one[1])
            sound = (one for one in found if explore(drawn_for(name, one[0])).ok)
            firsts = list(islice(sound, BROKEN_SEEDS))
        print(f"{name}: " + ("; ".join(f"seed {seed}: {text}" for seed, text in firsts) or "NOT FOUND"), flush=True)
        missed += [] if firsts else [name]
    return missed


def drawn_for(name: str, seed: int) -> Schedule:
    """What a protocol broken on purpose is tried by."""
    return draw_with_liars(SEEN_WITH_LIARS[name], seed) if name in SEEN_WITH_LIARS else draw(seed)


def explore_broken(name: str, seed: int) -> tuple[int, str]:
    with VARIANTS[name]():
        return seed, explore(drawn_for(name, seed)).text


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """In shared memory, where there is any; in a worker, inside the folder of all of them."""
    shared = str(SHARED_MEMORY) if SHARED_MEMORY.is_dir() else None
    return tempfile.TemporaryDirectory(prefix="p2p-diloco-", dir=os.environ.get(FOLDER_OF_ALL, shared))


@contextmanager
def workers(jobs: int) -> Iterator[Pool]:
    """Nothing is left of them, nor of the schedules that they are torn from."""
    with scratch_folder() as folder, multiprocessing.get_context("spawn").Pool(jobs, _begin, (folder,)) as pool:
        try:
            yield pool
        finally:
            pool.terminate()
            pool.join()


def _begin(folder: str) -> None:
    """What has been imported is never garbage: no collection need look through it again and again."""
    os.environ[FOLDER_OF_ALL] = folder
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 10, 10)


def explain(schedule: Schedule) -> Verdict:
    verdict = explore_with_liars(schedule, keep_timeline=True)
    print(*verdict.timeline, sep="\n")
    told = ", ".join(f"{plan.lie or plan.role} {plan.step_s:g} s" for plan in schedule.peers)
    print(f"\n{len(schedule.peers)} peers: {told}")
    print(*schedule.faults, sep="\n")
    print(
        f"{verdict.outer_steps} outer steps; slowest call of outer_step {verdict.slowest_step_s:.1f} s; longest stall "
        f"{verdict.longest_stall_s:.1f} s; agreed {verdict.agreed_s:.1f} s after the last fault; {verdict.fingerprint}"
    )
    print(verdict.text or "all invariants held")
    return verdict


def main() -> int:
    parser = argparse.ArgumentParser(description="Random schedules of faults on swarms in memory")
    parser.add_argument("--seeds", default="0:5000", help="FROM:TO")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, help="one schedule")
    parser.add_argument("--schedule", type=Path, help="one schedule, from a JSON file")
    parser.add_argument("--shrink", action="store_true", help="make it smaller as long as it fails in the same way")
    parser.add_argument("--broken", action="store_true", help="find protocols that are broken on purpose")
    parser.add_argument("--liars", nargs="*", metavar="KIND", choices=KINDS, help=f"with liars: {', '.join(KINDS)}")
    parser.add_argument("--homes", action="store_true", help="nobody but the owner's seed can be dialled")
    parser.add_argument("--verbose", action="store_true", help="tell what each peer did")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended
    if options.broken:
        return int(bool(find_broken(options.jobs)))
    first, last = map(int, options.seeds.split(":"))
    if options.seed is None and options.schedule is None and options.liars is not None:
        return int(bool(explore_lies(options.liars or list(KINDS), range(first, last), options.jobs)))
    if options.seed is None and options.schedule is None:
        failed = explore_many(range(first, last), options.jobs, explore_at_home if options.homes else explore_seed)
        print("failed:", *sorted(verdict.schedule.seed for verdict in failed))
        return int(bool(failed))
    if options.schedule:
        schedule = Schedule.from_json(options.schedule.read_text())
    else:
        schedule = draw_with_liars(options.liars[0], options.seed) if options.liars else draw(options.seed)
    schedule = at_home(schedule) if options.homes else schedule
    verdict = explore_with_liars(schedule)
    if options.shrink and not verdict.ok:
        schedule = shrink(schedule, lambda smaller: explore_with_liars(smaller).invariant == verdict.invariant)
        print(schedule.to_json())
    if options.verbose or options.shrink:
        explain(schedule)
    else:
        print(verdict.text or "all invariants held")
    return int(not verdict.ok)


if __name__ == "__main__":
    sys.exit(main())
