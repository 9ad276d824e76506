"""Nodes with a real p2pd, on the loopback interface."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import signal
import socket
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from pathlib import Path
from typing import Any

import hivemind.dht.protocol
import msgpack
import pytest
import uvloop
from hivemind.dht.routing import DHTID
from hivemind.p2p import PeerID

from p2p_diloco.core import addresses
from p2p_diloco.core.addresses import check_maddr, dial_bytes, encode, publicness
from p2p_diloco.core.config import PeerConfig, Timeouts
from p2p_diloco.core.errors import Gone, LocalError, Misbehaved, NetworkError, Silent, UsageError
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.records import Record, open_record, seal_record
from p2p_diloco.lab.child import read_proc
from p2p_diloco.wire import node, slots
from p2p_diloco.wire.channel import Channel, Links
from p2p_diloco.wire.daemon import private_socket_folder
from p2p_diloco.wire.kademlia import node_id_of
from p2p_diloco.wire.messages import No
from p2p_diloco.wire.node import Node
from p2p_diloco.wire.state_messages import AskManifest
from p2p_diloco.wire.traffic import Purpose

TIMEOUTS = Timeouts()
KEY = "some key"
PROTOCOL = "some/protocol"
STRANGER = Identity.from_seed(b"s" * 32)


def identity_of(config: PeerConfig) -> Identity:
    return Identity.load_or_create(config.identity_path)


def config_of(folder: Path, **changes: Any) -> PeerConfig:
    values: dict[str, Any] = {"folder": folder, "host_maddrs": ("/ip4/127.0.0.1/tcp/0",)}
    return PeerConfig(**(values | changes))


async def start(config: PeerConfig, timeouts: Timeouts = TIMEOUTS) -> Node:
    return await Node.start(config, identity_of(config), timeouts, private_socket_folder(config.folder))


@asynccontextmanager
async def nodes(folder: Path, count: int, timeouts: Timeouts = TIMEOUTS, **changes: Any) -> AsyncIterator[list[Node]]:
    """The first one without initial peers; the others know the first one. ``changes`` are for the last."""
    async with AsyncExitStack() as stack:
        started: list[Node] = []
        for index in range(count):
            known = tuple(await started[0].maddrs()) if started else ()
            more = changes if index == count - 1 else {}
            started.append(await start(config_of(folder / str(index), initial_peers=known, **more), timeouts))
            stack.push_async_callback(started[-1].close)
        yield started


def sealed_record(identity: Identity) -> tuple[bytes, float]:
    record = Record(
        peer_id=identity.peer_id,
        run_id="0" * 40,
        run_name="test",
        issued_s=time.time(),
        life_s=30.0,
        role="trainer",
        phase="inner",
        step=0,
        head=bytes(32),
        committed=False,
        heads=[],
        snapshot_step=0,
        snapshot_digest=bytes(32),
        maddrs=[],
        client_mode=False,
    )
    return seal_record(record, identity), record.expires_s


async def echo(channel: Channel) -> None:
    assert channel.remote_ip == "127.0.0.1"
    while True:
        await channel.send_frame(channel.peer_id.encode(), await channel.receive_frame(1 << 22, 5.0))


async def exchange(channel: Channel, data: bytes) -> bytes:
    await channel.send_frame(data)
    return await channel.receive_frame(1 << 22, 5.0)


def descendants(pid: int) -> list[int]:
    """Command lines tell p2pd from its guard; zombies have none."""
    found = []
    for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        if read_proc(child, "cmdline"):
            found += [child, *descendants(child)]
    return found


def command(pid: int) -> str:
    return read_proc(pid, "cmdline").replace(b"\0", b" ").decode()


def p2pd_of(started: Node) -> int:
    assert started._network is not None
    (p2pd,) = descendants(started._network.daemon.p2p._child.pid)
    return p2pd


async def eventually(condition: Callable[[], bool], limit_s: float = 5.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


def run(main: Coroutine[Any, Any, None], *, fast: bool = False) -> None:
    """Asserts that nothing is left of any node. What another test of this process has started is not its."""
    before = descendants(os.getpid())
    loop = uvloop.new_event_loop() if fast else asyncio.new_event_loop()
    with closing(loop):
        loop.run_until_complete(main)
        assert asyncio.all_tasks(loop) == set()
    assert [command(pid) for pid in descendants(os.getpid()) if pid not in before] == []


@pytest.mark.parametrize("fast", [False, True], ids=["asyncio", "uvloop"])
def test_frames_both_ways(tmp_path: Path, fast: bool) -> None:
    async def main() -> None:
        async with nodes(tmp_path, 3, client_mode=True) as (alice, bob, client):
            assert await client.maddrs() == []
            for one in (alice, bob):
                await one.serve(PROTOCOL, echo)
            for one, other in ((alice, bob), (bob, alice), (client, bob)):
                channel = await one.open(other.peer_id, await other.maddrs(), PROTOCOL)
                assert channel.peer_id == other.peer_id
                assert await exchange(channel, b"hello") == one.peer_id.encode() + b"hello"
                assert len(await exchange(channel, bytes(3 << 20))) > 3 << 20
                channel.close()
            known = await bob.open(alice.peer_id, [], PROTOCOL)
            known.close()
            with pytest.raises(Gone, match="does not serve this protocol"):
                await bob.open(alice.peer_id, [], "another protocol")
            with pytest.raises(Gone, match="connection refused"):
                await bob.open(STRANGER.peer_id, [f"/ip4/127.0.0.1/tcp/1/p2p/{STRANGER.peer_id}"], PROTOCOL)
            with pytest.raises(Gone, match="not the id of a peer"):
                await bob.open("somebody", [], PROTOCOL)

    run(main(), fast=fast)
    assert not any(tmp_path.rglob("*.sock"))


def test_records(tmp_path: Path) -> None:
    async def main() -> None:
        async with nodes(tmp_path, 2) as (alice, bob):
            identities = {one: Identity.load_or_create(one._config.identity_path) for one in (alice, bob)}
            assert await alice.look_up(KEY) == await bob.look_up(KEY) == []
            for one, identity in identities.items():
                assert await one.publish(KEY, *sealed_record(identity))
            for one in (alice, bob):
                found = [open_record(sealed).peer_id for sealed in await one.look_up(KEY)]
                assert sorted(found) == sorted((alice.peer_id, bob.peer_id))

            newer, expires_s = sealed_record(identities[bob])
            assert await bob.publish(KEY, newer, expires_s)
            assert newer in await alice.look_up(KEY)
            assert not await bob.publish(KEY, *sealed_record(STRANGER)), "signed by another"
            assert not await bob.publish(KEY, newer, expires_s + 9), "expires later than it says"
            assert not await bob.publish(KEY, newer[:-1] + bytes([newer[-1] ^ 1]), expires_s)

            network = bob._network
            assert network is not None
            stolen, expires_s = sealed_record(STRANGER)
            answer = await network.dht.node.protocol.call_store(
                PeerID.from_base58(alice.peer_id),
                [DHTID.generate(source=KEY)],
                [msgpack.packb(stolen)],
                [expires_s],
                [STRANGER.peer_id],
            )
            assert answer == [False], "a sound record of somebody else"
            assert stolen not in await alice.look_up(KEY)

    run(main())


def test_links_and_the_dht_s_bytes_are_counted(tmp_path: Path) -> None:
    async def main() -> None:
        async with nodes(tmp_path, 3) as started:
            alice, bob, carol = started
            assert await alice.links() == Links(direct=2, relayed=0, routing_table=2)
            before = [sum(one.traffic.sent.values()) for one in started]
            record, expires_s = sealed_record(identity_of(bob._config))
            assert await bob.publish(KEY, record, expires_s)
            assert await carol.look_up(KEY) == [record]
            for one, sent in zip(started, before):
                assert one.traffic.sent.keys() == one.traffic.received.keys() == {"dht"}
                assert one.traffic.sent["dht"] > sent
            sent, received = (sum(counts["dht"] for counts in column) for column in zip(*map(both_ways, started)))
            assert sent >= received > 2 * len(record)
            await carol.close()
            assert await carol.links() == Links()

    run(main())


def both_ways(one: Node) -> tuple[Counter[Purpose], Counter[Purpose]]:
    return one.traffic.sent, one.traffic.received


def test_p2pd_starts_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with nodes(tmp_path, 2) as (alice, bob):
            await alice.serve(PROTOCOL, echo)
            watching = asyncio.create_task(alice.watch())
            maddrs, restarted = await alice.maddrs(), alice.restarted.event
            os.kill(p2pd_of(alice), signal.SIGKILL)
            await eventually(restarted.is_set)
            assert await alice.maddrs() == maddrs
            await alice.serve("another protocol", echo)
            for protocol in (PROTOCOL, "another protocol"):
                channel = await bob.open(alice.peer_id, maddrs, protocol)
                assert await exchange(channel, b"!") == bob.peer_id.encode() + b"!"
                channel.close()
            channel = await bob.open(alice.peer_id, maddrs, PROTOCOL)
        await watching
        with pytest.raises(Gone):
            await channel.receive_frame(10, 1.0)
        with pytest.raises(Gone, match="our own network side is down"):
            await alice.open(bob.peer_id, [], PROTOCOL)
        assert not await alice.publish(KEY, b"", time.time())
        assert await alice.look_up(KEY) == []
        assert await alice.maddrs() == maddrs

    run(main())
    assert "p2pd is lost (exit code 137)" in caplog.text


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder whose path leaves room for the name of a socket: pytest's own may be too long."""
    with tempfile.TemporaryDirectory(prefix="p2p-") as folder:
        yield Path(folder)


