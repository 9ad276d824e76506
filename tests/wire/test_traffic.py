"""What a transport's counters say, on pairs of streams. ``test_metrics`` has whole swarms."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter

import pytest

from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.errors import Gone, Misbehaved, Refused, Silent
from p2p_diloco.peer.reception import REQUESTS
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.message import Message
from p2p_diloco.wire.messages import No
from p2p_diloco.wire.round_messages import Contribute
from p2p_diloco.wire.state_messages import AskHeads, AskManifest, Heads, Push
from p2p_diloco.wire.traffic import Purpose, Traffic
from tests.support.builders import PipeWriter, identity
from tests.support.fakes import run_simulated


def pair() -> tuple[Channel, Channel]:
    """Both ends of a stream between two transports."""
    a, b = asyncio.StreamReader(), asyncio.StreamReader()
    ends = ((identity(2), a, b), (identity(1), b, a))
    mine, theirs = (
        Channel(peer_id=who.peer_id, reader=here, writer=PipeWriter(there), timeouts=Timeouts(), traffic=Traffic())
        for who, here, there in ends
    )
    return mine, theirs


@pytest.mark.parametrize(
    ("request_", "purpose"),
    [(Contribute(round_id=bytes(32)), "reduce"), (AskHeads(since=0), "catchup"), (Push(record=b"r"), "other")],
)
def test_bytes_go_to_what_the_stream_is_for(request_: Message, purpose: Purpose) -> None:
    """All of them, the request's own and those of answers, frames and blobs included."""

    async def main() -> None:
        mine, theirs = pair()
        await mine.send(request_)
        await theirs.receive(type(request_), timeout_s=1.0)
        await theirs.send(Heads(first=0, head=bytes(32), links=[]))
        await mine.receive(Heads, timeout_s=1.0)
        await mine.send_frame(bytes(1000))
        await theirs.receive_frame(1000, 1.0)
        await theirs.send_blob(bytes(2000))
        await mine.receive_blob(2000, 1.0)
        for end in (mine, theirs):
            assert end.traffic.sent == Counter({purpose: end.meter.sent})
            assert end.traffic.received == Counter({purpose: end.meter.received})
        assert mine.meter.sent == theirs.meter.received > 1000
        assert mine.meter.received == theirs.meter.sent > 2000

    run_simulated(main())


def test_what_is_no_message_counts_too() -> None:
    async def main() -> None:
        mine, theirs = pair()
        await mine.send_frame(b"garbage")
        with pytest.raises(Misbehaved):
            await theirs.receive(No, timeout_s=1.0)
        assert theirs.traffic.received == {"other": 4 + 7}

    run_simulated(main())


def test_every_request_says_what_it_is_for() -> None:
    assert {kind.tag for kind in (*REQUESTS, AskManifest) if kind.purpose is None} == set()
    assert Heads.purpose is None


def test_errors_are_counted_by_class_and_once() -> None:
    traffic = Traffic()
    silent = Silent("p", "says nothing")
    for error in (silent, Gone("p", "x"), silent, Silent("p", "says nothing"), Refused("p", "x"), Misbehaved("p", "x")):
        traffic.reject(error)
    assert traffic.rejected == {"silent": 2, "gone": 1, "refused": 1, "misbehaved": 1}
    del error, silent
    gc.collect()
    assert len(traffic._counted) == 0
