"""The grid: which values of the vector of all parameters are which part. It depends on the run's manifest alone,
never on a group, so that a part means the same to everybody and can be fetched from anybody.
"""

from __future__ import annotations

PART_VALUES = 256 * 1024


def part_slices(n: int) -> list[slice]:
    """The grid: ``n`` values cut into parts of 256 Ki. It depends on the model alone, never on the group."""
    return [slice(start, min(start + PART_VALUES, n)) for start in range(0, n, PART_VALUES)]
