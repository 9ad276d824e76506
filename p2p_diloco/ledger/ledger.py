"""The ledger: one peer's snapshots and updates on disk. It outlives crashes, and what it gives back it has verified.

    FOLDER/snapshots/0000000010.safetensors   S_10: theta, momentum, and as metadata step, head and digest
    FOLDER/updates/0000000012.update          U_12, which leads from S_12 to S_13
    FOLDER/quarantine/                        files found damaged or foreign; never deleted
    FOLDER/abandoned/000001/                  a history that the swarm did not share; the last two are kept

Rules of this file: a file is written under a temporary name, synced and renamed, so that it is whole or not there; the
same state makes the same bytes, so that a joiner can put a snapshot together from several donors; no file is believed
because of its name; a damaged one costs what it holds and no more. Not safe for two processes at a time.
"""

from __future__ import annotations

import itertools
import logging
import os
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from p2p_diloco.core.codec import Vector
from p2p_diloco.core.grid import Grid
from p2p_diloco.core.outer import OuterState
from p2p_diloco.core.update import (
    Update,
    UpdateHeader,
    max_update_start_bytes,
    open_update,
    update_from_bytes,
    update_pieces,
)
from p2p_diloco.ledger.disk import TEMPORARY, disk_errors, sync, write_whole
from p2p_diloco.ledger.snapshot import SnapshotInfo, check_snapshot, save_snapshot, snapshot_bytes

logger = logging.getLogger(__name__)

ABANDONED_KEPT = 2


