"""The network process of a peer: ``python -m p2p_diloco.peer.network CONTROL-FD VECTORS-FD``, which a trainer starts.

One event loop (uvloop where there is one) holds everything that is not training. The process inherits nothing but two
file descriptors: the control socket, and anonymous shared memory for theta and local. It ends when the trainer says so,
when the trainer is gone (the control socket closes), or when something of ours fails; p2pd goes with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import mmap
import os
import signal
import socket
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import numpy as np

from p2p_diloco import __version__
from p2p_diloco.core.addresses import METRICS_FLAG, Endpoint
from p2p_diloco.core.codec import Vector
from p2p_diloco.core.config import PeerConfig, Timeouts
from p2p_diloco.core.errors import LocalError, disk_failure
from p2p_diloco.core.event import DaemonRestarted, PeerStarted, TrainerStalled
from p2p_diloco.core.events import EventLog
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.manifest import open_manifest
from p2p_diloco.core.pace import Progress
from p2p_diloco.core.waiting import cancel_and_wait, deadline, now_s
from p2p_diloco.ledger.disk import disk_errors, write_whole
from p2p_diloco.ledger.folder import MANIFEST_FILE, open_ledger, run_folder
from p2p_diloco.ledger.replica import Replica
from p2p_diloco.ledger.seats import require_seat
from p2p_diloco.peer.control import (
    Begin,
    Begun,
    Evaluated,
    Failed,
    Found,
    InnerStep,
    Joined,
    Leave,
    Left,
    OuterStep,
    Stall,
    Start,
    pack_line,
)
from p2p_diloco.peer.metrics import PeerMetrics
from p2p_diloco.peer.peer import Peer
from p2p_diloco.peer.presence import CANNOT_BE_DIALLED
from p2p_diloco.peer.trainer import ToTrainer, Trainer
from p2p_diloco.wire.daemon import private_socket_folder
from p2p_diloco.wire.discovery import find_manifest
from p2p_diloco.wire.guard import die_with_parent, limit_open_files
from p2p_diloco.wire.node import Node

log = logging.getLogger(__name__)


class NetworkProcess:
    """One network process, from its start until the trainer leaves or is gone.

    ``vectors``: descriptor of shared memory, still empty."""

    def __init__(self, trainer: Trainer, vectors: int) -> None:
        self.trainer = trainer
        self.vectors = vectors
        self.peer: Peer | None = None
        self.tasks: set[asyncio.Task[Any]] = set()
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Runs a peer until the trainer leaves or is gone. Raises what went wrong here."""
        try:
            start = await self.trainer.receive()
        except EOFError:
            return
        assert isinstance(start, Start)
        ends = [self._spawn(self._work(start)), self._spawn(self._commands())]
        try:
            done, _ = await asyncio.wait([*ends, self.failure], return_when=asyncio.FIRST_COMPLETED)
            for end in done:
                end.result()
        finally:
            for task in list(self.tasks):
                task.cancel()
            await asyncio.gather(*self.tasks, return_exceptions=True)
            if self.failure.done():
                self.failure.exception()  # raised above; asyncio shall not report it a second time

    async def _work(self, start: Start) -> None:
        config, timeouts = start.config, start.timeouts
        identity = Identity.load_or_create(config.identity_path)
        node = await Node.start(config, identity, timeouts, private_socket_folder(config.folder))
        try:
            signed = await self._find_run(node, config, timeouts, start.manifest_path)
            await self._live(node, config, identity, signed, start.manifest_path, seed=start.role == "seed")
        finally:
            await node.close()

    async def _find_run(self, node: Node, config: PeerConfig, timeouts: Timeouts, manifest_path: Path | None) -> bytes:
        """Returns the signed manifest."""
        if manifest_path is not None:
            with disk_errors(manifest_path):
                return await asyncio.to_thread(manifest_path.read_bytes)
        initial = [(maddr.rsplit("/p2p/", 1)[1], maddr) for maddr in config.initial_peers]
        return await find_manifest(
            node, run_id=config.run_id, initial_peers=initial, timeouts=timeouts, wall_s=time.time
        )

    async def _live(
        self, node: Node, config: PeerConfig, identity: Identity, signed: bytes, source: Path | None, *, seed: bool
    ) -> None:
        """Lives as a peer of the run whose signed manifest has come from the file ``source``, or from others."""
        manifest = open_manifest(signed, str(source or "the run"))
        sealed_seat = require_seat(config.folder, manifest, identity.peer_id, time.time())
        folder = run_folder(config.folder, manifest)
        await asyncio.to_thread(keep_manifest, folder / MANIFEST_FILE, signed)
        ledger = await asyncio.to_thread(open_ledger, folder, manifest)
        theta, local = map_vectors(self.vectors, manifest.n_params, resize=True)
        replica = Replica(manifest, ledger, theta, np.zeros(manifest.n_params, np.float32))
        events = EventLog(folder)
        metrics = Endpoint.parse(config.metrics_addr, METRICS_FLAG) if config.metrics_addr else None
        peer = Peer(
            transport=node,
            identity=identity,
            replica=replica,
            signed_manifest=signed,
            local=None if seed else local,
            events=events,
            name=config.name,
            max_upload_bytes_per_s=config.max_upload_bytes_per_s,
            metrics=metrics,
            seat=sealed_seat,
        )
        self.trainer.send(Found(manifest_path=folder / MANIFEST_FILE, folder=folder))
        try:
            started = PeerStarted(
                peer_id=identity.peer_id,
                pid=os.getpid(),
                run_id=manifest.run_id,
                run_name=manifest.spec.name,
                role=peer.role,
                version=__version__,
                maddrs=tuple(await node.maddrs()),
            )
            events.write(started)
            if peer.seat.client_mode and not config.client_mode:
                log.info(CANNOT_BE_DIALLED)
            self._spawn(node.watch())
            self._spawn(log_restarts(node, events))
            self.peer = peer
            await self._join_and_run(node, peer)
        except LocalError as error:
            if not self.failure.done():  # a round that goes on until it is cancelled shall not hide why this peer ends
                self.failure.set_exception(error)
            raise
        finally:
            self.peer = None
            events.close()

    async def _join_and_run(self, node: Node, peer: Peer) -> None:
        await peer.join()
        self.trainer.send(
            Joined(
                peer_id=peer.identity.peer_id,
                maddrs=await node.maddrs(),
                step=peer.step,
                head=peer.seat.standing.head.hex(),
            )
        )
        self._spawn(self.trainer.tell_news(peer))
        self._spawn(self.trainer.tell_peers(peer))
        if peer.presence.metrics is not None:
            self._spawn(PeerMetrics(peer, trainer_pid=os.getppid()).serve(peer.presence.metrics))
        await peer.run()

    async def _commands(self) -> None:
        """Does what the trainer says, until it leaves or is gone."""
        outer_step: asyncio.Task[None] | None = None
        while True:
            try:
                line = await self.trainer.receive()
            except EOFError:
                line = Leave(reason="the trainer is gone")
            peer = self.peer
            if isinstance(line, Leave):
                if peer is not None:
                    await self._leave(peer, line.reason, outer_step)
                self.trainer.send(Left())
                return
            if peer is None:
                continue
            if isinstance(line, InnerStep):
                self.trainer.on_inner_step(peer, line)
            elif isinstance(line, Begin):
                peer.seat.progress = Progress(planned=line.planned, reported_s=now_s())
                self._spawn(self._begin(peer))
            elif isinstance(line, OuterStep):
                outer_step = self._spawn(self._outer_step(peer, line))
            elif isinstance(line, Stall):
                peer.events.write(TrainerStalled(step=line.step, seconds=line.seconds))
            elif isinstance(line, Evaluated):
                self.trainer.on_evaluated(peer, line)

    async def _leave(self, peer: Peer, reason: str, outer_step: asyncio.Task[None] | None) -> None:
        try:
            async with deadline(peer.here.timeouts.leave_s / 2):
                if outer_step is not None:  # an update that is being kept is kept first
                    await cancel_and_wait([outer_step], peer.here.timeouts.leave_s / 4)
                await peer.leave(reason)
        except asyncio.TimeoutError:
            log.info("leaving without having told everybody")

    async def _begin(self, peer: Peer) -> None:
        await peer.begin()
        standing, evaluate = peer.seat.standing, peer.evaluates_genesis()
        if evaluate:
            peer.presence.enter("evaluate")
        self.trainer.send(Begun(step=standing.step, head=standing.head.hex(), evaluate=evaluate))

    async def _outer_step(self, peer: Peer, line: OuterStep) -> None:
        self.trainer.send(await peer.outer_step(line.tokens, dropped=line.dropped, pace=line.pace))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self._on_done)
        return task

    def _on_done(self, task: asyncio.Task[Any]) -> None:
        """Ends the process for a failure of ours in any task: the trainer must not wait for an answer that never
        comes."""
        self.tasks.discard(task)
        if not task.cancelled() and task.exception() is not None and not self.failure.done():
            self.failure.set_exception(task.exception() or RuntimeError())


