"""Whether others reach this machine: a second identity of ours listens, and peers of the run are asked to dial it."""

from __future__ import annotations

import asyncio
import re
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from p2p_diloco.core.config import PeerConfig, Timeouts
from p2p_diloco.core.errors import Refused, RemoteError
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.waiting import Bell, heard
from p2p_diloco.look.network_findings import Dialled
from p2p_diloco.look.network_trial import UNREACHED, Candidate
from p2p_diloco.peer.probes import MAX_PORTS, DialConsent, seal_consent
from p2p_diloco.wire.channel import DIAL_BACK_PROTOCOL, Channel, Transport
from p2p_diloco.wire.daemon import private_socket_folder
from p2p_diloco.wire.messages import AskDialBack, DialBack, DialedBack
from p2p_diloco.wire.node import Node

HEARD_S = 1.0
"""A dial that a peer has told us of has arrived by then."""
ASKED = 3
"""Peers asked to dial us, until one has reached us."""
PORT_MAPPING_S = 3.0
"""Until a router that maps ports by itself has done so."""
RELAY_PROTOCOL = "/libp2p/circuit/relay/0.2.0/hop"


@dataclass(kw_only=True, eq=False)
class Listener:
    """A second identity of ours that listens as a peer would, and is connected with nobody."""

    transport: Transport
    identity: Identity
    dialled_by: set[str] = field(default_factory=set)
    """Who has reached it: what we see ourselves, not what anybody says."""
    came: Bell = field(default_factory=Bell)

    async def on_dial_back(self, channel: Channel) -> None:
        await channel.receive(DialBack, timeout_s=self.transport.timeouts.first_message_s)
        self.dialled_by.add(channel.peer_id)
        self.came.ring()

    async def ports(self) -> list[int]:
        """Where others shall dial it."""
        found = (re.search(r"/tcp/(\d+)", maddr) for maddr in await self.transport.maddrs())
        return list(dict.fromkeys(int(match[1]) for match in found if match))[:MAX_PORTS]


@asynccontextmanager
async def listening(
    host_maddrs: Sequence[str], announce_maddrs: Sequence[str], timeouts: Timeouts
) -> AsyncIterator[Listener]:
    """Raises UsageError or NetworkError."""
    with tempfile.TemporaryDirectory(prefix="p2p-diloco-") as folder:
        config = PeerConfig(folder=Path(folder), host_maddrs=tuple(host_maddrs), announce_maddrs=tuple(announce_maddrs))
        identity = Identity.load_or_create(config.identity_path)
        node = await Node.start(config, identity, timeouts, private_socket_folder(config.folder))
        try:
            listener = Listener(transport=node, identity=identity)
            await node.serve(DIAL_BACK_PROTOCOL, listener.on_dial_back)
            yield listener
        finally:
            await node.close()


async def dial_backs(
    transport: Transport, listener: Listener, candidates: Sequence[Candidate], protocol: str
) -> tuple[list[Dialled], list[int], str]:
    """What peers found who were asked to dial ``listener``, until one reached it; its ports; and why the last one that
    did not try would not."""
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
    """Raises RemoteError when the peer does not try."""
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
    """Whether one of them is a relay for others."""
    for candidate in candidates[:ASKED]:
        try:
            channel = await transport.open(candidate.peer_id, list(candidate.maddrs), RELAY_PROTOCOL)
        except RemoteError:
            continue
        channel.close()
        return True
    return False
