"""Limits put on hivemind before a node starts. Stock hivemind trusts whoever reaches it; our peers meet strangers.

Rules of this file: one threat, one limit, and a contract test that fails when hivemind changes under it
(``tests/test_hardening.py``); what is refused is refused before memory is taken, and never raises where hivemind
would lose the exception.
"""

from __future__ import annotations

import asyncio
import functools
import heapq
import logging
import math
import os
import sys
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Collection
from itertools import islice
from pathlib import Path
from typing import Any

import hivemind.dht.node
import hivemind.dht.protocol
import msgpack
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.p2p import P2P, P2PContext, PeerID
from hivemind.p2p.p2p_daemon_bindings import control
from hivemind.proto import dht_pb2
from hivemind.utils import MSGPackSerializer
from hivemind.utils.logging import use_hivemind_log_handler
from hivemind.utils.timed_storage import ValueWithExpiration, get_dht_time

from p2p_diloco import guard
from p2p_diloco.quota import Quota
from p2p_diloco.records import MAX_RECORD_LIFE_S, Fault, Unsound, open_record, unpack_plain
from p2p_diloco.traffic import Traffic

logger = logging.getLogger(__name__)
p2pd_logger = logging.getLogger("p2p_diloco.p2pd")

MAX_VALUE_BYTES = 4 * 1024 * 1024
"""Of one value that hivemind decodes."""
MAX_EXTENSION_DEPTH = 3
MAX_DAEMON_MESSAGE_BYTES = 8 * 1024 * 1024
MAX_DHT_MESSAGE_BYTES = 2 * 1024 * 1024
"""Of one request or answer of the DHT; p2pd refuses longer ones. A full dictionary of records takes 1.2 MB."""
MAX_SUBKEYS = 1024
"""Peers whose records one DHT key holds. Sealed records are at most 1 kB."""
MAX_UNSOUND = 16
"""Records that fail verification, at 0.2 ms each, before the rest of an answer is thrown away with them."""
MAX_STORE_KEYS = 64
MAX_STORE_BYTES = 128 * 1024
MAX_FIND_KEYS = 1
"""Our own look-ups ask for one key at a time; every further one would add a full dictionary to the answer."""
REQUESTS_PER_S = 20.0
REQUEST_BURST = 100.0
MAX_VERIFIED = 4096
EXPIRATION_TOLERANCE_S = 1.0


@functools.cache
def apply_hardening() -> None:
    """Once per process, before the first node starts; more often does no harm."""
    limit_serializer()
    limit_dictionaries()
    limit_daemon_messages()
    limit_requests()
    quieten_logging()
    hivemind.dht.protocol.DHTLocalStorage = RecordStorage
    hivemind.dht.node.DHTProtocol = HardenedDHTProtocol


def limit_serializer() -> None:
    """Nested extension types recurse in Python until the stack ends, and the process with it: one small packet is
    enough. Unknown types log a warning each. Values have no size limit."""
    decode, loads = MSGPackSerializer._decode_ext_types.__func__, MSGPackSerializer.loads.__func__
    nesting = threading.local()

    def decode_bounded(cls: Any, type_code: int, data: bytes) -> Any:
        depth = getattr(nesting, "depth", 0)
        if depth >= MAX_EXTENSION_DEPTH:
            raise ValueError("extension types nested too deep")
        if type_code != cls._TUPLE_EXT_TYPE_CODE and type_code not in cls._ext_type_codes:
            raise ValueError("unknown extension type")
        nesting.depth = depth + 1
        try:
            return decode(cls, type_code, data)
        finally:
            nesting.depth = depth

    def loads_bounded(cls: Any, buf: bytes) -> Any:
        if len(buf) > MAX_VALUE_BYTES:
            raise ValueError(f"a value of {len(buf)} bytes")
        return loads(cls, buf)

    MSGPackSerializer._decode_ext_types = classmethod(decode_bounded)
    MSGPackSerializer.loads = classmethod(loads_bounded)


