"""What it costs a peer to be scraped: processor time of its network process, p2pd's not included."""

from __future__ import annotations

import asyncio
import socket
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.compute import next_update, unsigned
from benchmarks.table import Table
from p2p_diloco.core.addresses import Endpoint
from p2p_diloco.core.codecs import encode
from p2p_diloco.core.config import PeerConfig, Timeouts
from p2p_diloco.core.events import EventLog
from p2p_diloco.core.grid import Grid
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.manifest import RunManifest
from p2p_diloco.core.outer import genesis_state
from p2p_diloco.core.records import Record, seal_record
from p2p_diloco.core.runfile import DataSpec, InnerSpec, ModelSpec, OuterSpec, RoundSpec, RunSpec
from p2p_diloco.core.update import Part, contributor_mask
from p2p_diloco.ledger.ledger import Ledger
from p2p_diloco.ledger.replica import Replica
from p2p_diloco.peer.metrics import RENDER_EVERY_S, PeerMetrics
from p2p_diloco.peer.peer import Peer
from p2p_diloco.wire.daemon import private_socket_folder
from p2p_diloco.wire.node import Node

VALUES = 1000
OTHERS = 500
UPDATES = 20
REPEATS = 50
MOST_MS = 5.0
"""Of a core, for a scrape: to render an answer and to send it."""


def main() -> Table:
    """RuntimeError when a scrape costs more than it may."""
    render, answer, look = asyncio.run(measured())
    scrape = Cost(render.ms + answer.ms, answer.bytes)
    if scrape.ms > MOST_MS:
        raise RuntimeError(f"a scrape costs {scrape.ms:.1f} ms of a core")
    named = {
        "render": render,
        "answer over HTTP, both ends": answer,
        "a scrape: both": scrape,
        "look around: p2pd, ledger": look,
    }
    return Table(
        title=f"Being scraped, with records of {OTHERS} other peers and {UPDATES} updates in the ledger",
        columns=("what", "ms of a core", "bytes"),
        rows=[(what, cost.ms, cost.bytes) for what, cost in named.items()],
        notes=(
            f"Mean of {REPEATS}. A look around happens every 5 s; whoever asks more often than once in "
            f"{RENDER_EVERY_S:g} s is sent the same answer again.",
        ),
    )


@dataclass(frozen=True)
class Cost:
    ms: float
    """Of a core."""
    bytes: int
    """Of the answer."""


async def measured() -> tuple[Cost, Cost, Cost]:
    """To render, to answer over HTTP, to look around."""
    with tempfile.TemporaryDirectory(prefix="p2p-diloco-bench-") as name:
        folder = Path(name)
        config = PeerConfig(folder=folder, host_maddrs=("/ip4/127.0.0.1/tcp/0",))
        identity = Identity.load_or_create(config.identity_path)
        node = await Node.start(config, identity, Timeouts(), private_socket_folder(folder))
        peer = make_peer(node, identity, folder)
        try:
            return await costs_of(peer)
        finally:
            peer.events.close()
            await node.close()


async def costs_of(peer: Peer) -> tuple[Cost, Cost, Cost]:
    metrics = PeerMetrics(peer)

    async def render() -> int:
        return len(metrics.render())

    async def look() -> int:
        await metrics.look()
        return 0

    with socket.create_server(("127.0.0.1", 0)) as free:
        endpoint = Endpoint(host="127.0.0.1", port=free.getsockname()[1])
    serving = asyncio.create_task(metrics.serve(endpoint))
    await asyncio.sleep(1.0)

    async def get() -> int:
        """Both ends of the connection are in this process."""
        reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port)
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = await reader.read()
        writer.close()
        return len(answer)

    try:
        return await timed(render), await timed(get), await timed(look)
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


async def timed(work: Callable[[], Awaitable[int]]) -> Cost:
    size = await work()
    started_s = time.process_time()
    for _ in range(REPEATS):
        await work()
    return Cost((time.process_time() - started_s) / REPEATS * 1000, size)


def make_peer(node: Node, identity: Identity, folder: Path) -> Peer:
    """One that has not joined: its records come from nowhere, and its ledger is made up."""
    theta = np.zeros(VALUES, np.float32)
    state = genesis_state(theta.copy())
    manifest = RunManifest(
        spec=RunSpec(
            name="scrape",
            model=ModelSpec(config={"model_type": "llama"}),
            data=DataSpec(),
            inner=InnerSpec(),
            outer=OuterSpec(codec="fp32"),
            round=RoundSpec(),
        ),
        model_config_json="{}",
        n_params=VALUES,
        layout_digest="0" * 64,
        vocab_size=256,
        data_fingerprint="",
        genesis=state.digest().hex(),
        owner=identity.peer_id,
    )
    outer = manifest.spec.outer
    ledger = Ledger(
        folder / "ledger",
        grid=Grid(n=VALUES, codec=outer.codec),
        lr=outer.lr,
        momentum=outer.momentum,
        snapshot_every=1000,
    )
    ledger.write_snapshot(state)
    replica = Replica(manifest, ledger, theta, theta.copy())
    replica.load()
    for _ in range(UPDATES):
        part = Part(mask=contributor_mask(range(4)), data=encode(theta, "fp32"))
        update = next_update(replica.loaded, (part,))
        replica.commit(update, unsigned(update))
    peer = Peer(
        transport=node,
        identity=identity,
        replica=replica,
        signed_manifest=manifest.signed(identity),
        local=theta.copy(),
        events=EventLog(folder),
    )
    for index in range(OTHERS):
        other = Identity.from_seed(index.to_bytes(32, "big"))
        peer.directory.learn(seal_record(record_of(other, manifest), other), time.time())
    return peer


def record_of(who: Identity, manifest: RunManifest) -> Record:
    return Record(
        peer_id=who.peer_id,
        run_id=manifest.run_id,
        run_name=manifest.spec.name,
        issued_s=time.time(),
        life_s=600.0,
        role="trainer",
        phase="inner",
        step=0,
        head=bytes(32),
        committed=False,
        heads=[],
        snapshot_step=0,
        snapshot_digest=bytes(32),
        maddrs=[],
        client_mode=False,
    )
