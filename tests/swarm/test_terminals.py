"""The terminal of a command is closed: it says goodbye, or, under nohup, goes on."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys

import pytest

from p2p_diloco.core.event import PeerLeft
from tests.swarm.places import LEAVE_S, Place, wait_until


def start_in_terminal(place: Place, *prefix: str) -> tuple[subprocess.Popen[bytes], int]:
    """A seed in a terminal of its own; and the other end of that."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        ["setsid", "--ctty", "--wait", *prefix, sys.executable, "-m", "p2p_diloco", "seed", str(place.run_file),
         "--folder", str(place.root / "seed"), "--host-maddrs", "/ip4/127.0.0.1/tcp/0"],
        stdin=theirs, stdout=theirs, stderr=theirs, env=place.environment, cwd=place.root,
    )  # fmt: skip
    os.close(theirs)
    return process, ours


def seen(place: Place, terminal: int) -> str:
    """What it has printed; under nohup, not to the terminal."""
    file = place.root / "nohup.out"
    if file.exists():
        return file.read_text(encoding="utf-8")
    return os.read(terminal, 1 << 16).decode() if select.select([terminal], [], [], 0)[0] else ""


@pytest.mark.parametrize("prefix", [(), ("nohup",)])
def test_a_closed_terminal(prefix: tuple[str, ...]) -> None:
    place = Place()
    process, terminal = start_in_terminal(place, *prefix)
    try:
        wait_until(lambda: "serving run" in seen(place, terminal))
        os.close(terminal)
        if prefix:
            seed = next(
                pid for pid, command in place.alive().items() if " seed " in command and "setsid" not in command
            )
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1.0)
            assert place.events("seed", PeerLeft) == []
            os.kill(seed, signal.SIGTERM)
        assert process.wait(LEAVE_S) == 0
        assert [event.reason for event in place.events("seed", PeerLeft)] == ["asked"]
        place.assert_nothing_left()
    finally:
        process.kill()
        process.wait()
        place.clear()