def limit_dictionaries() -> None:
    """A dictionary takes any number of subkeys of any type, its own size limit and its expiration from whoever sends
    it. A store that comes too late still moves the deadline of the newer value, and every store grows its heap."""
    store = DictionaryDHTValue.store

    def store_bounded(self: Any, key: Any, value: Any, expiration_time: float) -> bool:
        known = self.data.get(key)
        if known is not None and known.expiration_time >= expiration_time:
            return False
        if known is None and len(self.data) >= MAX_SUBKEYS and len(self) >= MAX_SUBKEYS:  # len() drops the outdated
            return False
        if len(self.expiration_heap) >= 8 * MAX_SUBKEYS:
            self.expiration_heap = list(self.key_to_heap.values())
            heapq.heapify(self.expiration_heap)
        return bool(store(self, key, value, expiration_time))

    def unpack_bounded(cls: Any, raw: bytes) -> Any:
        content = MSGPackSerializer.loads(raw)
        items = content[2] if isinstance(content, list) and len(content) == 3 else None
        if not isinstance(items, list) or len(items) > MAX_SUBKEYS:
            raise ValueError("not a dictionary, or one of too many subkeys")
        dictionary = cls()
        for item in items:
            if not isinstance(item, list) or [type(piece) for piece in item] != [str, bytes, float]:
                raise ValueError("not an entry of a dictionary of records")
            dictionary.store(*item)
        return dictionary

    DictionaryDHTValue.store = store_bounded
    DictionaryDHTValue.unpackb = classmethod(unpack_bounded)


def limit_daemon_messages() -> None:
    """A message from p2pd's socket may announce any length, and a varint may go on for ever."""

    async def read_bounded(stream: asyncio.StreamReader, message: Any) -> None:
        size = 0
        for index in range(5):
            byte = (await stream.readexactly(1))[0]
            size |= (byte & 0x7F) << 7 * index
            if byte < 0x80:
                break
        else:
            raise ValueError("p2pd announces a length of more than 5 bytes")
        if size > MAX_DAEMON_MESSAGE_BYTES:
            raise ValueError(f"p2pd announces a message of {size} bytes")
        message.ParseFromString(await stream.readexactly(size))

    control.read_pbmsg_safe = read_bounded


def limit_requests() -> None:
    """The caller chooses a request's id, so it can make two alike; a request that fails or is cancelled stays in a
    table for ever, and fails in a task that nobody waits for, with a traceback on the terminal."""
    handle = control.ControlClient._handle_persistent_request

    async def handle_quietly(self: Any, call_id: Any, request: Any) -> None:
        try:
            await handle(self, call_id, request)
        except Exception:
            logger.debug("a request of the DHT failed", exc_info=True)
        finally:
            self._handler_tasks.pop(call_id, None)

    control.ControlClient._handle_persistent_request = handle_quietly


def quieten_logging() -> None:
    """Strangers can make hivemind and p2pd log without end: only warnings pass, through this process's own handlers."""
    use_hivemind_log_handler("nowhere")
    logging.getLogger("hivemind").setLevel(logging.WARNING)
    logging.addLevelName(logging.WARNING, "WARNING")  # hivemind renames the level for the whole process
    os.environ.setdefault("GOLOG_LOG_LEVEL", "error")


def guarded_p2p(socket_folder: Path, relay_service: bool, traffic: Traffic) -> Any:
    """hivemind's P2P, with p2pd under our guard, sockets in a folder that is ours alone (stock: the world's temporary
    folder), no service as a relay for strangers unless asked for, and p2pd's output in the log at debug level. What the
    DHT asks and answers is counted in ``traffic``.

    p2pd is TCP only when all that it listens on is: its -quic flag has no effect."""

    class GuardedP2P(P2P):  # type: ignore[misc]
        _UNIX_SOCKET_PREFIX = f"/unix{socket_folder.as_posix()}/"

        @staticmethod
        def _make_process_args(*args: Any, **flags: Any) -> list[str]:
            command = P2P._make_process_args(*args, **flags, relayService=relay_service)
            return [sys.executable, "-I", "-S", guard.__file__, str(os.getpid()), *command]

        @staticmethod
        def _log_p2pd_message(line: str) -> None:
            p2pd_logger.debug("%s", line)

        async def call_protobuf_handler(self, peer_id: PeerID, name: str, input: Any, output_protobuf_type: Any) -> Any:
            traffic.sent["dht"] += input.ByteSize()
            answer = await super().call_protobuf_handler(peer_id, name, input, output_protobuf_type)
            traffic.received["dht"] += answer.ByteSize()
            return answer

        async def add_protobuf_handler(self, name: str, handler: Any, input_protobuf_type: Any, **options: Any) -> None:
            async def counted(request: Any, context: P2PContext) -> Any:
                traffic.received["dht"] += request.ByteSize()
                answer = await handler(request, context)
                traffic.sent["dht"] += answer.ByteSize()
                return answer

            await super().add_protobuf_handler(name, counted, input_protobuf_type, **options)

    return GuardedP2P


