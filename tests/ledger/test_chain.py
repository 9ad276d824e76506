"""The chain's file: what it gives back is what was written, and it ends where it was damaged."""

from __future__ import annotations

import errno
import logging
import os
import threading
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from p2p_diloco.core.certificate import Certified
from p2p_diloco.core.errors import Gap, LedgerError
from p2p_diloco.core.grid import Grid
from p2p_diloco.core.update import Part, Update, UpdateHeader
from p2p_diloco.ledger.chain import CHAIN_MAGIC, ITEM_BYTES, START_OF_ENTRY_BYTES, Chain, checksum, max_entry_bytes
from p2p_diloco.ledger.files import LedgerFiles
from tests.support.certificates import certified, unsigned

GRID = Grid(n=4, codec="fp32")
GENESIS = bytes([7]) * 32


def open_chain(folder: Path) -> Chain:
    return Chain(LedgerFiles(folder), GRID)


def entries(
    count: int, *, after: bytes = GENESIS, since: int = 0, name: str = "a", mask: bytes = b"\x01"
) -> list[Certified]:
    """Those of a history, one after the other; ``name`` contributes to all."""
    made: list[Certified] = []
    for step in range(since, since + count):
        part = Part(mask=mask, data=bytes(16))
        header = UpdateHeader(
            step=step,
            parent=made[-1].header.head if made else after,
            contributors=((name, 5), ("z", 5)),
            part_hashes=(part.hash,),
        )
        update = Update(header=header, parts=(part,))
        made.append(certified(update, unsigned(update)))
    return made


def chain_of(folder: Path, count: int) -> Chain:
    chain = open_chain(folder)
    chain.extend(entries(count))
    return chain


def held(chain: Chain) -> list[Certified | None]:
    return [chain.entry(step) for step in range(chain.end)]


def quarantine(folder: Path) -> list[Path]:
    return sorted((folder / "quarantine").glob("*"))


# -- writing and reading back ------------------------------------------------------------------------------------------


def test_before_the_first_entry(tmp_path: Path) -> None:
    chain = open_chain(tmp_path)
    assert (chain.end, chain.head_at(0), chain.entry(0), chain.pieces(0, 100)) == (0, None, None, [])
    assert not chain.path.exists()
    chain.truncate(0)
    chain.extend([])
    assert not chain.path.exists()


def test_what_is_appended_is_there_and_after_opening_again(tmp_path: Path) -> None:
    chain, expected = open_chain(tmp_path), entries(20)
    for one in expected:
        chain.append(one)
        for each in (chain, open_chain(tmp_path)):
            assert each.end == one.header.step + 1
            assert each.head_at(each.end) == one.header.head
    for each in (chain, open_chain(tmp_path)):
        assert held(each) == expected
        assert [each.head_at(step) for step in range(22)] == [GENESIS, *(one.header.head for one in expected), None]
        assert each.entry(20) is None
    assert quarantine(tmp_path) == []


def test_the_file_is_what_the_page_says(tmp_path: Path) -> None:
    chain_of(tmp_path, 2)
    packed = [one.to_bytes() for one in entries(2)]
    pieces = [piece for data in packed for piece in (len(data).to_bytes(4, "big"), checksum(data), data)]
    assert (tmp_path / "chain").read_bytes() == b"".join([CHAIN_MAGIC, *pieces])


def test_all_at_once_is_the_same_file_with_one_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(descriptor)
        fsync(descriptor)

    one_by_one, at_once = open_chain(tmp_path / "1"), open_chain(tmp_path / "2")
    for one in entries(10):
        one_by_one.append(one)
    at_once.append(entries(1)[0])
    monkeypatch.setattr(os, "fsync", noted)
    at_once.extend(entries(10))
    assert len(synced) == 1
    assert one_by_one.path.read_bytes() == at_once.path.read_bytes()


def test_the_same_again_changes_nothing(tmp_path: Path) -> None:
    chain = chain_of(tmp_path, 5)
    before = chain.path.stat()
    chain.append(entries(5)[2])
    chain.extend(entries(5)[1:4])
    assert chain.path.stat() == before
    assert chain.changed_from(entries(5)) is None
    assert chain.changed_from([]) is None


def test_an_entry_for_an_earlier_step_replaces_those_from_there_on(tmp_path: Path) -> None:
    chain, ours = chain_of(tmp_path, 8), entries(8)
    other = entries(2, after=ours[4].header.head, since=5, name="b")
    assert chain.changed_from([*ours[3:5], *other]) == 5
    chain.extend([*ours[3:5], *other])
    for each in (chain, open_chain(tmp_path)):
        assert held(each) == [*ours[:5], *other]


def test_another_genesis_replaces_everything(tmp_path: Path) -> None:
    chain, other = chain_of(tmp_path, 3), entries(2, after=bytes(32))
    chain.extend(other)
    for each in (chain, open_chain(tmp_path)):
        assert held(each) == other
        assert each.head_at(0) == bytes(32)


