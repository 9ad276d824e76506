"""The status page in a headless Chromium, before a monitor whose DHT is a list of records."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from p2p_diloco.core.config import Timeouts
from p2p_diloco.peer.web import Response, Site, serving
from tests.support import chromium
from tests.support.builders import head, identity
from tests.support.fakes import make_manifest
from tests.support.invited import OWNER, token_of
from tests.support.observed import INITIAL, MANIFEST, FakeDHT, monitor_of

pytestmark = pytest.mark.skipif(chromium.PROGRAM is None, reason="Chromium is not installed")

QUICK = Timeouts(refresh_s=0.2)
NAMES = ["Ada", "<script>harm = 1</script>", "\u202egnp.\u202c", "<img src=x onerror=harm=1>"]
HOSTILE = '<script>harm = 1</script><img src=x onerror="harm = 1">\u202eevil\u2066\u0000\x1b[2J' + "W" * 10_000
ROWS = "[...document.querySelectorAll('#rows tbody tr')]"
CURVE_ROWS = "document.querySelectorAll('#curve tbody tr').length"


@pytest.fixture(scope="module")
def page() -> Iterator[chromium.Page]:
    with chromium.new_page() as page:
        yield page


def peers_at(step: int) -> dict[int, dict[str, Any]]:
    """Four trainers after so many outer steps; who evaluated the last one is the first."""
    common = {
        "step": step,
        "head": head("x" * step),
        "heads": [head("x" * (step - back)) for back in range(1, min(step, 4) + 1)],
        "version": "0.1.0",
        "inner_step": 3,
        "inner_steps_planned": 40,
    }
    each = {
        index: {**common, "name": name, "loss": 4.0 - step / 10, "tokens": 1000 * step * index, "tokens_per_s": 50.0}
        for index, name in enumerate(NAMES, 1)
    }
    each[1] |= {"held_out_loss": 5.0 - step / 10, "held_out_step": step}
    return each


def serve(
    folder: Path,
    work: Callable[[FakeDHT, str], None],
    change: Callable[[Site], Site] = lambda site: site,
    dht: FakeDHT | None = None,
) -> None:
    """``work`` talks to the browser, in a thread of its own."""
    dht = dht or FakeDHT(timeouts=QUICK, peers=peers_at(0))

    async def main() -> None:
        monitor = monitor_of(dht, folder)
        running = asyncio.create_task(monitor.run())
        async with serving("127.0.0.1", 0, change(monitor.site), Timeouts(leave_s=1.0)) as url:
            await asyncio.to_thread(work, dht, url)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(main())


def begin(page: chromium.Page, url: str, **window: Any) -> None:
    page.complaints.clear()
    page.open(url, **window)
    page.wait_for(f"{ROWS}.length > 0")


@pytest.mark.parametrize("width", [1280, 390])
def test_four_peers_and_a_curve_that_grows_without_reload(page: chromium.Page, tmp_path: Path, width: int) -> None:
    def work(dht: FakeDHT, url: str) -> None:
        begin(page, url, width=width)
        page.value(
            "window.sameDocument = true; document.querySelectorAll('details').forEach((one) => { one.open = true; })"
        )
        pictures = set()
        for step in (1, 2, 5):
            dht.peers = peers_at(step)
            page.wait_for(f"document.getElementById('news').textContent.startsWith('Outer step {step}:')")
            page.wait_for("document.querySelector('#curve canvas') !== null")
            pictures.add(page.value("document.querySelector('#curve canvas').toDataURL()"))
        assert len(pictures) == 3
        assert page.value(CURVE_ROWS) == 4
        assert page.value("document.querySelector('#curve tbody tr').innerText.split('\\t')") == [
            "5",
            "4.5000",
            "3.5000",
        ]
        caption = page.value("document.querySelector('#curve figcaption').textContent")
        assert caption == "Held-out loss: down from 5.0000 at outer step 0 to 4.5000 at outer step 5."
        assert page.value("document.getElementById('speed').textContent") == "200"
        assert page.value("document.getElementById('peers').textContent") == "4"
        assert page.value("document.getElementById('run-id').textContent") == MANIFEST.run_id
        assert MANIFEST.run_id in page.value("document.getElementById('join-line').textContent")
        assert page.value(f"{ROWS}.length") == 4
        assert page.value(f"{ROWS}.map((row) => row.cells[3].firstChild.textContent)") == [
            "20,000",
            "15,000",
            "10,000",
            "5,000",
        ]
        assert page.value("window.sameDocument"), "it was loaded again"
        assert page.value("document.documentElement.scrollWidth") <= width
        assert page.complaints == []

    serve(tmp_path, work)


def test_a_killed_peer_leaves_the_page(page: chromium.Page, tmp_path: Path) -> None:
    def work(dht: FakeDHT, url: str) -> None:
        begin(page, url)
        dht.peers = {
            index: fields | {"phase": "left"} if index == 2 else fields for index, fields in peers_at(1).items()
        }
        page.wait_for(f"{ROWS}.length === 3")
        assert page.value("document.getElementById('peers').textContent") == "3"

    serve(tmp_path, work)


def test_the_certificate_is_told_and_what_the_next_one_waits_for(page: chromium.Page, tmp_path: Path) -> None:
    def work(dht: FakeDHT, url: str) -> None:
        begin(page, url)
        told = "document.getElementById('certificate').textContent"
        assert page.value(told) == ""
        said = {"signatures": 3, "certifying": 4, "known_members": 3}
        dht.peers = {
            i: peer | said | {"witnessed": True, "helped": True, "known": i != 2} for i, peer in peers_at(1).items()
        }
        page.wait_for(f"{told}.startsWith('3 of 4 signed')")
        assert page.value(told) == (
            "3 of 4 signed the last outer step; witnessed by the owner; averaged by the owner's seed; "
            "3 members are known"
        )
        about = page.value(f"{ROWS}.map((row) => row.querySelector('small').textContent.split(' · ')[1])")
        assert sorted(about) == ["known", "known", "known", "newcomer"]
        assert page.value("document.getElementById('health-text').textContent") == "live"
        dht.peers = {i: peer | {"awaits_witness": True} for i, peer in peers_at(1).items()}
        page.wait_for("document.getElementById('health').dataset.health === 'owner'")
        assert page.value("document.getElementById('health-text').textContent") == "waiting for the owner's seed"
        assert page.value(told) == "waiting for the owner's seed, which has to witness the next one"
        dht.peers = {i: peer | {"found_wrong": 2, "barred": 1} for i, peer in peers_at(1).items()}
        page.wait_for(f"{told}.includes('barred')")
        assert page.value(told) == "2 found to have averaged wrongly; 1 barred for signing two of one thing"
        assert page.complaints == []

    serve(tmp_path, work)


def test_who_was_invited_is_shown_in_a_run_by_invitation_alone(page: chromium.Page, tmp_path: Path) -> None:
    run = make_manifest(1000, np.zeros(1000, np.float32), OWNER, membership="invite")
    two = token_of("attic-1", places=2, expires_s=4_102_444_800, run_id=run.run_id)
    seats = "[...document.querySelectorAll('#seats tbody tr')]"

    def open_run(_: FakeDHT, url: str) -> None:
        begin(page, url)
        assert page.value("document.getElementById('seats').hidden && document.getElementById('invited').hidden")

    def work(dht: FakeDHT, url: str) -> None:
        begin(page, url)
        page.wait_for(f"{seats}.length === 1")
        assert not page.value("document.getElementById('seats').hidden || document.getElementById('invited').hidden")
        assert page.value(f"{seats}[0].innerText.split('\\t')") == ["attic-1", "2", "2", "2100-01-01"]
        assert page.value("document.getElementById('join-line').textContent").endswith("--invite FILE")
        about = page.value(f"{ROWS}.map((row) => row.querySelector('small').textContent.split(' · ')[1])")
        assert about == ["attic-1"] * 2
        dht.peers[2]["phase"] = "left"
        page.wait_for(f"{ROWS}.length === 1 && {seats}[0].cells[1].textContent === '1'")
        assert page.complaints == []

    serve(tmp_path, open_run)
    peers = {i: peers_at(0)[i] | {"seat": two.seat(identity(i).peer_id)} for i in (1, 2)}
    serve(tmp_path, work, dht=FakeDHT(timeouts=QUICK, manifest=run, peers=peers))


def test_hostile_names_are_text(page: chromium.Page, tmp_path: Path) -> None:
    def work(_: FakeDHT, url: str) -> None:
        begin(page, url, width=390)
        names = page.value(f"{ROWS}.map((row) => row.cells[0].firstChild.textContent)")
        assert sorted(names) == sorted([*(name for name in NAMES if "\u202e" not in name), "gnp."])
        assert page.value("[...document.querySelectorAll('main script, main img')].length") == 0
        assert page.value("typeof harm") == "undefined"
        assert page.complaints == []

    serve(tmp_path, work)


def test_hostile_names_are_text_even_if_the_monitor_let_them_through(page: chromium.Page, tmp_path: Path) -> None:
    """Names of 10 kB, and numbers of 300 digits: a record cannot hold them, but the page does not count on it."""

    def change(site: Site) -> Site:
        def changed(path: str) -> Response | None:
            response = site(path)
            if path != "/api/status.json" or response is None:
                return response
            status = json.loads(response.body)
            for row in status["rows"]:
                row |= {
                    "name": HOSTILE,
                    "version": HOSTILE,
                    "state": HOSTILE,
                    "peer": HOSTILE,
                    "tokens": 1e300,
                    "loss": -1e300,
                }
            status |= {"join_line": HOSTILE, "tokens_per_s": 1e300}
            return Response(body=json.dumps(status).encode(), content_type=response.content_type)

        return changed

    def work(_: FakeDHT, url: str) -> None:
        begin(page, url, width=390)
        assert page.value(f"{ROWS}[0].cells[0].firstChild.textContent") == HOSTILE
        assert page.value("[...document.querySelectorAll('main script, main img')].length") == 0
        assert page.value("typeof harm") == "undefined"
        assert page.value("document.documentElement.scrollWidth") <= 390
        assert page.value("document.getElementById('speed').textContent") == "huge"
        assert page.complaints == []

    serve(tmp_path, work, change)


def test_it_says_that_nobody_is_there_and_that_the_monitor_is_gone(page: chromium.Page, tmp_path: Path) -> None:
    def work(dht: FakeDHT, url: str) -> None:
        begin(page, url)
        assert page.value("document.getElementById('health').dataset.health") == "live"
        dht.peers = {index: fields | {"phase": "left"} for index, fields in peers_at(1).items()}
        page.wait_for("document.getElementById('health').dataset.health === 'blind'")
        assert page.value("document.getElementById('copy').disabled")

    serve(tmp_path, work)
    page.wait_for("document.getElementById('health').dataset.health === 'lost'")
    assert "does not answer" in page.value("document.getElementById('health').textContent")


def test_the_join_line_is_copied(page: chromium.Page, tmp_path: Path) -> None:
    def work(dht: FakeDHT, url: str) -> None:
        page.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
        dht.peers = peers_at(1)
        begin(page, url)
        page.wait_for("!document.getElementById('copy').disabled")
        page.value("document.getElementById('copy').click()")
        page.wait_for("document.getElementById('copy').textContent === 'Copied'")
        copied = page.value("navigator.clipboard.readText()")
        assert copied == page.value("document.getElementById('join-line').textContent")
        assert copied.startswith(f"p2p-diloco peer --initial-peers {INITIAL} ")

    serve(tmp_path, work)


def test_without_the_chart_library_the_tables_are_open(page: chromium.Page, tmp_path: Path) -> None:
    def work(dht: FakeDHT, url: str) -> None:
        dht.peers = peers_at(1)
        begin(page, url)
        page.wait_for(f"{CURVE_ROWS} > 0")
        assert page.value("[...document.querySelectorAll('details')].every((one) => one.open)")
        assert page.value("document.querySelector('#curve .plot').hidden")
        assert all("uplot" in complaint for complaint in page.complaints)

    serve(tmp_path, work, lambda site: lambda path: None if "uplot" in path else site(path))


def test_what_a_screen_reader_finds(page: chromium.Page, tmp_path: Path) -> None:
    """Names of all regions, heads of all columns, one live region, and a sentence for each chart."""

    def work(dht: FakeDHT, url: str) -> None:
        dht.peers = peers_at(3)
        begin(page, url)
        tree = page.call("Accessibility.getFullAXTree")["nodes"]
        nodes = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in tree if not node["ignored"]]
        assert {name for role, name in nodes if role == "figure"} == {"Is it learning?", "How fast?"}
        assert ("progressbar", "Outer steps") in nodes
        assert ("button", "Copy") in nodes
        columns = [name for role, name in nodes if role == "columnheader"]
        assert columns == ["Peer", "State", "Tokens/s", "Contributed", "Outer step", "Inner steps", "Loss", "Version"]
        assert len([role for role, _ in nodes if role == "rowheader"]) == 4
        assert not [role for role, name in nodes if role in ("region", "button", "link", "figure") and not name]
        assert page.value("document.querySelectorAll('[aria-live=polite]').length") == 1

    serve(tmp_path, work)
