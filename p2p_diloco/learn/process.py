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
from typing import Any, Protocol

from p2p_diloco.core.config import PeerConfig, Timeouts
from p2p_diloco.core.errors import NetworkError, UsageError
from p2p_diloco.core.interpreter import python_command
from p2p_diloco.peer.control import Line, has_room, pack_line, socket_pair, unpack_line

log = logging.getLogger(__name__)

POLL_S = 0.2
LEAVE_S = 5.5
"""After that the network process is killed; its guard ends p2pd."""
ORPHAN_S = 4.0
"""A trainer whose network process died ends itself after this long, even inside a long inner step."""


class Process(Protocol):
    """What is needed of the network process beyond its socket; ``subprocess.Popen`` has it."""

    def wait(self, timeout: float | None = None) -> int: ...

    def kill(self) -> None: ...


class NetworkHandle:
    """Used from one thread; another one, of its own, reads what the network process says."""

    closes_s: float | None = None
    """When the round closes that others are ready for, on this process's clock."""
    behind: bool = False
    """The swarm has moved on."""

    def __init__(self, control: socket, process: Process) -> None:
        """``control``: the trainer's end, ours from now on."""
        self.rows: list[dict[str, Any]] = []
        """Everybody's record, mine first; renewed every second."""
        self.evaluation: tuple[int, float] | None = None
        """(outer step, held-out loss) of the newest evaluation that is believed; renewed every second."""
        self._answers: queue.Queue[Line] = queue.Queue()
        self._leaving = False
        self._control, self._process = control, process
        self._reader = threading.Thread(target=self._read, name="network process", daemon=True)
        self._reader.start()

    @classmethod
    def start(
        cls, config: PeerConfig, timeouts: Timeouts, role: str, manifest_path: Path | None, memory: int
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
        handle.say(
            "start",
            # not pydantic's JSON, which has no way to say a path with bytes that are no text
            config={key: str(value) if isinstance(value, Path) else value for key, value in config},
            timeouts=vars(timeouts),
            role=role,
            manifest_path=None if manifest_path is None else str(manifest_path),
        )
        return handle

    def say(self, kind: str, **fields: Any) -> None:
        try:
            self._control.sendall(pack_line(kind, **fields))
        except OSError:
            return  # The network process is gone: the reader thread has seen it, and ``wait`` says it.

    def has_room(self) -> bool:
        """Whether it would hear me at once; not while it is stopped."""
        return has_room(self._control)

    def wait(self, *kinds: str) -> Line:
        """The next answer of one of these kinds. Raises what ended the network process, if it ends first. Signal
        handlers run meanwhile, and may raise."""
        while True:
            try:
                line = self._answers.get(timeout=POLL_S)
            except queue.Empty:
                continue
            if line["kind"] == "failed":
                raise failure(line)
            if line["kind"] in kinds:
                return line

    def check(self) -> None:
        """Raises what ended the network process, if it has ended."""
        for line in list(self._answers.queue):
            if line["kind"] == "failed":
                raise failure(line)

    def close(self, reason: str) -> None:
        """Have it say goodbye, and end it; within 10 s, whatever it does."""
        self._leaving = True
        if self.has_room():
            self.say("leave", reason=reason)
        try:
            self._process.wait(LEAVE_S)
        except subprocess.TimeoutExpired:
            log.warning("the network process does not leave; ending it")
            self._process.kill()
            self._process.wait()
        self._reader.join(1.0)
        self._control.close()

    def _read(self) -> None:
        """Thread: sorts what the network process says, until it is gone. One that is killed may leave half a line, and
        a reset instead of an end. Whatever ends this thread, who waits for an answer hears that none will come."""
        try:
            with self._control.makefile("rb") as stream, contextlib.suppress(ConnectionError):
                for data in stream:
                    if data.endswith(b"\n"):
                        self._on_line(unpack_line(data))
        finally:
            self._answers.put({"kind": "failed", "message": "the network process died", "exit_code": 1})
            if not self._leaving:
                self._end_orphan()

    def _on_line(self, line: Line) -> None:
        if line["kind"] == "log":
            logging.getLogger(line["name"]).log(line["level"], "%s", line["text"])
        elif line["kind"] == "news":
            closes_in_s = line["closes_in_s"]
            self.closes_s = None if closes_in_s is None else time.monotonic() + closes_in_s
            self.behind = line["behind"]
        elif line["kind"] == "peers":
            self.rows = line["rows"]
            self.evaluation = None if line["evaluation"] is None else tuple(line["evaluation"])
        else:
            if line["kind"] == "result":  # what was news before this outer step is so no longer
                self.closes_s, self.behind = None, False
            self._answers.put(line)

    def _end_orphan(self) -> None:
        """The network process is gone, killed perhaps: this process must not go on for ever without it."""
        deadline_s = time.monotonic() + ORPHAN_S
        while time.monotonic() < deadline_s:
            if self._leaving:
                return
            time.sleep(POLL_S)
        print("error: the network process died; this peer ends", file=sys.stderr, flush=True)
        os._exit(1)


def failure(line: Line) -> NetworkError | UsageError:
    """What ended the network process, as it told us."""
    return (UsageError if line["exit_code"] == 2 else NetworkError)(line["message"])
