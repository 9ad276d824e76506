"""Processes of a benchmark: each has a pipe to us and a session of its own, and none outlives the block.

with Workers(limit_s=60) as workers:
    workers.start(target, argument)        # target(pipe, argument) in a new process
    workers.receive(0)                     # what it sent; TimeoutError 60 s after the block began
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Any

from p2p_diloco.wire.guard import die_with_parent

LEAVE_S = 12.0
"""For a process that has nothing more to do to end by itself; a peer says goodbye within 10 s."""


class Workers:
    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self.deadline_s = time.monotonic() + limit_s
        self.processes: list[SpawnProcess] = []
        self.pipes: list[Connection] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for pipe in self.pipes:
            pipe.close()
        leave_by_s = time.monotonic() + (LEAVE_S if error is None else 0.0)
        for process in self.processes:
            process.join(max(0.0, leave_by_s - time.monotonic()))
            end_session(process)

    def start(self, target: Callable[..., None], *arguments: object) -> None:
        spawn = multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=work, args=(target, theirs, *arguments))
        process.start()
        theirs.close()
        self.processes.append(process)
        self.pipes.append(ours)

    def receive(self, rank: int) -> Any:
        """TimeoutError when the worker is not done in time, RuntimeError when it ended."""
        if not self.pipes[rank].poll(max(0.0, self.deadline_s - time.monotonic())):
            raise TimeoutError(f"worker {rank} was not done after {self.limit_s:.0f} s")
        try:
            return self.pipes[rank].recv()
        except (EOFError, ConnectionResetError):
            raise RuntimeError(f"worker {rank} ended; its error is above") from None

    def receive_all(self) -> list[Any]:
        return [self.receive(rank) for rank in range(len(self.pipes))]

    def send_all(self, message: object) -> None:
        for pipe in self.pipes:
            pipe.send(message)


def work(target: Callable[..., None], pipe: Connection, *arguments: object) -> None:
    """In the worker. Its pipe closes when the benchmark is over."""
    os.setsid()
    die_with_parent(signal.SIGKILL)
    try:
        target(pipe, *arguments)
    except EOFError:
        return


def end_session(process: SpawnProcess) -> None:
    """Kill what is left of a worker's session. A worker that has not made its session yet is killed alone."""
    assert process.pid is not None
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()
    process.join()
