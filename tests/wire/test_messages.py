from __future__ import annotations

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2p_diloco.wire.message import Message
from p2p_diloco.wire.messages import MESSAGES, pack, parse
from tests.support.builders import MESSAGE_EXAMPLES as EXAMPLES
from tests.support.builders import damaged, plain_values

HASH = bytes(range(32))
SIGNATURE = bytes(range(64))


def packed(tag: object, content: object) -> bytes:
    data: bytes = msgpack.packb([tag, content])
    return data


def test_every_kind_of_message_has_an_example() -> None:
    assert {type(message).tag for message in EXAMPLES} == set(MESSAGES)
    assert all(MESSAGES[type(message).tag] is type(message) for message in EXAMPLES)


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: message.tag)
def test_a_message_is_parsed_as_it_was_packed(message: Message) -> None:
    data = pack(message)
    assert parse(data) == message
    assert len(data) <= message.max_bytes


HOSTILE: dict[str, bytes] = {
    "nothing": b"",
    "no msgpack": b"\xc1",
    "no list": packed("eta", {})[1:],
    "too short": msgpack.packb(["eta"]),
    "too long": msgpack.packb(["eta", {"eta_s": 1.0}, 1]),
    "more behind it": packed("eta", {"eta_s": 1.0}) + b"\x00",
    "unknown tag": packed("pickle", {}),
    "tag of another type": packed(b"eta", {"eta_s": 1.0}),
    "no dictionary": packed("eta", 1.0),
    "dictionary of bytes": packed("eta", {b"eta_s": 1.0}),
    "missing field": packed("eta", {}),
    "unknown field": packed("eta", {"eta_s": 1.0, "x": 1}),
    "not a number": packed("eta", {"eta_s": float("nan")}),
    "infinite": packed("eta", {"eta_s": float("inf")}),
    "negative": packed("eta", {"eta_s": -1.0}),
    "too large": packed("eta", {"eta_s": 86401.0}),
    "a truth value": packed("eta", {"eta_s": True}),
    "text": packed("eta", {"eta_s": "1.0"}),
    "extension": packed("eta", {"eta_s": msgpack.ExtType(5, b"1")}),
    "timestamp": packed("eta", {"eta_s": msgpack.Timestamp(1)}),
    "nested": b"\x91" * 100_000 + b"\x90",
    "nested field": b"\x92\xa3eta\x81\xa5eta_s" + b"\x91" * 500 + b"\x90",
    "128 members at most": packed("roster", {"members": [b""] * 129, "signature": SIGNATURE}),
    "64 absent ones at most": packed("roster", {"members": [], "absent": [b""] * 65, "signature": SIGNATURE}),
    "member too large": packed("roster", {"members": [b"x" * 2049], "signature": SIGNATURE}),
    "a roster without a signature": packed("roster", {"members": [b"x"]}),
    "short signature of a roster": packed("roster", {"members": [b"x"], "signature": SIGNATURE[1:]}),
    "reason too long": packed("no", {"reason": "x" * 201}),
    "short hash": packed("contribute", {"round_id": bytes(31)}),
    "short hash in a receipt": packed("receipt", {"round_id": HASH, "part_hashes": [b"x"]}),
    "short state in a receipt": packed("receipt", {"round_id": HASH, "part_hashes": [], "state": b"x"}),
    "too many links": packed("heads", {"first": 0, "head": HASH, "links": [HASH] * 1025}),
    "a short link": packed("heads", {"first": 0, "head": HASH, "links": [HASH, bytes(31)]}),
    "no head": packed("heads", {"first": 0, "head": b"", "links": []}),
    "holder out of range": packed("commit", {"part_hashes": [HASH], "holders": [256]}),
    "negative holder": packed("commit", {"part_hashes": [HASH], "holders": [-1]}),
    "hash too short in a commit": packed("commit", {"part_hashes": [b""], "holders": [0]}),
    "state too long in a commit": packed("commit", {"part_hashes": [], "holders": [], "state": bytes(33)}),
    "no signature": packed("took", {}),
    "an empty signature": packed("took", {"signature": b""}),
    "signature too long": packed("took", {"signature": bytes(65)}),
    "no signature over an earlier commit": packed("took-before", {"part_hashes": [HASH]}),
    "no hash in an earlier commit": packed("took-before", {"part_hashes": [b""], "signature": SIGNATURE}),
    "256 contributors at most": packed("certifies", {"full": bytes(33), "members": [], "signatures": []}),
    "signer out of range": packed("certifies", {"full": b"", "members": [256], "signatures": [SIGNATURE]}),
    "128 signers at most": packed("certifies", {"full": b"", "members": [0] * 129, "signatures": []}),
    "128 signatures at most": packed("certifies", {"full": b"", "members": [], "signatures": [SIGNATURE] * 129}),
    "short signature of a signer": packed("certifies", {"full": b"", "members": [0], "signatures": [b"x"]}),
    "half a witness": packed("certifies", {"full": b"", "members": [], "signatures": [], "witness": SIGNATURE[:32]}),
    "a large certificate": packed("ask-witness", {"link": HASH, "certificate": bytes(512 * 1024 + 1)}),
    "no link": packed("ask-witness", {"link": b"", "certificate": b""}),
    "an empty witness": packed("witnessed", {"signature": b""}),
    "negative outer step": packed("ask-chain", {"since": -1}),
    "huge part": packed("ask-part", {"round_id": HASH, "part": 2**63, "hash": HASH}),
    "negative chunk": packed("ask-chunk", {"step": 0, "digest": HASH, "chunk": -1}),
    "huge chunk": packed("ask-chunk", {"step": 0, "digest": HASH, "chunk": 2**60}),
    "half a chunk": packed("ask-chunk", {"step": 0, "digest": HASH, "chunk": 0.5}),
    "long digest": packed("ask-index", {"step": 0, "digest": bytes(33)}),
    "negative step": packed("ask-index", {"step": -1, "digest": HASH}),
    "no address": packed("dialed-back", {"reached": True, "ip": "example.org"}),
    "an address with a zone": packed("dialed-back", {"reached": True, "ip": "fe80::1%eth0"}),
    "a huge transfer": packed("ask-transfer", {"up_bytes": 2**21 + 1, "down_bytes": 0}),
    "a transfer backwards": packed("ask-transfer", {"up_bytes": 0, "down_bytes": -1}),
    "time without end": packed("transferred", {"wall_s": float("inf")}),
    "a large consent": packed("ask-dial-back", {"consent": b"x" * 2049}),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_malformed_messages(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"^.{1,300}$"):
        parse(data)


def parse_anything(data: bytes) -> None:
    """A sound message, or a ValueError of some words; nothing else."""
    try:
        message = parse(data)
    except ValueError as error:
        assert len(str(error)) < 1000  # noqa: PT017
    else:
        assert message == MESSAGES[message.tag].model_validate(message.model_dump())


@given(data=st.binary(max_size=300))
def test_random_bytes(data: bytes) -> None:
    parse_anything(data)


@given(message=st.sampled_from(EXAMPLES).filter(lambda m: m.tag not in ("roster", "heads")), draw=st.data())
def test_damaged_messages(message: Message, draw: st.DataObject) -> None:
    parse_anything(draw.draw(damaged(pack(message))))


names = sorted({name for kind in MESSAGES.values() for name in kind.model_fields})


@given(
    tag=st.sampled_from(sorted(MESSAGES)) | plain_values,
    content=st.dictionaries(st.sampled_from(names) | st.binary(max_size=3), plain_values, max_size=3) | plain_values,
    message=st.none() | st.sampled_from(EXAMPLES),
    change=plain_values,
)
@settings(max_examples=100)
def test_messages_with_any_content(tag: object, content: object, message: Message | None, change: object) -> None:
    if message is not None:
        tag, content = message.tag, message.model_dump()
        content |= dict.fromkeys(list(content)[:1], change)
    parse_anything(packed(tag, content))
