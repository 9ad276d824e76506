"""What it costs to follow a large swarm: a real monitor, and a DHT of five nodes with the records of 500 peers, which
are renewed as often as real ones."""

from __future__ import annotations

import asyncio
import resource
import tempfile
import time
import urllib.request
from contextlib import AsyncExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgpack
import uvloop
from hivemind.dht.routing import DHTID

from benchmarks.table import Cell, Table
from benchmarks.workers import Workers
from p2p_diloco.core.config import PeerConfig, Timeouts
from p2p_diloco.core.digest import digest
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.manifest import RunManifest
from p2p_diloco.core.records import Record, peers_key, seal_record
from p2p_diloco.core.runfile import InnerSpec, ModelSpec, RunSpec
from p2p_diloco.look.monitor import Monitor, first_to_end
from p2p_diloco.peer.web import serving
from p2p_diloco.wire.daemon import private_socket_folder
from p2p_diloco.wire.dht import REPLICAS
from p2p_diloco.wire.node import Node

PEERS = 500
WARM_S = 15.0
MEASURED_S = 45.0
SCRAPE_EVERY_S = 15.0
POLL_EVERY_S = 3.0
LIMIT_S = 300.0
RENEWALS_PER_S = 10
MOST_PERCENT = 5.0
"""Of a core, while it is scraped and a page is open; its p2pd's share included."""
OWNER = Identity.from_seed(bytes(32))
MANIFEST = RunManifest(
    spec=RunSpec(name="many", model=ModelSpec(config={"model_type": "llama"}), inner=InnerSpec(steps=500)),
    model_config_json="{}",
    n_params=1000,
    layout_digest="0" * 64,
    vocab_size=256,
    data_fingerprint="",
    genesis="0" * 64,
    owner=OWNER.peer_id,
)


def main() -> Table:
    """RuntimeError when it costs more than it may."""
    with Workers(limit_s=LIMIT_S) as workers:
        workers.start(hold_records)
        address = workers.receive(0)
        workers.start(follow, address)
        url = workers.receive(1)
        alone = workers.receive(1)
        polled = poll_until(workers.pipes[1], url)
        p2pd = workers.receive(1)
    if polled + p2pd > MOST_PERCENT:
        raise RuntimeError(f"a monitor of {PEERS} peers takes {polled + p2pd:.1f} % of a core")
    rows: list[tuple[Cell, ...]] = [
        ("nobody asks", alone),
        (f"scraped every {SCRAPE_EVERY_S:g} s, with one page open", polled),
        ("its p2pd, all the time", p2pd),
        ("scraped, and p2pd", polled + p2pd),
    ]
    return Table(
        title=f"A monitor that follows {PEERS} peers",
        columns=("what", "% of a core"),
        rows=rows,
        notes=(f"Over {MEASURED_S:g} s each. Every record is new every {Timeouts().record_every_s:g} s.",),
    )


def hold_records(pipe: Connection) -> None:
    asyncio.run(keep_records(pipe))


async def keep_records(pipe: Connection) -> None:
    """Sends the first node's address; until the pipe is closed."""
    who = [Identity.from_seed(index.to_bytes(32, "big")) for index in range(1, PEERS + 1)]
    key = DHTID.generate(source=peers_key(MANIFEST.run_id))
    async with AsyncExitStack() as stack:
        address = ""
        storages = []
        for _ in range(REPLICAS):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="p2p-diloco-bench-")))
            initial_peers = (address,) if address else ()
            config = PeerConfig(folder=folder, host_maddrs=("/ip4/127.0.0.1/tcp/0",), initial_peers=initial_peers)
            identity = Identity.load_or_create(config.identity_path)
            node = await Node.start(config, identity, Timeouts(), private_socket_folder(folder))
            stack.push_async_callback(node.close)
            address = address or (await node.maddrs())[0]
            storages.append(node._network.dht.node.protocol.storage)  # type: ignore[union-attr]
        told, turn = False, 0
        while not (told and pipe.poll()):
            count = PEERS if not told else round(PEERS / Timeouts().record_every_s / RENEWALS_PER_S)
            for index in range(turn, turn + count):
                record = record_of(who[index % PEERS])
                value = msgpack.packb(seal_record(record, who[index % PEERS]))
                for storage in storages:
                    storage.store_subkey(key, record.peer_id, value, record.expires_s)
            turn += count
            if not told:
                pipe.send(address)
                told = True
            await asyncio.sleep(1 / RENEWALS_PER_S)


