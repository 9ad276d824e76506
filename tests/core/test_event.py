"""An event and its line. The lines are those of the version before there were classes: others read them, too."""

from __future__ import annotations

import ast
import json
import random
import re
from dataclasses import MISSING, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from p2p_diloco.core import events
from p2p_diloco.core.event import (
    SOMETIMES,
    Event,
    InnerStepEnded,
    PeerLeft,
    RoundEnded,
    latest,
    of_kind,
    pack_event,
    parse_event,
)
from p2p_diloco.core.events import EventLog
from tests.support.events import COMMITTED, EVENTS, INNER, JOINED, LEFT, LOST, MISSED, STALL

LINES = r"""
{"event": "started", "wall_s": 1700000000.5, "mono_s": 12.25, "peer_id": "12D3a", "pid": 77, "run_id": "ab01", @
"run_name": "tiny", "role": "trainer", "version": "1.0", "maddrs": ["/ip4/127.0.0.1/tcp/1/p2p/12D3a"]}
{"event": "joined", "wall_s": 1700000000.5, "mono_s": 12.25, "step": 3, "head": "0a", "from_step": null, @
"snapshot": true, "seconds": 0.5}
{"event": "phase", "wall_s": 1700000000.5, "mono_s": 12.25, "phase": "gather", "step": 3}
{"event": "inner", "wall_s": 1700000000.5, "mono_s": 12.25, "step": 3, "inner_step": 7, "planned": 10, @
"loss": null, "tokens": 640, "tokens_per_s": 128.5}
{"event": "offered", "wall_s": 1700000000.5, "mono_s": 12.25, "step": 3, "tokens": 640}
{"event": "round", "wall_s": 1700000000.5, "mono_s": 12.25, "step": 3, "head": "0a", "committed": false, @
"reason": "alone", "detail": "nobody to meet", "group": [], "dropped": [], "lost": [], "gather_s": 1.5, @
"apply_s": 0.0, "reduce_s": 0.0, "settle_s": 0.0, "bytes_sent": 0, "bytes_received": 0, "known": 0, @
"signatures": 0, "certifying": 0, "witnessed": false, "uncertified": ""}
{"event": "round", "wall_s": 1700000000.5, "mono_s": 12.25, "step": 4, "head": "0b", "committed": true, @
"reason": "", "detail": "", "group": ["12D3a", "12D3b"], "dropped": ["12D3b"], "lost": ["12D3b"], @
"gather_s": 0.5, "apply_s": 0.0625, "reduce_s": 0.25, "settle_s": 0.125, "bytes_sent": 1000, @
"bytes_received": 2000, "known": 3, "signatures": 2, "certifying": 2, "witnessed": true, "uncertified": "", @
"contribution_norm": 3.0, "update_norm": 2.0, "cosine": -0.5}
{"event": "audit", "wall_s": 1700000000.5, "mono_s": 12.25, "step": 3, "reducer": "12D3b", "part": 7, @
"result": "wrong", "seconds": 0.25}
{"event": "found", "wall_s": 1700000000.5, "mono_s": 12.25, "step": 4, "reducer": "12D3b", "kind": "wrong", @
"accuser": "12D3c"}
{"event": "stall", "wall_s": 1700000000.5, "mono_s": 12.25, "step": 4, "seconds": 1.25}
{"event": "caught_up", "wall_s": 1700000000.5, "mono_s": 12.25, "seconds": 2.5, "from_step": null, "to_step": 9, @
"rolled_back": 1, "snapshot": true, "bytes_received": 4096, "donors": 2}
{"event": "branch", "wall_s": 1700000000.5, "mono_s": 12.25, "fork_step": 6, "left_step": 8, "left_head": "0d", @
"step": 9, "head": "0e", "votes": 3, "votes_left": 1}
{"event": "witness", "wall_s": 1700000000.5, "mono_s": 12.25, "step": 8, "signed": false, "reason": "too few"}
{"event": "repaired", "wall_s": 1700000000.5, "mono_s": 12.25, "what": "update", "step": 8, "how": "fetched"}
{"event": "disputed", "wall_s": 1700000000.5, "mono_s": 12.25, "step": 8, "others": ["12D3b", "12D3c"]}
{"event": "anchored", "wall_s": 1700000000.5, "mono_s": 12.25, "step": 6, "head": "0d", "number": 3, "made": false}
{"event": "anchors_differ", "wall_s": 1700000000.5, "mono_s": 12.25, "step": 6, "number": 3, "other_step": 5}
{"event": "barred", "wall_s": 1700000000.5, "mono_s": 12.25, "step": 8, "peer": "12D3b", "why": "rosters"}
{"event": "p2pd_restarted", "wall_s": 1700000000.5, "mono_s": 12.25, "maddrs": ["/ip4/127.0.0.1/tcp/2/p2p/12D3a"]}
{"event": "evaluated", "wall_s": 1700000000.5, "mono_s": 12.25, "step": 9, "held_out_loss": null, @
"tokens": 1024, "seconds": 0.75}
{"event": "unwritten", "wall_s": 1700000000.5, "mono_s": 12.25, "lines": 1}
{"event": "left", "wall_s": 1700000000.5, "mono_s": 12.25, "step": 9, "head": "0c", "reason": "done \ud83e\uddec"}
""".lstrip().replace("@\n", "")  # fmt: skip
NAMES = [event.event for event in EVENTS]
PACKAGE = Path(events.__file__).parents[1]