@pytest.mark.parametrize("noticed", [True, False], ids=["noticed", "closed at once"])
@pytest.mark.parametrize("name", ["near", "far" * 30], ids=["in the peer's folder", "in the temporary folder"])
def test_a_killed_guard_leaves_no_socket(
    short_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, noticed: bool
) -> None:
    """It is a process of its own, which else removes the sockets."""
    monkeypatch.setattr("tempfile.tempdir", str(short_path))

    def sockets() -> set[str]:
        return {path.name for path in short_path.rglob("*.sock")}

    async def main() -> None:
        alice = await start(config_of(short_path / name))
        assert alice._network is not None
        before, restarted = sockets(), alice.restarted.event
        watching = asyncio.create_task(alice.watch())
        os.kill(alice._network.daemon.p2p._child.pid, signal.SIGKILL)
        if noticed:
            await eventually(restarted.is_set)
            assert sockets()
            assert not sockets() & before
        await alice.close()
        await watching
        assert not alice._socket_folder.exists()

    run(main())
    assert not sockets()
    assert ("its guard was ended by signal 9" in caplog.text) == noticed


def test_p2pd_that_does_not_stay_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "MAX_LOSSES", 2)

    async def main() -> None:
        async with nodes(tmp_path, 1) as (alice,):
            watching = asyncio.create_task(alice.watch())
            for _ in range(2):
                lost = alice._network
                os.kill(p2pd_of(alice), signal.SIGKILL)
                await eventually(lambda lost=lost: watching.done() or alice._network not in (lost, None))  # type: ignore[misc]
            with pytest.raises(NetworkError, match="p2pd was lost 2 times within a minute"):
                await watching

    run(main())


