"""The internet of homes that swarms are tried in: what its routers and lines do to connections."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from benchmarks.internet import BOTH, IPV6, Internet, Line, Node, why_no_internet
from p2p_diloco.lab.child import children_of

WHY_NOT = why_no_internet()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"no internet: {WHY_NOT}")
PORT = 4001
LISTEN = """
import socket, sys  # tells who has come, and gives back what it sends
listening = socket.create_server(("::", int(sys.argv[1])), family=socket.AF_INET6, dualstack_ipv6=True)
print("listens", flush=True)
while True:
    talk, (address, port, *_) = listening.accept()
    print(address.removeprefix("::ffff:"), port, flush=True)
    with talk:
        while data := talk.recv(65536):
            talk.sendall(data)
"""
DIAL = """
import socket, sys, time
_, address, port, own_port, size = sys.argv
family = socket.AF_INET6 if ":" in address else socket.AF_INET
with socket.socket(family) as dialled:
    dialled.settimeout(3)
    dialled.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    dialled.bind(("", int(own_port)))
    began_s = time.monotonic()
    try:
        dialled.connect((address, int(port)))
    except TimeoutError:
        print("silence")
    except ConnectionRefusedError:
        print("refused")
    else:
        for _ in range(int(size) // 1000):
            dialled.sendall(bytes(1000))
        dialled.shutdown(socket.SHUT_WR)
        dialled.settimeout(30)
        while dialled.recv(65536):
            pass
        print(time.monotonic() - began_s)
"""
TALK = """
import socket, sys  # a line in is sent, and what comes back is a line out
with socket.create_connection((sys.argv[1], int(sys.argv[2])), 3) as talk:
    print("connected", flush=True)
    for line in sys.stdin:
        talk.sendall(line.encode())
        try:
            print(talk.recv(100).decode().strip(), flush=True)
        except ConnectionResetError:
            print("reset", flush=True)
"""
TELL = """
import socket, sys  # a line in is sent to who has come
with socket.create_server(("", int(sys.argv[1]))) as listening:
    print("listens", flush=True)
    talk, _ = listening.accept()
    for line in sys.stdin:
        talk.sendall(line.encode())
        print("told", flush=True)
"""
HEAR = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), 3) as talk:
    try:
        while data := talk.recv(100):
            print(data.decode().strip(), flush=True)
    except TimeoutError:
        print("silence", flush=True)
"""


@pytest.fixture
def internet() -> Iterator[Internet]:
    with Internet() as made:
        yield made


@contextmanager
def listening(node: Node, port: int = PORT) -> Iterator[subprocess.Popen[str]]:
    command = [*node.enter, sys.executable, "-I", "-c", LISTEN, str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        try:
            assert line(program) == "listens"
            yield program
        finally:
            program.kill()


def line(program: subprocess.Popen[str]) -> str:
    assert program.stdout is not None
    return program.stdout.readline().strip()


def dial(source: Node, address: str, port: int = PORT, *, own_port: int = 0, size: int = 0) -> str:
    command = [*source.enter, sys.executable, "-I", "-c", DIAL, address, str(port), str(own_port), str(size)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_who_is_behind_a_router_is_seen_with_its_address_and_cannot_be_dialled(internet: Internet) -> None:
    host, router = internet.host("host"), internet.router("router")
    home = internet.home("home", router)
    with listening(host) as seen, listening(home):
        dial(home, host.address)
        assert line(seen).split()[0] == router.address
        assert dial(host, home.address) == "silence"
        assert dial(host, router.address) == "refused", "by the router itself"


def test_a_port_that_is_forwarded_leads_home(internet: Internet) -> None:
    host, router = internet.host("host"), internet.router("router")
    home = internet.home("home", router)
    router.forward(PORT, home)
    with listening(home) as seen:
        assert float(dial(host, router.address)) > 0
        assert line(seen).split()[0] == host.address


def test_two_behind_one_router_have_one_address_and_reach_each_other(internet: Internet) -> None:
    host, router = internet.host("host"), internet.router("router")
    homes = [internet.home(name, router) for name in ("one", "other")]
    with listening(host) as seen, listening(homes[1]) as seen_at_home:
        for home in homes:
            dial(home, host.address)
            assert line(seen).split()[0] == router.address
        dial(homes[0], homes[1].address)
        assert line(seen_at_home).split()[0] == homes[0].address


def test_of_two_routers_the_outer_one_is_seen_and_neither_lets_anybody_in(internet: Internet) -> None:
    host, provider = internet.host("host"), internet.router("provider")
    router = internet.router("router", behind=provider)
    home = internet.home("home", router)
    assert router.address.startswith("100.64.")
    router.forward(PORT, home)
    with listening(host) as seen, listening(home):
        dial(home, host.address)
        assert line(seen).split()[0] == provider.address
        assert dial(host, router.address) == "silence", "what is forwarded behind a provider's router leads nowhere"


def test_a_router_keeps_ports_or_gives_any(internet: Internet) -> None:
    host = internet.host("host")
    kept, random = internet.router("kept"), internet.router("random", translation="random ports")
    ports = []
    with listening(host) as seen:
        for router in (kept, random):
            dial(internet.home(f"at-{router.name}", router), host.address, own_port=5000)
            ports.append(int(line(seen).split()[1]))
    assert ports[0] == 5000
    assert ports[1] != 5000


def test_ipv6_needs_no_translation_and_a_router_lets_nobody_in_over_it_neither(internet: Internet) -> None:
    host, router = internet.host("host", families=IPV6), internet.router("router", families=BOTH)
    home = internet.home("home", router)
    with listening(host) as seen, listening(home):
        dial(home, host.address6)
        assert line(seen).split()[0] == home.address6
        assert dial(host, home.address6) == "silence"


def test_a_new_address_cuts_what_is_open_and_is_seen_from_then_on(internet: Internet) -> None:
    host, router = internet.host("host"), internet.router("router")
    home = internet.home("home", router)
    old = router.address
    with listening(host) as seen, talking(home, host.address) as talk:
        assert line(seen).split()[0] == old
        assert say(talk, "hello") == "hello"
        router.change_address()
        assert say(talk, "hello") == "reset", "the other end knows nobody of that address"
    with listening(host) as seen:
        dial(home, host.address)
        assert line(seen).split()[0] == router.address != old


def test_a_router_forgets_what_is_silent_for_long_and_lets_its_other_end_in_no_more(internet: Internet) -> None:
    host, router = internet.host("host"), internet.router("router")
    home = internet.home("home", router)
    router.forget_after(1)
    told = [*host.enter, sys.executable, "-I", "-c", TELL, str(PORT)]
    heard = [*home.enter, sys.executable, "-I", "-c", HEAR, host.address, str(PORT)]
    with subprocess.Popen(told, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as teller:
        assert line(teller) == "listens"
        with subprocess.Popen(heard, stdout=subprocess.PIPE, text=True) as hearer:
            assert say(teller, "early") == "told"
            assert line(hearer) == "early"
            while router.remembers(home):
                time.sleep(0.1)
            assert say(teller, "late") == "told"
            assert line(hearer) == "silence"
            teller.kill()


@contextmanager
def talking(source: Node, address: str) -> Iterator[subprocess.Popen[str]]:
    command = [*source.enter, sys.executable, "-I", "-c", TALK, address, str(PORT)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        try:
            assert line(program) == "connected"
            yield program
        finally:
            program.kill()


def say(talk: subprocess.Popen[str], text: str) -> str:
    assert talk.stdin is not None
    talk.stdin.write(f"{text}\n")
    talk.stdin.flush()
    return line(talk)


def test_a_line_is_as_slow_and_as_far_as_it_says(internet: Internet) -> None:
    near = internet.host("near")
    far = internet.host("far", Line(delay_s=0.05))
    narrow = internet.host("narrow", Line(up_mbit=4.0))
    with listening(near):
        assert float(dial(far, near.address)) >= 0.2, "two round trips: one to connect, and one to end"
        assert float(dial(narrow, near.address, size=1_000_000)) >= 8_000_000 / 4e6 * 0.9


def test_nothing_is_left() -> None:
    before = set(children_of(os.getpid()))
    with Internet() as internet:
        internet.home("home", internet.router("router", Line(delay_s=0.01)))
        assert set(children_of(os.getpid())) > before
    assert set(children_of(os.getpid())) == before
