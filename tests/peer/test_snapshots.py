"""Snapshots from donors: which one is believed, and downloads that break off."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from p2p_diloco.core.certificate import Certified
from p2p_diloco.core.errors import LedgerError
from p2p_diloco.ledger.replica import Replica
from p2p_diloco.ledger.snapshot import chunk_slices
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.message import Message
from p2p_diloco.wire.messages import No
from p2p_diloco.wire.state_messages import AskChunk, AskIndex, AskUpdate
from tests.support.builders import NOW_S
from tests.support.fakes import run_simulated
from tests.support.library import (
    CHUNK_BYTES,
    CHUNKS,
    Donor,
    Library,
    N,
    advance,
    after,
    new_replica,
    on,
    one_bit,
    replica_at,
    says,
    small_parts,
)


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    with small_parts():
        yield


# -- which snapshot is believed ------------------------------------------------------------------------------------


def test_a_digest_that_no_certificate_names_is_not_downloaded(tmp_path: Path) -> None:
    """However many peers name it. That at outer step 0 is the manifest's."""

    async def main() -> None:
        library = Library(tmp_path / "1", new_replica(tmp_path / "me"))
        swarm = replica_at(tmp_path / "swarm", 7)
        for _ in range(3):
            library.add(swarm, snapshot_digest=bytes(32))
        library.add(swarm, snapshot_step=6, snapshot_digest=bytes(32))
        library.add(swarm)
        assert await library.to(swarm) is not None
        assert library.phases() == [("download", 5)]
        assert library.suspects() == []
        library.check_same(swarm)

        library = Library(tmp_path / "2", new_replica(tmp_path / "again"))
        for _ in range(3):
            library.add(replica_at(tmp_path / "genesis", 1), snapshot_digest=bytes(32))
        assert await library.to(library.donors[0].replica) is None
        assert [donor.count(AskIndex) for donor in library.donors] == [0, 0, 0]

    run_simulated(main())


def test_when_nobody_gives_the_newest_one_an_older_one_is_taken(tmp_path: Path) -> None:
    async def main() -> None:
        library = Library(tmp_path, new_replica(tmp_path / "me"))
        swarm = replica_at(tmp_path / "swarm", 7)
        other = replica_at(tmp_path / "other", 5)
        other.loaded.theta[0] += 1  # a sound snapshot, with the swarm's head and other values
        other.ledger.write_snapshot(other.loaded)
        liar = library.add(other, step=7, head=swarm.loaded.head)

        async def refuse(donor: Donor, channel: Channel, message: Message) -> bool:
            refused = isinstance(message, AskIndex) and message.step == 5
            if refused:
                await channel.send(No(reason="busy serving others"))
            return refused

        for _ in range(2):
            library.add(swarm, refuse)
        assert await library.to(swarm) is not None
        assert library.phases() == [("download", 0)]
        assert {message.step for message in liar.asked if isinstance(message, AskChunk)} <= {0}
        assert library.suspects() == []
        library.check_same(swarm)

    run_simulated(main())


def test_a_state_that_the_members_did_not_agree_on_is_not_downloaded(tmp_path: Path) -> None:
    """The certificate of U_5 names none."""

    async def main() -> None:
        library = Library(tmp_path, new_replica(tmp_path / "me"))
        swarm = replica_at(tmp_path / "swarm", 5)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Replica, "digest_due", lambda replica: b"")
            advance(swarm, 7)
        library.add(swarm)
        assert await library.to(swarm) is not None
        assert library.phases() == [("download", 0)]
        library.check_same(swarm)

    run_simulated(main())


def test_those_who_are_on_another_history_are_not_asked(tmp_path: Path) -> None:
    async def main() -> None:
        library = Library(tmp_path, new_replica(tmp_path / "me"))
        swarm = replica_at(tmp_path / "swarm", 7)
        fork = replica_at(tmp_path / "fork", 7, fork_at=2)
        for _ in range(3):
            library.add(fork, head=swarm.loaded.head)
        donor = library.add(swarm)
        assert await library.to(swarm) is not None
        assert sum(liar.count(AskChunk) for liar in library.donors[:3]) == 0
        assert donor.count(AskChunk) == CHUNKS
        library.check_same(swarm)

    run_simulated(main())


