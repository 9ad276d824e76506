"""A real Prometheus, as ``monitoring/`` configures it, beside four peers and a monitor: every query of the dashboards
and every rule finds data, and the data are right."""

from __future__ import annotations

import json
import math
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

import monitoring
from p2p_diloco.core.event import Event, InnerStepEnded, PeerStarted, ThetaEvaluated, of_kind
from p2p_diloco.core.events import EVENTS_FILE, read_events
from p2p_diloco.lab.outcome import outcome_of
from tests.swarm.places import Place, Program, wait_until

FOLDER = Path(monitoring.__file__).parent
PROMETHEUS, PROMTOOL = shutil.which("prometheus"), shutil.which("promtool")
pytestmark = pytest.mark.skipif(
    PROMETHEUS is None or PROMTOOL is None, reason="Prometheus is not installed; on Debian: apt-get install prometheus"
)

INTERVAL_S = 3
"""Between two scrapes. As shipped: 10."""
LAG_S = 20.0
"""From an event to its sample: a record is renewed every 8 s and read every 2.5 s, and the machine is busy."""
SEEN_S = 90.0
STATIC, ANNOUNCED = ("ada", "bob", "eve"), "new"
TRAINERS = (*STATIC, ANNOUNCED)
KILLED = "bob"

EMPTY = {
    "Joins": "nobody has come in the last minute",
    "Leaves": "nobody has gone in the last minute",
}
"""Queries that may be empty, and why. An alert's is, as long as nothing is wrong."""

Samples = dict[frozenset[tuple[str, str]], float]


def promtool(*arguments: str) -> None:
    assert PROMTOOL is not None
    done = subprocess.run([PROMTOOL, *arguments], cwd=FOLDER / "prometheus", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_configuration_is_sound() -> None:
    promtool("check", "config", "prometheus.yml")


def test_every_alert_is_silent_once_and_fires_once() -> None:
    promtool("test", "rules", "rules_test.yml")
    alerts = set(re.findall(r"alert: (\w+)", (FOLDER / "prometheus/rules.yml").read_text()))
    assert alerts == set(re.findall(r'alertname="(\w+)"', (FOLDER / "prometheus/rules_test.yml").read_text()))


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports: list[int] = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Scraper:
    """Prometheus with the shipped files, in which only addresses and intervals are others."""

    def __init__(self, folder: Path, replaced: dict[str, str]) -> None:
        assert PROMETHEUS is not None
        text = (FOLDER / "prometheus/prometheus.yml").read_text()
        for shipped, here in replaced.items():
            assert shipped in text
            text = text.replace(shipped, here)
        folder.mkdir()
        (folder / "prometheus.yml").write_text(text)
        shutil.copy(FOLDER / "prometheus/rules.yml", folder)
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}/api/v1/"
        self.output = folder / "output"
        command = [PROMETHEUS, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=output, stderr=subprocess.STDOUT
            )

    def get(self, path: str, **query: str) -> Any:
        url = f"{self.url}{path}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.loads(answer.read())["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{query}: {error.read().decode()}") from error

    def ask(self, expr: str, at_s: float | None = None) -> Samples:
        """Labels -> value, of all series at one moment."""
        found = self.get("query", query=expr, time=str(at_s or time.time()))
        if found["resultType"] == "scalar":
            return {frozenset(): float(found["result"][1])}
        return {frozenset(one["metric"].items()): float(one["value"][1]) for one in found["result"]}

    def by(self, label: str, expr: str, at_s: float) -> dict[str, float]:
        return {dict(labels)[label]: value for labels, value in self.ask(expr, at_s).items()}

    def number(self, expr: str, at_s: float) -> float:
        (value,) = self.ask(expr, at_s).values()
        return value


@dataclass(frozen=True)
class Swarm:
    place: Place
    prometheus: Scraper
    monitor: str
    """HOST:PORT, as those of the peers."""
    peers: dict[str, str]
    programs: dict[str, Program]

    @cached_property
    def ids(self) -> dict[str, str]:
        return {name: self.place.events(name, PeerStarted)[-1].peer_id for name in TRAINERS}

    def logs(self, until_s: float) -> dict[str, list[Event]]:
        paths = {name: next((self.place.root / name).glob(f"*/{EVENTS_FILE}")) for name in TRAINERS}
        return {name: [event for event in read_events(path) if event.wall_s <= until_s] for name, path in paths.items()}

    def query(self, expr: str, peer: str) -> Samples:
        """Of a panel, as Grafana would ask it."""
        values = {"$monitor": self.monitor, "$run": "test", "$peer": self.peers[peer], "$__rate_interval": "30s"}
        for variable, value in values.items():
            expr = expr.replace(variable, value)
        assert "$" not in expr
        return self.prometheus.ask(expr)

    def all_answered_s(self) -> float:
        """A moment, Unix time, at which the last scrape of everybody has succeeded."""

        def answered_s() -> float | None:
            now_s = time.time()
            return now_s if sum(self.prometheus.ask("up", now_s).values()) == len(TRAINERS) + 1 else None

        at_s: float = wait_until(answered_s, limit_s=SEEN_S)
        return at_s


