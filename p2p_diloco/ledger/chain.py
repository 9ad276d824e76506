"""The chain: header and certificate of every update from the genesis on, in one file that only grows.

    magic                              8 bytes, CHAIN_MAGIC
    for each update, from U_0 on:
        length of the entry            4 bytes, big-endian
        BLAKE2b over the entry         16 bytes
        entry                          ``Certified.to_bytes``

Values are pruned, these never: they say how the run came to its head, and who is known there. The file is read once as
a whole, when it is opened; of each entry stay in memory where it lies, its head, and who contributed to most of its
parts. The signatures are not verified again: they were, before the entry was written.

Rules of this file: an entry is in memory once it is on the disk; what a write that was cut short has left behind the
last entry is written over; the file ends before the first entry that is damaged, or does not follow.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from p2p_diloco.core.certificate import MAX_CERTIFICATE_BYTES, Certified
from p2p_diloco.core.errors import Gap
from p2p_diloco.core.grid import Grid
from p2p_diloco.core.known import WINDOW_STEPS, Known, known_at
from p2p_diloco.core.update import UpdateHeader, max_update_start_bytes
from p2p_diloco.ledger.disk import disk_errors, sync, write_whole
from p2p_diloco.ledger.files import LedgerFiles

CHAIN_MAGIC = b"DiLoCoC\x01"
CHECKSUM_BYTES = 16
START_OF_ENTRY_BYTES = 4 + CHECKSUM_BYTES
ITEM_BYTES = 5
"""At most so many stand before each entry in a msgpack list, and before the first one."""


def max_entry_bytes(grid: Grid) -> int:
    """Returns an upper bound of a header and its certificate."""
    return max_update_start_bytes(grid) + MAX_CERTIFICATE_BYTES + 3 * ITEM_BYTES


@dataclass(frozen=True, kw_only=True)
class ChainPlace:
    """An entry of the chain, as it is kept in memory."""

    start: int
    """Of its length, in bytes from the beginning of the file."""
    stop: int
    parent: bytes
    link: bytes
    head: bytes
    in_most_parts: tuple[str, ...]
    """As ``Certified`` has it."""


class Chain:
    """The chain of one ledger. Methods that read or write the file may raise LedgerError when the disk fails."""

    def __init__(self, files: LedgerFiles, grid: Grid) -> None:
        """Opens the chain, or begins one. What is damaged goes to the quarantine, with all that follows it."""
        self.path = files.chain_path
        self._max_entry_bytes = max_entry_bytes(grid)
        self._places: list[ChainPlace] = []
        self._steps: dict[bytes, int] = {}
        """Head -> its outer step, of the places, and of the genesis."""
        self._lock = threading.Lock()
        """Held by whoever reads or writes the file."""
        with disk_errors(self.path):
            if not self.path.exists():
                return
            with self.path.open("rb") as file:
                problem = self._read(file)
            if problem:
                files.quarantine_tail(self.path, self._size_bytes if self._places else 0, problem)

    @property
    def end(self) -> int:
        """Returns the outer step to which the chain leads: it has the updates before."""
        return len(self._places)

    def head_at(self, step: int) -> bytes | None:
        """Returns the head at an outer step; None beyond the end, and at the genesis as long as there is no entry."""
        places = self._places
        if step == 0 and places:
            return places[0].parent
        return places[step - 1].head if 0 < step <= len(places) else None

    def step_of(self, head: bytes) -> int | None:
        """Returns the outer step of a head; None for one that the chain does not lead to."""
        return self._steps.get(head)

    def links(self, since: int, most: int) -> list[bytes]:
        """Returns the links that lead on from outer step ``since``, at most ``most`` of them."""
        return [place.link for place in self._places[since : since + most]]

    def has(self, header: UpdateHeader) -> bool:
        """Returns whether the chain has this update."""
        return self.head_at(header.step + 1) == header.head

    def changed_from(self, entries: Sequence[Certified]) -> int | None:
        """Returns the outer step from which on the chain would be another one with these entries, which follow one from
        the other; None where it has them all. Raises ValueError when they do not follow from the chain."""
        new = next((certified.header for certified in entries if not self.has(certified.header)), None)
        if new is None:
            return None
        if new.step > self.end or (new.step > 0 and new.parent != self.head_at(new.step)):
            raise ValueError(f"update {new.step} does not follow from the chain, which leads to outer step {self.end}")
        return new.step

    def contradicts(self, step: int, head: bytes) -> bool:
        """Returns whether the chain leads to another head at an outer step. It says nothing about those beyond its
        end."""
        return self.head_at(step) not in (None, head)

    def last_contributors(self, step: int) -> list[tuple[str, ...]]:
        """Returns of each of the last WINDOW_STEPS updates before ``step`` who contributed to most of its parts. Raises
        Gap when the chain does not reach so far."""
        if step > self.end:
            raise Gap(f"{self.path}: leads to outer step {self.end} only, not to {step}; restart to download the rest")
        return [place.in_most_parts for place in self._places[max(step - WINDOW_STEPS, 0) : step]]

    def contributed(self, since: int) -> dict[int, tuple[str, ...]]:
        """Returns the outer step of each update from WINDOW_STEPS before ``since`` on -> who contributed to most of its
        parts."""
        first = max(since - WINDOW_STEPS, 0)
        return {first + i: place.in_most_parts for i, place in enumerate(self._places[first:])}

    def known_at(self, step: int) -> Known:
        """Returns who is known where outer step ``step`` begins. Raises Gap when the chain does not reach so far."""
        return known_at(step, self.last_contributors(step))

    def entry(self, step: int) -> Certified | None:
        """Returns header and certificate of the update that leads from ``step`` to the next, read from the disk; None
        where it is not here, or not sound any more."""
        found = self._read_from(step, 0)
        return Certified.from_bytes(found[0]) if found else None

    def pieces(self, since: int, max_bytes: int) -> list[bytes]:
        """Returns the bytes of the entries from outer step ``since`` on, as many as a msgpack list of ``max_bytes`` has
        room for, but one at least; none where there is none."""
        return self._read_from(since, max_bytes)

    def packed_bytes(self, since: int) -> int:
        """Returns about how many bytes all entries from outer step ``since`` on are."""
        places = self._places
        return places[-1].stop - places[since].start if since < len(places) else 0

    def append(self, certified: Certified) -> None:
        """Adds an entry at the end; it is durable on return. An entry that the chain has changes nothing, whoever's
        signatures it is of; one for an earlier outer step replaces those from there on. Raises ValueError for one that
        does not follow."""
        self.extend([certified])

    def extend(self, entries: Sequence[Certified]) -> None:
        """Adds entries, which follow one from the other, as ``append`` does, and all of them or none."""
        step = self.changed_from(entries)
        if step is None:
            return
        new = [certified for certified in entries if certified.header.step >= step]
        places, pieces = self._placed(new, self._places[step - 1].stop if step else len(CHAIN_MAGIC))
        with self._lock, disk_errors(self.path, sum(len(piece) for piece in pieces)):
            if not self.path.exists():
                write_whole(self.path, [CHAIN_MAGIC], len(CHAIN_MAGIC))
            self._forget(step)
            with self.path.open("r+b") as file:
                file.truncate(places[0].start)
                file.seek(places[0].start)
                for piece in pieces:
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            self._remember(places)

    def truncate(self, step: int) -> None:
        """Cuts the entries from outer step ``step`` on off, durably."""
        with self._lock, disk_errors(self.path):
            if step >= self.end:
                return
            start = self._places[step].start
            self._forget(step)
            os.truncate(self.path, start)
            sync(self.path)

    def save_from(self, step: int, path: Path) -> None:
        """Writes a copy of the entries from outer step ``step`` on to another file; none where there are none."""
        with self._lock, disk_errors(path):
            if step >= self.end:
                return
            with self.path.open("rb") as file, path.open("wb") as copy:
                copy.write(CHAIN_MAGIC)
                for place in self._places[step:]:
                    file.seek(place.start)
                    copy.write(file.read(place.stop - place.start))
            sync(path)

    def _remember(self, places: Sequence[ChainPlace]) -> None:
        if not self._places:
            self._steps[places[0].parent] = 0
        for place in places:
            self._places.append(place)
            self._steps[place.head] = len(self._places)

    def _forget(self, step: int) -> None:
        """Forgets the places from outer step ``step`` on."""
        for place in self._places[step:]:
            self._steps.pop(place.head, None)
        del self._places[step:]
        if not self._places:
            self._steps.clear()

    # -- the file ----------------------------------------------------------------------------------------------------

    @property
    def _size_bytes(self) -> int:
        return self._places[-1].stop if self._places else len(CHAIN_MAGIC)

    def _read(self, file: IO[bytes]) -> str:
        """Takes in the entries of the file, up to the first that is not sound. Returns what is wrong with it; empty
        where nothing is."""
        if file.read(len(CHAIN_MAGIC)) != CHAIN_MAGIC:
            return "it is no chain"
        while start := file.read(START_OF_ENTRY_BYTES):
            try:
                certified = Certified.from_bytes(read_entry(start, file, self._max_entry_bytes))
                header = certified.header
                if (header.step, header.parent) != (self.end, self.head_at(self.end) or header.parent):
                    raise ValueError("it does not follow from the one before")
            except ValueError as error:
                return f"entry {self.end} is damaged ({error})"
            self._remember(self._placed([certified], self._size_bytes)[0])
        return ""

    def _read_from(self, step: int, max_bytes: int) -> list[bytes]:
        """Returns entries as ``pieces`` does. They end before one that is damaged."""
        found: list[bytes] = []
        with self._lock, disk_errors(self.path):
            places = self._places[step:]
            if not places or not self.path.exists():
                return []
            left = max_bytes - ITEM_BYTES
            with self.path.open("rb") as file:
                file.seek(places[0].start)
                for place in places:
                    left -= place.stop - place.start - START_OF_ENTRY_BYTES + ITEM_BYTES
                    if found and left < 0:
                        break
                    try:
                        found.append(read_entry(file.read(START_OF_ENTRY_BYTES), file, self._max_entry_bytes))
                    except ValueError:
                        break  # it is cut off when the chain is opened the next time
        return found

    def _placed(self, entries: Sequence[Certified], start: int) -> tuple[list[ChainPlace], list[bytes]]:
        """Returns where the entries will lie, from the byte ``start`` on, and the bytes to be written there. Raises
        ValueError unless each follows from the one before."""
        places: list[ChainPlace] = []
        pieces: list[bytes] = []
        for certified in entries:
            header, data = certified.header, certified.to_bytes()
            if len(data) > self._max_entry_bytes:
                raise ValueError(f"the certificate of update {header.step} is too large")
            if places and (header.step, header.parent) != (entries[0].header.step + len(places), places[-1].head):
                raise ValueError(f"update {header.step} does not follow from the one before it")
            pieces += [len(data).to_bytes(4, "big"), checksum(data), data]
            stop = start + START_OF_ENTRY_BYTES + len(data)
            # Ten thousand entries name the same few peers: interned, each id is in memory once.
            contributed = tuple(sys.intern(peer_id) for peer_id in certified.in_most_parts())
            places.append(
                ChainPlace(
                    start=start,
                    stop=stop,
                    parent=header.parent,
                    link=header.link,
                    head=header.head,
                    in_most_parts=contributed,
                )
            )
            start = stop
        return places, pieces


def checksum(entry: bytes) -> bytes:
    """Returns what stands before an entry, so that damage is found."""
    return hashlib.blake2b(entry, digest_size=CHECKSUM_BYTES).digest()


def read_entry(start: bytes, file: IO[bytes], most_bytes: int) -> bytes:
    """Returns the bytes of the entry that begins with ``start``. Raises ValueError, before memory is taken, for one
    that is longer than ``most_bytes``."""
    length = int.from_bytes(start[:4], "big")
    if length > most_bytes:
        raise ValueError(f"its length is {length} bytes")
    data = file.read(length)
    if len(start) < START_OF_ENTRY_BYTES or len(data) != length or checksum(data) != start[4:]:
        raise ValueError("its bytes are not what was written")
    return data


def read_entries(path: Path, grid: Grid) -> Iterator[Certified]:
    """Yields the entries of a chain's file one after the other, none where there is no file. Raises ValueError at the
    first that is damaged; whether one follows from the other is not looked at."""
    most_bytes = max_entry_bytes(grid)
    with disk_errors(path):
        if not path.exists():
            return
        with path.open("rb") as file:
            if file.read(len(CHAIN_MAGIC)) != CHAIN_MAGIC:
                raise ValueError("it is no chain")
            while start := file.read(START_OF_ENTRY_BYTES):
                yield Certified.from_bytes(read_entry(start, file, most_bytes))
