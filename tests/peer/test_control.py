"""Lines between a trainer and its network process, also when the other one reads nothing."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from p2p_diloco.core.config import PeerConfig, Timeouts
from p2p_diloco.core.peer_row import PeerRow
from p2p_diloco.peer.control import (
    KINDS,
    Begin,
    Begun,
    Evaluated,
    Failed,
    Found,
    FromNetwork,
    FromTrainer,
    InnerStep,
    Joined,
    Leave,
    Left,
    LogLine,
    Moved,
    News,
    OuterResult,
    OuterStep,
    Peers,
    Stall,
    Start,
    has_room,
    pack_line,
    socket_pair,
    unpack_line,
)
from tests.support.builders import identity, record_of

NO_TEXT = Path(os.fsdecode(b"J\xfcrgen"))
CONFIG = PeerConfig(
    folder=NO_TEXT / "peer", initial_peers=("/ip4/127.0.0.1/tcp/1",), name="J\xfcrgen", max_upload_bytes_per_s=1e6
)
LINES: list[FromTrainer | FromNetwork] = [
    Start(config=CONFIG, timeouts=Timeouts().scaled(0.3), role="seed", manifest_path=NO_TEXT / "manifest.json"),
    Begin(planned=4),
    InnerStep(inner_step=3, planned=4, step_s=0.5, loss=None, tokens=48, tokens_per_s=32.0),
    OuterStep(tokens=64, dropped=True, pace=0.25),
    Stall(step=2, seconds=0.125),
    Evaluated(step=2, held_out_loss=2.5, tokens=640, seconds=1.5),
    Leave(reason="done\n"),
    LogLine(level=20, name="p2p_diloco.peer.peer", text="two\nlines"),
    Found(manifest_path=NO_TEXT / "run" / "manifest.json", folder=NO_TEXT / "run"),
    Joined(peer_id="12D", maddrs=["/ip4/127.0.0.1/tcp/1"], step=7, head="ab"),
    Begun(step=7, head="ab", evaluate=True),
    News(closes_in_s=0.1, behind=True),
    Peers(rows=(PeerRow.of(record_of(identity(2), "ab", maddrs=["/ip4/127.0.0.1/tcp/1"])),), evaluation=(3, 2.5)),
    Moved(step=8, head="cd"),
    OuterResult(committed=True, adopted=False, reason="", step=8, head="cd", group=2, stall_s=0.5, planned=4),
    Left(),
    Failed(message="disk full", exit_code=1),
]


@pytest.mark.parametrize("line", LINES, ids=lambda line: type(line).__name__)
def test_a_line_comes_back_as_it_was_sent(line: FromTrainer | FromNetwork) -> None:
    packed = pack_line(line)
    assert packed.count(b"\n") == 1
    assert packed.endswith(b"\n")
    assert unpack_line(packed) == line


def test_every_kind_of_line_has_a_class_and_is_tried_here() -> None:
    assert [type(line) for line in LINES] == list(KINDS.values())


@pytest.mark.parametrize(
    "line",
    [
        b"[]",
        b'{"planned": 4}',
        b'{"kind": ["begin"], "planned": 4}',
        b'{"kind": "end", "planned": 4}',
        b'{"kind": "begin"}',
        b'{"kind": "begin", "planned": 4, "step": 1}',
        b'{"kind": "begin", "planned": "four"}',
        b'{"kind": "begin", "planned": null}',
        b'{"kind": "begin", "planned"',
        b'{"kind": "begin", "planned": "4"}',
        b'{"kind": "begin", "planned": 4.0}',
        b'{"kind": "begin", "planned": true}',
        b'{"kind": "begin", "planned": -4}',
        b'{"kind": "begin", "planned": 4, "planned": 4}',
        b'{"kind": "begin", "kind": "begin", "planned": 4}',
        '{"kind": "begin", "planned": 4}'.encode("utf-16"),
        b'{"kind": "stall", "step": 2, "seconds": "0.5"}',
        b'{"kind": "stall", "step": 2, "seconds": -0.5}',
        b'{"kind": "stall", "step": 2, "seconds": NaN}',
        b'{"kind": "stall", "step": 2, "seconds": 1e999}',
        b'{"kind": "news", "closes_in_s": NaN, "behind": true}',
        b'{"kind": "news", "closes_in_s": 0.1, "behind": 1}',
        b'{"kind": "news", "closes_in_s": 0.1, "behind": "true"}',
        b'{"kind": "leave", "reason": null}',
        b'{"kind": "peers", "rows": [], "evaluation": ["3", 2.5]}',
        pack_line(LINES[0]).replace(b'"client_mode": false', b'"client_mode": "no"'),
        pack_line(LINES[0]).replace(b'"client_mode": false, ', b""),
        pack_line(LINES[14]).replace(b', "planned": 4', b""),
    ],
)
def test_a_line_that_nobody_writes_is_refused(line: bytes) -> None:
    assert line not in map(pack_line, LINES)
    with pytest.raises(ValueError, match=r"a line of kind|validation error|delimiter|twice|not finite|compliant|utf-8"):
        unpack_line(line)


def test_a_whole_number_of_seconds_is_one() -> None:
    assert unpack_line(b'{"kind": "stall", "step": 2, "seconds": 3}\n') == Stall(step=2, seconds=3.0)


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), np.float32(1.0)])
def test_what_no_line_can_say_is_not_written(seconds: float) -> None:
    with pytest.raises((ValueError, TypeError), match=r"compliant|cannot say"):
        pack_line(Stall(step=2, seconds=seconds))


def test_where_there_is_room_nobody_waits_and_where_nobody_reads_there_is_none() -> None:
    mine, theirs = socket_pair()
    with mine, theirs:
        mine.settimeout(1.0)
        line, sent = pack_line(Leave(reason="x" * 300)), 0
        while has_room(mine):
            mine.sendall(line)
            sent += len(line)
        assert sent > 10_000
        while sent:
            sent -= len(theirs.recv(sent))
        assert has_room(mine)


def test_a_line_to_one_that_is_gone_does_not_wait_either() -> None:
    mine, theirs = socket_pair()
    theirs.close()
    with mine:
        assert has_room(mine)
