from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.errors import Gone, Misbehaved, Refused, RemoteError, Silent
from p2p_diloco.core.waiting import Bell, heard, now_s
from p2p_diloco.wire.channel import RELAYED_BYTES, Channel, Links
from p2p_diloco.wire.message import CHUNK_BYTES, MAX_FRAME_BYTES, MAX_MESSAGE_BYTES, Message
from p2p_diloco.wire.messages import MESSAGES, No, Size, pack
from p2p_diloco.wire.round_messages import Again, Commit, Eta, Receipt
from p2p_diloco.wire.state_messages import AskHeads, AskManifest, Heads
from tests.support.builders import MESSAGE_EXAMPLES as EXAMPLES
from tests.support.builders import DeafWriter, PipeWriter, identity, pipe
from tests.support.fakes import run_simulated

HASH = bytes(range(32))


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


def test_who_has_no_links_has_none_of_any_kind() -> None:
    assert set(vars(Links()).values()) == {0}


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
        assert channel.connections.has_failed("p")

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
        other = Again if not isinstance(message, Again) else Commit  # the largest there are
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


def test_a_no_where_bytes_are_due_is_a_refusal() -> None:
    async def main() -> None:
        fed = Fed()
        refused = fed.channel.refusal(pack(No(reason="not held")))
        assert isinstance(refused, Refused)
        assert (refused.peer_id, refused.reason) == (fed.channel.peer_id, "not held")
        assert fed.channel.refusal(pack(Size(size_bytes=1))) is None
        assert fed.channel.refusal(b"\xc1") is None

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


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x92\xa3eta\x80", pack(Eta(eta_s=1.0)) + b"\x00"])
def test_malformed_messages_are_blamed_on_their_sender(data: bytes) -> None:
    async def main() -> None:
        fed = Fed()
        fed.feed(framed(data))
        with pytest.raises(Misbehaved, match="sends a malformed message") as error:
            await fed.channel.receive(*MESSAGES.values(), timeout_s=1.0)
        assert error.value.peer_id == identity(1).peer_id

    run_simulated(main())


# -- through a relay -----------------------------------------------------------------------------------------------

BULK = {
    "contribute",
    "ask-part",
    "ask-contributions",
    "ask-chain",
    "ask-update",
    "ask-index",
    "ask-chunk",
    "ask-have",
    "ask-transfer",
}


def relayed() -> tuple[Channel, Channel]:
    """Both ends of a stream through a relay."""
    mine, theirs = pipe()
    mine.relayed = theirs.relayed = True
    return mine, theirs


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: message.tag)
def test_what_is_small_goes_through_a_relay_and_parts_do_not(message: Message) -> None:
    async def main() -> None:
        mine, theirs = relayed()
        if message.tag in BULK or len(pack(message)) > RELAYED_BYTES:
            with pytest.raises(Gone, match=r"cannot be reached: .* through a relay, which carries small messages only"):
                await mine.send(message)
            assert mine.meter.sent == 0
            return
        await mine.send(message)
        assert await theirs.receive(type(message), timeout_s=1.0) == message

    run_simulated(main())


def test_all_kinds_that_go_through_no_relay_have_examples() -> None:
    assert {message.tag for message in EXAMPLES if message.bulk} == BULK
    assert {kind.tag for kind in MESSAGES.values() if kind.bulk} == BULK


def test_a_blob_that_a_relay_would_cut_is_refused() -> None:
    async def main() -> None:
        mine, theirs = relayed()
        await mine.send_blob(bytes(RELAYED_BYTES))
        assert len(await theirs.receive_blob(MAX_FRAME_BYTES, 1.0)) == RELAYED_BYTES
        await mine.send_blob(bytes(RELAYED_BYTES + 1))
        with pytest.raises(Refused, match="through a relay, which carries small messages only"):
            await theirs.receive_blob(MAX_FRAME_BYTES, 1.0)

    run_simulated(main())


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
        ([pack(Size(size_bytes=101))], "announces 101 bytes where at most 100 are due"),
        ([pack(Size(size_bytes=2**59))], "where at most 100 are due"),
        ([pack(Size(size_bytes=50)), b"x" * 51], "announces a frame of 51 bytes"),
        ([pack(Size(size_bytes=50)), b""], "another size than is due"),
        ([pack(Size(size_bytes=50)), b"x"], "another size than is due"),
        ([pack(Size(size_bytes=50)), b"x" * 49, b"x"], "another size than is due"),
        ([pack(Heads(first=0, head=HASH, links=[]))], "out of turn"),
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
        fed.feed(framed(pack(Size(size_bytes=size))))
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