def record_of(who: Identity) -> Record:
    """As long as a real one: two addresses, four heads."""
    step = int(time.time() / 60) % 1000
    maddrs = [f"/ip4/{host}/tcp/40123/p2p/{who.peer_id}" for host in ("203.0.113.77", "192.168.178.23")]
    return Record(
        peer_id=who.peer_id,
        run_id=MANIFEST.run_id,
        run_name=MANIFEST.spec.name,
        issued_s=time.time(),
        life_s=Timeouts().record_life_s,
        role="trainer",
        phase="inner",
        step=step,
        head=digest(bytes([step % 256])),
        committed=True,
        heads=[digest(bytes([(step - back) % 256])) for back in (1, 2, 3, 4)],
        snapshot_step=step,
        snapshot_digest=bytes(32),
        maddrs=maddrs,
        client_mode=False,
        name=f"peer {who.peer_id[-4:]}",
        version="0.1.0",
        inner_step=37,
        inner_steps_planned=500,
        loss=2.5,
        tokens=10**8,
        tokens_per_s=1234.5,
        group_size=64,
        round_s=3.2,
        round_bytes=10**8,
    )


def follow(pipe: Connection, address: str) -> None:
    uvloop.run(watch(pipe, address))
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    pipe.send(100 * (usage.ru_utime + usage.ru_stime) / (WARM_S + 2 * MEASURED_S))


async def watch(pipe: Connection, address: str) -> None:
    """Sends where it serves, its share of a core while nobody asks, and that while somebody does."""
    with tempfile.TemporaryDirectory(prefix="p2p-diloco-bench-") as name:
        config = PeerConfig(folder=Path(name), initial_peers=(address,), client_mode=True)
        identity = Identity.load_or_create(config.identity_path)
        node = await Node.start(config, identity, Timeouts(), private_socket_folder(config.folder))
        monitor = Monitor(
            transport=node,
            manifest=MANIFEST,
            initial_peers=(address,),
            private_targets=False,
            folder=config.folder,
            wall_s=time.time,
        )
        async with serving("127.0.0.1", 0, monitor.site, Timeouts()) as url:
            await first_to_end(monitor.run(), measure(pipe, monitor, url))
        await node.close()


async def measure(pipe: Connection, monitor: Monitor, url: str) -> None:
    pipe.send(url)
    await asyncio.sleep(WARM_S)
    for _ in range(2):
        began_s = time.process_time()
        await asyncio.sleep(MEASURED_S)
        if len(monitor.sight.overview.records) < PEERS:
            raise RuntimeError(f"the monitor sees {len(monitor.sight.overview.records)} of {PEERS} peers")
        pipe.send(100 * (time.process_time() - began_s) / MEASURED_S)


def poll_until(pipe: Connection, url: str) -> Any:
    """As a Prometheus and a page do; what comes through the pipe."""
    polls = 0
    while not pipe.poll(POLL_EVERY_S):
        paths = ["api/status.json"] + ["metrics"] * (polls % round(SCRAPE_EVERY_S / POLL_EVERY_S) == 0)
        for path in paths:
            request = urllib.request.Request(url + path, headers={"Accept-Encoding": "gzip"})
            with urllib.request.urlopen(request, timeout=10) as answer:
                answer.read()
        polls += 1
    return pipe.recv()
