"""Real processes of which only the owner's seed can be dialled, as where all who train are behind home routers."""

from __future__ import annotations

from p2p_diloco.core.event import RoundEnded
from tests.swarm.places import START_S, Place, Program, wait_until

NAMES = ["a", "b"]


def test_homes_train_together_as_long_as_the_owners_seed_is_there() -> None:
    """Nobody dials them; the seed dies, and comes back at its address."""
    place = Place()
    try:
        train_and_lose_the_seed(place)
    finally:
        place.clear()


def train_and_lose_the_seed(place: Place) -> None:
    seed = place.seed()
    owner = seed.address.rpartition("/p2p/")[2]
    homes = [home(place, name, seed.address) for name in NAMES]

    def step() -> int:
        return min(map(place.step_of, NAMES))

    def alone() -> bool:
        return all(place.events(name, RoundEnded)[-1].reason == "alone" for name in NAMES)

    wait_until(lambda: step() >= 2, seed, *homes, limit_s=START_S)
    seed.process.kill()
    seed.process.wait()
    wait_until(alone, *homes)
    port = seed.address.split("/")[4]
    again = place.seed(**{"host-maddrs": f"/ip4/127.0.0.1/tcp/{port}"})
    before = step()
    wait_until(lambda: step() >= before + 2, again, *homes, limit_s=START_S)

    made = [ended for name in NAMES for ended in place.events(name, RoundEnded) if ended.committed]
    assert {ended.helper for ended in made} == {owner}
    assert {len(ended.group) for ended in made} == {2}
    mine, theirs = map(place.committed, NAMES)
    assert all(mine[at] == theirs[at] for at in mine.keys() & theirs.keys())
    for program in (*homes, again):
        assert program.interrupt() == 0, program.text


def home(place: Place, name: str, address: str) -> Program:
    own = ("--data", str(place.root / "text"), "--threads", "1", "--device", "cpu", "--name", name)
    return place.start(
        name, "peer", "--initial-peers", address, "--client-mode", "--folder", str(place.root / name), *own
    )
