"""The monitor on a DHT that is a list of records, with a clock that jumps; and the files of its page."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from p2p_diloco.core.errors import NetworkError
from p2p_diloco.core.records import MAX_RECORD_BYTES
from p2p_diloco.core.waiting import now_s
from p2p_diloco.look import monitor as monitor_module
from p2p_diloco.look.monitor import MAX_MET, MAX_SOUGHT, PAGE, Monitor, first_to_end, page_files
from p2p_diloco.wire.channel import Channel, run_protocol
from p2p_diloco.wire.state_messages import AskRevocations, RevocationList
from tests.support.builders import identity
from tests.support.fakes import FakeTransport, make_manifest
from tests.support.invited import OWNER, revocations_of, token_of
from tests.support.observed import FakeDHT, monitor_of
from tests.support.simloop import START_S, run_simulated


def text_of(monitor: Monitor, path: str) -> str:
    response = monitor.site(path)
    assert response is not None
    return response.body.decode()


def series(monitor: Monitor, metric: str) -> list[str]:
    return [line for line in text_of(monitor, "/metrics").splitlines() if line.startswith(f"p2p_diloco_swarm_{metric}")]


async def stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()


def test_a_peers_series_end_when_its_record_does(tmp_path: Path) -> None:
    async def main() -> None:
        dht = FakeDHT(peers={1: {"tokens": 100}, 2: {"tokens": 10}})
        monitor = monitor_of(dht, tmp_path)
        running = asyncio.create_task(monitor.run())
        await asyncio.sleep(3.0)
        assert series(monitor, "tokens ") == ["p2p_diloco_swarm_tokens 110.0"]
        assert len(series(monitor, "peer_tokens{")) == 2
        del dht.peers[1]
        await asyncio.sleep(dht.timeouts.record_life_s - 2 * dht.timeouts.refresh_s)
        assert len(series(monitor, "peer_tokens{")) == 2
        await asyncio.sleep(3 * dht.timeouts.refresh_s)
        assert series(monitor, "tokens ") == ["p2p_diloco_swarm_tokens 10.0"]
        assert identity(1).peer_id not in text_of(monitor, "/metrics") + text_of(monitor, "/api/status.json")
        await stop(running)

    run_simulated(main())


def test_a_peer_that_leaves_politely_is_gone_at_the_next_look(tmp_path: Path) -> None:
    async def main() -> None:
        dht = FakeDHT(peers={1: {}, 2: {}})
        monitor = monitor_of(dht, tmp_path)
        await monitor.look()
        dht.peers[1] = {"phase": "left"}
        await asyncio.sleep(1.0)
        await monitor.look()
        assert [row["peer"] for row in json.loads(text_of(monitor, "/api/status.json"))["rows"]] == [
            identity(2).peer_id
        ]

    run_simulated(main())


def test_the_swarm_vanishes_and_comes_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def main() -> None:
        dht = FakeDHT(peers={1: {}, 2: {}, 3: {"client_mode": True}})
        monitor = monitor_of(dht, tmp_path)
        running = asyncio.create_task(monitor.run())
        await asyncio.sleep(10.0)
        assert not dht.sought
        away, dht.peers, dht.garbage = dht.peers, {}, [b"garbage", dht.sealed(3)]
        await asyncio.sleep(100.0)
        assert series(monitor, "up") == ["p2p_diloco_swarm_up 0.0"]
        assert series(monitor, "outer_step ") == ["p2p_diloco_swarm_outer_step 2.0"]
        assert text_of(monitor, "/healthz").startswith("200")
        assert 6 <= len(dht.sought) <= 7, "from when the last record is out of date"
        assert set(dht.sought[-1]) == {identity(1).peer_id, identity(2).peer_id}
        dht.peers = away
        await asyncio.sleep(5.0)
        assert series(monitor, "up") == ["p2p_diloco_swarm_up 1.0"]
        await stop(running)

    run_simulated(main())
    lines = [record.getMessage() for record in caplog.records]
    assert [line.partition(": ")[2] for line in lines] == [
        "3 peers at outer step 2",
        "no peer any more",
        "3 peers at outer step 2",
    ]


def test_unsound_records_are_counted_and_change_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        dht = FakeDHT(peers={1: {}}, rejected=Counter({"signature": 2, "other": 1}))
        sound = dht.sealed(1)
        dht.garbage = [b"", sound[:-1] + bytes([sound[-1] ^ 1]), bytes(MAX_RECORD_BYTES + 1), b"\x80"]
        monitor = monitor_of(dht, tmp_path)
        await monitor.look()
        counts = {line.split('"')[1]: line.split()[-1] for line in series(monitor, "records_rejected_total")}
        assert counts == {
            "size": "1.0", "form": "2.0", "version": "0.0", "field": "0.0", "signature": "3.0",
            "seat": "0.0", "other": "1.0",
        }  # fmt: skip
        assert len(series(monitor, "peer_info")) == 1

    run_simulated(main())


def test_records_of_another_run_are_not_this_runs(tmp_path: Path) -> None:
    async def main() -> None:
        monitor = monitor_of(FakeDHT(peers={1: {"run_id": "0" * 40}}), tmp_path)
        await monitor.look()
        assert series(monitor, "up") == ["p2p_diloco_swarm_up 0.0"]

    run_simulated(main())


def test_a_revoked_peer_is_shown_no_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The owner's seed says in its record that it has a list, and is asked for it once; what another peer serves, which
    the owner has not signed, is not taken. Who was revoked from a later outer step on is shown until then."""
    caplog.set_level(logging.INFO)

    async def main() -> None:
        owner, run = OWNER, make_manifest(1000, np.zeros(1000, np.float32), OWNER, membership="invite")
        now, later = (token_of(name, key=2000 + i, run_id=run.run_id) for i, name in enumerate(("now", "later")))
        dht, steps = FakeDHT(manifest=run), {now.invitation.token: 2, later.invitation.token: 3}
        seats = {1: now.seat(identity(1).peer_id), 2: later.seat(identity(2).peer_id)}
        dht.peers = {i: {"seat": seat} for i, seat in seats.items()}
        asked = Counter[str]()

        def serve(index: int, sealed: bytes) -> None:
            async def handler(channel: Channel) -> None:
                await channel.receive(AskRevocations, timeout_s=10.0)
                asked[channel.peer_id] += 1
                await channel.send(RevocationList(sealed=sealed))

            peer = FakeTransport(dht.network, identity(index).peer_id, dht.timeouts)
            peer.handlers[run_protocol(run.run_id)] = handler
            dht.peers[index]["revocations"] = 5

        forged = revocations_of(steps, number=5, run_id=run.run_id, owner=identity(2))
        serve(2, forged)
        monitor = monitor_of(dht, tmp_path)
        await monitor.look()
        assert len(series(monitor, "peer_info")) == 2
        assert dht.traffic.rejected["misbehaved"] == 1
        dht.peers[1000] = {"role": "seed"}
        serve(1000, revocations_of(steps, number=5, run_id=run.run_id, owner=owner))
        for _ in range(3):
            await asyncio.sleep(dht.timeouts.refresh_s)
            await monitor.look()
            assert {row["name"] for row in json.loads(text_of(monitor, "/api/status.json"))["seats"]} == {"later"}
        assert asked[dht.peer_id] == 2, "each was asked once"
        for fields in dht.peers.values():
            fields.update(step=3, head=bytes([3]) * 32, heads=[])
        for _ in range(2):
            await asyncio.sleep(dht.timeouts.refresh_s)
            await monitor.look()
        assert [row["peer"] for row in json.loads(text_of(monitor, "/api/status.json"))["rows"]] == [owner.peer_id]

    run_simulated(main())
    assert "invitations that the run's owner has revoked: 2" in caplog.text


