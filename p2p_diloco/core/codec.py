"""What a codec is: one part of an outer gradient <-> bytes. ``codecs`` has those that a run may name.

A new codec is a class with these three methods in a file of its own, and a line in ``codecs.CODECS``; ``docs/run.md``
and ``docs/protocol.md`` name it, too. PROTOCOL stays as it is: peers without the codec refuse the run by its manifest.
What it promises:

    - Decoding gives every machine the same bits: a float as it stands, or an integer times a float32 scale, which is
      rounded once.
    - Sizes follow from the number of values alone: a wrong length is known before anything is decoded, and nothing
      expands.
    - Magnitudes are bounded far below float32's largest, so that neither decoding, nor a mean over a group, nor the
      momentum can overflow.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float32]

LARGEST_VALUE = 1e30
"""Codecs that could hold more clamp to this magnitude when they encode, and refuse more when they decode."""
NOT_FINITE = "only finite values can be encoded"


class Codec(Protocol):
    """One way to write values as bytes. Instances hold no state."""

    def encoded_bytes(self, n: int) -> int:
        """Returns how many bytes ``n`` values take."""
        ...

    def encode(self, values: Vector) -> bytes:
        """Returns the bytes of ``values``, float32 [n], clamped to the largest value. Raises ValueError when one of
        them is not finite."""
        ...

    def decode(self, data: bytes | memoryview, n: int) -> Vector:
        """Returns float32 [n]. Raises ValueError when the length is wrong, or a value is not finite or too large."""
        ...


def clamped(values: Vector, limit: float) -> Vector:
    """Returns ``values`` within ``limit``, the same array where they are. Raises ValueError when one is not finite."""
    # One pass each for the largest and the smallest value: both are NaN where a value is.
    largest = max(abs(float(values.max(initial=0))), abs(float(values.min(initial=0))))
    if not math.isfinite(largest):
        raise ValueError(NOT_FINITE)
    return values if largest <= limit else np.clip(values, -limit, limit)


def check_length(data: bytes | memoryview, n: int, expected_bytes: int) -> None:
    """Raises ValueError unless ``data`` has as many bytes as ``n`` values take."""
    if len(data) != expected_bytes:
        raise ValueError(f"{len(data)} bytes for {n} values, expected {expected_bytes}")
