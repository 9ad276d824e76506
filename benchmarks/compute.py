"""What a peer computes and writes around the wire: codecs, mean, apply, ledger and snapshots of 25 million values."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import ParamSpec

import numpy as np

from benchmarks.table import Cell, Table
from p2p_diloco.core.aggregate import AGGREGATIONS, align, shares_of, weighted_sum
from p2p_diloco.core.certificate import Certificate
from p2p_diloco.core.codec import Vector
from p2p_diloco.core.codecs import CODECS, CodecName, decode, encode
from p2p_diloco.core.grid import Grid, part_slices
from p2p_diloco.core.group import SealedRoster
from p2p_diloco.core.identity import SIGNATURE_BYTES
from p2p_diloco.core.outer import OuterState, apply, genesis_state
from p2p_diloco.core.update import Part, Update, UpdateHeader, contributor_mask, in_most_parts
from p2p_diloco.ledger.ledger import Ledger
from p2p_diloco.ledger.replay import Replay, load

P = ParamSpec("P")
VALUES = 25_000_000
REPEATS = 3
PEERS = 4
LR, MOMENTUM = 0.7, 0.9
LEDGER_CODEC: CodecName = "int8"


def main() -> Table:
    vector = np.random.default_rng(0).standard_normal(VALUES, np.float32)
    rows: list[tuple[Cell, ...]] = []
    for codec in CODECS:
        parts = [encode(vector[where], codec) for where in part_slices(VALUES)]
        rows.append(timed(f"encode {codec}", encode_all, vector, codec))
        rows.append(timed(f"decode {codec}", decode_all, parts, codec))
    rows.append(timed(f"weighted mean of {PEERS}", mean_all, vector))
    rows.append(timed(f"robust mean of {PEERS}", robust_all, vector))
    with tempfile.TemporaryDirectory(prefix="p2p-diloco-bench-") as folder:
        rows += ledger_rows(vector, Path(folder))
    return Table(
        title=f"{VALUES / 1e6:.0f}M float32 values on one thread, in parts of 256 Ki",
        columns=("what", "seconds", "GB/s of float32"),
        rows=rows,
        notes=(f"Median of {REPEATS}. Writing includes fsync, in the temporary folder.",),
    )


def ledger_rows(vector: Vector, folder: Path) -> list[tuple[Cell, ...]]:
    state = genesis_state(vector.copy())
    ledger = Ledger(folder, grid=Grid(n=VALUES, codec=LEDGER_CODEC), lr=LR, momentum=MOMENTUM, snapshot_every=1000)
    ledger.write_snapshot(state)
    parts = tuple(
        Part(mask=contributor_mask(range(PEERS)), data=encode(vector[where], LEDGER_CODEC))
        for where in part_slices(VALUES)
    )
    appends_s, applies_s, alignments_s = [], [], []
    for _ in range(REPEATS):
        update = next_update(state, parts)
        alignments_s.append(seconds_of(align, state.theta, vector, update, ledger.grid))
        appends_s.append(seconds_of(ledger.append, update, unsigned(update)))
        applies_s.append(seconds_of(apply_update, state, update))
    return [
        row(f"apply, {LEDGER_CODEC}", median(applies_s)),
        row(f"alignment, {LEDGER_CODEC}", median(alignments_s)),
        row(f"ledger append, {LEDGER_CODEC}", median(appends_s)),
        timed(f"replay of {REPEATS} updates", replay, ledger, state),
        row("snapshot write", seconds_of(ledger.write_snapshot, state)),
        timed("state digest", state.digest),
        timed("ledger load", load, ledger, np.empty_like(vector), np.empty_like(vector)),
    ]


def apply_update(state: OuterState, update: Update) -> None:
    apply(state, update, Grid(n=len(state.theta), codec=LEDGER_CODEC), lr=LR, momentum=MOMENTUM)


def replay(ledger: Ledger, state: OuterState) -> None:
    """All that a snapshot takes but the writing."""
    for _ in Replay(ledger, state.step, state.head).parts():
        pass


def next_update(state: OuterState, parts: tuple[Part, ...]) -> Update:
    contributors = tuple((f"peer{i}", 1000) for i in range(PEERS))
    hashes = tuple(part.hash for part in parts)
    header = UpdateHeader(step=state.step, parent=state.head, contributors=contributors, part_hashes=hashes)
    return Update(header=header, parts=parts)


def unsigned(update: Update) -> Certificate:
    """A certificate of that update; nobody verifies it."""
    return Certificate(
        roster=SealedRoster(leader="peer0", members=(), absent=(), signature=bytes(SIGNATURE_BYTES)),
        full=in_most_parts([part.mask for part in update.parts]),
        state=b"",
        signatures=(),
    )


def encode_all(vector: Vector, codec: CodecName) -> None:
    for where in part_slices(len(vector)):
        encode(vector[where], codec)


def decode_all(parts: list[bytes], codec: CodecName) -> None:
    for part, where in zip(parts, part_slices(VALUES)):
        decode(part, where.stop - where.start, codec)


def mean_all(vector: Vector) -> None:
    shares = shares_of(dict.fromkeys(range(PEERS), 1000), None)
    for where in part_slices(len(vector)):
        weighted_sum(dict.fromkeys(range(PEERS), vector[where]), shares, where.stop - where.start)


def robust_all(vector: Vector) -> None:
    """Nobody is left out: they are all alike."""
    grid = Grid(n=len(vector), codec="fp32")
    for part, where in enumerate(grid.slices):
        AGGREGATIONS["robust"].reduce(dict.fromkeys(range(PEERS), vector[where]), [1000] * PEERS, part, grid)


def timed(what: str, work: Callable[P, object], *arguments: P.args, **options: P.kwargs) -> tuple[Cell, ...]:
    return row(what, median(seconds_of(work, *arguments, **options) for _ in range(REPEATS)))


def row(what: str, seconds: float) -> tuple[Cell, ...]:
    return (what, seconds, 4 * VALUES / 1e9 / seconds)


def seconds_of(work: Callable[P, object], *arguments: P.args, **options: P.kwargs) -> float:
    started_s = time.perf_counter()
    work(*arguments, **options)
    return time.perf_counter() - started_s
