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

from p2p_diloco.core.errors import Stopped
from p2p_diloco.core.interpreter import SERVING

Result = TypeVar("Result")

STEP_GRACE_S = 2
"""How long Ctrl+C waits for the inner step under way."""


def ending_signals() -> tuple[signal.Signals, ...]:
    """Returns the signals that ask this process to end. SIGHUP is none where it was ignored from the start (nohup)."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return (signal.SIGINT, signal.SIGTERM) if ignored else (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def is_echo(number: int, *, asked: bool) -> bool:
    """Returns whether signal ``number`` only repeats that the terminal was closed, of a process that was ``asked`` to
    end."""
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


class Stop:
    """Ends a command politely at the first Ctrl+C, SIGTERM or closed terminal.

    It raises Stopped, wherever the command is; inside ``after_inner_step`` when the inner step under way has ended, or
    STEP_GRACE_S later; inside ``when_checked`` at the next ``check``. A second signal ends the process at once, unless
    it only repeats that the terminal is closed.
    """

    def __init__(self) -> None:
        self.requested = False
        self._waits_s: int | None = 0
        """How long Stopped waits for what is under way; 0: not at all, None: until it is asked for."""

    def on_signal(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGALRM:
            raise Stopped("stopped in the middle of an inner step")
        if is_echo(number, asked=self.requested):
            return
        if self.requested:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.requested = True
        if self._waits_s == 0:
            raise Stopped("stopped")
        if self._waits_s is not None:
            signal.alarm(self._waits_s)

    def check(self) -> None:
        """Raises Stopped if a signal has come."""
        if self.requested:
            raise Stopped("stopped")

    @contextmanager
    def after_inner_step(self) -> Iterator[None]:
        """Waits with Stopped: whoever trains looks at ``requested`` between inner steps. One that takes longer than
        STEP_GRACE_S is stopped in its middle."""
        try:
            with self._waiting(STEP_GRACE_S):
                yield
        finally:
            signal.alarm(0)

    @contextmanager
    def when_checked(self) -> Iterator[None]:
        """Waits with Stopped until somebody calls ``check``, however long that takes."""
        with self._waiting(None):
            yield

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Waits no longer, inside one of the other two."""
        with self._waiting(0):
            self.check()
            yield

    @contextmanager
    def _waiting(self, seconds: int | None) -> Iterator[None]:
        before, self._waits_s = self._waits_s, seconds
        try:
            yield
        finally:
            self._waits_s = before


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Yields what signals ask of this process until the end of the block. For the main thread only."""
    stop = Stop()
    with handled_by(stop.on_signal, signal.SIGALRM):
        try:
            yield stop
        finally:
            signal.alarm(0)


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
    """Guards imports and checks, before there is anything to tidy up: a signal ends this process there and then. An
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
    """Runs ``work`` as ``asyncio.run`` does, but a signal cancels ``work`` and comes through when that has tidied up:
    KeyboardInterrupt in the midst of the loop's own work may lose a process that is being started."""

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