def test_finds_an_initial_peer_that_comes_back(tmp_path: Path) -> None:
    async def main() -> None:
        async with nodes(tmp_path, 2, dataclasses.replace(TIMEOUTS, refresh_s=0.02)) as (alice, bob):
            assert bob._network is not None
            table = bob._network.dht.node.protocol.routing_table
            del table[node_id_of(alice.peer_id)]
            watching = asyncio.create_task(bob.watch())
            await eventually(lambda: node_id_of(alice.peer_id) in table)
        await watching

    run(main())


def test_who_has_lost_the_dht_finds_it_through_a_peer_it_has_met(tmp_path: Path) -> None:
    async def main() -> None:
        async with nodes(tmp_path, 3, client_mode=True) as (alice, bob, carol):
            identity = Identity.load_or_create(bob._config.identity_path)
            assert await bob.publish(KEY, *sealed_record(identity))
            met = {bob.peer_id: await bob.maddrs()}
            await alice.close()
            assert carol._network is not None
            table = carol._network.dht.node.protocol.routing_table
            for node_id in list(table.uid_to_peer_id):
                del table[node_id]
            assert await carol.look_up(KEY) == []
            await carol.meet(met)
            assert [open_record(sealed).peer_id for sealed in await carol.look_up(KEY)] == [bob.peer_id]
            await carol.meet({alice.peer_id: met[bob.peer_id]})

    run(main())