def flags_of(name: str, endpoint: str) -> dict[str, str]:
    """Records of the one that is killed live for 15 s instead of 30: less to wait for."""
    return {"metrics-addr": endpoint, "patience": "0.5" if name == KILLED else "1"}


@pytest.fixture(scope="module")
def swarm() -> Iterator[Swarm]:
    place = Place(inner_steps=20, gather_s=1.0)
    ports = free_ports(len(TRAINERS) + 1)
    monitor = f"127.0.0.1:{ports.pop()}"
    # A name is announced, and so found by service discovery, where a loopback address is not.
    hosts = {name: socket.gethostname() if name == ANNOUNCED else "127.0.0.1" for name in TRAINERS}
    peers = {name: f"{hosts[name]}:{port}" for name, port in zip(TRAINERS, ports)}
    targets = '", "'.join(peers[name] for name in STATIC)
    replaced = {"127.0.0.1:9200": monitor, "127.0.0.1:9100": targets}
    replaced |= {f"{seconds}s": f"{INTERVAL_S}s" for seconds in (10, 30, 5)}
    scraper = None
    try:
        seed = place.seed()
        address = seed.address
        programs = {name: place.peer(name, address, **flags_of(name, peers[name])) for name in TRAINERS}
        watch = ["--initial-peers", address, "--listen", monitor, "--folder", str(place.root / "monitor")]
        programs["monitor"] = place.start("monitor", "monitor", "--private-targets", *watch)
        scraper = Scraper(place.root / "prometheus", replaced)
        wait_until(lambda: all(place.step_of(name) >= 4 for name in TRAINERS), seed, *programs.values())
        yield Swarm(place, scraper, monitor, peers, programs)
    finally:
        if scraper is not None:
            scraper.process.kill()
            scraper.process.wait()
        place.clear()


def panel_queries() -> Iterator[tuple[str, str]]:
    """(what it is for, PromQL)."""
    for path in sorted((FOLDER / "grafana/dashboards").glob("*.json")):
        board = json.loads(path.read_text())
        for variable in board["templating"]["list"][1:]:
            inner = re.fullmatch(r"(?:label_values|query_result)\((.+?)(?:, \w+)?\)", variable["query"])
            assert inner is not None
            yield f"{path.stem}: variable {variable['name']}", inner[1]
        for annotation in board.get("annotations", {}).get("list", []):
            yield annotation["name"], annotation["expr"]
        for panel in board["panels"]:
            for target in panel.get("targets", []):
                yield f"{path.stem}: {panel['title']}", target["expr"]


def test_every_query_of_every_panel_finds_data(swarm: Swarm) -> None:
    evaluator = next(name for name in TRAINERS if swarm.place.events(name, ThetaEvaluated))

    def found(expr: str) -> bool:
        return any(math.isfinite(value) for value in swarm.query(expr, evaluator).values())

    def missing() -> list[tuple[str, str]]:
        return [one for one in panel_queries() if one[0] not in EMPTY and not found(one[1])]

    deadline_s = time.monotonic() + SEEN_S
    while without := missing():
        assert time.monotonic() < deadline_s, without
        time.sleep(1.0)
    titles = {title for title, _ in panel_queries()}
    assert set(EMPTY) <= titles
    for title, expr in panel_queries():
        if title in EMPTY:
            swarm.query(expr, evaluator)  # empty or not, it is sound


