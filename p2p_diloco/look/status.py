"""A look at a run from outside: join the DHT as a stranger that nobody sees, read the records, leave.

The observer is a node in client mode with an identity of the moment. It serves nothing and announces nothing, so no
peer ever counts on it.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from p2p_diloco.core.admission import one_vote_each
from p2p_diloco.core.config import PeerConfig, Timeouts
from p2p_diloco.core.directory import Directory
from p2p_diloco.core.errors import NetworkError
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.manifest import RunManifest, open_manifest
from p2p_diloco.core.peer_row import PeerRow
from p2p_diloco.core.records import Record, peers_key
from p2p_diloco.core.swarm_head import newest_evaluation, swarm_head
from p2p_diloco.look.display import Legible, count, held_out, label, peers_table
from p2p_diloco.look.overview import Overview, SeatRow, overview_of
from p2p_diloco.peer.revocations import NewestList
from p2p_diloco.wire.daemon import private_socket_folder
from p2p_diloco.wire.discovery import find_manifest
from p2p_diloco.wire.node import Node


@dataclass(frozen=True, kw_only=True)
class Status:
    """One run at one moment."""

    manifest: RunManifest
    step: int
    head: bytes
    """The swarm's, as its peers' records tell."""
    records: Sequence[Record]
    """Of the live peers; who is furthest comes first."""
    overview: Overview


@asynccontextmanager
async def observer(initial_peers: Sequence[str], timeouts: Timeouts) -> AsyncIterator[Node]:
    """Yields a node that looks on, and closes it. Raises UsageError or NetworkError."""
    with tempfile.TemporaryDirectory(prefix="p2p-diloco-") as folder:
        config = PeerConfig(folder=Path(folder), initial_peers=tuple(initial_peers), client_mode=True)
        identity = Identity.load_or_create(config.identity_path)
        node = await Node.start(config, identity, timeouts, private_socket_folder(config.folder))
        try:
            yield node
        finally:
            await node.close()


async def ask_for_manifest(node: Node, initial_peers: Sequence[str], run_id: str | None) -> bytes:
    """Returns the signed manifest, verified, of the only run there, or of ``run_id``."""
    asked = [(maddr.rpartition("/p2p/")[2], maddr) for maddr in initial_peers]
    return await find_manifest(node, run_id=run_id, initial_peers=asked, timeouts=node.timeouts, wall_s=time.time)


async def fetch_manifest(initial_peers: Sequence[str], run_id: str | None, timeouts: Timeouts) -> bytes:
    """Returns what ``ask_for_manifest`` does, by a node of its own. Raises UsageError or NetworkError."""
    async with observer(initial_peers, timeouts) as node:
        return await ask_for_manifest(node, initial_peers, run_id)


async def gather_status(initial_peers: Sequence[str], run_id: str | None, timeouts: Timeouts) -> Status:
    """Returns what the run's peers say of themselves now, without those whose invitation is revoked. Raises UsageError
    or NetworkError that say what to do."""
    async with observer(initial_peers, timeouts) as node:
        manifest = open_manifest(await ask_for_manifest(node, initial_peers, run_id), "the run")
        sealed = await node.look_up(peers_key(manifest.run_id))
        directory = directory_of(manifest, sealed, node.peer_id, time.time())
        newest = NewestList(transport=node, directory=directory, owner=manifest.owner)
        await newest.hear(directory.live(time.time()))
        return status_of(manifest, directory, time.time())


def directory_of(manifest: RunManifest, sealed: Sequence[bytes], me: str, now_s: float) -> Directory:
    """Returns a directory of the records in ``sealed``, what the DHT holds under the run's key, except ``me``. What is
    not sound is left out, and so is who has no seat in a run by invitation. Its outer step is the swarm's."""
    directory = Directory(me, manifest.run_id, admission=manifest.admission())
    for one in sealed:
        try:
            directory.learn(one, now_s)
        except ValueError:
            continue
    swarm = swarm_head(one_vote_each(directory.live(now_s)), None)
    directory.step = 0 if swarm is None else swarm[0]
    return directory


