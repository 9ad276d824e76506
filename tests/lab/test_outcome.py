from __future__ import annotations

import io
import json
import re
from typing import Any

import pytest
from rich.console import Console

from p2p_diloco.lab.outcome import (
    Event,
    Progress,
    findings,
    guests,
    held_out,
    packed,
    row_of,
    screen,
    step_line,
    summarize,
    tokens_per_s,
)


def event(kind: str, mono_s: float = 0.0, **fields: Any) -> Event:
    return {"event": kind, "wall_s": 1e9 + mono_s, "mono_s": mono_s, **fields}


def started(name: str, mono_s: float = 0.0) -> Event:
    return event("started", mono_s, peer_id=f"id-{name}", role="trainer", maddrs=[])


def inner(mono_s: float, tokens: int, *, step: int = 0, inner_step: int = 1, planned: int = 10) -> Event:
    return event(
        "inner", mono_s, step=step, inner_step=inner_step, planned=planned, loss=2.5, tokens=tokens, tokens_per_s=100.0
    )


def made(step: int, head: str, group: list[str], *, committed: bool = True, lost: tuple[str, ...] = ()) -> Event:
    parts = {"gather_s": 0.25, "reduce_s": 0.5, "settle_s": 0.125, "apply_s": 0.125}
    return event(
        "round", step=step, head=head, committed=committed, reason="" if committed else "failed", group=group,
        lost=list(lost), bytes_sent=1000, bytes_received=2000, **parts,
    )  # fmt: skip


def stall(step: int, seconds: float) -> Event:
    return event("stall", step=step, seconds=seconds)


def evaluated(step: int, loss: float) -> Event:
    return event("evaluated", step=step, held_out_loss=loss, tokens=1024, seconds=0.5)


def joined(step: int, head: str) -> Event:
    return event("joined", step=step, head=head, from_step=None, snapshot=True, seconds=1.0)


BOTH = ["id-a", "id-b"]


@pytest.fixture
def logs() -> dict[str, list[Event]]:
    """Two peers over two outer steps, the second of which b makes alone with a guest, after an attempt that failed."""
    return {
        "a": [
            started("a"), joined(0, "h0"), evaluated(0, 5.5), inner(1.0, 100), inner(2.0, 200, inner_step=10),
            made(1, "h1", BOTH), stall(1, 0.25), evaluated(1, 4.0),
        ],
        "b": [
            started("b"), joined(0, "h0"), evaluated(0, 5.5), inner(1.0, 50), inner(3.0, 150, inner_step=10),
            made(1, "h1", BOTH), stall(1, 0.75),
            made(1, "h1", BOTH, committed=False, lost=("id-a",)), stall(1, 1.0),
            made(2, "h2", ["id-b", "id-guest"]), stall(2, 0.5), evaluated(2, 3.0),
        ],
    }  # fmt: skip


def test_summary(logs: dict[str, list[Event]]) -> None:
    assert summarize(logs) == {
        "outer_steps": 2,
        "peers": {"a": "id-a", "b": "id-b"},
        "guests": {"id-guest": 2},
        "heads": {"a": {0: "h0", 1: "h1"}, "b": {0: "h0", 1: "h1", 2: "h2"}},
        "identical": True,
        "held_out": [(0, 5.5), (1, 4.0), (2, 3.0)],
        "tokens_per_s": {"total": 150.0, "peers": {"a": 100.0, "b": 50.0}},
        "stalled_s": {"median": 0.5, "peers": {"a": {1: 0.25}, "b": {1: 1.75, 2: 0.5}}},
        "evaluate_s": {"a": {0: 0.5, 1: 0.5}, "b": {0: 0.5, 2: 0.5}},
        "bytes_sent": {"a": {1: 1000}, "b": {1: 2000, 2: 1000}},
        "bytes_received": {"a": {1: 2000}, "b": {1: 4000, 2: 2000}},
        "group": {1: 2, 2: 2},
        "lost": [{"step": 1, "peer": "id-a"}],
        "missed_rounds": 1,
    }


def test_json_is_written_in_this_order(logs: dict[str, list[Event]]) -> None:
    del logs["b"]
    assert json.dumps(summarize(logs)) == (
        '{"outer_steps": 1, "peers": {"a": "id-a"}, "guests": {"id-b": 1}, "heads": {"a": {"0": "h0", "1": "h1"}}, '
        '"identical": true, "held_out": [[0, 5.5], [1, 4.0]], "tokens_per_s": {"total": 100.0, "peers": {"a": 100.0}}, '
        '"stalled_s": {"median": 0.25, "peers": {"a": {"1": 0.25}}}, "evaluate_s": {"a": {"0": 0.5, "1": 0.5}}, '
        '"bytes_sent": {"a": {"1": 1000}}, "bytes_received": {"a": {"1": 2000}}, "group": {"1": 2}, "lost": [], '
        '"missed_rounds": 0}'
    )


