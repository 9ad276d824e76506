from __future__ import annotations

import copy
import hashlib
from dataclasses import replace

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import example, given
from hypothesis import strategies as st

from p2p_diloco.core.aggregate import AGGREGATIONS
from p2p_diloco.core.codec import Vector
from p2p_diloco.core.codecs import CodecName, encode, encoded_bytes
from p2p_diloco.core.grid import PART_VALUES, Grid, part_slices
from p2p_diloco.core.outer import OuterState, apply, genesis_state, state_digest
from p2p_diloco.core.update import (
    Part,
    Update,
    UpdateHeader,
    contributor_mask,
    next_head,
    update_from_bytes,
    update_to_bytes,
)

N = 1000
CONTRIBUTORS = (("a", 300), ("b", 100))


def genesis(n: int = N) -> OuterState:
    return genesis_state(np.random.default_rng(0).standard_normal(n).astype(np.float32))


def update_of(state: OuterState, *, codec: CodecName = "int8", seed: int = 1, mask: bytes = b"\x03") -> Update:
    values = np.random.default_rng(seed).standard_normal(len(state.theta)).astype(np.float32)
    parts = tuple(Part(mask=mask, data=encode(values[where], codec)) for where in part_slices(len(values)))
    header = UpdateHeader(
        step=state.step,
        parent=state.head,
        contributors=CONTRIBUTORS,
        part_hashes=tuple(part.hash for part in parts),
    )
    return Update(header=header, parts=parts)


def step(state: OuterState, update: Update, codec: CodecName = "int8") -> None:
    apply(state, update, Grid(n=len(state.theta), codec=codec), lr=0.7, momentum=0.9)


# The state and its step


def test_the_same_updates_give_the_same_bits_and_the_head_names_them() -> None:
    one, other = genesis(), genesis()
    for seed in range(3):
        update = update_of(one, seed=seed)
        step(one, update)
        step(other, update_from_bytes(update_to_bytes(update), Grid(n=N, codec="int8")))
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


def refused(state: OuterState, update: Update, codec: CodecName = "int8") -> None:
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


# Who contributed


# Bytes


def test_a_mean_of_the_largest_values_stays_finite_for_a_thousand_steps() -> None:
    state = genesis(64)
    largest: Vector = np.full(64, 1e30, np.float32)
    weights, grid = [1, 2**59], Grid(n=64, codec="int8")
    for t in range(1000):
        part = AGGREGATIONS["mean"].reduce({0: largest, 1: largest}, weights, 0, grid)
        contributors = tuple(zip("ab", weights))
        header = UpdateHeader(step=t, parent=state.head, contributors=contributors, part_hashes=(part.hash,))
        step(state, Update(header=header, parts=(part,)))
    assert np.isfinite(state.theta).all()
    assert np.isfinite(state.momentum).all()
