"""Codecs that keep small integers and a scale for each block of values: int8 in blocks of 256, int4 in blocks of 64.

Block-wise absmax: a block's scale is the largest magnitude in it over the largest integer, so that one outlier spoils
its block and no more. Layout: all scales (little-endian float32), then all integers. int4 keeps two values in a byte,
the first in the low nibble, as value + 8.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from p2p_diloco.core.codec import LARGEST_VALUE, NOT_FINITE, Vector, check_length

Integers = npt.NDArray[np.int8]


class Int8:
    """A byte for each value, from -127 to 127."""

    block = 256
    largest = 127

    def encoded_bytes(self, n: int) -> int:
        return scales_bytes(n, self.block) + n

    def encode(self, values: Vector) -> bytes:
        scales, integers = quantized(values, self.block, self.largest)
        return b"".join((scales.astype("<f4").data, integers.data))

    def decode(self, data: bytes | memoryview, n: int) -> Vector:
        check_length(data, n, self.encoded_bytes(n))
        integers = np.frombuffer(data, np.int8, n, offset=scales_bytes(n, self.block))
        return scaled(scales_of(data, n, self.block, self.largest), integers, self.block)


class Int4:
    """Half a byte for each value, from -7 to 7."""

    block = 64
    largest = 7

    def encoded_bytes(self, n: int) -> int:
        return scales_bytes(n, self.block) + -(-n // 2)

    def encode(self, values: Vector) -> bytes:
        scales, integers = quantized(values, self.block, self.largest)
        nibbles = (integers + 8).view(np.uint8)
        if len(nibbles) % 2:
            nibbles = np.append(nibbles, np.uint8(8))
        return scales.astype("<f4").tobytes() + (nibbles[0::2] | nibbles[1::2] << 4).tobytes()

    def decode(self, data: bytes | memoryview, n: int) -> Vector:
        check_length(data, n, self.encoded_bytes(n))
        packed = np.frombuffer(data, np.uint8, -(-n // 2), offset=scales_bytes(n, self.block))
        nibbles = np.empty(2 * len(packed), np.int8)
        nibbles[0::2], nibbles[1::2] = packed & 15, packed >> 4
        integers = nibbles[:n] - np.int8(8)
        return scaled(scales_of(data, n, self.block, self.largest), integers, self.block)


def scales_bytes(n: int, block: int) -> int:
    """Returns how many bytes the scales of ``n`` values take."""
    return 4 * -(-n // block)


def quantized(values: Vector, block: int, largest: int) -> tuple[Vector, Integers]:
    """Returns the scale of each block, float32 [blocks], and the integers, int8 [n], of at most ``largest``. Raises
    ValueError when a value is not finite. Few passes over the values: four members on two processors share these."""
    n = len(values)
    blocks = (values if n % block == 0 else np.pad(values, (0, -n % block))).reshape(-1, block)
    magnitudes: Vector = np.maximum(blocks.max(axis=1), -blocks.min(axis=1))  # [blocks], NaN where a value is
    largest_of_all = float(magnitudes.max(initial=0))
    if not math.isfinite(largest_of_all):
        raise ValueError(NOT_FINITE)
    if largest_of_all > LARGEST_VALUE:
        blocks = np.clip(blocks, -LARGEST_VALUE, LARGEST_VALUE)
        magnitudes = np.minimum(magnitudes, np.float32(LARGEST_VALUE))
    scales: Vector = magnitudes / np.float32(largest)
    # A block of zeros, or so small that its scale is denormal, becomes zeros.
    scales[scales < np.finfo(np.float32).tiny] = 0
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
    steps = blocks * inverse[:, None]
    return scales, np.rint(steps, out=steps).astype(np.int8).reshape(-1)[:n]


def scales_of(data: bytes | memoryview, n: int, block: int, largest: int) -> Vector:
    """Returns the scales that ``data`` begins with, float32 [blocks]. Raises ValueError for one that no values have."""
    scales = np.frombuffer(data, "<f4", -(-n // block))
    largest_scale = np.float32(LARGEST_VALUE) / np.float32(largest)
    if not (np.isfinite(scales).all() and (scales >= 0).all() and (scales <= largest_scale).all()):
        raise ValueError("a scale is not finite, negative or too large")
    return scales


def scaled(scales: Vector, integers: Integers, block: int) -> Vector:
    """Returns each integer times the scale of its block, float32 [n]."""
    n = len(integers)
    whole = n // block * block
    values = np.empty(n, np.float32)
    blocks = values[:whole].reshape(-1, block)
    np.multiply(integers[:whole].reshape(-1, block), scales[: n // block, None], out=blocks, dtype=np.float32)
    if whole < n:
        np.multiply(integers[whole:], scales[-1], out=values[whole:], dtype=np.float32)
    return values
