"""The monitor: follows a run from outside, and shows it over HTTP.

    /                   the status page: files of ``page/``, and a chart library from site-packages
    /api/status.json    what the page asks for
    /metrics            the whole swarm for Prometheus, a series a peer
    /sd                 peers that can be scraped themselves, for Prometheus's HTTP service discovery
    /healthz            whether the monitor itself is well

It is a node in client mode: it serves nothing to peers and publishes nothing, so none ever counts on it. In a run by
invitation it asks them for the owner's list of revocations, as they ask each other. It stays in the DHT through
whomever it has met there, so it outlives the peers that it was started with, and finds a swarm that comes back. There
is no login: what it shows is what every peer of the run can see, some addresses included.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import random
import signal
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Coroutine, Iterable, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, Protocol

from p2p_diloco.core.addresses import Endpoint
from p2p_diloco.core.config import PeerConfig, Timeouts
from p2p_diloco.core.directory import Directory
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.manifest import RunManifest, open_manifest
from p2p_diloco.core.records import Fault, Record, Unsound, peers_key
from p2p_diloco.core.waiting import now_s
from p2p_diloco.look.exposition import Sight
from p2p_diloco.look.history import History
from p2p_diloco.look.overview import overview_of
from p2p_diloco.look.status import ask_for_manifest
from p2p_diloco.peer.revocations import Dialling, NewestList
from p2p_diloco.peer.web import Response, plain_response, serving
from p2p_diloco.wire.daemon import private_socket_folder
from p2p_diloco.wire.node import Node

log = logging.getLogger(__name__)

SAVE_EVERY_S = 60.0
SEEK_EVERY_S = 10.0
MAX_MET = 64
MAX_SOUGHT = 16
"""Of those met, dialled at once."""
RECORDS_PER_S = 60
"""To be read; of each come as many copies as the DHT holds."""
UNWELL_AFTER = 20
"""Looks that should have been made since the last one."""
PAGE = Path(__file__).parent / "page"
CHART_PACKAGE = "uplot"
"""Of the distribution uplot-python, which carries the JavaScript library uPlot; nothing of it is imported."""
CHART_FILES = {"uplot.js": "static/uPlot.iife.js", "uplot.css": "static/uPlot.min.css"}
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


class Observing(Dialling, Protocol):
    """Is what a monitor needs of a network. ``node.Node`` is the real one."""

    peer_id: str

    @property
    def rejected(self) -> Counter[Fault]:
        """Records that were refused before they came here, by fault."""

    async def look_up(self, key: str) -> list[bytes]:
        """Returns the records under a key, as they were signed."""

    async def meet(self, peers: dict[str, list[str]]) -> None:
        """Dials peers, so that the DHT knows them."""


class Monitor:
    """Says what is seen of one run, and what is shown of it."""

    def __init__(
        self,
        *,
        transport: Observing,
        manifest: RunManifest,
        initial_peers: Sequence[str],
        private_targets: bool,
        folder: Path,
        wall_s: Callable[[], float],
    ) -> None:
        self.transport = transport
        self.wall_s = wall_s
        self.manifest = manifest
        self.initial_peers = tuple(initial_peers)
        self.private_targets = private_targets
        self.directory = Directory(transport.peer_id, manifest.run_id, admission=manifest.admission())
        self.revocations = NewestList(transport=transport, directory=self.directory, owner=manifest.owner)
        self.history_path = folder / f"history-{manifest.run_id}.json"
        self.history = History.load(self.history_path, manifest.run_id)
        self.unsound: Counter[Fault] = Counter()
        self.met: OrderedDict[str, list[str]] = OrderedDict()
        """Addresses of the peers seen last, whether they are still there or not."""
        self.files = page_files()
        self.looked_s = now_s()
        self.sight = self._sight([], wall_s())

    async def run(self) -> None:
        """Looks from time to time, until it is cancelled."""
        saved_s = sought_s = now_s()
        try:
            while True:
                found = await self.look()
                looked_s = now_s()
                if not found and looked_s - sought_s >= SEEK_EVERY_S:
                    sought_s = looked_s
                    await self.seek()
                if looked_s - saved_s >= SAVE_EVERY_S:
                    saved_s = looked_s
                    await asyncio.to_thread(self.history.save, self.history_path)  # a sync may take a while
                await asyncio.sleep(self._pause_s())
        finally:
            self.history.save(self.history_path)

    async def look(self) -> bool:
        """Reads the records in the DHT, and returns whether any of them was sound and of this time."""
        sealed = await self.transport.look_up(peers_key(self.manifest.run_id))
        wall_s, found = self.wall_s(), False
        for one in sealed:
            try:
                found |= self.directory.learn(one, wall_s) is not None
            except Unsound as error:
                self.unsound[error.fault] += 1
        self.directory.step = self.history.step
        await self.revocations.hear(self.directory.live(wall_s))
        records = self.directory.live(wall_s)
        seen_before = len(self.sight.overview.records)
        self.sight = self._sight(records, wall_s)
        self.history.learn(self.sight.overview)
        self.looked_s = now_s()
        self._remember(records)
        if bool(records) != bool(seen_before):
            seen = f"{len(records)} peers at outer step {self.history.step}" if records else "no peer any more"
            log.info("run %s: %s", self.manifest.spec.name, seen)
        return found

    def _pause_s(self) -> float:
        """Returns the seconds until records are read again: more where there are many, and never so many that one of
        them could have been renewed twice."""
        timeouts, seen = self.transport.timeouts, len(self.sight.overview.records)
        return min(max(timeouts.refresh_s, seen / RECORDS_PER_S), timeouts.record_every_s)

    async def seek(self) -> None:
        """Dials some of those whom it has met: nobody in the DHT tells of the run, so perhaps we have lost the DHT, and
        one of them has not."""
        chosen = random.sample(sorted(self.met), min(MAX_SOUGHT, len(self.met)))
        await self.transport.meet({peer_id: self.met[peer_id] for peer_id in chosen})

    def _sight(self, records: Sequence[Record], wall_s: float) -> Sight:
        return Sight(
            manifest=self.manifest,
            overview=overview_of(records, wall_s),
            history=self.history,
            rejected=self.unsound + self.transport.rejected,
            initial_peers=self.initial_peers,
            private_targets=self.private_targets,
        )

    def _remember(self, records: Iterable[Record]) -> None:
        for record in records:
            if record.maddrs and not record.client_mode:
                self.met[record.peer_id] = record.maddrs
                self.met.move_to_end(record.peer_id)
        while len(self.met) > MAX_MET:
            self.met.popitem(last=False)

    def site(self, path: str) -> Response | None:
        """Returns what is at a path; None where nothing is."""
        if path == "/metrics":
            return self.sight.metrics
        if path == "/sd":
            return self.sight.targets
        if path == "/api/status.json":
            return self.sight.status
        if path == "/healthz":
            ago_s = now_s() - self.looked_s
            well = ago_s < UNWELL_AFTER * self.transport.timeouts.refresh_s
            return plain_response(HTTPStatus.OK if well else HTTPStatus.SERVICE_UNAVAILABLE)
        return self.files.get(path)


def page_files() -> dict[str, Response]:
    """Returns path -> file of the page. Without its chart library the page has its tables."""
    files = {f"/{path.name}": path for path in PAGE.iterdir() if path.suffix in TYPES}
    files["/"] = files.pop("/index.html")
    spec = importlib.util.find_spec(CHART_PACKAGE)
    for folder in spec.submodule_search_locations or () if spec else ():
        files |= {f"/{name}": found for name, part in CHART_FILES.items() if (found := Path(folder, part)).is_file()}
    if not set(files) >= {f"/{name}" for name in CHART_FILES}:
        log.warning("the page shows tables, but no charts: pip install 'p2p-diloco[monitor]' has them")
    return {name: Response(body=path.read_bytes(), content_type=TYPES[path.suffix]) for name, path in files.items()}


async def follow(config: PeerConfig, endpoint: Endpoint, timeouts: Timeouts, *, private_targets: bool) -> None:
    """Follows the run and serves the page until it is cancelled. Raises UsageError, or NetworkError when p2pd cannot be
    kept alive."""
    identity = Identity.load_or_create(config.identity_path)
    node = await Node.start(config, identity, timeouts, private_socket_folder(config.folder))
    try:
        signed = await ask_for_manifest(node, config.initial_peers, config.run_id)
        monitor = Monitor(
            transport=node,
            manifest=open_manifest(signed, "the run"),
            initial_peers=config.initial_peers,
            private_targets=private_targets,
            folder=config.folder,
            wall_s=time.time,
        )
        await monitor.look()
        async with serving(endpoint.host, endpoint.port, monitor.site, timeouts) as url:
            print(f"run {monitor.manifest.spec.name} {monitor.manifest.run_id}: {url}", flush=True)
            await first_to_end(node.watch(), monitor.run())
    finally:
        await node.close()


async def first_to_end(*work: Coroutine[Any, Any, None]) -> None:
    """Runs all at once until one ends, and cancels the others. Raises what the first one raised."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until_stopped(work: Coroutine[Any, Any, None]) -> None:
    """Runs ``work`` until Ctrl+C or SIGTERM: the first one cancels it, the second one ends the process at once."""
    task, stopped = asyncio.ensure_future(work), asyncio.Event()

    def on_signal(number: int) -> None:
        if stopped.is_set():
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        stopped.set()
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
    try:
        await task
    except asyncio.CancelledError:
        if not stopped.is_set():
            raise


def run_monitor(config: PeerConfig, endpoint: Endpoint, *, private_targets: bool) -> None:
    """Runs the monitor in this process until it is stopped."""
    import uvloop

    uvloop.run(until_stopped(follow(config, endpoint, Timeouts(), private_targets=private_targets)))
