"""The Containerfile's RUN lines in a fresh environment, and a seed there as the image's user would run it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.containerfile import Image, read_instructions
from tests.swarm.places import LEAVE_S, Place

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    image = Image(root=tmp_path_factory.mktemp("image"), context=ROOT)
    image.build(read_instructions(ROOT / "peers" / "Containerfile"))
    return image


@pytest.fixture
def place(image: Image) -> Iterator[Place]:
    place = Place()
    place.command = (str(image.bin / "p2p-diloco"),)
    place.working_folder = image.inside(".")
    place.environment = image.environment | {"TMPDIR": str(place.temporary)}
    yield place
    place.clear()


def test_a_seed_is_the_same_one_after_a_restart(place: Place, image: Image) -> None:
    """All that it needs for that lies in the folder that is kept."""
    addresses = []
    for name in ("first", "second"):
        seed = place.start(name, "seed", str(place.run_file), "--host-maddrs", "/ip4/127.0.0.1/tcp/0")
        addresses.append(seed.address)
        assert str(image.root / "venv" / "lib") in " ".join(place.alive().values())
        seed.process.send_signal(signal.SIGTERM)
        assert seed.process.wait(LEAVE_S) == 0, seed.text
        assert "Traceback" not in seed.text
    first, second = (address.rpartition("/p2p/")[2] for address in addresses)
    assert first == second
    assert (image.root / "keep" / "peer" / "identity.key").exists()
    place.assert_nothing_left()
