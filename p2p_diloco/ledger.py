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
from dataclasses import replace
from pathlib import Path

from p2p_diloco.codec import Codec, Vector
from p2p_diloco.outer import (
    OuterState,
    Update,
    UpdateHeader,
    apply,
    max_update_start_bytes,
    open_update,
    update_from_bytes,
    update_pieces,
)
from p2p_diloco.snapshot import (
    TEMPORARY,
    SnapshotInfo,
    check_snapshot,
    disk_errors,
    read_snapshot,
    save_snapshot,
    snapshot_bytes,
    sync,
    write_whole,
)

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
        n: int,
        codec: Codec,
        lr: float,
        momentum: float,
        snapshot_every: int,
        keep_snapshots: int = 2,
        run_id: str = "",
    ) -> None:
        """``lr``, ``momentum``: the outer optimizer's. ``run_id`` goes into every snapshot; another one is foreign."""
        self.folder = folder
        self.quarantined: list[Path] = []
        """Files found damaged or foreign since opening, where they are now."""
        self._n, self._codec, self._lr, self._momentum = n, codec, lr, momentum
        self._snapshot_every, self._keep_snapshots, self._run_id = snapshot_every, keep_snapshots, run_id
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

    def snapshot_due(self, step: int) -> bool:
        """At the same steps on every peer, so that a joiner finds several donors of one snapshot."""
        return step % self._snapshot_every == 0

    def snapshots(self) -> list[SnapshotInfo]:
        """Newest last."""
        held = self._snapshots.copy()  # a thread may be pruning
        return [held[step] for step in sorted(held)]

    def header(self, step: int) -> UpdateHeader | None:
        return self._headers.get(step)

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

    def update_bytes(self, step: int) -> bytes | None:
        """The update that leads from ``step`` to ``step + 1``, to be served: verified at every call."""
        checked = self._read_update(step)
        return checked[0] if checked else None

    def append(self, update: Update) -> None:
        """Durable on return. A history that contradicts the update is abandoned. ValueError: of another model."""
        header = update.header
        step, held, next_held = header.step, self._headers.get(header.step), self._headers.get(header.step + 1)
        if held == header:
            return
        pieces = update_pieces(update)
        size = sum(len(piece) for piece in pieces)
        open_update(b"".join(pieces[:4]), size, n=self._n, codec=self._codec)  # refuse what opening would quarantine
        snapshot = self._snapshots.get(step + 1)
        if (
            held is not None
            or (next_held is not None and next_held.parent != header.head)
            or (snapshot is not None and snapshot.head != header.head)
        ):
            self.truncate(step)
        write_whole(self._update_path(step), pieces, size)
        self._headers[step] = header

    def write_snapshot(self, state: OuterState) -> None:
        """Durable on return; then prunes. ``state`` must not change meanwhile."""
        digest = state.digest()
        held = self._snapshots.get(state.step)
        if held is not None and held.digest == digest:
            return
        self._add_snapshot(save_snapshot(state, digest, self._snapshot_path(state.step), run_id=self._run_id))

    def adopt_snapshot(self, path: Path, digest: bytes | None = None) -> SnapshotInfo:
        """Verifies a downloaded file on the same disk and moves it into place. ValueError, the file untouched, when its
        values do not have the digest that it names, or not ``digest``, or it is of another model or run."""
        with disk_errors(path, snapshot_bytes(self._n)):
            info = check_snapshot(path, n=self._n, run_id=self._run_id)
            if digest not in (None, info.digest):
                raise ValueError(f"another snapshot, of outer step {info.step}")
            if max(self._snapshots, default=0) > info.step and self.heads().get(info.step) != info.head:
                self.truncate(info.step)
            sync(path)
            os.replace(path, self._snapshot_path(info.step))
            sync(self.folder / "snapshots")
        info = replace(info, path=self._snapshot_path(info.step))
        self._add_snapshot(info)
        return info

    def load(
        self, state_theta_out: Vector, state_momentum_out: Vector, *, at_most: int | None = None
    ) -> OuterState | None:
        """The newest state that the ledger leads to, or that at outer step ``at_most``: the newest sound snapshot, and
        the updates since, until one is missing. Written into the two vectors; they are garbage when None comes back,
        for there is no sound snapshot."""
        for info in reversed(self.snapshots()):
            if at_most is not None and info.step > at_most:
                continue
            state = OuterState(step=info.step, head=info.head, theta=state_theta_out, momentum=state_momentum_out)
            if not self._read_snapshot(info, state):
                continue
            while (at_most is None or state.step < at_most) and (checked := self._read_update(state.step)) is not None:
                try:
                    apply(state, checked[1], codec=self._codec, lr=self._lr, momentum=self._momentum)
                except ValueError as error:
                    del self._headers[state.step]
                    self._quarantine(self._update_path(state.step), str(error))
            return state
        return None

    def truncate(self, step: int) -> None:
        """Forget the updates from outer step ``step`` on, and the snapshots after it: the swarm did not share them."""
        # The newest first, so that a crash in the middle leaves an unbroken history.
        snapshots = sorted((s for s in self._snapshots if s > step), reverse=True)
        updates = sorted((s for s in self._headers if s >= step), reverse=True)
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
                os.replace(self._update_path(s), history / self._update_path(s).name)
                self._headers.pop(s, None)
            for old in [*histories, history][:-ABANDONED_KEPT]:
                shutil.rmtree(old)
        logger.warning("ledger: %d updates from outer step %d on moved to %s", len(updates), step, history)

    def _update_path(self, step: int) -> Path:
        return self.folder / "updates" / f"{step:010d}.update"

    def _snapshot_path(self, step: int) -> Path:
        return self.folder / "snapshots" / f"{step:010d}.safetensors"

    def _open_update(self, path: Path) -> None:
        with path.open("rb") as file:
            start = file.read(max_update_start_bytes(self._n))
        try:
            header, _ = open_update(start, path.stat().st_size, n=self._n, codec=self._codec)
            if path != self._update_path(header.step):
                raise ValueError(f"it is update {header.step}")
        except ValueError as error:
            self._quarantine(path, str(error))
        else:
            self._headers[header.step] = header

    def _open_snapshot(self, path: Path) -> None:
        try:
            info = check_snapshot(path, n=self._n, run_id=self._run_id)
            if path != self._snapshot_path(info.step):
                raise ValueError(f"it is the snapshot of outer step {info.step}")
        except ValueError as error:
            self._quarantine(path, str(error))
        else:
            self._snapshots[info.step] = info

    def _read_update(self, step: int) -> tuple[bytes, Update] | None:
        """None, and the ledger without it, when it is gone or damaged."""
        header, path = self._headers.get(step), self._update_path(step)
        if header is None:
            return None
        with disk_errors(path):
            try:
                data = path.read_bytes()
                update = update_from_bytes(data, n=self._n, codec=self._codec)
                if update.header != header:
                    raise ValueError("it is another one than it was")
            except FileNotFoundError:
                self._headers.pop(step, None)
                return None
            except ValueError as error:
                if self._headers.get(step) is header:  # else another thread has just replaced it
                    self._headers.pop(step)
                    self._quarantine(path, str(error))
                return None
        return data, update

    def _read_snapshot(self, info: SnapshotInfo, state: OuterState) -> bool:
        """False, and the ledger without it, when it is gone or damaged."""
        with disk_errors(info.path):
            try:
                read_snapshot(info, state)
            except FileNotFoundError:
                self._snapshots.pop(info.step, None)
                return False
            except ValueError as error:
                self._snapshots.pop(info.step, None)
                self._quarantine(info.path, str(error))
                return False
        return True

    def _add_snapshot(self, info: SnapshotInfo) -> None:
        self._snapshots[info.step] = info
        following = self._headers.get(info.step)
        if following is not None and following.parent != info.head:
            self.truncate(info.step)
        self._prune()

    def _prune(self) -> None:
        """Keeps the newest snapshots, and every update from the oldest of them on."""
        steps = sorted(self._snapshots)[-self._keep_snapshots :]
        with disk_errors(self.folder):
            for step in [s for s in self._snapshots if s < steps[0]]:
                self._snapshots.pop(step).path.unlink(missing_ok=True)
            for step in sorted(s for s in self._headers if s < steps[0]):
                del self._headers[step]
                self._update_path(step).unlink(missing_ok=True)

    def _quarantine(self, path: Path, reason: str) -> None:
        folder = self.folder / "quarantine"
        with disk_errors(path):
            folder.mkdir(exist_ok=True)
            names = (folder / f"{path.name}.{i}" for i in itertools.count())
            target = next(name for name in names if not name.exists())
            os.replace(path, target)
        self.quarantined.append(target)
        logger.warning("ledger: %s moved to %s: %s", path, target, reason)
