"""Who is right where memory and files differ."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from p2p_diloco.core.codec import Vector
from p2p_diloco.core.errors import LedgerError
from p2p_diloco.core.grid import Grid
from p2p_diloco.core.outer import genesis_state
from p2p_diloco.ledger.comparison import agreed, differing
from p2p_diloco.ledger.ledger import Ledger
from p2p_diloco.ledger.replay import Replay

GENESIS = np.linspace(-1, 1, 300, dtype=np.float32)


class Flipping(Replay):
    """Flips bit ``flips[i]`` of the first value when a part is computed for the i-th time; none where that is None."""

    flips: tuple[int | None, ...]
    computed: int

    def part(self, part: int) -> tuple[Vector, Vector]:
        theta, momentum = super().part(part)
        bit = self.flips[self.computed]
        self.computed += 1
        if bit is not None:
            theta.view(np.uint32)[0] ^= np.uint32(1 << bit)
        return theta, momentum


def replay(folder: Path, *flips: int | None) -> Flipping:
    state = genesis_state(GENESIS.copy())
    ledger = Ledger(folder, grid=Grid(n=300, codec="int8"), lr=0.7, momentum=0.9, snapshot_every=5)
    ledger.write_snapshot(state)
    made = Flipping(ledger, 0, state.head)
    made.flips, made.computed = flips, 0
    return made


def memory(bit: int | None = None) -> tuple[Vector, Vector]:
    theta = GENESIS.copy()
    if bit is not None:
        theta.view(np.uint32)[0] ^= np.uint32(1 << bit)
    return theta, np.zeros(300, np.float32)


@pytest.mark.parametrize(
    ("flips", "mine", "right"),
    [
        ((None,), None, None),
        ((None, None), 3, None),
        ((3, None), None, None),
        ((3, 3), None, 3),
    ],
    ids=["nothing", "in memory", "in the first replay", "in both, alike: it is in the files"],
)
def test_two_of_three_agree(tmp_path: Path, flips: tuple[int | None, ...], mine: int | None, right: int | None) -> None:
    made = replay(tmp_path, *flips)
    pair = agreed(made, 0, memory(mine))
    assert differing(pair, memory(right)) == 0
    assert made.computed == len(flips)


def test_where_all_differ_the_machine_is_faulty(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="computes part 0 of outer step 0 differently each time"):
        agreed(replay(tmp_path, 3, 4), 0, memory())


def test_zeros_and_nans_are_compared_by_their_bits() -> None:
    theta, momentum = memory()
    theta[3] = 0
    assert differing((theta, momentum), (theta, momentum)) == 0
    negative = -np.abs(theta) * 0
    negative[3] = -0.0
    assert differing((theta[3:4], momentum[:0]), (negative[3:4], momentum[:0])) == 1
    nan = np.full(1, np.nan, np.float32)
    assert differing((nan, nan), (nan.copy(), nan)) == 0
