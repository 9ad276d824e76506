"""The whole check of a run as it lies on a disk: signatures, hashes, digests, and the computation from one to the next.

    chain        every header follows from the one before, and every certificate is sound, from the genesis on
    updates      every part has the hash that the chain's header has for it, and the members that its certificate counts
    snapshots    each has the head of the chain, and the digest that manifest or certificate name
    replay       from the oldest snapshot to the newest update, every state has the digest that a certificate names
    anchors      the owner has signed each; none is left out by the chain, or names other bits

Nothing is believed but the manifest. The files are read one after the other, and a replay goes through them one part at
a time: it takes the memory of a few parts, and of a hash for each part and outer step. Nothing is written or put aside.
What the files do not hold cannot be checked: updates that were pruned are vouched for by their certificates alone.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from p2p_diloco.core.anchor import Anchors
from p2p_diloco.core.codec import Vector
from p2p_diloco.core.errors import UsageError
from p2p_diloco.core.grid import Grid
from p2p_diloco.core.lineage import Lineage
from p2p_diloco.core.manifest import RunManifest
from p2p_diloco.core.outer import apply_part, state_digest
from p2p_diloco.core.roster_rules import RosterRules
from p2p_diloco.core.update import (
    Part,
    UpdateHeader,
    check_mask,
    in_most_parts,
    max_update_start_bytes,
    open_update,
    part_from_bytes,
    part_places,
)
from p2p_diloco.ledger.anchors import read_anchors
from p2p_diloco.ledger.chain import read_entries
from p2p_diloco.ledger.disk import disk_errors
from p2p_diloco.ledger.files import LedgerFiles
from p2p_diloco.ledger.snapshot import SnapshotInfo, check_snapshot, chunk_hash, chunk_slices, read_chunk

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Wrong:
    """Says what is wrong, and where."""

    step: int
    """The outer step: of a state, or that an update leads on from."""
    reason: str


@dataclass(kw_only=True)
class Verified:
    """Holds what a verification has found so far."""

    manifest: RunManifest
    heads: list[bytes] = field(default_factory=list)
    """Of every outer step to which sound entries of the chain lead, from the genesis on; none where there is none."""
    states: dict[int, bytes] = field(default_factory=dict)
    """Outer step -> the digest of its state, where the manifest or a certificate names it."""
    fulls: list[bytes] = field(default_factory=list)
    """Of every update of the chain: who is in most of its parts."""
    headers: dict[int, UpdateHeader] = field(default_factory=dict)
    """Outer step -> the sound update that leads on from there."""
    snapshots: dict[int, SnapshotInfo] = field(default_factory=dict)
    """Outer step -> the sound snapshot of it."""
    replayed: dict[int, bytes] = field(default_factory=dict)
    """Outer step -> the digest of its state, as the files lead to it."""
    anchors: Anchors = field(default_factory=Anchors)
    wrongs: list[Wrong] = field(default_factory=list)
    chain_is_whole: bool = True
    """Whether all of the chain's file is sound."""

    @property
    def certificates(self) -> int:
        """Returns how many sound entries the chain has."""
        return len(self.fulls)

    @property
    def wrong(self) -> Wrong | None:
        """Returns what is wrong first, by outer step; None where nothing is."""
        return min(self.wrongs, key=lambda wrong: wrong.step, default=None)

    @property
    def anchored_step(self) -> int | None:
        """Returns the newest outer step of the chain that an anchor of the owner names; None where there is none."""
        return max((one.step for one in self.anchors.chain if self.head_at(one.step) == one.head), default=None)

    def head_at(self, step: int) -> bytes | None:
        """Returns the head of the chain at an outer step; None beyond its end."""
        return self.heads[step] if step < len(self.heads) else None

    def note(self, step: int, reason: str) -> None:
        """Remembers that something is wrong."""
        self.wrongs.append(Wrong(step=step, reason=reason))


