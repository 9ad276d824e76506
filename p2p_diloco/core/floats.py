"""Codecs that keep every value as a float of its own: fp32 and fp16, little-endian."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from p2p_diloco.core.codec import Vector, check_length, clamped


@dataclass(frozen=True)
class Floats:
    """``dtype``: numpy's name of the float, with its byte order. ``largest``: the largest magnitude that is kept."""

    dtype: str
    largest: float

    def encoded_bytes(self, n: int) -> int:
        return np.dtype(self.dtype).itemsize * n

    def encode(self, values: Vector) -> bytes:
        return clamped(values, self.largest).astype(self.dtype, copy=False).tobytes()

    def decode(self, data: bytes | memoryview, n: int) -> Vector:
        check_length(data, n, self.encoded_bytes(n))
        values = np.frombuffer(data, self.dtype).astype(np.float32)
        if not (np.isfinite(values).all() and (np.abs(values) <= np.float32(self.largest)).all()):
            raise ValueError("a value is not finite or too large")
        return values
