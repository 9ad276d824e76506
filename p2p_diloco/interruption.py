"""Ctrl+C and SIGTERM in a command: when they may interrupt it, and with what exit code it then ends."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from p2p_diloco import SERVING

Result = TypeVar("Result")


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """SIGTERM as Ctrl+C: KeyboardInterrupt, wherever the command is. Yields the signals that came."""
    received: list[int] = []

    def on_signal(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def importing(command: str) -> Iterator[None]:
    """For imports and checks, before there is anything to tidy up: a signal ends this process there and then. An
    exception may get lost in the midst of imports, and in torch's, which are also hivemind's, it would end in a page of
    C++."""

    def on_signal(number: int, _frame: FrameType | None) -> None:
        os._exit(interrupted(command, [number]))

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def undisturbed() -> Iterator[list[int]]:
    """Signals wait until the end of the block. Yields those that wait."""
    waiting: list[int] = []
    before = {
        number: signal.signal(number, lambda received, _frame: waiting.append(received))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield waiting
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if waiting:
        signal.raise_signal(waiting[0])


def run_cancellable(work: Coroutine[Any, Any, Result]) -> Result:
    """As ``asyncio.run``, but a signal cancels ``work`` and comes through when that has tidied up: KeyboardInterrupt in
    the midst of the loop's own work may lose a process that is being started."""

    async def cancellable(waiting: list[int]) -> Result:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def on_signal(number: int, _frame: FrameType | None) -> None:
            waiting.append(number)
            if not loop.is_closed():
                loop.call_soon_threadsafe(task.cancel)

        for number in (signal.SIGINT, signal.SIGTERM):
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
