"""One part of an outer gradient <-> bytes: fp32, fp16, int8 in blocks of 256, int4 in blocks of 64.

Block-wise absmax: a block's scale is the largest magnitude in it over the largest integer, so that one outlier spoils
its block and no more. Layout of int8 and int4: all scales (little-endian float32), then all integers. int4 keeps
two values in a byte, the first in the low nibble, as value + 8.

Decoding is an integer times a float32 scale, one rounding, so every machine gets the same bits. Sizes follow from the
number of values alone: a wrong length is known before anything is decoded, and nothing expands. Magnitudes are bounded
far below float32's largest, so that neither decoding, nor a mean over a group, nor the momentum can overflow.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

Codec = Literal["fp32", "fp16", "int8", "int4"]
CODECS: tuple[Codec, ...] = get_args(Codec)
Vector = npt.NDArray[np.float32]

BLOCK = {"int8": 256, "int4": 64}
LARGEST = {"int8": 127, "int4": 7}
LARGEST_VALUE = {"fp32": 1e30, "fp16": 65504.0, "int8": 1e30, "int4": 1e30}
"""Encoding clamps to this magnitude."""


def encoded_bytes(n: int, codec: Codec) -> int:
    """Bytes that ``n`` values take."""
    if codec == "fp32":
        return 4 * n
    if codec == "fp16":
        return 2 * n
    scales_bytes = 4 * -(-n // BLOCK[codec])
    return scales_bytes + (n if codec == "int8" else -(-n // 2))


def encode(values: Vector, codec: Codec) -> bytes:
    """``values``: float32 [n]; clamped to the codec's largest value. ValueError when one is not finite."""
    # One pass each for the largest and the smallest value: both are NaN where a value is.
    largest_value = max(abs(float(values.max(initial=0))), abs(float(values.min(initial=0))))
    if not math.isfinite(largest_value):
        raise ValueError("only finite values can be encoded")
    limit = LARGEST_VALUE[codec]
    clamped: Vector = values if largest_value <= limit else np.clip(values, -limit, limit)
    if codec == "fp32":
        return clamped.astype("<f4", copy=False).tobytes()
    if codec == "fp16":
        return clamped.astype("<f2").tobytes()
    n, block = len(clamped), BLOCK[codec]
    blocks = clamped if n % block == 0 else np.pad(clamped, (0, -n % block))
    blocks = blocks.reshape(-1, block)
    largest: Vector = np.maximum(blocks.max(axis=1), -blocks.min(axis=1))  # [blocks]
    scales: Vector = largest / np.float32(LARGEST[codec])
    # A block of zeros, or so small that its scale is denormal, becomes zeros.
    scales[scales < np.finfo(np.float32).tiny] = 0
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
    integers = np.rint(blocks * inverse[:, None]).astype(np.int8).reshape(-1)[:n]  # |integer| <= LARGEST
    if codec == "int8":
        return scales.astype("<f4").tobytes() + integers.tobytes()
    nibbles = (integers + 8).view(np.uint8)
    if n % 2:
        nibbles = np.append(nibbles, np.uint8(8))
    return scales.astype("<f4").tobytes() + (nibbles[0::2] | nibbles[1::2] << 4).tobytes()


def decode(data: bytes | memoryview, n: int, codec: Codec) -> Vector:
    """float32 [n]. ValueError when the length is wrong, or a value or scale is not finite or too large."""
    if len(data) != encoded_bytes(n, codec):
        raise ValueError(f"{len(data)} bytes for {n} values of {codec}, expected {encoded_bytes(n, codec)}")
    if codec in ("fp32", "fp16"):
        values = np.frombuffer(data, "<f4" if codec == "fp32" else "<f2").astype(np.float32)
        if not (np.isfinite(values).all() and (np.abs(values) <= np.float32(LARGEST_VALUE[codec])).all()):
            raise ValueError("a value is not finite or too large")
        return values
    block = BLOCK[codec]
    n_blocks = -(-n // block)
    scales = np.frombuffer(data, "<f4", n_blocks)
    largest_scale = np.float32(LARGEST_VALUE[codec]) / np.float32(LARGEST[codec])
    if not (np.isfinite(scales).all() and (scales >= 0).all() and (scales <= largest_scale).all()):
        raise ValueError("a scale is not finite, negative or too large")
    if codec == "int8":
        integers = np.frombuffer(data, np.int8, n, offset=4 * n_blocks)
    else:
        packed = np.frombuffer(data, np.uint8, -(-n // 2), offset=4 * n_blocks)
        nibbles = np.empty(2 * len(packed), np.int8)
        nibbles[0::2], nibbles[1::2] = packed & 15, packed >> 4
        integers = nibbles[:n] - np.int8(8)
    whole = n // block * block
    values = np.empty(n, np.float32)
    blocks = values[:whole].reshape(-1, block)
    np.multiply(integers[:whole].reshape(-1, block), scales[: n // block, None], out=blocks, dtype=np.float32)
    if whole < n:
        np.multiply(integers[whole:], scales[-1], out=values[whole:], dtype=np.float32)
    return values
