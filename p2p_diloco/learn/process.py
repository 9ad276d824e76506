"""The network process, as its trainer holds it: started, spoken to, ended. ``control`` has what they say."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from socket import socket
from typing import Protocol, TypeVar

from p2p_diloco.core.config import PeerConfig, Timeouts
from p2p_diloco.core.errors import NetworkError, UsageError
from p2p_diloco.core.interpreter import python_command
from p2p_diloco.core.peer_row import PeerRow
from p2p_diloco.core.records import Role
from p2p_diloco.peer.control import (
    Failed,
    FromNetwork,
    FromTrainer,
    Leave,
    LogLine,
    News,
    OuterResult,
    Peers,
    Start,
    has_room,
    pack_line,
    socket_pair,
    unpack_line,
)

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

POLL_S = 0.2
LEAVE_S = 5.5
"""After that the network process is killed; its guard ends p2pd."""
ORPHAN_S = 4.0
"""A trainer whose network process died ends itself after this long, even inside a long inner step."""


class Process(Protocol):
    """Is what is needed of the network process beyond its socket; ``subprocess.Popen`` has it."""

    def wait(self, timeout: float | None = None) -> int: ...

    def kill(self) -> None: ...


class NetworkHandle:
    """Used from one thread; another one, of its own, reads what the network process says."""

    closes_s: float | None = None
    """When the round closes that others are ready for, on this process's clock."""
    behind: bool = False
    """The swarm has moved on."""

    def __init__(self, control: socket, process: Process) -> None:
        """Takes over ``control``, the trainer's end of the socket."""
        self.rows: tuple[PeerRow, ...] = ()
        """Everybody, me first; renewed every second."""
        self.evaluation: tuple[int, float] | None = None
        """(outer step, held-out loss) of the newest evaluation that is believed; renewed every second."""
        self._answers: queue.Queue[FromNetwork | FromTrainer] = queue.Queue()
        self._leaving = False
        self._end = Failed(message="the network process died", exit_code=1)
        """What ended it, when it has ended: what it has said of that, if it could."""
        self._control, self._process = control, process
        self._reader = threading.Thread(target=self._read, name="network process", daemon=True)
        self._reader.start()

    @classmethod
    def start(
        cls, config: PeerConfig, timeouts: Timeouts, role: Role, manifest_path: Path | None, memory: int
    ) -> NetworkHandle:
        """Starts the network process. ``memory``: descriptor of what both processes share; it stays the caller's."""
        control, theirs = socket_pair()
        with theirs:
            process = subprocess.Popen(
                python_command("-m", "p2p_diloco.peer.network", str(theirs.fileno()), str(memory)),
                pass_fds=(theirs.fileno(), memory),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        handle = cls(control, process)
        handle.say(Start(config=config, timeouts=timeouts, role=role, manifest_path=manifest_path))
        return handle

    def say(self, line: FromTrainer) -> None:
        try:
            self._control.sendall(pack_line(line))
        except OSError:
            return  # The network process is gone: the reader thread has seen it, and ``wait`` says it.

    def has_room(self) -> bool:
        """Returns whether it would hear me at once; not while it is stopped."""
        return has_room(self._control)

    def wait(self, *kinds: type[Answer]) -> Answer:
        """Returns the next answer of one of these kinds. Raises what ended the network process, if it ends first.
        Signal handlers run meanwhile, and may raise."""
        while True:
            try:
                line = self._answers.get(timeout=POLL_S)
            except queue.Empty:
                continue
            if isinstance(line, Failed):
                raise failure(line)
            if isinstance(line, kinds):
                return line

    def check(self) -> None:
        """Raises what ended the network process, if it has ended."""
        for line in list(self._answers.queue):
            if isinstance(line, Failed):
                raise failure(line)

    def close(self, reason: str) -> None:
        """Lets it say goodbye, and ends it; within 10 s, whatever it does."""
        self._leaving = True
        if self.has_room():
            self.say(Leave(reason=reason))
        try:
            self._process.wait(LEAVE_S)
        except subprocess.TimeoutExpired:
            log.warning("the network process does not leave; ending it")
            self._process.kill()
            self._process.wait()
        self._reader.join(1.0)
        self._control.close()

    def _read(self) -> None:
        """Sorts, in a thread, what the network process says, until it is gone. One that is killed may leave
        half a line, and a reset instead of an end. Whatever ends this thread, who waits for an answer hears that none
        will come."""
        try:
            with self._control.makefile("rb") as stream, contextlib.suppress(ConnectionError):
                for data in stream:
                    if data.endswith(b"\n"):
                        self._on_line(unpack_line(data))
        finally:
            self._answers.put(self._end)
            if not self._leaving:
                self._end_orphan()

    def _on_line(self, line: FromNetwork | FromTrainer) -> None:
        if isinstance(line, LogLine):
            logging.getLogger(line.name).log(line.level, "%s", line.text)
        elif isinstance(line, News):
            self.closes_s = None if line.closes_in_s is None else time.monotonic() + line.closes_in_s
            self.behind = line.behind
        elif isinstance(line, Peers):
            self.rows, self.evaluation = line.rows, line.evaluation
        else:
            if isinstance(line, OuterResult):  # what was news before this outer step is so no longer
                self.closes_s, self.behind = None, False
            elif isinstance(line, Failed):
                self._end = line
            self._answers.put(line)

    def _end_orphan(self) -> None:
        """Ends this process, which must not go on for ever without the network process, once that is gone. A person is
        told why here, for the trainer may be in a long inner step, or read its text."""
        deadline_s = time.monotonic() + ORPHAN_S
        while time.monotonic() < deadline_s:
            if self._leaving:
                return
            time.sleep(POLL_S)
        print(f"error: {self._end.message}; this peer ends", file=sys.stderr, flush=True)
        os._exit(self._end.exit_code)


def failure(line: Failed) -> NetworkError | UsageError:
    """Returns what ended the network process, as it told us."""
    return (UsageError if line.exit_code == 2 else NetworkError)(line.message)
