from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from p2p_diloco.core.codec import BLOCK, CODECS, LARGEST, LARGEST_VALUE, Codec, Vector, decode, encode, encoded_bytes

codecs = pytest.mark.parametrize("codec", CODECS)
lengths = st.integers(1, 700)
vectors = hnp.arrays(np.float32, lengths, elements=st.floats(width=32, allow_nan=False, allow_infinity=False))


def normal(n: int, seed: int = 0) -> Vector:
    return np.random.default_rng(seed).standard_normal(n).astype(np.float32)


def allowed_error(values: Vector, codec: Codec) -> Vector:
    """Half a step of each value's block, or of its own floating-point format."""
    magnitude: Vector = np.abs(values)
    if codec == "fp32":
        return np.zeros_like(values)
    if codec == "fp16":
        error: Vector = np.maximum(magnitude * np.float32(2**-11), np.float32(2**-25))
        return error
    starts = np.arange(0, len(values), BLOCK[codec])
    largest = np.maximum.reduceat(magnitude, starts)
    tiny = np.finfo(np.float32).tiny * LARGEST[codec]  # blocks below this become zeros
    error = np.maximum(largest * np.float32(0.5001 / LARGEST[codec]), np.float32(tiny))
    return np.repeat(error, BLOCK[codec])[: len(values)]


@codecs
@given(values=vectors)
@settings(max_examples=60)
def test_a_value_comes_back_within_half_a_step_of_its_block(codec: Codec, values: Vector) -> None:
    data = encode(values, codec)
    assert len(data) == encoded_bytes(len(values), codec)
    back = decode(data, len(values), codec)
    assert back.dtype == np.float32
    clamped: Vector = np.clip(values, -LARGEST_VALUE[codec], LARGEST_VALUE[codec])
    assert (np.abs(back - clamped) <= allowed_error(clamped, codec)).all()


@codecs
@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 255, 256, 257, 1000])
def test_decoded_values_encode_to_themselves(codec: Codec, n: int) -> None:
    once = decode(encode(normal(n), codec), n, codec)
    np.testing.assert_allclose(decode(encode(once, codec), n, codec), once, rtol=1e-6)


@codecs
def test_encoding_is_a_function_of_the_values_alone(codec: Codec) -> None:
    values = normal(1001)
    strided = np.repeat(values, 2)[::2]
    assert encode(values, codec) == encode(strided, codec) == encode(values.copy(), codec)


GOLDEN: dict[Codec, str] = {
    "fp32": "000000000000803f000000c000004040",
    "fp16": "0000003c00c00042",
    "int8": "0683c13c002aab7f",
    "int4": "b76ddb3ea8f3",
}


@codecs
def test_the_bytes_are_pinned(codec: Codec) -> None:
    values = np.array([0, 1, -2, 3], np.float32)
    assert encode(values, codec).hex() == GOLDEN[codec]
    step = np.float32(3) / np.float32(LARGEST.get(codec, 1))
    integers = {"int8": [0, 42, -85, 127], "int4": [0, 2, -5, 7]}
    expected = np.array(integers[codec], np.float32) * step if codec in integers else values
    np.testing.assert_array_equal(decode(bytes.fromhex(GOLDEN[codec]), 4, codec), expected)


@codecs
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 299])
def test_what_is_not_finite_is_not_encoded(codec: Codec, bad: float, at: int) -> None:
    values = normal(300)
    values[at] = bad
    with pytest.raises(ValueError, match="finite"):
        encode(values, codec)


@codecs
def test_the_largest_values_survive_and_can_be_averaged(codec: Codec) -> None:
    values = np.full(300, np.finfo(np.float32).max)
    values[::2] *= -1
    back = decode(encode(values, codec), 300, codec)
    np.testing.assert_allclose(back, np.sign(values) * LARGEST_VALUE[codec], rtol=1e-6)


@codecs
@given(data=st.data())
@settings(max_examples=60)
def test_any_bytes_are_refused_or_decode_to_bounded_values(codec: Codec, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 300))
    size = data.draw(st.one_of(st.just(encoded_bytes(n, codec)), st.integers(0, 2000)))
    blob = data.draw(st.one_of(st.binary(min_size=size, max_size=size), st.sampled_from([b"\xff", b"\x80", b"\x70"])))
    blob = (blob * size)[:size] if len(blob) == 1 else blob
    try:
        values = decode(blob, n, codec)
    except ValueError:
        return
    assert len(blob) == encoded_bytes(n, codec)
    assert values.shape == (n,)
    assert (np.abs(values) <= LARGEST_VALUE[codec] * 1.15).all()  # 8/7: the integer -8, which no encoder gives


@codecs
def test_a_wrong_length_is_refused(codec: Codec) -> None:
    data = encode(normal(300), codec)
    for wrong in (data[:-1], data + b"\0", b""):
        with pytest.raises(ValueError, match="expected"):
            decode(wrong, 300, codec)


@pytest.mark.parametrize("codec", ["int8", "int4"])
@pytest.mark.parametrize("scale", [np.nan, np.inf, -1.0, 3e36])
def test_a_scale_that_no_encoder_gives_is_refused(codec: Codec, scale: float) -> None:
    data = np.float32(scale).tobytes() + bytes([0x7F] * (encoded_bytes(10, codec) - 4))
    with pytest.raises(ValueError, match="scale"):
        decode(data, 10, codec)


def test_an_outlier_spoils_its_block_and_no_more() -> None:
    values = normal(1024)
    values[5] = 1e6
    back = decode(encode(values, "int8"), 1024, "int8")
    assert np.abs(back[256:] - values[256:]).max() < 0.02


@codecs
def test_no_values_are_no_bytes(codec: Codec) -> None:
    nothing = np.zeros(0, np.float32)
    assert encode(nothing, codec) == b""
    assert decode(b"", 0, codec).tobytes() == b""
