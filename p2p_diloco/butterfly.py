"""One all-reduce in one group, and its settling.

    reduce   Every part has one reducer. A sender streams its contributions to a reducer's parts over one stream and
             reads the means back on the same stream. The reducer decodes, checks, takes the weighted mean in the order
             of the roster, encodes it once and sends *these bytes* to everybody; it uses the decoded bytes itself.
    settle   Members tell the leader the hashes of the parts they hold. Where all parts are held by somebody, the
             leader's list of hashes is the update; members fetch from each other what they miss.

A contribution goes through the codec even where sender and reducer are the same peer, so that the result does not
depend on who reduces what. Contributions are computed part by part as theta - local: no gradient buffer exists.

A sender that fails is left out from that part on; a reducer that fails leaves holes. Nothing here raises for what
another peer does: the result is an update, or a Missed with the reason, and the peers that failed are in ``lost``.

Known weak point: a part whose reducer died before anybody had it makes the round fail; the survivors then meet again.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from p2p_diloco.codec import Codec, Vector, decode, encode, encoded_bytes
from p2p_diloco.config import Timeouts
from p2p_diloco.errors import Misbehaved, RemoteError
from p2p_diloco.outer import (
    MAX_CONTRIBUTORS,
    Part,
    Update,
    check_mask,
    contributor_mask,
    part_slices,
    weighted_mean,
)
from p2p_diloco.records import Directory
from p2p_diloco.rounds import Group, Missed
from p2p_diloco.waiting import Bell, deadline, heard
from p2p_diloco.wire import AskPart, Channel, Commit, Contribute, No, Receipt, Transport

log = logging.getLogger(__name__)

MAX_MASK_BYTES = MAX_CONTRIBUTORS // 8
QUEUED_PARTS = 2
"""Contributions of one sender that a reducer holds decoded; the sender waits beyond. Those of one that is lost are
read and thrown away: it still gets the means."""


@dataclass(frozen=True, kw_only=True)
class RoundCost:
    reduce_s: float
    settle_s: float
    bytes_sent: int
    bytes_received: int


@dataclass(kw_only=True, eq=False)
class Butterfly:
    """One round at one member. Theta and local are float32 [n] and do not change while it runs."""

    group: Group
    transport: Transport
    protocol: str
    directory: Directory
    timeouts: Timeouts
    codec: Codec
    theta: Vector
    local: Vector
    min_group: int
    parts: list[Part | None] = field(init=False)
    """What I hold of the update."""
    lost: set[int] = field(default_factory=set)
    """Members that failed me in this round."""
    channels: list[Channel] = field(default_factory=list)
    receipts: dict[int, list[bytes]] = field(default_factory=dict)
    """Leader only: member -> hashes of the parts it holds."""
    commit: Commit | No | None = None
    """Leader only."""
    changed: Bell = field(default_factory=Bell)
    queues: dict[int, asyncio.Queue[Vector | None]] = field(default_factory=dict)
    """Reducer only: member -> its decoded contributions to my parts, in order; None when there will be no more."""
    over: bool = False
    """Nothing more will be reduced or committed; what there is can still be served."""
    reduce_s: float = 0.0
    settle_s: float = 0.0

    def __post_init__(self) -> None:
        self.slices = part_slices(len(self.theta))
        self.parts = [None] * len(self.slices)
        others = [i for i in range(len(self.group.members)) if i != self.group.me]
        self.queues = {i: asyncio.Queue(QUEUED_PARTS) for i in others}
        self.waiting = set(others)
        """Reducer only: senders whose stream has not come yet."""

    async def run(self) -> Update | Missed:
        """Reduce and settle."""
        limit_s = self.timeouts.round_limit_s(2 * encoded_bytes(len(self.theta), self.codec))
        try:
            async with deadline(limit_s):
                return await self._run()
        except asyncio.TimeoutError:
            return Missed(reason="failed", detail=f"the round took longer than {limit_s:.0f} s")
        finally:
            self.over = True
            self.changed.ring()

    async def _run(self) -> Update | Missed:
        started_s = self._now()
        others = [reducer for reducer in self.group.reducers if reducer != self.group.me and self._parts_of(reducer)]
        await run_all(self._reduce(), *(self._contribute(reducer) for reducer in others))
        self.reduce_s = self._now() - started_s
        outcome = await self._settle()
        self.settle_s = self._now() - started_s - self.reduce_s
        return outcome

    def cost(self) -> RoundCost:
        return RoundCost(
            reduce_s=self.reduce_s,
            settle_s=self.settle_s,
            bytes_sent=sum(channel.bytes_sent for channel in self.channels),
            bytes_received=sum(channel.bytes_received for channel in self.channels),
        )

    # -- reduce ------------------------------------------------------------------------------------------------------

    def _parts_of(self, reducer: int) -> list[int]:
        return [part for part in range(len(self.parts)) if self.group.reducer_of(part) == reducer]

    def _contribution(self, part: int) -> bytes:
        """The encoded outer gradient. ValueError when training has made it infinite or NaN."""
        where = self.slices[part]
        return encode(np.subtract(self.theta[where], self.local[where]), self.codec)

    def _values(self, part: int) -> int:
        where = self.slices[part]
        return len(self.theta[where])

    async def _contribute(self, reducer: int) -> None:
        """Send my contributions to one reducer's parts, and take the means."""
        parts = self._parts_of(reducer)
        try:
            channel = await self._open(reducer)
            try:
                await channel.send(Contribute(round_id=self.group.round_id))
                await run_all(self._send_contributions(channel, parts), self._receive_means(channel, parts))
            finally:
                channel.close()
        except RemoteError as error:
            self._lose(reducer, error)

    async def _send_contributions(self, channel: Channel, parts: list[int]) -> None:
        for part in parts:
            await channel.send_frame(self._contribution(part))

    async def _receive_means(self, channel: Channel, parts: list[int]) -> None:
        for part in parts:
            self.parts[part] = await self._receive_part(channel, part, self.timeouts.reduced_part_s)

    async def _receive_part(self, channel: Channel, part: int, timeout_s: float) -> Part:
        size = encoded_bytes(self._values(part), self.codec)
        data = await channel.receive_frame(1 + MAX_MASK_BYTES + size, timeout_s)
        if not data or len(data) != 1 + data[0] + size or data[0] > MAX_MASK_BYTES:
            raise Misbehaved(channel.peer_id, f"sends part {part} with a wrong length")
        received = Part(mask=data[1 : 1 + data[0]], data=data[1 + data[0] :])
        try:
            check_mask(received.mask, len(self.group.members))
            decode(received.data, self._values(part), self.codec)
        except ValueError as error:
            raise Misbehaved(channel.peer_id, f"sends part {part} that does not decode: {error}") from error
        return received

    async def _reduce(self) -> None:
        """Take the mean of my parts, one after another, with the contributions that come in time."""
        mine = self._parts_of(self.group.me)
        for part in mine:
            others = await asyncio.gather(*(self._next_contribution(sender) for sender in self.queues))
            came = dict(zip(self.queues, others))
            came[self.group.me] = decode(self._contribution(part), self._values(part), self.codec)
            indices = [i for i in range(len(self.group.members)) if came[i] is not None]
            mean = weighted_mean([(self.group.weights[i], v) for i, v in sorted(came.items()) if v is not None])
            self.parts[part] = Part(mask=contributor_mask(indices), data=encode(mean, self.codec))
            self.changed.ring()

    async def _next_contribution(self, sender: int) -> Vector | None:
        if sender in self.lost:
            return None
        try:
            async with deadline(self.timeouts.part_s):
                values = await self.queues[sender].get()
            self.changed.ring()
        except asyncio.TimeoutError:
            values = None
        if values is None:
            self._lose(sender, None)
        return values

    async def on_contribute(self, channel: Channel) -> None:
        """A member's stream to me as a reducer."""
        sender = self._member(channel.peer_id)
        if sender not in self.waiting:
            raise Misbehaved(channel.peer_id, "opens a second stream in a round")
        self.waiting.discard(sender)
        self.channels.append(channel)
        mine = self._parts_of(self.group.me)
        await run_all(self._take_contributions(channel, sender, mine), self._send_means(channel, mine))

    async def _take_contributions(self, channel: Channel, sender: int, parts: list[int]) -> None:
        queue = self.queues[sender]
        try:
            for part in parts:
                size = encoded_bytes(self._values(part), self.codec)
                data = await channel.receive_frame(size, self.timeouts.reduced_part_s)
                try:
                    values = decode(data, self._values(part), self.codec)
                except ValueError as error:
                    raise Misbehaved(channel.peer_id, f"sends a contribution that does not decode: {error}") from error
                while queue.full() and sender not in self.lost and not self.over:
                    await self.changed.event.wait()
                if sender not in self.lost and not self.over:
                    queue.put_nowait(values)
        except RemoteError as error:
            self._lose(sender, error)
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(None)

    async def _send_means(self, channel: Channel, parts: list[int]) -> None:
        for part in parts:
            while True:
                changed, reduced = self.changed.event, self.parts[part]
                if reduced is not None:
                    break
                if self.over:
                    return
                await changed.wait()
            await channel.send_frame(bytes([len(reduced.mask)]), reduced.mask, reduced.data)

    # -- settle ------------------------------------------------------------------------------------------------------

    async def _settle(self) -> Update | Missed:
        hashes = [part.hash if part else b"" for part in self.parts]
        if self.group.leader == self.group.me:
            commit = await self._lead_settling(hashes)
        else:
            commit = await self._ask_commit(hashes)
        if isinstance(commit, No):
            return Missed(reason="failed", detail=commit.reason)
        if len(commit.part_hashes) != len(self.parts) or len(commit.holders) != len(self.parts):
            return Missed(reason="failed", detail="the leader's commit names another number of parts")
        await self._fetch_missing(commit)
        held = [part for part in self.parts if part is not None]
        if tuple(part.hash for part in held) != tuple(commit.part_hashes):
            return Missed(reason="behind", detail="the round committed, but parts of the update could not be fetched")
        return Update(header=self.group.header(commit.part_hashes), parts=tuple(held))

    async def _lead_settling(self, mine: list[bytes]) -> Commit | No:
        """Wait for everybody's receipt, then name the bytes of every part."""
        self.receipts[self.group.me] = mine
        deadline_s = self._now() + self.timeouts.settle_s
        while True:
            changed = self.changed.event
            awaited = set(range(len(self.group.members))) - self.receipts.keys() - self.lost
            if not awaited or self._now() >= deadline_s:
                break
            await heard(changed, deadline_s - self._now())
        for member in awaited:
            self._lose(member, None)
        self.commit = choose_parts(self.receipts, len(self.parts), self.min_group)
        self.changed.ring()
        return self.commit

    async def _ask_commit(self, mine: list[bytes]) -> Commit | No:
        """Give my receipt to the leader and take the commit."""
        leader = self.group.leader
        try:
            channel = await self._open(leader)
            try:
                receipt = Receipt(round_id=self.group.round_id, part_hashes=mine)
                wait_s = self.timeouts.reduced_part_s + self.timeouts.settle_s
                answer: Commit | No = await channel.request(receipt, Commit, No, timeout_s=wait_s)
                return answer
            finally:
                channel.close()
        except RemoteError as error:
            self._lose(leader, error)
            return No(reason="the leader of the round is gone")

    async def on_receipt(self, channel: Channel, message: Receipt) -> None:
        """Leader: a member tells me what it holds; it gets the commit when there is one."""
        member = self._member(channel.peer_id)
        self.channels.append(channel)
        if self.group.leader != self.group.me or len(message.part_hashes) != len(self.parts):
            raise Misbehaved(channel.peer_id, "sends a receipt that does not fit the round")
        if self.commit is None:
            self.receipts[member] = message.part_hashes
            self.changed.ring()
        while True:
            changed, commit = self.changed.event, self.commit
            if commit is not None:
                break
            if self.over:
                await channel.send(No(reason="the round is over"))
                return
            await changed.wait()
        await channel.send(commit)

    async def _fetch_missing(self, commit: Commit) -> None:
        """Get the parts of the commit that I do not hold from who does; one stream at a time to each holder."""
        wanted_from: dict[int, list[int]] = {}
        for part, (held, wanted) in enumerate(zip(self.parts, commit.part_hashes)):
            if held is None or held.hash != wanted:
                self.parts[part] = None
                wanted_from.setdefault(commit.holders[part], []).append(part)
        sources = [i for i in wanted_from if i < len(self.group.members) and i != self.group.me]
        await run_all(*(self._fetch(commit, holder, wanted_from[holder]) for holder in sources))

    async def _fetch(self, commit: Commit, holder: int, parts: list[int]) -> None:
        try:
            for part in parts:
                channel = await self._open(holder)
                try:
                    wanted = commit.part_hashes[part]
                    await channel.send(AskPart(round_id=self.group.round_id, part=part, hash=wanted))
                    received = await self._receive_part(channel, part, self.timeouts.request_s)
                finally:
                    channel.close()
                if received.hash != wanted:
                    raise Misbehaved(channel.peer_id, f"sends other bytes for part {part} than it said that it holds")
                self.parts[part] = received
        except RemoteError as error:
            self._lose(holder, error)

    async def on_ask_part(self, channel: Channel, message: AskPart) -> None:
        """A member misses a part that I said I hold."""
        self._member(channel.peer_id)
        self.channels.append(channel)
        part = self.parts[message.part] if message.part < len(self.parts) else None
        if part is None or part.hash != message.hash:
            await channel.send(No(reason="not held"))
            return
        await channel.send_frame(bytes([len(part.mask)]), part.mask, part.data)

    # -- both --------------------------------------------------------------------------------------------------------

    def _member(self, peer_id: str) -> int:
        for i, member in enumerate(self.group.members):
            if member.peer_id == peer_id:
                return i
        raise Misbehaved(peer_id, "meddles with a round that it is no member of")

    async def _open(self, member: int) -> Channel:
        peer_id = self.group.members[member].peer_id
        channel = await self.transport.open(peer_id, self.directory.maddrs(peer_id), self.protocol)
        self.channels.append(channel)
        return channel

    def _lose(self, member: int, error: RemoteError | None) -> None:
        if member in self.lost:
            return
        self.lost.add(member)
        self.changed.ring()
        peer_id = self.group.members[member].peer_id
        self.directory.suspect(peer_id)
        log.info("outer step %d: without %s: %s", self.group.step, peer_id[-8:], error.reason if error else "silent")

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


def choose_parts(receipts: dict[int, list[bytes]], n_parts: int, min_group: int) -> Commit | No:
    """The bytes of every part, by hash: what most hold, the smaller hash where that is even. No when too few answered,
    or when nobody holds some part."""
    if len(receipts) < min_group:
        return No(reason=f"{len(receipts)} of the group answered, {min_group} needed")
    chosen: list[bytes] = []
    holders: list[int] = []
    for part in range(n_parts):
        counts = Counter(hashes[part] for hashes in receipts.values() if hashes[part])
        if not counts:
            return No(reason=f"part {part} is lost with its reducer")
        if len(counts) > 1:
            log.warning("part %d: its reducer sent different bytes to different members", part)
        wanted = min(counts, key=lambda candidate: (-counts[candidate], candidate))
        chosen.append(wanted)
        holders.append(min(member for member, hashes in receipts.items() if hashes[part] == wanted))
    return Commit(part_hashes=chosen, holders=holders)


async def run_all(*work: Coroutine[Any, Any, None]) -> None:
    """Run all to their end. The first exception ends the others and is raised: none goes on unwatched."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
