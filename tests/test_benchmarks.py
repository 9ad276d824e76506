"""The figures of the benchmarks: what is made of event logs. Times are not tested."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import sleepers, tiny, traffic
from benchmarks.loopback import Log, Run, write_run_file
from benchmarks.stall import stalls_of
from benchmarks.table import Table, layout
from p2p_diloco.codec import encoded_bytes
from p2p_diloco.manifest import RunSpec


def round_event(step: int, **fields: Any) -> dict[str, Any]:
    phases = {"gather_s": 0.1, "reduce_s": 0.2, "settle_s": 0.0, "apply_s": 0.0}
    return {"event": "round", "step": step, "committed": True, "group": ["a", "b"], "bytes_sent": 0, **phases, **fields}


def two_cycles(tokens: int) -> Log:
    """Inner steps for 10 s, a stall of 2 s; 10 s and 2 s again, with an evaluation of 3 s between."""
    return [
        {"event": "inner", "mono_s": 10.0, "tokens": tokens},
        {"event": "stall", "mono_s": 12.0, "step": 1, "seconds": 2.0},
        {"event": "evaluated", "mono_s": 15.0, "step": 1, "seconds": 3.0},
        {"event": "inner", "mono_s": 25.0, "tokens": 2 * tokens},
        {"event": "stall", "mono_s": 27.0, "step": 2, "seconds": 2.0},
    ]


def test_tokens_per_second_are_those_of_whole_cycles_after_the_first() -> None:
    run = Run(spec=sleepers.SPEC, values=1, logs=[two_cycles(300), two_cycles(150)])
    assert tiny.swarm_tokens_per_s(run) == pytest.approx((450 / 15, 450 / 10))


def test_a_stall_has_all_rounds_since_the_last_one() -> None:
    log = [
        round_event(0, committed=False),
        round_event(1),
        {"event": "stall", "step": 1, "seconds": 0.7},
        round_event(2),
        {"event": "stall", "step": 2, "seconds": 0.3},
    ]
    first, second = stalls_of(log)
    assert first["gather_s"] == pytest.approx(0.2)
    assert first["reduce_s"] == pytest.approx(0.4)
    assert first["rest_s"] == pytest.approx(0.1)
    assert second["rest_s"] == pytest.approx(0.0)


def test_bytes_are_compared_with_the_butterflys_minimum_in_whole_groups_only() -> None:
    vector = encoded_bytes(1000, "int8")
    logs: list[Log] = [
        [round_event(1, bytes_sent=vector), round_event(2, group=["a"], bytes_sent=7)],
        [round_event(1, bytes_sent=2 * vector), round_event(2, committed=False, bytes_sent=7)],
    ]
    row = traffic.traffic_row("x", Run(spec=sleepers.SPEC, values=1000, logs=logs))
    assert row[:4] == ("x", 1000, 1, 1)
    assert row[5:] == pytest.approx((1.5 * vector / 1e6, 1.5, 2 * vector / 1e6, 2.0))


@pytest.mark.parametrize("spec", [tiny.shortened(), sleepers.SPEC], ids=lambda spec: spec.name)
def test_run_files_say_what_the_specs_say(spec: RunSpec, tmp_path: Path) -> None:
    assert RunSpec.load(write_run_file(spec, tmp_path)) == spec


def test_a_table_is_aligned() -> None:
    table = Table(title="T", columns=("a", "bb"), rows=[("long name", 12345), ("x", 1.5)], notes=("n",))
    assert layout(table).splitlines()[2:] == [
        "a              bb",
        "-----------------",
        "long name  12,345",
        "x           1.500",
        "  n",
    ]
