from __future__ import annotations

import errno
import io
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from p2p_diloco.core.errors import LedgerError
from p2p_diloco.core.event import Event, PeerJoined, PeerLeft, of_kind, pack_event
from p2p_diloco.core.events import EVENTS_FILE, EventLog, EventTail, read_events
from tests.support.events import COMMITTED, EVALUATED, INNER, JOINED, LEFT, STARTED, lines_of

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


def write(folder: Path, *events: Event) -> Path:
    log = EventLog(folder)
    for event in events:
        log.write(event)
    log.close()
    return log.path


def names(path: Path) -> list[str]:
    return [event.event for event in read_events(path)]


def test_events_are_lines_of_json_with_both_clocks(tmp_path: Path) -> None:
    before_s, log = time.time(), EventLog(tmp_path / "new" / "folder")
    log.write(INNER)
    [line] = log.path.read_text().splitlines()
    event: dict[str, Any] = json.loads(line)
    assert before_s <= event.pop("wall_s") <= time.time()
    assert 0 < event.pop("mono_s") <= time.monotonic()
    assert event == {
        "event": "inner",
        "step": 3,
        "inner_step": 7,
        "planned": 10,
        "loss": None,
        "tokens": 640,
        "tokens_per_s": 128.5,
    }
    log.close()


def test_every_line_is_there_as_soon_as_it_is_written(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    for i in range(3):
        log.write(replace(LEFT, step=i, reason="line\nbreak \N{DNA DOUBLE HELIX}"))
        assert [event["step"] for event in lines_of(log.path)] == list(range(i + 1))
        assert {event.reason for event in of_kind(read_events(log.path), PeerLeft)} == {
            "line\nbreak \N{DNA DOUBLE HELIX}"
        }
    assert log.path.read_bytes().count(b"\n") == 3
    log.close()


def test_a_restart_appends(tmp_path: Path) -> None:
    assert names(write(tmp_path, STARTED, LEFT)) == ["started", "left"]
    assert names(write(tmp_path, STARTED)) == ["started", "left", "started"]


@pytest.mark.parametrize("cut", [1, 2, 20])
def test_a_line_cut_by_a_crash_costs_itself_alone(tmp_path: Path, cut: int) -> None:
    path = write(tmp_path, STARTED, COMMITTED)
    path.write_bytes(path.read_bytes()[:-cut])
    assert names(path) == ["started"]
    write(tmp_path, STARTED, JOINED)
    # Without its last character, the line break, the line was whole after all.
    assert names(path) == ["started", *["round"] * (cut == 1), "started", "joined"]


def test_what_is_no_event_is_left_out(tmp_path: Path) -> None:
    path = write(tmp_path, STARTED)
    others = b'garbage\n\n\xff\xfe\n7\n[]\n{}\n{"event": "left"}\n{"event": "born", "wall_s": 1.0, "mono_s": 1.0}\n'
    path.write_bytes(others + path.read_bytes() + others + b'{"event": "rou')
    assert names(path) == ["started"]
    assert read_events(tmp_path / "nowhere") == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_json_cannot_say_is_not_written(tmp_path: Path, value: float) -> None:
    log = EventLog(tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        log.write(replace(INNER, loss=value))
    log.write(LEFT)
    log.close()
    assert names(log.path) == ["left"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match=r"choose another --folder"):
        EventLog(tmp_path / "file")
    (tmp_path / EVENTS_FILE).mkdir()
    with pytest.raises(LedgerError, match="cannot be written"):
        EventLog(tmp_path)


@pytest.fixture
def full() -> Path:
    path = Path("/dev/full")
    if not path.exists():
        pytest.skip("no /dev/full on this system")
    return path


def test_a_full_disk_costs_events_and_is_told_once(
    tmp_path: Path, full: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = EventLog(tmp_path)
    log.write(STARTED)
    kept, log._file = log._file, full.open("ab", buffering=0)
    for step in range(3):
        log.write(replace(EVALUATED, step=step))
    log._file.close()
    log._file = kept
    assert [record.getMessage() for record in caplog.records] == [
        f"{log.path}: disk full, free 1 MB or move the folder; training goes on, and events are lost until then"
    ]
    log.write(replace(LEFT, step=3))
    log.close()
    started, unwritten, left = lines_of(log.path)
    assert names(log.path) == ["started", "unwritten", "left"]
    assert (started["event"], unwritten["event"], unwritten["lines"], left["event"]) == (
        *("started", "unwritten", 3, "left"),
    )
    assert unwritten["wall_s"] == left["wall_s"]
    assert caplog.messages[1:] == [f"{log.path}: can be written again; 3 events are lost"]


def test_half_a_line_on_a_full_disk_costs_itself_alone(tmp_path: Path) -> None:
    """The disk takes what it has room for."""
    log = EventLog(tmp_path)
    log.write(STARTED)
    whole = log._file

    class Short(io.FileIO):
        def write(self, data: ReadableBuffer, /) -> int:
            return super().write(bytes(data)[:7])

    log._file = Short(log.path, "ab")
    log.write(COMMITTED)
    log._file.close()
    log._file = whole
    log.write(LEFT)
    log.close()
    assert names(log.path) == ["started", "unwritten", "left"]


def test_a_log_that_cannot_be_closed_ends_nothing(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    os.close(log._file.fileno())
    log.close()


def test_a_log_on_a_full_disk_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mkdir(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(LedgerError, match=r"events\.jsonl: disk full, free 1 MB or move the folder"):
        EventLog(tmp_path / "new")


def test_event_log_is_read_as_it_grows(tmp_path: Path) -> None:
    """In whole lines, each once; a line that a crash cut, and another process then completed, is left out."""
    tail = EventTail(tmp_path)
    tail.read()
    assert tail.log == []
    events = EventLog(tmp_path / "tiny-0123")
    events.write(STARTED)
    events.write(replace(JOINED, step=0))
    tail.read()
    tail.read()
    assert [event.event for event in tail.log] == ["started", "joined"]
    with events.path.open("a") as file:
        file.write('{"event": "inn')
    tail.read()
    assert len(tail.log) == 2
    with events.path.open("a") as file:
        file.write(pack_event(STARTED).decode())
    events.write(replace(JOINED, step=1))
    tail.read()
    assert [event.event for event in tail.log] == ["started", "joined", "joined"]
    assert [event.step for event in of_kind(tail.log, PeerJoined)] == [0, 1]
    events.close()


def test_what_cannot_be_written_counts_all_the_same(tmp_path: Path, full: Path) -> None:
    log = EventLog(tmp_path)
    log.close()
    log._file = full.open("ab", buffering=0)
    log.write(COMMITTED)
    assert (log.unwritten, log.totals.rounds) == (1, {"committed": 1})
    log.close()