def verify_ledger(ledger: Path, manifest: RunManifest) -> Verified:
    """Checks all that lies in the folder of a ledger, which must not change meanwhile, and returns what was found.
    Raises UsageError for a ledger that holds nothing, LedgerError when the disk fails. Blocks: it reads everything
    twice."""
    files, found = LedgerFiles(ledger), Verified(manifest=manifest)
    found.states[0] = bytes.fromhex(manifest.genesis)
    if not (files.chain_path.exists() or files.updates() or files.snapshots()):
        raise UsageError("its ledger holds nothing of the run yet")
    log.info("verifying the chain")
    check_chain(files.chain_path, found)
    log.info("verifying %d updates", len(files.updates()))
    for path in files.updates():
        check_update_file(path, found)
    log.info("verifying %d snapshots", len(files.snapshots()))
    for path in files.snapshots():
        check_snapshot_file(path, found)
    log.info("replaying the updates")
    check_states(files, found)
    check_anchors(ledger, found)
    return found


def check_chain(path: Path, found: Verified) -> None:
    """Follows the chain from the genesis on, as far as it is sound."""
    lineage = Lineage(RosterRules.of(found.manifest))
    try:
        for certified in read_entries(path, found.manifest.grid):
            lineage.follow(certified)
            header, certificate = certified.header, certified.certificate
            found.heads += [header.head] if found.heads else [header.parent, header.head]
            found.fulls.append(certificate.full)
            if certificate.state:
                found.states.setdefault(header.step, certificate.state)
                if found.states[header.step] != certificate.state:
                    raise ValueError("its certificate names another genesis than the manifest")
    except ValueError as error:
        found.chain_is_whole = False
        found.note(lineage.step, f"the chain is not sound: {error}")


def check_update_file(path: Path, found: Verified) -> None:
    """Checks one update against the chain: its header, and every part. One beyond a chain that has ended too early
    cannot be checked."""
    grid = found.manifest.grid
    step = int(path.stem) if path.stem.isdecimal() else 0
    if not found.chain_is_whole and step >= found.certificates:
        return
    try:
        with disk_errors(path), path.open("rb") as file:
            start = file.read(max_update_start_bytes(grid))
        header = open_update(start, path.stat().st_size, grid)
        if header.step != step:
            raise ValueError(f"it is that of outer step {header.step}")
        if found.head_at(step + 1) != header.head:
            raise ValueError("the chain has another one there, or none")
        masks = [part.mask for part in sound_parts(path, header, grid)]
        if in_most_parts(masks) != found.fulls[step]:
            raise ValueError("others are in most of its parts than its certificate counts")
    except ValueError as error:
        found.note(step, f"{path.name}: {error}")
    else:
        found.headers[step] = header


def sound_parts(path: Path, header: UpdateHeader, grid: Grid) -> Iterator[Part]:
    """Yields the parts of an update's file, read one at a time. ValueError for one that is not what its header names,
    or does not decode."""
    for i, where in enumerate(part_places(header, grid)):
        part = part_from_bytes(read_chunk(path, where), header)
        if part.hash != header.part_hashes[i]:
            raise ValueError(f"part {i} does not have the hash that its header names")
        check_mask(part.mask, len(header.contributors))
        grid.decode(i, part.data)
        yield part


def check_snapshot_file(path: Path, found: Verified) -> None:
    """Checks one snapshot: all of it against its digest, and that against chain and certificates. One beyond a chain
    that has ended too early cannot be checked."""
    step = int(path.stem) if path.stem.isdecimal() else 0
    if not found.chain_is_whole and step > found.certificates:
        return
    try:
        with disk_errors(path):
            info = check_snapshot(path, n=found.manifest.n_params, run_id=found.manifest.run_id)
        if info.step != step:
            raise ValueError(f"it is that of outer step {info.step}")
        if (found.heads or step) and found.head_at(step) != info.head:
            raise ValueError("the chain does not lead to it")
        if found.states.get(step, info.digest) != info.digest:
            raise ValueError("it has other bits than " + ("its certificate names" if step else "the manifest names"))
    except ValueError as error:
        found.note(step, f"{path.name}: {error}")
    else:
        found.snapshots[step] = info


