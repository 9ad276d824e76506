"""Tokens per second of four peers in a swarm, against four plain training processes, before and after it."""

from __future__ import annotations

from statistics import mean

from benchmarks import tiny
from benchmarks.table import Table


def main() -> Table:
    before = tiny.plain_tokens_per_s()
    swarm, inner_steps = tiny.swarm_tokens_per_s(tiny.swarm_run())
    after = tiny.plain_tokens_per_s()
    plain = mean((before, after))
    return Table(
        title=f"Tokens per second of {tiny.PEERS} peers together, the demo's model, one thread each",
        columns=("processes", "tokens/s", "ratio to plain", "ratio to its inner steps"),
        rows=[
            ("plain training, before", before, before / plain, "-"),
            ("swarm", swarm, swarm / plain, swarm / inner_steps),
            ("plain training, after", after, after / plain, "-"),
        ],
        notes=(
            "The swarm's includes stalls and evaluation; the last column compares with itself without them.",
            "plain: the mean of before and after. Where these differ, other work ran on this machine.",
        ),
    )
