"""The ledger: one peer's snapshots and updates on disk. It outlives crashes, and what it gives back it has verified.

    S_10, S_20       snapshots, one every so many outer steps: the last two are kept
    U_10, U_11, ...  updates, every one from the oldest of these snapshots on
    the chain        header and certificate of every update from the genesis on (``chain``)

Rules of this file: no update is here that the chain does not have, and it has one before the update's file is written;
a file is written under a temporary name, synced and renamed, so that it is whole or not there; the
same state makes the same bytes, so that a joiner can put a snapshot together from several donors; no file is believed
because of its name; a damaged one costs what it holds and no more. Not safe for two processes at a time.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

from p2p_diloco.core.certificate import Certificate, Certified
from p2p_diloco.core.codec import Vector
from p2p_diloco.core.grid import Grid
from p2p_diloco.core.outer import OuterState
from p2p_diloco.core.update import Update, UpdateHeader
from p2p_diloco.ledger.chain import Chain
from p2p_diloco.ledger.disk import disk_errors, sync
from p2p_diloco.ledger.files import LedgerFiles, move_into
from p2p_diloco.ledger.snapshot import (
    IncomingSnapshot,
    SnapshotInfo,
    check_snapshot,
    save_snapshot,
    snapshot_bytes,
)
from p2p_diloco.ledger.updates import HeldUpdates, sound_pieces

logger = logging.getLogger(__name__)


class Ledger:
    """One peer's ledger. Opening checks every snapshot as a whole, and of every update the header and the size.

    Every method may raise LedgerError when the disk fails or is full; what was there before is still there then.
    """

    def __init__(
        self,
        folder: Path,
        *,
        grid: Grid,
        lr: float,
        momentum: float,
        snapshot_every: int,
        keep_snapshots: int = 2,
        run_id: str = "",
    ) -> None:
        """Opens the ledger in ``folder``, or begins one. ``lr`` and ``momentum`` are the outer optimizer's. ``run_id``
        goes into every snapshot, and a snapshot with another one is foreign."""
        self.folder, self.grid, self.lr, self.momentum, self.run_id = folder, grid, lr, momentum, run_id
        self.lost_snapshots: dict[int, SnapshotInfo] = {}
        """Outer step -> what has been found damaged or gone since opening, and ought to be there."""
        self.incoming: IncomingSnapshot | None = None
        """The snapshot that is being downloaded, of which others may have what is here."""
        self._snapshot_every, self._keep_snapshots = snapshot_every, keep_snapshots
        self._snapshots: dict[int, SnapshotInfo] = {}
        self._files = LedgerFiles(folder)
        self.quarantined = self._files.quarantined
        self.chain = Chain(self._files, grid)
        with disk_errors(folder):
            self.updates = HeldUpdates(self._files, grid, self.chain)
            for path in self._files.snapshots():
                self._open_snapshot(path)

    def newest_due(self, step: int) -> int:
        """Returns the last outer step up to ``step`` at which a snapshot is due. It is the same on every peer, so that
        a joiner finds several donors of one snapshot."""
        return step - step % self._snapshot_every

    def snapshots(self) -> list[SnapshotInfo]:
        """Returns what is known of the snapshots here, the newest last."""
        held = self._snapshots.copy()  # a thread may be pruning
        return [held[step] for step in sorted(held)]

    def header(self, step: int) -> UpdateHeader | None:
        """Returns the header of the update that leads from ``step`` to ``step + 1``; None where it is not here."""
        return self.updates.header(step)

    def heads(self) -> dict[int, bytes]:
        """Returns every outer step that this ledger can lead to, with its head."""
        heads: dict[int, bytes] = {}
        for snapshot in self.snapshots():
            heads[snapshot.step] = snapshot.head
            leading_on = self.updates.following(snapshot.step, snapshot.head)
            heads.update((header.step + 1, header.head) for header in leading_on)
        return heads

    def way_to(self, step: int, head: bytes) -> tuple[SnapshotInfo, list[UpdateHeader]] | None:
        """Returns the newest snapshot from which updates lead to ``head`` at outer step ``step``, and these updates;
        None where no snapshot does."""
        for snapshot in reversed(self.snapshots()):
            leading_on = self.updates.following(snapshot.step, snapshot.head)
            updates = list(takewhile(lambda header: header.step < step, leading_on))
            reached = (updates[-1].step + 1, updates[-1].head) if updates else (snapshot.step, snapshot.head)
            if reached == (step, head):
                return snapshot, updates
        return None

    def update_bytes(self, step: int) -> bytes | None:
        """Returns the update that leads from ``step`` to ``step + 1`` as it is served. It is read and verified at every
        call; None where it is not here, or not sound."""
        checked = self.updates.read(step)
        return checked[0] if checked else None

    def update(self, step: int) -> Update | None:
        """Returns what ``update_bytes`` does, decoded."""
        checked = self.updates.read(step)
        return checked[1] if checked else None

    def append(self, update: Update, certificate: Certificate) -> None:
        """Writes the update's entry in the chain, and then the update; both are durable on return. A history that
        contradicts it is abandoned. Raises ValueError for an update of another model, or that does not follow."""
        if not self.updates.has(update.header):
            pieces = sound_pieces(update, self.grid)
            self.extend([Certified(header=update.header, certificate=certificate)])
            self.updates.write(update.header, pieces)

    def restore(self, update: Update) -> None:
        """Writes an update that the chain has, which is durable on return; any other is left aside. Raises ValueError
        for an update of another model."""
        if self.chain.has(update.header) and not self.updates.has(update.header):
            self.updates.write(update.header, sound_pieces(update, self.grid))

    def extend(self, entries: Sequence[Certified]) -> None:
        """Leads the chain on with ``entries``, which follow one from the other; it is durable on return. A history that
        contradicts them is abandoned. Raises ValueError, with nothing changed, when they do not follow."""
        step = self.chain.changed_from(entries)
        if step is not None:
            if step < self.chain.end:
                self.truncate(step)
            self.chain.extend(entries)
            for info in self.snapshots():
                if self.chain.contradicts(info.step, info.head):
                    self._snapshots.pop(info.step)
                    self._files.quarantine(info.path, "the chain does not lead to it")

    def go_back(self, step: int, entries: Sequence[Certified]) -> None:
        """Abandons the updates from outer step ``step`` on, and later snapshots. The chain leads on from there, with
        ``entries`` in it, as ``extend`` has them."""
        changed_from = self.chain.changed_from(entries)
        self.truncate(step, cut=self.chain.end if changed_from is None else changed_from)
        self.chain.extend(entries)

    def write_snapshot(self, state: OuterState) -> None:
        """Writes a snapshot of ``state``, which must not change meanwhile. It is durable on return; what it makes
        superfluous is then deleted."""
        held = self._snapshots.get(state.step)
        if held is None or held.digest != state.digest():
            self.write_parts(state.parts(), step=state.step, head=state.head)

    def write_parts(self, parts: Iterable[tuple[Vector, Vector]], *, step: int, head: bytes) -> None:
        """Writes a snapshot as ``write_snapshot`` does, of a state that comes part by part as (theta, momentum). An
        exception from ``parts`` leaves everything as it was."""
        path = self._files.snapshot_path(step)
        self._add_snapshot(save_snapshot(parts, path, step=step, head=head, n=self.grid.n, run_id=self.run_id))

    def adopt_snapshot(
        self, path: Path, digest: bytes | None = None, entries: Sequence[Certified] = ()
    ) -> SnapshotInfo:
        """Verifies a downloaded file on the same disk, leads the chain on as ``extend`` does, and moves the file into
        place. Returns what is known of it. Raises ValueError, with the file untouched, when its values do not have the
        digest that it names, or not ``digest``, when it is of another model or run, or when the chain does not lead to
        it."""
        with disk_errors(path, snapshot_bytes(self.grid.n)):
            info = check_snapshot(path, n=self.grid.n, run_id=self.run_id)
            if digest not in (None, info.digest):
                raise ValueError(f"another snapshot, of outer step {info.step}")
            self.extend(entries)
            if info.step > self.chain.end or self.chain.contradicts(info.step, info.head):
                raise ValueError(f"the chain does not lead to the snapshot of outer step {info.step}")
            held = self._snapshots.get(info.step)
            if held is not None and held.digest != info.digest:
                self._files.quarantine(held.path, "its certificate names other bits")
            sync(path)
            os.replace(path, self._files.snapshot_path(info.step))
            sync(self.folder / "snapshots")
        info = replace(info, path=self._files.snapshot_path(info.step))
        self._add_snapshot(info)
        return info

    def lose_snapshot(self, info: SnapshotInfo, reason: str) -> None:
        """Goes on without a snapshot whose file is damaged or gone, and remembers that it ought to be here."""
        if self._snapshots.get(info.step) is info:  # else another thread has just replaced it
            self._snapshots.pop(info.step)
            self.lost_snapshots[info.step] = info
            self._files.quarantine(info.path, reason)

    def truncate(self, step: int, *, cut: int | None = None) -> None:
        """Abandons the updates from outer step ``step`` on, and later snapshots: the swarm did not share them. The
        chain is cut there, or at outer step ``cut``."""
        cut = step if cut is None else cut
        # The newest first, and the chain last, so that a crash in the middle leaves an unbroken history.
        snapshots = [s for s in sorted(self._snapshots, reverse=True) if s > step]
        updates = self.updates.since(step)
        self.lost_snapshots = {s: lost for s, lost in self.lost_snapshots.items() if s <= step}
        self.updates.lost = {s: lost for s, lost in self.updates.lost.items() if s < step}
        if snapshots or updates:
            with self._files.abandoning() as history:
                self.chain.save_from(cut, history / self.chain.path.name)
                for s in snapshots:
                    move_into(history, self._files.snapshot_path(s))
                    self._snapshots.pop(s, None)
                self.updates.move(updates, history)
            logger.warning("ledger: %d updates from outer step %d on moved to %s", len(updates), step, history)
        self.chain.truncate(cut)

    def _open_snapshot(self, path: Path) -> None:
        try:
            info = check_snapshot(path, n=self.grid.n, run_id=self.run_id)
            if path != self._files.snapshot_path(info.step):
                raise ValueError(f"it is the snapshot of outer step {info.step}")
            if self.chain.contradicts(info.step, info.head):
                raise ValueError("the chain does not lead to it")
        except ValueError as error:
            self._files.quarantine(path, str(error))
        else:
            self._snapshots[info.step] = info

    def _add_snapshot(self, info: SnapshotInfo) -> None:
        self._snapshots[info.step] = info
        self.lost_snapshots.pop(info.step, None)
        self._prune()

    def _prune(self) -> None:
        """Keeps the newest snapshots, and every update from the oldest of them on."""
        oldest = sorted(self._snapshots)[-self._keep_snapshots :][0]
        self.lost_snapshots = {s: lost for s, lost in self.lost_snapshots.items() if s > oldest}
        with disk_errors(self.folder):
            for step in [s for s in sorted(self._snapshots) if s < oldest]:
                self._snapshots.pop(step).path.unlink(missing_ok=True)
            self.updates.prune(oldest)
