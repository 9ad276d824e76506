"""What all parts of one peer share: its place on the network, its key, the others' records, its seat, its clock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from p2p_diloco.core.admission import Claim
from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.directory import Directory
from p2p_diloco.core.electors import electorate
from p2p_diloco.core.errors import Silent
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.records import Record
from p2p_diloco.core.swarm_head import Standing
from p2p_diloco.core.waiting import deadline
from p2p_diloco.round.seat import Seat
from p2p_diloco.wire.channel import Channel, Transport, run_protocol


@dataclass(frozen=True, kw_only=True, eq=False)
class Here:
    """One peer, as its parts see it. ``Peer`` makes one, and every part gets the same."""

    transport: Transport
    identity: Identity
    directory: Directory
    """The newest record of every other peer of the run."""
    seat: Seat
    """Where this peer stands, and what it is at."""
    timeouts: Timeouts
    wall_s: Callable[[], float]
    """The clock that records are dated by."""
    sealed_seat: bytes = b""
    """Under which I take part in a run by invitation, as others read it."""

    @property
    def peer_id(self) -> str:
        """Returns this peer's id."""
        return self.directory.peer_id

    @property
    def claim(self) -> Claim:
        """Returns what I show others of my right to take part."""
        return Claim(peer_id=self.peer_id, seat=self.sealed_seat)

    @property
    def protocol(self) -> str:
        """Returns the name under which all peers of the run serve their streams."""
        return run_protocol(self.directory.run_id)

    def live(self) -> list[Record]:
        """Returns the records of all other peers that are there now."""
        return self.directory.live(self.wall_s())

    def voters(self) -> tuple[list[Record], Standing | None]:
        """Returns the records of those who have a vote on the swarm's head, as ``electorate`` has it, and my standing
        if I have one."""
        directory, seat = self.directory, self.seat
        believed = directory.believed(self.wall_s())
        return electorate(believed, seat.standing, self.claim, directory.before, seat.history, seat.anchor)

    async def open(self, peer_id: str) -> Channel:
        """Opens a stream to a peer of the run, at the addresses in its record. Raises Gone or Silent."""
        return await self.transport.open(peer_id, self.directory.maddrs(peer_id), self.protocol)

    async def open_within(self, peer_id: str, limit_s: float) -> Channel:
        """Opens a stream as ``open`` does. Silent when that takes longer than ``limit_s``."""
        try:
            async with deadline(limit_s):
                return await self.open(peer_id)
        except asyncio.TimeoutError:
            raise Silent(peer_id, f"cannot be reached within {limit_s:.3g} s") from None
