"""How a peer gets to the swarm's head, and how it helps others there: heads, updates and snapshots between ledgers.

One procedure serves the newcomer, who was away, who missed a round, and who went another way:

    1. ask a donor for its heads
    2. find the newest outer step at which its ledger and mine agree; where there is none, download a snapshot
    3. go back there, if I am elsewhere
    4. fetch and commit its updates, each checked against the head that it must lead to

A snapshot is believed when its digest is the manifest's (outer step 0) or the one that most donors name. A donor that
fails or lies is dropped and the next one asked; what has been downloaded by then stays.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from p2p_diloco.config import Timeouts
from p2p_diloco.errors import Misbehaved, Refused, RemoteError
from p2p_diloco.identity import Identity
from p2p_diloco.outer import max_update_bytes, update_from_bytes
from p2p_diloco.records import Directory, Record
from p2p_diloco.replica import Replica
from p2p_diloco.rounds import rank
from p2p_diloco.snapshot import disk_errors, snapshot_bytes
from p2p_diloco.wire import (
    CHUNK_BYTES,
    MAX_HEADS,
    AskHeads,
    AskSnapshot,
    AskUpdate,
    Channel,
    Heads,
    No,
    Size,
    Transport,
    run_protocol,
)

log = logging.getLogger(__name__)

UPLOADS = 4
"""Updates and snapshots served at a time; others are sent to other donors."""


@dataclass(frozen=True, kw_only=True)
class CaughtUp:
    from_step: int | None
    """None for a newcomer."""
    to_step: int
    rolled_back: int
    """Outer steps of mine that the swarm did not share."""
    snapshot: bool
    bytes_received: int


class Catchup:
    def __init__(
        self,
        *,
        transport: Transport,
        identity: Identity,
        directory: Directory,
        replica: Replica,
        timeouts: Timeouts,
        wall_s: Callable[[], float],
    ) -> None:
        self.transport = transport
        self.identity = identity
        self.directory = directory
        self.replica = replica
        self.timeouts = timeouts
        self.wall_s = wall_s
        self.protocol = run_protocol(replica.manifest.run_id)
        self._uploads = asyncio.Semaphore(UPLOADS)
        self.received_bytes = 0
        """Of the last ``to``, whether it succeeded or not."""

    # -- asking ------------------------------------------------------------------------------------------------------

    async def to(self, target: tuple[int, bytes]) -> CaughtUp | None:
        """Bring the replica to the swarm's head ``(outer step, head)``. None when no donor could help."""
        self.received_bytes = 0
        start = self.replica.state
        from_step, rolled_back, snapshot = (start.step if start else None), 0, False
        for donor in self._donors(target):
            try:
                theirs = await self._ask_heads(donor, target[0])
                if theirs.get(target[0]) != target[1]:
                    continue
                common = await asyncio.to_thread(self._common_step, theirs)
                if common is None:
                    await self._download_snapshot(donor, target[0])
                    await asyncio.to_thread(self.replica.load)
                    snapshot = True
                    common = await asyncio.to_thread(self._common_step, theirs)
                    if common is None:
                        raise Misbehaved(donor.peer_id, "serves a snapshot that its own heads do not lead from")
                state = self.replica.state
                if state is None or state.step != common:
                    rolled_back += max((state.step if state else common) - common, 0)
                    await asyncio.to_thread(self.replica.roll_back, common)
                for step in range(common, target[0]):
                    await self._fetch_update(donor, step, theirs[step + 1])
                await asyncio.to_thread(self.replica.snapshot_if_due)
                return CaughtUp(
                    from_step=from_step,
                    to_step=target[0],
                    rolled_back=rolled_back,
                    snapshot=snapshot,
                    bytes_received=self.received_bytes,
                )
            except Refused as error:
                log.info("donor %s cannot serve now: %s", donor.label, error.reason)
            except RemoteError as error:
                log.info("donor %s dropped: %s", donor.label, error.reason)
                self.directory.suspect(donor.peer_id)
        return None

    def _donors(self, target: tuple[int, bytes]) -> list[Record]:
        """Live peers that have the target; everybody asks in another order, so the load is spread."""
        live = self.directory.live(self.wall_s())
        donors = [r for r in live if r.phase != "joining" and target[1] in (r.head, *r.heads)]
        return sorted(donors, key=lambda r: rank(self.identity.peer_id.encode(), r.peer_id))

    async def _ask_heads(self, donor: Record, last_step: int) -> dict[int, bytes]:
        """Outer step -> head, without a gap, for what the donor's ledger leads to, up to ``last_step`` or beyond."""
        since, theirs = 0, dict[int, bytes]()
        while since <= last_step:
            channel = await self._open(donor.peer_id)
            try:
                answer: Heads = await channel.request(AskHeads(since=since), Heads)
            finally:
                channel.close()
            if answer.first < since or (theirs and answer.first > since):
                raise Misbehaved(donor.peer_id, f"names its heads from {answer.first} on, asked for those from {since}")
            theirs.update({answer.first + i: head for i, head in enumerate(answer.heads)})
            if len(answer.heads) < MAX_HEADS:
                break
            since = answer.first + MAX_HEADS
        return theirs

    def _common_step(self, theirs: dict[int, bytes]) -> int | None:
        mine = self.replica.ledger.heads()
        agreed = [step for step, head in mine.items() if theirs.get(step) == head]
        return max(agreed, default=None)

    async def _fetch_update(self, donor: Record, step: int, head: bytes) -> None:
        n, codec = len(self.replica.theta), self.replica.manifest.spec.outer.codec
        channel = await self._open(donor.peer_id)
        try:
            await channel.send(AskUpdate(step=step, head=head))
            data = await channel.receive_blob(max_update_bytes(n, codec), self.timeouts.reduced_part_s)
        finally:
            channel.close()
        try:
            self.received_bytes += len(data)
            update = update_from_bytes(data, n=n, codec=codec)
            if update.header.head != head:
                raise ValueError("an update that leads to another head")
            await asyncio.to_thread(self.replica.commit, update)
        except ValueError as error:
            raise Misbehaved(donor.peer_id, f"serves {error}") from error

    async def _download_snapshot(self, donor: Record, newest_step: int) -> None:
        """The donor's snapshot, if its digest is to be believed. Goes on where an earlier donor's download stopped."""
        step, digest = donor.snapshot_step, donor.snapshot_digest
        if step > newest_step or digest != self._trusted_digest(step):
            raise Misbehaved(donor.peer_id, f"offers a snapshot of outer step {step} that most others do not have")
        path = self.replica.ledger.folder / f"incoming-{step}-{digest.hex()[:16]}.part"
        expected = snapshot_bytes(len(self.replica.theta))
        with disk_errors(path, expected):
            offset = path.stat().st_size if path.exists() else 0
        resumed = offset > 0
        log.info("downloading the snapshot of outer step %d, %.1f MB, from %s", step, expected / 1e6, donor.label)
        channel = await self._open(donor.peer_id)
        try:
            answer: Size = await channel.request(AskSnapshot(step=step, digest=digest, offset=offset), Size)
            if answer.size_bytes != expected:
                raise Misbehaved(donor.peer_id, f"serves a snapshot of {answer.size_bytes} bytes, expected {expected}")
            while offset < expected:
                chunk = await channel.receive_chunk(expected - offset, self.timeouts.reduced_part_s)
                self.received_bytes += len(chunk)
                await asyncio.to_thread(_append, path, chunk, expected)
                offset += len(chunk)
        finally:
            channel.close()
        try:
            await asyncio.to_thread(self.replica.ledger.adopt_snapshot, path, digest)
        except ValueError as error:
            path.unlink(missing_ok=True)
            if not resumed:
                raise Misbehaved(donor.peer_id, f"serves {error}") from error
            log.info("what an earlier donor sent may be wrong (%s): asking %s for all of it", error, donor.label)
            await self._download_snapshot(donor, newest_step)
        for overtaken in path.parent.glob("incoming-*.part"):
            overtaken.unlink(missing_ok=True)

    def _trusted_digest(self, step: int) -> bytes | None:
        """The digest of the snapshot at ``step``: the manifest's, or that which most live peers name."""
        if step == 0:
            return bytes.fromhex(self.replica.manifest.genesis)
        live = self.directory.live(self.wall_s())
        named = Counter(r.snapshot_digest for r in live if r.snapshot_step == step and r.phase != "joining")
        return min(named, key=lambda digest: (-named[digest], digest)) if named else None

    async def _open(self, peer_id: str) -> Channel:
        return await self.transport.open(peer_id, self.directory.maddrs(peer_id), self.protocol)

    # -- serving -----------------------------------------------------------------------------------------------------

    async def on_ask_heads(self, channel: Channel, message: AskHeads) -> None:
        """The newest ones, as far back as one leads to the next: what is before a gap leads nowhere."""
        ledger = self.replica.ledger
        mine = await asyncio.to_thread(ledger.heads)
        first = max((step for step in mine if step >= message.since), default=message.since)
        while first > message.since:
            before = ledger.header(first - 1)
            if before is None or (before.parent, before.head) != (mine.get(first - 1), mine[first]):
                break
            first -= 1
        heads = [mine[step] for step in range(first, first + MAX_HEADS) if step in mine]
        await channel.send(Heads(first=first, heads=heads))

    async def on_ask_update(self, channel: Channel, message: AskUpdate) -> None:
        header = self.replica.ledger.header(message.step)
        if header is None or header.head != message.head:
            await channel.send(No(reason="not in my ledger"))
            return
        if self._uploads.locked():
            await channel.send(No(reason="busy serving others"))
            return
        async with self._uploads:
            data = await asyncio.to_thread(self.replica.ledger.update_bytes, message.step)
            if data is None:
                await channel.send(No(reason="found damaged"))
                return
            await channel.send_blob(data)

    async def on_ask_snapshot(self, channel: Channel, message: AskSnapshot) -> None:
        """From the file on disk: training goes on, and a snapshot takes no memory while it is served."""
        held = [s for s in self.replica.ledger.snapshots() if s.step == message.step and s.digest == message.digest]
        if not held or message.offset > held[0].size_bytes:
            await channel.send(No(reason="not in my ledger"))
            return
        if self._uploads.locked():
            await channel.send(No(reason="busy serving others"))
            return
        async with self._uploads:
            await channel.send(Size(size_bytes=held[0].size_bytes))
            offset = message.offset
            while offset < held[0].size_bytes:
                chunk = await asyncio.to_thread(_read, held[0].path, offset)
                if not chunk:
                    return
                await channel.send_frame(chunk)
                offset += len(chunk)


def _append(path: Path, chunk: bytes, size: int) -> None:
    with disk_errors(path, size), path.open("ab") as file:
        file.write(chunk)


def _read(path: Path, offset: int) -> bytes:
    """Empty when the file is gone: the ledger was pruned meanwhile, and the joiner will ask for a newer snapshot."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(CHUNK_BYTES)
    except FileNotFoundError:
        return b""
