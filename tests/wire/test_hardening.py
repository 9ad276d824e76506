"""Each limit against hivemind as installed: that what it hangs on is still there, then that it holds."""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import time
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings import control
from hivemind.proto import p2pd_pb2
from hivemind.utils import MSGPackSerializer
from hivemind.utils.timed_storage import TimedStorage

from p2p_diloco.wire import guard, hardening, kademlia
from p2p_diloco.wire.traffic import Traffic

hardening.apply_hardening()


DICTIONARY_CODE = MSGPackSerializer._ext_types[DictionaryDHTValue]


def nested(code: int, depth: int) -> bytes:
    data: bytes = msgpack.packb([])
    for _ in range(depth):
        data = msgpack.packb(msgpack.ExtType(code, data))
    return data


class TestSerializer:
    def test_hooks(self) -> None:
        assert list(inspect.signature(MSGPackSerializer._decode_ext_types.__func__).parameters) == [
            *("cls", "type_code", "data")
        ]
        assert MSGPackSerializer._ext_type_codes[DICTIONARY_CODE] is DictionaryDHTValue
        assert MSGPackSerializer._TUPLE_EXT_TYPE_CODE not in MSGPackSerializer._ext_type_codes

    def test_what_hivemind_sends_still_works(self) -> None:
        dictionary = DictionaryDHTValue()
        dictionary.store("a", b"value", time.time() + 5)
        loaded = MSGPackSerializer.loads(MSGPackSerializer.dumps(dictionary))
        assert isinstance(loaded, DictionaryDHTValue)
        assert loaded.get("a").value == b"value"
        assert loaded.latest_expiration_time == dictionary.latest_expiration_time
        assert MSGPackSerializer.loads(MSGPackSerializer.dumps(("a", (1, (2,))))) == ("a", (1, (2,)))

    def test_depth(self) -> None:
        tuple_code = MSGPackSerializer._TUPLE_EXT_TYPE_CODE
        assert MSGPackSerializer.loads(nested(tuple_code, 1)) == ()
        with pytest.raises(ValueError, match="too deep"):
            MSGPackSerializer.loads(nested(tuple_code, 4))
        assert MSGPackSerializer.loads(nested(tuple_code, 1)) == (), "a refusal leaves no depth behind"

    def test_size_and_types(self) -> None:
        with pytest.raises(ValueError, match="a value of"):
            MSGPackSerializer.loads(bytes(hardening.MAX_VALUE_BYTES + 1))
        with pytest.raises(ValueError, match="unknown extension"):
            MSGPackSerializer.loads(msgpack.packb(msgpack.ExtType(7, b"")))


class TestDictionary:
    def test_hooks(self) -> None:
        assert list(inspect.signature(TimedStorage.store).parameters) == ["self", "key", "value", "expiration_time"]
        assert {"data", "expiration_heap", "key_to_heap"} <= set(vars(DictionaryDHTValue()))

    @pytest.mark.parametrize(
        "items",
        [
            [["a", b"v", 9e9]] * (kademlia.MAX_SUBKEYS + 1),
            [[1, b"v", 9e9]],
            [["a", "v", 9e9]],
            [["a", b"v", 9]],
            [["a", b"v"]],
            [None],
            None,
        ],
    )
    def test_refuses_to_unpack(self, items: object) -> None:
        with pytest.raises(ValueError, match=r"not an entry|not a dictionary"):
            DictionaryDHTValue.unpackb(msgpack.packb([None, 9e9, items]))

    def test_takes_neither_limit_nor_deadline_from_the_sender(self) -> None:
        dictionary = DictionaryDHTValue.unpackb(msgpack.packb([-1, math.inf, [["a", b"v", 9e9]]]))
        assert dictionary.maxsize == math.inf
        assert dictionary.latest_expiration_time == 9e9

    def test_bounded(self) -> None:
        dictionary, now_s = DictionaryDHTValue(), time.time()
        for index in range(kademlia.MAX_MERGED):
            assert dictionary.store(str(index), b"v", now_s + 50)
        assert not dictionary.store("one more", b"v", now_s + 60)
        for index in range(3 * kademlia.MAX_MERGED):
            assert dictionary.store("7", b"v", now_s + 50 + (index + 1) / 1000)
        assert len(dictionary.expiration_heap) <= 2 * kademlia.MAX_MERGED + 1

    def test_a_late_store_does_not_move_the_deadline(self) -> None:
        dictionary, now_s = DictionaryDHTValue(), time.time()
        assert dictionary.store("a", b"new", now_s + 50)
        assert not dictionary.store("a", b"old", now_s + 0.01)
        assert not dictionary.store("a", b"again", now_s + 50)
        time.sleep(0.02)
        assert dictionary.get("a").value == b"new"


