"""Networks of one's own: real ones, with a socket in each."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from p2p_diloco.lab.child import is_alive
from p2p_diloco.lab.namespaces import Namespace, Network, why_not

WHY_NOT = why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"no network namespaces: {WHY_NOT}")
DIAL = """
import socket, sys  # nobody listens on port 9: who is reached refuses
with socket.socket() as dialled:
    dialled.settimeout(0.4)
    try:
        dialled.connect((sys.argv[1], 9))
    except ConnectionRefusedError:
        print("reached")
    except TimeoutError:
        print("silence")
"""


def dial(source: Namespace, target: Namespace) -> str:
    command = [*source.enter, sys.executable, "-I", "-S", "-c", DIAL, target.address]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def reached(source: Namespace, target: Namespace) -> bool:
    """A moment after a cable is there again: who asked for an address in vain asks again a second later."""
    deadline_s = time.monotonic() + 10.0
    while dial(source, target) != "reached":
        if time.monotonic() > deadline_s:
            return False
    return True


def test_a_cut_cable_is_silent_in_both_directions_until_it_is_restored() -> None:
    with Network() as network:
        a, b, c = (network.add(name) for name in ("a", "b", "c"))
        assert reached(a, b)
        assert reached(b, a)
        assert reached(network.switch, a)
        network.cut("b")
        assert dial(a, b) == dial(b, a) == "silence"
        assert reached(a, c)
        network.restore("b")
        assert reached(a, b)
        assert reached(b, a)


def test_those_cut_off_together_reach_each_other_and_nobody_else() -> None:
    with Network() as network:
        a, b, c = (network.add(name) for name in ("a", "b", "c"))
        for name in ("b", "c"):
            network.cut_together(name, "island")
        assert reached(b, c)
        assert reached(c, b)
        assert dial(a, b) == dial(c, a) == "silence"
        network.restore("b")
        network.restore("c")
        assert reached(a, b)
        assert reached(c, a)


HELD = """
from p2p_diloco.lab.namespaces import Network
with Network() as network:
    print(network.add("a").holder.pid, network.switch.holder.pid, flush=True)
    input()
"""


def test_nothing_is_left_when_the_process_that_made_them_is_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HELD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as made:
        assert made.stdout is not None
        holders = [int(pid) for pid in made.stdout.readline().split()]
        assert len(holders) == 2
        assert all(map(is_alive, holders))
        made.kill()
    deadline_s = time.monotonic() + 5.0
    while any(map(is_alive, holders)):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
