"""Whom a peer may form a round with, as it sees the swarm: who ranks first, who has failed it, and where they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.directory import Directory
from p2p_diloco.core.errors import Misbehaved
from p2p_diloco.core.manifest import RunManifest
from p2p_diloco.core.records import Record
from p2p_diloco.core.roster import leader_order
from p2p_diloco.core.swarm_head import must_catch_up, swarm_head, way_of
from p2p_diloco.core.waiting import now_s
from p2p_diloco.round.seat import Seat
from p2p_diloco.wire.channel import Channel, Transport, run_protocol

CHANCES = 2
"""Of a leader on one head. A second one, for it may just have been stopped, and others may be with it again."""
HEARTBEATS = 3
"""Words of a leader within the time after which a member takes it for dead."""
MAX_GATHER_EXTENSION_S = 30.0
"""Beyond ``gather_s``, for a peer in the middle of a long inner step."""


@dataclass(kw_only=True, eq=False)
class Company:
    transport: Transport
    manifest: RunManifest
    directory: Directory
    seat: Seat
    timeouts: Timeouts
    wall_s: Callable[[], float]
    failures: dict[tuple[bytes, str], list[float]] = field(default_factory=dict)
    """(head, peer id) -> loop times until which it counts that this leader has failed me there; of my head only."""

    @property
    def me(self) -> str:
        return self.directory.peer_id

    def leaders(self, head: bytes) -> list[str]:
        """Who may lead on ``head``, in the order in which they are asked."""
        order = leader_order(self.directory.expected(self.wall_s()), head, self.me, self.seat.client_mode)
        return [peer_id for peer_id in order if self.is_fit(head, peer_id)]

    def failed(self, head: bytes, leader: str, *, lied: bool = False) -> None:
        """As a leader on ``head``."""
        until_s = now_s() + self.timeouts.record_life_s
        self.failures.setdefault((head, leader), []).extend([until_s] * (CHANCES if lied else 1))

    def is_fit(self, head: bytes, leader: str) -> bool:
        return sum(until_s > now_s() for until_s in self.failures.get((head, leader), ())) < CHANCES

    def forget_failures(self, head: bytes) -> None:
        """On any other head."""
        self.failures = {which: until_s for which, until_s in self.failures.items() if which[0] == head}

    def learn(self, source: str, sealed: bytes) -> Record | None:
        """``Directory.learn``; Misbehaved of ``source`` where the record is not sound."""
        try:
            return self.directory.learn(sealed, self.wall_s())
        except ValueError as error:
            raise Misbehaved(source, f"sends {error}") from error

    def learn_own(self, source: str, sealed: bytes) -> Record | None:
        """The same of a record that has to be that of ``source``."""
        try:
            return self.directory.learn_from(source, sealed, self.wall_s())
        except ValueError as error:
            raise Misbehaved(source, f"sends {error}") from error

    def beyond(self, head: bytes) -> bytes | None:
        """The sealed record of a peer elsewhere, where I have left ``head``, or the swarm has: no group is formed on it
        any more."""
        voters, standing, before = self.directory.believed(self.wall_s()), self.seat.standing, self.directory.before
        if head != standing.head:
            return self.seat.sealed_record
        target = swarm_head(voters, standing, before)
        if target is None or not must_catch_up(standing, target):
            return None
        there = (record.peer_id for record in voters if target[1] in way_of(record, before))
        return next(filter(None, map(self.directory.sealed, there)), None)

    async def open(self, peer_id: str) -> Channel:
        return await self.transport.open(peer_id, self.directory.maddrs(peer_id), run_protocol(self.manifest.run_id))

    def longest_s(self, *, busy: bool) -> float:
        """Nobody gathers for longer than that. ``busy``: nor waits for who is in another round first."""
        longest_s = self.manifest.spec.round.gather_s + MAX_GATHER_EXTENSION_S
        return longest_s + self.timeouts.round_limit_s(8 * self.manifest.n_params) if busy else longest_s
