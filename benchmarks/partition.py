"""A swarm of four in two halves that do not reach each other, for some outer steps; then connected again.

Both halves go on alone. So there are two histories, of which one is given up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from benchmarks.histories import newest, rounds
from benchmarks.loopback import Log
from benchmarks.stage import Stage
from benchmarks.table import Table
from p2p_diloco.core.event import PeerCaughtUp, PeerStarted, latest, of_kind
from p2p_diloco.core.known import WINDOW_STEPS, known_at
from p2p_diloco.lab.faults import Fault
from p2p_diloco.lab.namespaces import Network

TRAINERS = 4
APART = 3
"""Outer steps."""
GIVEN_UP = "gave up {} outer steps that the swarm did not share"
"""In the log of a peer."""


@dataclass(frozen=True, kw_only=True)
class Healed:
    made: dict[str, int]
    """Peer -> outer steps that it went beyond the last common one while apart, whether it made or fetched them."""
    given_up: dict[str, int]
    """Peer -> outer steps that it rolled back; those between the healing and its noticing are among them."""
    seconds: float
    """From the healing until all had made an outer step together."""


def part_and_heal(stage: Stage) -> Healed:
    """RuntimeError when two histories stay, or none is given up."""
    stage.wait_until_calm()
    logs, island = stage.logs, list(stage.logs)[TRAINERS // 2 :]
    stage.wait_until(lambda: all_known(logs) or None, "all are known")  # newcomers alone would wait for the owner
    stage.plan(Fault(action="cut", at_s=0.0, peer=island))
    parted = stage.wait_until(lambda: stage.done, "two are cut off together")[-1]

    def made_apart() -> dict[str, int] | None:
        """None until it is enough."""
        common = last_common(logs, island)
        made = {name: newest(log) - common for name, log in logs.items()}
        return made if min(made.values()) >= APART else None

    made = stage.wait_until(made_apart, "both halves go on alone")
    stage.plan(Fault(action="restore", at_s=0.0, peer=island))
    healed = stage.wait_until(lambda: stage.done, "they are connected again")[-1]
    stage.wait_until_calm(healed.mono_s)
    together_s = min(rounds(log)[-1].mono_s for log in logs.values())
    stage.check_heads(together_s)  # before that, rounds of one half may have been under way
    given_up: Counter[str] = Counter()
    for name, log in logs.items():
        for event in of_kind(log, PeerCaughtUp):
            if not event.rolled_back or event.mono_s < parted.mono_s:
                continue
            given_up[name] += event.rolled_back
            if GIVEN_UP.format(event.rolled_back) not in stage.children.named(name).output:
                raise stage.failure(f"{name} gave up {event.rolled_back} outer steps without a word in its log")
    if not given_up:
        raise stage.failure("nothing was given up: were the halves apart?")
    return Healed(made=made, given_up=dict(given_up), seconds=together_s - healed.mono_s)


def all_known(logs: Mapping[str, Log]) -> bool:
    """Returns whether each of these peers is known by the rounds that their logs tell of."""
    groups = {event.step: event.group for log in logs.values() for event in rounds(log)}
    newest = max(groups, default=0)
    last = [groups.get(step, ()) for step in range(max(newest - WINDOW_STEPS, 0) + 1, newest + 1)]
    started = (latest(log, PeerStarted) for log in logs.values())
    return {event.peer_id for event in started if event is not None} <= known_at(newest, last).peers


def last_common(logs: Mapping[str, Log], island: Collection[str]) -> int:
    """The newest outer step of which both halves have the same head: one that was under way when they were cut apart
    may have reached both."""
    inside: dict[int, str] = {}
    outside: dict[int, str] = {}
    for name, log in logs.items():
        (inside if name in island else outside).update((event.step, event.head) for event in rounds(log))
    return max(inside.items() & outside.items())[0]


def main() -> Table:
    with Stage(TRAINERS, places=Network()) as stage:
        healed = part_and_heal(stage)
    return Table(
        title=f"A swarm of {TRAINERS} in two halves; one head {healed.seconds:.1f} s after they were connected again",
        columns=("peer", "outer steps while apart", "given up"),
        rows=[(name, made, healed.given_up.get(name, 0)) for name, made in healed.made.items()],
        notes=(
            "given up: all that the half which went over had made since the last common outer step, those that it made",
            "after the healing and before it noticed, too.",
        ),
    )
