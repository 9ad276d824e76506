"""What a donor sends, and what it does not."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path

import blake3
import pytest

from p2p_diloco.core.buckets import BURST_S
from p2p_diloco.core.config import MIN_UPLOAD_BYTES_PER_S, Timeouts
from p2p_diloco.core.errors import Gone, Refused, RemoteError
from p2p_diloco.core.update import next_head
from p2p_diloco.core.waiting import now_s
from p2p_diloco.ledger.snapshot import chunk_slices
from p2p_diloco.peer import uploads
from p2p_diloco.peer.turns import FORGIVEN_AFTER_S
from p2p_diloco.peer.uploads import UPLOADS, slots
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.message import Message
from p2p_diloco.wire.messages import Size
from p2p_diloco.wire.state_messages import AskChunk, AskHave, AskHeads, AskIndex, AskUpdate, Have, Heads, Push
from tests.support.fakes import run_simulated
from tests.support.library import (
    CHUNK_BYTES,
    CHUNKS,
    FRAME_BYTES,
    TIMEOUTS,
    Donor,
    Library,
    N,
    new_replica,
    replica_at,
    small_parts,
)


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    with small_parts():
        yield


def a_donor(folder: Path, step: int, *, max_bytes_per_s: float | None = None) -> tuple[Library, Donor]:
    library = Library(folder, new_replica(folder / "me"))
    return library, library.add(replica_at(folder / "donor", step), max_bytes_per_s=max_bytes_per_s)


async def blob(channel: Channel, message: Message) -> bytes:
    await channel.send(message)
    return await channel.receive_blob(10**6, 100.0)


def test_one_stream_carries_any_number_of_requests(tmp_path: Path) -> None:
    async def main() -> None:
        library, donor = a_donor(tmp_path, 13)
        ledger, info = donor.replica.ledger, donor.replica.newest_snapshot()
        channel = await library.open(donor)
        heads: Heads = await channel.request(AskHeads(since=0), Heads)
        assert (heads.first, heads.head) == (5, ledger.heads()[5])
        head = heads.head
        for step, link in enumerate(heads.links, 6):
            head = next_head(head, link)
            assert head == ledger.heads()[step]
        assert len(heads.links) == 8
        index = await blob(channel, AskIndex(step=10, digest=info.digest))
        assert index == info.head + b"".join(info.chunk_hashes)
        assert donor.phases() == []
        data = info.path.read_bytes()
        chunks = [await blob(channel, AskChunk(step=10, digest=info.digest, chunk=i)) for i in range(CHUNKS)]
        assert data[: -len(b"".join(chunks))] + b"".join(chunks) == data
        assert [blake3.blake3(chunk).digest() for chunk in chunks] == [
            index[32 + i : 64 + i] for i in range(0, 384, 32)
        ]
        assert await blob(channel, AskUpdate(step=12, head=ledger.heads()[13])) == ledger.update_bytes(12)
        assert await channel.request(AskHeads(since=13), Heads) == Heads(first=13, head=ledger.heads()[13], links=[])
        assert donor.phases() == [("serve", 10)]
        channel.close()

    run_simulated(main())


def test_heads_whose_updates_are_pruned_come_from_the_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MAX_LINKS", 5)

    async def main() -> None:
        library, donor = a_donor(tmp_path, 13)
        chain = donor.replica.ledger.chain
        channel = await library.open(donor)
        assert min(donor.replica.ledger.heads()) == 5
        for since, n in ((0, 5), (2, 5), (12, 1), (13, 0)):
            heads: Heads = await channel.request(AskHeads(since=since, pruned=True), Heads)
            assert (heads.first, heads.head, len(heads.links)) == (since, chain.head_at(since), n)
            for step, link in enumerate(heads.links, since):
                assert next_head(chain.head_at(step) or b"", link) == chain.head_at(step + 1)
        for since in (14, 2**59):
            with pytest.raises(Refused, match="not in my ledger"):
                await channel.request(AskHeads(since=since, pruned=True), Heads)

    run_simulated(main())


def test_a_donor_refuses_what_it_does_not_have(tmp_path: Path) -> None:
    async def main() -> None:
        library, donor = a_donor(tmp_path, 13)
        info, heads = donor.replica.newest_snapshot(), donor.replica.ledger.heads()
        channel = await library.open(donor)
        for message in (
            AskUpdate(step=11, head=bytes(32)),
            AskUpdate(step=12, head=heads[12]),
            AskUpdate(step=2, head=heads[12]),
            AskUpdate(step=2**59, head=heads[12]),
            AskIndex(step=10, digest=bytes(32)),
            AskIndex(step=5, digest=info.digest),
            AskChunk(step=10, digest=bytes(32), chunk=0),
            AskChunk(step=5, digest=info.digest, chunk=0),
            AskChunk(step=10, digest=info.digest, chunk=CHUNKS),
            AskChunk(step=10, digest=info.digest, chunk=2**59),
            AskHave(step=10, digest=bytes(32)),
            AskHave(step=5, digest=info.digest),
            AskHeads(since=14),
            AskHeads(since=2**59),
        ):
            with pytest.raises(Refused, match="not in my ledger"):
                await channel.request(message, Size, Heads)
        assert len(await blob(channel, AskChunk(step=10, digest=info.digest, chunk=CHUNKS - 1))) == CHUNK_BYTES
        assert donor.count(AskUpdate) == 4

    run_simulated(main())


def test_of_a_snapshot_that_is_being_downloaded_what_is_here_is_sent(tmp_path: Path) -> None:
    async def main() -> None:
        library, donor = a_donor(tmp_path, 13)
        info = donor.replica.newest_snapshot()
        channel = await library.open(donor)
        assert await channel.request(AskHave(step=10, digest=info.digest), Have) == Have(chunks=b"\xff\x0f")
        newcomer = library.add_partner(info, [9])
        chunk = info.path.read_bytes()[chunk_slices(N)[9]]
        channel = await library.open(newcomer)
        assert await channel.request(AskHave(step=10, digest=info.digest), Have) == Have(chunks=b"\x00\x02")
        assert newcomer.phases() == []
        assert await blob(channel, AskChunk(step=10, digest=info.digest, chunk=9)) == chunk
        assert newcomer.phases() == [("serve", 10)]
        for step, digest, number in ((10, info.digest, 8), (10, info.digest, 2**59), (5, info.digest, 9)):
            with pytest.raises(Refused, match="not in my ledger"):
                await channel.request(AskChunk(step=step, digest=digest, chunk=number), Size)
        newcomer.replica.ledger.incoming = None
        with pytest.raises(Refused, match="not in my ledger"):
            await channel.request(AskHave(step=10, digest=info.digest), Have)

    run_simulated(main())


def test_what_the_disk_has_damaged_is_not_sent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        library, donor = a_donor(tmp_path, 13)
        info, heads = donor.replica.newest_snapshot(), donor.replica.ledger.heads()
        for path in (info.path, tmp_path / "donor" / "updates" / "0000000011.update"):
            path.write_bytes(path.read_bytes()[:-1] + b"x")
        channel = await library.open(donor)
        for message in (AskChunk(step=10, digest=info.digest, chunk=CHUNKS - 1), AskUpdate(step=11, head=heads[12])):
            with pytest.raises(Refused, match="gone or found damaged"):
                await channel.request(message, Size)
        await blob(channel, AskChunk(step=10, digest=info.digest, chunk=0))
        info.path.unlink()
        with pytest.raises(Refused, match="gone or found damaged"):
            await channel.request(AskChunk(step=10, digest=info.digest, chunk=0), Size)
        assert f"{info.path}: chunk 11 is gone or damaged" in caplog.text

    run_simulated(main())


def test_a_few_uploads_at_a_time(tmp_path: Path) -> None:
    """Who is served keeps its place to the end of its stream; the others are told at once."""

    async def main() -> None:
        library, donor = a_donor(tmp_path, 6)
        info = donor.replica.newest_snapshot()
        ask = AskChunk(step=5, digest=info.digest, chunk=0)
        channels = [await library.open(donor, 100 + i) for i in range(7)]
        answers = await asyncio.gather(*(blob(channel, ask) for channel in channels), return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, Refused)]
        assert [refusal.reason for refusal in refused] == ["busy serving others"] * (7 - UPLOADS)
        served = [channel for channel, answer in zip(channels, answers) if isinstance(answer, bytes)]
        for channel in served:
            await blob(channel, ask)
        assert donor.phases() == [("serve", 5)] * UPLOADS
        small_one = await library.open(donor, 99)
        await small_one.request(AskHeads(since=0), Heads)
        with pytest.raises(Refused, match="busy"):
            await blob(small_one, ask)
        served[0].close()
        await asyncio.sleep(1)
        await blob(await library.open(donor), ask)

    run_simulated(main())


def test_who_asks_nothing_more_loses_its_place(tmp_path: Path) -> None:
    async def main() -> None:
        library, donor = a_donor(tmp_path, 6)
        info = donor.replica.newest_snapshot()
        ask = AskChunk(step=5, digest=info.digest, chunk=0)
        idle = [await library.open(donor, 100 + i) for i in range(UPLOADS)]
        for channel in idle:
            await blob(channel, ask)
        with pytest.raises(Refused, match="busy"):
            await blob(await library.open(donor), ask)
        await asyncio.sleep(TIMEOUTS.first_message_s + 1)
        await blob(await library.open(donor), ask)
        with pytest.raises(Gone):
            await idle[0].receive_frame(100, 1.0)
        for i in range(UPLOADS - 1):
            await blob(await library.open(donor, 200 + i), ask)

    run_simulated(main())


def test_other_messages_are_not_served(tmp_path: Path) -> None:
    async def main() -> None:
        library, donor = a_donor(tmp_path, 6)
        info = donor.replica.newest_snapshot()
        channel = await library.open(donor)
        await blob(channel, AskChunk(step=5, digest=info.digest, chunk=0))
        with pytest.raises(Gone):
            await channel.request(Push(record=b""), Push)
        transport = library.network.nodes[donor.who.peer_id]
        assert [error.reason for error in transport.complaints] == ["sends push out of turn"]
        for i in range(UPLOADS):
            await blob(await library.open(donor, 100 + i), AskChunk(step=5, digest=info.digest, chunk=0))

    run_simulated(main())


def test_the_rate_holds_for_all_streams_together(tmp_path: Path) -> None:
    async def main() -> None:
        library, donor = a_donor(tmp_path, 6, max_bytes_per_s=500.0)
        info = donor.replica.newest_snapshot()
        began_s, ends_s = now_s(), []

        async def download(asker: int) -> None:
            channel = await library.open(donor, asker)
            for chunk in range(CHUNKS):
                await blob(channel, AskChunk(step=5, digest=info.digest, chunk=chunk))
            ends_s.append(now_s() - began_s)

        await asyncio.gather(download(100), download(101))
        due_s = 2 * CHUNKS * CHUNK_BYTES / 500.0 - BURST_S
        assert due_s <= ends_s[1] < due_s + 1
        assert ends_s[0] > ends_s[1] - 1  # in turn

    run_simulated(main())


def test_an_update_goes_at_the_rate_frame_by_frame(tmp_path: Path) -> None:
    async def main() -> None:
        library, donor = a_donor(tmp_path, 6, max_bytes_per_s=100.0)
        data = donor.replica.ledger.update_bytes(5)
        assert data is not None
        channel = await library.open(donor)
        began_s = now_s()
        await channel.request(AskUpdate(step=5, head=donor.replica.loaded.head), Size)
        await channel.receive_frame(FRAME_BYTES, 10.0)
        assert FRAME_BYTES / 100 - BURST_S <= now_s() - began_s < FRAME_BYTES / 100
        for _ in range(len(data) // FRAME_BYTES):
            await channel.receive_frame(FRAME_BYTES, 10.0)
        assert len(data) / 100 - BURST_S <= now_s() - began_s < len(data) / 100

    run_simulated(main())


SLOW_RATES = Timeouts(slow_rate_bytes_per_s=100.0, min_rate_bytes_per_s=10.0)
"""A chunk of 200 bytes is worth two seconds; twenty, so that its reader's turn does not end."""


