"""Our place in the DHT, for one life of p2pd: neighbours that know us, records stored and looked up.

It is hivemind's DHTNode, asked with time limits of ours. What a stranger can do to it is bounded in ``kademlia``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import statistics
import time
from collections.abc import Container, Coroutine
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import hivemind
import msgpack
from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord
from hivemind.p2p import P2PDaemonError, P2PHandlerError, PeerID
from hivemind.proto import dht_pb2

from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.errors import NetworkError
from p2p_diloco.core.records import unpack_plain
from p2p_diloco.core.waiting import cancel_and_wait
from p2p_diloco.wire import hardening, kademlia
from p2p_diloco.wire.daemon import Daemon, own_daemon

logger = logging.getLogger(__name__)
T = TypeVar("T")

REPLICAS = 5
"""Nodes that hold every record; a look-up asks as many."""
MAX_RECORDS = kademlia.MAX_MERGED


class Searches:
    """Waits for what hivemind does for a node in the DHT, through all lives of its p2pd: for each search at most
    ``dht_s``."""

    def __init__(self, timeouts: Timeouts) -> None:
        self._timeouts = timeouts
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing = asyncio.get_running_loop().create_future()

    async def wait_for(self, work: Coroutine[Any, Any, T]) -> T:
        """Returns what ``work`` does. Raises TimeoutError after ``dht_s``, and when the node closes meanwhile.

        The work goes on then: hivemind's searches, cancelled, leave tasks behind that Python complains about;
        uncancelled, they end when their requests have timed out."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await asyncio.wait({task, self._closing}, timeout=self._timeouts.dht_s, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.add_done_callback(lambda late: late.cancelled() or late.exception())
            raise asyncio.TimeoutError
        return task.result()

    def close(self) -> None:
        """Ends all waiting, now and from now on."""
        if not self._closing.done():
            self._closing.set_result(None)

    async def cancel(self, within_s: float) -> None:
        """Cancels what still runs, with all other tasks of hivemind's in this event loop."""
        await cancel_and_wait(self._tasks | tasks_of_hivemind(), within_s)


