"""A monitor beside a swarm of real processes: what it shows, whom it outlives, and how it ends itself."""

from __future__ import annotations

import json
import signal
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from p2p_diloco.core.event import PeerStarted, ThetaEvaluated
from tests.support import chromium
from tests.swarm.places import LEAVE_S, Place, Program, descendants, free_port, url_of, wait_until

SEEN_S = 90.0
"""For a change to be seen: a record lives 30 s, is read every 2.5 s, and this machine does other things, too."""
NAMES = {"ada": "Ada", "bob": "<script>harm = 1</script>", "eve": "\u202egnp.", "new": "new"}
"""Folder -> name."""


def monitor_of(place: Place, address: str, name: str = "monitor") -> Program:
    flags = ["--initial-peers", address, "--listen", str(free_port()), "--folder", str(place.root / name)]
    return place.start(name, "monitor", *flags)


def seed_of(place: Place, host_maddr: str) -> Program:
    flags = ["--folder", str(place.root / "seed"), "--host-maddrs", host_maddr, "--name", "seed"]
    return place.start("seed", "seed", str(place.run_file), *flags)


def peer_of(place: Place, address: str, folder: str) -> Program:
    flags = ["--folder", str(place.root / folder), "--host-maddrs", "/ip4/127.0.0.1/tcp/0", "--device", "cpu"]
    flags += ["--data", str(place.root / "text"), "--threads", "1", "--name", NAMES[folder]]
    return place.start(folder, "peer", "--initial-peers", address, *flags)


def get(url: str, path: str) -> str:
    with urllib.request.urlopen(url + path, timeout=10) as answer:
        return str(answer.read().decode())


class Scrape:
    """One answer of /metrics."""

    def __init__(self, url: str) -> None:
        families = text_string_to_metric_families(get(url, "metrics"))
        samples = [sample for family in families for sample in family.samples]
        self.values: dict[str, dict[str, float]] = {}
        for sample in samples:
            name = sample.name.removeprefix("p2p_diloco_swarm_")
            self.values.setdefault(name, {})[sample.labels.get("peer") or sample.labels.get("state", "")] = sample.value
        self.names = {s.labels["peer"]: s.labels["name"] for s in samples if s.name.endswith("peer_info")}

    def __getitem__(self, name: str) -> float:
        return self.values[name][""]

    def check_aggregates(self) -> None:
        assert sum(self.values["peers"].values()) == len(self.names)
        assert self["tokens"] == sum(self.values["peer_tokens"].values())
        assert self["tokens_per_second"] == pytest.approx(sum(self.values["peer_tokens_per_second"].values()))
        assert self["outer_step"] in self.values["peer_outer_step"].values()
        assert self["heads"] == 1
        for series in self.values.values():
            assert set(series) <= {*self.names, "", "training", "round", "joining", "seed"}


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    place = Place()
    yield place
    place.clear()


@pytest.fixture(scope="module")
def seed(place: Place) -> Program:
    return seed_of(place, f"/ip4/127.0.0.1/tcp/{free_port()}")


@pytest.fixture(scope="module")
def peers(place: Place, seed: Program) -> dict[str, Program]:
    programs = {folder: peer_of(place, seed.address, folder) for folder in ("ada", "bob", "eve")}
    wait_until(lambda: all(place.step_of(folder) >= 1 for folder in programs), *programs.values())
    return programs


@pytest.fixture(scope="module")
def monitor(place: Place, peers: dict[str, Program]) -> Program:
    """It is started with one address, of a peer that will be killed."""
    return monitor_of(place, peers["bob"].address)


def test_it_shows_everybody_as_they_see_themselves(place: Place, seed: Program, monitor: Program) -> None:
    url = url_of(monitor)
    wait_until(lambda: len(Scrape(url).names) == 4, monitor, limit_s=SEEN_S)
    scrape = Scrape(url)
    scrape.check_aggregates()
    assert sorted(scrape.names.values()) == sorted(["Ada", "<script>harm = 1</script>", "gnp.", "seed"])
    ids = {place.events(folder, PeerStarted)[-1].peer_id for folder in ("ada", "bob", "eve", "seed")}
    assert set(scrape.names) == ids
    first = scrape["outer_step"]
    wait_until(lambda: Scrape(url)["outer_step"] >= first + 2, monitor, limit_s=SEEN_S)
    status = json.loads(get(url, "api/status.json"))
    evaluated = {event.step: event.held_out_loss for folder in NAMES for event in place.events(folder, ThetaEvaluated)}
    shown = {
        step: loss for step, loss in zip(status["curve"]["step"], status["curve"]["held_out_loss"]) if loss is not None
    }
    assert shown
    assert shown == {step: evaluated[step] for step in shown}
    assert status["join_line"].startswith("p2p-diloco peer --initial-peers /ip4/127.0.0.1/tcp/")
    assert json.loads(get(url, "sd")) == []


