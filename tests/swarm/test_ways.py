"""Which way a stream takes between homes, with real nodes in an internet of namespaces."""

from __future__ import annotations

import ipaddress
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.internet import BOTH, IPV6, Internet, Node, why_no_internet
from p2p_diloco.core.addresses import address_of
from p2p_diloco.core.identity import Identity
from p2p_diloco.lab.namespaces import PORT

WHY_NOT = why_no_internet()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"no internet: {WHY_NOT}")
LIMIT_S = 150.0
"""Of one node's life. It takes p2pd some 15 s to find out that nobody reaches it, and to get a place at a relay."""


class Caller:
    """A node in a namespace."""

    def __init__(self, process: subprocess.Popen[str], peer_id: str) -> None:
        self.process, self.peer_id = process, peer_id
        self.at: list[str] = []

    def read(self) -> dict[str, Any]:
        """What it says next; its addresses are kept."""
        assert self.process.stdout is not None
        words: dict[str, Any] = json.loads(self.process.stdout.readline())
        self.at = words.get("at", self.at)
        return words

    def word(self, key: str) -> dict[str, Any]:
        """What it says of ``key`` next."""
        while key not in (words := self.read()):
            pass
        return words

    def call(self, other: Caller) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"call": [other.peer_id, other.at]}) + "\n")
        self.process.stdin.flush()
        while not {"small", "error"} & (words := self.read()).keys():
            pass
        return words


@contextmanager
def caller(node: Node, folder: Path, *initial_peers: str, **config: Any) -> Iterator[Caller]:
    """A node that runs, and has told its addresses."""
    folder.mkdir()
    peer_id = Identity.load_or_create(folder / "identity.key").peer_id
    config["initial_peers"] = initial_peers
    words = (*node.enter, sys.executable, "-m", "tests.support.caller", str(folder), json.dumps(config))
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    limit = threading.Timer(LIMIT_S, process.kill)  # who reads from it then finds its end
    limit.start()
    try:
        one = Caller(process, peer_id)
        one.word("at")
        yield one
    finally:
        process.communicate(timeout=30.0)
        limit.cancel()


def ips(maddrs: list[str]) -> list[str]:
    return [str(address_of(maddr)) for maddr in maddrs]


def ip6(node: Node) -> str:
    """As it is written mostly."""
    return str(ipaddress.ip_address(node.address6))


def test_by_default_a_peer_is_where_its_machine_is_and_neighbours_need_no_router(tmp_path: Path) -> None:
    with Internet() as internet, ExitStack() as running:
        host = internet.host("host", families=BOTH)
        only = internet.host("only", families=IPV6)
        router = internet.router("router")
        home, neighbour = internet.home("home", router), internet.home("neighbour", router)
        router.forward(PORT, home)
        home.run("ip link add docker0 type bridge")
        home.run("ip addr add 172.17.0.1/16 dev docker0")
        home.run("ip link set docker0 up")
        first = running.enter_context(caller(host, tmp_path / "host"))
        assert ips(first.at) == [host.address, ip6(host)]
        assert len({maddr.split("/")[4] for maddr in first.at}) == 1, "one port for both"
        second = running.enter_context(caller(only, tmp_path / "only", *first.at))
        assert ips(second.at) == [ip6(only)]
        where = {"host_maddrs": [f"/ip4/0.0.0.0/tcp/{PORT}"], "announce_maddrs": [f"/ip4/{router.address}/tcp/{PORT}"]}
        forwarded = running.enter_context(caller(home, tmp_path / "home", *first.at, **where))
        assert ips(forwarded.at) == [router.address, home.address]
        beside = running.enter_context(caller(neighbour, tmp_path / "neighbour", *first.at))
        assert beside.call(forwarded)["small"]
        came = forwarded.word("came")
        assert came == {"came": neighbour.address, "relayed": False}


def test_no_part_goes_through_a_relay(tmp_path: Path) -> None:
    with Internet() as internet, ExitStack() as running:
        host = internet.host("host")
        homes = [internet.home(name, internet.router(f"router of {name}")) for name in ("home", "other")]
        seed = running.enter_context(caller(host, tmp_path / "host"))
        one, other = (running.enter_context(caller(home, tmp_path / home.name, *seed.at)) for home in homes)
        while not any("/p2p-circuit/" in maddr for maddr in one.at):
            one.read()
        answer = other.call(one)
        assert (answer["relayed"], answer["small"]) == (True, True)
        assert "through a relay, which carries small messages only" in answer["bulk"]
        assert one.word("came") == {"came": "", "relayed": True}
        assert other.call(seed) == {"relayed": False, "small": True, "bulk": ""}
