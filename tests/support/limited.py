"""Peers in memory whose incoming streams go through the limits of ``wire.streams``, as those of a real node do."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any, cast

from p2p_diloco.wire.channel import Channel, Handler
from p2p_diloco.wire.streams import Streams
from tests.support.links import FakeTransport, FakeWriter


@dataclass(frozen=True)
class StreamInfo:
    """What p2pd says of a stream: who has opened it, and from where."""

    peer_id: Any
    addr: str = "/memory"


@dataclass(frozen=True)
class Id:
    text: str

    def to_base58(self) -> str:
        return self.text


@dataclass(eq=False)
class Socket:
    """The writer of a stream, and its transport."""

    inner: FakeWriter
    closing: bool = False

    def __post_init__(self) -> None:
        self.write, self.drain, self.transport = self.inner.write, self.inner.drain, self

    def close(self) -> None:
        self.closing = True
        self.inner.close()

    def is_closing(self) -> bool:
        return self.closing

    def set_write_buffer_limits(self, high: int) -> None:
        assert high == 0

    def get_write_buffer_size(self) -> int:
        return 0

    def abort(self) -> None:
        self.closing = True
        self.inner.pipe.end()
        self.inner.pipe.back.end()


@dataclass(eq=False)
class LimitedTransport(FakeTransport):
    streams: Streams = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.streams = Streams(self.timeouts, self.traffic, self.favoured)

    async def _handle(self, handler: Handler, channel: Channel) -> None:
        protocol = next(name for name, known in self.handlers.items() if known == handler)
        self.streams.handlers[protocol] = handler
        socket = cast(asyncio.StreamWriter, Socket(cast(FakeWriter, channel.writer)))
        await self.streams.on_stream(protocol, cast(Any, StreamInfo(Id(channel.peer_id))), channel.reader, socket)
