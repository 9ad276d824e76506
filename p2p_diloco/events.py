"""The event log: one JSON object a line in ``events.jsonl`` of the peer's folder, for people, tests and ``swarm``.

Every event has ``event``, ``wall_s`` (Unix time) and ``mono_s`` (seconds of a clock that is never set back), and:

    started     peer_id, pid, run_id, run_name, role, version, maddrs
    joined      step, head, from_step (null for a newcomer), snapshot, seconds
    inner       step, inner_step, planned, loss, tokens, tokens_per_s          about once a second, and at the last one
    round       step, committed, reason, detail, group, lost, head (after it), gather_s, reduce_s, settle_s, apply_s,
                bytes_sent, bytes_received                                      one per attempt
    stall       step, seconds        from the end of the last inner step to the start of the next, after an outer step
    caught_up   from_step, to_step, rolled_back, snapshot, bytes_received, seconds
    evaluated   step, held_out_loss (null: not finite), tokens, seconds
    left        step, head, reason

Heads are hex. Losses are nats per token.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import IO, Any

from p2p_diloco.errors import LedgerError

EVENTS_FILE = "events.jsonl"


class EventLog:
    """Appends; whole lines, flushed one by one. A full disk ends the peer, as it does for the ledger."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / EVENTS_FILE
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

    def close(self) -> None:
        self._file.close()


def _cut_short(path: Path) -> bool:
    """Whether a crash cut the last line."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        return file.read() not in (b"", b"\n")


def read_events(path: Path) -> list[dict[str, Any]]:
    """All whole lines; the one that is being written, or was cut by a crash, is left out."""
    if not path.exists():
        return []
    events = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events