@pytest.mark.skipif(chromium.PROGRAM is None, reason="Chromium is not installed")
def test_the_page_shows_the_running_swarm(monitor: Program) -> None:
    url = url_of(monitor)
    with chromium.new_page() as page:
        page.open(url)
        page.wait_for("document.querySelectorAll('#rows tbody tr').length === 4", limit_s=SEEN_S)
        page.wait_for("document.querySelector('#curve canvas') !== null", limit_s=SEEN_S)
        page.value("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        rows = "document.querySelectorAll('#curve tbody tr').length"
        before = page.wait_for(rows)
        page.wait_for(f"{rows} >= {before + 2}", limit_s=SEEN_S)
        text: str = page.value("document.getElementById('rows').innerText")
        assert all(name in text for name in ("Ada", "<script>harm = 1</script>", "gnp.", "seed"))
        assert page.value("typeof harm") == "undefined"
        assert page.complaints == []


def test_a_killed_peers_series_end_and_the_others_count(
    place: Place, peers: dict[str, Program], monitor: Program
) -> None:
    url = url_of(monitor)
    killed = place.events("bob", PeerStarted)[-1].peer_id
    assert killed in Scrape(url).names
    peers["bob"].process.kill()
    wait_until(lambda: killed not in Scrape(url).names, monitor, limit_s=SEEN_S)
    scrape = Scrape(url)
    scrape.check_aggregates()
    assert sorted(scrape.names.values()) == ["Ada", "gnp.", "seed"]
    assert killed not in get(url, "metrics") + get(url, "api/status.json")


def test_it_outlives_the_peer_it_was_started_with(place: Place, seed: Program, monitor: Program) -> None:
    """Nobody is left of its initial peers; who comes now is seen."""
    url = url_of(monitor)
    peer_of(place, seed.address, "new")
    wait_until(lambda: "new" in Scrape(url).names.values(), monitor, limit_s=SEEN_S)


def test_the_swarm_vanishes_and_comes_back(place: Place, seed: Program, monitor: Program) -> None:
    url = url_of(monitor)
    step = Scrape(url)["outer_step"]
    programs = [program for program in place.programs if program is not monitor and program.process.poll() is None]
    for program in programs:
        program.process.send_signal(signal.SIGINT)
    for program in programs:
        program.process.wait(SEEN_S)
    wait_until(lambda: Scrape(url)["up"] == 0, monitor, limit_s=SEEN_S)
    blind = Scrape(url)
    assert blind["outer_step"] >= step
    assert not blind.names
    assert get(url, "healthz").startswith("200")
    seed_of(place, seed.address.partition("/p2p/")[0])
    wait_until(lambda: list(Scrape(url).names.values()) == ["seed"], monitor, limit_s=SEEN_S)
    peer_of(place, seed.address, "ada")
    wait_until(lambda: sorted(Scrape(url).names.values()) == ["Ada", "seed"], monitor, limit_s=SEEN_S)
    assert Scrape(url)["up"] == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_leave_it_does_and_leaves_nothing(place: Place, seed: Program, number: signal.Signals) -> None:
    program = monitor_of(place, seed.address, f"asked-{number.name}")
    get(url_of(program), "metrics")
    pids = [program.process.pid, *descendants(program.process.pid)]
    assert len(pids) >= 3, "itself, p2pd and its guard"
    program.process.send_signal(number)
    assert program.process.wait(LEAVE_S) == 0, program.text
    assert "Traceback" not in program.text
    assert program.gone(pids)
    assert sorted(path.name.partition("-")[0] for path in (place.root / program.name).iterdir()) == [
        "history",
        "identity.key",
    ]


def test_killed_it_leaves_nothing(place: Place, seed: Program) -> None:
    program = monitor_of(place, seed.address, "killed")
    url_of(program)
    pids = [program.process.pid, *descendants(program.process.pid)]
    program.process.kill()
    program.process.wait()
    wait_until(lambda: program.gone(pids), program, limit_s=5.0)
    assert [path for path in (place.root / "killed").rglob("*") if path.is_socket()] == []


def test_asked_to_leave_while_it_starts(place: Place, seed: Program) -> None:
    program = monitor_of(place, seed.address, "early")
    wait_until(lambda: descendants(program.process.pid), program)
    program.process.send_signal(signal.SIGTERM)
    assert program.process.wait(LEAVE_S) == 0, program.text
    assert "Traceback" not in program.text


def test_of_all_this_nothing_is_left(place: Place) -> None:
    for program in place.programs:
        if program.process.poll() is None:
            program.process.send_signal(signal.SIGINT)
    for program in place.programs:
        program.process.wait(SEEN_S)
    place.assert_nothing_left()
