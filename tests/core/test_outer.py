from __future__ import annotations

import copy
import hashlib
from dataclasses import replace

import msgpack
import numpy as np
import pytest
from blake3 import blake3
from hypothesis import example, given, settings
from hypothesis import strategies as st

from p2p_diloco.core.codec import CODECS, Codec, Vector, encode, encoded_bytes
from p2p_diloco.core.identity import MAX_PEER_ID_CHARS
from p2p_diloco.core.outer import (
    HASH_BYTES,
    MAX_CONTRIBUTORS,
    PART_VALUES,
    OuterState,
    Part,
    Update,
    UpdateHeader,
    apply,
    check_mask,
    contributor_mask,
    digest,
    genesis_state,
    max_update_bytes,
    max_update_start_bytes,
    next_head,
    open_update,
    part_slices,
    parts_with,
    reduce_part,
    state_digest,
    update_from_bytes,
    update_pieces,
    update_to_bytes,
    weighted_mean,
)

N = 1000
CONTRIBUTORS = (("a", 300), ("b", 100))


def genesis(n: int = N) -> OuterState:
    return genesis_state(np.random.default_rng(0).standard_normal(n).astype(np.float32))


def update_of(state: OuterState, *, codec: Codec = "int8", seed: int = 1, mask: bytes = b"\x03") -> Update:
    values = np.random.default_rng(seed).standard_normal(len(state.theta)).astype(np.float32)
    parts = tuple(Part(mask=mask, data=encode(values[where], codec)) for where in part_slices(len(values)))
    header = UpdateHeader(
        step=state.step,
        parent=state.head,
        contributors=CONTRIBUTORS,
        part_hashes=tuple(part.hash for part in parts),
    )
    return Update(header=header, parts=parts)


def step(state: OuterState, update: Update, codec: Codec = "int8") -> None:
    apply(state, update, codec=codec, lr=0.7, momentum=0.9)


# The state and its step


def test_the_grid_covers_every_value_once() -> None:
    for n in (1, PART_VALUES - 1, PART_VALUES, PART_VALUES + 1, 3 * PART_VALUES):
        slices = part_slices(n)
        assert [i.start for i in slices] == [0, *(i.stop for i in slices[:-1])]
        assert slices[-1].stop == n
        assert all(i.stop - i.start == PART_VALUES for i in slices[:-1])


def test_the_same_updates_give_the_same_bits_and_the_head_names_them() -> None:
    one, other = genesis(), genesis()
    for seed in range(3):
        update = update_of(one, seed=seed)
        step(one, update)
        step(other, update_from_bytes(update_to_bytes(update), n=N, codec="int8"))
        assert one.digest() == other.digest()
    assert one.step == 3
    assert one.head == other.head == update.header.head


def test_the_bits_of_a_step_are_pinned() -> None:
    """On every machine: a difference here means replicas that diverge."""
    state = genesis_state(np.linspace(-1, 1, N, dtype=np.float32))
    for seed in range(3):
        gradient = np.arange(N, dtype=np.float32) % np.float32(seed + 7) / np.float32(seed + 3)
        data = encode(gradient, "int8")
        part = Part(mask=contributor_mask([0]), data=data)
        header = UpdateHeader(step=seed, parent=state.head, contributors=(("a", 1),), part_hashes=(part.hash,))
        step(state, Update(header=header, parts=(part,)))
    assert state.head.hex() == "403815b027941e752b310205d44cbf494aa56b2498374e48f7e05119dcb7c5a3"
    assert state.digest().hex() == "da69ada579956cc329f2f1780a30e47d0e297eebfc1873e9c23bf59e59e9ebdd"


def test_different_histories_never_share_a_head() -> None:
    state = genesis()
    update = update_of(state)
    heads = {
        update.header.head,
        update_of(state, seed=2).header.head,
        update_of(state, mask=b"\x01").header.head,
        replace(update.header, contributors=(("a", 300), ("b", 101))).head,
        replace(update.header, contributors=CONTRIBUTORS[::-1]).head,
        replace(update.header, step=1).head,
        replace(update.header, parent=bytes(32)).head,
    }
    assert len(heads) == 7
    assert genesis_state(state.theta + 1).head != state.head
    assert update.header.head == next_head(state.head, update.header.link)
    assert next_head(update.header.link, state.head) != update.header.head


def test_pieces_that_join_to_the_same_bytes_have_different_digests() -> None:
    assert len({digest(b"ab", b"c"), digest(b"a", b"bc"), digest(b"abc"), digest(b"abc", b"")}) == 4


def random_state(n: int) -> OuterState:
    generator = np.random.default_rng(3)
    theta, momentum = (generator.standard_normal(n).astype(np.float32) for _ in range(2))
    return OuterState(step=7, head=bytes(range(32)), theta=theta, momentum=momentum)


