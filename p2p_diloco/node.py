"""One peer on the network: its p2pd, its place in the DHT, its streams. The real ``wire.Transport``.

    start      p2pd under its guard, connected to the initial peers, DHT joined; or a LocalError that says why not
    watch      starts p2pd again when it dies, on the same identity and port; finds initial peers that come back
    close      streams cancelled, p2pd ended, nothing left behind

All in one event loop. What a stranger can do to the DHT is bounded in ``hardening``; here streams are.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import socket
import statistics
import tempfile
import time
import weakref
from collections import Counter, deque
from collections.abc import Awaitable, Collection, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import base58
import hivemind
import msgpack
from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord
from hivemind.p2p import P2PDaemonError, P2PHandlerError, PeerID
from hivemind.p2p.p2p_daemon_bindings import control
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo
from hivemind.proto import dht_pb2, p2pd_pb2
from hivemind.utils.multiaddr import Multiaddr

from p2p_diloco import hardening
from p2p_diloco.addresses import (
    check_host_maddrs,
    dial_bytes,
    dial_reason,
    direct_ip,
    is_loopback,
    parse_maddr,
    peers_of,
    pin_ports,
    publicness,
    without_peer,
)
from p2p_diloco.config import PeerConfig, Timeouts
from p2p_diloco.errors import Gone, LocalError, NetworkError, RemoteError, Silent, UsageError
from p2p_diloco.identity import Identity, public_key_of
from p2p_diloco.records import RUNS_KEY, Fault, unpack_plain
from p2p_diloco.traffic import Traffic
from p2p_diloco.waiting import Bell, deadline, to_its_end
from p2p_diloco.wire import Channel, Handler, Links

logger = logging.getLogger(__name__)
T = TypeVar("T")

REPLICAS = 5
"""Nodes that hold every record; a look-up asks as many."""
MAX_STREAMS = 128
MAX_STREAMS_PER_PEER = 8
MAX_DIALLED_MADDRS = 8
MAX_KNOWN_PEERS = 1024
MAX_RECORDS = 4096
READ_BUFFER_BYTES = 512 * 1024
"""Of one stream; asyncio's own 64 kB cost a pause and a resume per 128 kB."""
CIRCUIT = b"\xa2\x02"
"""/p2p-circuit in a binary multiaddr."""
MAX_LOSSES = 5
LOSS_WINDOW_S = 60.0
MAX_SOCKET_PATH_BYTES = 100
"""The system's limit is 108 bytes on Linux and 104 on macOS, with a zero at the end."""
LONGEST_SOCKET_NAME = "p2pclient-0123456789a.sock"


@dataclass(kw_only=True)
class _Network:
    """One life of p2pd."""

    p2p: Any
    dht: Any
    connected: set[str] = field(default_factory=set)
    """Peers that p2pd has had a connection to; saves a request per stream."""


class _Failed(Exception):
    """What p2pd answered."""


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


