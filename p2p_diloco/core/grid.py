"""The grid: which values of the vector of all parameters are which part, and how many bytes a part takes.

It depends on the run's manifest alone, never on a group, so that a part means the same to everybody and can be fetched
from anybody.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from p2p_diloco.core.codec import Vector
from p2p_diloco.core.codecs import CodecName, decode, encode, encoded_bytes

PART_VALUES = 256 * 1024
"""Values of a part; the last one has what is left."""


def part_slices(n: int) -> list[slice]:
    """Returns the places of the parts in a vector of ``n`` values."""
    return [slice(start, min(start + PART_VALUES, n)) for start in range(0, n, PART_VALUES)]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The parts of a vector of ``n`` values, and the codec that they go through."""

    n: int
    codec: CodecName

    @cached_property
    def slices(self) -> tuple[slice, ...]:
        """Returns the place of each part in the vector."""
        return tuple(part_slices(self.n))

    @property
    def n_parts(self) -> int:
        return len(self.slices)

    def n_values(self, part: int) -> int:
        """Returns how many values a part has."""
        where = self.slices[part]
        return int(where.stop - where.start)

    def part_bytes(self, part: int) -> int:
        """Returns how many bytes a part takes when it is encoded."""
        return encoded_bytes(self.n_values(part), self.codec)

    @cached_property
    def vector_bytes(self) -> int:
        """Returns how many bytes all parts take when they are encoded."""
        return sum(self.part_bytes(part) for part in range(self.n_parts))

    def encode(self, values: Vector) -> bytes:
        """Returns the bytes of one part. Raises ValueError when a value is not finite."""
        return encode(values, self.codec)

    def decode(self, part: int, data: bytes | memoryview) -> Vector:
        """Returns the values of a part, float32. Raises ValueError when ``data`` is not what the codec makes of as many
        values."""
        return decode(data, self.n_values(part), self.codec)
