"""Our node of the DHT: whose records it stores and believes, what it answers strangers, whom it takes for a neighbour.

Where stock hivemind trusts whoever reaches it, these classes refuse (``hardening`` puts them in its place): before
memory is taken, and without raising where hivemind would lose the exception.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import time
from collections import Counter, OrderedDict
from collections.abc import Collection, Container
from itertools import islice
from typing import Any

import msgpack
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.p2p import P2PContext, PeerID
from hivemind.proto import dht_pb2
from hivemind.utils.timed_storage import ValueWithExpiration, get_dht_time

from p2p_diloco.core.buckets import Quota
from p2p_diloco.core.places import Places
from p2p_diloco.core.records import MAX_RECORD_LIFE_S, Fault, Unsound, open_record, unpack_plain

logger = logging.getLogger(__name__)

MAX_DHT_MESSAGE_BYTES = 4 * 1024 * 1024
"""Of one request or answer of the DHT; p2pd refuses longer ones. A full dictionary takes up to 2.2 MB."""
MAX_UNSOUND = 16
"""Records that fail verification, at 0.2 ms each, before the rest of an answer is thrown away with them."""
MAX_STORE_KEYS = 64
MAX_STORE_BYTES = 128 * 1024
MAX_FIND_KEYS = 1
"""Our own look-ups ask for one key at a time; every further one would add a full dictionary to the answer."""
REQUESTS_PER_S = 20.0
REQUEST_BURST = 100.0
MAX_VERIFIED = 8192
MAX_SUBKEYS = 1024
"""Peers whose records one DHT key holds, at one node. Sealed records are at most 2 kB."""
MAX_MERGED = 8 * MAX_SUBKEYS
"""Records that a search takes under one key, from all nodes that answer: none of them can fill it alone."""
EXPIRATION_TOLERANCE_S = 1.0


@functools.lru_cache(maxsize=4096)
def node_id_of(peer_id: str) -> Any:
    """Returns the place of a peer in the DHT, which follows from its id. Stock nodes choose it, so that one peer can
    fill every routing table."""
    return DHTID.generate(source=PeerID.from_base58(peer_id).to_bytes())


class RecordValidator(RecordValidatorBase):  # type: ignore[misc]
    """Refuses everything but sealed records, under a key that was allowed, each in its own peer's subkey, for as long
    as its signature says. Stock hivemind stores anything of anybody, for ever.

    A node validates what it stores, and what others answer: an entry is verified once and remembered."""

    def __init__(self) -> None:
        self._allowed: set[bytes] = set()
        self._expires_s: OrderedDict[tuple[bytes, bytes], float] = OrderedDict()
        self.rejected: Counter[Fault] = Counter()
        """Under keys that were allowed: how many records were refused, by fault."""

    def allow(self, key: str) -> None:
        """Accepts sound records under ``key`` from now on."""
        self._allowed.add(DHTID.generate(source=key).to_bytes())

    def validate(self, record: DHTRecord) -> bool:
        """Tells whether a record may be stored and believed. It never raises: hivemind would lose the exception, and
        with it a search that then never ends."""
        if record.key not in self._allowed:
            return False
        fault: Fault = "other"
        try:
            if self._is_sound(record):
                return True
        except Unsound as error:
            fault = error.fault
        except Exception as error:
            logger.debug("record refused: %s", error)
        self.rejected[fault] += 1
        return False

    def _is_sound(self, record: DHTRecord) -> bool:
        if not abs(record.expiration_time - time.time()) <= MAX_RECORD_LIFE_S:  # not NaN either
            return False
        entry = (record.subkey, record.value)
        expires_s = self._expires_s.get(entry)
        if expires_s is None:
            sealed = unpack_plain(record.value)
            if not isinstance(sealed, bytes):
                return False
            opened = open_record(sealed)
            if msgpack.packb(opened.peer_id) != record.subkey:
                return False
            expires_s = self._expires_s[entry] = opened.expires_s
            if len(self._expires_s) > MAX_VERIFIED:
                self._expires_s.popitem(last=False)
        self._expires_s.move_to_end(entry)
        return bool(abs(expires_s - record.expiration_time) <= EXPIRATION_TOLERANCE_S)


class RecordStorage(DHTLocalStorage):  # type: ignore[misc]
    """Keeps at most MAX_SUBKEYS records under one key; where that is full, ``places`` says which one makes room.

    It hands out copies: a search merges what strangers answer into the dictionary that it is given, which would thus
    enter our storage past the limits of ``rpc_store``."""

    favoured: Container[str] = ()
    """Peers whose records are kept before others'; ``Dht`` sets it."""

    def __init__(self, maxsize: int | None = None) -> None:
        super().__init__(maxsize)
        self._places: dict[Any, Places] = {}

    def get(self, key: Any) -> Any:
        """Returns a copy of what is stored under ``key``; None where there is nothing."""
        item = super().get(key)
        if item is None or not isinstance(item.value, DictionaryDHTValue):
            return item
        copy = DictionaryDHTValue()
        for subkey, (value, expiration_time) in item.value.items():
            copy.store(subkey, value, expiration_time)
        return ValueWithExpiration(copy, item.expiration_time)

    def store_subkey(self, key: Any, subkey: Any, value: bytes, expiration_time: float) -> bool:
        """Stores one peer's record under ``key``. Returns whether it is newer than what was there, and has a place."""
        item = super().get(key)
        dictionary = DictionaryDHTValue() if item is None else item.value
        latest = -math.inf if item is None else item.expiration_time
        known = dictionary.get(subkey)
        if expiration_time < get_dht_time() or (known is not None and known.expiration_time >= expiration_time):
            return False
        if not self._take_place(key, subkey, dictionary) or not dictionary.store(subkey, value, expiration_time):
            return False
        if dictionary.latest_expiration_time > latest:
            self.store(key, dictionary, dictionary.latest_expiration_time)
        return True

    def _take_place(self, key: Any, subkey: Any, dictionary: DictionaryDHTValue) -> bool:
        """Returns whether the record of one more peer is taken under ``key``, and drops the one that makes room."""
        places = self._places.setdefault(key, Places(MAX_SUBKEYS))
        if subkey not in places and len(places) >= MAX_SUBKEYS:
            for outdated in [held for held in places if held not in dictionary]:
                places.leave(outdated)
        has_place, made_room = places.take(subkey, came=True, favoured=self.favoured)
        if made_room is not None:
            del dictionary[made_room]
        return has_place


