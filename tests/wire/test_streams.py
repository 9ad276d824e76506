"""Streams that others open, in memory: those that make room, and their handlers."""

from __future__ import annotations

import asyncio

import pytest

from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.errors import Gone
from p2p_diloco.wire import slots, streams
from p2p_diloco.wire.channel import Channel
from tests.support.builders import identity
from tests.support.fakes import FakeNetwork, FakeTransport, run_simulated
from tests.support.limited import LimitedTransport


def test_a_handler_takes_a_stream_that_makes_room_for_one_that_was_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "MAX_STREAMS_OF_STRANGERS", 2)
    seen: list[str] = []

    async def handler(channel: Channel) -> None:
        try:
            await channel.receive_frame(10, 100.0)
        except Gone as error:
            seen.append(error.reason)
            raise

    async def main() -> None:
        network = FakeNetwork()
        server = LimitedTransport(network, identity(1).peer_id, Timeouts())
        await server.serve("test", handler)
        some, other = (FakeTransport(network, identity(i).peer_id, Timeouts()) for i in (2, 3))
        first = await some.open(server.peer_id, [], "test")
        await asyncio.sleep(1)
        await some.open(server.peer_id, [], "test")
        await other.open(server.peer_id, [], "test")
        with pytest.raises(Gone):
            await first.receive_frame(10, 1.0)
        await asyncio.sleep(1)
        assert seen == ["closed the stream"]
        assert server.streams.of_peers == {some.peer_id: 1, other.peer_id: 1}
        assert server.traffic.rejected == {"gone": 1}
        assert not server.streams._ending

    run_simulated(main())


def test_handlers_that_do_not_look_are_cancelled_when_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "MAX_STREAMS_OF_STRANGERS", 1)
    monkeypatch.setattr(streams, "MAX_STREAMS", 2)
    running: list[str] = []

    async def sleeps(channel: Channel) -> None:
        running.append(channel.peer_id)
        try:
            await asyncio.sleep(100)
        finally:
            running.remove(channel.peer_id)

    async def main() -> None:
        network = FakeNetwork()
        server = LimitedTransport(network, identity(1).peer_id, Timeouts())
        await server.serve("test", sleeps)
        ids = [identity(i).peer_id for i in range(2, 8)]
        for peer_id in ids:
            await FakeTransport(network, peer_id, Timeouts()).open(server.peer_id, [], "test")
            await asyncio.sleep(1)
        assert running == ids[-3:], "one that is served, and two that have not seen that they are not"
        assert server.streams.of_peers == {ids[-1]: 1}
        await asyncio.sleep(200)
        assert not running
        assert not server.streams._ending

    run_simulated(main())
