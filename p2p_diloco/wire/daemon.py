"""One life of p2pd, the libp2p daemon of a node: started under its guard, asked over its socket, shut.

    start         on an identity and addresses; or NetworkError
    connect, disconnect, reach, open_stream, serve, maddrs, relayed
    lost          why it cannot be used any more
    shut          and nothing is left of it

It is hivemind's, and what hivemind's client leaves open, or waits for without end, is done here.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import socket
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import base58
from hivemind.p2p import P2PDaemonError
from hivemind.p2p.p2p_daemon_bindings import control
from hivemind.proto import p2pd_pb2
from hivemind.utils.multiaddr import Multiaddr

from p2p_diloco.core.addresses import dial_bytes, dial_reason, is_loopback, is_relayed, publicness
from p2p_diloco.core.config import PeerConfig, Timeouts
from p2p_diloco.core.errors import NetworkError, UsageError
from p2p_diloco.core.waiting import deadline, now_s
from p2p_diloco.wire import hardening, kademlia
from p2p_diloco.wire.connections import Connections
from p2p_diloco.wire.traffic import Traffic

logger = logging.getLogger(__name__)
T = TypeVar("T")

MAX_DIALLED_MADDRS = 8
MAX_KNOWN_PEERS = 1024
CIRCUIT = b"\xa2\x02"
"""/p2p-circuit in a binary multiaddr."""
MAX_SOCKET_PATH_BYTES = 100
"""The system's limit is 108 bytes on Linux and 104 on macOS, with a zero at the end."""
LONGEST_SOCKET_NAME = "p2pclient-0123456789a.sock"


class DialError(Exception):
    """p2pd has refused a request, with the reason that it gave; for most requests it could not dial a peer."""


