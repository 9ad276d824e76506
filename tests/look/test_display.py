from __future__ import annotations

import io
import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from p2p_diloco.core.peer_row import PeerRow
from p2p_diloco.look.display import View, bar, count, decimal, label, live_table, plain, screen_of
from p2p_diloco.look.ways_in import join_line, join_note

HEAD, OTHER = "a" * 64, "b" * 64
MADDR = "/ip4/203.0.113.178/tcp/31337/p2p/12D3KooWN2hiVeXizrw34v4Dg566UC6wBZY4H3YpcPpEYKC12Kiv"
HUGE: dict[str, Any] = dict.fromkeys(
    ("step", "inner_step", "inner_steps_planned", "tokens", "group_size", "round_bytes", "held_out_step"), 2**60 - 1
)
HUGE |= dict.fromkeys(("tokens_per_s", "round_s", "loss", "held_out_loss"), 1.7e308)


def row(**changes: Any) -> PeerRow:
    fields: dict[str, Any] = {
        "peer_id": "12D3KooWN2hiVeXizrw34v4Dg566UC6wBZY4H3YpcPpEYKC12Kiv",
        "name": "",
        "role": "trainer",
        "phase": "inner",
        "step": 3,
        "head": HEAD,
        "inner_step": 57,
        "inner_steps_planned": 100,
        "loss": 2.5,
        "held_out_loss": None,
        "held_out_step": 0,
        "tokens": 1_234_567,
        "tokens_per_s": 10_240.0,
        "group_size": 4,
        "round_s": 0.42,
        "round_bytes": 1_900_000,
        "issued_s": 1e9,
        "life_s": 30.0,
        "committed": True,
        "snapshot_step": 0,
        "maddrs": (),
        "client_mode": False,
        "version": "",
        "metrics_addr": "",
        "invitation": "",
    }
    return PeerRow(**fields | changes)


def view(*rows: PeerRow, **changes: Any) -> View:
    fields: dict[str, Any] = {
        "run": "tiny",
        "run_id": "52972832a69942c697a46f2604e69fbbe95852a4",
        "role": "trainer",
        "step": 3,
        "steps": 14,
        "head": HEAD,
        "inner_step": 57,
        "planned": 100,
        "loss": 2.5,
        "tokens_per_s": 10_240.0,
        "rows": rows or (row(),),
        "evaluation": None,
        "join_line": join_line([MADDR]),
        "join_note": join_note([MADDR]),
    }
    return View(**fields | changes)


def drawn(view: View, width: int = 80, height: int = 40) -> str:
    console = Console(file=io.StringIO(), width=width, height=height, color_system=None, force_terminal=True)
    console.print(screen_of(view, width=width, height=height))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def line_with(text: str, screen: str) -> str:
    (line,) = [line for line in screen.splitlines() if text in line]
    return line


def test_a_peer_sees_where_it_stands() -> None:
    screen = drawn(view(row(), row(name="b"), evaluation=(3, 2.5)))
    for fact in (
        "run tiny 52972832a699",
        "outer step 3 of 14",
        "last round: group of 4, 0.42 s, 1.9MB",
        "loss 2.5000",
        "10240 tokens/s",
        "held-out loss 2.5000 at outer step 3",
        "57/100",
    ):
        assert fact in screen
    assert MADDR in screen.replace("\n", "")


def test_what_one_peer_says_of_an_evaluation_is_not_the_swarms() -> None:
    screen = drawn(view(row(), row(name="liar", held_out_loss=0.1, held_out_step=10**6), evaluation=(2, 2.75)))
    assert "held-out loss 2.7500 at outer step 2" in screen
    assert "1M" not in screen
    assert "not evaluated yet" in drawn(view(row(), row(name="liar", held_out_loss=0.1, held_out_step=10**6)))


def test_columns_have_headings_with_units() -> None:
    lines = drawn(view()).splitlines()
    first = next(i for i, line in enumerate(lines) if " peer " in line)
    assert lines[first - 1].split() == ["outer", "inner", "loss", "tokens", "tokens", "group"]
    assert lines[first].split() == ["peer", "role", "phase", "step", "steps", "nats", "/s", "so", "far", "peers"]


def test_a_bar_tells_how_far_without_colors() -> None:
    assert [bar(done, 10, 5) for done in (0, 1.9, 2, 9.99, 10, 11, -1)] == [
        *("░░░░░", "░░░░░", "█░░░░", "████░", "█████", "█████", "░░░░░"),
    ]
    assert bar(0, 0, 3) == bar(1, 0, 3) == "░░░"
    assert f"inner steps {'█' * 20}{'░' * 20} 50/100" in drawn(view(inner_step=50))
    assert f"inner steps {'░' * 40} 0/100" in drawn(view(inner_step=0))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_what_an_encoding_lacks_is_shown_in_its_own_characters(encoding: str) -> None:
    rows = [row(), row(name="Käthe", head=OTHER), row(name="漢字", role="seed", loss=None)]
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=file, width=80, height=40, color_system=None, force_terminal=True)
    console.print(screen_of(view(*rows), width=80, height=40))
    file.seek(0)
    screen = file.read()
    assert "run tiny 52972832a699 | outer step 3 of 14" in screen
    assert f"inner steps {'#' * 22}{'.' * 18} 57/100" in screen
    assert line_with("K?the", screen).startswith("!")
    assert "! on another head" in screen
    assert all(len(line) <= 80 for line in screen.splitlines())
    plain_screen = drawn(view(*rows))
    assert len(screen.splitlines()) == len(plain_screen.splitlines())