def status_of(manifest: RunManifest, directory: Directory, now_s: float) -> Status:
    """Returns the status that the live records of a directory come to. NetworkError when no peer is alive."""
    records = directory.live(now_s)
    swarm = swarm_head(one_vote_each(records), None)
    if swarm is None:
        raise NetworkError(f"run {manifest.spec.name} {manifest.run_id}: no peer of it is up now")
    step, head = swarm
    ordered = sorted(records, key=lambda record: (-record.step, record.role, record.label))
    overview = overview_of(records, now_s)
    return Status(manifest=manifest, step=step, head=head, records=ordered, overview=overview)


@dataclass(frozen=True, kw_only=True)
class JsonRow(PeerRow):
    """A peer in the JSON of ``status``."""

    on_swarm_head: bool


@dataclass(frozen=True, kw_only=True)
class JsonStatus:
    """Is what ``status --json`` prints."""

    run_id: str
    name: str
    step: int
    steps: int
    head: str
    peers: tuple[JsonRow, ...]

    @classmethod
    def of(cls, status: Status) -> JsonStatus:
        """Returns the JSON of ``status``, as a value."""
        return cls(
            run_id=status.manifest.run_id,
            name=status.manifest.spec.name,
            step=status.step,
            steps=status.manifest.spec.outer.steps,
            head=status.head.hex(),
            peers=tuple(
                JsonRow(**vars(PeerRow.of(record)), on_swarm_head=record.head == status.head)
                for record in status.records
            ),
        )


def to_json(status: Status) -> str:
    """Returns the status as one JSON object on one line."""
    return json.dumps(asdict(JsonStatus.of(status)))


def invited(seats: Sequence[SeatRow]) -> str:
    """Returns the words for the invitations under which peers are there."""
    return ", ".join(f"{seat.name} ({seat.peers} of {seat.places})" for seat in seats) or "nobody is here"


def certified(overview: Overview) -> str:
    """Returns the words for the certificate of the last outer step, for what the next one waits for, and for how many
    peers lie or err; empty where nobody says anything of that."""
    told, certificate = [], overview.certificate
    if certificate is not None:
        told.append(f"{certificate.signatures} of {certificate.certifying} signed it")
        told += ["witnessed by the owner"] if certificate.witnessed else []
        told += ["averaged by the owner's seed"] if certificate.helped else []
    told += [f"{overview.known_members} known"] if overview.known_members else []
    told += ["waiting for the owner's seed, which has to witness the next one"] if overview.waits_for_owner else []
    told += [f"{overview.found_wrong} found to have averaged wrongly"] if overview.found_wrong else []
    told += [f"{overview.barred} barred"] if overview.barred else []
    return " · ".join(told)


def ways_told(records: Sequence[Record]) -> str:
    """Returns the words for how many peers others can dial; empty where that is all of them."""
    ways = Counter(record.reached for record in records)
    if ways["direct"] == len(records):
        return ""
    told = [f"{ways['direct']} of {len(records)} can be dialled"]
    told += [f"{ways['relay']} through a relay only, for small messages"] if ways["relay"] else []
    return " · ".join(told)


def shares_told(records: Sequence[Record]) -> str:
    """Returns the words for who averages less than an equal share, because of its uplink; empty where nobody does."""
    slow = [f"{label(one.name, one.peer_id)} {one.share_percent} %" for one in records if one.share_percent < 100]
    return f"averaging less than an equal share, for their uplinks are slow: {', '.join(slow)}" if slow else ""


def screen_of(status: Status, width: int) -> RenderableType:
    """Returns the status for a terminal of ``width`` columns."""
    rows = [PeerRow.of(record) for record in status.records]
    trainers = [record for record in status.records if record.role == "trainer"]
    manifest, evaluation = status.manifest, newest_evaluation(status.records, (status.step, status.head))
    lines = [
        f"run {manifest.spec.name} {manifest.run_id}",
        f"outer step {status.step} of {manifest.spec.outer.steps} · head {status.head.hex()[:16]}",
        f"{len(trainers)} training, {count(sum(r.tokens_per_s for r in trainers))} tokens/s · {held_out(evaluation)}",
    ]
    if words := certified(status.overview):
        lines.insert(2, words)
    if words := ways_told(status.records):
        lines.append(words)
    if words := shares_told(status.records):
        lines.append(words)
    if manifest.spec.membership == "invite":
        lines.append(f"by invitation: {invited(status.overview.seats)}")
    table = peers_table(rows, head=status.head.hex(), width=width, most=len(rows), own=False)
    return Legible(Group(*map(Text, lines), Text(), table))
