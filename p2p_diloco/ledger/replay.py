"""The replay: the state at an outer step as the ledger's files have it, one part after another.

    S_10, U_10, U_11, U_12  ->  part 0 of S_13, part 1 of S_13, ...

It takes the memory of a few parts, however large the model, and every byte is verified as it is read; a file found
damaged is put aside, and another way is taken, from an older snapshot perhaps: all ways to one head give the same bits.
Nothing is taken from the state in memory, so a bit that has flipped there is not in what comes out here.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from p2p_diloco.core.codec import Vector
from p2p_diloco.core.errors import Gap
from p2p_diloco.core.outer import OuterState, apply_part
from p2p_diloco.core.update import UpdateHeader, part_from_bytes, part_places, update_start
from p2p_diloco.ledger.ledger import Ledger
from p2p_diloco.ledger.snapshot import begins_with, chunk_hash, chunk_slices, read_chunk, starts_soundly


class Replay:
    """Computes the state that ``head`` names, at outer step ``step``, from the files. Any method may raise Gap, when no
    files lead there, or no longer, and LedgerError, when the disk fails."""

    def __init__(self, ledger: Ledger, step: int, head: bytes) -> None:
        self.ledger = ledger
        self.step = step
        self.head = head
        self._chunks = chunk_slices(ledger.grid.n)
        self._places: dict[int, list[slice]] = {}
        """Outer step -> where the parts of its update lie in the file."""
        self._take_a_way()

    def part(self, part: int) -> tuple[Vector, Vector]:
        """Returns (theta, momentum) of one part."""
        while (pair := self._computed(part)) is None:
            self._take_a_way()
        return pair

    def parts(self) -> Iterator[tuple[Vector, Vector]]:
        """Returns (theta, momentum) of every part, in order, each computed when it is taken."""
        return (self.part(part) for part in range(len(self._chunks) // 2))

    def _take_a_way(self) -> None:
        while (way := self.ledger.way_to(self.step, self.head)) is not None:
            self._base, self._updates = way
            if self._starts_soundly():
                return
        raise Gap(f"{self.ledger.folder}: does not lead to outer step {self.step}; restart to download it")

    def _starts_soundly(self) -> bool:
        """Looks at all of the files but their parts; returns whether that is sound. What is not, the ledger loses."""
        ledger = self.ledger
        if not starts_soundly(self._base, n=ledger.grid.n, run_id=ledger.run_id):
            ledger.lose_snapshot(self._base, "its header or its size is not what it was")
            return False
        for header in self._updates:
            places, start = part_places(header, ledger.grid), update_start(header)
            if not begins_with(ledger.updates.path(header.step), start, places[-1].stop):
                ledger.updates.lose(header, "its header or its size is not what it was")
                return False
            self._places[header.step] = places
        return True

    def _computed(self, part: int) -> tuple[Vector, Vector] | None:
        """Returns (theta, momentum) of one part; None when a file on the way is damaged, which the ledger loses."""
        try:
            theta, momentum = self._values(part), self._values(len(self._chunks) // 2 + part)
        except ValueError as error:
            self.ledger.lose_snapshot(self._base, str(error))
            return None
        for header in self._updates:
            try:
                gradient = self._gradient(header, part)
            except ValueError as error:
                self.ledger.updates.lose(header, str(error))
                return None
            apply_part(theta, momentum, gradient, lr=self.ledger.lr, momentum=self.ledger.momentum)
        return theta, momentum

    def _values(self, chunk: int) -> Vector:
        data = read_chunk(self._base.path, self._chunks[chunk])
        if chunk_hash(data) != self._base.chunk_hashes[chunk]:
            raise ValueError(f"chunk {chunk} is not what it was")
        return np.frombuffer(data, np.float32).copy()

    def _gradient(self, header: UpdateHeader, part: int) -> Vector:
        data = read_chunk(self.ledger.updates.path(header.step), self._places[header.step][part])
        stored = part_from_bytes(data, header)
        if stored.hash != header.part_hashes[part]:
            raise ValueError(f"part {part} is not what it was")
        return self.ledger.grid.decode(part, stored.data)


def load(ledger: Ledger, theta_out: Vector, momentum_out: Vector, *, at_most: int | None = None) -> OuterState | None:
    """Returns the newest state that the ledger leads to, or that at outer step ``at_most``. It is written into the two
    vectors, float32 [n]; they are garbage when None comes back, for there is no sound snapshot."""
    while True:
        reached = [(step, head) for step, head in ledger.heads().items() if at_most is None or step <= at_most]
        if not reached:
            return None
        step, head = max(reached)
        state = OuterState(step=step, head=head, theta=theta_out, momentum=momentum_out)
        try:
            replay = Replay(ledger, state.step, state.head)
            for (theta, momentum), stored in zip(state.parts(), replay.parts()):
                theta[:], momentum[:] = stored
        except Gap:
            continue
        stray = ledger.header(state.step)
        if stray is not None and state.step != at_most:
            ledger.updates.put_aside(stray, "it does not follow from the state before it")
        return state