def test_my_row_and_those_on_another_head_are_marked() -> None:
    screen = drawn(view(row(name="own"), row(name="with me"), row(name="elsewhere", head=OTHER)))
    assert line_with(" own ", screen).startswith("▸")
    assert line_with("elsewhere", screen).startswith("≠")
    assert line_with("with me", screen).startswith(" ")
    assert "≠ on another head" in screen
    assert "another head" not in drawn(view(row(), row(name="with me")))


def test_before_anything_is_known_there_is_a_screen() -> None:
    assert "only for peers on this machine" in drawn(view(join_note=join_note(["/ip4/127.0.0.1/tcp/1"])))
    screen = drawn(replace(view(), rows=(), role="", loss=None, join_line="", join_note=""))
    assert "not evaluated yet" in screen
    assert "--initial-peers" not in screen


def test_a_seed_has_no_inner_steps() -> None:
    screen = drawn(view(row(role="seed", loss=None, group_size=0, round_s=0.0, name="s"), role="seed"))
    assert "inner steps" not in screen
    assert line_with(" s ", screen).split()[5:] == ["–"] * 5


def test_of_many_peers_as_many_are_shown_as_fit() -> None:
    rows = [row(name=f"peer {i}") for i in range(50)]
    screen = drawn(view(*rows), height=24)
    assert len(screen.splitlines()) <= 24
    assert "and 39 more" in screen


@pytest.mark.parametrize(
    "name",
    [
        "[red]bold[/red]",
        "[/]",
        "[link=https://example.org]x",
        "\x1b[2J\x1b]0;title\x07",
        "line\nbreak\r\x0b\x85\u2028",
        "\u202egnp.exe",
        "\u2066isolate\u2069",
        "\u200b\u200d",
        "漢字" * 16,
        "e\u0301" * 16,
        "\ud800",
        "w" * 32,
    ],
)
def test_a_name_is_shown_and_does_nothing_else(name: str) -> None:
    screen = drawn(view(row(), row(name=name, **HUGE)))
    assert all(cell_len(line) <= 80 for line in screen.splitlines())
    assert not set("\x1b\x07\r\x0b\x85\u2028\u202e\u2066\u2069\u200b\u200d\ud800") & set(screen)
    assert len(screen.splitlines()) == len(drawn(view(row(), row(name="x", **HUGE))).splitlines())
    if name.startswith("["):
        assert name[:10] in screen


@given(st.text(max_size=32))
def test_any_name_fits_and_is_never_empty(name: str) -> None:
    shown = label(name, row().peer_id)
    assert shown
    assert plain(shown) == shown
    assert all(cell_len(line) <= 80 for line in drawn(view(row(name=name))).splitlines())


@pytest.mark.parametrize("width", [80, 100, 200])
def test_the_largest_numbers_that_a_peer_can_claim_fit(width: int) -> None:
    rows = [row(phase="evaluate", name="n" * 32, **HUGE)] * 3
    changes: dict[str, Any] = {"step": 3, "inner_step": 99_999, "planned": 99_999, "evaluation": (2**60, 1.7e308)}
    screen = drawn(view(*rows, **changes), width=width)
    assert all(cell_len(line) <= width for line in screen.splitlines())
    assert "…" not in screen or width == 80


def test_numbers_take_six_characters_at_most() -> None:
    assert [count(n) for n in (0, 0.4, 99_999, 100_000, 999_499, 999_501, 1.5e9, 1e18)] == [
        *("0", "0", "99999", "100k", "999k", "1M", "1.5G", "1E"),
    ]
    assert count(1e300) == count(float("inf")) == "huge"
    assert [decimal(x) for x in (None, float("nan"), 2.5, 1e300)] == ["–", "–", "2.5000", "1.0e+300"]


def test_only_a_terminal_gets_a_table() -> None:
    swarm: Any = SimpleNamespace(
        manifest=SimpleNamespace(run_id="5" * 40, spec=SimpleNamespace(name="tiny", outer=SimpleNamespace(steps=14))),
        rows=(row(),),
        evaluation=(2, 2.75),
        maddrs=[MADDR],
        head=HEAD,
        step=3,
        inner_step=57,
        planned=100,
        loss=2.5,
        tokens_per_s=1.0,
    )
    for is_terminal, term in ((False, "xterm"), (True, "xterm"), (True, "dumb")):
        environ = {"TERM": term}
        console = Console(file=io.StringIO(), width=80, height=40, force_terminal=is_terminal, _environ=environ)
        is_terminal = is_terminal and term != "dumb"
        with live_table(swarm, console):
            console.print("a line of the log")
        assert isinstance(console.file, io.StringIO)
        text = console.file.getvalue()
        assert "a line of the log" in text
        assert ("outer step 3 of 14" in text) == is_terminal
        assert ("held-out loss 2.7500 at outer step 2" in text) == is_terminal
        assert text.rfind("\x1b[?25h") >= text.rfind("\x1b[?25l"), "the cursor stays hidden"


def test_a_path_with_bytes_that_are_no_text_is_shown() -> None:
    assert plain(os.fsdecode(b"/data/bad\xff/M\xc3\xbcnchen")) == "/data/bad\\xff/M\xfcnchen"
    assert plain("\ud800") == ""