def test_the_log_writes_every_kind_as_it_always_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "time", SimpleNamespace(time=lambda: 1700000000.5, monotonic=lambda: 12.25))
    assert {type(event) for event in EVENTS} == set(get_args(Event))
    log = EventLog(tmp_path)
    for event in EVENTS:
        log.write(event)
    log.close()
    assert log.path.read_text(encoding="ascii") == LINES


def test_a_round_whose_theta_was_not_finite_has_no_alignment() -> None:
    event = replace(COMMITTED, contribution_norm=None, update_norm=None, cosine=None)
    line = pack_event(event)
    assert line.decode().endswith('"witnessed": true, "uncertified": ""}\n')
    assert parse_event(line) == event


@pytest.mark.parametrize("event", EVENTS, ids=NAMES)
def test_what_is_written_is_read(event: Event) -> None:
    assert parse_event(pack_event(event)) == event


def test_all_that_is_null_in_a_line_may_be_a_number() -> None:
    for event in (replace(INNER, loss=2.5), replace(JOINED, from_step=2)):
        assert parse_event(pack_event(event)) == event


def damaged(event: Event, /, **changes: Any) -> bytes:
    """Its line with some fields as they never are."""
    return json.dumps(json.loads(pack_event(event)) | changes).encode()


OTHERS: tuple[Any, ...] = ("7", 7, 7.5, True, None, [7], {"a": 7}, [["a"]])
"""No field takes all of them."""
FITS: dict[str, tuple[type, ...]] = {
    "str": (str,), "Uncertified": (), "int": (int,), "float": (int, float), "bool": (bool,),
    "NotNegative": (int, float),
    "tuple[int, ...] | None": (list, type(None)),
    "int | None": (int, type(None)), "str | None": (str, type(None)), "float | None": (int, float, type(None)),
}  # fmt: skip


@pytest.mark.parametrize("event", EVENTS, ids=NAMES)
def test_a_line_with_a_field_of_another_type_is_no_event(event: Event) -> None:
    tried = 0
    for field in fields(event):
        for other in OTHERS:
            if type(other) not in FITS.get(str(field.type), ()):
                assert parse_event(damaged(event, **{field.name: other})) is None, (field.name, other)
                tried += 1
    assert tried > 4 * len(fields(event))


@pytest.mark.parametrize("event", EVENTS, ids=NAMES)
def test_a_line_without_a_field_is_no_event(event: Event) -> None:
    for name in json.loads(pack_event(event)):
        table = json.loads(pack_event(event))
        del table[name]
        assert (parse_event(json.dumps(table).encode()) is None) == (name not in SOMETIMES), name
    assert [field.name for field in fields(event) if field.default is None] in ([], [*SOMETIMES])
    assert all(field.default is not MISSING for field in fields(event)[:3])


def test_what_a_line_says_beyond_its_fields_is_ignored() -> None:
    assert parse_event(damaged(LEFT, mood="good", more=[1, {}])) == LEFT


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"garbage",
        b"\xff\xfe",
        b"5",
        b"null",
        b'"left"',
        b"[]",
        b"{}",
        b"[" * 100_000,
        b'{"event": "left"}',
        b'{"event": "sneezed", "wall_s": 1.0, "mono_s": 1.0, "step": 1}',
        b'{"event": ["left"], "wall_s": 1.0, "mono_s": 1.0, "step": 1}',
        pack_event(STALL).replace(b"1.25", b"NaN"),
        pack_event(STALL).replace(b"1.25", b"1e999"),
        pack_event(STALL).replace(b"1.25", b"-Infinity"),
        pack_event(LOST).replace(b'"mono_s": 0.0', b'"mono_s": -0.5'),
        pack_event(LEFT)[:-3],
        pack_event(LEFT).strip() * 2,
        damaged(INNER, event="phase"),
        damaged(EVENTS[2], phase="snoring"),
        damaged(EVENTS[0], role="owner"),
    ],
)
def test_what_is_no_event(line: bytes) -> None:
    assert parse_event(line) is None


@pytest.mark.parametrize("event", EVENTS, ids=NAMES)
def test_a_damaged_line_is_an_event_of_right_types_or_none(event: Event) -> None:
    generator, whole, none = random.Random(event.event), pack_event(event), 0
    for _ in range(300):
        line = bytearray(whole)
        for _ in range(generator.randrange(1, 3)):
            line[generator.randrange(len(line))] = generator.randrange(256)
        found = parse_event(bytes(line))
        none += found is None
        if found is not None:
            assert parse_event(pack_event(found)) == found
    assert none > 50


def test_events_of_one_kind() -> None:
    log: list[Event] = [INNER, MISSED, LEFT, COMMITTED]
    assert of_kind(log, RoundEnded) == [MISSED, COMMITTED]
    assert of_kind(log, InnerStepEnded) == [INNER]
    assert latest(log, RoundEnded) == COMMITTED
    assert latest(log[:1], PeerLeft) is None


@pytest.mark.parametrize("kind", get_args(Event), ids=lambda kind: kind.event)
def test_its_docstring_says_where_an_event_comes_from(kind: type) -> None:
    """A module that makes one; patterns of ``match`` look alike, and are none."""
    found = set[str]()
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.Call) and ast.unparse(node.func) == kind.__name__ for node in ast.walk(tree)):
            found.add(path.stem)
    assert kind.__doc__ is not None
    assert set(re.findall(r"``(\w+)``", re.split(r"\sFrom\s", kind.__doc__)[-1])) == found