def keep_manifest(path: Path, signed: bytes) -> None:
    """Writes the manifest, unless it is there already: a seed's is perhaps the only one. Raises LedgerError."""
    with disk_errors(path, len(signed)):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_bytes() != signed:
            write_whole(path, [signed], len(signed))


async def log_restarts(node: Node, events: EventLog) -> None:
    """Writes an event for each time that p2pd had to be started again, until it is cancelled."""
    restarted = node.restarted.event
    while True:
        await restarted.wait()
        restarted = node.restarted.event
        events.write(DaemonRestarted(maddrs=tuple(await node.maddrs())))


def map_vectors(descriptor: int, n: int, *, resize: bool = False) -> tuple[Vector, Vector]:
    """Returns (theta, local), float32 [n] each, in the shared memory behind ``descriptor``."""
    size = 2 * 4 * n
    if resize:
        os.ftruncate(descriptor, size)
    shared = np.frombuffer(mmap.mmap(descriptor, size), np.float32)
    return shared[:n], shared[n:]


async def serve(control: socket.socket, vectors: int) -> None:
    """Runs a network process over the control socket. What goes wrong here is told to the trainer."""
    reader, writer = await asyncio.open_connection(sock=control, limit=64 * 1024 * 1024)
    handler = ToTrainer(writer)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    process = NetworkProcess(Trainer(reader, writer), vectors)
    try:
        await process.run()
    except LocalError as error:
        writer.write(pack_line(Failed(message=str(error), exit_code=error.exit_code)))
    except Exception as error:
        if isinstance(error, OSError) and (full := disk_failure(error)) is not None:
            writer.write(pack_line(Failed(message=str(full), exit_code=full.exit_code)))
            return
        log.exception("the network process fails")
        writer.write(pack_line(Failed(message=f"the network process fails: {error!r}", exit_code=1)))
    finally:
        with contextlib.suppress(OSError, asyncio.TimeoutError):
            async with deadline(1.0):
                await writer.drain()
        writer.close()


def main() -> None:
    """Runs this process as a network process: its arguments are two descriptors."""
    control, vectors = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    for number in (signal.SIGINT, signal.SIGHUP):  # The trainer decides when to leave.
        signal.signal(number, signal.SIG_IGN)
    die_with_parent(signal.SIGKILL)
    limit_open_files()
    if sys.platform == "win32":
        raise SystemExit("p2p-diloco runs on Linux and macOS; on Windows, in WSL2")
    import uvloop

    # What has been imported is never garbage. A full collection would look through it in the middle of a round, for
    # 0.1 s of a processor that every member of the group waits for.
    gc.freeze()
    uvloop.run(serve(control, vectors))


if __name__ == "__main__":
    main()
