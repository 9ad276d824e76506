"""The event log: one JSON object a line in ``events.jsonl`` of the peer's folder, for people, tests and ``swarm``.

Every event has ``event``, ``wall_s`` (Unix time) and ``mono_s`` (seconds of a clock that is never set back), and:

    started     peer_id, pid, run_id, run_name, role, version, maddrs
    joined      step, head, from_step (null for a newcomer), snapshot, seconds
    phase       phase, step          a phase of the peer's record begins; or "snapshot": one is being written,
                                     "download": one is being fetched, "serve": updates or a snapshot are being sent
                                     (once a stream)
    inner       step, inner_step, planned, loss, tokens, tokens_per_s          about once a second, and at the last one
    offered     step, tokens         the trainer offers what it learned from so many tokens since it took theta
    round       step, committed, reason, detail, group, dropped (who contributes nothing), lost, head (after it),
                gather_s, reduce_s, settle_s, apply_s, bytes_sent, bytes_received                     one per attempt
                and, if committed, contribution_norm, update_norm, cosine (of ``alignment``)
    stall       step, seconds        from the end of the last inner step to the start of the next, after an outer step
    caught_up   from_step, to_step, rolled_back, snapshot, bytes_received, donors, seconds
    repaired    what ("state", "snapshot", "update"), step (where a state or snapshot stands, which an update ends), how
                ("replayed" from other files, "fetched" from a peer, "rewritten": a fresh snapshot stands in for it)
    disputed    step, others: peers that came the same way, but whose state has other bits there
    p2pd_restarted maddrs           p2pd was lost, and is there again
    evaluated   step, held_out_loss (null: not finite), tokens, seconds
    left        step, head, reason

Heads are hex. Losses are nats per token.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from p2p_diloco.errors import LedgerError
from p2p_diloco.totals import Totals

EVENTS_FILE = "events.jsonl"
Event = dict[str, Any]


class EventLog:
    """Appends; whole lines, flushed one by one. A full disk ends the peer, as it does for the ledger."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / EVENTS_FILE
        self.totals = Totals()
        """Of what has been written since this log was opened."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file: IO[str] = self.path.open("a", encoding="utf-8", buffering=1)
            if _cut_short(self.path):
                self._file.write("\n")
        except OSError as error:
            raise LedgerError(f"{self.path}: cannot be written ({error.strerror}); choose another --folder") from error

    def write(self, event: str, **fields: Any) -> None:
        line = {"event": event, "wall_s": time.time(), "mono_s": time.monotonic(), **fields}
        try:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
        except OSError as error:
            raise LedgerError(f"{self.path}: cannot be written ({error.strerror})") from error
        self.totals.add(line)

    def close(self) -> None:
        self._file.close()


def _cut_short(path: Path) -> bool:
    """Whether a crash cut the last line."""
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
        """What has been written since the last call, in whole lines; one that a crash cut is left out."""
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
    for line in lines:
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def read_events(path: Path) -> list[Event]:
    """All whole lines; the one that is being written, or was cut by a crash, is left out."""
    return list(parsed(path.read_bytes().split(b"\n")[:-1])) if path.exists() else []
