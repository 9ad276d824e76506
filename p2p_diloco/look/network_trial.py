"""A trial of the network: what can be measured of a run from outside, its addresses, its peers' clocks and the
bandwidth to them; and whether others reach this machine, for which a second identity of ours listens, and peers are
asked to dial it.

Results are the plain values of ``network_findings``, which says what they mean. What a peer does wrong, or will not do,
is one of them, never an exception.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from p2p_diloco.core.addresses import family_of, publicness
from p2p_diloco.core.config import PeerConfig, Timeouts
from p2p_diloco.core.errors import Refused, RemoteError, Silent
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.waiting import Bell, deadline, heard
from p2p_diloco.look.network_findings import AddressTrial, Bandwidth, Dialled
from p2p_diloco.peer.probes import MAX_PORTS, DialConsent, seal_consent
from p2p_diloco.wire.channel import DIAL_BACK_PROTOCOL, Channel, Transport
from p2p_diloco.wire.daemon import private_socket_folder
from p2p_diloco.wire.discovery import ask_manifest
from p2p_diloco.wire.node import Node
from p2p_diloco.wire.probe_messages import (
    MAX_TRANSFER_BYTES,
    AskDialBack,
    AskTransfer,
    DialBack,
    DialedBack,
    Transferred,
)

log = logging.getLogger(__name__)

PINGS = 3
FIRST_PIECE_BYTES = 16 * 1024
TRANSFER_S = 3.0
"""For one direction: no piece is begun that would go beyond."""
PATIENCE_S = 8.0
"""How long peers that are in a round are asked again, every RETRY_S."""
RETRY_S = 3.0
FAMILIES = {
    "ip4": socket.AF_INET,
    "ip6": socket.AF_INET6,
    "dns": socket.AF_UNSPEC,
    "dns4": socket.AF_INET,
    "dns6": socket.AF_INET6,
}
HOST_AND_PORT = re.compile(rf"/({'|'.join(FAMILIES)})/([^/]+)/tcp/(\d+)(?:/|$)")
HEARD_S = 1.0
"""A dial that a peer has told us of has arrived by then."""
ASKED = 3
"""Peers asked to dial us, until one has reached us."""
PORT_MAPPING_S = 3.0
"""Until a router that maps ports by itself has done so."""
RELAY_PROTOCOL = "/libp2p/circuit/relay/0.2.0/hop"
NO_MANIFEST = "does not serve this protocol"
UNREACHED = "cannot be reached: "


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A peer of the run that can be asked."""

    peer_id: str
    maddrs: tuple[str, ...]

    @property
    def label(self) -> str:
        """Returns what it is called."""
        return f"peer …{self.peer_id[-8:]}"

    @property
    def publicness(self) -> int:
        """Returns the publicness of its best address (``addresses.publicness``)."""
        return min(map(publicness, self.maddrs))


def by_family(candidates: Sequence[Candidate], family: int) -> list[Candidate]:
    """Returns the candidates that have addresses of a family, 4 or 6, with these alone: who is asked over a connection
    of a family dials us in the same one."""
    kept = [(one, tuple(maddr for maddr in one.maddrs if family_of(maddr) == family)) for one in candidates]
    return [replace(one, maddrs=maddrs) for one, maddrs in kept if maddrs]


# -- addresses ---------------------------------------------------------------------------------------------------------


async def try_address(transport: Transport, maddr: str) -> AddressTrial:
    """Resolves an address, dials its port, then asks the peer that it names for a manifest; returns what came of it."""
    trial, loop, connect_s = AddressTrial(maddr=maddr), asyncio.get_running_loop(), transport.timeouts.connect_s
    match = HOST_AND_PORT.match(maddr)
    if match is None:
        return replace(trial, trouble="it does not begin with a host and a TCP port")
    try:
        async with deadline(connect_s):
            ips = await resolved(match[2], FAMILIES[match[1]])
    except (OSError, UnicodeError, asyncio.TimeoutError):
        return replace(trial, trouble="its host name is unknown")
    if match[1].startswith("dns"):
        trial = replace(trial, ips=tuple(ips))
    started_s = loop.time()
    try:
        async with deadline(connect_s):
            await dial_one_of(ips, int(match[3]))
    except asyncio.TimeoutError:
        return replace(trial, trouble="no answer")
    except ConnectionRefusedError:
        return replace(trial, trouble="connection refused")
    except OSError as error:
        return replace(trial, trouble=(error.strerror or "cannot be dialled").lower())
    trial = replace(trial, connect_s=loop.time() - started_s)
    try:
        return replace(trial, signed=await ask_manifest(transport, trial.peer_id, [maddr]))
    except Silent:
        return replace(trial, trouble="its port is open, but no peer answers")
    except RemoteError as error:
        trouble = error.reason.removeprefix(UNREACHED)
        return trial if trouble == NO_MANIFEST else replace(trial, trouble=trouble)


