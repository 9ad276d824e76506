"""The loop of the library's page, as a user would run it: beside a peer of the command, in a swarm of processes."""

from __future__ import annotations

import re

from p2p_diloco.core.event import PeerLeft
from tests.swarm.places import Place, wait_until
from tests.test_library import CODE


def test_the_loop_of_the_page_trains_with_a_peer_of_the_command_and_leaves_politely() -> None:
    place = Place(inner_steps=10)
    try:
        (place.root / "loop.py").write_text(CODE[0], encoding="utf-8")
        seed = place.seed()
        peer = place.peer("peer", seed.address)
        own = ["--initial-peers", seed.address, "--folder", str(place.root / "own"), "--data", str(place.root / "text")]
        loop = place.run("own", str(place.root / "loop.py"), *own)
        wait_until(lambda: len(re.findall(r"^outer step \d+ of 100000: group of 2, loss ", loop.text, re.M)) >= 2, loop)
        for program in (loop, peer, seed):
            assert program.interrupt() == 0, program.text
        assert "Traceback" not in loop.text
        assert len(place.committed("own")) >= 2
        place.check_heads("own", "peer")
        assert [event.reason for event in place.events("own", PeerLeft)] == ["KeyboardInterrupt"]
        assert place.alive() == {}
        left = [path.name for path in place.temporary.iterdir()]
        assert [name for name in left if not name.startswith("torchinductor_")] == []  # which is torch's own
    finally:
        place.clear()
