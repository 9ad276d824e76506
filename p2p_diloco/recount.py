"""What a swarm did, from its event logs, so that a simulation can do it again and must come to the same heads.

Only what follows from the run file, the peers' names and the numbers of their inner steps can be done again: a peer
that missed a round, or joined from an inner state of its own, has a past that the logs do not tell.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from p2p_diloco.errors import UsageError
from p2p_diloco.events import EVENTS_FILE, Event, read_events
from p2p_diloco.manifest import RunManifest
from p2p_diloco.stored import read_manifest


@dataclass(frozen=True, kw_only=True)
class Past:
    """Outer steps are counted from 0; a head is where the swarm stood after so many."""

    names: tuple[str, ...]
    """Peer ids of all who were ever in a round."""
    inner_steps: Mapping[int, Mapping[str, int]]
    """Outer step -> peer id -> inner steps before it."""
    dropped: Mapping[int, frozenset[str]]
    """Outer step -> who contributed nothing to it."""
    heads: Mapping[int, str]


def past_of(folder: Path) -> tuple[RunManifest, Past]:
    """Of a swarm that ``p2p-diloco swarm --folder FOLDER`` has left. UsageError when it cannot be done again."""
    logs = [list(read_events(path)) for path in sorted(folder.glob(f"*/*/{EVENTS_FILE}"))]
    manifests = sorted(folder.glob("*/*/manifest.json"))
    if not logs or not manifests:
        raise UsageError(f"{folder}: no swarm has run here; name the --folder of p2p-diloco swarm")
    manifest = read_manifest(manifests[0])
    return manifest, recount(logs, manifest, str(folder))


def recount(logs: Iterable[list[Event]], manifest: RunManifest, source: str) -> Past:
    """Pure. ``logs``: of everybody."""
    tokens = manifest.spec.tokens_per_inner_step
    inner_steps: dict[int, dict[str, int]] = {}
    dropped: dict[int, frozenset[str]] = {}
    heads: dict[int, str] = {}
    for event in (event for log in logs for event in log if event["event"] == "round"):
        step = event["step"] - 1
        if not event["committed"] or event["lost"]:
            what = "lost somebody" if event["committed"] else f"failed ({event['reason']})"
            raise UsageError(f"{source}: a round after outer step {step} {what}; only a swarm without can be recounted")
        inner_steps[step] = {peer: weight // tokens for peer, weight in zip(event["group"], event["weights"])}
        dropped[step] = frozenset(event["dropped"])
        heads[event["step"]] = event["head"]
    if sorted(inner_steps) != list(range(len(inner_steps))):
        raise UsageError(f"{source}: its logs do not tell of every outer step from the first one on")
    names = sorted({peer for there in inner_steps.values() for peer in there})
    return Past(names=tuple(names), inner_steps=inner_steps, dropped=dropped, heads=heads)
