"""Addresses tried with real sockets; the peers behind them are fakes. Dial backs and transfers are in test_probes."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Coroutine
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import pytest

from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.errors import Gone, RemoteError, Silent
from p2p_diloco.look.network_findings import AddressTrial
from p2p_diloco.look.network_trial import Candidate, Listener, dial_one_of, try_address
from p2p_diloco.wire.channel import MANIFEST_PROTOCOL, Channel
from tests.support.builders import PipeWriter, identity

PEER = identity(1)
TIMEOUTS = Timeouts(connect_s=0.5)


@dataclass
class Answering:
    """A transport on which every peer serves these bytes as its manifest, or fails."""

    answer: bytes | RemoteError = b"signed manifest"
    peer_id: str = identity(9).peer_id
    timeouts: Timeouts = TIMEOUTS
    opened: int = 0

    async def open(self, peer_id: str, maddrs: list[str], protocol: str) -> Channel:
        assert (peer_id, protocol) == (PEER.peer_id, MANIFEST_PROTOCOL)
        self.opened += 1
        if isinstance(self.answer, RemoteError):
            raise self.answer
        here, there = asyncio.StreamReader(), asyncio.StreamReader()
        remote = Channel(peer_id="", reader=there, writer=PipeWriter(here), timeouts=TIMEOUTS)
        await remote.send_blob(self.answer)
        return Channel(peer_id=peer_id, reader=here, writer=PipeWriter(there), timeouts=TIMEOUTS)


def attempt(maddr: str, answer: bytes | RemoteError = b"signed manifest") -> tuple[AddressTrial, Answering]:
    transport = Answering(answer=answer)
    work: Coroutine[Any, Any, AddressTrial] = try_address(transport, f"{maddr}/p2p/{PEER.peer_id}")  # type: ignore[arg-type]
    return asyncio.run(work), transport


def test_an_address_is_resolved_dialled_and_asked_for_the_manifest() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
        trial, _ = attempt(f"/ip4/127.0.0.1/tcp/{port}")
        assert (trial.trouble, trial.ips, trial.signed) == ("", (), b"signed manifest")
        assert 0 < trial.connect_s < 5
        trial, _ = attempt(f"/dns4/localhost/tcp/{port}")
        assert (trial.trouble, trial.ips) == ("", ("127.0.0.1",))


def test_a_peer_without_a_run_answers_all_the_same() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        error = Gone(PEER.peer_id, "cannot be reached: does not serve this protocol")
        trial, _ = attempt(f"/ip4/127.0.0.1/tcp/{server.getsockname()[1]}", error)
        assert (trial.trouble, trial.signed) == ("", b"")


@pytest.mark.parametrize(
    ("error", "trouble"),
    [
        (Gone("x", "cannot be reached: another peer answers at that address"), "another peer answers at that address"),
        (Silent("x", "cannot be reached within 8 s"), "its port is open, but no peer answers"),
        (Gone("x", "closed the stream"), "closed the stream"),
    ],
)
def test_a_port_that_is_open_is_not_yet_a_peer(error: RemoteError, trouble: str) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        trial, _ = attempt(f"/ip4/127.0.0.1/tcp/{server.getsockname()[1]}", error)
        assert trial.trouble == trouble


def test_a_manifest_that_never_ends() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        trial, _ = attempt(f"/ip4/127.0.0.1/tcp/{server.getsockname()[1]}", bytes(33 * 1024 * 1024))
        assert trial.trouble.startswith("announces 34603008 bytes where at most")


def test_a_port_that_is_closed_or_a_name_that_is_unknown_is_told_without_p2pd() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
    trial, transport = attempt(f"/ip4/127.0.0.1/tcp/{port}")
    assert trial.trouble == "connection refused"
    assert transport.opened == 0
    trial, transport = attempt(f"/dns/localhost/tcp/{port}")
    assert trial.trouble == "connection refused", "at each of its addresses"
    trial, transport = attempt("/dns/nowhere.invalid/tcp/1")
    assert trial.trouble == "its host name is unknown"
    assert transport.opened == 0
    trial, transport = attempt("/p2p-circuit/ip4/127.0.0.1/tcp/1")
    assert trial.trouble == "it does not begin with a host and a TCP port"
    assert transport.opened == 0


def test_the_next_address_of_a_name_is_dialled_when_one_refuses() -> None:
    with closing(socket.create_server(("127.0.0.2", 0))) as server:
        port = server.getsockname()[1]
        asyncio.run(dial_one_of(["127.0.0.1", "127.0.0.2"], port))
        with pytest.raises(ConnectionRefusedError):
            asyncio.run(dial_one_of(["127.0.0.1", "127.0.0.3"], port))


def test_a_port_that_swallows_everything_costs_one_time_out() -> None:
    with closing(socket.socket()) as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port = full.getsockname()[1]
        with closing(socket.create_connection(("127.0.0.1", port))):  # now its queue is full
            started_s = time.monotonic()
            trial, transport = attempt(f"/ip4/127.0.0.1/tcp/{port}")
    assert TIMEOUTS.connect_s <= time.monotonic() - started_s < 20
    assert trial.trouble == "no answer"
    assert transport.opened == 0


def test_a_candidate_is_as_public_as_its_best_address() -> None:
    peer_id = PEER.peer_id
    here, home, out = (f"/ip4/{ip}/tcp/1/p2p/{peer_id}" for ip in ("127.0.0.1", "192.168.1.1", "8.8.8.8"))
    assert Candidate(peer_id=peer_id, maddrs=(here, out, home)).publicness == 0
    assert Candidate(peer_id=peer_id, maddrs=(here, home)).publicness == 2
    assert Candidate(peer_id=peer_id, maddrs=(here,)).label == f"peer …{peer_id[-8:]}"


def test_a_listener_names_every_port_once() -> None:
    class Announcing:
        async def maddrs(self) -> list[str]:
            return [
                "/ip4/8.8.8.8/tcp/4001/p2p/x",
                "/dns/a.org/tcp/4001/ws/p2p/x",
                *(f"/ip6/::1/tcp/{i}/p2p/x" for i in range(1, 9)),
            ]

    listener = Listener(transport=Announcing(), identity=PEER)  # type: ignore[arg-type]
    assert asyncio.run(listener.ports()) == [4001, 1, 2, 3]
    announced = replace(listener, announced=("/ip4/8.8.8.8/tcp/9", "/dns4/example.org/tcp/80/ws"))
    assert asyncio.run(announced.ports()) == [9, 80], "what its own network could use is not asked for"
