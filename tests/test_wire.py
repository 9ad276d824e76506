from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import msgpack
import pytest
from builders import DeafWriter, PipeWriter, damaged, identity, pipe, plain_values
from fakes import run_simulated
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from p2p_diloco.config import Timeouts
from p2p_diloco.errors import Gone, Misbehaved, Refused, RemoteError, Silent
from p2p_diloco.waiting import Bell, heard
from p2p_diloco.wire import (
    CHUNK_BYTES,
    MAX_FRAME_BYTES,
    MAX_MESSAGE_BYTES,
    MESSAGES,
    Again,
    AskChunk,
    AskCommit,
    AskDialBack,
    AskHeads,
    AskIndex,
    AskManifest,
    AskPart,
    AskTransfer,
    AskUpdate,
    Behind,
    Channel,
    Closing,
    Commit,
    Contribute,
    DialBack,
    DialedBack,
    Eta,
    Heads,
    Message,
    No,
    Push,
    Ready,
    Receipt,
    Redirect,
    Roster,
    Size,
    TooFew,
    Took,
    Transferred,
)

HASH = bytes(range(32))
EXAMPLES: list[Message] = [
    Ready(readiness=b"a" * 300, record=b"b" * 1024),
    Roster(members=[b"a" * 300] * 128, absent=[b"b" * 1024] * 64),
    TooFew(ready=1),
    Redirect(record=b"b"),
    Behind(record=b"b"),
    No(reason="not in my ledger"),
    Closing(head=HASH, gather_s=5.0, record=b"r" * 1024),
    Eta(eta_s=0.25),
    Contribute(round_id=HASH, number=255),
    Receipt(round_id=HASH, number=255, part_hashes=[HASH, b"", HASH]),
    Again(number=1, members=list(range(256)), parts=[0, 2**16 - 1]),
    Commit(part_hashes=[HASH] * 3, holders=[0, 255, 3]),
    Took(),
    AskCommit(round_id=HASH),
    AskPart(round_id=HASH, part=7, hash=HASH),
    AskHeads(since=0),
    Heads(first=5, head=HASH, links=[HASH] * 1024),
    AskUpdate(step=2**59, head=HASH),
    AskIndex(step=10, digest=HASH),
    AskChunk(step=10, digest=HASH, chunk=2**40),
    Size(size_bytes=0),
    AskManifest(),
    Push(record=b"b"),
    AskDialBack(consent=b"c" * 400),
    DialBack(),
    DialedBack(reached=False, ip="2001:db8::7", reason="no answer"),
    AskTransfer(up_bytes=2**21, down_bytes=0),
    Transferred(wall_s=1.7e9),
]


