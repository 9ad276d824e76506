"""Bytes that a peer sends in an outer step, against the least that a butterfly can do: 2(n-1)/n of the vector."""

from __future__ import annotations

from statistics import mean

from benchmarks import sleepers, tiny
from benchmarks.loopback import Run
from benchmarks.table import Cell, Table
from p2p_diloco.core.codecs import encoded_bytes
from p2p_diloco.core.event import RoundEnded, of_kind
from p2p_diloco.core.grid import part_slices


def main() -> Table:
    return Table(
        title="Bytes sent per peer and outer step, against the butterfly's minimum of 2(n-1)/n encoded vectors",
        columns=("model", "values", "parts", "rounds", "minimum MB", "mean MB", "ratio", "most MB", "ratio"),
        rows=[traffic_row("demo", tiny.swarm_run()), traffic_row("sleepers", sleepers.swarm_run())],
        notes=(
            "Rounds of all peers only. As our streams count them, frame headers included, libp2p's encryption not.",
            "most: the peer that sent most. Parts of 256 Ki values go round, so shares differ where there are few.",
        ),
    )


def traffic_row(name: str, run: Run) -> tuple[Cell, ...]:
    sent = [
        event.bytes_sent
        for log in run.logs
        for event in of_kind(log, RoundEnded)
        if event.committed and len(event.group) == len(run.logs)
    ]
    least = minimum_bytes(encoded_bytes(run.values, run.spec.outer.codec), len(run.logs))
    rounds, parts = len(sent) // len(run.logs), len(part_slices(run.values))
    figures = (least / 1e6, mean(sent) / 1e6, mean(sent) / least, max(sent) / 1e6, max(sent) / least)
    return (name, run.values, parts, rounds, *figures)


def minimum_bytes(vector_bytes: int, peers: int) -> float:
    return 2 * (peers - 1) / peers * vector_bytes