def test_who_has_gone_on_may_still_have_the_snapshot(tmp_path: Path) -> None:
    """One of three donors has just written another one, and all have the one before."""

    async def main() -> None:
        library = Library(tmp_path, new_replica(tmp_path / "me"))
        old, new = replica_at(tmp_path / "old", 9), replica_at(tmp_path / "new", 10)
        for replica in (old, old, new):
            library.add(replica)
        assert await library.to(old) is not None
        assert library.phases() == [("download", 5)]
        assert all(donor.count(AskChunk) > 0 for donor in library.donors)
        library.check_same(old)

    run_simulated(main())


# -- downloads that break off --------------------------------------------------------------------------------------


def test_a_download_goes_on_at_the_next_donor(tmp_path: Path) -> None:
    async def main() -> None:
        library = Library(tmp_path, new_replica(tmp_path / "me"))
        swarm = replica_at(tmp_path / "swarm", 6)
        first = library.add(swarm, after(5, AskChunk, on(AskChunk, says())), phase="inner")
        second = library.add(swarm, phase="joining", snapshot_digest=bytes(32))
        assert await library.to(swarm) is None
        assert library.catchup.promising
        assert first.count(AskChunk) == 6
        library.publish(second, issued_s=NOW_S + 1)
        assert await library.to(swarm) is not None
        assert sorted(second.chunks()) == sorted({*range(CHUNKS)} - {*first.chunks()[:5]})
        assert library.suspects() == [0]
        library.check_same(swarm)

    run_simulated(main())


def test_when_all_donors_die_what_came_stays_and_the_next_start_fetches_the_rest(tmp_path: Path) -> None:
    async def main() -> None:
        swarm = replica_at(tmp_path / "swarm", 6)
        library = Library(tmp_path / "1", new_replica(tmp_path / "me"))
        for _ in range(3):
            library.add(swarm, after(2, AskChunk, on(AskChunk, says())))
        assert await library.to(swarm) is None
        assert [donor.count(AskChunk) for donor in library.donors] == [3, 3, 3]
        assert library.suspects() == [0, 1, 2]
        assert len(library.incoming()) == 1

        again = Library(tmp_path / "2", new_replica(tmp_path / "me"))
        donor = again.add(swarm)
        caught_up = await again.to(swarm)
        assert caught_up is not None
        came = {chunk for gone in library.donors for chunk in gone.chunks()[:2]}
        assert sorted(donor.chunks()) == sorted({*range(CHUNKS)} - came)
        again.check_same(swarm)

        whole = Library(tmp_path / "3", new_replica(tmp_path / "other"))
        whole.add(swarm)
        at_once = await whole.to(swarm)
        assert at_once is not None
        assert at_once.bytes_received - caught_up.bytes_received >= 6 * CHUNK_BYTES

    run_simulated(main())


def test_what_a_crash_left_of_a_download_is_used_as_far_as_it_is_sound(tmp_path: Path) -> None:
    async def main() -> None:
        library = Library(tmp_path, new_replica(tmp_path / "me"))
        donor = library.add(replica_at(tmp_path / "donor", 6))
        info = donor.replica.newest_snapshot()
        data = bytearray(info.path.read_bytes()[: chunk_slices(N)[8].start + 1])
        data[0] ^= 1  # of the header, which needs no download
        data[chunk_slices(N)[3].start] ^= 1
        (tmp_path / "me" / f"incoming-5-{info.digest.hex()[:16]}.part").write_bytes(data)
        (tmp_path / "me" / "incoming-0-0123456789abcdef.part").write_bytes(bytes(10))
        assert await library.to(donor.replica) is not None
        assert sorted(donor.chunks()) == [3, 8, 9, 10, 11]
        library.check_same(donor.replica)

    run_simulated(main())


def test_a_download_that_was_whole_when_the_peer_died_is_not_made_again(tmp_path: Path) -> None:
    async def main() -> None:
        library = Library(tmp_path, new_replica(tmp_path / "me"))
        donor = library.add(replica_at(tmp_path / "donor", 6))
        info = donor.replica.newest_snapshot()
        (tmp_path / "me" / f"incoming-5-{info.digest.hex()[:16]}.part").write_bytes(info.path.read_bytes())
        caught_up = await library.to(donor.replica)
        assert caught_up is not None
        assert (donor.count(AskUpdate), donor.count(AskChunk)) == (1, 0)
        library.check_same(donor.replica)

    run_simulated(main())


