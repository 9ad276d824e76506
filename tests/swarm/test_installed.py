"""What a user installs: the wheel, in a folder that is not the clone, makes a swarm and shows its page."""

from __future__ import annotations

import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urljoin

import pytest

from tests.support.wheel import ROOT, build_wheel
from tests.swarm.places import START_S, Place, free_port, url_of, wait_until

MEDIA_TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel is installed in, with the command in its ``bin``."""
    wheel, site = build_wheel(tmp_path_factory.mktemp("build")), tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-deps", "--no-index"]
    installed = subprocess.run([*pip, "--target", str(site), str(wheel)], capture_output=True, text=True)
    assert installed.returncode == 0, installed.stderr
    return site


@pytest.fixture
def place(site: Path) -> Iterator[Place]:
    """Its commands are those of the installed package, and are given far from the clone."""
    place = Place(inner_steps=10, gather_s=20.0, snapshot_every=2)
    place.command = (str(site / "bin" / "p2p-diloco"),)
    place.working_folder = place.root
    place.environment |= {"PYTHONPATH": str(site)}
    yield place
    place.clear()


def test_two_peers_and_a_monitors_page_from_the_wheel(place: Place, site: Path) -> None:
    where = [sys.executable, "-c", "import p2p_diloco; print(p2p_diloco.__file__)"]
    found = subprocess.run(where, cwd=place.root, env=place.environment, check=True, capture_output=True, text=True)
    assert Path(found.stdout.strip()) == site / "p2p_diloco" / "__init__.py"

    swarm = place.swarm(peers="2")
    flags = ["--initial-peers", swarm.address, "--listen", str(free_port()), "--folder", str(place.root / "monitor")]
    monitor = place.start("monitor", "monitor", *flags)
    check_page(url_of(monitor))
    wait_until(lambda: "outer step 2 of " in swarm.text, swarm, limit_s=2 * START_S)
    running = place.alive().values()
    assert any(str(site) in command for command in running)
    assert not [command for command in running if str(ROOT / "p2p_diloco") in command]

    for program in (monitor, swarm):
        assert program.interrupt() == 0, program.text
        assert "Traceback" not in program.text
    assert place.summary["identical"]
    assert place.summary["exit_codes"] == {"seed": 0, "peer-1": 0, "peer-2": 0}
    place.assert_nothing_left()


def check_page(url: str) -> None:
    """The page itself, all that it names, and all that its scripts import."""
    html = fetch(url, "text/html")
    names = re.findall(r'(?:href|src)="([\w.]+\.(?:js|css|svg))"', html)
    assert set(names) >= {"page.js", "style.css", "icon.svg", "uplot.js"}
    imported: list[str] = []
    for name in names:
        text = fetch(urljoin(url, name), MEDIA_TYPES[Path(name).suffix])
        assert text
        imported += re.findall(r'^import .* from "(\./[\w.]+)";', text, re.MULTILINE)
    assert set(imported) >= {"./chart.js", "./format.js"}
    assert all("export" in fetch(urljoin(url, name), "text/javascript") for name in imported)


def fetch(url: str, media_type: str) -> str:
    """HTTPError where it is not there."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        assert answer.headers.get_content_type() == media_type
        return str(answer.read().decode())
