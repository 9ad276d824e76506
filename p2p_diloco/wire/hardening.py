"""Limits put on hivemind before a node starts. Stock hivemind trusts whoever reaches it; our peers meet strangers.

Rules of this file: one threat, one limit, and a contract test that fails when hivemind changes under it
(``tests/wire/test_hardening.py``); what is refused is refused before memory is taken, and never raises where hivemind
would lose the exception. The classes that take the place of hivemind's own are in ``kademlia``.
"""

from __future__ import annotations

import asyncio
import functools
import heapq
import logging
import os
import sys
import threading
from pathlib import Path
from typing import Any

import hivemind.dht.node
import hivemind.dht.protocol
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.p2p import P2P, P2PContext, PeerID
from hivemind.p2p.p2p_daemon_bindings import control
from hivemind.utils import MSGPackSerializer
from hivemind.utils.logging import use_hivemind_log_handler

from p2p_diloco.wire import guard
from p2p_diloco.wire.kademlia import MAX_MERGED, MAX_SUBKEYS, HardenedDHTProtocol, RecordStorage
from p2p_diloco.wire.traffic import Traffic

logger = logging.getLogger(__name__)
p2pd_logger = logging.getLogger("p2p_diloco.p2pd")

MAX_VALUE_BYTES = 4 * 1024 * 1024
"""Of one value that hivemind decodes."""
MAX_EXTENSION_DEPTH = 3
MAX_DAEMON_MESSAGE_BYTES = 8 * 1024 * 1024


@functools.cache
def apply_hardening() -> None:
    """Puts all limits on hivemind, once per process, before the first node starts; more often does no harm."""
    limit_serializer()
    limit_dictionaries()
    limit_daemon_messages()
    limit_requests()
    quieten_logging()
    hivemind.dht.protocol.DHTLocalStorage = RecordStorage
    hivemind.dht.node.DHTProtocol = HardenedDHTProtocol


def limit_serializer() -> None:
    """Bounds what hivemind decodes. Nested extension types recurse in Python until the stack ends, and the process with
    it: one small packet is enough. Unknown types log a warning each. Values have no size limit."""
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
    """Bounds the dictionaries of hivemind's DHT. Stock, one takes any number of subkeys of any type, its own size limit
    and its expiration from whoever sends it. A store that comes too late still moves the deadline of the newer value,
    and every store grows its heap."""
    store = DictionaryDHTValue.store

    def store_bounded(self: Any, key: Any, value: Any, expiration_time: float) -> bool:
        known = self.data.get(key)
        if known is not None and known.expiration_time >= expiration_time:
            return False
        if known is None and len(self.data) >= MAX_MERGED and len(self) >= MAX_MERGED:  # len() drops the outdated
            return False
        if len(self.expiration_heap) >= 2 * MAX_MERGED:
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
    """Bounds messages from p2pd's socket. Stock, one may announce any length, and a varint may go on for ever."""

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
    """Keeps requests of the DHT from piling up. The caller chooses a request's id, so it can make two alike; a request
    that fails or is cancelled stays in a table for ever, and fails in a task that nobody waits for, with a traceback on
    the terminal."""
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
    """Lets only warnings of hivemind's and p2pd's pass, through this process's own handlers: strangers can make both
    log without end."""
    use_hivemind_log_handler("nowhere")
    logging.getLogger("hivemind").setLevel(logging.WARNING)
    logging.addLevelName(logging.WARNING, "WARNING")  # hivemind renames the level for the whole process
    os.environ.setdefault("GOLOG_LOG_LEVEL", "error")


def guarded_p2p(socket_folder: Path, relay_service: bool, traffic: Traffic) -> Any:
    """Returns hivemind's P2P, with p2pd under our guard, sockets in a folder that is ours alone (stock: the world's
    temporary folder), no service as a relay for strangers unless asked for, and p2pd's output in the log at debug
    level. What the DHT asks and answers is counted in ``traffic``.

    Relays are those that we name, the initial peers: p2pd would look for others for three minutes first, and take any.

    p2pd is TCP only when all that it listens on is: its -quic flag has no effect."""

    class GuardedP2P(P2P):  # type: ignore[misc]
        _UNIX_SOCKET_PREFIX = f"/unix{socket_folder.as_posix()}/"

        @staticmethod
        def _make_process_args(*args: Any, **flags: Any) -> list[str]:
            own: dict[str, Any] = {"relayService": relay_service, "relayDiscovery": False}
            command = P2P._make_process_args(*args, **flags, **own)
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
