"""A node's streams: those that it opens, and those that others open to it, which are limited (``slots``) and served.

A handler's failure is its stream's end and nothing else: a peer's fault is counted and told at debug level, ours is
told with a traceback.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections import Counter
from collections.abc import Container
from typing import Any, NamedTuple

from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo

from p2p_diloco.core.addresses import direct_ip, is_relayed
from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.errors import RemoteError
from p2p_diloco.core.identity import public_key_of
from p2p_diloco.core.waiting import cancel_and_wait, now_s
from p2p_diloco.wire.channel import Channel, Handler
from p2p_diloco.wire.connections import Connections
from p2p_diloco.wire.slots import MAX_STREAMS, Slot, room_for
from p2p_diloco.wire.traffic import Traffic

logger = logging.getLogger(__name__)

READ_BUFFER_BYTES = 512 * 1024
"""Of one stream; asyncio's own 64 kB cost a pause and a resume per 128 kB."""


class _Served(NamedTuple):
    """One stream that another peer has opened."""

    channel: Channel
    writer: asyncio.StreamWriter


class Streams:
    """All streams of one node, through all lives of its p2pd."""

    def __init__(self, timeouts: Timeouts, traffic: Traffic, favoured: Container[str]) -> None:
        self.handlers: dict[str, Handler] = {}
        """By protocol."""
        self.of_peers: Counter[str] = Counter()
        """How many each peer has opened to us."""
        self.connections = Connections()
        """Which of those under the streams have failed."""
        self._timeouts = timeouts
        self._traffic = traffic
        self._favoured = favoured
        self._served: dict[asyncio.Task[Any], _Served] = {}
        self._ending: dict[asyncio.Task[Any], None] = {}
        """Of streams that had to make room, until their handlers have seen that; the oldest first."""
        self._cancelled: weakref.WeakSet[asyncio.Task[Any]] = weakref.WeakSet()
        self._writers: weakref.WeakSet[asyncio.StreamWriter] = weakref.WeakSet()
        self._closed = False

    def channel(
        self, peer_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, remote: str
    ) -> Channel:
        """Returns the channel over a stream that p2pd has opened. ``remote``: the address at its other end."""
        self._writers.add(writer)
        reader._limit = READ_BUFFER_BYTES  # type: ignore[attr-defined]
        return Channel(
            peer_id=peer_id,
            reader=reader,
            writer=_Writer(writer, self._timeouts.write_s),
            timeouts=self._timeouts,
            traffic=self._traffic,
            relayed=is_relayed(remote),
            connections=self.connections,
        )

    async def on_stream(
        self, protocol: str, info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Refuses a stream that another peer opens, or serves it to its end. p2pd's client calls it in a task of its
        own."""
        peer_id = info.peer_id.to_base58()
        task = asyncio.current_task()
        if self._closed or task is None or public_key_of(peer_id) is None or not self._make_room(peer_id):
            logger.debug("peer %s: stream refused", peer_id[-8:])
            writer.transport.abort()
            return
        channel = self.channel(peer_id, reader, writer, remote=str(info.addr))
        channel.remote_ip = direct_ip(str(info.addr))
        channel.used_s = now_s()
        self._served[task] = _Served(channel, writer)
        self.of_peers[peer_id] += 1
        try:
            await self.handlers[protocol](channel)
        except asyncio.CancelledError:
            if not (self._closed or task in self._cancelled):
                raise  # else it is we who cancelled it, and asyncio's stream server would log a traceback
        except RemoteError as error:
            self._traffic.reject(error)
            logger.debug("%s", error)
        except Exception:
            logger.exception("a stream of peer %s could not be served", peer_id[-8:])
        finally:
            channel.close()
            self._release(task)
            self._ending.pop(task, None)

    def _make_room(self, peer_id: str) -> bool:
        """Returns whether one more stream of a peer is taken. Another one may be ended for it."""
        tasks = list(self._served)
        slots = [
            Slot(peer_id=channel.peer_id, has_spoken=channel.meter.received > 0, used_s=channel.used_s)
            for channel, _ in self._served.values()
        ]
        there_is, instead_of = room_for(peer_id, slots, self._favoured)
        if instead_of is not None:
            task = tasks[instead_of]
            logger.debug("peer %s: a stream makes room for another peer's", slots[instead_of].peer_id[-8:])
            self._end(task)
        return there_is

    def _end(self, task: asyncio.Task[Any]) -> None:
        """Resets a stream, as its peer could. Its handler takes it for that; only when very many are about to is the
        oldest one cancelled."""
        self._served[task].writer.transport.abort()
        self._release(task)
        self._ending[task] = None
        if len(self._ending) > MAX_STREAMS:
            oldest = next(iter(self._ending))
            del self._ending[oldest]
            self._cancelled.add(oldest)
            oldest.cancel()

    def _release(self, task: asyncio.Task[Any]) -> None:
        served = self._served.pop(task, None)
        if served is not None:
            peer_id = served.channel.peer_id
            self.of_peers[peer_id] -= 1
            if not self.of_peers[peer_id]:
                del self.of_peers[peer_id]

    def refuse(self) -> None:
        """Refuses all streams that others open from now on."""
        self._closed = True

    async def end(self, within_s: float) -> None:
        """Ends all streams, in both directions; handlers that do not end ``within_s`` are left alone."""
        self.refuse()
        await cancel_and_wait(self._served.keys() | self._ending.keys(), within_s)
        for writer in self._writers:
            writer.transport.abort()


class _Writer:
    """A stream's writer: ``drain`` returns when all is handed over, so that buffers may be used again; ``close`` does
    not wait for a reader for ever."""

    def __init__(self, writer: asyncio.StreamWriter, close_s: float) -> None:
        self._writer = writer
        self._close_s = close_s
        writer.transport.set_write_buffer_limits(high=0)
        self.write = writer.write
        self.drain = writer.drain

    def close(self) -> None:
        if not self._writer.is_closing():
            self._writer.close()
            if self._writer.transport.get_write_buffer_size():
                asyncio.get_running_loop().call_later(self._close_s, self._writer.transport.abort)
