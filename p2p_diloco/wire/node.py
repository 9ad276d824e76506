"""One peer on the network: its p2pd, its place in the DHT, its streams. The real ``channel.Transport``.

    start      p2pd under its guard, connected to the initial peers, DHT joined; or a LocalError that says why not
    watch      starts p2pd again when it dies, on the same identity and port; finds initial peers that come back
    close      streams cancelled, p2pd ended, nothing left behind

All in one event loop. ``daemon`` is one life of p2pd and ``dht`` our place in the DHT through it; ``streams`` bounds
what a stranger can do with these.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
import weakref
from collections import Counter, deque
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from p2p_diloco.core.addresses import can_be_dialled, own_maddrs, parse_maddr, peers_of, without_peer
from p2p_diloco.core.config import PeerConfig, Timeouts
from p2p_diloco.core.errors import Gone, LocalError, NetworkError, Silent, UsageError
from p2p_diloco.core.identity import Identity, public_key_of
from p2p_diloco.core.listening import at_home, kept, outward, pin_ports
from p2p_diloco.core.reach import Ways, ways_of
from p2p_diloco.core.records import RUNS_KEY, Fault
from p2p_diloco.core.waiting import Bell, deadline, to_its_end
from p2p_diloco.wire import hardening, kademlia
from p2p_diloco.wire.channel import Channel, Handler, Links
from p2p_diloco.wire.daemon import (
    FAILURES,
    Daemon,
    DialError,
    claim_identity,
    own_daemon,
    remove_dead_sockets,
    remove_folder,
)
from p2p_diloco.wire.dht import Dht, Searches
from p2p_diloco.wire.streams import Streams
from p2p_diloco.wire.traffic import Traffic

logger = logging.getLogger(__name__)

MAX_LOSSES = 5
LOSS_WINDOW_S = 60.0


@dataclass(frozen=True)
class _Network:
    """One life of p2pd, and of our place in the DHT with it."""

    daemon: Daemon
    dht: Dht


class Node:
    """One peer on the network; the ``Transport`` of everything above. ``Node.start`` makes one, ``close`` ends it."""

    _open_nodes: ClassVar[weakref.WeakSet[Node]] = weakref.WeakSet()

    def __init__(self, config: PeerConfig, identity: Identity, timeouts: Timeouts, socket_folder: Path) -> None:
        self.peer_id = identity.peer_id
        self.timeouts = timeouts
        self.traffic = Traffic()
        self.favoured: set[str] = set()
        self.restarted = Bell()
        """Rings whenever p2pd has been lost and is there again."""
        self._config = config
        self._socket_folder = socket_folder
        self._host_maddrs = tuple(maddr.strip() for maddr in config.host_maddrs)
        self._announced = [without_peer(parse_maddr(maddr)) for maddr in config.announce_maddrs]
        self._initial_peers = peers_of(config.initial_peers, self.peer_id)
        self._initial_maddrs = [maddr for maddrs in self._initial_peers.values() for maddr in maddrs]
        self._validator = kademlia.RecordValidator()
        self._validator.allow(RUNS_KEY)
        self._streams = Streams(timeouts, self.traffic, self.favoured)
        self._searches = Searches(timeouts)
        self._network: _Network | None = None
        self._maddrs: list[str] = []
        self._claim: int | None = None
        self._closed = False
        self._starting = asyncio.Lock()
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def start(cls, config: PeerConfig, identity: Identity, timeouts: Timeouts, socket_folder: Path) -> Node:
        """Returns a node that is in the DHT. ``identity`` is the one in ``config.identity_path``; ``socket_folder``
        belongs to this node alone, and is removed by ``close``. Raises UsageError or NetworkError."""
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
        """Has ``handler`` serve every incoming stream of this protocol from now on, through all lives of p2pd."""
        self._streams.handlers[protocol] = handler
        network = self._network
        if network is not None:
            try:
                await network.daemon.serve(protocol, partial(self._streams.on_stream, protocol))
            except NetworkError:
                if not network.daemon.has_ended:  # else ``watch`` does it, with the next p2pd
                    raise

    async def open(self, peer_id: str, maddrs: list[str], protocol: str) -> Channel:
        """Opens a stream to a peer. Raises Gone when the peer cannot be reached, Silent when that takes longer than
        ``connect_s``."""
        network = self._network
        if network is None:
            raise Gone(peer_id, "our own network side is down")
        if public_key_of(peer_id) is None:
            raise Gone(peer_id, "not the id of a peer")
        try:
            remote, reader, writer = await network.daemon.open_stream(peer_id, maddrs, protocol)
        except asyncio.TimeoutError:
            raise Silent(peer_id, f"cannot be reached within {self.timeouts.connect_s:g} s") from None
        except DialError as error:
            raise Gone(peer_id, f"cannot be reached: {error}") from error
        except (OSError, EOFError, ValueError) as error:
            raise Gone(peer_id, f"our own network side fails: {error}") from error
        return self._streams.channel(peer_id, reader, writer, remote=remote)

    async def publish(self, key: str, record: bytes, expires_s: float) -> bool:
        """Stores our record under ``key`` in the DHT. Returns False when nobody took it within ``dht_s``."""
        network = self._network
        return network is not None and await network.dht.publish(key, record, expires_s)

    async def look_up(self, key: str) -> list[bytes]:
        """Returns the records under ``key``; where the DHT takes longer than ``dht_s``, those that we store
        ourselves."""
        network = self._network
        return [] if network is None else await network.dht.look_up(key)

    async def meet(self, peers: dict[str, list[str]]) -> None:
        """Connects to peers (id -> addresses) that we have heard of, and makes those that answer our neighbours in the
        DHT. It is for a peer that has lost all others, its initial peers, too."""
        network = self._network
        if network is not None:
            with contextlib.suppress(LocalError, OSError, EOFError):
                await self._introduce(network, peers)

    @property
    def rejected(self) -> Counter[Fault]:
        """Records in the DHT that we refused, by fault; since we started."""
        return self._validator.rejected

    async def maddrs(self) -> list[str]:
        """Returns the addresses where others can dial us, those that the user announces first; the last known ones
        while p2pd does not answer."""
        network = self._network
        if network is not None:
            try:
                async with deadline(self.timeouts.request_s):
                    self._maddrs = self._with_announced(await network.daemon.maddrs())
            except (asyncio.TimeoutError, *FAILURES) as error:
                logger.debug("p2pd does not say our addresses: %s", error)
        return list(self._maddrs)

    @property
    def dialable(self) -> bool:
        """Returns whether others can dial us: unless in client mode, as far as the addresses that the user announces
        tell, or else those last known."""
        own = self._announced or self._maddrs
        return not self._config.client_mode and can_be_dialled(own, self._initial_maddrs)

    @property
    def ways(self) -> Ways:
        """Returns over which families others dial us, and we dial them: as far as the same addresses tell, and the
        routes of this machine."""
        return ways_of(self._announced or self._maddrs, self._initial_maddrs, outward())

    async def links(self) -> Links:
        """Returns how we are connected now, as far as p2pd tells."""
        network = self._network
        if network is None:
            return Links()
        table = network.dht.n_neighbours
        try:
            async with deadline(self.timeouts.request_s):
                relayed = await network.daemon.relayed()
        except (asyncio.TimeoutError, *FAILURES) as error:
            logger.debug("p2pd does not say who is connected: %s", error)
            return Links(routing_table=table)
        return Links(direct=relayed.count(False), relayed=relayed.count(True), routing_table=table)

    async def watch(self) -> None:
        """Keeps p2pd alive until ``close``. Raises NetworkError when it is lost MAX_LOSSES times within a minute."""
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
        """Ends everything within ``leave_s``, and to its end also when it is cancelled. More often does no harm."""
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
        self._searches.close()
        await self._streams.end(self.timeouts.leave_s / 4)
        if network is not None:
            network.dht.shut()
            await network.daemon.shut()
        Node._open_nodes.discard(self)
        if not any(node._loop is self._loop for node in Node._open_nodes):
            # hivemind keeps no reference to its tasks: with several nodes in a loop, nobody knows whose is whose
            await self._searches.cancel(self.timeouts.leave_s / 4)
        remove_folder(self._socket_folder)
        if self._claim is not None:
            os.close(self._claim)

    async def _bring_up(self, *, first: bool) -> None:
        """Starts p2pd, and our place in the DHT with it. Only the first time must an initial peer be there: later on
        ``watch`` keeps looking for them."""
        async with self._starting:
            self._network = await self._start_network(first=first)
            self._host_maddrs = pin_ports(self._host_maddrs, self._maddrs)

    async def _start_network(self, *, first: bool) -> _Network:
        with nullcontext(self._host_maddrs) if self._config.client_mode else kept(self._host_maddrs) as host_maddrs:
            daemon = await Daemon.start(
                self._config,
                self.timeouts,
                self._socket_folder,
                host_maddrs=host_maddrs,
                announced=self._announced,
                relays=self._initial_maddrs,
                traffic=self.traffic,
                connections=self._streams.connections,
            )
        self._host_maddrs = host_maddrs
        try:
            if daemon.peer_id != self.peer_id:
                raise UsageError(f"identity {self._config.identity_path}: the file was changed meanwhile")
            reached, complaints = await daemon.reach(self._initial_peers)
            if first and self._initial_peers and not reached:
                raise NetworkError(
                    f"none of the initial peers answers within {self.timeouts.connect_s:g} s: {'; '.join(complaints)}; "
                    "check the address, that the peer is running, and its firewall"
                )
            dht = await Dht.create(
                daemon,
                self.timeouts,
                client_mode=self._config.client_mode,
                validator=self._validator,
                searches=self._searches,
                favoured=self.favoured,
            )
            daemon.connected |= set(reached)
            await dht.join(reached, first=first)
            for protocol in self._streams.handlers:
                await daemon.serve(protocol, partial(self._streams.on_stream, protocol))
            self._maddrs = self._with_announced(await own_daemon(daemon.maddrs(), self.timeouts.request_s))
            if self._closed:
                raise NetworkError("closed while it was starting")
            return _Network(daemon, dht)
        except BaseException:
            await daemon.shut()
            raise

    def _with_announced(self, visible: list[str]) -> list[str]:
        """Returns our addresses as others are told them: those that the user announces come first."""
        ips = outward()
        listened = [] if self._config.client_mode else at_home(self._host_maddrs, ips)
        return [f"{maddr}/p2p/{self.peer_id}" for maddr in own_maddrs(self._announced, visible, listened, ips)]

    async def _until_lost(self, network: _Network) -> str:
        """Returns why p2pd is lost, when it is. Meanwhile it looks for initial peers that have come back, with others
        behind them."""
        while (reason := await network.daemon.lost(4 * self.timeouts.refresh_s)) is None:
            with contextlib.suppress(LocalError, OSError, EOFError):
                await self._introduce(network, self._initial_peers)
        return reason

    async def _introduce(self, network: _Network, peers: dict[str, list[str]]) -> None:
        """Makes those of ``peers`` our neighbours that are not yet, as far as they answer."""
        reached, _ = await network.daemon.reach(network.dht.strangers(peers))
        await network.dht.join(reached, first=False)
