"""One download: numbered items from several donors at a time, each item verified before it counts.

    Wanted      what is fetched: how an item is asked for, and what becomes of the answer; Chunks, or Updates
    Download    at most DONORS donors at a time, each with one stream, on which the next item is asked for before the
                last one is there

A donor that fails, lies or is busy is dropped, and what it owes is asked from the others. A slow one gives less than
they do; and once there is nothing else to ask for, whoever is idle is asked for what it owes, so that it cannot hold up
the end.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.errors import Misbehaved, Refused, RemoteError
from p2p_diloco.core.grid import Grid
from p2p_diloco.core.records import Record
from p2p_diloco.core.update import Update, max_update_bytes, update_from_bytes
from p2p_diloco.core.waiting import Bell, heard, now_s
from p2p_diloco.ledger.snapshot import IncomingSnapshot
from p2p_diloco.peer.handout import RECENT, Handout
from p2p_diloco.round.here import Here
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.message import Message
from p2p_diloco.wire.state_messages import AskChunk, AskUpdate

log = logging.getLogger(__name__)

DONORS = 4
"""At a time."""
AHEAD_BYTES = 1 << 30
"""Memory for updates; two of them in any case, so that two donors can send at a time."""


class Wanted(Protocol):
    """Says what a download fetches: numbered items, each asked for and verified alone."""

    depth: int
    """Items asked from one donor at a time."""
    item_bytes: int
    """Of the largest item."""

    @property
    def draw(self) -> Random | None:
        """Returns what draws among items that are alike; None where the lowest comes first."""

    def request(self, item: int) -> Message:
        """Returns the message that asks a donor for an item."""

    async def receive(self, channel: Channel, item: int) -> None:
        """Receives the answer to ``request(item)``, verifies it, and keeps it. Raises RemoteError. An item may come
        twice."""


@dataclass(kw_only=True, eq=False)
class Chunks:
    """The chunks of one snapshot, which are kept on disk. Others may download it, too: so each takes them in another
    order."""

    incoming: IncomingSnapshot
    timeouts: Timeouts
    draw: Random
    depth: int = 2

    def __post_init__(self) -> None:
        first = self.incoming.slices[0]
        self.item_bytes = first.stop - first.start

    def request(self, item: int) -> Message:
        return AskChunk(step=self.incoming.step, digest=self.incoming.digest, chunk=item)

    async def receive(self, channel: Channel, item: int) -> None:
        where = self.incoming.slices[item]
        data = await channel.receive_blob(where.stop - where.start, self.timeouts.reduced_part_s)
        try:
            await asyncio.to_thread(self.incoming.write, item, data)
        except ValueError as error:
            raise Misbehaved(channel.peer_id, f"serves {error}") from error


@dataclass(kw_only=True, eq=False)
class Updates:
    """The updates along one path, which are kept in memory until they are taken in their order. A donor is asked for
    one at a time: they are large.

    ``heads[step + 1]``: the head that update ``step`` must lead to."""

    grid: Grid
    heads: dict[int, bytes]
    timeouts: Timeouts
    next_step: int
    """Earlier ones are not kept."""
    ready: dict[int, tuple[Update, str]] = field(default_factory=dict)
    """With the id of the peer that sent it."""
    depth: int = 1
    draw: None = None

    def __post_init__(self) -> None:
        self.item_bytes = max_update_bytes(self.grid)
        self.ahead = max(2, min(2 * DONORS, AHEAD_BYTES // self.item_bytes))
        """So many are on their way, or wait for the one before them."""

    def request(self, item: int) -> Message:
        return AskUpdate(step=item, head=self.heads[item + 1])

    async def receive(self, channel: Channel, item: int) -> None:
        data = await channel.receive_blob(self.item_bytes, self.timeouts.reduced_part_s)
        try:
            update = await asyncio.to_thread(update_from_bytes, data, self.grid)
            if (update.header.step, update.header.head) != (item, self.heads[item + 1]):
                raise ValueError("an update that leads to another head")
        except ValueError as error:
            raise Misbehaved(channel.peer_id, f"serves {error}") from error
        if item >= self.next_step:
            self.ready[item] = (update, channel.peer_id)

    def take(self) -> tuple[Update, str] | None:
        """Returns the next update and the id of the peer that sent it; None while it is not there."""
        found = self.ready.pop(self.next_step, None)
        if found is not None:
            self.next_step += 1
        return found


@dataclass(kw_only=True, eq=False)
class Download:
    """One download of ``items``, those of ``wanted`` that are missing, from ``donors``, who are asked in this order."""

    here: Here
    wanted: Wanted
    items: Iterable[int]
    limit: int
    """Items from here on wait until ``allow``."""
    donors: Iterable[Record]
    took_s: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    """How long items took to come, in earlier downloads of this kind, too."""
    changed: Bell = field(default_factory=Bell)
    """Rings when an item has come, when a donor is dropped, and at the end."""
    over: bool = False
    refused: bool = False
    """Whether a donor was busy, or had not what it was asked for."""
    bytes_received: int = 0
    gave: set[str] = field(default_factory=set)
    """Peer ids of the donors that something came from."""

    def __post_init__(self) -> None:
        late_s = self.wanted.depth * self.wanted.item_bytes / self.here.timeouts.slow_rate_bytes_per_s
        self.handout = Handout(self.items, limit=self.limit, late_s=late_s, took_s=self.took_s, draw=self.wanted.draw)
        self._waiting = deque(self.donors)

    async def run(self) -> bool:
        """Downloads until everything is there, or no donor is left. Returns whether everything came. Raises LocalError
        for the own disk."""
        workers = [asyncio.create_task(self._work()) for _ in range(min(DONORS, len(self._waiting)))]
        running, all_came = set(workers), asyncio.create_task(self._all_came())
        try:
            while running and self.handout.missing:
                done, _ = await asyncio.wait((*running, all_came), return_when=asyncio.FIRST_COMPLETED)
                for worker in done:
                    worker.result()
                running -= done
        finally:
            for task in (*workers, all_came):
                task.cancel()
            await asyncio.gather(*workers, all_came, return_exceptions=True)
            self.over = True
            self.changed.ring()
        return not self.handout.missing

    def allow(self, limit: int) -> None:
        """Lets items below ``limit`` be asked for from now on."""
        self.handout.limit = limit
        self.changed.ring()

    async def _all_came(self) -> None:
        """Returns when nothing is missing: the last item may have come from a partner."""
        while self.handout.missing:
            await self.changed.event.wait()

    async def _work(self) -> None:
        """Fetches from one donor after the other."""
        while self._waiting and self.handout.missing:
            donor = self._waiting.popleft()
            try:
                await self.fetch_from(donor)
            except RemoteError as error:
                self.refused |= isinstance(error, Refused)
                drop(error, self.here)
            finally:
                self.handout.give_back(donor.peer_id)
                self.changed.ring()

    async def fetch_from(self, donor: Record) -> None:
        """Fetches from one donor until nothing is missing. A stream without work is closed: a donor has few to
        serve."""
        channel: Channel | None = None
        owed: deque[int] = deque()
        try:
            while self.handout.missing:
                changed = self.changed.event
                while len(owed) < self.wanted.depth:
                    item = self.handout.take(donor.peer_id, now_s())
                    if item is None:
                        break
                    if channel is None:
                        channel = await self.here.transport.open(donor.peer_id, donor.maddrs, self.here.protocol)
                    await channel.send(self.wanted.request(item))
                    owed.append(item)
                if channel is not None and owed:
                    await self.wanted.receive(channel, owed[0])
                    if self.handout.arrived(owed.popleft(), donor.peer_id, now_s()):
                        self.gave.add(donor.peer_id)
                        self.changed.ring()
                    continue
                if channel is not None:
                    self._close(channel)
                    channel = None
                await heard(changed, self.handout.wait_s(donor.peer_id, now_s()))
        finally:
            if channel is not None:
                self._close(channel)

    def _close(self, channel: Channel) -> None:
        self.bytes_received += channel.meter.received
        channel.close()


@dataclass(kw_only=True)
class Tally:
    """Adds up what the downloads of one catch-up have taken, whether it succeeds or not."""

    bytes_received: int = 0
    donors: set[str] = field(default_factory=set)
    """Peer ids of those that something came from."""
    refused: bool = False
    """Whether a donor was busy, or had not what it was asked for."""
    snapshot: bool = False
    """Whether a snapshot came."""

    def add(self, download: Download) -> None:
        """Counts what a download has taken, once it is over."""
        self.bytes_received += download.bytes_received
        self.donors |= download.gave
        self.refused |= download.refused


def drop(error: RemoteError, here: Here) -> None:
    """Says why a donor is asked no more. A donor that refuses is an honest peer; any other is not counted on until it
    signs a newer record."""
    here.transport.traffic.reject(error)
    donor = here.directory.get(error.peer_id)
    label = donor.label if donor else error.peer_id[-8:]
    if isinstance(error, Refused):
        log.info("donor %s cannot serve now: %s", label, error.reason)
    else:
        log.info("donor %s dropped: %s", label, error.reason)
        here.directory.suspect(error.peer_id)
