from __future__ import annotations

import io
import re
from dataclasses import replace

from rich.console import Console

from p2p_diloco.core.event import Event
from p2p_diloco.lab.outcome import outcome_of, trainer_now
from p2p_diloco.lab.screen import RunClock, last_words, packed, screen, step_line
from tests.lab.test_outcome import inner, joined, logs, made, started

__all__ = ["logs"]


def test_screen_shows_peers_and_guests(logs: dict[str, list[Event]]) -> None:
    console = Console(width=120)
    trainers = {name: trainer_now(log) for name, log in logs.items()}
    with console.capture() as capture:
        console.print(
            screen(
                "tiny 0123",
                trainers,
                logs,
                RunClock(14, 65.4),
                "p2p-diloco peer --initial-peers /ip4/1.2.3.4",
                width=120,
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
    trainers = {name: trainer_now(log) for name, log in logs.items()}
    run, join = "stories-30m 0123456789ab", f"p2p-diloco peer --initial-peers {ADDRESS}"
    console.print(screen(run, trainers, logs, RunClock(140, 12345.6), join, width=width))
    file.seek(0)
    return file.read()


def test_columns_have_headings_with_units_and_nothing_is_cut_in_80_columns(logs: dict[str, list[Event]]) -> None:
    logs["peer-10"] = [
        started("c"),
        joined(99_999, "h1"),
        replace(inner(1.0, 100, inner_step=499, planned=500), loss=10.0),
    ]
    logs["peer-10"].append(replace(made(99_999, "h1", ["x"] * 64, committed=False), bytes_sent=123_450_000))
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
    trainers = {name: trainer_now(log) for name, log in logs.items()}
    line = step_line(trainers, 2, 3.0, RunClock(14, 65.4))
    assert line == "outer step 2 of 14: held-out loss 3.0000, group of 2, 200 tokens/s, 65 s"
    assert "held-out" not in step_line(trainers, 2, None, RunClock(14, 65.4))


def test_last_words(logs: dict[str, list[Event]]) -> None:
    assert last_words(outcome_of(logs), byte_level=True) == [
        ("held-out loss", "5.5000 -> 3.0000 nats per token, 7.935 -> 4.328 bits per byte"),
        ("heads", "identical after 2 outer steps"),
        ("stalled", "0.50 s per outer step (median)"),
        ("speed", "150 tokens/s in all"),
    ]
    assert "bits" not in last_words(outcome_of(logs), byte_level=False)[0][1]
