"""Whose records our DHT node takes and what it answers whom, without p2pd, against hivemind as installed."""

from __future__ import annotations

import asyncio
import inspect
import math
import time
from typing import Any

import hivemind.dht.node
import hivemind.dht.protocol
import msgpack
import pytest
from hivemind.dht.node import _SearchState
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID, KBucket, RoutingTable
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.p2p import P2PContext, PeerID
from hivemind.proto import dht_pb2
from hivemind.utils import MSGPackSerializer, timed_storage
from hivemind.utils.timed_storage import ValueWithExpiration

from p2p_diloco.core.buckets import Quota
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.records import MAX_RECORD_LIFE_S, Record, seal_record
from p2p_diloco.wire import hardening, kademlia
from p2p_diloco.wire.kademlia import HardenedDHTProtocol, RecordStorage, RecordValidator, node_id_of

hardening.apply_hardening()

KEY = "some key"
KEY_BYTES = DHTID.generate(source=KEY).to_bytes()
ALICE = Identity.from_seed(b"a" * 32)
BOB = Identity.from_seed(b"b" * 32)
DICTIONARY_CODE = MSGPackSerializer._ext_types[DictionaryDHTValue]


def make_record(identity: Identity, **changes: Any) -> Record:
    values: dict[str, Any] = {
        "peer_id": identity.peer_id,
        "run_id": "0" * 40,
        "run_name": "test",
        "issued_s": time.time(),
        "life_s": 30.0,
        "role": "trainer",
        "phase": "inner",
        "step": 3,
        "head": bytes(32),
        "committed": True,
        "heads": [],
        "snapshot_step": 0,
        "snapshot_digest": bytes(32),
        "maddrs": [],
        "client_mode": False,
    }
    return Record(**(values | changes))


def entry_of(identity: Identity = ALICE, **changes: Any) -> DHTRecord:
    record = make_record(identity)
    values = {
        "key": KEY_BYTES,
        "subkey": msgpack.packb(identity.peer_id),
        "value": msgpack.packb(seal_record(record, identity)),
        "expiration_time": record.expires_s,
    }
    return DHTRecord(**(values | changes))


def validator() -> RecordValidator:
    made = RecordValidator()
    made.allow(KEY)
    return made


def nested(code: int, depth: int) -> bytes:
    data: bytes = msgpack.packb([])
    for _ in range(depth):
        data = msgpack.packb(msgpack.ExtType(code, data))
    return data


