"""The grid."""

from __future__ import annotations

import numpy as np
import pytest

from p2p_diloco.core.grid import PART_VALUES, Grid, part_slices


def test_the_grid_covers_every_value_once() -> None:
    for n in (1, PART_VALUES - 1, PART_VALUES, PART_VALUES + 1, 3 * PART_VALUES):
        slices = part_slices(n)
        assert [i.start for i in slices] == [0, *(i.stop for i in slices[:-1])]
        assert slices[-1].stop == n
        assert all(i.stop - i.start == PART_VALUES for i in slices[:-1])


def test_a_grid_knows_the_size_of_each_part() -> None:
    grid = Grid(n=2 * PART_VALUES + 10, codec="int4")
    assert (grid.n_parts, list(grid.slices)) == (3, part_slices(grid.n))
    assert [grid.n_values(part) for part in range(3)] == [PART_VALUES, PART_VALUES, 10]
    assert [grid.part_bytes(part) for part in range(3)] == [PART_VALUES * 9 // 16, PART_VALUES * 9 // 16, 4 + 5]
    assert grid.vector_bytes == PART_VALUES * 9 // 8 + 9


@pytest.mark.parametrize("n", [1, PART_VALUES - 1, PART_VALUES, PART_VALUES + 1, 3 * PART_VALUES])
def test_the_parts_of_a_grid_have_all_its_values(n: int) -> None:
    """Also where the last part is as large as the others."""
    grid = Grid(n=n, codec="fp32")
    assert [grid.n_values(part) for part in range(grid.n_parts)] == [len(range(n)[where]) for where in part_slices(n)]
    assert grid.vector_bytes == 4 * n


def test_a_part_is_decoded_as_the_part_that_it_is() -> None:
    grid = Grid(n=PART_VALUES + 10, codec="fp16")
    values = np.arange(10, dtype=np.float32)
    np.testing.assert_array_equal(grid.decode(1, grid.encode(values)), values)
    with pytest.raises(ValueError, match=f"20 bytes for {PART_VALUES} values"):
        grid.decode(0, grid.encode(values))