def check_states(files: LedgerFiles, found: Verified) -> None:
    """Replays all updates from the oldest snapshot on, and from a later one where some between are missing. Compares
    every state of which there is a digest."""
    reached, led_through = -1, set[int]()
    for step, base in sorted(found.snapshots.items()):
        if step <= reached:
            continue
        if step not in found.states:
            found.note(step, "no certificate names the digest of this snapshot, and no older one leads to it")
        way = way_from(found, base)
        reached = step + len(way)
        led_through |= {header.step for header in way}
        named = found.states | {at: info.digest for at, info in found.snapshots.items()}
        compared = {at for at in named if step <= at <= reached} | {reached}
        digests = replayed_digests(files, base, way, found.manifest, compared)
        found.replayed |= digests
        for at in sorted(compared & named.keys()):
            if digests[at] != named[at]:
                found.note(at, "replaying the updates leads to other bits than are certified there")
                break
    if left := found.headers.keys() - led_through:
        found.note(min(left), f"nothing leads to the update of outer step {min(left)}: those before are missing")


def way_from(found: Verified, base: SnapshotInfo) -> list[UpdateHeader]:
    """Returns the sound updates that lead on from a snapshot, one after the other."""
    way: list[UpdateHeader] = []
    while (header := found.headers.get(base.step + len(way))) is not None:
        if header.parent != (way[-1].head if way else base.head):
            break
        way.append(header)
    return way


def replayed_digests(
    files: LedgerFiles, base: SnapshotInfo, way: list[UpdateHeader], manifest: RunManifest, wanted: Collection[int]
) -> dict[int, bytes]:
    """Returns the digests of the states at the ``wanted`` outer steps from that of ``base`` on, to the end of ``way``:
    one part after another goes through all updates."""
    grid, outer = manifest.grid, manifest.spec.outer
    slices = chunk_slices(grid.n)
    hashes: dict[int, list[bytes]] = {step: [b""] * len(slices) for step in wanted}
    heads = {base.step: base.head} | {header.step + 1: header.head for header in way}
    places = {header.step: part_places(header, grid) for header in way}

    def keep(step: int, part: int, pair: tuple[Vector, Vector]) -> None:
        for chunk, values in zip((part, len(slices) // 2 + part), pair):
            hashes[step][chunk] = chunk_hash(values.data.cast("B"))

    for part in range(grid.n_parts):
        chunks = (slices[part], slices[len(slices) // 2 + part])
        theta, momentum = (np.frombuffer(read_chunk(base.path, where), np.float32).copy() for where in chunks)
        if base.step in hashes:
            keep(base.step, part, (theta, momentum))
        for header in way:
            data = read_chunk(files.update_path(header.step), places[header.step][part])
            gradient = grid.decode(part, part_from_bytes(data, header).data)
            apply_part(theta, momentum, gradient, lr=outer.lr, momentum=outer.momentum)
            if header.step + 1 in hashes:
                keep(header.step + 1, part, (theta, momentum))
    return {step: state_digest(step, heads[step], hashes[step]) for step in hashes}


def check_anchors(ledger: Path, found: Verified) -> None:
    """Checks the owner's anchors: their signatures, and what they say of the chain and of its states. One that is
    beyond the end of the chain says nothing about it."""
    found.anchors, problem = read_anchors(ledger, found.manifest)
    last = found.anchors.newest
    if problem:
        found.note(
            last.step if last else 0, f"the anchors after number {found.anchors.number} are not sound: {problem}"
        )
    chain = found.anchors.chain
    settled = max((i for i, anchor in enumerate(chain) if len(anchor.follows) > 1), default=0)
    for anchor in chain[settled:]:  # what came before one that settles a contradiction may be taken back
        head, digest = found.head_at(anchor.step), known_digest(found, anchor.step)
        if head is not None and head != anchor.head:
            found.note(anchor.step, f"the history leaves out anchor {anchor.number} of the run's owner")
        elif head is not None and digest not in (None, anchor.state):
            found.note(anchor.step, f"anchor {anchor.number} names other bits than are certified there")


def known_digest(found: Verified, step: int) -> bytes | None:
    """Returns the digest of the state at an outer step, as it was computed here, or else as a certificate names it;
    None where there is neither."""
    return found.replayed.get(step, found.states.get(step))
