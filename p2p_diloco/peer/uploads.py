"""What a donor sends from its ledger to those who catch up: heads, the chain, updates, and snapshots in chunks; of a
snapshot that it downloads itself, what is here of it.

One stream carries any number of requests, answered one by one. It takes one of a few slots with its first update or
chunk, or much of the chain, and keeps it to its end, unless it takes things too slowly (``turns``); who finds none is
told so, and asks another donor. Training goes on meanwhile: files are read and hashed in threads, a snapshot takes no
memory but for the chunk that is being sent, and the rate can be limited.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from itertools import islice
from typing import TypeGuard

import msgpack

from p2p_diloco.core.buckets import Rate
from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.errors import Gone, Silent
from p2p_diloco.core.event import PhaseBegan
from p2p_diloco.core.events import EventLog
from p2p_diloco.core.waiting import now_s
from p2p_diloco.ledger.ledger import Ledger
from p2p_diloco.ledger.snapshot import (
    IncomingSnapshot,
    SnapshotInfo,
    chunk_hash,
    chunk_slices,
    pack_held,
    read_chunk,
)
from p2p_diloco.peer.turns import Turn, Turns
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.message import CHUNK_BYTES
from p2p_diloco.wire.messages import No, Size
from p2p_diloco.wire.state_messages import (
    MAX_CHAIN_BYTES,
    MAX_LINKS,
    AskChain,
    AskChunk,
    AskHave,
    AskHeads,
    AskIndex,
    AskUpdate,
    Have,
    Heads,
)

log = logging.getLogger(__name__)

UPLOADS = 4
"""Peers that updates or chunks are sent to at a time; others are sent to other donors."""

NOT_HERE = "not in my ledger"
SMALL_CHAIN_BYTES = 1024 * 1024
"""So much of the chain is sent without a slot: who missed a few rounds asks for little."""

Request = AskHeads | AskChain | AskIndex | AskHave | AskChunk | AskUpdate


class Uploads:
    """Serves a ledger to other peers.

    ``n``: values of the model. ``max_bytes_per_s``: for all streams together."""

    def __init__(
        self, *, ledger: Ledger, n: int, events: EventLog, timeouts: Timeouts, max_bytes_per_s: float | None
    ) -> None:
        self.ledger = ledger
        self.events = events
        self.timeouts = timeouts
        self.rate = None if max_bytes_per_s is None else Rate(bytes_per_s=max_bytes_per_s)
        self._slices = chunk_slices(n)
        self._turns = Turns(slots=slots(max_bytes_per_s, timeouts), timeouts=timeouts)

    async def serve(self, channel: Channel, request: Request) -> None:
        """Answers this request and those that follow it on the stream, until its other side closes it or asks nothing
        more."""
        with contextlib.suppress(Gone):  # who has what it wants, perhaps from others, closes the stream
            while not self._is_upload(request):
                await self._answer(channel, request)
                request = await self._next(channel)
            turn = self._turns.take(channel.peer_id, now_s())
            if turn is None:
                await channel.send(No(reason="busy serving others"))
                return
            step = request.since if isinstance(request, AskChain) else request.step
            self.events.write(PhaseBegan(phase="serve", step=step))
            try:
                await self._serve_turn(channel, request, turn)
            finally:
                self._turns.leave(turn, now_s())

    async def _serve_turn(self, channel: Channel, request: Request, turn: Turn) -> None:
        """Answers this request and those that follow it, until the peer's turn is over, which it is told."""
        next_request: Request | None = request
        while next_request is not None:
            await self._answer(channel, next_request, turn)
            next_request = await self._next_in_turn(channel, turn)
        await channel.send(No(reason=turn.why_over))

    async def _next(self, channel: Channel) -> Request:
        try:
            return await channel.receive(
                *(AskHeads, AskChain, AskIndex, AskHave, AskChunk, AskUpdate), timeout_s=self.timeouts.first_message_s
            )
        except Silent as error:
            raise Gone(channel.peer_id, "asks nothing more") from error

    async def _next_in_turn(self, channel: Channel, turn: Turn) -> Request | None:
        """Returns what the peer asks for next; None when its turn is over."""
        turn.wait(now_s())
        asking, over = asyncio.create_task(self._next(channel)), asyncio.create_task(turn.over.wait())
        try:
            await asyncio.wait((asking, over), return_when=asyncio.FIRST_COMPLETED)
            turn.go_on(now_s())
            if turn.least.left_s < 0:
                turn.end("you take things too slowly")
            return asking.result() if asking.done() and not turn.why_over else None
        finally:
            for task in (asking, over):
                task.cancel()
            await asyncio.gather(asking, over, return_exceptions=True)

    async def _answer(self, channel: Channel, request: Request, turn: Turn | None = None) -> None:
        if isinstance(request, AskHeads):
            await channel.send(await asyncio.to_thread(self._heads, request))
            return
        if isinstance(request, AskHave):
            await channel.send(self._have(request))
            return
        data = await asyncio.to_thread(self._find, request)
        if isinstance(data, No):
            await channel.send(data)
            return
        await channel.send(Size(size_bytes=len(data)))
        for start in range(0, len(data), CHUNK_BYTES):
            frame = memoryview(data)[start : start + CHUNK_BYTES]
            if self.rate is not None:
                await asyncio.sleep(self.rate.wait_s(len(frame), now_s()))
            if turn is None:
                await channel.send_frame(frame)
                continue
            if turn.cut_off:
                raise Gone(channel.peer_id, "took too long over what others wait for")
            turn.wait(now_s())
            await channel.send_frame(frame)
            turn.go_on(now_s(), len(frame))

    # -- what there is -----------------------------------------------------------------------------------------------

    def _is_upload(self, request: Request) -> TypeGuard[AskChain | AskChunk | AskUpdate]:
        """Tells whether a request is for something large that is there."""
        if isinstance(request, AskChain):
            return self.ledger.chain.packed_bytes(request.since) > SMALL_CHAIN_BYTES
        if isinstance(request, AskUpdate):
            return self._has_update(request)
        if not isinstance(request, AskChunk):
            return False
        return self._snapshot(request) is not None or self._incoming(request) is not None

    def _has_update(self, request: AskUpdate) -> bool:
        header = self.ledger.header(request.step)
        return header is not None and header.head == request.head

    def _snapshot(self, request: AskIndex | AskHave | AskChunk) -> SnapshotInfo | None:
        held = (s for s in self.ledger.snapshots() if (s.step, s.digest) == (request.step, request.digest))
        return next(held, None)

    def _incoming(self, request: AskHave | AskChunk) -> IncomingSnapshot | None:
        """Returns the snapshot, if it is the one that is being downloaded."""
        incoming = self.ledger.incoming
        sought = incoming is not None and (incoming.step, incoming.digest) == (request.step, request.digest)
        return incoming if sought else None

    def _have(self, request: AskHave) -> Have | No:
        if self._snapshot(request) is not None:
            return Have(chunks=pack_held(bytes([1]) * len(self._slices)))
        incoming = self._incoming(request)
        return No(reason=NOT_HERE) if incoming is None else Have(chunks=pack_held(incoming.held))

    def _find(self, request: AskChain | AskIndex | AskChunk | AskUpdate) -> bytes | No:
        """Returns what is asked for, verified again, whatever the disk has made of it: an honest donor sends no wrong
        chunk."""
        if isinstance(request, AskChain):
            entries = self.ledger.chain.pieces(request.since, MAX_CHAIN_BYTES)
            return bytes(msgpack.packb(entries)) if entries else No(reason="not in my chain")
        if isinstance(request, AskUpdate):
            if not self._has_update(request):
                return No(reason=NOT_HERE)
            return self.ledger.update_bytes(request.step) or No(reason="gone or found damaged")
        if isinstance(request, AskChunk):
            return self._find_chunk(request)
        snapshot = self._snapshot(request)
        return No(reason=NOT_HERE) if snapshot is None else b"".join((snapshot.head, *snapshot.chunk_hashes))

    def _find_chunk(self, request: AskChunk) -> bytes | No:
        snapshot = self._snapshot(request)
        if snapshot is None:
            incoming = self._incoming(request)
            here = None if incoming is None else incoming.read(request.chunk)
            return No(reason=NOT_HERE) if here is None else here
        if request.chunk >= len(self._slices):
            return No(reason=NOT_HERE)
        chunk = read_chunk(snapshot.path, self._slices[request.chunk])
        if chunk_hash(chunk) != snapshot.chunk_hashes[request.chunk]:
            log.warning("%s: chunk %d is gone or damaged", snapshot.path, request.chunk)
            return No(reason="gone or found damaged")
        return chunk

    def _heads(self, request: AskHeads) -> Heads | No:
        """Returns my heads from ``since`` on, as far back from the newest one as one leads to the next: what is before
        a gap leads nowhere. Of pruned ones, what my chain has."""
        since, chain = request.since, self.ledger.chain
        if request.pruned:
            head = chain.head_at(since)
            return (
                No(reason=NOT_HERE)
                if head is None
                else Heads(first=since, head=head, links=chain.links(since, MAX_LINKS))
            )
        mine = self.ledger.heads()
        first = max((step for step in mine if step >= since), default=None)
        if first is None:
            return No(reason=NOT_HERE)
        links: deque[bytes] = deque()
        while first > since:
            before = self.ledger.header(first - 1)
            if before is None or (before.parent, before.head) != (mine.get(first - 1), mine[first]):
                break
            links.appendleft(before.link)
            first -= 1
        return Heads(first=first, head=mine[first], links=list(islice(links, MAX_LINKS)))


def slots(max_bytes_per_s: float | None, timeouts: Timeouts) -> int:
    """Returns how many streams may upload at a time: as many as get a chunk through in half the time that a peer waits
    for one."""
    if max_bytes_per_s is None:
        return UPLOADS
    in_time = max_bytes_per_s * timeouts.reduced_part_s / 2 / CHUNK_BYTES
    return min(max(int(in_time), 1), UPLOADS)