@pytest.mark.parametrize("turns", [1, 5, 20])
def test_a_node_that_is_closed_leaves_nothing_behind_whoever_cancels_that(tmp_path: Path, turns: int) -> None:
    """Ctrl+C comes at any moment, also when one tidies up."""

    async def main() -> None:
        node = await start(config_of(tmp_path / "node"))
        p2pd, network = p2pd_of(node), node._network
        assert network is not None
        closing = asyncio.create_task(node.close())
        for _ in range(turns):
            await asyncio.sleep(0)
        assert not closing.done()
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert network.daemon.p2p._child._transport._closed
        assert not command(p2pd)
        assert not node._socket_folder.exists()
        await (await start(config_of(tmp_path / "node"))).close()  # its identity can be claimed again

    run(main())


def test_streams_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "MAX_STREAMS_PER_PEER", 2)

    async def main() -> None:
        async with nodes(tmp_path, 2) as (alice, bob):
            await alice.serve(PROTOCOL, echo)
            channels = [await bob.open(alice.peer_id, [], PROTOCOL) for _ in range(2)]
            for channel in channels:
                await exchange(channel, b"")
            refused = await bob.open(alice.peer_id, [], PROTOCOL)
            with pytest.raises(Gone):
                await exchange(refused, b"")
            for channel in (*channels, refused):
                channel.close()
            await eventually(lambda: not alice._streams.of_peers)
            channel = await bob.open(alice.peer_id, [], PROTOCOL)
            await exchange(channel, b"")
            channel.close()

    run(main())


def test_who_has_most_streams_makes_room_for_a_newcomer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(slots, "MAX_STREAMS_OF_STRANGERS", 2)

    async def main() -> None:
        async with nodes(tmp_path, 3) as (alice, bob, carol):
            await alice.serve(PROTOCOL, echo)
            first, second = [await bob.open(alice.peer_id, [], PROTOCOL) for _ in range(2)]
            await exchange(first, b"")
            await eventually(lambda: alice._streams.of_peers[bob.peer_id] == 2)
            newcomer = await carol.open(alice.peer_id, [], PROTOCOL)
            await exchange(newcomer, b"")
            with pytest.raises(Gone):
                await exchange(second, b"")
            await exchange(first, b"")
            alice.favoured.add(bob.peer_id)
            third = await bob.open(alice.peer_id, [], PROTOCOL)
            for channel in (first, third, newcomer):
                await exchange(channel, b"")
                channel.close()
            await eventually(lambda: not alice._streams.of_peers)
            network = alice._network
            assert network is not None
            assert network.dht.node.protocol.storage.favoured is alice.favoured

    run(main())
    assert "Traceback" not in caplog.text


def test_faults_of_handlers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A peer's fault is a line at debug level, ours a traceback; both close the stream."""
    caplog.set_level(logging.DEBUG, "p2p_diloco.wire.streams")

    async def misbehaved(channel: Channel) -> None:
        raise Misbehaved(channel.peer_id, "sends nonsense")

    async def broken(channel: Channel) -> None:
        raise KeyError("a bug")

    async def main() -> None:
        async with nodes(tmp_path, 2) as (alice, bob):
            for handler in (misbehaved, broken):
                await alice.serve(handler.__name__, handler)
                channel = await bob.open(alice.peer_id, [], handler.__name__)
                with pytest.raises(Gone):
                    await channel.receive_frame(10, 5.0)
                channel.close()
            await eventually(lambda: not alice._streams.of_peers)

    run(main())
    lines = {record.levelname: record for record in caplog.records if record.exc_info or "nonsense" in record.message}
    assert set(lines) == {"DEBUG", "ERROR"}
    assert lines["ERROR"].exc_info is not None


