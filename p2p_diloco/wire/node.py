"""One peer on the network: its p2pd, its place in the DHT, its streams. The real ``wire.Transport``.

    start      p2pd under its guard, connected to the initial peers, DHT joined; or a LocalError that says why not
    watch      starts p2pd again when it dies, on the same identity and port; finds initial peers that come back
    close      streams cancelled, p2pd ended, nothing left behind

All in one event loop. What a stranger can do to the DHT is bounded in ``kademlia``, and in ``streams`` what one can do
with these.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import statistics
import time
import weakref
from collections import Counter, deque
from collections.abc import Coroutine
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import hivemind
import msgpack
from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord
from hivemind.p2p import P2PDaemonError, P2PHandlerError, PeerID
from hivemind.proto import dht_pb2

from p2p_diloco.core.addresses import check_host_maddrs, parse_maddr, peers_of, pin_ports, without_peer
from p2p_diloco.core.config import PeerConfig, Timeouts
from p2p_diloco.core.errors import Gone, LocalError, NetworkError, Silent, UsageError
from p2p_diloco.core.identity import Identity, public_key_of
from p2p_diloco.core.records import RUNS_KEY, Fault, unpack_plain
from p2p_diloco.core.waiting import Bell, cancel_and_wait, deadline, to_its_end
from p2p_diloco.wire import hardening, kademlia
from p2p_diloco.wire.channel import Channel, Handler, Links
from p2p_diloco.wire.daemon import (
    FAILURES,
    Daemon,
    Refused,
    claim_identity,
    own_daemon,
    remove_dead_sockets,
    remove_folder,
)
from p2p_diloco.wire.streams import Streams
from p2p_diloco.wire.traffic import Traffic

logger = logging.getLogger(__name__)
T = TypeVar("T")

REPLICAS = 5
"""Nodes that hold every record; a look-up asks as many."""
MAX_RECORDS = 4096
MAX_LOSSES = 5
LOSS_WINDOW_S = 60.0


@dataclass(frozen=True)
class _Network:
    """One life of p2pd, and of our place in the DHT with it."""

    daemon: Daemon
    dht: Any
    """hivemind's DHTNode."""


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
        self._validator = kademlia.RecordValidator()
        self._validator.allow(RUNS_KEY)
        self._streams = Streams(timeouts, self.traffic)
        self._dht_tasks: set[asyncio.Task[Any]] = set()
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
            remove_dead_sockets(socket_folder)
            await node._bring_up(first=True)
        except BaseException:
            await node.close()
            raise
        return node

    async def serve(self, protocol: str, handler: Handler) -> None:
        self._streams.handlers[protocol] = handler
        network = self._network
        if network is not None:
            try:
                await network.daemon.serve(protocol, partial(self._streams.on_stream, protocol))
            except NetworkError:
                if not network.daemon.has_ended:  # else ``watch`` does it, with the next p2pd
                    raise

    async def open(self, peer_id: str, maddrs: list[str], protocol: str) -> Channel:
        network = self._network
        if network is None:
            raise Gone(peer_id, "our own network side is down")
        if public_key_of(peer_id) is None:
            raise Gone(peer_id, "not the id of a peer")
        try:
            async with deadline(self.timeouts.connect_s):
                reader, writer = await network.daemon.open_stream(peer_id, maddrs, protocol)
        except asyncio.TimeoutError:
            raise Silent(peer_id, f"cannot be reached within {self.timeouts.connect_s:g} s") from None
        except Refused as error:
            raise Gone(peer_id, f"cannot be reached: {error}") from error
        except (OSError, EOFError, ValueError) as error:
            raise Gone(peer_id, f"our own network side fails: {error}") from error
        return self._streams.channel(peer_id, reader, writer)

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
                    self._maddrs = self._with_announced(await network.daemon.maddrs())
            except (asyncio.TimeoutError, *FAILURES) as error:
                logger.debug("p2pd does not say our addresses: %s", error)
        return list(self._maddrs)

    async def links(self) -> Links:
        network = self._network
        if network is None:
            return Links()
        table = len(network.dht.protocol.routing_table.uid_to_peer_id)
        try:
            async with deadline(self.timeouts.request_s):
                relayed = await network.daemon.relayed()
        except (asyncio.TimeoutError, *FAILURES) as error:
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
                await network.daemon.shut()
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
        self._streams.refuse()
        await to_its_end(self._close())

    async def _close(self) -> None:
        with contextlib.suppress(asyncio.TimeoutError):  # ``watch`` may be starting a p2pd, and shuts it when it sees
            async with deadline(self.timeouts.leave_s / 4):
                await self._starting.acquire()
        network, self._network = self._network, None
        if not self._closing.done():
            self._closing.set_result(None)
        await self._streams.end(self.timeouts.leave_s / 4)
        if network is not None:
            network.dht.is_alive = False
            await network.daemon.shut()
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
        daemon = await Daemon.start(
            self._config,
            self.timeouts,
            self._socket_folder,
            host_maddrs=self._host_maddrs,
            announced=self._announced,
            relays=[maddr for maddrs in self._initial_peers.values() for maddr in maddrs],
            traffic=self.traffic,
        )
        try:
            if daemon.peer_id != self.peer_id:
                raise UsageError(f"identity {self._config.identity_path}: the file was changed meanwhile")
            reached, complaints = await self._reach(daemon, self._initial_peers)
            if first and self._initial_peers and not reached:
                raise NetworkError(
                    f"none of the initial peers answers within {self.timeouts.connect_s:g} s: {'; '.join(complaints)}; "
                    "check the address, that the peer is running, and its firewall"
                )
            work = DHTNode.create(
                daemon.p2p,
                kademlia.node_id_of(self.peer_id),
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
            daemon.connected |= set(reached)
            network = _Network(daemon, dht)
            await self._join(network, reached, first=first)
            for protocol in self._streams.handlers:
                await daemon.serve(protocol, partial(self._streams.on_stream, protocol))
            self._maddrs = self._with_announced(await own_daemon(daemon.maddrs(), self.timeouts.request_s))
            if self._closed:
                raise NetworkError("closed while it was starting")
            return network
        except BaseException:
            await daemon.shut()
            raise

    def _with_announced(self, visible: list[str]) -> list[str]:
        """As others are told: what the user announces comes first."""
        return [f"{maddr}/p2p/{self.peer_id}" for maddr in dict.fromkeys([*self._announced, *visible])]

    async def _until_lost(self, network: _Network) -> str:
        """Looks, while it waits, for initial peers that have come back, with others behind them."""
        while (reason := await network.daemon.lost(4 * self.timeouts.refresh_s)) is None:
            with contextlib.suppress(LocalError, OSError, EOFError):
                await self._introduce(network, self._initial_peers)
        return reason

    async def _introduce(self, network: _Network, peers: dict[str, list[str]]) -> None:
        """To those who are not in our routing table."""
        table = network.dht.protocol.routing_table
        missing = {peer_id: maddrs for peer_id, maddrs in peers.items() if kademlia.node_id_of(peer_id) not in table}
        reached, _ = await self._reach(network.daemon, missing)
        await self._join(network, reached, first=False)

    async def _reach(self, daemon: Daemon, peers: dict[str, list[str]]) -> tuple[list[str], list[str]]:
        """Connect to all of them at once: those that answer, and what is wrong with the others."""

        async def reach(peer_id: str, maddrs: list[str]) -> str | None:
            try:
                async with deadline(self.timeouts.connect_s):
                    await daemon.connect(peer_id, maddrs)
            except asyncio.TimeoutError:
                return "no answer"
            except FAILURES as error:
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


def tasks_of_hivemind() -> set[asyncio.Task[Any]]:
    """Those that run its code, and those that its code waits for, such as an event's."""
    folders = (os.path.dirname(hivemind.__file__), kademlia.__file__, hardening.__file__)
    found: set[asyncio.Task[Any]] = set()
    for task in asyncio.all_tasks():
        frame = getattr(task.get_coro(), "cr_frame", None)
        if frame is not None and frame.f_code.co_filename.startswith(folders):
            found |= {task, *(value for value in frame.f_locals.values() if isinstance(value, asyncio.Task))}
    return found