class TestStorage:
    def test_hooks(self) -> None:
        assert hivemind.dht.protocol.DHTLocalStorage is RecordStorage
        assert "DHTLocalStorage(" in inspect.getsource(DHTProtocol.create)
        assert list(inspect.signature(DHTLocalStorage.store_subkey).parameters) == [
            *("self", "key", "subkey", "value", "expiration_time")
        ]

    def test_hands_out_copies(self) -> None:
        storage, key, now_s = RecordStorage(), DHTID.generate(source=KEY), time.time()
        assert storage.store_subkey(key, "a", b"1", now_s + 50)
        assert storage.store(key, b"2", now_s + 60, subkey="b")
        assert not storage.store_subkey(key, "a", b"older", now_s + 40)
        storage.get(key).value.store("stranger", b"3", now_s + 70)
        found = storage.get(key)
        assert {subkey: value for subkey, (value, _) in found.value.items()} == {"a": b"1", "b": b"2"}
        assert found.expiration_time == now_s + 60

    def test_a_flood_of_records_makes_room_for_newcomers_and_not_for_itself(self) -> None:
        """1,024 subkeys, and a newcomer's record is taken; nobody's is lost that was there before the flood, nor that
        of a favoured peer."""
        storage, key, now_s = RecordStorage(), DHTID.generate(source=KEY), time.time()
        storage.favoured = {"favoured"}

        def held() -> set[str]:
            return {subkey for subkey, _ in storage.get(key).value.items()}

        def flood(name: str, count: int) -> None:
            for i in range(count):
                assert storage.store_subkey(key, f"{name}{i}", b"v", now_s + 50)

        assert storage.store_subkey(key, "old", b"v", now_s + 50)
        flood("a", kademlia.MAX_SUBKEYS)
        assert storage.store_subkey(key, "newcomer", b"v", now_s + 50)
        assert storage.store_subkey(key, "favoured", b"v", now_s + 50)
        flood("b", 200)
        assert {"old", "newcomer", "favoured"} < held()
        flood("c", kademlia.MAX_SUBKEYS)
        assert {"old", "favoured"} < held()
        assert storage.store_subkey(key, "newcomer", b"v", now_s + 60), "it renews its record every few seconds"
        assert storage.store_subkey(key, "old", b"newer", now_s + 60)
        assert not storage.store_subkey(key, "old", b"older", now_s + 50)
        assert len(held()) == kademlia.MAX_SUBKEYS == len(storage.data[key].value.data)

    def test_what_is_outdated_has_no_place(self, monkeypatch: pytest.MonkeyPatch) -> None:
        storage, key, now_s = RecordStorage(), DHTID.generate(source=KEY), time.time()
        for i in range(kademlia.MAX_SUBKEYS):
            assert storage.store_subkey(key, f"a{i}", b"v", now_s + 50)
        for module in (timed_storage, kademlia):
            monkeypatch.setattr(module, "get_dht_time", lambda: now_s + 51)
        assert not storage.store_subkey(key, "late", b"v", now_s + 50)
        assert storage.store_subkey(key, "b", b"v", now_s + 100)
        assert list(storage._places[key]) == ["b"] == [subkey for subkey, _ in storage.get(key).value.items()]

    def test_a_search_takes_what_others_say_beside_one_that_floods_it(self) -> None:
        """A node that answers with as many records as there may be, all sound, hides nobody's."""
        now_s = time.time()
        flood, honest = DictionaryDHTValue(), DictionaryDHTValue()
        for i in range(kademlia.MAX_SUBKEYS):
            flood.store(f"invented{i}", b"v", now_s + 50)
        for i in range(100):
            honest.store(f"honest{i}", b"v", now_s + 50)

        async def main() -> set[str]:
            search = _SearchState(DHTID.generate(source=KEY), math.inf)
            for dictionary in (flood, honest):
                search.add_candidate(ValueWithExpiration(dictionary, now_s + 50), DHTID.generate())
            return {subkey for subkey, _ in search.binary_value.items()}

        assert {f"honest{i}" for i in range(100)} < asyncio.run(main())


class TestValidator:
    def test_hooks(self) -> None:
        assert RecordValidatorBase.__abstractmethods__ == {"validate"}
        assert DHTID.generate(source=KEY).to_bytes() == KEY_BYTES

    def test_takes_a_sealed_record(self) -> None:
        made, entry = validator(), entry_of()
        assert made.validate(entry)
        assert made.validate(entry), "and remembers it"
        assert made.strip_value(entry) == made.sign_value(entry) == entry.value

    @pytest.mark.parametrize(
        "changes",
        [
            {"key": DHTID.generate(source="another").to_bytes()},
            {"subkey": msgpack.packb(BOB.peer_id)},
            {"subkey": DHTProtocol.IS_REGULAR_VALUE},
            {"subkey": DHTProtocol.IS_DICTIONARY},
            {"value": b""},
            {"value": b"\xc1"},
            {"value": msgpack.packb(b"")},
            {"value": msgpack.packb("text")},
            {"value": msgpack.packb(seal_record(make_record(ALICE), BOB))},
            {"value": msgpack.packb(bytes(2100))},
            {"value": nested(DICTIONARY_CODE, 9)},
            {"value": None},
            {"expiration_time": math.inf},
            {"expiration_time": math.nan},
            {"expiration_time": time.time() + 2 * MAX_RECORD_LIFE_S},
            {"expiration_time": time.time() + 100},
            {"expiration_time": 0.0},
            {"expiration_time": "soon"},
        ],
    )
    def test_refuses(self, changes: dict[str, Any]) -> None:
        assert not validator().validate(entry_of(**changes))

    def test_counts_what_it_refuses_under_its_keys(self) -> None:
        made = validator()
        for entry in (
            entry_of(),
            entry_of(key=DHTID.generate(source="another").to_bytes()),
            entry_of(value=msgpack.packb(seal_record(make_record(ALICE), BOB))),
            entry_of(value=msgpack.packb(bytes(2100))),
            entry_of(value=b"\xc1"),
            entry_of(expiration_time=time.time() + 100),
            entry_of(value=None),
        ):
            made.validate(entry)
        assert made.rejected == {"signature": 1, "size": 1, "form": 1, "other": 2}

    def test_what_it_remembers_is_bounded_and_is_no_bypass(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kademlia, "MAX_VERIFIED", 3)
        made, entry = validator(), entry_of()
        assert made.validate(entry)
        assert not made.validate(DHTRecord(entry.key, entry.subkey, entry.value, entry.expiration_time + 2))
        assert not made.validate(DHTRecord(b"k", entry.subkey, entry.value, entry.expiration_time))
        for seed in range(6):
            assert made.validate(entry_of(Identity.from_seed(bytes([seed] * 32))))
        assert len(made._expires_s) == 3