class Router:
    """Passes bytes on to a port of this machine, over a connection of its own for each that comes. ``forget`` leaves
    those that there are open and passes nothing on any more, as a router does that has got another address."""

    def __init__(self) -> None:
        self.passing: list[asyncio.Task[None]] = []
        self.writers: list[asyncio.StreamWriter] = []

    @asynccontextmanager
    async def to(self, maddr: str) -> AsyncIterator[str]:
        """The address at which others reach who listens at ``maddr``."""
        _, _, ip, _, port, _, peer_id = maddr.split("/")

        async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.writers.append(writer)
            there = await asyncio.open_connection(ip, int(port))
            self.writers.append(there[1])
            ways = ((reader, there[1]), (there[0], writer))
            self.passing += [asyncio.create_task(self._pass(*way)) for way in ways]

        server = await asyncio.start_server(on_connection, "127.0.0.1", 0)
        try:
            yield f"/ip4/127.0.0.1/tcp/{server.sockets[0].getsockname()[1]}/p2p/{peer_id}"
        finally:
            server.close()
            self.forget()
            await asyncio.gather(*self.passing, return_exceptions=True)
            for writer in self.writers:
                writer.transport.abort()
            await asyncio.gather(*(writer.wait_closed() for writer in self.writers), return_exceptions=True)

    @staticmethod
    async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.close()

    def forget(self) -> None:
        for task in self.passing:
            task.cancel()


async def never_takes(channel: Channel) -> None:
    await asyncio.sleep(100.0)


async def write_much(channel: Channel) -> None:
    for _ in range(200):
        await channel.send_frame(bytes(1 << 20))