def test_slow_readers_keep_no_newcomer_out(tmp_path: Path) -> None:
    """Twenty identities, each of which asks for a chunk every nine seconds, and again for a place when it is told to
    go. A newcomer downloads the snapshot and the updates since."""

    async def main() -> None:
        library = Library(tmp_path, new_replica(tmp_path / "me"), timeouts=SLOW_RATES)
        donor = library.add(replica_at(tmp_path / "donor", 8))
        ask = AskChunk(step=5, digest=donor.replica.newest_snapshot().digest, chunk=0)
        chunks = 0

        async def read_slowly(asker: int) -> None:
            nonlocal chunks
            while True:
                channel = await library.open(donor, asker)
                with contextlib.suppress(RemoteError):
                    while True:
                        await blob(channel, ask)
                        chunks += 1
                        await asyncio.sleep(9.0)
                channel.close()
                await asyncio.sleep(0.5)

        readers = [asyncio.ensure_future(read_slowly(100 + i)) for i in range(20)]
        await asyncio.sleep(60.0)
        began_s = now_s()
        caught_up = None
        while caught_up is None:
            caught_up = await library.to(donor.replica)
            if caught_up is None:
                await asyncio.sleep(2.5)
                library.publish(donor)
            assert now_s() - began_s < 30.0
        assert chunks > 30, "they have been served meanwhile"
        library.check_same(donor.replica)
        for reader in readers:
            reader.cancel()

    run_simulated(main())