async def resolved(host: str, family: socket.AddressFamily) -> list[str]:
    """Returns the addresses of a host. OSError for a name that nobody knows. Known weakness: the system's own look-up
    goes on in a thread when we stop to wait for it, and may keep the process for some seconds at its end."""
    found = await asyncio.get_running_loop().getaddrinfo(host, None, family=family, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


async def dial_one_of(ips: Sequence[str], port: int) -> None:
    """Dials until one answers. Raises the OSError of the last one."""
    for number, ip in enumerate(ips, 1):
        try:
            _, writer = await asyncio.open_connection(ip, port)
        except OSError:
            if number == len(ips):
                raise
        else:
            writer.close()
            return


# -- clocks and bandwidth ----------------------------------------------------------------------------------------------


async def clock_offsets(
    transport: Transport, candidates: Sequence[Candidate], protocol: str, wall_s: Callable[[], float]
) -> list[float]:
    """Returns by how much our clock is at least behind that of each peer that answers; negative where it is ahead."""
    offsets_s = []
    for candidate in candidates:
        try:
            channel = await transport.open(candidate.peer_id, list(candidate.maddrs), protocol)
            try:
                offsets_s.append(min([await ping(channel, wall_s) for _ in range(PINGS)])[1])
            finally:
                channel.close()
        except RemoteError as error:
            log.debug("no time from %s: %s", candidate.label, error.reason)
    return offsets_s


async def ping(channel: Channel, wall_s: Callable[[], float]) -> tuple[float, float]:
    """Returns (seconds there and back, seconds that our clock is at least behind)."""
    asked_s = wall_s()
    seconds, theirs_s = await exchange(channel)
    return seconds, max(0.0, theirs_s - wall_s()) or min(0.0, theirs_s - asked_s)


async def exchange(channel: Channel, up_bytes: int = 0, down_bytes: int = 0) -> tuple[float, float]:
    """Sends and receives so many bytes; returns (seconds, the peer's clock)."""
    now, timeouts = asyncio.get_running_loop().time, channel.timeouts
    started_s = now()
    await channel.send(AskTransfer(up_bytes=up_bytes, down_bytes=down_bytes))
    await channel.send_frame(bytes(up_bytes))
    answer: Transferred = await channel.receive(Transferred, timeout_s=timeouts.part_s)
    await channel.receive_frame(down_bytes, timeouts.part_s)
    return now() - started_s, answer.wall_s


async def measure_bandwidth(
    transport: Transport, candidates: Sequence[Candidate], protocol: str
) -> tuple[Bandwidth | None, str]:
    """Returns the bandwidth with the first peer that is willing; or None, and why the last one was not."""
    loop, reason = asyncio.get_running_loop(), "there is nobody to ask"
    deadline_s = loop.time() + PATIENCE_S
    while True:
        for candidate in candidates:
            try:
                channel = await transport.open(candidate.peer_id, list(candidate.maddrs), protocol)
                try:
                    return await bandwidth_of(channel, candidate.label), ""
                finally:
                    channel.close()
            except RemoteError as error:
                reason = f"{candidate.label}: {error.reason}"
        if not candidates or loop.time() + RETRY_S > deadline_s:
            return None, reason
        await asyncio.sleep(RETRY_S)


async def bandwidth_of(channel: Channel, label: str) -> Bandwidth:
    """Returns what is measured over one stream. RemoteError when the peer does not go on."""
    round_trip_s = min([(await exchange(channel))[0] for _ in range(PINGS)])
    rates: list[float] = []
    for up in (True, False):
        size, spent_s = FIRST_PIECE_BYTES, 0.0
        while True:
            seconds, _ = await exchange(channel, size * up, size * (not up))
            # What is left of a short exchange without the way there and back is mostly noise.
            rate = size / max(seconds - round_trip_s, 0.1 * seconds, 1e-6)
            size, spent_s = 2 * size, spent_s + seconds
            if size > MAX_TRANSFER_BYTES or spent_s + 2 * seconds > TRANSFER_S:
                break
        rates.append(rate)
    return Bandwidth(peer=label, round_trip_s=round_trip_s, up_bytes_per_s=rates[0], down_bytes_per_s=rates[1])


# -- whether others reach this machine ---------------------------------------------------------------------------------


@dataclass(kw_only=True, eq=False)
class Listener:
    """A second identity of ours that listens as a peer would, and is connected with nobody."""

    transport: Transport
    identity: Identity
    announced: tuple[str, ...] = ()
    """What the user says that others shall dial."""
    dialled_by: set[str] = field(default_factory=set)
    """Who has reached it: what we see ourselves, not what anybody says."""
    came: Bell = field(default_factory=Bell)

    async def on_dial_back(self, channel: Channel) -> None:
        """Notes who has dialled."""
        await channel.receive(DialBack, timeout_s=self.transport.timeouts.first_message_s)
        self.dialled_by.add(channel.peer_id)
        self.came.ring()

    async def maddrs(self) -> Sequence[str]:
        """Returns the addresses at which others outside shall dial it."""
        return self.announced or await self.transport.maddrs()

    async def ports(self) -> list[int]:
        """Returns the ports of these addresses."""
        found = (re.search(r"/tcp/(\d+)", maddr) for maddr in await self.maddrs())
        return list(dict.fromkeys(int(match[1]) for match in found if match))[:MAX_PORTS]


@asynccontextmanager
async def listening(
    host_maddrs: Sequence[str], announce_maddrs: Sequence[str], timeouts: Timeouts
) -> AsyncIterator[Listener]:
    """Yields a listener, and closes it. Raises UsageError or NetworkError."""
    with tempfile.TemporaryDirectory(prefix="p2p-diloco-") as folder:
        config = PeerConfig(folder=Path(folder), host_maddrs=tuple(host_maddrs), announce_maddrs=tuple(announce_maddrs))
        identity = Identity.load_or_create(config.identity_path)
        node = await Node.start(config, identity, timeouts, private_socket_folder(config.folder))
        try:
            listener = Listener(transport=node, identity=identity, announced=config.announce_maddrs)
            await node.serve(DIAL_BACK_PROTOCOL, listener.on_dial_back)
            yield listener
        finally:
            await node.close()


async def dial_backs(
    transport: Transport, listener: Listener, candidates: Sequence[Candidate], protocol: str
) -> tuple[list[Dialled], list[int], str]:
    """Returns what peers found who were asked to dial ``listener``, until one reached it; its ports; and why the last
    one that did not try would not."""
    found: list[Dialled] = []
    ports, reason = await listener.ports(), ""
    for candidate in sorted(candidates, key=lambda candidate: candidate.publicness)[:ASKED]:
        try:
            found.append(await dial_back(transport, listener, candidate, protocol, ports))
        except RemoteError as error:
            reason = f"{candidate.label}: {error.reason}"
            continue
        if not found[-1].reached and len(found) == 1:
            await asyncio.sleep(PORT_MAPPING_S)
            ports = await listener.ports()
        if found[-1].reached:
            break
    return found, ports, reason


async def dial_back(
    transport: Transport, listener: Listener, candidate: Candidate, protocol: str, ports: Sequence[int]
) -> Dialled:
    """Asks one peer to dial ``listener``, and returns what it found. Raises RemoteError when the peer does not try."""
    consent = DialConsent(
        peer_id=listener.identity.peer_id, asker=transport.peer_id, dialler=candidate.peer_id, ports=list(ports)
    )
    channel = await transport.open(candidate.peer_id, list(candidate.maddrs), protocol)
    try:
        came = listener.came.event
        sealed = seal_consent(consent, listener.identity)
        answer: DialedBack = await channel.request(
            AskDialBack(consent=sealed), DialedBack, timeout_s=transport.timeouts.probe_s
        )
        if answer.reached and candidate.peer_id not in listener.dialled_by:
            await heard(came, HEARD_S)
    finally:
        channel.close()
    reached = candidate.peer_id in listener.dialled_by
    if answer.reached and not reached:
        raise Refused(candidate.peer_id, "says that it has dialled, but has not")
    return Dialled(by=candidate.label, ip=answer.ip, reached=reached, reason=answer.reason.removeprefix(UNREACHED))


async def would_relay(transport: Transport, candidates: Sequence[Candidate]) -> bool:
    """Returns whether one of them is a relay for others."""
    for candidate in candidates[:ASKED]:
        try:
            channel = await transport.open(candidate.peer_id, list(candidate.maddrs), RELAY_PROTOCOL)
        except RemoteError:
            continue
        channel.close()
        return True
    return False