@pytest.mark.parametrize("n", [1, PART_VALUES, PART_VALUES + 1, 2 * PART_VALUES + 77])
def test_the_digest_of_a_state_is_that_of_its_chunks_hashes(n: int) -> None:
    """Computed once more, from the bytes that the state has on the disk."""
    state, mib = random_state(n), 1024 * 1024
    chunks = []
    for vector in (state.theta.tobytes(), state.momentum.tobytes()):
        chunks += [vector[start : start + mib] for start in range(0, len(vector), mib)]
    hashes = [blake3(chunk).digest() for chunk in chunks]
    h = hashlib.blake2b(digest_size=32)
    for piece in (b"state", (7).to_bytes(8, "big"), bytes(range(32)), *hashes):
        h.update(len(piece).to_bytes(8, "big") + piece)
    assert state.chunk_hashes() == tuple(hashes)
    assert state.digest() == state_digest(7, bytes(range(32)), hashes) == h.digest()


@given(vector=st.sampled_from(["theta", "momentum"]), place=st.integers(0, N - 1), bit=st.integers(0, 31))
@example(vector="theta", place=0, bit=0)
@example(vector="momentum", place=N - 1, bit=31)
def test_the_digest_of_a_state_covers_every_bit(vector: str, place: int, bit: int) -> None:
    state = random_state(N)
    before = state.digest()
    getattr(state, vector).view(np.uint32)[place] ^= np.uint32(1 << bit)
    assert state.digest() != before
    getattr(state, vector).view(np.uint32)[place] ^= np.uint32(1 << bit)
    assert state.digest() == before


def test_the_digest_of_a_state_covers_where_it_stands_and_the_order_of_its_values() -> None:
    state = random_state(N)
    swapped = replace(state, theta=state.momentum, momentum=state.theta)
    others = [swapped, replace(state, step=8), replace(state, head=bytes(32))]
    assert len({each.digest() for each in (state, *others)}) == 4
    hashes = state.chunk_hashes()
    lists = [hashes, hashes[::-1], hashes[:1], (*hashes, hashes[0]), (b"".join(hashes),)]
    assert len({state_digest(7, state.head, each) for each in lists}) == len(lists)


def refused(state: OuterState, update: Update, codec: Codec = "int8") -> None:
    before = state.digest()
    with pytest.raises(ValueError, match=r"update|parts|part \d|scale|finite"):
        step(state, update, codec)
    assert state.digest() == before


def test_an_update_that_does_not_fit_changes_nothing() -> None:
    state = genesis()
    update = update_of(state)
    later = copy.deepcopy(state)
    step(later, update)
    refused(later, update)
    refused(state, update_of(later))
    refused(state, update, codec="int4")
    refused(genesis(N + 1), update)
    other = replace(update.header, parent=bytes(32))
    refused(state, replace(update, header=other))


def test_a_bad_last_part_changes_nothing_in_the_first() -> None:
    n = PART_VALUES + 10
    state = genesis(n)
    good = update_of(state)
    for data in (
        b"\xff" * encoded_bytes(10, "int8"),
        np.float32(np.inf).tobytes() + bytes(10),
        good.parts[1].data + b"\0",
    ):
        parts = (good.parts[0], replace(good.parts[1], data=data))
        header = replace(good.header, part_hashes=tuple(part.hash for part in parts))
        refused(state, Update(header=header, parts=parts))
    alone = replace(good.header, part_hashes=good.header.part_hashes[:1])
    refused(state, Update(header=alone, parts=good.parts[:1]))


def test_parts_must_have_the_hashes_of_the_header() -> None:
    update = update_of(genesis())
    with pytest.raises(ValueError, match="hashes"):
        replace(update, header=replace(update.header, part_hashes=(bytes(32),)))
    with pytest.raises(ValueError, match="hashes"):
        replace(update, parts=())


# Who contributed


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


def test_the_mean_weighs_by_tokens_in_the_given_order() -> None:
    values = [np.random.default_rng(i).standard_normal(N).astype(np.float32) for i in range(3)]
    weights = [100, 300, 7]
    expected = np.average(np.array(values, np.float64), axis=0, weights=weights)
    mean = weighted_mean(list(zip(weights, values)))
    assert mean.dtype == np.float32
    np.testing.assert_allclose(mean, expected, atol=1e-6)
    np.testing.assert_array_equal(weighted_mean([(5, values[0])]), values[0])