def test_it_remembers_some_addresses_and_dials_fewer(tmp_path: Path) -> None:
    async def main() -> None:
        dht = FakeDHT(peers={index: {} for index in range(1, MAX_MET + 20)})
        monitor = monitor_of(dht, tmp_path)
        await monitor.look()
        assert len(monitor.met) == MAX_MET
        await monitor.seek()
        assert len(dht.sought[-1]) == MAX_SOUGHT

    run_simulated(main())


def test_the_history_outlives_the_monitor(tmp_path: Path) -> None:
    async def main() -> None:
        dht = FakeDHT(peers={1: {"held_out_loss": 2.0, "held_out_step": 2}})
        monitor = monitor_of(dht, tmp_path)
        running = asyncio.create_task(monitor.run())
        await asyncio.sleep(61.0)
        assert monitor.history_path.exists(), "what a kill would leave"
        monitor.history_path.unlink()
        await stop(running)
        page = json.loads(text_of(monitor_of(dht, tmp_path), "/api/status.json"))
        assert page["curve"] == {"step": [2], "held_out_loss": [2.0], "loss": [None]}
        assert page["step_since_s"] == START_S

    run_simulated(main())


@pytest.mark.parametrize("private", [False, True])
def test_targets_in_a_private_network_are_there_when_that_is_asked_for(tmp_path: Path, private: bool) -> None:
    async def main() -> None:
        dht = FakeDHT(peers={1: {"metrics_addr": "1.1.1.1:9100"}, 2: {"metrics_addr": "10.0.0.1:9100"}})
        monitor = monitor_of(dht, tmp_path, private_targets=private)
        await monitor.look()
        listed = [target for group in json.loads(text_of(monitor, "/sd")) for target in group["targets"]]
        assert sorted(listed) == ["1.1.1.1:9100", *["10.0.0.1:9100"] * private]

    run_simulated(main())


