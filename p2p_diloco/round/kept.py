"""The contributions to the parts that a peer has reduced in one round, kept so that others can look at them.

That is about as much as an encoded vector where all members can be dialled. Up to MAX_HELD_BYTES are held in memory,
and what is more lies in a file without a name, which is gone when the round is forgotten, and when the process ends.
To write each part while all wait for the next one's mean made a round of four members 15 % longer on two processors:
each time, a thread had to get its turn. A disk that is full costs what is kept, and no round.
"""

from __future__ import annotations

import logging
import os
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from threading import Lock

from p2p_diloco.core.audit import pack_contributions
from p2p_diloco.core.signed_part import Contribution

log = logging.getLogger(__name__)

MAX_HELD_BYTES = 32 * 1024**2
"""Of one round, in memory. Two rounds that are over may still be asked about."""
MAX_KEPT_BYTES = 4 * 1024**3
"""Of one round, in the file. What comes after that is not kept."""


class Kept:
    """The contributions of one round. ``hold`` blocks nothing; the other methods block for as long as the disk does,
    and any thread may call them."""

    def __init__(self, folder: Path) -> None:
        """Makes nothing yet. ``folder``: where the file will be made, which is there."""
        self._folder = folder
        self._file: int | None = None
        """Its descriptor, which is closed with this object at the latest: a peer that ends closes nothing."""
        self._release: weakref.finalize[[int], Kept] | None = None
        self._held: dict[tuple[int, int], Mapping[int, Contribution]] = {}
        """(number of the butterfly, part) -> contributions that are in memory."""
        self._places: dict[tuple[int, int], tuple[int, int]] = {}
        """The same -> (start, length) in the file."""
        self._end = 0
        self._closed = False
        self._lock = Lock()

    def hold(self, number: int, part: int, came: Mapping[int, Contribution]) -> bool:
        """Keeps the contributions to one part of a butterfly: index in the roster -> contribution. Returns whether so
        much is in memory now that ``spill`` has to be called."""
        if self._closed:
            return False
        self._held[number, part] = came
        held = list(self._held.values())  # a copy: ``spill`` may be taking from it in its thread
        return sum(len(one.data) for came in held for one in came.values()) > MAX_HELD_BYTES

    def spill(self) -> None:
        """Writes what is in memory to the file."""
        with self._lock:
            for place in list(self._held):
                packed = pack_contributions(self._held[place])
                if not self._closed and self._end + len(packed) <= MAX_KEPT_BYTES:
                    self._write(place, packed)
                del self._held[place]

    def _write(self, place: tuple[int, int], packed: bytes) -> None:
        try:
            if self._file is None:
                self._open()
            written = os.pwrite(self._file, packed, self._end) if self._file is not None else 0
        except OSError as error:
            log.warning("contributions are not kept, nobody can audit what I reduce now: %s", error.strerror)
            self._closed = True
            return
        if written == len(packed):
            self._places[place] = self._end, len(packed)
            self._end += len(packed)

    def read(self, number: int, part: int) -> bytes | None:
        """Returns what was kept for one part of a butterfly, packed; None where nothing is."""
        with self._lock:
            if (held := self._held.get((number, part))) is not None:
                return pack_contributions(held)
            place = self._places.get((number, part))
            if place is None or self._file is None:
                return None
            start, length = place
            data = os.pread(self._file, length, start)
        return data if len(data) == length else None

    def _open(self) -> None:
        """Makes the file, and takes its name away at once."""
        self._file, name = tempfile.mkstemp(prefix="contributions-", dir=self._folder)
        self._release = weakref.finalize(self, os.close, self._file)
        os.unlink(name)

    def close(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._closed = True
            self._held.clear()
            self._places.clear()
            self._file = None
            if self._release is not None:
                self._release()