class Node:
    """``Node.start`` makes one."""

    _open_nodes: ClassVar[weakref.WeakSet[Node]] = weakref.WeakSet()

    def __init__(self, config: PeerConfig, identity: Identity, timeouts: Timeouts, socket_folder: Path) -> None:
        self.peer_id = identity.peer_id
        self.timeouts = timeouts
        self.traffic = Traffic()
        self.restarted = Bell()
        """Rings whenever p2pd has been lost and is there again."""
        self._config = config
        self._socket_folder = socket_folder
        self._host_maddrs = tuple(maddr.strip() for maddr in config.host_maddrs)
        self._announced = [without_peer(parse_maddr(maddr)) for maddr in config.announce_maddrs]
        self._initial_peers = peers_of(config.initial_peers, self.peer_id)
        self._validator = hardening.RecordValidator()
        self._validator.allow(RUNS_KEY)
        self._handlers: dict[str, Handler] = {}
        self._streams: Counter[str] = Counter()
        self._stream_tasks: set[asyncio.Task[Any]] = set()
        self._dht_tasks: set[asyncio.Task[Any]] = set()
        self._writers: weakref.WeakSet[asyncio.StreamWriter] = weakref.WeakSet()
        self._network: _Network | None = None
        self._maddrs: list[str] = []
        self._claim: int | None = None
        self._closed = False
        self._starting = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self._closing = self._loop.create_future()

    @classmethod
    async def start(cls, config: PeerConfig, identity: Identity, timeouts: Timeouts, socket_folder: Path) -> Node:
        """``identity`` is the one in ``config.identity_path``; ``socket_folder`` belongs to this node alone, and is
        removed by ``close``. Raises UsageError or NetworkError."""
        hardening.apply_hardening()
        try:
            node = cls(config, identity, timeouts, socket_folder)
        except LocalError:
            remove_folder(socket_folder)
            raise
        cls._open_nodes.add(node)
        try:
            node._claim = claim_identity(config.identity_path)
            await node._bring_up(first=True)
        except BaseException:
            await node.close()
            raise
        return node

    async def serve(self, protocol: str, handler: Handler) -> None:
        self._handlers[protocol] = handler
        network = self._network
        if network is not None:
            try:
                await self._register(network.p2p, protocol)
            except NetworkError:
                if network.p2p._child.returncode is None:  # else ``watch`` does it, with the next p2pd
                    raise

    async def open(self, peer_id: str, maddrs: list[str], protocol: str) -> Channel:
        network = self._network
        if network is None:
            raise Gone(peer_id, "our own network side is down")
        if public_key_of(peer_id) is None:
            raise Gone(peer_id, "not the id of a peer")
        try:
            work = self._dial(network, peer_id, maddrs, protocol)
            async with deadline(self.timeouts.connect_s):
                reader, writer = await work
        except asyncio.TimeoutError:
            raise Silent(peer_id, f"cannot be reached within {self.timeouts.connect_s:g} s") from None
        except _Failed as error:
            raise Gone(peer_id, f"cannot be reached: {error}") from error
        except (OSError, EOFError, ValueError) as error:
            raise Gone(peer_id, f"our own network side fails: {error}") from error
        return self._channel(peer_id, reader, writer)

    async def publish(self, key: str, record: bytes, expires_s: float) -> bool:
        network = self._network
        if network is None:
            return False
        self._validator.allow(key)
        try:
            return await self._in_dht(self._store(network, key, record, expires_s))
        except asyncio.TimeoutError:
            return False

    async def look_up(self, key: str) -> list[bytes]:
        """Where the DHT takes too long, what we store ourselves."""
        network = self._network
        if network is None:
            return []
        self._validator.allow(key)
        try:
            found = await self._in_dht(network.dht.get(key, latest=True, beam_size=REPLICAS))
            entries = [] if found is None else [entry.value for entry in found.value.values()]
        except asyncio.TimeoutError:
            found = network.dht.protocol.storage.get(DHTID.generate(source=key))
            entries = [] if found is None else [unpack_plain(value) for _, (value, _) in found.value.items()]
        return list(islice((entry for entry in entries if isinstance(entry, bytes)), MAX_RECORDS))

    async def meet(self, peers: dict[str, list[str]]) -> None:
        """Connect to peers (id -> addresses) that we have heard of, and take those that answer for our neighbours in
        the DHT. For who has lost all others, its initial peers, too."""
        network = self._network
        if network is not None:
            with contextlib.suppress(LocalError, OSError, EOFError):
                await self._introduce(network, peers)

    @property
    def rejected(self) -> Counter[Fault]:
        """Records in the DHT that we refused, by fault; since we started."""
        return self._validator.rejected

    async def maddrs(self) -> list[str]:
        network = self._network
        if network is not None:
            try:
                async with deadline(self.timeouts.request_s):
                    self._maddrs = await self._ask_maddrs(network.p2p)
            except (asyncio.TimeoutError, OSError, EOFError, ValueError, _Failed) as error:
                logger.debug("p2pd does not say our addresses: %s", error)
        return list(self._maddrs)

    async def links(self) -> Links:
        network = self._network
        if network is None:
            return Links()
        table = len(network.dht.protocol.routing_table.uid_to_peer_id)
        try:
            async with deadline(self.timeouts.request_s):
                request = p2pd_pb2.Request(type=p2pd_pb2.Request.LIST_PEERS)
                answer, _, writer = await ask(network.p2p, request)
            writer.close()
            relayed = [any(map(is_relayed, connection.addrs)) for connection in answer.peers]
        except (asyncio.TimeoutError, OSError, EOFError, ValueError, _Failed) as error:
            logger.debug("p2pd does not say who is connected: %s", error)
            return Links(routing_table=table)
        return Links(direct=relayed.count(False), relayed=relayed.count(True), routing_table=table)

    async def watch(self) -> None:
        """Runs until ``close``. Raises NetworkError when p2pd cannot be kept alive."""
        losses: deque[float] = deque()
        while not self._closed:
            if self._network is not None:
                reason = await self._until_lost(self._network)
                if self._closed:
                    return
                logger.warning("p2pd is lost (%s); starting it again", reason)
                network, self._network = self._network, None
                await self._shut(network.p2p)
            else:
                try:
                    await self._bring_up(first=False)
                    self.restarted.ring()
                    continue
                except LocalError as error:
                    if self._closed:
                        return
                    logger.warning("p2pd does not start again: %s", error)
                    self._host_maddrs = self._config.host_maddrs  # somebody may have taken our port meanwhile
            losses.append(time.monotonic())
            while losses[0] < losses[-1] - LOSS_WINDOW_S:
                losses.popleft()
            if len(losses) == MAX_LOSSES:
                raise NetworkError(f"p2pd was lost {MAX_LOSSES} times within a minute; see the log for its last words")
            await asyncio.sleep(0.1 * 2 ** len(losses) - 0.2)

    async def close(self) -> None:
        """Within ``leave_s``, and to its end also when it is cancelled. Idempotent."""
        if self._closed:
            return
        self._closed = True
        await to_its_end(self._close())

    async def _close(self) -> None:
        with contextlib.suppress(asyncio.TimeoutError):  # ``watch`` may be starting a p2pd, and shuts it when it sees
            async with deadline(self.timeouts.leave_s / 4):
                await self._starting.acquire()
        network, self._network = self._network, None
        if not self._closing.done():
            self._closing.set_result(None)
        await cancel_and_wait(self._stream_tasks, self.timeouts.leave_s / 4)
        for writer in self._writers:
            writer.transport.abort()
        if network is not None:
            network.dht.is_alive = False
            await self._shut(network.p2p)
        Node._open_nodes.discard(self)
        if not any(node._loop is self._loop for node in Node._open_nodes):
            # hivemind keeps no reference to its tasks: with several nodes in a loop, nobody knows whose is whose
            await cancel_and_wait(self._dht_tasks | tasks_of_hivemind(), self.timeouts.leave_s / 4)
        remove_folder(self._socket_folder)
        if self._claim is not None:
            os.close(self._claim)

    async def _bring_up(self, *, first: bool) -> None:
        """p2pd, the DHT node and the handlers. Only the first time must an initial peer be there: later on ``watch``
        keeps looking for them."""
        async with self._starting:
            self._network = await self._start_network(first=first)
            self._host_maddrs = pin_ports(self._host_maddrs, self._maddrs)

    async def _start_network(self, *, first: bool) -> _Network:
        if not self._config.client_mode:
            check_host_maddrs(self._host_maddrs)
        p2p = await self._start_p2pd(self._host_maddrs)
        try:
            if p2p.peer_id.to_base58() != self.peer_id:
                raise UsageError(f"identity {self._config.identity_path}: the file was changed meanwhile")
            reached, complaints = await self._reach(p2p, self._initial_peers)
            if first and self._initial_peers and not reached:
                raise NetworkError(
                    f"none of the initial peers answers within {self.timeouts.connect_s:g} s: {'; '.join(complaints)}; "
                    "check the address, that the peer is running, and its firewall"
                )
            work = DHTNode.create(
                p2p,
                hardening.node_id_of(self.peer_id),
                num_replicas=REPLICAS,
                wait_timeout=0.4 * self.timeouts.dht_s,  # so that one silent node does not cost a whole look-up
                cache_locally=False,  # what we look up changes every few seconds
                cache_nearest=0,
                cache_on_store=False,
                cache_refresh_before_expiry=0,
                reuse_get_requests=False,
                client_mode=self._config.client_mode,
                record_validator=self._validator,
            )
            dht = await own_daemon(work, self.timeouts.p2pd_start_s)
            network = _Network(p2p=p2p, dht=dht, connected=set(reached))
            await self._join(network, reached, first=first)
            for protocol in self._handlers:
                await self._register(p2p, protocol)
            self._maddrs = await own_daemon(self._ask_maddrs(p2p), self.timeouts.request_s)
            if self._closed:
                raise NetworkError("closed while it was starting")
            return network
        except BaseException:
            await self._shut(p2p)
            raise

    async def _start_p2pd(self, host_maddrs: Sequence[str]) -> Any:
        config = self._config
        local = all(is_loopback(maddr) for maddr in host_maddrs)
        relays = [maddr for maddrs in self._initial_peers.values() for maddr in maddrs]
        auto_relay = bool(config.use_relay and relays and not config.client_mode and not local)
        p2p_class = hardening.guarded_p2p(self._socket_folder, config.relay_service, self.traffic)
        for attempt in (1, 2):
            self._socket_folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # a guard that ends removes it
            try:
                return await p2p_class.create(
                    host_maddrs=None if config.client_mode else host_maddrs,
                    announce_maddrs=self._announced or None,
                    no_listen=config.client_mode,
                    dht_mode="client" if config.client_mode else "server",
                    identity_path=str(config.identity_path),
                    check_if_identity_free=False,
                    use_relay=config.use_relay,
                    use_auto_relay=auto_relay,
                    trusted_relays=relays if auto_relay else None,
                    auto_nat=not local,
                    nat_port_map=not local and not config.client_mode,
                    startup_timeout=self.timeouts.p2pd_start_s,
                    persistent_conn_max_msg_size=hardening.MAX_DHT_MESSAGE_BYTES,
                )
            except (P2PDaemonError, OSError, EOFError, ValueError) as error:
                if attempt == 2:
                    raise NetworkError(f"p2pd does not start: {error}") from error
                logger.warning("p2pd does not start (%s); trying once more", error)
        raise AssertionError

    async def _shut(self, p2p: Any) -> None:
        try:
            async with deadline(self.timeouts.leave_s / 4):
                await p2p.shutdown()
        except asyncio.TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                p2p._child.kill()
            await p2p._child.wait()
        finally:
            p2p._child._transport.close()  # its pipe, too, whose end may not have been seen yet

    async def _until_lost(self, network: _Network) -> str:
        """Until p2pd ends, or a task of hivemind's ends without which we could not notice what p2pd tells us."""
        p2p, client = network.p2p, network.p2p._client.control
        child = asyncio.ensure_future(p2p._child.wait())
        try:
            while True:
                vital = {child, p2p._reader_task, client._read_task, client._write_task, p2p._listen_task} - {None}
                done, _ = await asyncio.wait(
                    vital, timeout=4 * self.timeouts.refresh_s, return_when=asyncio.FIRST_COMPLETED
                )
                if done:
                    # the reason is in the exit code, which comes a moment after the pipes are closed
                    await asyncio.wait({child}, timeout=0.5)
                    errors = [task.exception() for task in done if not task.cancelled()]
                    return f"exit code {child.result()}" if child.done() else f"its connection broke: {errors}"
                with contextlib.suppress(LocalError, OSError, EOFError):
                    # initial peers may have come back, with others behind them
                    await self._introduce(network, self._initial_peers)
        finally:
            child.cancel()

    async def _introduce(self, network: _Network, peers: dict[str, list[str]]) -> None:
        """To those who are not in our routing table."""
        table = network.dht.protocol.routing_table
        missing = {peer_id: maddrs for peer_id, maddrs in peers.items() if hardening.node_id_of(peer_id) not in table}
        reached, _ = await self._reach(network.p2p, missing)
        await self._join(network, reached, first=False)

    async def _reach(self, p2p: Any, peers: dict[str, list[str]]) -> tuple[list[str], list[str]]:
        """Connect to all of them at once: those that answer, and what is wrong with the others."""

        async def reach(peer_id: str, maddrs: list[str]) -> str | None:
            try:
                async with deadline(self.timeouts.connect_s):
                    await self._connect(p2p, peer_id, maddrs)
            except asyncio.TimeoutError:
                return "no answer"
            except (_Failed, OSError, EOFError, ValueError) as error:
                return str(error)
            return None

        complaints = await asyncio.gather(*(reach(peer_id, maddrs) for peer_id, maddrs in peers.items()))
        answers = dict(zip(peers, complaints))
        return (
            [peer_id for peer_id, complaint in answers.items() if complaint is None],
            [f"{peers[peer_id][0]} ({complaint})" for peer_id, complaint in answers.items() if complaint is not None],
        )

    async def _join(self, network: _Network, peers: list[str], *, first: bool) -> None:
        """Introduce ourselves to ``peers``, compare clocks, and find our neighbours in the DHT."""
        protocol = network.dht.protocol

        async def introduce(peer_id: str) -> tuple[float, bool] | None:
            request = dht_pb2.PingRequest(peer=protocol.node_info, validate=not self._config.client_mode)
            asked_s = time.time()
            try:
                stub = protocol.get_stub(PeerID.from_base58(peer_id))
                answer = await self._in_dht(stub.rpc_ping(request))
            except (asyncio.TimeoutError, P2PDaemonError, P2PHandlerError, OSError) as error:
                logger.debug("peer %s does not introduce itself: %s", peer_id, error)
                return None
            behind_s = max(0.0, answer.dht_time - time.time()) or min(0.0, answer.dht_time - asked_s)
            if answer.peer.node_id:
                await protocol.update_routing_table(DHTID.from_bytes(answer.peer.node_id), PeerID.from_base58(peer_id))
            return behind_s, answer.available or self._config.client_mode

        answers = [answer for answer in await asyncio.gather(*map(introduce, peers)) if answer is not None]
        if first and peers and not answers:
            raise NetworkError(
                f"the initial peers answer, but not as peers of ours within {self.timeouts.dht_s:g} s; "
                "take a peer that runs this version and is not in client mode"
            )
        if answers:
            self._check_answers([behind_s for behind_s, _ in answers], [known for _, known in answers], first=first)
            with contextlib.suppress(asyncio.TimeoutError):
                await self._in_dht(network.dht.find_nearest_nodes([protocol.node_id]))

    def _check_answers(self, behind_s: list[float], reachable: list[bool], *, first: bool) -> None:
        offset_s = statistics.median(behind_s)
        direction = "behind" if offset_s > 0 else "ahead of"
        complaint = f"this machine's clock is {abs(offset_s):.1f} s {direction} the initial peers'; set the clock (NTP)"
        if first and abs(offset_s) > self.timeouts.record_life_s / 2:
            raise NetworkError(complaint)
        if abs(offset_s) > self.timeouts.record_life_s / 10:
            logger.warning("%s", complaint)
        if first and not any(reachable):
            raise NetworkError(
                "the initial peers cannot reach this machine; forward the port and give --announce-maddrs, "
                "or take part with --client-mode"
            )

    async def _in_dht(self, work: Coroutine[Any, Any, T]) -> T:
        """TimeoutError after ``dht_s``, and when we close meanwhile. The work goes on: hivemind's searches, cancelled,
        leave tasks behind that Python complains about; uncancelled, they end when their requests have timed out."""
        task = asyncio.create_task(work)
        self._dht_tasks.add(task)
        task.add_done_callback(self._dht_tasks.discard)
        await asyncio.wait({task, self._closing}, timeout=self.timeouts.dht_s, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.add_done_callback(lambda late: late.cancelled() or late.exception())
            raise asyncio.TimeoutError
        return task.result()

    async def _store(self, network: _Network, key: str, record: bytes, expires_s: float) -> bool:
        """DHTNode.store says what the last node answered, not whether any node took it."""
        protocol, key_id, value = network.dht.protocol, DHTID.generate(source=key), msgpack.packb(record)

        async def store_at(node_id: DHTID, peer: PeerID) -> bool:
            if node_id != protocol.node_id:
                return any(await protocol.call_store(peer, [key_id], [value], [expires_s], [self.peer_id]) or ())
            own = DHTRecord(key_id.to_bytes(), protocol.serializer.dumps(self.peer_id), value, expires_s)
            stored: bool = self._validator.validate(own) and protocol.storage.store_subkey(
                key_id, self.peer_id, value, expires_s
            )
            return stored

        nearest = await network.dht.find_nearest_nodes(
            [key_id], k_nearest=REPLICAS, beam_size=2 * REPLICAS, exclude_self=self._config.client_mode
        )
        return any(await asyncio.gather(*(store_at(node_id, peer) for node_id, peer in nearest[key_id].items())))

    async def _dial(
        self, network: _Network, peer_id: str, maddrs: list[str], protocol: str
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        peer = base58.b58decode(peer_id)
        request = p2pd_pb2.Request(
            type=p2pd_pb2.Request.STREAM_OPEN, streamOpen=p2pd_pb2.StreamOpenRequest(peer=peer, proto=[protocol])
        )
        if peer_id in network.connected:
            try:
                _, reader, writer = await ask(network.p2p, request)
                return reader, writer
            except _Failed:
                network.connected.discard(peer_id)
        if maddrs:
            await self._connect(network.p2p, peer_id, maddrs)
        _, reader, writer = await ask(network.p2p, request)
        if len(network.connected) >= MAX_KNOWN_PEERS:
            network.connected.clear()
        network.connected.add(peer_id)
        return reader, writer

    async def _connect(self, p2p: Any, peer_id: str, maddrs: list[str]) -> None:
        addrs = [encoded for encoded in map(partial(dial_bytes, peer_id), maddrs[:MAX_DIALLED_MADDRS]) if encoded]
        request = p2pd_pb2.ConnectRequest(peer=base58.b58decode(peer_id), addrs=addrs)
        _, _, writer = await ask(p2p, p2pd_pb2.Request(type=p2pd_pb2.Request.CONNECT, connect=request))
        writer.close()

    async def _ask_maddrs(self, p2p: Any) -> list[str]:
        answer, _, writer = await ask(p2p, p2pd_pb2.Request(type=p2pd_pb2.Request.IDENTIFY))
        writer.close()
        visible = [str(Multiaddr(addr)) for addr in answer.identify.addrs]
        ordered = dict.fromkeys([*self._announced, *sorted(visible, key=publicness)])
        return [f"{maddr}/p2p/{self.peer_id}" for maddr in ordered]

    async def _register(self, p2p: Any, protocol: str) -> None:
        await own_daemon(
            p2p.add_binary_stream_handler(protocol, partial(self._on_stream, protocol)), self.timeouts.request_s
        )

    async def _on_stream(
        self, protocol: str, info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        peer_id = info.peer_id.to_base58()
        full = len(self._stream_tasks) >= MAX_STREAMS or self._streams[peer_id] >= MAX_STREAMS_PER_PEER
        task = asyncio.current_task()
        if full or self._closed or task is None or public_key_of(peer_id) is None:
            logger.debug("peer %s: stream refused", peer_id[-8:])
            writer.transport.abort()
            return
        channel = self._channel(peer_id, reader, writer)
        channel.remote_ip = direct_ip(str(info.addr))
        self._stream_tasks.add(task)
        self._streams[peer_id] += 1
        try:
            await self._handlers[protocol](channel)
        except asyncio.CancelledError:
            if (
                not self._closed
            ):  # else it is we who cancelled it, and asyncio's own stream server would log a traceback
                raise
        except RemoteError as error:
            self.traffic.reject(error)
            logger.debug("%s", error)
        except Exception:
            logger.exception("a stream of peer %s could not be served", peer_id[-8:])
        finally:
            channel.close()
            self._stream_tasks.discard(task)
            self._streams[peer_id] -= 1
            if not self._streams[peer_id]:
                del self._streams[peer_id]

    def _channel(self, peer_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Channel:
        self._writers.add(writer)
        reader._limit = READ_BUFFER_BYTES  # type: ignore[attr-defined]
        return Channel(
            peer_id=peer_id,
            reader=reader,
            writer=_Writer(writer, self.timeouts.write_s),
            timeouts=self.timeouts,
            traffic=self.traffic,
        )


def is_relayed(addr: bytes) -> bool:
    """``addr``: in binary. Few contain the two bytes of /p2p-circuit by chance: only those are worth to be parsed."""
    return CIRCUIT in addr and "/p2p-circuit" in str(Multiaddr(addr))


async def ask(p2p: Any, request: Any) -> tuple[Any, asyncio.StreamReader, asyncio.StreamWriter]:
    """One request to p2pd, on a connection of its own, which stays open. hivemind's client leaves it open, too, where
    p2pd refuses or the caller gives up; here it is closed then. Raises _Failed when p2pd refuses."""
    reader, writer = await p2p._client.control.daemon_connector.open_connection()
    try:
        await control.write_pbmsg(writer, request)
        answer = p2pd_pb2.Response()
        await control.read_pbmsg_safe(reader, answer)
        if answer.type == p2pd_pb2.Response.ERROR:
            raise _Failed(dial_reason(answer.error.msg))
    except BaseException:
        writer.transport.abort()
        raise
    return answer, reader, writer


async def own_daemon(work: Awaitable[T], timeout_s: float) -> T:
    """``work`` that only p2pd on this machine can delay. Raises NetworkError."""
    try:
        async with deadline(timeout_s):
            return await work
    except (asyncio.TimeoutError, P2PDaemonError, OSError, EOFError, ValueError, _Failed) as error:
        raise NetworkError(f"p2pd does not do what we ask: {error or 'no answer'}") from error


async def cancel_and_wait(tasks: Collection[asyncio.Task[Any]], timeout_s: float) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(list(tasks), timeout=timeout_s)


def tasks_of_hivemind() -> set[asyncio.Task[Any]]:
    """Those that run its code, and those that its code waits for, such as an event's."""
    folders = (os.path.dirname(hivemind.__file__), hardening.__file__)
    found: set[asyncio.Task[Any]] = set()
    for task in asyncio.all_tasks():
        frame = getattr(task.get_coro(), "cr_frame", None)
        if frame is not None and frame.f_code.co_filename.startswith(folders):
            found |= {task, *(value for value in frame.f_locals.values() if isinstance(value, asyncio.Task))}
    return found


def claim_identity(path: Path) -> int:
    """A lock that the system releases with the process. Two peers of one identity take each other's connections.
    Raises UsageError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"identity {path}: cannot be read ({error.strerror})") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UsageError(f"identity {path}: another peer runs with it; give this one a folder of its own") from error
    except OSError:
        logger.debug("identity %s: this file system has no locks", path)
    return descriptor


def remove_folder(folder: Path) -> None:
    """Unless something is in it."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def private_socket_folder(folder: Path) -> Path:
    """Where one node's sockets go: inside ``folder``, or, where that path is too long for a socket, in the temporary
    folder. Sockets that a dead process left there are removed."""
    inside = folder.absolute() / "s"
    if len(os.fsencode(inside / LONGEST_SOCKET_NAME)) > MAX_SOCKET_PATH_BYTES:
        return Path(tempfile.mkdtemp(prefix="p2p-diloco-"))
    try:
        inside.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"folder {inside}: cannot be made ({error.strerror})") from error
    for path in [*inside.glob("p2pd-*.sock"), *inside.glob("p2pclient-*.sock")]:
        with socket.socket(socket.AF_UNIX) as trial, contextlib.suppress(OSError):
            if trial.connect_ex(str(path)) != 0:
                path.unlink()
    return inside
