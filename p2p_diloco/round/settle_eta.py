"""How whoever waits for a word in a round hears that its answer still comes: an Eta, from time to time."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from p2p_diloco.core.waiting import heard, now_s
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.message import Message
from p2p_diloco.wire.round_messages import Eta

M = TypeVar("M", bound=Message)
T = TypeVar("T")


async def telling(channel: Channel, work: Coroutine[Any, Any, T], every_s: float) -> T:
    """Returns what ``work`` comes to, which may take a while; the other side hears every ``every_s`` that I am still
    here."""
    task = asyncio.create_task(work)
    try:
        while not task.done():
            await asyncio.wait((task,), timeout=every_s)
            if not task.done():
                await channel.send(Eta(eta_s=every_s))
        return task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def keep_waiting(channel: Channel, changed: asyncio.Event, next_word_s: float, every_s: float) -> float:
    """Waits until something has changed, or until ``next_word_s`` on the loop's clock: then tells the peer that waits
    for an answer that I am still here. Returns when the next such word is due, ``every_s`` after this one."""
    await heard(changed, max(next_word_s - now_s(), 0.0))
    if now_s() < next_word_s:
        return next_word_s
    await channel.send(Eta(eta_s=every_s))
    return now_s() + every_s


async def beyond_etas(channel: Channel, word: Eta | M, *kinds: type[M], timeout_s: float) -> M:
    """Returns the first word, from ``word`` on, that is no Eta: one of ``kinds``. Raises Silent when the next one takes
    longer than ``timeout_s``; else as ``Channel.receive``."""
    while isinstance(word, Eta):
        word = await channel.receive(Eta, *kinds, timeout_s=timeout_s)
    return word