def test_what_is_left_of_a_download_that_is_no_longer_needed_is_removed(tmp_path: Path) -> None:
    """Once a donor was found that has the updates."""

    async def main() -> None:
        library = Library(tmp_path, replica_at(tmp_path / "me", 4))
        (tmp_path / "me" / "incoming-5-0123456789abcdef.part").write_bytes(bytes(10))
        donor = library.add(replica_at(tmp_path / "donor", 6))
        caught_up = await library.to(donor.replica)
        assert caught_up is not None
        assert not caught_up.snapshot
        library.check_same(donor.replica)

    run_simulated(main())


def test_a_disk_that_changes_what_is_written_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody else is blamed, and the next attempt begins anew."""
    from p2p_diloco.ledger.ledger import Ledger

    adopt = Ledger.adopt_snapshot

    def change_and_adopt(self: Ledger, path: Path, digest: bytes, entries: Sequence[Certified]) -> object:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        return adopt(self, path, digest, entries)

    async def main() -> None:
        library = Library(tmp_path, new_replica(tmp_path / "me"))
        donor = library.add(replica_at(tmp_path / "donor", 6))
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            patch.setattr(Ledger, "adopt_snapshot", change_and_adopt)
            assert await library.to(donor.replica) is None
        assert "look at the disk" in caplog.text
        assert library.incoming() == []
        assert library.suspects() == []
        assert await library.to(donor.replica) is not None
        assert donor.count(AskChunk) == 2 * CHUNKS

    run_simulated(main())


def test_a_full_disk_ends_the_download_with_our_own_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from p2p_diloco.ledger.snapshot import IncomingSnapshot

    def full(*_: object) -> None:
        raise LedgerError("disk full")

    async def main() -> None:
        library = Library(tmp_path, new_replica(tmp_path / "me"))
        swarm = replica_at(tmp_path / "donor", 6)
        for _ in range(2):
            library.add(swarm)
        monkeypatch.setattr(IncomingSnapshot, "write", full)
        with pytest.raises(LedgerError, match="disk full"):
            await library.to(swarm)
        await asyncio.sleep(1)
        assert not [task for task in library.transport.tasks if not task.done()]
        assert library.suspects() == []

    run_simulated(main())


# -- without catching up -------------------------------------------------------------------------------------------


def test_one_snapshot_from_whoever_has_it(tmp_path: Path) -> None:
    async def main() -> None:
        library = Library(tmp_path, replica_at(tmp_path / "me", 12))
        swarm = replica_at(tmp_path / "swarm", 12)
        for lie in (on(AskChunk, one_bit), None, None):
            library.add(swarm, lie)
        info = swarm.newest_snapshot()
        path = library.replica.newest_snapshot().path
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        library.replica.load()  # it finds the damage, and puts the file aside
        assert [info.step for info in library.replica.ledger.snapshots()] == [5]
        assert await library.catchup.fetch_snapshot(10, info.digest)
        assert path.read_bytes() == info.path.read_bytes()
        assert [info.step for info in library.replica.ledger.snapshots()] == [5, 10]
        assert library.suspects() == [0]
        assert not await library.catchup.fetch_snapshot(5, bytes(32))
        library.replica.ledger.quarantined.clear()
        library.check_same(swarm)

    run_simulated(main())


def test_two_downloads_at_once_do_not_meet(tmp_path: Path) -> None:
    async def main() -> None:
        library = Library(tmp_path, new_replica(tmp_path / "me"))
        swarm = replica_at(tmp_path / "swarm", 12)
        library.add(swarm)
        older, newer = swarm.ledger.snapshots()
        fetch = library.catchup.fetch_snapshot
        fetched = await asyncio.gather(
            fetch(newer.step, newer.digest), fetch(older.step, older.digest), library.to(swarm)
        )
        assert None not in fetched
        library.check_same(swarm)

    run_simulated(main())