class Ledger:
    """Opening removes temporary files, checks every snapshot, and the header and size of every update.

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
        """``lr``, ``momentum``: the outer optimizer's. ``run_id`` goes into every snapshot; another one is foreign."""
        self.folder, self.grid, self.lr, self.momentum, self.run_id = folder, grid, lr, momentum, run_id
        self.quarantined: list[Path] = []
        """Files found damaged or foreign since opening, where they are now."""
        self.lost_snapshots: dict[int, SnapshotInfo] = {}
        self.lost_updates: dict[int, UpdateHeader] = {}
        """Outer step -> what has been found damaged or gone since opening, and ought to be there."""
        self._snapshot_every, self._keep_snapshots = snapshot_every, keep_snapshots
        self._headers: dict[int, UpdateHeader] = {}
        self._snapshots: dict[int, SnapshotInfo] = {}
        with disk_errors(folder):
            for name in ("updates", "snapshots"):
                (folder / name).mkdir(parents=True, exist_ok=True)
                for path in (folder / name).glob("*" + TEMPORARY):
                    path.unlink()
            for path in sorted((folder / "updates").glob("*.update")):
                self._open_update(path)
            for path in sorted((folder / "snapshots").glob("*.safetensors")):
                self._open_snapshot(path)

    def newest_due(self, step: int) -> int:
        """The last outer step up to ``step`` at which a snapshot is due: the same ones on every peer, so that a joiner
        finds several donors of one snapshot."""
        return step - step % self._snapshot_every

    def snapshots(self) -> list[SnapshotInfo]:
        """Newest last."""
        held = self._snapshots.copy()  # a thread may be pruning
        return [held[step] for step in sorted(held)]

    def header(self, step: int) -> UpdateHeader | None:
        return self._headers.get(step)

    def update_path(self, step: int) -> Path:
        return self.folder / "updates" / f"{step:010d}.update"

    def heads(self) -> dict[int, bytes]:
        """Every outer step that this ledger can lead to, and its head."""
        heads: dict[int, bytes] = {}
        for snapshot in self.snapshots():
            step, head = snapshot.step, snapshot.head
            heads[step] = head
            while (header := self._headers.get(step)) is not None and header.parent == head:
                step, head = step + 1, header.head
                heads[step] = head
        return heads

    def way_to(self, step: int, head: bytes) -> tuple[SnapshotInfo, list[UpdateHeader]] | None:
        """The newest snapshot from which updates lead to ``head`` at outer step ``step``, and those updates."""
        for snapshot in reversed(self.snapshots()):
            updates, at = list[UpdateHeader](), (snapshot.step, snapshot.head)
            while at[0] < step and (header := self._headers.get(at[0])) is not None and header.parent == at[1]:
                updates.append(header)
                at = (header.step + 1, header.head)
            if at == (step, head):
                return snapshot, updates
        return None

    def update_bytes(self, step: int) -> bytes | None:
        """The update that leads from ``step`` to ``step + 1``, to be served: verified at every call."""
        checked = self._read_update(step)
        return checked[0] if checked else None

    def update(self, step: int) -> Update | None:
        """The update that leads from ``step`` to ``step + 1``, verified."""
        checked = self._read_update(step)
        return checked[1] if checked else None

    def append(self, update: Update) -> None:
        """Durable on return. A history that contradicts the update is abandoned. ValueError: of another model."""
        header = update.header
        step, held, next_held = header.step, self._headers.get(header.step), self._headers.get(header.step + 1)
        if held == header:
            return
        pieces = update_pieces(update)
        size = sum(len(piece) for piece in pieces)
        open_update(pieces[0], size, self.grid)  # refuse what opening would quarantine
        snapshot = self._snapshots.get(step + 1)
        if (
            held is not None
            or (next_held is not None and next_held.parent != header.head)
            or (snapshot is not None and snapshot.head != header.head)
        ):
            self.truncate(step)
        write_whole(self.update_path(step), pieces, size)
        self._headers[step] = header
        self.lost_updates.pop(step, None)

    def write_snapshot(self, state: OuterState) -> None:
        """Durable on return; then prunes. ``state`` must not change meanwhile."""
        held = self._snapshots.get(state.step)
        if held is None or held.digest != state.digest():
            self.write_parts(state.parts(), step=state.step, head=state.head)

    def write_parts(self, parts: Iterable[tuple[Vector, Vector]], *, step: int, head: bytes) -> None:
        """As ``write_snapshot``, for a state that comes part by part; what they raise leaves everything as it was."""
        path = self._snapshot_path(step)
        self._add_snapshot(save_snapshot(parts, path, step=step, head=head, n=self.grid.n, run_id=self.run_id))

    def adopt_snapshot(self, path: Path, digest: bytes | None = None) -> SnapshotInfo:
        """Verifies a downloaded file on the same disk and moves it into place. ValueError, the file untouched, when its
        values do not have the digest that it names, or not ``digest``, or it is of another model or run."""
        with disk_errors(path, snapshot_bytes(self.grid.n)):
            info = check_snapshot(path, n=self.grid.n, run_id=self.run_id)
            if digest not in (None, info.digest):
                raise ValueError(f"another snapshot, of outer step {info.step}")
            if not self._leads_on(info.step, info.head):
                self.truncate(info.step)
            held = self._snapshots.get(info.step)
            if held is not None and held.head == info.head and held.digest != info.digest:
                self._quarantine(held.path, "most peers have other bits there")
            sync(path)
            os.replace(path, self._snapshot_path(info.step))
            sync(self.folder / "snapshots")
        info = replace(info, path=self._snapshot_path(info.step))
        self._add_snapshot(info)
        return info

    def _leads_on(self, step: int, head: bytes) -> bool:
        """Whether the snapshots after outer step ``step`` are of a history that passed ``head`` there."""
        lost, later = self.lost_snapshots.get(step), [s for s in sorted(self._snapshots) if s > step]
        if not later or (lost is not None and lost.head == head):
            return True
        at = (step, head)
        while at[0] < later[0] and (header := self._headers.get(at[0])) is not None and header.parent == at[1]:
            at = (header.step + 1, header.head)
        return at == (later[0], self._snapshots[later[0]].head)

    def lose_update(self, header: UpdateHeader, reason: str) -> None:
        """Its file is damaged, or gone: go on without it."""
        if self.put_aside(header, reason):
            self.lost_updates[header.step] = header

    def lose_snapshot(self, info: SnapshotInfo, reason: str) -> None:
        if self._snapshots.get(info.step) is info:  # else another thread has just replaced it
            self._snapshots.pop(info.step)
            self.lost_snapshots[info.step] = info
            self._quarantine(info.path, reason)

    def put_aside(self, header: UpdateHeader, reason: str) -> bool:
        """Go on without an update that does not belong here. False when it is not here any more."""
        if self._headers.get(header.step) is not header:
            return False
        self._headers.pop(header.step)
        self._quarantine(self.update_path(header.step), reason)
        return True

    def truncate(self, step: int) -> None:
        """Forget the updates from outer step ``step`` on, and the snapshots after it: the swarm did not share them."""
        # The newest first, so that a crash in the middle leaves an unbroken history.
        snapshots = [s for s in sorted(self._snapshots, reverse=True) if s > step]
        updates = [s for s in sorted(self._headers, reverse=True) if s >= step]
        self.lost_snapshots = {s: lost for s, lost in self.lost_snapshots.items() if s <= step}
        self.lost_updates = {s: lost for s, lost in self.lost_updates.items() if s < step}
        if not snapshots and not updates:
            return
        abandoned = self.folder / "abandoned"
        with disk_errors(abandoned):
            abandoned.mkdir(exist_ok=True)
            histories = sorted(abandoned.glob("[0-9]" * 6))
            history = abandoned / f"{int(histories[-1].name) + 1 if histories else 1:06d}"
            history.mkdir()
            for s in snapshots:
                os.replace(self._snapshot_path(s), history / self._snapshot_path(s).name)
                self._snapshots.pop(s, None)
            for s in updates:
                os.replace(self.update_path(s), history / self.update_path(s).name)
                self._headers.pop(s, None)
            for old in [*histories, history][:-ABANDONED_KEPT]:
                shutil.rmtree(old)
        logger.warning("ledger: %d updates from outer step %d on moved to %s", len(updates), step, history)

    def _snapshot_path(self, step: int) -> Path:
        return self.folder / "snapshots" / f"{step:010d}.safetensors"

    def _open_update(self, path: Path) -> None:
        with path.open("rb") as file:
            start = file.read(max_update_start_bytes(self.grid))
        try:
            header = open_update(start, path.stat().st_size, self.grid)
            if path != self.update_path(header.step):
                raise ValueError(f"it is update {header.step}")
        except ValueError as error:
            self._quarantine(path, str(error))
        else:
            self._headers[header.step] = header

    def _open_snapshot(self, path: Path) -> None:
        try:
            info = check_snapshot(path, n=self.grid.n, run_id=self.run_id)
            if path != self._snapshot_path(info.step):
                raise ValueError(f"it is the snapshot of outer step {info.step}")
        except ValueError as error:
            self._quarantine(path, str(error))
        else:
            self._snapshots[info.step] = info

    def _read_update(self, step: int) -> tuple[bytes, Update] | None:
        """None, and the ledger without it, when it is gone or damaged."""
        header, path = self._headers.get(step), self.update_path(step)
        if header is None:
            return None
        with disk_errors(path):
            try:
                data = path.read_bytes()
                update = update_from_bytes(data, self.grid)
                if update.header != header:
                    raise ValueError("it is another one than it was")
            except FileNotFoundError:
                self.lose_update(header, "it is gone")
                return None
            except ValueError as error:
                self.lose_update(header, str(error))
                return None
        return data, update

    def _add_snapshot(self, info: SnapshotInfo) -> None:
        self._snapshots[info.step] = info
        self.lost_snapshots.pop(info.step, None)
        following = self._headers.get(info.step)
        if following is not None and following.parent != info.head:
            self.truncate(info.step)
        self._prune()

    def _prune(self) -> None:
        """Keeps the newest snapshots, and every update from the oldest of them on."""
        oldest = sorted(self._snapshots)[-self._keep_snapshots :][0]
        self.lost_snapshots = {s: lost for s, lost in self.lost_snapshots.items() if s > oldest}
        self.lost_updates = {s: lost for s, lost in self.lost_updates.items() if s >= oldest}
        with disk_errors(self.folder):
            for step in [s for s in sorted(self._snapshots) if s < oldest]:
                self._snapshots.pop(step).path.unlink(missing_ok=True)
            for step in [s for s in sorted(self._headers) if s < oldest]:
                self._headers.pop(step, None)
                self.update_path(step).unlink(missing_ok=True)

    def _quarantine(self, path: Path, reason: str) -> None:
        folder = self.folder / "quarantine"
        if not path.exists():
            logger.warning("ledger: %s is gone", path)
            return
        with disk_errors(path):
            folder.mkdir(exist_ok=True)
            names = (folder / f"{path.name}.{i}" for i in itertools.count())
            target = next(name for name in names if not name.exists())
            os.replace(path, target)
        self.quarantined.append(target)
        logger.warning("ledger: %s moved to %s: %s", path, target, reason)
