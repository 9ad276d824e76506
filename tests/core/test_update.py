"""Updates as bytes: what they were comes back, and anything else is refused."""

from __future__ import annotations

from dataclasses import replace

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from p2p_diloco.core.codecs import CODECS, CodecName, encoded_bytes
from p2p_diloco.core.digest import HASH_BYTES
from p2p_diloco.core.grid import PART_VALUES, Grid
from p2p_diloco.core.identity import MAX_PEER_ID_CHARS
from p2p_diloco.core.update import (
    MAX_CONTRIBUTORS,
    Part,
    Update,
    UpdateHeader,
    check_mask,
    contributor_mask,
    max_update_bytes,
    max_update_start_bytes,
    open_update,
    parts_with,
    update_from_bytes,
    update_pieces,
    update_to_bytes,
)
from tests.core.test_outer import N, genesis, update_of


def test_parts_must_have_the_hashes_of_the_header() -> None:
    update = update_of(genesis())
    with pytest.raises(ValueError, match="hashes"):
        replace(update, header=replace(update.header, part_hashes=(bytes(32),)))
    with pytest.raises(ValueError, match="hashes"):
        replace(update, parts=())


@given(st.sets(st.integers(0, MAX_CONTRIBUTORS - 1)))
def test_a_mask_is_the_set_of_its_contributors(indices: set[int]) -> None:
    mask = contributor_mask(indices)
    assert {i for i in range(8 * len(mask)) if mask[i // 8] >> i % 8 & 1} == indices
    assert contributor_mask([*indices, *indices]) == mask
    check_mask(mask, MAX_CONTRIBUTORS)
    check_mask(mask, max(indices, default=-1) + 1)
    if indices:
        with pytest.raises(ValueError, match="contributors"):
            check_mask(mask, max(indices))


def test_an_update_names_contributors_and_in_one_way_only() -> None:
    state = genesis()
    assert update_of(state, mask=b"").parts[0].mask == b""
    for mask in (b"\x04", b"\x03\0", b"\0"):
        with pytest.raises(ValueError, match="contributors"):
            update_of(state, mask=mask)


def test_a_peer_finds_the_parts_that_it_is_in() -> None:
    masks = [[0, 1], [1], [], [0], [9, 1]]
    parts = tuple(Part(mask=contributor_mask(members), data=b"") for members in masks)
    contributors = tuple((f"peer {i}", 1) for i in range(10))
    header = UpdateHeader(
        step=0, parent=bytes(32), contributors=contributors, part_hashes=tuple(part.hash for part in parts)
    )
    update = Update(header=header, parts=parts)
    assert parts_with(update, "peer 0") == {0, 3}
    assert parts_with(update, "peer 1") == {0, 1, 4}
    assert parts_with(update, "peer 9") == {4}
    assert parts_with(update, "peer 5") == set()
    assert parts_with(update, "a stranger") == set()


@st.composite
def headers(draw: st.DrawFn, n_parts: int = 1) -> UpdateHeader:
    hashes = st.binary(min_size=HASH_BYTES, max_size=HASH_BYTES)
    names = draw(st.lists(st.text(min_size=1, max_size=64), min_size=1, max_size=9, unique=True))
    weights = draw(st.lists(st.integers(1, 2**60 - 1), min_size=len(names), max_size=len(names)))
    return UpdateHeader(
        step=draw(st.integers(0, 2**40 - 1)),
        parent=draw(hashes),
        contributors=tuple(zip(names, weights)),
        part_hashes=tuple(draw(st.lists(hashes, min_size=n_parts, max_size=n_parts))),
    )


@given(headers())
def test_a_header_comes_back_from_its_bytes(header: UpdateHeader) -> None:
    again = UpdateHeader.from_bytes(header.to_bytes())
    assert again == header
    assert again.head == header.head


HEADER = update_of(genesis()).header
FIELDS = [HEADER.step, HEADER.parent, [["a", 300], ["b", 100]], list(HEADER.part_hashes)]


@given(st.binary(max_size=200))
@example(b"\x91" * 3000)
@example(b"\xdd\xff\xff\xff\xff")
@example(b"\xc7\xff\x05" + bytes(255))
@example(HEADER.to_bytes() + b"\0")
@example(HEADER.to_bytes()[:-1])
@example(b"\x94\xcc\x00" + HEADER.to_bytes()[2:])  # the same, its step in two bytes
def test_any_other_bytes_are_no_header(data: bytes) -> None:
    with pytest.raises(ValueError, match="not an update header"):
        UpdateHeader.from_bytes(data)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (0, -1),
        (0, 2**40),
        (0, True),
        (0, 1.0),
        (0, msgpack.Timestamp(0)),
        (0, msgpack.ExtType(5, b"")),
        (1, bytes(31)),
        (1, "x" * 32),
        (2, []),
        (2, {"a": 1}),
        (2, [["a", 1], ["a", 2]]),
        (2, [["", 1]]),
        (2, [["x" * 65, 1]]),
        (2, [[b"a", 1]]),
        (2, [["a", 0]]),
        (2, [["a", -1]]),
        (2, [["a", 2**60]]),
        (2, [["a", 1.0]]),
        (2, [["a", float("nan")]]),
        (2, [["a", 1, 1]]),
        (2, [[f"{i}", 1] for i in range(MAX_CONTRIBUTORS + 1)]),
        (3, [bytes(31)]),
        (3, ["x" * 32]),
        (3, 5),
    ],
)
def test_a_header_with_a_field_out_of_bounds_is_refused(field: int, value: object) -> None:
    assert UpdateHeader.from_bytes(msgpack.packb(FIELDS)) == HEADER
    with pytest.raises(ValueError, match="not an update header"):
        UpdateHeader.from_bytes(msgpack.packb([*FIELDS[:field], value, *FIELDS[field + 1 :]]))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("n", [1, 999, PART_VALUES, PART_VALUES + 3])
