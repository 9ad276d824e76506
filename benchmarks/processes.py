"""Processes as Linux shows them: whose they are, and what they hold."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from p2p_diloco.lab.child import read_proc


@dataclass(frozen=True)
class Usage:
    descriptors: int
    resident_mb: float
    """What is shared with others counts in full."""


def usage_of(pid: int) -> Usage | None:
    """None when it is gone."""
    try:
        descriptors = len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return None
    fields = dict(line.split(b":", 1) for line in read_proc(pid, "status").splitlines())
    return Usage(descriptors, int(fields[b"VmRSS"].split()[0]) * 1024 / 1e6) if b"VmRSS" in fields else None


def started_below(temporary: Path) -> dict[int, str]:
    """Pid -> command line of every process that has this TMPDIR, except zombies, which have no environment."""
    mark, found = f"TMPDIR={temporary}\0".encode(), {}
    for entry in Path("/proc").glob("[0-9]*"):
        pid = int(entry.name)
        if mark in read_proc(pid, "environ") and pid != os.getpid():
            found[pid] = read_proc(pid, "cmdline").replace(b"\0", b" ").decode()
    return found
