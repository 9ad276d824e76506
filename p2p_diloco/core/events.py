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
                and, if committed, contribution_norm, update_norm, cosine (of ``aggregate.Alignment``)
    stall       step, seconds        from the end of the last inner step to the start of the next, after an outer step
    caught_up   from_step, to_step, rolled_back, snapshot, bytes_received, donors, seconds
    repaired    what ("state", "snapshot", "update"), step (where a state or snapshot stands, which an update ends), how
                ("replayed" from other files, "fetched" from a peer, "rewritten": a fresh snapshot stands in for it)
    disputed    step, others: peers that came the same way, but whose state has other bits there
    p2pd_restarted maddrs           p2pd was lost, and is there again
    evaluated   step, held_out_loss (null: not finite), tokens, seconds
    unwritten   lines: so many before this one are lost, for the disk was full
    left        step, head, reason

Heads are hex. Losses are nats per token.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from p2p_diloco.core.errors import LedgerError, disk_failure

log = logging.getLogger(__name__)

EVENTS_FILE = "events.jsonl"
Event = dict[str, Any]


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

    def write(self, event: str, **fields: Any) -> None:
        line = {"event": event, "wall_s": time.time(), "mono_s": time.monotonic(), **fields}
        data = _packed(line)
        self.totals.add(line)
        try:
            if self.unwritten:
                times = {key: line[key] for key in ("wall_s", "mono_s")}
                self._append(_packed({"event": "unwritten", **times, "lines": self.unwritten}))
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


def _packed(event: Event) -> bytes:
    """Returns the line of an event. ValueError for what JSON cannot say."""
    return json.dumps(event, allow_nan=False).encode() + b"\n"


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
        """Reads what has been written since the last call, in whole lines; one that a crash cut is left out."""
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
    """Returns all whole lines; the one that is being written, or was cut by a crash, is left out."""
    return list(parsed(path.read_bytes().split(b"\n")[:-1])) if path.exists() else []


LIMITS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0)
"""Up to which durations are told apart: from a round on one machine to one that takes all of its time."""
ROUND_PHASES = ("gather", "reduce", "settle", "apply")


@dataclass(kw_only=True)
class Durations:
    """``counts[i]``: those of at most ``LIMITS_S[i]`` that are longer than the limit before; the last one: the rest."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(LIMITS_S) + 1))
    sum_s: float = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(LIMITS_S, seconds)] += 1
        self.sum_s += seconds


@dataclass(frozen=True, kw_only=True)
class LastCommit:
    """Of the last round that committed here, as its event says."""

    wall_s: float
    contribution_norm: float | None
    """None where theta was not finite; so the two below."""
    update_norm: float | None
    cosine: float | None


@dataclass(kw_only=True)
class Totals:
    """Of this process's events. Events of other kinds, or with other fields, count for nothing."""

    rounds: Counter[str] = field(default_factory=Counter)
    """By result: "committed", or why not."""
    phases: dict[str, Durations] = field(default_factory=lambda: {phase: Durations() for phase in ROUND_PHASES})
    """Of the rounds that came so far."""
    stalls: Durations = field(default_factory=Durations)
    members_lost: int = 0
    last_commit: LastCommit | None = None
    catch_ups: int = 0
    rolled_back: int = 0
    """Outer steps given up."""
    disputes: int = 0
    """Times that others named another digest of a state."""
    repairs: Counter[str] = field(default_factory=Counter)
    """By what was repaired."""

    def add(self, line: Mapping[str, Any]) -> None:
        """``line``: one event, as it stands in the log."""
        match line:
            case {"event": "round", "group": group, "lost": lost, "committed": committed, "reason": reason}:
                self.rounds["committed" if committed else reason] += 1
                self.members_lost += len(lost)
                ran = ROUND_PHASES if committed else ROUND_PHASES[:3] if group else ROUND_PHASES[:1]
                for phase in ran:
                    self.phases[phase].add(line[f"{phase}_s"])
                if committed:
                    self.last_commit = LastCommit(
                        wall_s=line["wall_s"],
                        contribution_norm=line.get("contribution_norm"),
                        update_norm=line.get("update_norm"),
                        cosine=line.get("cosine"),
                    )
            case {"event": "stall", "seconds": seconds}:
                self.stalls.add(seconds)
            case {"event": "caught_up", "rolled_back": rolled_back}:
                self.catch_ups += 1
                self.rolled_back += rolled_back
            case {"event": "disputed"}:
                self.disputes += 1
            case {"event": "repaired", "what": what}:
                self.repairs[what] += 1
