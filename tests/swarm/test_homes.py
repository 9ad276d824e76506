"""Swarms in an internet of homes: every situation of ``benchmarks homes`` can be made, and one of them is played."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.churn import SMALL
from benchmarks.homes import Places, play, run_made
from benchmarks.internet import Internet, why_no_internet
from benchmarks.situations import PEERS, SITUATIONS, Situation, clients
from p2p_diloco.core.runfile import InnerSpec
from p2p_diloco.lab.children import SEED
from p2p_diloco.lab.namespaces import LISTEN

WHY_NOT = why_no_internet()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"no internet: {WHY_NOT}")
LIMIT_S = 240.0
"""On a machine that does other things, too; by itself, one of two cores takes 30."""
BIND = """
import socket, sys
for maddr in sys.argv[1:]:
    _, family, address, _, port = maddr.split("/")
    socket.socket({"ip4": socket.AF_INET, "ip6": socket.AF_INET6}[family]).bind((address, int(port)))
print("bound")
"""


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.name)
def test_all_can_listen_where_their_homes_are(situation: Situation) -> None:
    with Internet() as internet:
        homes = situation.lay(internet)
        assert sorted(homes) == sorted([SEED, *PEERS])
        for name in homes:
            place = Places(homes).add(name)
            assert place.options[0] == LISTEN
            maddrs = [option for option in place.options[1:3] if option.startswith("/")]
            command = [*place.enter, sys.executable, "-I", "-S", "-c", BIND, *maddrs]
            assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "bound\n"
        if situation.happens is not None:
            situation.happens(homes)


def test_homes_that_let_nobody_in_contribute_beside_a_public_trainer() -> None:
    situation = next(situation for situation in SITUATIONS if situation.lay is clients)
    spec = SMALL.model_copy(update={"inner": InnerSpec(steps=20)})
    with run_made(spec) as seed:
        figures = play(situation, seed, LIMIT_S, spec=spec, updates=2)
    assert figures.updates >= 2
    assert min(figures.shares.values()) > 0.0
    assert None not in figures.joined_s.values()
    ways = [path.split()[0] for path in figures.paths.values()]  # to how many, in one moment, tells nothing
    assert ways == ["direct", "client", "client", "client"]