@dataclass(frozen=True, kw_only=True, eq=False)
class Dht:
    """Our place in the DHT, for one life of p2pd. ``Dht.create`` makes one."""

    node: Any
    """hivemind's DHTNode."""
    peer_id: str
    client_mode: bool
    timeouts: Timeouts
    validator: kademlia.RecordValidator
    searches: Searches

    @classmethod
    async def create(
        cls,
        daemon: Daemon,
        timeouts: Timeouts,
        *,
        client_mode: bool,
        validator: kademlia.RecordValidator,
        searches: Searches,
        favoured: Container[str],
    ) -> Dht:
        """Returns a place without neighbours; ``join`` finds some. ``favoured``: peers whose records are kept here
        before others'. Raises NetworkError."""
        work = DHTNode.create(
            daemon.p2p,
            kademlia.node_id_of(daemon.peer_id),
            num_replicas=REPLICAS,
            wait_timeout=0.4 * timeouts.dht_s,  # so that one silent node does not cost a whole look-up
            cache_locally=False,  # what we look up changes every few seconds
            cache_nearest=0,
            cache_on_store=False,
            cache_refresh_before_expiry=0,
            reuse_get_requests=False,
            client_mode=client_mode,
            record_validator=validator,
        )
        node = await own_daemon(work, timeouts.p2pd_start_s)
        node.protocol.storage.favoured = favoured
        return cls(
            node=node,
            peer_id=daemon.peer_id,
            client_mode=client_mode,
            timeouts=timeouts,
            validator=validator,
            searches=searches,
        )

    def shut(self) -> None:
        """Ends what it does by itself from time to time."""
        self.node.is_alive = False

    # -- neighbours --------------------------------------------------------------------------------------------------

    @property
    def n_neighbours(self) -> int:
        """Returns how many peers are in our routing table."""
        return len(self.node.protocol.routing_table.uid_to_peer_id)

    def strangers(self, peers: dict[str, list[str]]) -> dict[str, list[str]]:
        """Returns those of ``peers`` (id -> addresses) that are not in our routing table."""
        table = self.node.protocol.routing_table
        return {peer_id: maddrs for peer_id, maddrs in peers.items() if kademlia.node_id_of(peer_id) not in table}

    async def join(self, peers: list[str], *, first: bool) -> None:
        """Introduces us to ``peers``, which are connected, compares clocks, and finds our neighbours.

        The ``first`` time it raises NetworkError when no peer answers as one of ours, when none can reach us, or when
        our clock is too far from theirs; later on it only warns of the clock."""
        answers = [answer for answer in await asyncio.gather(*map(self._introduce, peers)) if answer is not None]
        if first and peers and not answers:
            raise NetworkError(
                f"the initial peers answer, but not as peers of ours within {self.timeouts.dht_s:g} s; "
                "take a peer that runs this version and is not in client mode"
            )
        if answers:
            self._check_answers([behind_s for behind_s, _ in answers], [known for _, known in answers], first=first)
            with contextlib.suppress(asyncio.TimeoutError):
                await self.searches.wait_for(self.node.find_nearest_nodes([self.node.protocol.node_id]))

    async def _introduce(self, peer_id: str) -> tuple[float, bool] | None:
        """Returns how far our clock is behind the peer's, in seconds, and whether it can reach us as far as that
        matters; None when it does not answer."""
        protocol = self.node.protocol
        request = dht_pb2.PingRequest(peer=protocol.node_info, validate=not self.client_mode)
        asked_s = time.time()
        try:
            stub = protocol.get_stub(PeerID.from_base58(peer_id))
            answer = await self.searches.wait_for(stub.rpc_ping(request))
        except (asyncio.TimeoutError, P2PDaemonError, P2PHandlerError, OSError) as error:
            logger.debug("peer %s does not introduce itself: %s", peer_id, error)
            return None
        behind_s = max(0.0, answer.dht_time - time.time()) or min(0.0, answer.dht_time - asked_s)
        if answer.peer.node_id:
            await protocol.update_routing_table(DHTID.from_bytes(answer.peer.node_id), PeerID.from_base58(peer_id))
        return behind_s, answer.available or self.client_mode

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

    # -- records -----------------------------------------------------------------------------------------------------

    async def publish(self, key: str, record: bytes, expires_s: float) -> bool:
        """Stores our record under ``key`` at the nodes nearest to it. Returns whether any of them took it within
        ``dht_s``."""
        self.validator.allow(key)
        try:
            return await self.searches.wait_for(self._store(key, record, expires_s))
        except asyncio.TimeoutError:
            return False

    async def look_up(self, key: str) -> list[bytes]:
        """Returns the records under ``key``: the DHT's, or, where that takes longer than ``dht_s``, those that we store
        ourselves."""
        self.validator.allow(key)
        try:
            found = await self.searches.wait_for(self.node.get(key, latest=True, beam_size=REPLICAS))
            entries = [] if found is None else [entry.value for entry in found.value.values()]
        except asyncio.TimeoutError:
            found = self.node.protocol.storage.get(DHTID.generate(source=key))
            entries = [] if found is None else [unpack_plain(value) for _, (value, _) in found.value.items()]
        return list(islice((entry for entry in entries if isinstance(entry, bytes)), MAX_RECORDS))

    async def _store(self, key: str, record: bytes, expires_s: float) -> bool:
        """Returns whether any node took the record; DHTNode.store says what the last one answered."""
        protocol, key_id, value = self.node.protocol, DHTID.generate(source=key), msgpack.packb(record)

        async def store_at(node_id: DHTID, peer: PeerID) -> bool:
            if node_id != protocol.node_id:
                return any(await protocol.call_store(peer, [key_id], [value], [expires_s], [self.peer_id]) or ())
            own = DHTRecord(key_id.to_bytes(), protocol.serializer.dumps(self.peer_id), value, expires_s)
            stored: bool = self.validator.validate(own) and protocol.storage.store_subkey(
                key_id, self.peer_id, value, expires_s
            )
            return stored

        nearest = await self.node.find_nearest_nodes(
            [key_id], k_nearest=REPLICAS, beam_size=2 * REPLICAS, exclude_self=self.client_mode
        )
        return any(await asyncio.gather(*(store_at(node_id, peer) for node_id, peer in nearest[key_id].items())))


def tasks_of_hivemind() -> set[asyncio.Task[Any]]:
    """Returns the tasks that run hivemind's code, and those that its code waits for, such as an event's."""
    folders = (os.path.dirname(hivemind.__file__), kademlia.__file__, hardening.__file__)
    found: set[asyncio.Task[Any]] = set()
    for task in asyncio.all_tasks():
        frame = getattr(task.get_coro(), "cr_frame", None)
        if frame is not None and frame.f_code.co_filename.startswith(folders):
            found |= {task, *(value for value in frame.f_locals.values() if isinstance(value, asyncio.Task))}
    return found