class TestProtocol:
    """The protocol by itself: what a remote peer's requests do, and what its answers do. No p2pd."""

    def test_hooks(self) -> None:
        assert hivemind.dht.node.DHTProtocol is HardenedDHTProtocol
        assert "await DHTProtocol.create(" in inspect.getsource(hivemind.dht.node.DHTNode.create)
        for name in ("rpc_ping", "rpc_store", "rpc_find", "call_find", "update_routing_table", "_validate_dictionary"):
            theirs, ours = (getattr(protocol, name) for protocol in (DHTProtocol, HardenedDHTProtocol))
            assert theirs is not ours
            assert list(inspect.signature(theirs).parameters) == list(inspect.signature(ours).parameters)
        for call in ("call_find", "rpc_store"):
            assert "self._validate_dictionary(" in inspect.getsource(getattr(DHTProtocol, call))
        for call in ("call_ping", "call_store", "call_find", "rpc_ping"):
            assert "self.update_routing_table(" in inspect.getsource(getattr(DHTProtocol, call))
        assert "nodes_to_peer_id" in inspect.getsource(KBucket)
        assert "__delitem__" in vars(RoutingTable)

    @staticmethod
    def protocol() -> HardenedDHTProtocol:
        made = HardenedDHTProtocol(_initialized_with_create=True)
        made.node_id = node_id_of(ALICE.peer_id)
        made.node_info = dht_pb2.NodeInfo(node_id=made.node_id.to_bytes())
        made.bucket_size, made.num_replicas, made.client_mode = 20, 5, False
        made.routing_table = RoutingTable(made.node_id, bucket_size=20, depth_modulo=5)
        made.storage, made.cache = RecordStorage(), RecordStorage()
        made.rpc_semaphore, made.wait_timeout = asyncio.Semaphore(), 1.0
        made.record_validator = validator()
        return made

    @staticmethod
    def context(identity: Identity = BOB) -> P2PContext:
        return P2PContext("", PeerID.from_base58(ALICE.peer_id), PeerID.from_base58(identity.peer_id))

    @staticmethod
    def store_request(*entries: DHTRecord, **changes: Any) -> dht_pb2.StoreRequest:
        lists = {
            "keys": [entry.key for entry in entries],
            "subkeys": [entry.subkey for entry in entries],
            "values": [entry.value for entry in entries],
            "expiration_time": [entry.expiration_time for entry in entries],
            "in_cache": [False] * len(entries),
        }
        return dht_pb2.StoreRequest(**(lists | changes), peer=dht_pb2.NodeInfo())

    def test_stores_a_peer_s_own_record_only(self) -> None:
        async def main() -> None:
            protocol = self.protocol()
            entries = [entry_of(BOB), entry_of(ALICE), entry_of(BOB, subkey=protocol.IS_DICTIONARY)]
            response = await protocol.rpc_store(self.store_request(*entries), self.context(BOB))
            assert list(response.store_ok) == [True, False, False]
            found = protocol.storage.get(DHTID.generate(source=KEY))
            assert [subkey for subkey, _ in found.value.items()] == [BOB.peer_id]

        asyncio.run(main())

    @pytest.mark.parametrize(
        "request_",
        [
            store_request(entry_of(BOB), subkeys=[]),
            store_request(entry_of(BOB), in_cache=[]),
            store_request(*[entry_of(BOB)] * (kademlia.MAX_STORE_KEYS + 1)),
            store_request(entry_of(BOB, value=bytes(kademlia.MAX_STORE_BYTES))),
        ],
    )
    def test_refuses_stores(self, request_: dht_pb2.StoreRequest) -> None:
        async def main() -> None:
            protocol = self.protocol()
            with pytest.raises(ValueError, match="a store request"):
                await protocol.rpc_store(request_, self.context())
            assert not protocol.storage.data

        asyncio.run(main())

    def test_requests_have_a_rate(self) -> None:
        async def main() -> None:
            protocol, request = self.protocol(), dht_pb2.FindRequest(keys=[KEY_BYTES])
            protocol._requests = Quota(per_s=0.0, burst=3.0)
            for _ in range(3):
                await protocol.rpc_find(request, self.context())
            for rpc, content in ((protocol.rpc_find, request), (protocol.rpc_store, self.store_request())):
                with pytest.raises(ValueError, match="too many requests"):
                    await rpc(content, self.context())
            await protocol.rpc_find(request, self.context(ALICE))
            with pytest.raises(ValueError, match="too many keys"):
                await protocol.rpc_find(dht_pb2.FindRequest(keys=[KEY_BYTES] * 2), self.context(ALICE))

        asyncio.run(main())

    def test_node_ids_are_hashes_of_peer_ids(self) -> None:
        async def main() -> None:
            protocol = self.protocol()
            for node_id in (DHTID.generate(), node_id_of(BOB.peer_id)):
                request = dht_pb2.PingRequest(peer=dht_pb2.NodeInfo(node_id=node_id.to_bytes()))
                answer = await protocol.rpc_ping(request, self.context(BOB))
                assert answer.peer.node_id == protocol.node_id.to_bytes()
                await asyncio.sleep(0)
            assert list(protocol.routing_table.uid_to_peer_id) == [node_id_of(BOB.peer_id)]
            await protocol.update_routing_table(DHTID.generate(), PeerID.from_base58(BOB.peer_id))
            await protocol.update_routing_table(None, PeerID.from_base58(BOB.peer_id))
            assert len(protocol.routing_table.uid_to_peer_id) == 1
            await protocol.update_routing_table(None, PeerID.from_base58(BOB.peer_id), responded=False)
            assert not protocol.routing_table.uid_to_peer_id

        asyncio.run(main())

    def test_routing_table_is_bounded(self) -> None:
        async def main() -> None:
            protocol = self.protocol()
            protocol.call_ping = lambda peer: asyncio.sleep(0)
            for number in range(1500):
                peer_id = Identity.from_seed(number.to_bytes(32, "big")).peer_id
                await protocol.update_routing_table(node_id_of(peer_id), PeerID.from_base58(peer_id))
            buckets = protocol.routing_table.buckets
            assert all(len(bucket.nodes_to_peer_id) <= 20 for bucket in buckets)
            assert all(len(bucket.replacement_nodes) <= 20 for bucket in buckets)
            held = sum(len(bucket.nodes_to_peer_id) + len(bucket.replacement_nodes) for bucket in buckets)
            table = protocol.routing_table
            assert len(table.uid_to_peer_id) == len(table.peer_id_to_uid) == held < 1500

        asyncio.run(main())

    def test_one_bad_entry_does_not_hide_the_others(self, monkeypatch: pytest.MonkeyPatch) -> None:
        protocol, dictionary = self.protocol(), DictionaryDHTValue()
        for entry in (entry_of(ALICE), entry_of(BOB)):
            dictionary.store(msgpack.unpackb(entry.subkey), entry.value, entry.expiration_time)
        dictionary.store("nobody", b"", time.time() + 10)
        assert protocol._validate_dictionary(KEY_BYTES, dictionary)
        assert {subkey for subkey, _ in dictionary.items()} == {ALICE.peer_id, BOB.peer_id}
        for index in range(kademlia.MAX_UNSOUND + 1):
            dictionary.store(str(index), b"", time.time() + 10)
        assert not protocol._validate_dictionary(KEY_BYTES, dictionary)
        assert not protocol._validate_dictionary(KEY_BYTES, [])

    def test_answers_are_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        key, value, now_s, claimed = DHTID.generate(source=KEY), DictionaryDHTValue(), time.time(), 0.0
        bob = {node_id_of(BOB.peer_id): PeerID.from_base58(BOB.peer_id)}

        async def call_find(self: Any, peer: Any, keys: Any) -> Any:
            return {key: (ValueWithExpiration(value, claimed), {DHTID.generate(): PeerID(b"x")} | bob)}

        monkeypatch.setattr(DHTProtocol, "call_find", call_find)
        for expires_s, believed in ((math.inf, False), (math.nan, False), (now_s + 1000, False), (now_s + 30, True)):
            claimed = expires_s
            found = asyncio.run(self.protocol().call_find(None, [key]))
            item, nearest = found[key]
            assert (item is not None) is believed
            assert nearest == bob
