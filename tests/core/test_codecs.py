from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from p2p_diloco.core.codec import LARGEST_VALUE, Vector, check_length, clamped
from p2p_diloco.core.codecs import CODECS, CodecName, decode, encode, encoded_bytes
from p2p_diloco.core.runfile import OuterSpec
from tests.peer.test_peer import Simulated
from tests.support.fakes import run_simulated

BLOCK = {"int8": 256, "int4": 64}
LARGEST = {"int8": 127, "int4": 7}
codecs = pytest.mark.parametrize("codec", CODECS)
lengths = st.integers(1, 700)
vectors = hnp.arrays(np.float32, lengths, elements=st.floats(width=32, allow_nan=False, allow_infinity=False))


def normal(n: int, seed: int = 0) -> Vector:
    return np.random.default_rng(seed).standard_normal(n).astype(np.float32)


def largest_of(codec: CodecName) -> float:
    """Returns the largest magnitude that comes back from a codec."""
    return 65504.0 if codec == "fp16" else LARGEST_VALUE


def allowed_error(values: Vector, codec: CodecName) -> Vector:
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
def test_a_value_comes_back_within_half_a_step_of_its_block(codec: CodecName, values: Vector) -> None:
    data = encode(values, codec)
    assert len(data) == encoded_bytes(len(values), codec)
    back = decode(data, len(values), codec)
    assert back.dtype == np.float32
    clamped: Vector = np.clip(values, -largest_of(codec), largest_of(codec))
    assert (np.abs(back - clamped) <= allowed_error(clamped, codec)).all()


@codecs
@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 255, 256, 257, 1000])
def test_decoded_values_encode_to_themselves(codec: CodecName, n: int) -> None:
    once = decode(encode(normal(n), codec), n, codec)
    np.testing.assert_allclose(decode(encode(once, codec), n, codec), once, rtol=1e-6)


@codecs
def test_encoding_is_a_function_of_the_values_alone(codec: CodecName) -> None:
    values = normal(1001)
    strided = np.repeat(values, 2)[::2]
    assert encode(values, codec) == encode(strided, codec) == encode(values.copy(), codec)


GOLDEN: dict[CodecName, str] = {
    "fp32": "000000000000803f000000c000004040",
    "fp16": "0000003c00c00042",
    "int8": "0683c13c002aab7f",
    "int4": "b76ddb3ea8f3",
}


@codecs
def test_the_bytes_are_pinned(codec: CodecName) -> None:
    values = np.array([0, 1, -2, 3], np.float32)
    assert encode(values, codec).hex() == GOLDEN[codec]
    step = np.float32(3) / np.float32(LARGEST.get(codec, 1))
    integers = {"int8": [0, 42, -85, 127], "int4": [0, 2, -5, 7]}
    expected = np.array(integers[codec], np.float32) * step if codec in integers else values
    np.testing.assert_array_equal(decode(bytes.fromhex(GOLDEN[codec]), 4, codec), expected)


@codecs
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 299])
def test_what_is_not_finite_is_not_encoded(codec: CodecName, bad: float, at: int) -> None:
    values = normal(300)
    values[at] = bad
    with pytest.raises(ValueError, match="finite"):
        encode(values, codec)


@codecs
def test_the_largest_values_survive_and_can_be_averaged(codec: CodecName) -> None:
    values = np.full(300, np.finfo(np.float32).max)
    values[::2] *= -1
    back = decode(encode(values, codec), 300, codec)
    np.testing.assert_allclose(back, np.sign(values) * largest_of(codec), rtol=1e-6)


@codecs
@given(data=st.data())
@settings(max_examples=60)
def test_any_bytes_are_refused_or_decode_to_bounded_values(codec: CodecName, data: st.DataObject) -> None:
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
    assert (np.abs(values) <= largest_of(codec) * 1.15).all()  # 8/7: the integer -8, which no encoder gives


@codecs
def test_a_wrong_length_is_refused(codec: CodecName) -> None:
    data = encode(normal(300), codec)
    for wrong in (data[:-1], data + b"\0", b""):
        with pytest.raises(ValueError, match="expected"):
            decode(wrong, 300, codec)


@pytest.mark.parametrize("codec", ["int8", "int4"])
@pytest.mark.parametrize("scale", [np.nan, np.inf, -1.0, 3e36])
def test_a_scale_that_no_encoder_gives_is_refused(codec: CodecName, scale: float) -> None:
    data = np.float32(scale).tobytes() + bytes([0x7F] * (encoded_bytes(10, codec) - 4))
    with pytest.raises(ValueError, match="scale"):
        decode(data, 10, codec)


def test_an_outlier_spoils_its_block_and_no_more() -> None:
    values = normal(1024)
    values[5] = 1e6
    back = decode(encode(values, "int8"), 1024, "int8")
    assert np.abs(back[256:] - values[256:]).max() < 0.02


@codecs
def test_no_values_are_no_bytes(codec: CodecName) -> None:
    nothing = np.zeros(0, np.float32)
    assert encode(nothing, codec) == b""
    assert decode(b"", 0, codec).tobytes() == b""


class UpperHalves:
    """A codec that the package does not have: the upper half of each float32."""

    def encoded_bytes(self, n: int) -> int:
        return 2 * n

    def encode(self, values: Vector) -> bytes:
        return clamped(values, LARGEST_VALUE).astype("<f4").view("<u2")[1::2].tobytes()

    def decode(self, data: bytes | memoryview, n: int) -> Vector:
        check_length(data, n, self.encoded_bytes(n))
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)


def test_a_new_codec_is_one_class_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A swarm trains with it: rounds, ledgers, a newcomer's catch-up and run files know codecs by their names alone."""
    monkeypatch.setitem(CODECS, "upper-halves", UpperHalves())
    assert OuterSpec(codec="upper-halves").codec == "upper-halves"

    async def main() -> None:
        swarm = Simulated(tmp_path, 3, n=1000, codec="upper-halves", outer_steps=6)
        sims = await swarm.start(2)
        await swarm.until(sims, 3)
        newcomer = swarm.add(3)
        await swarm.until([*sims, newcomer], 6)
        assert len({sim.peer.replica.loaded.digest() for sim in [*sims, newcomer]}) == 1
        assert not np.array_equal(newcomer.peer.replica.theta, swarm.genesis)
        update = sims[0].peer.replica.ledger.update(2)
        assert update is not None
        assert [len(part.data) for part in update.parts] == [2000]

    run_simulated(main())


def test_a_codec_that_nobody_has_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match="Input should be 'fp32', 'fp16', 'int8' or 'int4'"):
        OuterSpec(codec="upper-halves")
