"""The event log: one event a line in ``events.jsonl`` of the peer's folder, for people, tests and ``swarm``.

``event`` says which events there are, and what their lines are. The network process alone writes them; anybody may read
them meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO

from p2p_diloco.core.errors import LedgerError, disk_failure
from p2p_diloco.core.event import Event, EventsLost, pack_event, parse_event
from p2p_diloco.core.totals import Totals

log = logging.getLogger(__name__)

EVENTS_FILE = "events.jsonl"


class EventLog:
    """Appends whole lines, each on its way to the disk at once. A line that cannot be written is lost and ends
    nothing, since training needs none of them: it is told when the first one is, and when the log goes on."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / EVENTS_FILE
        self.totals = Totals()
        """Of all events since this log was opened."""
        self.unwritten = 0
        """Lines lost since the last one that was written."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = self.path.open("ab", buffering=0)
            self._within_line = _cut_short(self.path)
        except OSError as error:
            full = disk_failure(error, self.path)
            raise full or LedgerError(
                f"{self.path}: cannot be written ({error.strerror}); choose another --folder"
            ) from error

    def write(self, event: Event) -> None:
        """Writes an event, which is now. ValueError where a number in it is not finite."""
        event = replace(event, wall_s=time.time(), mono_s=time.monotonic())
        data = pack_event(event)
        self.totals.add(event)
        try:
            if self.unwritten:
                lost = EventsLost(lines=self.unwritten, wall_s=event.wall_s, mono_s=event.mono_s)
                self._append(pack_event(lost))
                log.warning("%s: can be written again; %d events are lost", self.path, self.unwritten)
                self.unwritten = 0
            self._append(data)
        except OSError as error:
            self.unwritten += 1
            if self.unwritten == 1:
                why = disk_failure(error, self.path) or f"{self.path}: {error.strerror}"
                log.warning("%s; training goes on, and events are lost until then", why)

    def close(self) -> None:
        """Closes the file; nothing waits to be written."""
        with contextlib.suppress(OSError):
            self._file.close()

    def _append(self, data: bytes) -> None:
        data = b"\n" + data if self._within_line else data
        written = self._file.write(data)
        self._within_line = written < len(data)
        if self._within_line:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _cut_short(path: Path) -> bool:
    """Returns whether a crash cut the last line."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        return file.read() not in (b"", b"\n")


class EventTail:
    """The event log below a peer's folder, read while it grows."""

    def __init__(self, folder: Path) -> None:
        self.log: list[Event] = []
        """All that has been read, oldest first."""
        self._folder = folder
        self._path: Path | None = None
        self._read_bytes = 0

    def read(self) -> None:
        """Reads what has been written since the last call, in whole lines; those that tell of no event are left
        out."""
        if self._path is None:
            self._path = next(self._folder.glob(f"*/{EVENTS_FILE}"), None)
            if self._path is None:
                return
        with self._path.open("rb") as file:
            file.seek(self._read_bytes)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._read_bytes += len(whole) + len(newline)
        self.log += parsed(whole.split(b"\n"))


def parsed(lines: Iterable[bytes]) -> Iterator[Event]:
    """Yields the events of the lines that tell of one, as ``parse_event`` has it."""
    for line in lines:
        event = parse_event(line)
        if event is not None:
            yield event


def read_events(path: Path) -> list[Event]:
    """Returns the events of all whole lines; those that tell of none are left out, and so is the one that is being
    written, or was cut by a crash."""
    return list(parsed(path.read_bytes().split(b"\n")[:-1])) if path.exists() else []