def test_who_reads_faster_is_not_sent_away_for_others(tmp_path: Path) -> None:
    """A chunk in less than two seconds; the first one takes longer from the twentieth on."""

    async def main() -> None:
        library = Library(tmp_path, new_replica(tmp_path / "me"), timeouts=SLOW_RATES)
        donor = library.add(replica_at(tmp_path / "donor", 6))
        ask = AskChunk(step=5, digest=donor.replica.newest_snapshot().digest, chunk=0)
        channels = [await library.open(donor, 100 + i) for i in range(UPLOADS)]
        for turn in range(20 + 9):
            slow = turn >= 20 and turn % 3
            await asyncio.gather(*(blob(channel, ask) for channel in channels[1 if slow else 0 :]))
            with pytest.raises(Refused, match="busy"):
                await blob(await library.open(donor), ask)
            await asyncio.sleep(1.5)
        await blob(await library.open(donor), ask)
        with pytest.raises(Refused, match="busy serving others"):
            await channels[0].receive(Size, timeout_s=1.0)
        await asyncio.gather(*(blob(channel, ask) for channel in channels[1:]))

    run_simulated(main())


def test_a_peer_has_one_slot_and_its_newest_stream_has_it(tmp_path: Path) -> None:
    async def main() -> None:
        library, donor = a_donor(tmp_path, 6)
        ask = AskChunk(step=5, digest=donor.replica.newest_snapshot().digest, chunk=0)
        first, second = await library.open(donor), await library.open(donor)
        await blob(first, ask)
        await blob(second, ask)
        with pytest.raises(Refused, match="another stream of yours"):
            await first.receive(Size, timeout_s=1.0)
        for i in range(UPLOADS - 1):
            await blob(await library.open(donor, 100 + i), ask)
        with pytest.raises(Refused, match="busy"):
            await blob(await library.open(donor, 200), ask)
        await blob(second, ask)

    run_simulated(main())


