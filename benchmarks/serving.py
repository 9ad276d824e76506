"""What trainers notice of those who download from them: a swarm of two and a seed, now left alone, now asked for its
snapshots without a pause.

Their peers sleep instead of computing, so that what is seen is who waits for whom, and not who shares a core with whom.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

from benchmarks.loopback import Log
from benchmarks.stage import Stage
from benchmarks.table import Cell, Table
from benchmarks.workers import Workers
from p2p_diloco.core.config import PeerConfig, Timeouts
from p2p_diloco.core.errors import RemoteError
from p2p_diloco.core.event import OuterGradientOffered, PhaseBegan, TrainerStalled
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.records import Record, open_record, peers_key
from p2p_diloco.ledger.snapshot import chunk_slices
from p2p_diloco.wire.channel import Channel, run_protocol
from p2p_diloco.wire.daemon import private_socket_folder
from p2p_diloco.wire.node import Node
from p2p_diloco.wire.state_messages import AskChunk

TRAINERS = 2
STREAMS = 2
"""To each trainer."""
ROUNDS = 3
"""Left alone and asked, by turns: other work on the machine comes and goes."""
EACH_S = 20.0
LIMIT_S = 600.0
RETRY_S = 0.2
MOST_LONGER = 1.1
"""Inner steps beside downloads, over those without."""


def main() -> Table:
    """RuntimeError when inner steps take longer beside downloads."""
    alone: list[tuple[float, float]] = []
    asked: list[tuple[float, float]] = []
    served_bytes = 0
    with Workers(LIMIT_S) as workers:
        workers.start(download)  # before the stage, which is to leave nothing behind in its temporary folder
        with Stage(TRAINERS) as stage:
            stage.wait_until_calm()
            manifest = stage.children.manifest
            addresses = [child.address for child in stage.children.trainers]
            workers.send_all((addresses, manifest.run_id, manifest.n_params))
            workers.receive(0)
            for _ in range(ROUNDS):
                alone.append(pass_by(stage))
                workers.send_all("go")
                asked.append(pass_by(stage))
                workers.send_all("stop")
                served_bytes += workers.receive(0)
            rows = [row_of("left alone", stage, alone, 0), row_of("asked", stage, asked, served_bytes)]
    longer = float(rows[1][2]) / float(rows[0][2])
    if longer > MOST_LONGER:
        raise RuntimeError(f"inner steps take {longer:.2f} times as long while the peer serves")
    return Table(
        title=f"{TRAINERS} trainers, {STREAMS} streams to each: inner steps take {longer:.3f} times as long",
        columns=("what", "outer steps", "inner steps s", "longest s", "stall s", "served MB/s"),
        rows=rows,
        notes=(f"Medians. {ROUNDS} times {EACH_S:g} s each, by turns; a snapshot of 33 MB, and peers that sleep 3 s.",),
    )


def pass_by(stage: Stage) -> tuple[float, float]:
    """Watch the swarm for a while. From when until when."""
    began_s = time.monotonic()
    stage.wait_until(lambda: time.monotonic() > began_s + EACH_S, "time goes by")
    return began_s, time.monotonic()


def row_of(name: str, stage: Stage, spans: Sequence[tuple[float, float]], served_bytes: int) -> tuple[Cell, ...]:
    found = [lasted for log in stage.logs.values() for span in spans for lasted in inner_and_stall(log, *span)]
    inner_s, stall_s = zip(*found)
    rate = served_bytes / 1e6 / (ROUNDS * EACH_S)
    return (name, len(found) // TRAINERS, median(inner_s), max(inner_s), median(stall_s), rate)


def inner_and_stall(log: Log, began_s: float, until_s: float) -> Iterator[tuple[float, float]]:
    """Of every outer step that lies between: seconds of its inner steps, and of the stall after them."""
    inner_s = lasted_s = None
    for event in (event for event in log if began_s < event.mono_s < until_s):
        if isinstance(event, PhaseBegan) and event.phase == "inner":
            inner_s = event.mono_s
        elif isinstance(event, OuterGradientOffered):
            lasted_s = None if inner_s is None else event.mono_s - inner_s
        elif isinstance(event, TrainerStalled) and lasted_s is not None:
            yield lasted_s, event.seconds


# -- in a process of its own -------------------------------------------------------------------------------------------


def download(pipe: Connection) -> None:
    addresses, run_id, n = pipe.recv()
    asyncio.run(ask_without_end(pipe, addresses, run_id, n))


async def ask_without_end(pipe: Connection, addresses: Sequence[str], run_id: str, n: int) -> None:
    """From "go" to "stop", as often as that is said; then says how many bytes have come."""
    with tempfile.TemporaryDirectory(prefix="p2p-diloco-bench-") as name:
        config = PeerConfig(folder=Path(name), initial_peers=tuple(addresses), client_mode=True)
        identity = Identity.load_or_create(config.identity_path)
        node = await Node.start(config, identity, Timeouts(), private_socket_folder(config.folder))
        try:
            pipe.send("ready")
            while await asyncio.to_thread(pipe.recv) == "go":
                counts = [0] * (STREAMS * len(addresses))
                streams = [
                    asyncio.create_task(stream(node, addresses[i % len(addresses)], run_id, n, counts, i))
                    for i in range(len(counts))
                ]
                await asyncio.to_thread(pipe.recv)
                for task in streams:
                    task.cancel()
                for ended in await asyncio.gather(*streams, return_exceptions=True):
                    if isinstance(ended, Exception):
                        raise ended
                pipe.send(sum(counts))
        finally:
            await node.close()


async def stream(node: Node, address: str, run_id: str, n: int, counts: list[int], mine: int) -> None:
    """All chunks of the trainer's newest snapshot, over and over. ``counts[mine]``: bytes that came."""
    peer_id = address.rpartition("/p2p/")[2]
    while True:
        record = await newest_record(node, run_id, peer_id)
        with contextlib.suppress(RemoteError):  # the snapshot has been replaced by a newer one
            channel = await node.open(peer_id, [address], run_protocol(run_id))
            try:
                while record is not None:
                    counts[mine] += await snapshot_from(channel, record, n)
            finally:
                channel.close()
        await asyncio.sleep(RETRY_S)


async def newest_record(node: Node, run_id: str, peer_id: str) -> Record | None:
    records = map(open_record, await node.look_up(peers_key(run_id)))
    return next((record for record in records if record.peer_id == peer_id), None)


async def snapshot_from(channel: Channel, record: Record, n: int) -> int:
    """Its bytes."""
    came = 0
    for chunk, where in enumerate(chunk_slices(n)):
        await channel.send(AskChunk(step=record.snapshot_step, digest=record.snapshot_digest, chunk=chunk))
        came += len(await channel.receive_blob(where.stop - where.start, channel.timeouts.reduced_part_s))
    return came
