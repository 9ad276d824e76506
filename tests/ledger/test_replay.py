"""What the files lead to, part by part; and never anything else, whatever has become of them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from p2p_diloco.core.codec import Vector
from p2p_diloco.core.codecs import CODECS, CodecName, encode
from p2p_diloco.core.errors import Gap
from p2p_diloco.core.grid import PART_VALUES, Grid, part_slices
from p2p_diloco.core.outer import OuterState, apply, genesis_state
from p2p_diloco.core.update import Part, Update, UpdateHeader, update_to_bytes
from p2p_diloco.ledger.ledger import Ledger
from p2p_diloco.ledger.replay import Replay, load
from tests.support.certificates import unsigned

N = 400
EVERY = 3
STEPS = 8
LR, MOMENTUM = 0.7, 0.9
UPDATE = "updates/{:010d}.update".format
SNAPSHOT = "snapshots/{:010d}.safetensors".format


def open_ledger(folder: Path, n: int = N, codec: CodecName = "int8") -> Ledger:
    return Ledger(folder, grid=Grid(n=n, codec=codec), lr=LR, momentum=MOMENTUM, snapshot_every=EVERY)


def history(folder: Path, n: int = N, codec: CodecName = "int8", steps: int = STEPS) -> list[tuple[int, bytes, bytes]]:
    """(step, head, digest) of every state from the genesis on; snapshots at 3 and 6 stay, and the updates since."""
    ledger, generator = open_ledger(folder, n, codec), np.random.default_rng(0)
    state = genesis_state(generator.standard_normal(n).astype(np.float32))
    ledger.write_snapshot(state)
    states = [(state.step, state.head, state.digest())]
    for _ in range(steps):
        values = generator.standard_normal(n).astype(np.float32)
        parts = tuple(Part(mask=b"\x03", data=encode(values[where], codec)) for where in part_slices(n))
        header = UpdateHeader(
            step=state.step,
            parent=state.head,
            contributors=(("a", 5), ("b", 6)),
            part_hashes=tuple(part.hash for part in parts),
        )
        update = Update(header=header, parts=parts)
        apply(state, update, Grid(n=len(state.theta), codec=codec), lr=LR, momentum=MOMENTUM)
        ledger.append(update, unsigned(update))
        if state.step % EVERY == 0:
            ledger.write_snapshot(state)
        states.append((state.step, state.head, state.digest()))
    return states


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, bytes, bytes]]]:
    """Not to be changed."""
    folder = tmp_path_factory.mktemp("sound")
    return folder, history(folder)


@pytest.fixture
def copy(sound: tuple[Path, list[tuple[int, bytes, bytes]]], tmp_path: Path) -> Path:
    return shutil.copytree(sound[0], tmp_path / "copy")


def replayed(replay: Replay) -> OuterState:
    theta, momentum = (np.concatenate(vectors) for vectors in zip(*replay.parts()))
    return OuterState(step=replay.step, head=replay.head, theta=theta, momentum=momentum)


def flip(path: Path, at: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("n", [N, 2 * PART_VALUES + 77])
def test_every_state_comes_out_as_it_was(tmp_path: Path, codec: CodecName, n: int) -> None:
    states = history(tmp_path, n, codec, steps=5)
    ledger = open_ledger(tmp_path, n, codec)
    for step, head, digest in states:
        assert replayed(Replay(ledger, step, head)).digest() == digest


def test_parts_can_be_had_in_any_order_and_again(tmp_path: Path) -> None:
    n = 2 * PART_VALUES + 77
    step, head, digest = history(tmp_path, n, steps=2)[-1]
    replay = Replay(open_ledger(tmp_path, n), step, head)
    theta: Vector = np.zeros(n, np.float32)
    momentum: Vector = np.zeros(n, np.float32)
    for part in (2, 0, 1, 0):
        where = part_slices(n)[part]
        theta[where], momentum[where] = replay.part(part)
    assert OuterState(step=step, head=head, theta=theta, momentum=momentum).digest() == digest


def test_where_no_files_lead(sound: tuple[Path, list[tuple[int, bytes, bytes]]]) -> None:
    folder, states = sound
    for step, head in ((2, states[2][1]), (8, states[7][1]), (9, bytes(32))):
        with pytest.raises(Gap, match=f"does not lead to outer step {step}; restart to download it"):
            Replay(open_ledger(folder), step, head)


@pytest.mark.parametrize("name", [SNAPSHOT(6), UPDATE(6), UPDATE(7)])
@pytest.mark.parametrize("how", ["start", "values", "short", "long", "gone"])
def test_a_damaged_file_is_put_aside_and_another_way_taken_where_there_is_one(
    sound: tuple[Path, list[tuple[int, bytes, bytes]]], copy: Path, name: str, how: str
) -> None:
    step, head, digest = sound[1][8]
    ledger, path = open_ledger(copy), copy / name
    replay = Replay(ledger, step, head)
    if how == "start":
        flip(path, 30)
    elif how == "values":
        flip(path, -1)
    elif how == "short":
        os.truncate(path, path.stat().st_size - 1)
    elif how == "long":
        path.write_bytes(path.read_bytes() + b"\0")
    else:
        path.unlink()
    for each in (replay, None):
        try:
            state = replayed(each or Replay(ledger, step, head))
        except Gap:
            assert name != SNAPSHOT(6)
        else:
            assert state.digest() == digest
    assert [info.step for info in ledger.lost_snapshots.values()] == ([6] if name == SNAPSHOT(6) else [])
    assert [UPDATE(s) for s in ledger.updates.lost] == ([] if name == SNAPSHOT(6) else [name])
    assert len(ledger.quarantined) == (how != "gone")
    assert not path.exists()


@given(
    names=st.lists(st.sampled_from([SNAPSHOT(3), SNAPSHOT(6), *map(UPDATE, range(3, 8))]), max_size=3, unique=True),
    place=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7),
)
@example([SNAPSHOT(6), UPDATE(4)], 0.5, 0)
@settings(max_examples=60)
def test_never_other_bits(
    sound: tuple[Path, list[tuple[int, bytes, bytes]]],
    tmp_path_factory: pytest.TempPathFactory,
    names: list[str],
    place: float,
    bit: int,
) -> None:
    """With any bit flipped in some of the files: the bits of the state, or Gap exactly where no way is left."""
    folder = shutil.copytree(sound[0], tmp_path_factory.mktemp("flipped") / "copy")
    ledger = open_ledger(folder)
    for name in names:
        flip(folder / name, int(place * (folder / name).stat().st_size), bit)
    for step, head, digest in sound[1][3:]:
        ways = [[SNAPSHOT(base), *map(UPDATE, range(base, step))] for base in (3, 6) if base <= step]
        if any(not set(way) & set(names) for way in ways):
            assert replayed(Replay(ledger, step, head)).digest() == digest
        else:
            with pytest.raises(Gap):
                replayed(Replay(ledger, step, head))


def test_an_update_that_does_not_decode_leads_nowhere(
    sound: tuple[Path, list[tuple[int, bytes, bytes]]], copy: Path
) -> None:
    step, head, digest = sound[1][8]
    part = Part(mask=b"", data=b"\xff" * (4 * 2 + N))
    header = UpdateHeader(step=step, parent=head, contributors=(("a", 1),), part_hashes=(part.hash,))
    (copy / UPDATE(step)).write_bytes(update_to_bytes(Update(header=header, parts=(part,))))
    ledger = open_ledger(copy)
    with pytest.raises(Gap):
        replayed(Replay(ledger, 9, header.head))
    state = load(ledger, np.empty(N, np.float32), np.empty(N, np.float32))
    assert state is not None
    assert state.digest() == digest