@pytest.mark.parametrize("by", ["a request", "a write"])
def test_a_connection_that_has_failed_is_not_used_again(
    tmp_path: Path, by: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Streams over it open as before. Whoever lets no time-out pass keeps its connection, and so does who cannot be
    dialled."""
    caplog.set_level(logging.INFO, "p2p_diloco.wire.daemon")
    timeouts = dataclasses.replace(TIMEOUTS, request_s=0.5, write_s=1.0)
    seen: list[str] = []

    async def answer(channel: Channel) -> None:
        while True:
            await channel.receive(AskManifest, timeout_s=5.0)
            seen.append(channel.peer_id)
            await channel.send(No(reason="here I am"))

    async def ask(channel: Channel) -> No:
        return await channel.request(AskManifest(), No)

    async def main() -> None:
        alice, router = await start(config_of(tmp_path / "alice"), timeouts), Router()
        try:
            async with router.to((await alice.maddrs())[0]) as maddr:
                bob = await start(config_of(tmp_path / "bob", initial_peers=(maddr,)), timeouts)
                try:
                    await alice.serve(PROTOCOL, answer)
                    await alice.serve("idle", never_takes)
                    first = await bob.open(alice.peer_id, [maddr], PROTOCOL)
                    assert (await ask(first)).reason == "here I am"
                    idle = await bob.open(alice.peer_id, [maddr], "idle")
                    late = await asyncio.gather(write_much(idle), ask_often(first), return_exceptions=True)
                    assert [type(one) for one in late] == [Silent, type(None)]
                    other = await bob.open(alice.peer_id, [maddr], PROTOCOL)
                    await ask(other)
                    assert "has failed" not in caplog.text, "it answers on another stream"
                    router.forget()
                    asked = len(seen)
                    with pytest.raises(Silent):
                        await (ask(first) if by == "a request" else write_much(idle))
                    unused = await bob.open(alice.peer_id, [], PROTOCOL)
                    assert "has failed" not in caplog.text, "it cannot be dialled"
                    second = await bob.open(alice.peer_id, [maddr], PROTOCOL)
                    assert (await ask(second)).reason == "here I am"
                    assert len(seen) == asked + 1
                    for channel in (first, idle, other, unused, second):
                        channel.close()
                finally:
                    await bob.close()
        finally:
            await alice.close()

    async def ask_often(channel: Channel) -> None:
        for _ in range(30):
            await asyncio.sleep(0.05)
            await ask(channel)

    run(main())
    assert caplog.text.count("its connection has failed") == 1


def test_a_peer_that_does_not_answer(tmp_path: Path) -> None:
    async def main() -> None:
        async with nodes(tmp_path, 1, dataclasses.replace(TIMEOUTS, connect_s=0.3)) as (alice,):
            with closing(socket.create_server(("127.0.0.1", 0))) as mute:
                maddr = f"/ip4/127.0.0.1/tcp/{mute.getsockname()[1]}/p2p/{STRANGER.peer_id}"
                with pytest.raises(Silent, match=r"cannot be reached within 0\.3 s"):
                    await alice.open(STRANGER.peer_id, [maddr], PROTOCOL)

    run(main())


def expect(error: type[LocalError], match: str, config: PeerConfig) -> None:
    async def main() -> None:
        with pytest.raises(error, match=match):
            await start(config)

    run(main())
    assert not (config.folder / "s").exists()


def test_no_initial_peer_answers(tmp_path: Path) -> None:
    maddr = f"/ip4/127.0.0.1/tcp/1/p2p/{STRANGER.peer_id}"
    complaint = r"^none of the initial peers answers within 8 s: \S+ \(connection refused\); check the address, that "
    expect(NetworkError, complaint, config_of(tmp_path, initial_peers=(maddr,)))


def test_wrong_id_and_wrong_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with nodes(tmp_path / "others", 1) as (alice,):
            (maddr,) = await alice.maddrs()
            wrong = maddr.replace(alice.peer_id, STRANGER.peer_id)
            with pytest.raises(NetworkError, match="another peer answers at that address"):
                await start(config_of(tmp_path / "a", initial_peers=(wrong,)))
            own = await start(config_of(tmp_path / "b", initial_peers=(maddr, wrong)))
            await own.close()
            monkeypatch.setattr(hivemind.dht.protocol, "get_dht_time", lambda: time.time() + 100.0)
            with pytest.raises(
                NetworkError, match=r"^this machine's clock is \d+\.\d s behind the initial peers'; set"
            ):
                await start(config_of(tmp_path / "c", initial_peers=(maddr,)))

    run(main())


def test_port_in_use(tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as other:
        port = other.getsockname()[1]
        expect(UsageError, f"^port {port} is in use", config_of(tmp_path, host_maddrs=(f"/ip4/127.0.0.1/tcp/{port}",)))


def test_address_of_an_initial_peer_that_is_none(tmp_path: Path) -> None:
    expect(UsageError, "^address 'there': it begins with no '/'", config_of(tmp_path, initial_peers=("there",)))


@pytest.mark.parametrize(
    ("maddr", "complaint"),
    [
        ("/ip4/127.0.0.1/udp/4001/quic-v1", "listen on TCP"),
        ("nonsense", "listen on TCP"),
        ("/ip4/192.0.2.1/tcp/4001", "cannot listen on /ip4/192.0.2.1/tcp/4001: Cannot assign"),
        ("/ip4/127.0.0.1/tcp/70000", "cannot listen on"),
        ("/ip4/127.0.0/tcp/x", "listen on TCP"),
    ],
)
def test_addresses_that_cannot_be_had(tmp_path: Path, maddr: str, complaint: str) -> None:
    expect(UsageError, complaint, config_of(tmp_path, host_maddrs=(maddr,)))


def test_one_identity_twice(tmp_path: Path) -> None:
    async def main() -> None:
        async with nodes(tmp_path, 1) as (alice,):
            sockets = sorted((tmp_path / "0" / "s").iterdir())
            assert sockets
            calls: list[str] = []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("socket.socket.connect_ex", lambda _, address: calls.append(address))
                for folder in ("again", "0"):
                    config = config_of(tmp_path / folder, identity=alice._config.identity_path)
                    with pytest.raises(UsageError, match="another peer runs with it"):
                        await start(config)
            assert not calls  # of the one that runs, which would tell of it
            assert sorted((tmp_path / "0" / "s").iterdir()) == sockets
            config = config_of(tmp_path / "again", identity=alice._config.identity_path)
            own = (*(await alice.maddrs()),)
        await (await start(config.model_copy(update={"initial_peers": own}))).close()

    run(main())


def test_announced_addresses_come_first(tmp_path: Path) -> None:
    async def main() -> None:
        announced = "/dns4/example.org/tcp/4001"
        async with nodes(tmp_path, 1, announce_maddrs=(announced,)) as (alice,):
            assert await alice.maddrs() == [f"{announced}/p2p/{alice.peer_id}"]

    run(main())


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "begins with no '/'"),
        ("localhost:4001", "begins with no '/'"),
        ("/ip4/1.2.3/tcp/1", "Expected 4 octets"),
        ("/ip4/1.2.3.4/tcp/99999", "'99999' is no port"),
        ("/ip4/1.2.3.4/tcp", "nothing follows 'tcp'"),
        ("/ip4/1.2.3.4/udp/1/quic-v1", "'udp' is no part of a TCP address"),
        ("/dns/-/tcp/1", "'-' is no host name"),
        ("/ip4/1.2.3.4/tcp/1/p2p/12D3KooW", "'12D3KooW' is not a peer's id"),
        ("/ip4/1.2.3.4/tcp/1", "lacks /p2p/PEER-ID at its end; copy the whole address"),
        (f"/p2p/{STRANGER.peer_id}", "lacks /tcp/PORT"),
    ],
)
def test_check_maddr(text: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint) as caught:
        check_maddr(text)
    assert str(caught.value).startswith(f"address {text!r}: ")
    good = f"/ip6/::1/tcp/1/ws/p2p/{STRANGER.peer_id}"
    assert check_maddr(f" {good}\n") == good


def test_binary_form() -> None:
    peer_id = STRANGER.peer_id
    assert encode("/ip4/127.0.0.1/tcp/4001") == b"\x04\x7f\0\0\x01\x06\x0f\xa1"
    relayed = f"/dns/a.org/tcp/1/p2p/{peer_id}/p2p-circuit"
    dialled = dial_bytes(peer_id, f"{relayed}/p2p/{peer_id}")
    assert dialled == encode(relayed)
    assert str(hivemind.utils.multiaddr.Multiaddr(dialled)) == relayed
    for maddr in ("/ip4/127.0.0.1/tcp/1", f"/ip4/1/tcp/1/p2p/{peer_id}", f"/p2p/{peer_id}", "/ip4/1.2.3.4/udp/1", ""):
        assert dial_bytes(peer_id, maddr) is None


def test_order_of_addresses() -> None:
    ordered = ["/dns/a.org/tcp/1", "/ip4/8.8.8.8/tcp/1", "/ip4/8.8.8.8/tcp/1/p2p/x/p2p-circuit", "/ip4/10.0.0.1/tcp/1"]
    ordered.append("/ip6/::1/tcp/1")
    assert sorted(reversed(ordered), key=publicness) != ordered, "equals stay in p2pd's order"
    assert sorted(ordered, key=publicness) == ordered
    assert addresses.dial_reason("x\n  * [addr] no such thing") == "[addr] no such thing"
    assert addresses.dial_reason("") == "no reason given"
    assert [addresses.direct_ip(maddr) for maddr in ordered] == ["", "8.8.8.8", "", "10.0.0.1", "::1"]
    assert addresses.ip_maddr("::1", 7) == "/ip6/::1/tcp/7"
    assert addresses.ip_maddr("8.8.8.8", 7) == "/ip4/8.8.8.8/tcp/7"