def test_every_rule_finds_data_and_no_alert_fires(swarm: Swarm) -> None:
    wait_until(lambda: swarm.prometheus.ask("p2p_diloco_swarm:outer_step_seconds"), limit_s=SEEN_S)
    rules = [rule for group in swarm.prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert len(rules) == len(re.findall("- (?:alert|record):", (FOLDER / "prometheus/rules.yml").read_text()))
    for rule in rules:
        assert rule["health"] == "ok", rule
        for name in re.findall(r"\bp2p_diloco_[\w:]+|\bup\b", rule["query"]):
            assert swarm.prometheus.ask(name), f"{rule['name']}: {name} has no data"
        if rule["type"] == "alerting":
            assert rule["state"] != "firing", rule


def test_each_peer_is_scraped_once(swarm: Swarm) -> None:
    at_s = swarm.all_answered_s()
    assert len(swarm.prometheus.ask("up", at_s)) == len(TRAINERS) + 1
    assert set(swarm.prometheus.by("instance", "up", at_s)) == {swarm.monitor, *swarm.peers.values()}
    (announced,) = swarm.prometheus.ask('up{job="p2p-diloco-announced"}')
    assert dict(announced)["peer"] == swarm.ids[ANNOUNCED]
    assert dict(announced)["name"] == ANNOUNCED


def test_the_values_agree_with_the_summary(swarm: Swarm) -> None:
    """Samples of one moment, between what the event logs say of a little earlier and of that moment."""
    at_s = swarm.all_answered_s()
    late_s = at_s + 3.0  # an inner step that is counted may be logged a second later
    wait_until(lambda: all(log[-1].wall_s > late_s for log in swarm.logs(at_s + LAG_S).values()), limit_s=SEEN_S)
    ask, before, after = swarm.prometheus, swarm.logs(at_s - LAG_S), swarm.logs(late_s)
    least, most = outcome_of(before), outcome_of(after)
    assert least.outer_steps <= ask.number("p2p_diloco_swarm_outer_step", at_s) <= most.outer_steps
    assert most.identical
    assert ask.number("p2p_diloco_swarm_heads", at_s) == 1
    step = int(ask.number("p2p_diloco_swarm_held_out_step", at_s))
    assert ask.number("p2p_diloco_swarm_held_out_loss_nats", at_s) == dict(most.held_out)[step]
    missed = ask.number('sum(p2p_diloco_rounds_total{result!="committed"})', at_s)
    assert least.missed_rounds <= missed <= most.missed_rounds
    assert set(
        ask.by("name", "p2p_diloco_group_size * on (instance) group_left (name) p2p_diloco_peer_info", at_s)
    ) == {*TRAINERS}

    def tokens(log: list[Event]) -> int:
        return max((event.tokens for event in of_kind(log, InnerStepEnded)), default=0)

    own = ask.by("instance", "p2p_diloco_tokens_total", at_s)
    told = ask.by("peer", "p2p_diloco_swarm_peer_tokens", at_s)
    for name in TRAINERS:
        assert tokens(before[name]) <= own[swarm.peers[name]] <= tokens(after[name])
        assert tokens(before[name]) <= told[swarm.ids[name]] <= tokens(after[name])
    assert ask.number("p2p_diloco_swarm_tokens", at_s) == sum(told.values())


def listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1.0).close()
    except OSError:
        return False
    return True


def sees(swarm: Swarm, peer_id: str) -> bool:
    with urllib.request.urlopen(f"http://{swarm.monitor}/metrics", timeout=10) as answer:
        return peer_id in answer.read().decode()


def gone_after_two_scrapes(swarm: Swarm, expr: str) -> float:
    """The moment of it, Unix time."""
    at_s = time.time() + 2 * INTERVAL_S
    time.sleep(2 * INTERVAL_S + 0.5)
    assert not swarm.prometheus.ask(expr, at_s)
    return at_s


def test_a_killed_peers_series_end_and_the_aggregates_are_right(swarm: Swarm) -> None:
    ask, killed = swarm.prometheus, swarm.ids[KILLED]
    assert ask.ask(f'p2p_diloco_swarm_peer_info{{peer="{killed}"}}')
    swarm.programs[KILLED].process.kill()
    wait_until(lambda: not listens(swarm.peers[KILLED]), limit_s=SEEN_S)
    gone_after_two_scrapes(swarm, f'{{__name__=~"p2p_diloco_.*", instance="{swarm.peers[KILLED]}"}}')
    wait_until(lambda: not sees(swarm, killed), limit_s=SEEN_S)
    at_s = gone_after_two_scrapes(swarm, f'{{peer="{killed}"}}')
    assert set(ask.by("peer", "p2p_diloco_swarm_peer_tokens", at_s)) >= set(swarm.ids.values()) - {killed}
    assert ask.number('sum(p2p_diloco_swarm_peers{state!="seed"})', at_s) == len(TRAINERS) - 1
    for total in ("tokens", "tokens_per_second"):
        parts = ask.by("peer", f"p2p_diloco_swarm_peer_{total}", at_s)
        assert ask.number(f"p2p_diloco_swarm_{total}", at_s) == pytest.approx(sum(parts.values()))
    leaves = dict(panel_queries())["Leaves"].replace("offset 1m", "offset 30s")
    wait_until(lambda: swarm.query(leaves, KILLED), limit_s=SEEN_S)
