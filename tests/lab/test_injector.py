"""Faults carried out on small processes of our own, which write what a peer would write into its event log."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.stage import SPEC
from p2p_diloco.core.errors import UsageError
from p2p_diloco.core.event import PhaseBegan
from p2p_diloco.core.events import EventLog
from p2p_diloco.lab.child import is_alive, read_proc
from p2p_diloco.lab.children import Children
from p2p_diloco.lab.faults import Fault, FaultPlan
from p2p_diloco.lab.injector import Injector

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="faults need Linux")
LIMIT_S = 20.0
PEER = """
import signal, sys, time
from dataclasses import replace
from pathlib import Path
from p2p_diloco.core.events import EventLog
from tests.support.events import STARTED

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by all that a shell starts in the background
folder = Path(sys.argv[sys.argv.index("--folder") + 1])
events = EventLog(folder / "run")
events.write(replace(STARTED, maddrs=("/ip4/127.0.0.1/tcp/1",)))
deadline_s = time.monotonic() + 60
while time.monotonic() < deadline_s:  # a signal that comes just before a sleep does not end it
    time.sleep(0.05)
"""


@pytest.fixture
def children(tmp_path: Path) -> Iterator[Children]:
    """Two trainers that have started."""
    with Children(tmp_path / "run.toml", SPEC, tmp_path, trainer=("-c", PEER)) as children:
        children.start_trainers(2)
        wait_until(lambda: all(started(child.name, children) for child in children.all))
        yield children
        for child in children.all:
            child.process.kill()


def started(name: str, children: Children) -> bool:
    child = children.named(name)
    child.tail.read()
    return child.address is not None


def wait_until(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def injector_of(children: Children, **fault: object) -> Injector:
    injector = Injector(FaultPlan(fault=[Fault.model_validate(fault)]), children)
    injector.start()
    return injector


def test_a_kill_at_a_phase_and_the_restart_that_follows(children: Children) -> None:
    victim = children.named("peer-2")
    log = EventLog(victim.folder / "run")
    log.write(PhaseBegan(phase="reduce", step=3))
    injector = injector_of(children, action="kill", phase="reduce", outer_step=3, peer="peer-2", for_s=0.01)
    assert injector.poll() == []  # that was before
    log.write(PhaseBegan(phase="gather", step=3))
    assert injector.poll() == []
    pid = victim.process.pid
    log.write(PhaseBegan(phase="reduce", step=3))
    [kill] = injector.poll()
    assert (kill.act.action, kill.pids, kill.phase, kill.step) == ("kill", (pid,), "reduce", 3)
    wait_until(lambda: not is_alive(pid))
    assert victim.felled
    assert victim.process.wait(LIMIT_S) == -9
    assert not victim.failed
    assert victim.fate == "killed"
    assert injector.restarts_to_come

    wait_until(injector.poll)
    [_, restart] = injector.done
    assert (restart.act.action, restart.pids) == ("restart", (victim.process.pid,))
    assert victim.process.pid != pid
    assert not injector.restarts_to_come
    wait_until(lambda: started("peer-2", children))
    assert victim.fate is None
    assert children.named("peer-1").running
    log.close()


def test_a_stopped_process_stands_still_until_it_is_resumed(children: Children) -> None:
    injector = injector_of(children, action="stop", at_s=0.0, peer="peer-1", process="trainer", for_s=0.1)
    [stop] = injector.poll()
    wait_until(lambda: state_of(stop.pids[0]) == b"T")
    wait_until(injector.poll)
    assert injector.done[1].pids == stop.pids
    wait_until(lambda: state_of(stop.pids[0]) == b"S")


def state_of(pid: int) -> bytes:
    return read_proc(pid, "stat").rpartition(b")")[2].split()[0]


def test_a_process_that_is_not_there_cannot_be_hit(children: Children) -> None:
    injector = injector_of(children, action="kill", at_s=0.0, peer="peer-1", process="network", for_s=0.01)
    [kill] = injector.poll()
    assert kill.pids == ()
    time.sleep(0.02)
    assert injector.poll() == []
    assert not children.named("peer-1").felled


def test_who_starts_again_waits_for_somebody_to_join(children: Children) -> None:
    both = [child.name for child in children.all]
    injector = injector_of(children, action="kill", at_s=0.0, peer=both, for_s=0.01)
    assert len(injector.poll()) == 2
    assert [child.address for child in children.all] == [None, None]  # though they may take a while to die
    wait_until(injector.poll)
    # Nobody was there for the first of them, whose end is seen first; the second one has the first.
    [first] = [done.act.peer for done in injector.done[2:]]
    wait_until(injector.poll)
    [second] = set(both) - {first}
    assert [done.act.peer for done in injector.done[2:]] == [first, second]
    assert "/ip4/127.0.0.1/tcp/1" in read_proc(children.named(second).process.pid, "cmdline").decode()


def test_cut_without_cables_is_refused(children: Children) -> None:
    with pytest.raises(UsageError, match="cut: these peers have no cables"):
        injector_of(children, action="cut", at_s=0.0, peer="peer-1").poll()


def test_what_a_fault_stopped_is_resumed_to_leave(children: Children) -> None:
    victim = children.named("peer-1")
    injector_of(children, action="stop", at_s=0.0, peer="peer-1").poll()
    children.close()
    assert victim.process.returncode == -2
    assert not os.path.exists(f"/proc/{victim.process.pid}")
