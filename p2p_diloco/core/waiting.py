"""Waits that end: at an event, at a time, or at a cancellation, which is never lost.

``asyncio.wait_for`` before Python 3.12 forgets a cancellation that comes in the same turn of the loop as the result; a
task that waits in a loop then goes on for ever. ``deadline`` does not.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Collection, Coroutine
from typing import Any, TypeVar

if sys.version_info >= (3, 11):
    from asyncio import timeout as deadline
else:
    from async_timeout import timeout as deadline

__all__ = ["Bell", "cancel_and_wait", "deadline", "heard", "now_s", "run_all", "run_beside", "to_its_end"]

T = TypeVar("T")


def now_s() -> float:
    """Returns the time of the running event loop, which all deadlines inside a process are times of."""
    return asyncio.get_running_loop().time()


class Bell:
    """Wakes all who wait for a change. Take ``event`` before reading the state: then no ring can be missed."""

    def __init__(self) -> None:
        self.event = asyncio.Event()

    def ring(self) -> None:
        self.event.set()
        self.event = asyncio.Event()


async def heard(event: asyncio.Event, timeout_s: float) -> None:
    """Returns when ``event`` is set, at the latest after ``timeout_s``."""
    try:
        async with deadline(timeout_s):
            await event.wait()
    except asyncio.TimeoutError:
        return


async def to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Runs what tidies up, bounded in time: a cancellation comes through when it is done, and only a second one ends
    it."""
    running = asyncio.ensure_future(work)
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        await running
        raise


async def run_all(*work: Coroutine[Any, Any, object]) -> None:
    """Runs all to their end. The first exception ends the others and is raised: none goes on unwatched."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def run_beside(work: Coroutine[Any, Any, T], beside: Coroutine[Any, Any, None]) -> T:
    """Runs ``work`` to its end, and ``beside`` no longer than that. Returns what ``work`` does. The first exception of
    either ends both and is raised."""
    tasks: tuple[asyncio.Future[Any], ...]
    tasks = first, second = asyncio.ensure_future(work), asyncio.ensure_future(beside)
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if second.done():
            await second
        return await first
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def cancel_and_wait(tasks: Collection[asyncio.Task[Any]], timeout_s: float) -> None:
    """Cancels tasks, and returns when they have ended, or after ``timeout_s``. Those that have not ended by then are
    left alone."""
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(list(tasks), timeout=timeout_s)
