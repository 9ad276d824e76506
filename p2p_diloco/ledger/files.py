"""The files of a ledger: where they lie in its folder, and where those go that do not belong there.

    FOLDER/snapshots/0000000010.safetensors   S_10: theta, momentum, and as metadata step, head and digest
    FOLDER/updates/0000000012.update          U_12, which leads from S_12 to S_13
    FOLDER/chain                              header and certificate of every update from the genesis on
    FOLDER/quarantine/                        files found damaged or foreign; never deleted
    FOLDER/abandoned/000001/                  a history that the swarm did not share; the last two are kept

It knows names, and nothing of what is in the files. Every method may raise LedgerError when the disk fails.
"""

from __future__ import annotations

import itertools
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from p2p_diloco.ledger.disk import TEMPORARY, disk_errors, sync

logger = logging.getLogger(__name__)

ABANDONED_KEPT = 2


class LedgerFiles:
    """Names and moves the files of one ledger. Opening makes the folders, and removes what a crash has left half
    written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.quarantined: list[Path] = []
        """Files found damaged or foreign since opening, where they are now."""
        with disk_errors(folder):
            for name in ("updates", "snapshots"):
                (folder / name).mkdir(parents=True, exist_ok=True)
                for path in (folder / name).glob("*" + TEMPORARY):
                    path.unlink()
            self.chain_path.with_name(self.chain_path.name + TEMPORARY).unlink(missing_ok=True)

    def update_path(self, step: int) -> Path:
        """Returns the path of the update that leads from outer step ``step`` to the next."""
        return self.folder / "updates" / f"{step:010d}.update"

    def snapshot_path(self, step: int) -> Path:
        """Returns the path of the snapshot of outer step ``step``."""
        return self.folder / "snapshots" / f"{step:010d}.safetensors"

    @property
    def chain_path(self) -> Path:
        """Returns the path of the chain."""
        return self.folder / "chain"

    def updates(self) -> list[Path]:
        """Returns the files that look like updates, in the order of their names."""
        return sorted((self.folder / "updates").glob("*.update"))

    def snapshots(self) -> list[Path]:
        """Returns the files that look like snapshots, in the order of their names."""
        return sorted((self.folder / "snapshots").glob("*.safetensors"))

    def quarantine(self, path: Path, reason: str) -> None:
        """Moves a file out of the way, under a name that no other one has there. A file that is gone is only logged."""
        if not path.exists():
            logger.warning("ledger: %s is gone", path)
            return
        with disk_errors(path):
            target = self._quarantine_path(path.name)
            os.replace(path, target)
        self.quarantined.append(target)
        logger.warning("ledger: %s moved to %s: %s", path, target, reason)

    def quarantine_tail(self, path: Path, start: int, reason: str) -> None:
        """Moves all of a file from the byte ``start`` on out of the way, as ``quarantine`` does; the whole file, where
        nothing is before."""
        if start == 0:
            self.quarantine(path, reason)
            return
        with disk_errors(path):
            target = self._quarantine_path(path.name)
            with path.open("rb") as file, target.open("wb") as copy:
                file.seek(start)
                shutil.copyfileobj(file, copy)
            sync(target)
            os.truncate(path, start)
            sync(path)
        self.quarantined.append(target)
        logger.warning("ledger: the end of %s moved to %s: %s", path, target, reason)

    def _quarantine_path(self, name: str) -> Path:
        """Returns a path that no file has there."""
        folder = self.folder / "quarantine"
        folder.mkdir(exist_ok=True)
        names = (folder / f"{name}.{i}" for i in itertools.count())
        return next(free for free in names if not free.exists())

    @contextmanager
    def abandoning(self) -> Iterator[Path]:
        """Yields a new folder, into which the block moves a history that the swarm did not share. Afterwards the oldest
        of these folders are deleted, up to the last ABANDONED_KEPT."""
        abandoned = self.folder / "abandoned"
        with disk_errors(abandoned):
            abandoned.mkdir(exist_ok=True)
            histories = sorted(abandoned.glob("[0-9]" * 6))
            history = abandoned / f"{int(histories[-1].name) + 1 if histories else 1:06d}"
            history.mkdir()
            yield history
            for old in [*histories, history][:-ABANDONED_KEPT]:
                shutil.rmtree(old)


def move_into(folder: Path, path: Path) -> None:
    """Moves a file into another folder on the same disk, under its name."""
    os.replace(path, folder / path.name)
