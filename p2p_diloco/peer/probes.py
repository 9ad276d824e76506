"""Probes: what a peer lets others measure with it: whether they can be reached, how fast the connection is, what time
it is.

    dial back   one dial for a stream, of nobody but a peer that signed that it wants it, at no address but the one that
                the stream comes from: no peer can be used to look for open ports elsewhere
    transfer    some frames up and down, at most MAX_STREAM_BYTES for a stream, one stream at a time, not in a round

Strangers ask, too: a token bucket for each peer and one for all, and everything ends within ``probe_s``. Known
weakness: behind something that hides where connections come from (a proxy of containers, say), a stranger learns
whether ports of that machine are open, four at a time.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from p2p_diloco.core.addresses import ip_maddr
from p2p_diloco.core.buckets import Quota, Rate
from p2p_diloco.core.errors import Gone, Misbehaved, RemoteError, Silent
from p2p_diloco.core.identity import MAX_PEER_ID_CHARS, Identity
from p2p_diloco.core.records import Signed, seal, unseal
from p2p_diloco.core.waiting import deadline, now_s
from p2p_diloco.round.here import Here
from p2p_diloco.wire.channel import DIAL_BACK_PROTOCOL, Channel
from p2p_diloco.wire.messages import No
from p2p_diloco.wire.probe_messages import (
    MAX_TRANSFER_BYTES,
    AskDialBack,
    AskTransfer,
    DialBack,
    DialedBack,
    Transferred,
)

CONSENT_CONTEXT = b"p2p-diloco dial consent\0"
MAX_PORTS = 4
DIALS = 2
"""At a time."""
MAX_STREAM_BYTES = 4 * MAX_TRANSFER_BYTES
MAX_EXCHANGES = 32
"""On one stream, empty ones included."""
BUSY_PHASES = ("gather", "reduce", "settle", "apply")
ALL = ""
"""Stands for everybody in a token bucket."""

PeerId = Annotated[str, Field(min_length=1, max_length=MAX_PEER_ID_CHARS)]


class DialConsent(Signed):
    """The statement of the peer that signs it, ``peer_id``: it wants to be dialled by ``dialler`` because ``asker``,
    another identity of its own, asks.

    It takes two identities: libp2p dials nobody with whom it is connected, and the asker is connected."""

    asker: PeerId
    dialler: PeerId
    ports: Annotated[list[Annotated[int, Field(gt=0, lt=65536)]], Field(min_length=1, max_length=MAX_PORTS)]


def seal_consent(consent: DialConsent, identity: Identity) -> bytes:
    """Returns the signed consent."""
    return seal(consent, CONSENT_CONTEXT, identity)


@dataclass(kw_only=True, eq=False)
class Probes:
    """Answers what others want to measure, at one peer."""

    here: Here
    rate: Rate | None = None
    """Of all that this peer uploads, where it is limited."""
    _dials: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(DIALS))
    _transfers: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))
    _dials_of_one: Quota = field(default_factory=lambda: Quota(per_s=1 / 30, burst=3))
    _dials_in_all: Quota = field(default_factory=lambda: Quota(per_s=1 / 2, burst=10))
    _transfers_of_one: Quota = field(default_factory=lambda: Quota(per_s=1 / 30, burst=3))
    _transfers_in_all: Quota = field(default_factory=lambda: Quota(per_s=1 / 10, burst=6))
    """With MAX_STREAM_BYTES a stream: 0.8 MB a second, however many identities ask."""

    async def on_ask_dial_back(self, channel: Channel, message: AskDialBack) -> None:
        """Dials the peer that has consented, and tells the one that asks whether it could."""
        consent = self._open_consent(channel.peer_id, message.consent)
        refusal = self._refusal(channel.peer_id, self._dials, self._dials_of_one, self._dials_in_all)
        if not channel.remote_ip:
            refusal = "you come through a relay"
        if refusal:
            await channel.send(No(reason=refusal))
            return
        async with self._dials:
            reason = await self._dial(consent, channel.remote_ip)
        await channel.send(DialedBack(reached=not reason, ip=channel.remote_ip, reason=reason))

    async def on_ask_transfer(self, channel: Channel, message: AskTransfer) -> None:
        """Transfers bytes up and down the stream, as often as it is asked to."""
        refusal = self._refusal(channel.peer_id, self._transfers, self._transfers_of_one, self._transfers_in_all)
        if refusal:
            await channel.send(No(reason=refusal))
            return
        async with self._transfers:
            try:
                async with deadline(self.here.timeouts.probe_s):
                    await self._transfer(channel, message)
            except asyncio.TimeoutError:
                raise Silent(channel.peer_id, "has not measured what it wants to in time") from None
            except Gone:  # it knows enough
                return

    def _open_consent(self, asker: str, sealed: bytes) -> DialConsent:
        try:
            consent = unseal(sealed, DialConsent, CONSENT_CONTEXT)
        except ValueError as error:
            raise Misbehaved(asker, f"asks for a dial with {error}") from error
        if consent.asker != asker or consent.dialler != self.here.peer_id:
            raise Misbehaved(asker, "asks for a dial with a consent that was given to another peer")
        return consent

    def _refusal(self, peer_id: str, slots: asyncio.Semaphore, of_one: Quota, in_all: Quota) -> str:
        asked_s = now_s()
        if slots.locked():
            return "busy with others"
        if not of_one.take(peer_id, asked_s):
            return "asked too often"
        return "" if in_all.take(ALL, asked_s) else "busy with others"

    async def _dial(self, consent: DialConsent, ip: str) -> str:
        """Returns why the peer is not reached; "" when it is."""
        maddrs = [f"{ip_maddr(ip, port)}/p2p/{consent.peer_id}" for port in consent.ports]
        try:
            stream = await self.here.transport.open(consent.peer_id, maddrs, DIAL_BACK_PROTOCOL)
            try:
                await stream.send(DialBack())
            finally:
                stream.close()
        except RemoteError as error:
            return error.reason[:200]
        return ""

    async def _transfer(self, channel: Channel, message: AskTransfer) -> None:
        timeouts, left_bytes = self.here.timeouts, MAX_STREAM_BYTES
        for _ in range(MAX_EXCHANGES):
            size = message.up_bytes + message.down_bytes
            left_bytes -= size
            if left_bytes < 0:
                break
            if size and self._in_round():
                await channel.send(No(reason="in a round"))
                return
            data = await channel.receive_frame(message.up_bytes, timeouts.part_s)
            if len(data) != message.up_bytes:
                raise Misbehaved(channel.peer_id, f"transfers {len(data)} bytes where {message.up_bytes} are due")
            if self.rate is not None:
                await asyncio.sleep(self.rate.wait_s(message.down_bytes, now_s()))
            await channel.send(Transferred(wall_s=self.here.wall_s()))
            await channel.send_frame(os.urandom(message.down_bytes))  # zeros may be compressed on the way
            message = await channel.receive(AskTransfer, timeout_s=timeouts.first_message_s)
        raise Misbehaved(channel.peer_id, "asks for more transfers than one stream may have")

    def _in_round(self) -> bool:
        return self.here.seat.in_round or self.here.seat.closes_s is not None or self.here.seat.phase in BUSY_PHASES