@functools.lru_cache(maxsize=4096)
def node_id_of(peer_id: str) -> Any:
    """The place of a peer in the DHT. Stock nodes choose it, so that one peer can fill every routing table."""
    return DHTID.generate(source=PeerID.from_base58(peer_id).to_bytes())


class RecordValidator(RecordValidatorBase):  # type: ignore[misc]
    """Deny by default: only sealed records, under a key that was allowed, each in its own peer's subkey, for as long
    as its signature says. Stock hivemind stores anything of anybody, for ever.

    Whoever stores, and whoever is answered, validates: an entry is verified once and remembered."""

    def __init__(self) -> None:
        self._allowed: set[bytes] = set()
        self._expires_s: OrderedDict[tuple[bytes, bytes], float] = OrderedDict()
        self.rejected: Counter[Fault] = Counter()
        """Under keys that were allowed: how many records were refused, by fault."""

    def allow(self, key: str) -> None:
        self._allowed.add(DHTID.generate(source=key).to_bytes())

    def validate(self, record: DHTRecord) -> bool:
        """Never raises: hivemind would lose the exception, and with it a search that then never ends."""
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
    """Hands out copies: a search merges what strangers answer into the dictionary that it is given, which would thus
    enter our storage past the limits of ``rpc_store``."""

    def get(self, key: Any) -> Any:
        item = super().get(key)
        if item is None or not isinstance(item.value, DictionaryDHTValue):
            return item
        copy = DictionaryDHTValue()
        for subkey, (value, expiration_time) in item.value.items():
            copy.store(subkey, value, expiration_time)
        return ValueWithExpiration(copy, item.expiration_time)

    def store_subkey(self, key: Any, subkey: Any, value: bytes, expiration_time: float) -> bool:
        item = super().get(key)
        dictionary = DictionaryDHTValue() if item is None else item.value
        latest = -math.inf if item is None else item.expiration_time
        if not dictionary.store(subkey, value, expiration_time):
            return False
        if dictionary.latest_expiration_time > latest:
            self.store(key, dictionary, dictionary.latest_expiration_time)
        return True


class HardenedDHTProtocol(DHTProtocol):  # type: ignore[misc]
    """What a stranger may ask of our DHT node, and what we believe of its answers.

    Its name is part of the protocol's: stock nodes, which choose their own node ids, do not meet ours.
    """

    _rpc_handlers = None

    def __init__(self, *, _initialized_with_create: bool = False) -> None:
        super().__init__(_initialized_with_create=_initialized_with_create)
        self._requests = Quota(REQUESTS_PER_S, REQUEST_BURST)
        self._pings = Quota(2 * REQUESTS_PER_S, 2 * REQUEST_BURST)

    async def rpc_ping(self, request: dht_pb2.PingRequest, context: P2PContext) -> dht_pb2.PingResponse:
        """Answers those over the limit, or with a node id that is not theirs, without remembering them. Does not
        raise: hivemind calls it in a task of its own for every store and find."""
        remote = context.remote_id.to_base58()
        claimed = request.peer.node_id
        if not self._pings.take(remote, time.monotonic()) or claimed not in (b"", node_id_of(remote).to_bytes()):
            return dht_pb2.PingResponse(peer=self.node_info, dht_time=get_dht_time(), available=False)
        return await super().rpc_ping(request, context)

    async def rpc_store(self, request: dht_pb2.StoreRequest, context: P2PContext) -> dht_pb2.StoreResponse:
        """Every peer stores its own record and nothing else, so free identities at least need a connection each.
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
        """One small request for many keys would be answered with megabytes."""
        self._admit(context)
        if len(request.keys) > MAX_FIND_KEYS:
            raise ValueError("a find request of too many keys")
        return await super().rpc_find(request, context)

    async def call_find(self, peer: PeerID, keys: Collection[DHTID]) -> Any:
        """An answer that claims to be valid for ever would end the search before others are heard; invented
        neighbours, or too many, would lead it astray."""
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
        """One place per peer, and bounded reserves. New neighbours are not sent all that we store (see rpc_store)."""
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