@dataclass(kw_only=True)
class Daemon:
    """One life of p2pd. ``Daemon.start`` makes one. Where no errors are named, a request raises what is in
    ``FAILURES``."""

    p2p: Any
    """hivemind's, for its DHT."""
    timeouts: Timeouts
    connections: Connections
    """What streams have found out about its connections."""
    connected: set[str] = field(default_factory=set)
    """Peers that p2pd has had a connection to; saves a request per stream."""
    _renewing: asyncio.Lock = field(default_factory=asyncio.Lock)

    @classmethod
    async def start(
        cls,
        config: PeerConfig,
        timeouts: Timeouts,
        socket_folder: Path,
        *,
        host_maddrs: Sequence[str],
        announced: Sequence[str],
        relays: Sequence[str],
        traffic: Traffic,
        connections: Connections,
    ) -> Daemon:
        """Returns a p2pd that runs. ``host_maddrs``: where to listen, in place of the config's. ``relays``: peers that
        may relay for us. Raises NetworkError."""
        local = all(is_loopback(maddr) for maddr in host_maddrs)
        auto_relay = bool(config.use_relay and relays and not config.client_mode and not local)
        p2p_class = hardening.guarded_p2p(socket_folder, config.relay_service, traffic)
        for attempt in (1, 2):
            os.makedirs(socket_folder, mode=0o700, exist_ok=True)  # a guard that ends removes it
            try:
                p2p = await p2p_class.create(
                    host_maddrs=None if config.client_mode else host_maddrs,
                    announce_maddrs=announced or None,
                    no_listen=config.client_mode,
                    dht_mode="client" if config.client_mode else "server",
                    identity_path=str(config.identity_path),
                    check_if_identity_free=False,
                    use_relay=config.use_relay,
                    use_auto_relay=auto_relay,
                    trusted_relays=relays if auto_relay else None,
                    auto_nat=not local,
                    nat_port_map=not local and not config.client_mode,
                    startup_timeout=timeouts.p2pd_start_s,
                    persistent_conn_max_msg_size=kademlia.MAX_DHT_MESSAGE_BYTES,
                )
                return cls(p2p=p2p, timeouts=timeouts, connections=connections)
            except (P2PDaemonError, OSError, EOFError, ValueError) as error:
                remove_dead_sockets(socket_folder)  # of one whose guard was killed
                if attempt == 2:
                    raise NetworkError(f"p2pd does not start: {error}") from error
                logger.warning("p2pd does not start (%s); trying once more", error)
        raise AssertionError

    @property
    def peer_id(self) -> str:
        """Returns the peer id of the identity file that p2pd has read."""
        return str(self.p2p.peer_id.to_base58())

    @property
    def has_ended(self) -> bool:
        """Returns whether the process of p2pd is gone."""
        return self.p2p._child.returncode is not None

    async def lost(self, wait_s: float) -> str | None:
        """Waits until p2pd ends, or a task of hivemind's without which we could not notice what p2pd tells us. Returns
        why; None when neither has ended after ``wait_s``."""
        p2p, client = self.p2p, self.p2p._client.control
        child = asyncio.ensure_future(p2p._child.wait())
        try:
            vital = {child, p2p._reader_task, client._read_task, client._write_task, p2p._listen_task} - {None}
            done, _ = await asyncio.wait(vital, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                return None
            # the reason is in the exit code, which comes a moment after the pipes are closed
            await asyncio.wait({child}, timeout=0.5)
            errors = [task.exception() for task in done if not task.cancelled()]
            return exit_reason(child.result()) if child.done() else f"its connection broke: {errors}"
        finally:
            child.cancel()

    async def shut(self) -> None:
        """Ends p2pd within a quarter of ``leave_s``: politely, or by killing it. Its sockets are gone then, also where
        its guard was killed and could not remove them."""
        try:
            async with deadline(self.timeouts.leave_s / 4):
                await self.p2p.shutdown()
        except asyncio.TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self.p2p._child.kill()
            await self.p2p._child.wait()
        finally:
            self.p2p._child._transport.close()  # its pipe, too, whose end may not have been seen yet
            for maddr in (self.p2p._daemon_listen_maddr, self.p2p._client_listen_maddr):
                with contextlib.suppress(OSError):
                    os.unlink(maddr["unix"])

    # -- requests ----------------------------------------------------------------------------------------------------

    async def connect(self, peer_id: str, maddrs: Sequence[str]) -> None:
        """Returns when p2pd has a connection to the peer."""
        addrs = [encoded for encoded in map(partial(dial_bytes, peer_id), maddrs[:MAX_DIALLED_MADDRS]) if encoded]
        request = p2pd_pb2.ConnectRequest(peer=base58.b58decode(peer_id), addrs=addrs)
        await self._answer(p2pd_pb2.Request(type=p2pd_pb2.Request.CONNECT, connect=request))

    async def disconnect(self, peer_id: str) -> None:
        """Ends all connections to a peer, and the streams over them: the next stream to it is over another one."""
        request = p2pd_pb2.DisconnectRequest(peer=base58.b58decode(peer_id))
        await self._answer(p2pd_pb2.Request(type=p2pd_pb2.Request.DISCONNECT, disconnect=request))
        self.connected.discard(peer_id)

    async def reach(self, peers: dict[str, list[str]]) -> tuple[list[str], list[str]]:
        """Connects to all ``peers`` (id -> addresses) at once, within ``connect_s``. Returns the ids of those that
        answer, and what is wrong with each of the others."""

        async def complaint_of(peer_id: str, maddrs: list[str]) -> str | None:
            try:
                async with deadline(self.timeouts.connect_s):
                    await self.connect(peer_id, maddrs)
            except asyncio.TimeoutError:
                return "no answer"
            except FAILURES as error:
                return str(error)
            return None

        complaints = await asyncio.gather(*(complaint_of(peer_id, maddrs) for peer_id, maddrs in peers.items()))
        answers = dict(zip(peers, complaints))
        return (
            [peer_id for peer_id, complaint in answers.items() if complaint is None],
            [f"{peers[peer_id][0]} ({complaint})" for peer_id, complaint in answers.items() if complaint is not None],
        )

    async def open_stream(
        self, peer_id: str, maddrs: Sequence[str], protocol: str
    ) -> tuple[str, asyncio.StreamReader, asyncio.StreamWriter]:
        """Opens a stream to a peer, at ``maddrs`` where p2pd has no connection to it, or one that has failed. Where
        there are none, a peer can only be waited for, and a connection that has failed is left. The address at its
        other end comes with it. Raises TimeoutError after ``connect_s``."""
        try:
            async with deadline(self.timeouts.connect_s):
                if maddrs:
                    await self._renew(peer_id)
                return await self._open_stream(peer_id, maddrs, protocol)
        except asyncio.TimeoutError:
            self.connections.fell_silent(peer_id, now_s() - self.timeouts.connect_s)
            raise

    async def _open_stream(
        self, peer_id: str, maddrs: Sequence[str], protocol: str
    ) -> tuple[str, asyncio.StreamReader, asyncio.StreamWriter]:
        opening = p2pd_pb2.StreamOpenRequest(peer=base58.b58decode(peer_id), proto=[protocol])
        request = p2pd_pb2.Request(type=p2pd_pb2.Request.STREAM_OPEN, streamOpen=opening)
        if peer_id in self.connected:
            try:
                return with_address(*await self._ask(request))
            except DialError:
                self.connected.discard(peer_id)
        if maddrs:
            await self.connect(peer_id, maddrs)
        opened = with_address(*await self._ask(request))
        if len(self.connected) >= MAX_KNOWN_PEERS:
            self.connected.clear()
        self.connected.add(peer_id)
        return opened

    async def _renew(self, peer_id: str) -> None:
        """Ends the connection to a peer if it has failed. Of several streams that are opened at once the first one does
        it, and the others wait for that."""
        async with self._renewing:
            if self.connections.has_failed(peer_id):
                logger.info("peer %s: its connection has failed, it is dialled anew", peer_id[-8:])
                await self.disconnect(peer_id)
                self.connections.renewed(peer_id)

    async def serve(self, protocol: str, on_stream: Callable[..., Awaitable[None]]) -> None:
        """Has ``on_stream(info, reader, writer)`` called for every stream that others open. Raises NetworkError."""
        await own_daemon(self.p2p.add_binary_stream_handler(protocol, on_stream), self.timeouts.request_s)

    async def maddrs(self) -> list[str]:
        """Returns the addresses at which others may reach it, the most public first, without its peer id."""
        answer = await self._answer(p2pd_pb2.Request(type=p2pd_pb2.Request.IDENTIFY))
        return sorted((str(Multiaddr(addr)) for addr in answer.identify.addrs), key=publicness)

    async def relayed(self) -> list[bool]:
        """Returns, for every peer that is connected, whether any of its connections is through a relay."""
        answer = await self._answer(p2pd_pb2.Request(type=p2pd_pb2.Request.LIST_PEERS))
        return [any(map(leads_through_relay, connection.addrs)) for connection in answer.peers]

    async def _answer(self, request: Any) -> Any:
        answer, _, writer = await self._ask(request)
        writer.close()
        return answer

    async def _ask(self, request: Any) -> tuple[Any, asyncio.StreamReader, asyncio.StreamWriter]:
        """Sends a request on a connection of its own, which stays open, and returns the answer with it. hivemind's
        client leaves it open, too, where p2pd refuses or the caller gives up; here it is closed then."""
        reader, writer = await self.p2p._client.control.daemon_connector.open_connection()
        try:
            await control.write_pbmsg(writer, request)
            answer = p2pd_pb2.Response()
            await control.read_pbmsg_safe(reader, answer)
            if answer.type == p2pd_pb2.Response.ERROR:
                raise DialError(dial_reason(answer.error.msg))
        except BaseException:
            writer.transport.abort()
            raise
        return answer, reader, writer


FAILURES = (DialError, OSError, EOFError, ValueError)


def exit_reason(code: int) -> str:
    """Returns what the exit code of p2pd's guard tells: the guard ends with p2pd's own, unless a signal has ended the
    guard itself."""
    return f"exit code {code}" if code >= 0 else f"its guard was ended by signal {-code}"


def with_address(
    answer: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> tuple[str, asyncio.StreamReader, asyncio.StreamWriter]:
    """Returns what p2pd answers to who opens a stream: the address at its other end, and the stream."""
    try:
        return str(Multiaddr(answer.streamInfo.addr)), reader, writer
    except BaseException:
        writer.transport.abort()
        raise


def leads_through_relay(addr: bytes) -> bool:
    """Tells whether a binary multiaddr leads through a relay. Few contain the two bytes of /p2p-circuit by chance: only
    those are worth parsing."""
    return CIRCUIT in addr and is_relayed(str(Multiaddr(addr)))


async def own_daemon(work: Awaitable[T], timeout_s: float) -> T:
    """Returns what ``work`` returns, which only p2pd on this machine can delay. Raises NetworkError, after
    ``timeout_s`` at the latest."""
    try:
        async with deadline(timeout_s):
            return await work
    except (asyncio.TimeoutError, P2PDaemonError, *FAILURES) as error:
        raise NetworkError(f"p2pd does not do what we ask: {error or 'no answer'}") from error


def claim_identity(path: Path) -> int:
    """Locks an identity file until this process ends, and returns the descriptor that holds the lock. Two peers of one
    identity would take each other's connections. Raises UsageError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"identity {path}: cannot be read ({error.strerror})") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UsageError(f"identity {path}: another peer runs with it; give this one a folder of its own") from error
    except OSError:
        logger.debug("identity %s: this file system has no locks", path)
    return descriptor


def remove_folder(folder: Path) -> None:
    """Removes a folder, unless something is in it."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def private_socket_folder(folder: Path) -> Path:
    """Returns the folder of one node's sockets: inside ``folder``, or, where that path is too long for a socket, or no
    text in UTF-8 as p2pd has it, in the temporary folder."""
    inside = folder.absolute() / "s"
    path = os.fsencode(inside / LONGEST_SOCKET_NAME)
    if len(path) > MAX_SOCKET_PATH_BYTES or path.decode("utf-8", "ignore").encode() != path:
        return Path(tempfile.mkdtemp(prefix="p2p-diloco-"))
    try:
        inside.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"folder {inside}: cannot be made ({error.strerror})") from error
    return inside


def remove_dead_sockets(folder: Path) -> None:
    """Removes the sockets that a dead process left in ``folder``. Each is called, which a live process logs as an
    error: claim the identity first, and there is a live one only where two identities share a folder."""
    for path in [*folder.glob("p2pd-*.sock"), *folder.glob("p2pclient-*.sock")]:
        with socket.socket(socket.AF_UNIX) as trial, contextlib.suppress(OSError):
            if trial.connect_ex(str(path)) != 0:
                path.unlink()