def test_other_head_at_one_step_is_told(logs: dict[str, list[Event]]) -> None:
    logs["a"].append(made(2, "another", ["id-a"]))
    summary = summarize(logs)
    assert not summary["identical"]
    assert ("heads", "NOT identical after 2 outer steps") in findings(summary, byte_level=False)


def test_head_made_again_after_rolling_back_counts(logs: dict[str, list[Event]]) -> None:
    logs["a"] += [made(2, "another", ["id-a"]), made(2, "h2", BOTH)]
    assert summarize(logs)["identical"]


def test_nothing_happened() -> None:
    assert not summarize({})["identical"]
    summary = summarize({"a": []})
    assert summary["outer_steps"] == 0
    assert findings(summary, byte_level=True) == []


def test_findings(logs: dict[str, list[Event]]) -> None:
    assert findings(summarize(logs), byte_level=True) == [
        ("held-out loss", "5.5000 -> 3.0000 nats per token, 7.935 -> 4.328 bits per byte"),
        ("heads", "identical after 2 outer steps"),
        ("stalled", "0.50 s per outer step (median)"),
        ("speed", "150 tokens/s in all"),
    ]
    assert "bits" not in findings(summarize(logs), byte_level=False)[0][1]


def test_held_out_keeps_one_loss_a_step() -> None:
    there = [joined(0, "h0"), made(1, "h1", BOTH)]
    a, b = [*there, evaluated(1, 4.0), evaluated(0, 5.5)], [*there, evaluated(0, 5.5)]
    assert held_out({"a": a, "b": b}) == [(0, 5.5), (1, 4.0)]


def test_held_out_is_that_of_the_history_which_the_swarm_kept(logs: dict[str, list[Event]]) -> None:
    """A was cut off and went on alone, further than the others; then it takes their history."""
    branch = [made(step, f"x{step}", ["id-a"]) for step in (2, 3)]
    logs["a"] += [branch[0], evaluated(2, 0.5), branch[1], evaluated(3, 0.25)]
    logs["c"] = [
        joined(0, "h0"),
        made(1, "h1", BOTH),
        made(2, "h2", BOTH),
        {**evaluated(2, 2.0), "held_out_loss": None},
    ]
    kept = [(0, 5.5), (1, 4.0), (2, 3.0)]
    assert held_out(logs) == kept
    assert summarize(logs)["held_out"] == kept
    logs["a"] += [made(2, "h2", BOTH), evaluated(2, 3.25)]
    assert held_out(logs) == kept
    logs["a"].append(made(3, "h3", ["id-a", "id-c"]))
    logs["a"].append(evaluated(3, 2.5))
    assert held_out(logs) == [*kept, (3, 2.5)]


def test_held_out_knows_what_those_who_died_evaluated(logs: dict[str, list[Event]]) -> None:
    logs["b"] += [made(step, f"h{step}", ["id-b"]) for step in range(3, 12)]
    assert held_out(logs) == [(0, 5.5), (1, 4.0), (2, 3.0)]
    del logs["b"][-4]  # it came to outer step 9 by a download, of which its log has no head
    assert held_out(logs) == [(0, 5.5), (1, 4.0), (2, 3.0)]


def test_held_out_of_who_has_not_come_anywhere_is_nothing() -> None:
    assert held_out({}) == held_out({"a": []}) == held_out({"a": [started("a"), evaluated(0, 5.5)]}) == []


def test_speed_does_not_count_the_time_between_two_starts() -> None:
    assert tokens_per_s([started("a"), inner(1.0, 10)]) == 0.0
    log = [started("a"), inner(1.0, 10), inner(2.0, 20), started("a", 99.0), inner(100.0, 5), inner(101.0, 35)]
    assert tokens_per_s(log) == 20.0


def test_guests_are_those_without_a_log(logs: dict[str, list[Event]]) -> None:
    assert guests(logs) == {"id-guest": 2}
    assert guests({"b": logs["b"], "guest": [started("guest")], "a": []}) == {"id-a": 1}


