"""What a peer pushes: its record, straight to others, who answer with theirs. ``presence`` makes the record.

A push is waited for where its answers say where the swarm is; those that have failed me are called beside all else.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

from p2p_diloco.core.errors import Misbehaved, RemoteError
from p2p_diloco.core.records import Record
from p2p_diloco.core.waiting import now_s
from p2p_diloco.round.here import Here
from p2p_diloco.wire.state_messages import Push

log = logging.getLogger(__name__)

PUSHED_AT_ONCE = 32
MAX_BESIDE = 64
"""Peers that are called at a time and not waited for."""


@dataclass(kw_only=True, eq=False)
class Pushes:
    """Sends my record to others, and takes theirs."""

    here: Here
    _waited_for: set[asyncio.Task[None]] = field(default_factory=set)
    """Pushes that somebody waits for, or has waited for."""
    _beside: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    """Peer id -> my record on its way to a peer that nothing waits for."""

    def call_unproven(self) -> None:
        """Tells the live peers that are not proven where I stand, beside all else: who answers is waited for from now
        on. Each is called with a pause that grows with every failure."""
        proven, called_s = self.here.directory.proven, now_s()
        for record in self.here.live():
            if len(self._beside) >= PUSHED_AT_ONCE:
                return
            if record.peer_id not in proven and proven.call(record.peer_id, called_s):
                self._to_one_beside(record)

    async def to_all(self) -> None:
        """Tells all live peers at once where I stand: I have joined, caught up, or am leaving. They answer with where
        they stand."""
        await self.to(self.here.live())

    async def to_seeds(self) -> None:
        """Tells the seeds where I stand, and they follow at once: what a group has committed shall soon be in more
        hands than the group's."""
        await self.to([record for record in self.here.live() if record.role == "seed"])

    async def to(self, peers: Iterable[Record]) -> None:
        """Sends my record to peers, PUSHED_AT_ONCE at a time, and takes theirs. One that does not answer is not counted
        on until it signs a newer record. Those that have failed me are not waited for, until they answer, and nobody is
        for longer than ``Timeouts.least_wait_s``: who is there answers at once, and rounds may wait for me."""
        some, proven = asyncio.Semaphore(PUSHED_AT_ONCE), self.here.directory.proven
        waited_for: list[Record] = []
        for record in peers:
            if proven.has_failed(record.peer_id):
                self._to_one_beside(record)
            else:
                waited_for.append(record)
        pushes = [asyncio.create_task(self._push(record, some)) for record in waited_for]
        for push in pushes:
            self._waited_for.add(push)
            push.add_done_callback(self._waited_for.discard)
        if pushes:
            await asyncio.wait(pushes, timeout=self.here.timeouts.least_wait_s)

    def _to_one_beside(self, record: Record) -> None:
        """Begins to send my record to a peer that nothing waits for, unless that is being done, or too many others
        are."""
        if record.peer_id not in self._beside and len(self._beside) < MAX_BESIDE:
            task = self._beside[record.peer_id] = asyncio.create_task(self._tell(record))
            task.add_done_callback(lambda _: self._beside.pop(record.peer_id, None))

    async def close(self) -> None:
        """Calls nobody any more."""
        beside = [*self._beside.values(), *self._waited_for]
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)

    async def _push(self, record: Record, some: asyncio.Semaphore) -> None:
        async with some:
            await self._tell(record)

    async def _tell(self, record: Record) -> None:
        try:
            channel = await self.here.transport.open(record.peer_id, record.maddrs, self.here.protocol)
            try:
                answer: Push = await channel.request(Push(record=self.here.seat.sealed_record), Push)
                self.learn(record.peer_id, answer.record)
                self.here.directory.proven.answered(record.peer_id)
            finally:
                channel.close()
        except RemoteError as error:
            log.debug("%s does not take our record: %s", record.label, error.reason)
            self.here.transport.traffic.reject(error)
            self.here.directory.suspect(record.peer_id)

    def learn(self, source: str, sealed: bytes) -> None:
        """Takes in a record that a peer has sent. Misbehaved where it is not sound."""
        try:
            self.here.directory.learn_from(source, sealed, self.here.wall_s())
        except ValueError as error:
            raise Misbehaved(source, f"pushes {error}") from error
