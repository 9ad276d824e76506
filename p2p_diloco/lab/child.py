"""One peer on this machine, as the system sees it: its processes, its output, its event log. Signals to other processes
than the trainer need Linux's /proc.

Its processes are the trainer (of a seed, the same without training), the network process below it, p2pd's guard below
that, and p2pd. The trainer has a session of its own, so that Ctrl+C in a terminal reaches only who started it; if that
is killed, Linux kills the trainer, and the others end with it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import IO

from p2p_diloco.core.event import Event, PeerStarted, latest
from p2p_diloco.core.events import EventTail
from p2p_diloco.core.interpreter import python_command
from p2p_diloco.lab.faults import STARTED_AGAIN, ProcessName
from p2p_diloco.ledger.disk import disk_errors
from p2p_diloco.wire.guard import die_with_parent


class Child:
    """A peer and its processes. ``start`` and ``send`` act; the rest looks."""

    process: subprocess.Popen[bytes]
    """The trainer, from ``start`` on."""

    def __init__(self, name: str, folder: Path, *, options: Sequence[str], enter: Sequence[str] = ()) -> None:
        """Starts nothing yet. ``options``: of every start, where it listens among them. ``enter``: what a command
        begins with to run in this peer's own network."""
        self.name, self.folder, self.options, self.enter = name, folder, list(options), list(enter)
        self.tail = EventTail(folder)
        self.felled = False
        """A fault has killed it: its end is no failure of its own."""
        self.started_s = 0.0
        self._hit: tuple[int, ...] = ()
        """Processes that may outlive the trainer for a moment, since a fault has killed one of them."""

    def start(self, *arguments: str) -> None:
        """Starts it with these arguments of Python, the program first. Started again, it takes up where it ended."""
        command = [*self.enter, *python_command(*arguments), "--folder", str(self.folder)]
        command += [*self.options, "--name", self.name]
        self.felled, self.started_s = False, time.monotonic()
        with self._output() as output:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=partial(die_with_parent, signal.SIGKILL),
            )

    def _output(self) -> IO[bytes]:
        """Returns the file that it prints to, open at its end. LedgerError when it cannot be made."""
        path = self.folder / "output.log"
        with disk_errors(path):
            self.folder.mkdir(exist_ok=True)
            return path.open("ab")

    def send(self, number: signal.Signals, to: ProcessName) -> tuple[int, ...]:
        """Sends a signal, and returns the pids of the processes that got it."""
        found = self.processes()
        pids = tuple(pid for name, pid in found.items() if to in (name, "all"))
        if number == signal.SIGKILL and pids:
            self._hit = tuple(found.values())
            self.felled = self.felled or to not in STARTED_AGAIN
        for pid in pids:
            send_signal(pid, number)
        return pids

    def processes(self) -> dict[str, int]:
        """Returns name -> pid of those that run now: trainer, network, guard, p2pd. Each is a child of the one
        before."""
        if not is_alive(self.process.pid):
            return {}
        parent = self.process.pid
        found = {"trainer": parent}
        for name, mark in (("network", b"p2p_diloco.peer.network"), ("guard", b"guard.py"), ("p2pd", b"p2pd")):
            below = [pid for pid in children_of(parent) if mark in read_proc(pid, "cmdline")]
            if not below:
                break
            parent = found[name] = below[0]
        return found

    @property
    def running(self) -> bool:
        """Returns whether the trainer has not ended."""
        return self.process.poll() is None

    @property
    def living(self) -> bool:
        """Returns whether it runs, and is not about to die: what is killed takes a while to end."""
        return self.running and not self.felled

    @property
    def ended(self) -> bool:
        """Returns whether nothing is left of it."""
        return not self.running and not any(map(is_alive, self._hit))

    @property
    def addresses(self) -> tuple[str, ...]:
        """Returns the addresses at which others reach it; none before it has started."""
        started = latest(self.tail.log, PeerStarted)
        if started is None or started.mono_s < self.started_s or not self.living:
            return ()
        return started.maddrs

    @property
    def address(self) -> str | None:
        """Returns the first of its addresses; None before it has started."""
        return next(iter(self.addresses), None)

    @property
    def log(self) -> Sequence[Event]:
        """Returns its events, as far as ``tail`` has read them."""
        return self.tail.log

    @property
    def failed(self) -> bool:
        """Returns whether it ended by itself, with an error."""
        return self.process.poll() not in (None, 0) and not self.felled

    @property
    def fate(self) -> str | None:
        """Returns how it ended; None while it runs."""
        return None if self.running else "failed" if self.failed else "killed" if self.felled else "done"

    @property
    def output(self) -> str:
        """Returns what it has printed, of all starts."""
        return (self.folder / "output.log").read_text(encoding="utf-8", errors="replace")

    def last_line(self) -> str:
        """Returns the last line of its output: where it failed, the reason."""
        lines = self.output.split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


def send_signal(pid: int, number: signal.Signals) -> None:
    """Sends a signal to a process, which may have ended meanwhile."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def children_of(pid: int) -> list[int]:
    """Returns the pids of a process's children."""
    return [int(child) for child in read_proc(pid, f"task/{pid}/children").split()]


def is_alive(pid: int) -> bool:
    """Returns whether a process runs; a zombie does not."""
    state = read_proc(pid, "stat").rpartition(b")")[2].split()[:1]
    return state not in ([], [b"Z"], [b"X"])


def read_proc(pid: int, name: str) -> bytes:
    """Returns the bytes of a file below /proc/PID; empty when the process is gone, or somebody else's."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""
