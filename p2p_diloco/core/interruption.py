"""Ctrl+C, SIGTERM and a closed terminal in a command: when they may interrupt it, and with what exit code it then ends.

A closed terminal (SIGHUP) is told twice, by the shell and by the system: the second one is no wish to end at once.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from p2p_diloco.core.interpreter import SERVING

Result = TypeVar("Result")


def ending_signals() -> tuple[signal.Signals, ...]:
    """Returns the signals that ask this process to end. SIGHUP is none where it was ignored from the start (nohup)."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return (signal.SIGINT, signal.SIGTERM) if ignored else (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def is_echo(number: int, *, asked: bool) -> bool:
    """Whether signal ``number`` only repeats that the terminal was closed, of a process that was ``asked`` to end."""
    return asked and number == signal.SIGHUP


@contextmanager
def handled_by(on_signal: Callable[[int, FrameType | None], None], *more: signal.Signals) -> Iterator[None]:
    """Calls ``on_signal`` for the ending signals and ``more`` until the end of the block. In the main thread only."""
    before = {number: signal.signal(number, on_signal) for number in (*ending_signals(), *more)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Treats every ending signal as Ctrl+C: KeyboardInterrupt, wherever the command is. Yields those that came."""
    received: list[int] = []

    def on_signal(number: int, _frame: FrameType | None) -> None:
        echo = is_echo(number, asked=bool(received))
        received.append(number)
        if not echo:
            raise KeyboardInterrupt

    with handled_by(on_signal):
        yield received


@contextmanager
def importing(command: str) -> Iterator[None]:
    """For imports and checks, before there is anything to tidy up: a signal ends this process there and then. An
    exception may get lost in the midst of imports, and in torch's, which are also hivemind's, it would end in a page of
    C++."""

    def on_signal(number: int, _frame: FrameType | None) -> None:
        os._exit(interrupted(command, [number]))

    with handled_by(on_signal):
        yield


@contextmanager
def undisturbed() -> Iterator[list[int]]:
    """Signals wait until the end of the block. Yields those that wait."""
    waiting: list[int] = []
    with handled_by(lambda number, _frame: waiting.append(number)):
        yield waiting
    if waiting:
        signal.raise_signal(waiting[0])


def run_cancellable(work: Coroutine[Any, Any, Result]) -> Result:
    """As ``asyncio.run``, but a signal cancels ``work`` and comes through when that has tidied up: KeyboardInterrupt in
    the midst of the loop's own work may lose a process that is being started."""

    async def cancellable(waiting: list[int]) -> Result:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def on_signal(number: int, _frame: FrameType | None) -> None:
            echo = is_echo(number, asked=bool(waiting))
            waiting.append(number)
            if not echo and not loop.is_closed():
                loop.call_soon_threadsafe(task.cancel)

        for number in ending_signals():
            signal.signal(number, on_signal)
        if waiting:
            task.cancel()
        return await work

    with undisturbed() as waiting:
        try:
            return asyncio.run(cancellable(waiting))
        except asyncio.CancelledError:
            pass
    raise KeyboardInterrupt


def interrupted(command: str, received: Sequence[int]) -> int:
    return 0 if command in SERVING else 128 + (received[-1] if received else signal.SIGINT)
