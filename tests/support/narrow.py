"""A peer in memory whose uplink is narrow: all that it sends goes out over one line, frame by frame."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from p2p_diloco.wire.channel import Channel, Writer
from tests.support.links import FakeTransport
from tests.support.lying import override


@dataclass(eq=False)
class Line:
    rate_bytes_per_s: float
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Who waits longest sends next, so streams share the line alike."""


@dataclass(eq=False)
class NarrowWriter:
    line: Line
    inner: Writer
    waiting: bytearray = field(default_factory=bytearray)

    def write(self, data: bytes | memoryview, /) -> None:
        self.waiting += data

    async def drain(self) -> None:
        data = bytes(self.waiting)
        self.waiting.clear()
        async with self.line.turn:
            await asyncio.sleep(len(data) / self.line.rate_bytes_per_s)
            self.inner.write(data)
        await self.inner.drain()

    def close(self) -> None:
        self.inner.close()


def narrow(transport: FakeTransport, rate_bytes_per_s: float) -> None:
    """From now on this is the uplink of this peer."""
    line = Line(rate_bytes_per_s)

    def channel(real: Callable[..., Channel]) -> Callable[..., Channel]:
        def made(peer_id: str, reader: asyncio.StreamReader, writer: Writer) -> Channel:
            return real(peer_id, reader, NarrowWriter(line, writer))

        return made

    override(transport, "_channel", channel)
