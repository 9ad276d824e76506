"""The grid."""

from __future__ import annotations

from p2p_diloco.core.grid import PART_VALUES, part_slices


def test_the_grid_covers_every_value_once() -> None:
    for n in (1, PART_VALUES - 1, PART_VALUES, PART_VALUES + 1, 3 * PART_VALUES):
        slices = part_slices(n)
        assert [i.start for i in slices] == [0, *(i.stop for i in slices[:-1])]
        assert slices[-1].stop == n
        assert all(i.stop - i.start == PART_VALUES for i in slices[:-1])
