"""The updates that a ledger holds: what is known of each, and its file.

Rules of this file: of an update that is held, the header is in memory, and the file had the right size when the ledger
was opened or is one that was written since; the values are verified each time they are read. What is found damaged or
gone is held no more, and remembered as lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from p2p_diloco.core.grid import Grid
from p2p_diloco.core.update import (
    Update,
    UpdateHeader,
    max_update_start_bytes,
    open_update,
    update_from_bytes,
    update_pieces,
)
from p2p_diloco.ledger.chain import Chain
from p2p_diloco.ledger.disk import disk_errors, write_whole
from p2p_diloco.ledger.files import LedgerFiles, move_into


class HeldUpdates:
    """The updates of one ledger. Methods that touch a file may raise LedgerError when the disk fails or is full."""

    def __init__(self, files: LedgerFiles, grid: Grid, chain: Chain) -> None:
        """Takes in the files that are there. What is no update, or none that the chain has, goes to the quarantine."""
        self.lost: dict[int, UpdateHeader] = {}
        """Outer step -> what has been found damaged or gone since opening, and ought to be there."""
        self._files, self._grid = files, grid
        self._headers: dict[int, UpdateHeader] = {}
        for path in files.updates():
            self._open(path, chain)

    def header(self, step: int) -> UpdateHeader | None:
        """Returns the header of the update that leads from ``step`` to ``step + 1``; None where it is not here."""
        return self._headers.get(step)

    def has(self, header: UpdateHeader) -> bool:
        """Returns whether this very update is here."""
        return self._headers.get(header.step) == header

    def path(self, step: int) -> Path:
        """Returns where the update is, or would be, that leads from ``step`` to ``step + 1``."""
        return self._files.update_path(step)

    def following(self, step: int, head: bytes) -> Iterator[UpdateHeader]:
        """Yields the updates that lead on from ``head`` at outer step ``step``, one after the other."""
        while (header := self._headers.get(step)) is not None and header.parent == head:
            yield header
            step, head = step + 1, header.head

    def read(self, step: int) -> tuple[bytes, Update] | None:
        """Returns the update that leads from ``step`` to ``step + 1``, as bytes and decoded, verified. None where it is
        not here, or found damaged or gone, which loses it."""
        header, path = self._headers.get(step), self.path(step)
        if header is None:
            return None
        with disk_errors(path):
            try:
                data = path.read_bytes()
                update = update_from_bytes(data, self._grid)
                if update.header != header:
                    raise ValueError("it is another one than it was")
            except (FileNotFoundError, ValueError) as error:
                self.lose(header, "it is gone" if isinstance(error, FileNotFoundError) else str(error))
                return None
        return data, update

    def write(self, header: UpdateHeader, pieces: Sequence[bytes]) -> None:
        """Writes an update, which is durable on return. ``pieces``: its bytes, as ``sound_pieces`` gives them."""
        write_whole(self.path(header.step), pieces, sum(len(piece) for piece in pieces))
        self._headers[header.step] = header
        self.lost.pop(header.step, None)

    def lose(self, header: UpdateHeader, reason: str) -> None:
        """Goes on without an update whose file is damaged or gone, and remembers that it ought to be here."""
        if self.put_aside(header, reason):
            self.lost[header.step] = header

    def put_aside(self, header: UpdateHeader, reason: str) -> bool:
        """Goes on without an update that does not belong here. Returns False when it is not here any more."""
        if self._headers.get(header.step) is not header:
            return False
        self._headers.pop(header.step)
        self._files.quarantine(self.path(header.step), reason)
        return True

    def since(self, step: int) -> list[int]:
        """Returns the outer steps from ``step`` on whose updates are here, the newest first."""
        return [s for s in sorted(self._headers, reverse=True) if s >= step]

    def move(self, steps: Sequence[int], folder: Path) -> None:
        """Moves the updates of these outer steps, one after the other, into a folder on the same disk."""
        for step in steps:
            move_into(folder, self.path(step))
            self._headers.pop(step, None)

    def prune(self, oldest: int) -> None:
        """Deletes the updates before outer step ``oldest``, and forgets those that are lost there."""
        self.lost = {step: lost for step, lost in self.lost.items() if step >= oldest}
        for step in [s for s in sorted(self._headers) if s < oldest]:
            self._headers.pop(step, None)
            self.path(step).unlink(missing_ok=True)

    def _open(self, path: Path, chain: Chain) -> None:
        try:
            header = read_header(path, self._grid)
            if path != self.path(header.step):
                raise ValueError(f"it is update {header.step}")
            if not chain.has(header):
                raise ValueError("the chain has no certificate of it")
        except ValueError as error:
            self._files.quarantine(path, str(error))
        else:
            self._headers[header.step] = header


def sound_pieces(update: Update, grid: Grid) -> list[bytes]:
    """Returns the bytes of an update, in pieces. Raises ValueError for what opening a ledger would quarantine."""
    pieces = update_pieces(update)
    open_update(pieces[0], sum(len(piece) for piece in pieces), grid)
    return pieces


def read_header(path: Path, grid: Grid) -> UpdateHeader:
    """Returns the header of an update's file. Raises ValueError when the file is none, or of another size than its
    header makes it."""
    with path.open("rb") as file:
        start = file.read(max_update_start_bytes(grid))
    return open_update(start, path.stat().st_size, grid)
