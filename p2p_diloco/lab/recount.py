"""What a swarm did, from its event logs, so that a simulation can do it again and must come to the same heads.

Only what follows from the run file, the peers' names and the numbers of their inner steps can be done again: a peer
that missed a round which others made, or was restarted, has a past that the logs do not tell.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from p2p_diloco.core.errors import UsageError
from p2p_diloco.core.event import Event, OuterGradientOffered, PeerStarted, RoundEnded, of_kind
from p2p_diloco.core.events import EVENTS_FILE, read_events
from p2p_diloco.core.manifest import RunManifest
from p2p_diloco.ledger.folder import read_manifest


@dataclass(frozen=True, kw_only=True)
class Past:
    """Says what a swarm did, so that it can be done again. Outer steps are counted from 0; a head is where the swarm
    stood after so many."""

    names: tuple[str, ...]
    """Peer ids of all who were ever in a round."""
    inner_steps: Mapping[int, Mapping[str, tuple[int, ...]]]
    """Outer step -> peer id -> inner steps before it; several numbers where it offered its outer gradient several
    times, for nobody else was there yet, and trained on in between."""
    dropped: Mapping[int, frozenset[str]]
    """Outer step -> who contributed nothing to it."""
    heads: Mapping[int, str]


def past_of(folder: Path) -> tuple[RunManifest, Past]:
    """Returns manifest and past of a swarm that ``p2p-diloco swarm --folder FOLDER`` has left. UsageError when it
    cannot be done again."""
    logs = [list(read_events(path)) for path in sorted(folder.glob(f"*/*/{EVENTS_FILE}"))]
    manifests = sorted(folder.glob("*/*/manifest.json"))
    if not logs or not manifests:
        raise UsageError(f"{folder}: no swarm has run here; name the --folder of p2p-diloco swarm")
    manifest = read_manifest(manifests[0])
    return manifest, recount(logs, manifest, str(folder))


def recount(logs: Iterable[list[Event]], manifest: RunManifest, source: str) -> Past:
    """Returns the past that everybody's ``logs`` tell of. Pure. UsageError, which names ``source``, when it cannot be
    done again."""
    attempts: dict[int, dict[str, tuple[int, ...]]] = {}
    dropped: dict[int, frozenset[str]] = {}
    heads: dict[int, str] = {}
    members: dict[int, set[str]] = {}
    for log in logs:
        rounds = of_kind(log, RoundEnded)
        for event in rounds:
            if event.lost or not (event.committed or event.reason == "alone"):
                what = "lost somebody" if event.committed else f"failed ({event.reason})"
                raise UsageError(f"{source}: the round at outer step {event.step} {what}; that cannot be done again")
            if event.committed:
                step = event.step - 1
                members[step], dropped[step] = set(event.group), frozenset(event.dropped)
                heads[event.step] = event.head
        started = [event.peer_id for event in of_kind(log, PeerStarted)]
        if len(started) > 1 and rounds:
            raise UsageError(f"{source}: peer {started[0][-8:]} was restarted; that cannot be done again")
        if started:
            for step, steps in attempts_of(log, started[0], manifest).items():
                attempts.setdefault(step, {})[started[0]] = steps
    if not members:
        raise UsageError(f"{source}: its swarm has made no outer step")
    if sorted(members) != list(range(len(members))):
        raise UsageError(f"{source}: its logs do not tell of every outer step from the first one on")
    for step, there in members.items():
        if there != attempts.get(step, {}).keys():
            raise UsageError(f"{source}: not everybody who has a log here, or only they, made outer step {step + 1}")
    names = sorted(set.union(*members.values()))
    inner_steps = {step: attempts[step] for step in members}
    return Past(names=tuple(names), inner_steps=inner_steps, dropped=dropped, heads=heads)


def attempts_of(log: list[Event], peer_id: str, manifest: RunManifest) -> dict[int, tuple[int, ...]]:
    """Returns outer step -> inner steps before each of this peer's offers. An offer counts all tokens since theta was
    taken: of earlier offers, too, that came to nothing, or were dropped and kept."""
    keeps = manifest.spec.round.on_missed == "keep"
    found: dict[int, tuple[int, ...]] = {}
    carried, before = 0, None
    for event in log:
        if isinstance(event, OuterGradientOffered):
            step = event.step
            carried = carried if before == step or before is None else 0
            inner_steps = (event.tokens - carried) // manifest.spec.tokens_per_inner_step
            found[step] = (*found.get(step, ()), inner_steps)
            carried, before = event.tokens, step
        elif isinstance(event, RoundEnded) and event.committed:
            kept = keeps and peer_id in event.dropped
            carried, before = (carried, None) if kept else (0, event.step)
    return found