class HardenedDHTProtocol(DHTProtocol):  # type: ignore[misc]
    """Bounds what a stranger may ask of our DHT node, and what we believe of its answers.

    Its name is part of the protocol's: stock nodes, which choose their own node ids, do not meet ours.
    """

    _rpc_handlers = None

    def __init__(self, *, _initialized_with_create: bool = False) -> None:
        super().__init__(_initialized_with_create=_initialized_with_create)
        self._requests = Quota(REQUESTS_PER_S, REQUEST_BURST)
        self._pings = Quota(2 * REQUESTS_PER_S, 2 * REQUEST_BURST)

    async def rpc_ping(self, request: dht_pb2.PingRequest, context: P2PContext) -> dht_pb2.PingResponse:
        """Answers a ping. A peer over the limit, or with a node id that is not its own, is not remembered. It does not
        raise: hivemind calls it in a task of its own for every store and find."""
        remote = context.remote_id.to_base58()
        claimed = request.peer.node_id
        if not self._pings.take(remote, time.monotonic()) or claimed not in (b"", node_id_of(remote).to_bytes()):
            return dht_pb2.PingResponse(peer=self.node_info, dht_time=get_dht_time(), available=False)
        return await super().rpc_ping(request, context)

    async def rpc_store(self, request: dht_pb2.StoreRequest, context: P2PContext) -> dht_pb2.StoreResponse:
        """Stores a peer's own record and nothing else, so that free identities at least need a connection each.
        Whole dictionaries are refused: peers renew their records within seconds, on nodes that are new, too."""
        remote = self._admit(context)
        lists = (request.keys, request.subkeys, request.values, request.expiration_time, request.in_cache)
        if len({len(items) for items in lists}) != 1 or len(request.keys) > MAX_STORE_KEYS:
            raise ValueError("a store request that is not aligned, or of too many keys")
        if request.ByteSize() > MAX_STORE_BYTES:
            raise ValueError("a store request that is too large")
        asyncio.create_task(self.rpc_ping(dht_pb2.PingRequest(peer=request.peer), context))  # noqa: RUF006
        response = dht_pb2.StoreResponse(store_ok=[], peer=self.node_info)
        for key, subkey, value, expiration_time in zip(*lists[:4]):
            response.store_ok.append(
                subkey == self.serializer.dumps(remote)
                and self._validate_record(key, subkey, value, expiration_time)
                and self.storage.store_subkey(DHTID.from_bytes(key), remote, value, expiration_time)
            )
        return response

    async def rpc_find(self, request: dht_pb2.FindRequest, context: P2PContext) -> dht_pb2.FindResponse:
        """Answers a search for one key: a small request for many would be answered with megabytes."""
        self._admit(context)
        if len(request.keys) > MAX_FIND_KEYS:
            raise ValueError("a find request of too many keys")
        return await super().rpc_find(request, context)

    async def call_find(self, peer: PeerID, keys: Collection[DHTID]) -> Any:
        """Asks a peer for a key, and drops what it must not say. An answer that claims to be valid for ever would end
        the search before others are heard; invented neighbours, or too many, would lead it astray."""
        found = await super().call_find(peer, keys)
        if found is None:
            return None
        latest = get_dht_time() + MAX_RECORD_LIFE_S
        return {
            key: (
                item if item is not None and item.expiration_time <= latest else None,
                {
                    node_id: neighbour
                    for node_id, neighbour in islice(nearest.items(), self.bucket_size)
                    if node_id == node_id_of(neighbour.to_base58())
                },
            )
            for key, (item, nearest) in found.items()
        }

    async def update_routing_table(self, node_id: DHTID | None, peer_id: PeerID, responded: bool = True) -> None:
        """Gives each peer one place in the routing table, with bounded reserves. New neighbours are not sent all that
        we store (see rpc_store)."""
        if not responded:
            await super().update_routing_table(node_id, peer_id, responded=False)
            return
        if node_id != node_id_of(peer_id.to_base58()):
            logger.debug("peer %s claims a node id that is not its own", peer_id)
            return
        to_ping = self.routing_table.add_or_update_node(node_id, peer_id)
        bucket = self.routing_table.buckets[self.routing_table.get_bucket_index(node_id)]
        if len(bucket.replacement_nodes) > bucket.size:
            del self.routing_table[next(iter(bucket.replacement_nodes))]
        if to_ping is not None:
            asyncio.create_task(self.call_ping(to_ping[1]))  # noqa: RUF006

    def _admit(self, context: P2PContext) -> str:
        remote: str = context.remote_id.to_base58()
        if not self._requests.take(remote, time.monotonic()):
            raise ValueError("too many requests")
        return remote

    def _validate_dictionary(self, key_bytes: bytes, dictionary: DictionaryDHTValue) -> bool:
        """Drops the entries that are not sound; stock hivemind drops the whole answer for one of them, so that whoever
        gets one bad entry stored, perhaps at the edge of a clock, hides everybody's."""
        if not isinstance(dictionary, DictionaryDHTValue):
            return False
        unsound = 0
        for subkey, (value, expiration_time) in list(dictionary.items()):
            if not self._validate_record(key_bytes, self.serializer.dumps(subkey), value, expiration_time):
                del dictionary[subkey]
                unsound += 1
                if unsound > MAX_UNSOUND:
                    return False
        return True