def test_the_time_that_the_donor_takes_is_not_the_reader_s(tmp_path: Path) -> None:
    """It keeps to a rate far below what a reader must take, and its disk is slow; nobody's turn ends."""

    async def main() -> None:
        library, donor = a_donor(tmp_path, 6, max_bytes_per_s=20.0)
        ask = AskChunk(step=5, digest=donor.replica.newest_snapshot().digest, chunk=0)
        channel = await library.open(donor)
        for _ in range(10):
            await blob(channel, ask)
        assert now_s() > 10 * CHUNK_BYTES / 20.0 - 2
        with pytest.raises(Refused, match="busy"):
            await blob(await library.open(donor, 100), ask)

    run_simulated(main())


def test_who_takes_less_than_the_least_rate_is_sent_away_and_not_let_in_for_a_while(tmp_path: Path) -> None:
    """Nobody else asks. It takes the heads every few seconds, and holds a slot."""

    async def main() -> None:
        library, donor = a_donor(tmp_path, 6)
        ask = AskChunk(step=5, digest=donor.replica.newest_snapshot().digest, chunk=0)
        channel = await library.open(donor)
        await blob(channel, ask)
        await asyncio.sleep(6.0)
        await channel.request(AskHeads(since=0), Heads)
        await asyncio.sleep(6.0)
        with pytest.raises(Refused, match="you take things too slowly"):
            await channel.request(AskHeads(since=0), Heads)
        with pytest.raises(Refused, match="busy"):
            await blob(await library.open(donor), ask)
        await blob(await library.open(donor, 100), ask)
        await asyncio.sleep(FORGIVEN_AFTER_S)
        await blob(await library.open(donor), ask)

    run_simulated(main())


def test_with_a_low_rate_fewer_are_served_at_a_time() -> None:
    timeouts = Timeouts()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uploads, "CHUNK_BYTES", 1024 * 1024)
        assert [slots(rate, timeouts) for rate in (None, 1e5, 1.7e5, 2.6e5, 1e9)] == [4, 1, 2, 3, 4]
    assert timeouts.reduced_part_s / 2 > 1024 * 1024 / MIN_UPLOAD_BYTES_PER_S