class Reader(asyncio.StreamReader):
    """Remembers how much it was asked for at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.asked_for: list[int] = []

    async def readexactly(self, n: int) -> bytes:
        self.asked_for.append(n)
        return await super().readexactly(n)


@dataclass(eq=False)
class Fed:
    """A channel, and the hand that feeds it."""

    reader: Reader = field(default_factory=Reader)
    timeouts: Timeouts = field(default_factory=Timeouts)

    def __post_init__(self) -> None:
        self.writer = PipeWriter(asyncio.StreamReader())
        peer_id = identity(1).peer_id
        self.channel = Channel(peer_id=peer_id, reader=self.reader, writer=self.writer, timeouts=self.timeouts)

    def feed(self, data: bytes, *, eof: bool = False) -> None:
        self.reader.feed_data(data)
        if eof:
            self.reader.feed_eof()


def framed(*frames: bytes) -> bytes:
    return b"".join(len(frame).to_bytes(4, "big") + frame for frame in frames)


def packed(tag: object, content: object) -> bytes:
    data: bytes = msgpack.packb([tag, content])
    return data


def now_s() -> float:
    return asyncio.get_running_loop().time()


# -- frames --------------------------------------------------------------------------------------------------------


def test_frames_arrive_as_they_were_sent() -> None:
    async def main() -> None:
        mine, theirs = pipe()
        await mine.send_frame(b"one")
        await mine.send_frame()
        await mine.send_frame(b"t", memoryview(b"wo"), b"")
        assert [await theirs.receive_frame(3, 1.0) for _ in range(3)] == [b"one", b"", b"two"]
        assert mine.meter.sent == theirs.meter.received == 3 * 4 + 6

    run_simulated(main())


@pytest.mark.parametrize("announced", [101, MAX_FRAME_BYTES + 1, 2**31, 2**32 - 1])
def test_a_frame_that_is_too_long_is_refused_before_it_is_read(announced: int) -> None:
    async def main() -> None:
        fed = Fed()
        fed.feed(announced.to_bytes(4, "big") + b"x" * 200)
        began_s = now_s()
        with pytest.raises(Misbehaved, match=f"announces a frame of {announced} bytes where at most 100 are due"):
            await fed.channel.receive_frame(100, 10.0)
        assert fed.reader.asked_for == [4]
        assert fed.channel.meter.received == 0
        assert now_s() == began_s

    run_simulated(main())


def test_the_longest_frame_that_is_due_is_taken() -> None:
    async def main() -> None:
        fed = Fed()
        fed.feed(framed(b"x" * 100))
        assert await fed.channel.receive_frame(100, 10.0) == b"x" * 100
        assert fed.reader.asked_for == [4, 100]

    run_simulated(main())


@pytest.mark.parametrize("cut", range(7))
def test_a_stream_that_ends_in_a_frame(cut: int) -> None:
    async def main() -> None:
        fed = Fed()
        fed.feed(framed(b"abc")[:cut], eof=True)
        with pytest.raises(Gone, match="closed the stream") as error:
            await fed.channel.receive_frame(100, 10.0)
        assert error.value.peer_id == identity(1).peer_id

    run_simulated(main())


@pytest.mark.parametrize("every_s", [0.9, 9.0, None])
def test_a_whole_frame_has_to_come_in_time(every_s: float | None) -> None:
    """It is no help to send a byte now and then."""

    async def main() -> None:
        fed, sound = Fed(), framed(b"x" * 100)
        for i in range(len(sound)):
            if every_s is not None:
                asyncio.get_running_loop().call_later(i * every_s, fed.feed, sound[i : i + 1])
        began_s = now_s()
        with pytest.raises(Silent, match="has sent nothing for 10 s"):
            await fed.channel.receive_frame(100, 10.0)
        assert now_s() == pytest.approx(began_s + 10.0)

    run_simulated(main())


def test_a_reader_may_take_less_than_a_message_may_have() -> None:
    async def main() -> None:
        mine, theirs = pipe()
        receipt = Receipt(round_id=HASH, part_hashes=[HASH] * 10)
        await mine.send(receipt)
        assert await theirs.receive(Receipt, timeout_s=1.0, max_bytes=1000) == receipt
        await mine.send(Receipt(round_id=HASH, part_hashes=[HASH] * 30))
        with pytest.raises(Misbehaved, match="at most 1000 are due"):
            await theirs.receive(Receipt, timeout_s=1.0, max_bytes=1000)

    run_simulated(main())


def test_of_many_wrong_items_the_first_one_is_enough() -> None:
    """Each one costs time and memory."""
    with pytest.raises(ValidationError) as raised:
        Receipt.model_validate({"round_id": HASH, "part_hashes": [1] * 1000})
    assert {error["loc"][:2] for error in raised.value.errors()} == {("part_hashes", 0)}


def test_a_peer_that_never_reads() -> None:
    async def main() -> None:
        writer = DeafWriter()
        channel = Channel(peer_id="p", reader=asyncio.StreamReader(), writer=writer, timeouts=Timeouts(write_s=3.0))
        began_s = now_s()
        for send in (channel.send_frame(b"x"), channel.send(AskManifest()), channel.send_blob(b"x")):
            with pytest.raises(Silent, match="does not read what we send"):
                await send
        assert now_s() == pytest.approx(began_s + 9.0)
        assert (writer.drains, channel.meter.sent) == (3, 0)

    run_simulated(main())


@pytest.mark.parametrize("error", [ConnectionResetError(), BrokenPipeError(), OSError("gone")])
def test_a_stream_that_breaks_while_we_write(error: OSError) -> None:
    class Broken(DeafWriter):
        async def drain(self) -> None:
            raise error

    async def main() -> None:
        channel = Channel(peer_id="p", reader=asyncio.StreamReader(), writer=Broken(), timeouts=Timeouts())
        with pytest.raises(Gone):
            await channel.send_frame(b"x")

    run_simulated(main())


def test_we_send_no_frame_that_nobody_would_take() -> None:
    async def main() -> None:
        fed = Fed()
        with pytest.raises(ValueError, match="a frame of 4194305 bytes"):
            await fed.channel.send_frame(bytes(MAX_FRAME_BYTES), b"x")
        assert not fed.writer.written

    run_simulated(main())


# -- messages ------------------------------------------------------------------------------------------------------


def test_every_kind_of_message_has_an_example() -> None:
    assert {type(message).tag for message in EXAMPLES} == set(MESSAGES)
    assert all(MESSAGES[type(message).tag] is type(message) for message in EXAMPLES)


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: message.tag)
def test_messages_arrive_as_they_were_sent(message: Message) -> None:
    async def main() -> None:
        mine, theirs = pipe()
        await mine.send(message)
        assert await theirs.receive(type(message), timeout_s=1.0) == message
        await mine.send(message)
        assert await theirs.receive(*MESSAGES.values(), timeout_s=1.0) == message

    run_simulated(main())


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: message.tag)
def test_a_message_out_of_turn(message: Message) -> None:
    async def main() -> None:
        mine, theirs = pipe()
        other = Eta if not isinstance(message, Eta) else Size
        await mine.send(message)
        with pytest.raises(Refused if isinstance(message, No) else Misbehaved) as error:
            await theirs.receive(other, timeout_s=1.0)
        expected = "not in my ledger" if isinstance(message, No) else f"sends {message.tag} out of turn"
        assert error.value.reason == expected

    run_simulated(main())


def test_a_no_that_is_expected_is_an_answer() -> None:
    async def main() -> None:
        mine, theirs = pipe()
        await mine.send(No(reason="no"))
        assert await theirs.receive(Commit, No, timeout_s=1.0) == No(reason="no")

    run_simulated(main())


def test_request() -> None:
    async def main() -> None:
        mine, theirs = pipe(Timeouts(request_s=4.0))
        await theirs.send(Eta(eta_s=1.0))
        assert await mine.request(AskHeads(since=3), Eta) == Eta(eta_s=1.0)
        assert await theirs.receive(AskHeads, timeout_s=1.0) == AskHeads(since=3)
        began_s = now_s()
        with pytest.raises(Silent):
            await mine.request(AskHeads(since=3), Eta)
        assert now_s() == pytest.approx(began_s + 4.0)

    run_simulated(main())


def test_the_size_of_a_message_is_its_kinds() -> None:
    async def main() -> None:
        for kind, limit in ((Eta, MAX_MESSAGE_BYTES), (Receipt, MAX_FRAME_BYTES), (Commit, MAX_FRAME_BYTES)):
            fed = Fed()
            fed.feed((limit + 1).to_bytes(4, "big"))
            with pytest.raises(Misbehaved, match=f"at most {limit} are due"):
                await fed.channel.receive(kind, timeout_s=1.0)

    run_simulated(main())


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
    "256 members at most": packed("roster", {"members": [b""] * 257}),
    "member too large": packed("roster", {"members": [b"x" * 1025]}),
    "reason too long": packed("no", {"reason": "x" * 201}),
    "short hash": packed("contribute", {"round_id": bytes(31)}),
    "short hash in a receipt": packed("receipt", {"round_id": HASH, "part_hashes": [b"x"]}),
    "too many links": packed("heads", {"first": 0, "head": HASH, "links": [HASH] * 1025}),
    "a short link": packed("heads", {"first": 0, "head": HASH, "links": [HASH, bytes(31)]}),
    "no head": packed("heads", {"first": 0, "head": b"", "links": []}),
    "holder out of range": packed("commit", {"part_hashes": [HASH], "holders": [256]}),
    "negative holder": packed("commit", {"part_hashes": [HASH], "holders": [-1]}),
    "hash too short in a commit": packed("commit", {"part_hashes": [b""], "holders": [0]}),
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
    "a large consent": packed("ask-dial-back", {"consent": b"x" * 1025}),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_malformed_messages(data: bytes) -> None:
    async def main() -> None:
        fed = Fed()
        fed.feed(framed(data))
        with pytest.raises(Misbehaved, match="sends a malformed message"):
            await fed.channel.receive(*MESSAGES.values(), timeout_s=1.0)

    run_simulated(main())


async def receive_anything(data: bytes) -> None:
    """A sound message, or a RemoteError; nothing else."""
    fed = Fed()
    fed.feed(data, eof=True)
    try:
        message = await fed.channel.receive(*MESSAGES.values(), timeout_s=1.0)
    except RemoteError as error:
        assert error.peer_id == identity(1).peer_id  # noqa: PT017
        assert len(str(error)) < 1000  # noqa: PT017
    else:
        assert message == MESSAGES[message.tag].model_validate(message.model_dump())


@given(data=st.binary(max_size=300) | st.binary(max_size=300).map(framed))
@example(data=framed(b"\x92\xa2no\x81\xa6reason\xd9\x01\xff"))
def test_random_bytes_end_in_a_remote_error(data: bytes) -> None:
    run_simulated(receive_anything(data))


@given(message=st.sampled_from(EXAMPLES).filter(lambda m: m.tag not in ("roster", "heads")), draw=st.data())
def test_damaged_messages_end_in_a_remote_error(message: Message, draw: st.DataObject) -> None:
    run_simulated(receive_anything(framed(draw.draw(damaged(packed(message.tag, message.model_dump()))))))


names = sorted({name for kind in MESSAGES.values() for name in kind.model_fields})


@given(
    tag=st.sampled_from(sorted(MESSAGES)) | plain_values,
    content=st.dictionaries(st.sampled_from(names) | st.binary(max_size=3), plain_values, max_size=3) | plain_values,
    message=st.none() | st.sampled_from(EXAMPLES),
    change=plain_values,
)
@settings(max_examples=100)
def test_messages_with_any_content_end_in_a_remote_error(
    tag: object, content: object, message: Message | None, change: object
) -> None:
    if message is not None:
        tag, content = message.tag, message.model_dump()
        content |= dict.fromkeys(list(content)[:1], change)
    run_simulated(receive_anything(framed(packed(tag, content))))


# -- blobs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES])
def test_blobs_arrive_as_they_were_sent(size: int) -> None:
    async def main() -> None:
        mine, theirs = pipe()
        data = bytes(range(256)) * (size // 256) + bytes(size % 256)
        await mine.send_blob(data)
        assert await theirs.receive_blob(size, 1.0) == data

    run_simulated(main())


@pytest.mark.parametrize(
    ("frames", "complaint"),
    [
        ([packed("size", {"size_bytes": 101})], "announces 101 bytes where at most 100 are due"),
        ([packed("size", {"size_bytes": 2**59})], "where at most 100 are due"),
        ([packed("size", {"size_bytes": 50}), b"x" * 51], "announces a frame of 51 bytes"),
        ([packed("size", {"size_bytes": 50}), b""], "another size than is due"),
        ([packed("size", {"size_bytes": 50}), b"x"], "another size than is due"),
        ([packed("size", {"size_bytes": 50}), b"x" * 49, b"x"], "another size than is due"),
        ([packed("heads", {"first": 0, "head": HASH, "links": []})], "out of turn"),
    ],
)
def test_a_blob_is_bounded_before_it_is_taken(frames: list[bytes], complaint: str) -> None:
    async def main() -> None:
        fed = Fed()
        fed.feed(framed(*frames))
        with pytest.raises(Misbehaved, match=complaint):
            await fed.channel.receive_blob(100, 10.0)

    run_simulated(main())


def test_a_blob_that_trickles() -> None:
    """Every chunk but the last one is whole, so a time-out for a chunk is a lowest rate for the blob."""

    async def main() -> None:
        fed, size = Fed(), 3 * CHUNK_BYTES
        fed.feed(framed(packed("size", {"size_bytes": size})))
        for i in range(600):
            asyncio.get_running_loop().call_later(i * 5.0, fed.feed, framed(b"x"))
        began_s = now_s()
        with pytest.raises(Misbehaved, match="another size than is due"):
            await fed.channel.receive_blob(size, 25.0)
        assert now_s() - began_s < 10

    run_simulated(main())


# -- bells ---------------------------------------------------------------------------------------------------------


def test_no_ring_is_lost_to_who_takes_the_event_first() -> None:
    async def main() -> None:
        bell, values = Bell(), iter(range(3))
        seen, value = [], -1

        async def change() -> None:
            nonlocal value
            for value in values:  # noqa: B007
                bell.ring()
                bell.ring()
                await asyncio.sleep(1)

        changing = asyncio.ensure_future(change())
        while value < 2:
            event = bell.event
            seen.append(value)
            await asyncio.sleep(0)  # what happens now is heard as well
            await heard(event, 100.0)
        await changing
        assert seen == [-1, 0, 1]
        assert now_s() < 1_000_010

    run_simulated(main())


def test_a_ring_wakes_all_who_wait_and_nobody_who_comes_later() -> None:
    async def main() -> None:
        bell = Bell()
        waiting = [asyncio.ensure_future(heard(bell.event, 50.0)) for _ in range(3)]
        await asyncio.sleep(1)
        began_s = now_s()
        bell.ring()
        await asyncio.gather(*waiting)
        assert now_s() == began_s
        await heard(bell.event, 7.0)
        assert now_s() == pytest.approx(began_s + 7.0)
        await heard(bell.event, 0.0)
        await heard(bell.event, -1.0)
        assert now_s() == pytest.approx(began_s + 7.0)

    run_simulated(main())
