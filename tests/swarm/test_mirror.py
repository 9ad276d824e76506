"""A seed without a run file, as a real process: it holds a run up that it does not own."""

from __future__ import annotations

from p2p_diloco.core.event import PeerJoined, RoundEnded
from tests.swarm.places import START_S, Place, Program, wait_until


def test_newcomers_join_at_a_mirror_and_the_run_is_not_its() -> None:
    """The seed is away when the second newcomer comes: it has its state from the mirror, or from the first."""
    place = Place(min_group=1)
    try:
        mirror_and_lose_the_seed(place)
        place.assert_nothing_left()
    finally:
        place.clear()


def mirror_and_lose_the_seed(place: Place) -> None:
    seed = place.seed()
    mirror = mirror_of(place, seed.address)
    first = place.peer("a", mirror.address)
    wait_until(lambda: place.step_of("a") >= 1, seed, mirror, first, limit_s=START_S)
    assert seed.interrupt() == 0, seed.text

    second = place.peer("b", mirror.address)
    wait_until(lambda: place.events("b", PeerJoined), mirror, first, second, limit_s=START_S)
    for program in (second, first):
        assert program.interrupt() == 0, program.text
    place.check_heads("a", "b")
    assert place.events("mirror", PeerJoined)
    assert not place.events("mirror", RoundEnded)
    assert {ended.helper for ended in place.events("a", RoundEnded)} == {None}
    assert mirror.interrupt() == 0, mirror.text


def mirror_of(place: Place, address: str) -> Program:
    folder = str(place.root / "mirror")
    return place.start(
        "mirror", "seed", "--initial-peers", address, "--folder", folder, "--host-maddrs", "/ip4/127.0.0.1/tcp/0"
    )
