"""The doctor in homes of every kind: what it says of the way in is right; its remedy, followed to the letter, works.

Each home is a machine in an internet of namespaces, where a seed runs. The doctor and the options of its remedies are
typed as a user types them; what a remedy asks of a router or a firewall is done there.
"""

from __future__ import annotations

import ipaddress
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from benchmarks.internet import BOTH, IPV4, IPV6, Families, Internet, Node, nft, why_no_internet
from tests.swarm.places import START_S, Place, Program

WHY_NOT = why_no_internet()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"no internet: {WHY_NOT}")
OPTIONS = re.compile(r"start with (--host-maddrs(?: /ip\S+)+ --announce-maddrs /ip\S+)")
"""That a remedy names."""
CLIENT = "start as you are (you contribute and receive, others average)"
USUAL_PORT = "4001"


@dataclass(frozen=True, kw_only=True)
class Scene:
    internet: Internet
    place: Place
    seed: Program
    addresses: list[str]
    """Of the seed, one of each family."""

    def reachable(self, home: Node, *options: str) -> str:
        """The doctor's line about the way in to ``home``. Then it is ended: the machine is the same everywhere."""
        command = (*home.enter, sys.executable, "-m", "p2p_diloco", "doctor", "--initial-peers", *self.addresses)
        doctor = subprocess.Popen(
            (*command, "--device", "cpu", *options),
            env=self.place.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        said: list[str] = []
        try:
            assert doctor.stdout is not None
            for line in iter(doctor.stdout.readline, ""):
                said.append(" ".join(line.split()))
                if "reachable" in line.split()[:2]:
                    return said[-1]
        finally:
            doctor.terminate()
            doctor.communicate(timeout=START_S)
        raise AssertionError(said)


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    place = Place()
    with Internet() as internet:
        host = internet.host("seed", families=BOTH)
        place.command = (*host.enter, *place.command)
        folder = str(place.root / "seed")
        seed = place.start("seed", "seed", str(place.run_file), "--folder", folder, "--host-maddrs", *host.maddrs)
        try:
            peer_id = seed.address.rpartition("/")[2]
            addresses = [f"{maddr}/p2p/{peer_id}" for maddr in host.maddrs]
            yield Scene(internet=internet, place=place, seed=seed, addresses=addresses)
            assert seed.interrupt() == 0, seed.text
        finally:
            place.clear()


def remedies(line: str) -> list[list[str]]:
    """The options of every remedy that names some."""
    return [found.split() for found in OPTIONS.findall(line)]


def check_reached(line: str, address: str) -> None:
    assert line.startswith("ok reachable"), line
    assert f"reaches you directly at {ipaddress.ip_address(address)}, port" in line, line


@pytest.mark.parametrize("families", [IPV4, IPV6])
def test_a_public_machine_needs_nothing(scene: Scene, families: Families) -> None:
    home = scene.internet.host(f"public {families}", families=families)
    check_reached(scene.reachable(home), home.address6 if families == IPV6 else home.address)


def test_behind_a_router_a_port_that_is_forwarded_is_a_way_in(scene: Scene) -> None:
    router = scene.internet.router("router", translation="random ports")
    home = scene.internet.home("home", router)
    line = scene.reachable(home)
    assert line.startswith("warning reachable nobody reaches you directly"), line
    assert f"its own address, {home.address}, is private: a router is between" in line
    assert CLIENT in line
    (options,) = remedies(line)
    assert options[-1] == f"/ip4/{router.address}/tcp/{USUAL_PORT}"
    router.forward(int(USUAL_PORT), home)
    check_reached(scene.reachable(home, *options), router.address)


def test_behind_a_provider_that_shares_addresses_no_port_is_offered(scene: Scene) -> None:
    router = scene.internet.router("own router", behind=scene.internet.router("provider"))
    line = scene.reachable(scene.internet.home("shared", router))
    assert line.startswith("warning reachable nobody reaches you directly"), line
    assert CLIENT in line


def test_a_firewall_is_opened(scene: Scene) -> None:
    """The machine has a public address, and takes itself for one that others can dial."""
    home = scene.internet.host("guarded")
    nft(home, "add table inet guard")
    nft(home, "add chain inet guard inward { type filter hook input priority 0; }")
    nft(home, "add rule inet guard inward iifname wan ct state new drop")
    line = scene.reachable(home)
    assert line.startswith("problem reachable nobody reaches you directly"), line
    assert "add --client-mode" in line
    (options,) = remedies(line)
    nft(home, f"insert rule inet guard inward tcp dport {USUAL_PORT} accept")
    check_reached(scene.reachable(home, *options), home.address)


@pytest.mark.parametrize("family", ["/ip4/", "/ip6/"])
def test_behind_a_router_with_ipv6_there_are_two_ways_in(scene: Scene, family: str) -> None:
    """Either of them alone: where both are open, others take the one that answers first."""
    router = scene.internet.router(f"router of both, {family}", families=BOTH)
    home = scene.internet.home(f"home of both, {family}", router)
    line = scene.reachable(home)
    assert line.startswith(("warning reachable nobody", "problem reachable nobody")), line
    found = remedies(line)
    assert len(found) == 2, line
    (options,) = [one for one in found if one[-1].startswith(family)]
    if family == "/ip6/":
        nft(router, f"insert rule inet guard inward ip6 daddr {home.address6} tcp dport {USUAL_PORT} accept")
        check_reached(scene.reachable(home, *options), home.address6)
    else:
        router.forward(int(USUAL_PORT), home)
        check_reached(scene.reachable(home, *options), router.address)