class TestDaemonMessages:
    def test_hooks(self) -> None:
        for function in ("_read_from_persistent_conn", "_handler"):
            assert "await read_pbmsg_safe(reader, " in inspect.getsource(getattr(control.ControlClient, function))

    @staticmethod
    def read(data: bytes) -> Any:
        async def main() -> Any:
            reader = asyncio.StreamReader()
            reader.feed_data(data)
            message = p2pd_pb2.Response()
            await asyncio.wait_for(control.read_pbmsg_safe(reader, message), 1)
            return message

        return asyncio.run(main())

    def test_reads(self) -> None:
        message = p2pd_pb2.Response(type=p2pd_pb2.Response.ERROR, error=p2pd_pb2.ErrorResponse(msg="x" * 300))
        data = message.SerializeToString()
        assert self.read(bytes([len(data) & 0x7F | 0x80, len(data) >> 7]) + data) == message

    @pytest.mark.parametrize("data", [b"\x81\x80\x80\x04", b"\x80" * 8, b"\xff" * 8])
    def test_refuses_before_reading(self, data: bytes) -> None:
        with pytest.raises(ValueError, match="p2pd announces"):
            self.read(data)


class TestRequests:
    def test_hooks(self) -> None:
        assert list(inspect.signature(control.ControlClient._handle_persistent_request).parameters) == [
            *("self", "call_id", "request")
        ]
        assert "self._handler_tasks[call_id] = handler_task" in inspect.getsource(
            control.ControlClient._read_from_persistent_conn
        )

    def test_a_failed_request_is_forgotten(self) -> None:
        async def main() -> None:
            client = control.ControlClient(None, None, _initialized_with_create=True)

            async def fail(data: bytes, remote: PeerID) -> bytes:
                client._handler_tasks.clear()  # as a second request of the same id does
                raise ValueError

            client.unary_handlers["p"] = fail
            client._handler_tasks["id"] = client._handler_tasks["other"] = None
            request = p2pd_pb2.CallUnaryRequest(proto="p", peer=b"", data=b"")

            class Id(str):
                bytes = b"0" * 16

            await client._handle_persistent_request(Id("id"), request)
            assert not client._handler_tasks

        asyncio.run(main())


def test_logging_goes_through_the_process() -> None:
    ours = logging.getLogger("hivemind")
    assert (ours.handlers, ours.propagate, ours.level) == ([], True, logging.WARNING)
    assert logging.getLevelName(logging.WARNING) == "WARNING"


def test_p2pd_runs_under_the_guard() -> None:
    assert 'cls._UNIX_SOCKET_PREFIX + f"p2pd-{socket_uid}.sock"' in inspect.getsource(P2P.create)
    assert 'cls._UNIX_SOCKET_PREFIX + f"p2pclient-{socket_uid}.sock"' in inspect.getsource(P2P.create)
    assert "= self._make_process_args(" in inspect.getsource(P2P.create)
    assert "self._log_p2pd_message(" in inspect.getsource(P2P._read_outputs)
    p2p = hardening.guarded_p2p(Path("/some/folder"), relay_service=False, traffic=Traffic())
    command = p2p._make_process_args("p2pd", relay=True)
    assert command[1:4] == ["-I", "-S", guard.__file__]
    assert command[5:] == ["p2pd", "-relay=1", "-relayService=0", "-relayDiscovery=0"]
    assert p2p._UNIX_SOCKET_PREFIX == "/unix/some/folder/"
    assert "-relayService=1" in hardening.guarded_p2p(
        Path("/s"), relay_service=True, traffic=Traffic()
    )._make_process_args("p2pd")