def test_an_update_comes_back_from_its_bytes(codec: CodecName, n: int) -> None:
    update = update_of(genesis(n), codec=codec)
    data = update_to_bytes(update)
    assert update_from_bytes(data, Grid(n=n, codec=codec)) == update
    assert data == b"".join(update_pieces(update))
    assert len(data) <= max_update_bytes(Grid(n=n, codec=codec))


def test_the_largest_update_is_within_its_bound() -> None:
    n = 2 * PART_VALUES
    data = bytes(encoded_bytes(PART_VALUES, "int4"))
    part = Part(mask=contributor_mask(range(MAX_CONTRIBUTORS)), data=data)
    contributors = tuple((chr(0x10000 + i) * MAX_PEER_ID_CHARS, 2**60 - 1) for i in range(MAX_CONTRIBUTORS))
    header = UpdateHeader(
        step=2**40 - 1, parent=bytes(32), contributors=contributors, part_hashes=(part.hash, part.hash)
    )
    blob = update_to_bytes(Update(header=header, parts=(part, part)))
    assert update_from_bytes(blob, Grid(n=n, codec="int4")).header == header
    larger_counts_bytes = 2 + 4  # of contributors and parts, in msgpack
    assert len(blob) == max_update_bytes(Grid(n=n, codec="int4")) - larger_counts_bytes
    assert (
        len(blob) - 2 * (MAX_CONTRIBUTORS // 8 + len(data))
        == max_update_start_bytes(Grid(n=n, codec="int4")) - larger_counts_bytes
    )
    start = blob[: max_update_start_bytes(Grid(n=n, codec="int4"))]
    assert open_update(start, len(blob), Grid(n=n, codec="int4")) == header


BLOB = update_to_bytes(update_of(genesis()))


@given(st.integers(0, 8 * len(BLOB) - 1))
@settings(max_examples=300)
def test_a_flipped_bit_anywhere_is_found(bit: int) -> None:
    flipped = bytearray(BLOB)
    flipped[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ValueError, match=r"update|mask"):
        update_from_bytes(bytes(flipped), Grid(n=N, codec="int8"))


@given(st.integers(0, len(BLOB) - 1))
@example(0)
@example(11)
@example(len(BLOB) - 1)
def test_a_truncated_update_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="update"):
        update_from_bytes(BLOB[:size], Grid(n=N, codec="int8"))


@given(st.binary(max_size=300), st.integers(0, 80))
@example(b"\xff" * 300, 8)
@example(b"", len(BLOB))
def test_any_bytes_are_refused_before_memory_is_taken(data: bytes, kept: int) -> None:
    blob = BLOB[:kept] + data
    if blob != BLOB:
        with pytest.raises(ValueError, match=r"update|mask"):
            update_from_bytes(blob, Grid(n=N, codec="int8"))


@pytest.mark.parametrize(("n", "codec"), [(N, "int4"), (N + 1, "int8"), (N + 2**20, "int8"), (1, "fp32")])
def test_an_update_of_another_model_or_codec_is_refused(n: int, codec: CodecName) -> None:
    with pytest.raises(ValueError, match="an update of"):
        update_from_bytes(BLOB, Grid(n=n, codec=codec))