@pytest.mark.parametrize(
    "wrong",
    [
        entries(1, since=6),
        entries(1, since=5),  # from another head
        entries(1, since=3),
        [entries(6)[5], entries(8)[7]],
        [entries(6)[5], *entries(1, since=6)],
    ],
)
def test_what_does_not_follow_is_refused(tmp_path: Path, wrong: list[Certified]) -> None:
    chain = chain_of(tmp_path, 5)
    before = chain.path.read_bytes()
    with pytest.raises(ValueError, match="does not follow"):
        chain.extend(wrong)
    assert (chain.end, chain.path.read_bytes()) == (5, before)


def test_a_first_entry_is_of_the_genesis(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not follow"):
        open_chain(tmp_path).append(entries(1, since=3)[0])


@pytest.mark.parametrize("step", [0, 3, 5, 9])
def test_truncate(tmp_path: Path, step: int) -> None:
    chain = chain_of(tmp_path, 5)
    chain.truncate(step)
    for each in (chain, open_chain(tmp_path)):
        assert held(each) == entries(5)[:step]
    chain.extend(entries(7))
    assert held(open_chain(tmp_path)) == entries(7)


def test_a_copy_of_the_end(tmp_path: Path) -> None:
    chain = chain_of(tmp_path, 5)
    chain.save_from(3, tmp_path / "copy")
    chain.save_from(5, tmp_path / "none")
    packed = [one.to_bytes() for one in entries(5)[3:]]
    pieces = [piece for data in packed for piece in (len(data).to_bytes(4, "big"), checksum(data), data)]
    assert (tmp_path / "copy").read_bytes() == b"".join([CHAIN_MAGIC, *pieces])
    assert not (tmp_path / "none").exists()
    assert chain.end == 5


def test_who_is_known(tmp_path: Path) -> None:
    chain = chain_of(tmp_path, 15)
    ours = entries(15)
    assert chain.known_at(15).peers == frozenset()
    chain.extend(entries(4, after=ours[-1].header.head, since=15, name="b"))
    for each in (chain, open_chain(tmp_path)):
        assert each.known_at(15).peers == frozenset()
        assert each.known_at(16).peers == {"a"}, "b has contributed to one update"
        assert each.known_at(19).peers == {"a", "b"}
        assert each.last_contributors(19) == [("a",)] * 12 + [("b",)] * 4
        assert each.last_contributors(2) == [("a",)] * 2
        assert each.contributed(18) == {step: ("a",) if step < 15 else ("b",) for step in range(2, 19)}
        assert each.contributed(0).keys() == set(range(19))
        with pytest.raises(Gap, match="leads to outer step 19 only, not to 20"):
            each.known_at(20)


def test_whoever_is_in_few_parts_is_not_in_the_list(tmp_path: Path) -> None:
    chain = open_chain(tmp_path)
    chain.extend(entries(1, mask=b"\x02"))
    assert chain.last_contributors(1) == [("z",)]


@given(since=st.integers(0, 12), max_bytes=st.integers(0, 5000))
def test_pieces_are_as_many_as_there_is_room_for_and_one_at_least(
    tmp_path_factory: pytest.TempPathFactory, since: int, max_bytes: int
) -> None:
    chain = chain_of(tmp_path_factory.mktemp("chain"), 10)
    packed = [one.to_bytes() for one in entries(10)]
    pieces = chain.pieces(since, max_bytes)
    assert pieces == packed[since : since + len(pieces)]
    size = ITEM_BYTES + sum(ITEM_BYTES + len(piece) for piece in pieces)
    assert size <= max_bytes or len(pieces) == (since < 10)
    if since + len(pieces) < 10:
        assert size + ITEM_BYTES + len(packed[since + len(pieces)]) > max_bytes
    assert chain.packed_bytes(since) == sum(START_OF_ENTRY_BYTES + len(data) for data in packed[since:])


def test_one_reads_while_another_one_writes(tmp_path: Path) -> None:
    """What is given out is always of one history."""
    chain, ours = chain_of(tmp_path, 6), entries(6)
    other = entries(3, after=ours[2].header.head, since=3, name="bb")
    known = {one.to_bytes() for one in (*ours, *other)}
    torn: list[str] = []

    def read() -> None:
        for _ in range(300):
            pieces = [Certified.from_bytes(piece).header for piece in chain.pieces(0, 10**6)]
            if not all(before.head == after.parent for before, after in pairwise(pieces)):
                torn.append("pieces of two histories")
            if (entry := chain.entry(4)) is not None and entry.to_bytes() not in known:
                torn.append("another entry")

    reader = threading.Thread(target=read)
    reader.start()
    while reader.is_alive():
        chain.extend(other)
        chain.extend(ours)
    reader.join()
    assert torn == []


# -- crashes and damage ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 4, 19, 20, 21, 60])
def test_a_write_that_was_cut_short_is_cut_off(tmp_path: Path, cut: int, caplog: pytest.LogCaptureFixture) -> None:
    chain = chain_of(tmp_path, 4)
    start, data = chain.path.stat().st_size, entries(5)[4].to_bytes()
    torn = (len(data).to_bytes(4, "big") + checksum(data) + data)[:cut]
    with chain.path.open("ab") as file:
        file.write(torn)
    again = open_chain(tmp_path)
    assert held(again) == entries(4)
    assert chain.path.stat().st_size == start
    assert [path.read_bytes() for path in quarantine(tmp_path)] == [torn]
    assert [path.name for path in quarantine(tmp_path)] == ["chain.0"]
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1
    again.extend(entries(6))
    assert held(open_chain(tmp_path)) == entries(6)
    assert len(quarantine(tmp_path)) == 1


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@example(0.0, 0)
@example(0.999, 7)
@settings(max_examples=60)
def test_a_flipped_bit_costs_its_entry_and_those_after(
    tmp_path_factory: pytest.TempPathFactory, place: float, bit: int
) -> None:
    folder = tmp_path_factory.mktemp("flipped")
    path = chain_of(folder, 6).path
    data = bytearray(path.read_bytes())
    at = int(place * len(data))
    data[at] ^= 1 << bit
    path.write_bytes(data)
    starts, start = [0], len(CHAIN_MAGIC)
    for one in entries(6):
        starts.append(start)
        start += START_OF_ENTRY_BYTES + len(one.to_bytes())
    sound = max(i for i, begin in enumerate(starts) if begin <= at) - 1
    chain = open_chain(folder)
    assert held(chain) == entries(6)[: max(sound, 0)]
    assert len(quarantine(folder)) == 1
    chain.extend(entries(6))
    again = open_chain(folder)
    assert held(again) == entries(6)


@given(st.binary(max_size=300))
@example(b"")
@example(bytes(8))
@example(b"\xff\xff\xff\xff" + bytes(16))
@example(b"\0\0\0\0" + checksum(b""))
@example((3).to_bytes(4, "big") + checksum(b"\x92\xc4\0") + b"\x92\xc4\0")
def test_any_bytes_behind_the_magic_are_no_entry(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / "chain").write_bytes(CHAIN_MAGIC + data)
    assert open_chain(folder).end == 0
    assert len(quarantine(folder)) == (data != b"")
    chain = open_chain(folder)
    chain.extend(entries(2))
    assert held(open_chain(folder)) == entries(2)


def test_what_is_no_chain_is_put_aside(tmp_path: Path) -> None:
    (tmp_path / "chain").write_bytes(b"something else")
    assert open_chain(tmp_path).end == 0
    assert [path.read_bytes() for path in quarantine(tmp_path)] == [b"something else"]
    chain_of(tmp_path, 1)


def test_a_sound_entry_that_does_not_follow_ends_the_chain(tmp_path: Path) -> None:
    chain = chain_of(tmp_path, 3)
    for stray in (entries(5)[4], entries(1, since=3)[0]):
        data = stray.to_bytes()
        with chain.path.open("ab") as file:
            file.write(len(data).to_bytes(4, "big") + checksum(data) + data)
        assert held(open_chain(tmp_path)) == entries(3)
    assert len(quarantine(tmp_path)) == 2


def test_a_length_is_checked_before_memory_is_taken(tmp_path: Path) -> None:
    """Of a file with a hole of a terabyte, nothing is read."""
    (tmp_path / "chain").write_bytes(CHAIN_MAGIC + (max_entry_bytes(GRID) + 1).to_bytes(4, "big") + bytes(16))
    os.truncate(tmp_path / "chain", 10**6)
    assert open_chain(tmp_path).end == 0


def test_an_entry_that_goes_bad_after_opening_is_not_given_out(tmp_path: Path) -> None:
    chain = chain_of(tmp_path, 5)
    data = bytearray(chain.path.read_bytes())
    data[-1] ^= 1
    chain.path.write_bytes(data)
    assert chain.entry(4) is None
    assert len(chain.pieces(2, 10**6)) == 2
    assert chain.pieces(4, 10**6) == []
    chain.path.unlink()
    assert (chain.entry(0), chain.pieces(0, 100)) == (None, [])


@pytest.mark.parametrize("kill_at", ["fsync", "truncate"])
def test_a_write_cut_short_by_a_signal_can_be_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: str
) -> None:
    chain = chain_of(tmp_path, 3)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, kill_at, killed)
        with pytest.raises(KeyboardInterrupt):
            chain.append(entries(4)[3]) if kill_at == "fsync" else chain.truncate(2)
    assert held(chain)[:2] == entries(2)
    chain.extend(entries(5))
    for each in (chain, open_chain(tmp_path)):
        assert held(each) == entries(5)


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.ENOSPC, "chain: disk full, free 1 MB or move the folder"), (errno.EIO, "Input/output")],
)
def test_a_failing_disk_is_said_and_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    chain = chain_of(tmp_path, 3)

    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(LedgerError, match=message):
            chain.extend(entries(5))
    assert held(chain) == entries(3)
    chain.append(entries(4)[3])
    for each in (chain, open_chain(tmp_path)):
        assert held(each) == entries(4), "what the first try had left behind is gone"
    assert quarantine(tmp_path) == []