def test_a_mean_over_all_who_train_is_shorter_by_those_who_sent_nothing() -> None:
    values = [np.array([1, -2, 4], np.float32), np.array([3, 2, 0], np.float32)]
    np.testing.assert_array_equal(weighted_mean([(1, values[0]), (3, values[1])], total=8), [1.25, 0.5, 0.5])
    np.testing.assert_array_equal(
        weighted_mean([(1, values[0]), (3, values[1])], total=4), weighted_mean([(1, values[0]), (3, values[1])])
    )


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


# Bytes


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
def test_an_update_comes_back_from_its_bytes(codec: Codec, n: int) -> None:
    update = update_of(genesis(n), codec=codec)
    data = update_to_bytes(update)
    assert update_from_bytes(data, n=n, codec=codec) == update
    assert data == b"".join(update_pieces(update))
    assert len(data) <= max_update_bytes(n, codec)


def test_the_largest_update_is_within_its_bound() -> None:
    n = 2 * PART_VALUES
    data = bytes(encoded_bytes(PART_VALUES, "int4"))
    part = Part(mask=contributor_mask(range(MAX_CONTRIBUTORS)), data=data)
    contributors = tuple((chr(0x10000 + i) * MAX_PEER_ID_CHARS, 2**60 - 1) for i in range(MAX_CONTRIBUTORS))
    header = UpdateHeader(
        step=2**40 - 1, parent=bytes(32), contributors=contributors, part_hashes=(part.hash, part.hash)
    )
    blob = update_to_bytes(Update(header=header, parts=(part, part)))
    assert update_from_bytes(blob, n=n, codec="int4").header == header
    larger_counts_bytes = 2 + 4  # of contributors and parts, in msgpack
    assert len(blob) == max_update_bytes(n, "int4") - larger_counts_bytes
    assert len(blob) - 2 * (MAX_CONTRIBUTORS // 8 + len(data)) == max_update_start_bytes(n) - larger_counts_bytes
    start = blob[: max_update_start_bytes(n)]
    assert open_update(start, len(blob), n=n, codec="int4") == header


BLOB = update_to_bytes(update_of(genesis()))


@given(st.integers(0, 8 * len(BLOB) - 1))
@settings(max_examples=300)
def test_a_flipped_bit_anywhere_is_found(bit: int) -> None:
    flipped = bytearray(BLOB)
    flipped[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ValueError, match=r"update|mask"):
        update_from_bytes(bytes(flipped), n=N, codec="int8")


@given(st.integers(0, len(BLOB) - 1))
@example(0)
@example(11)
@example(len(BLOB) - 1)
def test_a_truncated_update_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="update"):
        update_from_bytes(BLOB[:size], n=N, codec="int8")


@given(st.binary(max_size=300), st.integers(0, 80))
@example(b"\xff" * 300, 8)
@example(b"", len(BLOB))
def test_any_bytes_are_refused_before_memory_is_taken(data: bytes, kept: int) -> None:
    blob = BLOB[:kept] + data
    if blob != BLOB:
        with pytest.raises(ValueError, match=r"update|mask"):
            update_from_bytes(blob, n=N, codec="int8")


@pytest.mark.parametrize(("n", "codec"), [(N, "int4"), (N + 1, "int8"), (N + 2**20, "int8"), (1, "fp32")])
def test_an_update_of_another_model_or_codec_is_refused(n: int, codec: Codec) -> None:
    with pytest.raises(ValueError, match="an update of"):
        update_from_bytes(BLOB, n=n, codec=codec)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("total", [None, 1000])
def test_a_reduced_part_is_the_encoded_mean_of_what_came_in_the_order_of_the_roster(
    codec: Codec, total: int | None
) -> None:
    generator = np.random.default_rng(3)
    first, third = (generator.standard_normal(99).astype(np.float32) for _ in range(2))
    part = reduce_part({2: third, 0: first}, [100, 200, 300], 99, codec, total)
    assert part.mask == b"\x05"
    assert part.data == encode(weighted_mean([(100, first), (300, third)], total), codec)
    nothing = reduce_part({}, [100, 200, 300], 99, codec, total)
    assert (nothing.mask, nothing.data) == (b"", encode(np.zeros(99, np.float32), codec))


def test_a_mean_of_the_largest_values_stays_finite_for_a_thousand_steps() -> None:
    state = genesis(64)
    largest: Vector = np.full(64, 1e30, np.float32)
    for t in range(1000):
        part = Part(mask=b"\x01", data=encode(weighted_mean([(1, largest), (2**59, largest)]), "int8"))
        header = UpdateHeader(step=t, parent=state.head, contributors=(("a", 1),), part_hashes=(part.hash,))
        step(state, Update(header=header, parts=(part,)))
    assert np.isfinite(state.theta).all()
    assert np.isfinite(state.momentum).all()
