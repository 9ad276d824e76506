"""Where the peers of a swarm on this machine run, and what they are given. Most are a small program of our own."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.stage import SPEC
from p2p_diloco.core.runfile import DataSpec
from p2p_diloco.lab.child import Child
from p2p_diloco.lab.children import Children, text_on_disk
from p2p_diloco.lab.faults import Act

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="children die with their parent on Linux alone")
LIMIT_S = 20.0
MADDRS = ("/ip4/5.9.1.2/tcp/1/p2p/a", "/ip6/2a01::2/tcp/1/p2p/a")
PEER = f"""
import os, sys, time
from dataclasses import replace
from pathlib import Path
from p2p_diloco.core.events import EventLog
from tests.support.events import STARTED

folder = Path(sys.argv[sys.argv.index("--folder") + 1])
EventLog(folder / "run").write(replace(STARTED, maddrs={MADDRS}))
print(os.environ.get("PLACE"), *sys.argv[1:], flush=True)
time.sleep({LIMIT_S})
"""


@dataclass(frozen=True)
class Corner:
    name: str

    @property
    def enter(self) -> tuple[str, ...]:
        return "env", f"PLACE={self.name}"

    @property
    def options(self) -> tuple[str, ...]:
        return "--host-maddrs", "/ip4/10.0.0.2/tcp/1", "/ip6/fd00::2/tcp/1", "--client-mode"


class Corners:
    def add(self, name: str) -> Corner:
        return Corner(f"corner of {name}")


def words_of(child: Child, start: int = 1) -> str:
    """What it was started with, the last time."""
    deadline_s = time.monotonic() + LIMIT_S
    while child.output.count("\n") < start:
        assert child.running, child.output
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    child.tail.read()
    return child.output.splitlines()[-1]


@pytest.fixture
def started(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Children]:
    with Children(tmp_path / "run.toml", SPEC, tmp_path, trainer=("-c", PEER), places=request.param) as children:
        children.add_trainer("peer-1")
        yield children
        for child in children.all:
            child.send(signal.SIGKILL, "trainer")


@needs_linux
@pytest.mark.parametrize("started", [Corners()], indirect=True, ids=["places"])
def test_a_child_runs_at_its_place_with_its_options_whenever_it_starts(started: Children) -> None:
    child, there = started.named("peer-1"), f" {' '.join(Corner('').options)} --name peer-1"
    for start in (1, 2):
        words = words_of(child, start)
        assert words.startswith("corner of peer-1 ")
        assert words.endswith(there)
        child.send(signal.SIGKILL, "trainer")
        child.process.wait(LIMIT_S)
        started.carry_out(Act(fault=0, action="restart", peer="peer-1", process="trainer"))


@needs_linux
@pytest.mark.parametrize("started", [None], indirect=True, ids=["loopback"])
def test_without_places_all_are_on_loopback(started: Children) -> None:
    words = words_of(started.named("peer-1"))
    assert words.startswith("None ")
    assert words.endswith(" --host-maddrs /ip4/127.0.0.1/tcp/0 --name peer-1")


@needs_linux
@pytest.mark.parametrize("started", [None], indirect=True, ids=["loopback"])
def test_a_joiner_is_given_all_addresses_of_those_that_run(started: Children) -> None:
    """Of a family that it lacks it can use none."""
    words_of(started.named("peer-1"))
    assert f" --initial-peers {' '.join(MADDRS)} " in words_of(started.add_trainer("peer-2"))


def test_trainers_get_the_text_that_the_run_file_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for folder in ("runs", "home"):
        (tmp_path / folder / "text").mkdir(parents=True)
    base = tmp_path / "runs"
    assert text_on_disk(DataSpec(source="path", path="text"), base) == base / "text"
    assert text_on_disk(DataSpec(source="path", path="~/text"), base) == tmp_path / "home" / "text"
    assert text_on_disk(DataSpec(source="path", path=str(base / "text")), tmp_path) == base / "text"
    assert text_on_disk(DataSpec(source="hub", path="allenai/c4"), base) is None
    assert text_on_disk(DataSpec(), base) is None