def test_row_follows_the_events() -> None:
    log: list[Event] = []
    assert row_of(log).phase == "starting"
    assert row_of(log, "failed").phase == "failed"
    log.append(started("a"))
    assert (row_of(log).phase, row_of(log).peer_id) == ("joining", "id-a")
    log += [joined(3, "h3"), inner(1.0, 100, step=3, inner_step=4)]
    row = row_of(log)
    assert (row.phase, row.step, row.inner_step, row.planned, row.loss) == ("training", 3, 4, 10, 2.5)
    log.append({**inner(2.0, 200, step=3, inner_step=10), "tokens_per_s": 0.0})
    assert (row_of(log).phase, row_of(log).tokens_per_s) == ("outer step", 100.0)
    log.append(made(4, "h4", BOTH))
    row = row_of(log)
    assert (row.phase, row.step, row.inner_step, row.group) == ("training", 4, 0, 2)
    assert (row.round_s, row.round_bytes) == (1.0, 3000)
    assert (row_of(log, "done").phase, row_of(log, "done").tokens_per_s) == ("done", 0.0)
    log.append(event("left", step=4, head="h4", reason="done"))
    assert row_of(log).phase == "left"


def test_screen_shows_peers_and_guests(logs: dict[str, list[Event]]) -> None:
    console = Console(width=120)
    rows = {name: row_of(log) for name, log in logs.items()}
    with console.capture() as capture:
        console.print(
            screen(
                "tiny 0123", rows, logs, Progress(14, 65.4), "p2p-diloco peer --initial-peers /ip4/1.2.3.4", width=120
            )
        )
    text = capture.get()
    assert "tiny 0123   outer step 2 of 14   held-out loss 5.5000 -> 3.0000   200 tokens/s   65 s" in text
    assert "join: p2p-diloco peer --initial-peers /ip4/1.2.3.4" in text
    assert "…id-guest  guest" in text
    assert "0.00 MB" in text


ADDRESS = "/ip4/127.0.0.1/tcp/43665/p2p/12D3KooWRoiKiQ7M8E7QTzG9rjBswazMfhh9SmDLKzEpyfoac6Xv"


def drawn(logs: dict[str, list[Event]], width: int, encoding: str = "utf-8") -> str:
    """As a terminal without colors shows it."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=file, width=width, color_system=None, force_terminal=True)
    rows = {name: row_of(log) for name, log in logs.items()}
    run, join = "stories-30m 0123456789ab", f"p2p-diloco peer --initial-peers {ADDRESS}"
    console.print(screen(run, rows, logs, Progress(140, 12345.6), join, width=width))
    file.seek(0)
    return file.read()


def test_columns_have_headings_with_units_and_nothing_is_cut_in_80_columns(logs: dict[str, list[Event]]) -> None:
    logs["peer-10"] = [
        started("c"),
        joined(99_999, "h1"),
        {**inner(1.0, 100, inner_step=499, planned=500), "loss": 10.0},
    ]
    logs["peer-10"].append({**made(99_999, "h1", ["x"] * 64, committed=False), "bytes_sent": 123_450_000})
    lines = drawn(logs, 80).splitlines()
    assert all(len(line) <= 80 for line in lines)
    first = next(i for i, line in enumerate(lines) if line.startswith("peer "))
    assert lines[first - 1].split() == ["outer", "inner", "loss", "tokens", "group", "last", "round"]
    assert lines[first].split() == ["peer", "phase", "step", "steps", "nats", "/s", "peers", "time,", "traffic"]
    assert "guest" in lines[-1]
    cells = lines[first + 3].split()
    assert cells == [
        "peer-10",
        "training",
        "99999",
        "0/500",
        "░░░░░",
        "10.000",
        "100",
        "64",
        "1.00",
        "s,",
        "123.45",
        "MB",
    ]
    assert lines[0] == "stories-30m 0123456789ab   outer step 99999 of 140"
    assert lines[1].startswith("held-out loss 5.5000 -> 3.0000   ")


def test_bars_tell_how_far_without_colors(logs: dict[str, list[Event]]) -> None:
    def bars(encoding: str) -> list[str]:
        return re.findall(r"[█░#.]{5,}", drawn(logs, 100, encoding))

    logs["a"].append(inner(9.0, 300, step=1, inner_step=5))
    logs["b"].append(inner(9.0, 300, step=2, inner_step=10))
    assert bars("utf-8") == ["░" * 40, "██░░░", "█████"]
    assert bars("ascii") == bars("latin-1") == ["." * 40, "##...", "#####"]


def test_facts_are_not_cut_in_two() -> None:
    facts = ["one 1", "two 2", "three 3"]
    assert packed(facts, 80) == ["one 1   two 2   three 3"]
    assert packed(facts, 20) == ["one 1   two 2", "three 3"]
    assert packed(facts, 3) == facts


def test_step_line(logs: dict[str, list[Event]]) -> None:
    rows = {name: row_of(log) for name, log in logs.items()}
    line = step_line(rows, 2, 3.0, Progress(14, 65.4))
    assert line == "outer step 2 of 14: held-out loss 3.0000, group of 2, 200 tokens/s, 65 s"
    assert "held-out" not in step_line(rows, 2, None, Progress(14, 65.4))