@pytest.mark.parametrize(("peers", "every_s"), [(2, 2.5), (150, 2.5), (300, 5.0), (500, 8.0)])
def test_many_peers_are_looked_at_less_often(tmp_path: Path, peers: int, every_s: float) -> None:
    async def main() -> None:
        dht = FakeDHT(peers={index: {} for index in range(1, peers + 1)})
        monitor, look_up, looks = monitor_of(dht, tmp_path), dht.look_up, []

        async def counted(key: str) -> list[bytes]:
            looks.append(now_s())
            return await look_up(key)

        dht.look_up = counted  # type: ignore[method-assign]
        running = asyncio.create_task(monitor.run())
        await asyncio.sleep(2 * every_s + 1.0)
        assert looks == [START_S, START_S + every_s, START_S + 2 * every_s]
        await stop(running)

    run_simulated(main())


def test_a_monitor_that_no_longer_looks_is_not_well(tmp_path: Path) -> None:
    async def main() -> None:
        monitor = monitor_of(FakeDHT(), tmp_path)
        assert text_of(monitor, "/healthz").startswith("200")
        await asyncio.sleep(60.0)
        assert text_of(monitor, "/healthz").startswith("503")
        await monitor.look()
        assert text_of(monitor, "/healthz").startswith("200")

    run_simulated(main())


def test_what_ends_first_ends_the_rest() -> None:
    ended = []

    async def forever() -> None:
        try:
            await asyncio.sleep(1000.0)
        finally:
            ended.append(now_s())

    async def fails() -> None:
        await asyncio.sleep(1.0)
        raise NetworkError("p2pd is gone")

    async def main() -> None:
        with pytest.raises(NetworkError):
            await first_to_end(forever(), fails())

    run_simulated(main())
    assert ended == [START_S + 1.0]


# -- the page ----------------------------------------------------------------------------------------------------------


def test_every_path_of_the_site(tmp_path: Path) -> None:
    async def main() -> dict[str, str]:
        monitor = monitor_of(FakeDHT(peers={1: {}}), tmp_path)
        paths = ("/", "/page.js", "/chart.js", "/format.js", "/style.css", "/icon.svg", "/uplot.js", "/uplot.css")
        answers = {path: monitor.site(path) for path in (*paths, "/metrics", "/sd", "/api/status.json", "/healthz")}
        for path in ("/index.html", "/style", "/page/page.js", "", "/../monitor.py", "/history.json", "/api/"):
            assert monitor.site(path) is None
        return {path: answer.content_type.partition(";")[0] for path, answer in answers.items() if answer is not None}

    javascript, css = "text/javascript", "text/css"
    assert run_simulated(main()) == {
        "/": "text/html", "/page.js": javascript, "/chart.js": javascript, "/format.js": javascript,
        "/style.css": css, "/icon.svg": "image/svg+xml", "/uplot.js": javascript, "/uplot.css": css,
        "/metrics": "text/plain", "/sd": "application/json", "/api/status.json": "application/json",
        "/healthz": "text/plain",
    }  # fmt: skip


def test_without_the_chart_library_the_page_is_there_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(monitor_module, "CHART_PACKAGE", "no_such_package")
    files = page_files()
    assert "/" in files
    assert "/uplot.js" not in files
    assert "p2p-diloco[monitor]" in caplog.text


class Inline(HTMLParser):
    """What a strict content security policy refuses, and where the page takes its parts from."""

    def __init__(self) -> None:
        super().__init__()
        self.refused: list[str] = []
        self.parts: list[str] = []
        self.open = ""

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.open = tag
        self.refused += [f"{tag} {name}" for name, _ in attrs if name == "style" or name.startswith("on")]
        self.parts += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        if self.open in ("script", "style") and data.strip():
            self.refused.append(self.open)


def test_the_page_takes_nothing_from_elsewhere_and_runs_nothing_inline() -> None:
    parser = Inline()
    parser.feed((PAGE / "index.html").read_text())
    assert parser.refused == []
    assert set(parser.parts) == {"icon.svg", "uplot.css", "style.css", "uplot.js", "page.js", "metrics"}
    for path in PAGE.iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert re.findall(r"https?://|url\(|@import|//[a-z]+\.[a-z]+/", text) == [], path.name


def test_the_page_makes_no_markup_of_text() -> None:
    makers = r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(|Function\(|DOMParser|setAttribute"
    for path in PAGE.glob("*.js"):
        assert re.findall(makers, path.read_text()) == [], path.name


def luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_can_be_read_in_light_and_dark() -> None:
    """WCAG 2.2, 1.4.3: a contrast of 4.5 at least."""
    themes = re.findall(r":root \{(.*?)\}", (PAGE / "style.css").read_text(), re.DOTALL)
    assert len(themes) == 2
    for theme in themes:
        colors = dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", theme))
        for ground in ("paper", "card"):
            for text in ("ink", "soft", "first", "second", "good", "warn", "bad"):
                light, dark = sorted((luminance(colors[text]), luminance(colors[ground])), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= 4.5, f"{text} on {ground}"
