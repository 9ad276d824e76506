"""How a peer gets to the swarm's head: heads, updates and snapshots from donors. What donors do is in ``uploads``.

One procedure serves the newcomer, who was away, who missed a round, and who went another way:

    1. ask a donor, the guide, which heads lead to the target: it can leave some out, but invent none
    2. find the newest outer step at which its ledger and mine agree; where there is none, download a snapshot
    3. go back there, if I am elsewhere
    4. fetch the updates that lead along those heads, and commit them in order

Snapshots and updates come from several donors at a time (``download``), each piece verified alone: a chunk by its hash,
which the snapshot's digest vouches for, an update by the head that it leads to. A snapshot is believed when its digest
is the manifest's (outer step 0) or the one that most peers name. What has been downloaded stays, whatever comes then.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.digest import HASH_BYTES
from p2p_diloco.core.directory import Directory
from p2p_diloco.core.errors import Misbehaved, Refused, RemoteError
from p2p_diloco.core.events import EventLog
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.outer import state_digest
from p2p_diloco.core.records import Record
from p2p_diloco.core.roster import rank
from p2p_diloco.core.update import Update, next_head
from p2p_diloco.core.waiting import deadline, heard
from p2p_diloco.ledger.replica import Replica
from p2p_diloco.ledger.snapshot import IncomingSnapshot, chunk_slices, remove_incoming, snapshot_bytes
from p2p_diloco.peer.download import Chunks, Download, Updates, Wanted, drop
from p2p_diloco.wire.channel import Channel, Transport, run_protocol
from p2p_diloco.wire.messages import MAX_LINKS, AskHeads, AskIndex, Heads

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CaughtUp:
    from_step: int | None
    """None for a newcomer."""
    to_step: int
    rolled_back: int
    """Outer steps of mine that the swarm did not share."""
    snapshot: bool
    bytes_received: int
    donors: int
    """Peers that chunks or updates came from."""


@dataclass(kw_only=True)
class Tally:
    """What one catch-up has taken, whether it succeeds or not."""

    bytes_received: int = 0
    donors: set[str] = field(default_factory=set)
    refused: bool = False

    def add(self, download: Download) -> None:
        self.bytes_received += download.bytes_received
        self.donors |= download.gave
        self.refused |= download.refused


class Catchup:
    def __init__(
        self,
        *,
        transport: Transport,
        identity: Identity,
        directory: Directory,
        replica: Replica,
        timeouts: Timeouts,
        events: EventLog,
        wall_s: Callable[[], float],
    ) -> None:
        self.transport = transport
        self.identity = identity
        self.directory = directory
        self.replica = replica
        self.timeouts = timeouts
        self.events = events
        self.wall_s = wall_s
        self.protocol = run_protocol(replica.manifest.run_id)
        self.promising = False
        """After a ``to`` that did not succeed: something came, or a donor was busy, so it is worth asking again."""
        self._given_up = 0
        """Outer steps, since the last catch-up that succeeded."""
        self._ahead: tuple[Update, str] | None = None
        """The update that ``fetch_ahead`` got, and the id of the peer that sent it."""
        self._grid = replica.manifest.grid
        self._downloading = asyncio.Lock()
        """One snapshot at a time: they share the folder."""

    async def to(self, target: tuple[int, bytes]) -> CaughtUp | None:
        """Bring the replica to the swarm's head ``(outer step, head)``. None when no donor could help."""
        start, tally = self.replica.state, Tally()
        from_step, snapshot = (start.step if start else None), False
        self.promising = False
        if target[0] > self.replica.manifest.spec.outer.steps:
            return None  # nobody can be there: so far, no donor shall make us read its heads
        if await self._commit_ahead(target):
            rolled_back, self._given_up = self._given_up, 0
            return CaughtUp(
                from_step=from_step,
                to_step=target[0],
                rolled_back=rolled_back,
                snapshot=False,
                bytes_received=0,
                donors=1,
            )
        for guide in self._donors(target):
            try:
                path = await self._ask_path(guide, target)
                if path is None:
                    continue
                common = await asyncio.to_thread(self._common_step, path)
                if common is None:
                    given_up = self._beside(path)
                    if not await self._download_newest(path, target, tally):
                        continue
                    await asyncio.to_thread(self.replica.load)
                    snapshot, self._given_up = True, self._given_up + given_up
                    common = await asyncio.to_thread(self._common_step, path)
                    if common is None:
                        continue  # the disk has lost it again
                if not await self._commit_updates(path, common, target, tally):
                    continue
                rolled_back, self._given_up = self._given_up, 0
                if not self._downloading.locked():
                    await asyncio.to_thread(remove_incoming, self.replica.ledger.folder)
                return CaughtUp(
                    from_step=from_step,
                    to_step=target[0],
                    rolled_back=rolled_back,
                    snapshot=snapshot,
                    bytes_received=tally.bytes_received,
                    donors=len(tally.donors),
                )
            except RemoteError as error:
                tally.refused |= isinstance(error, Refused)
                drop(error, self.directory, self.transport.traffic)
            finally:
                self.promising = tally.refused or tally.bytes_received > 0
        return None

    async def fetch_ahead(self, target: tuple[int, bytes]) -> None:
        """Have the update to ``target`` ready for ``to``, where it is the only one that is missing. While the trainer
        ends its inner step the state must not move; who fetched only then could be one outer step late for ever."""
        state = self.replica.loaded
        if target[0] == state.step + 1 and (self._ahead is None or self._ahead[0].header.head != target[1]):
            self._ahead = await self._fetch_one(state.step, target[1], self._donors(target))

    async def learn_way(self, record: Record) -> None:
        """Have a peer show how it came to where its record says that it stands."""
        if record.step > self.replica.manifest.spec.outer.steps:
            return
        try:
            async with deadline(self.timeouts.request_s):
                path = await self._ask_path(record, (record.step, record.head))
        except asyncio.TimeoutError:
            log.info("%s takes too long to show the way to outer step %d", record.label, record.step)
        except RemoteError as error:
            drop(error, self.directory, self.transport.traffic)
        else:
            if path is not None:
                self.directory.show([path[step] for step in sorted(path, reverse=True)])

    async def fetch_update(self, step: int, head: bytes) -> Update | None:
        """The update that leads from outer step ``step`` to ``head``, verified, from whoever has it. Not committed."""
        # Records take seconds to get here: who has just made that step has the update, too, and is asked last.
        donors = sorted(self._helpers(), key=lambda record: record.step <= step)
        found = await self._fetch_one(step, head, donors)
        return found[0] if found else None

    async def _fetch_one(self, step: int, head: bytes, donors: list[Record]) -> tuple[Update, str] | None:
        wanted = self._updates({step + 1: head}, step)
        await self._download(wanted, range(step, step + 1), step + 1, donors).run()
        return wanted.take()

    async def fetch_snapshot(self, step: int, digest: bytes) -> bool:
        """Download the snapshot with this digest, whoever has it, into the ledger. Whether that succeeded."""
        tally = Tally()
        incoming = await self._ask_index(step, digest, tally)
        return incoming is not None and await self._download_snapshot(incoming, tally)

    # -- the way -----------------------------------------------------------------------------------------------------

    def _helpers(self) -> list[Record]:
        """Live peers that serve; everybody asks in another order, so the load is spread."""
        live = self.directory.live(self.wall_s())
        serving = [record for record in live if record.phase != "joining"]
        return sorted(serving, key=lambda record: rank(self.identity.peer_id.encode(), record.peer_id))

    def _donors(self, target: tuple[int, bytes]) -> list[Record]:
        """Those who have the target."""
        return [record for record in self._helpers() if target[1] in (record.head, *record.heads)]

    async def _ask_path(self, guide: Record, target: tuple[int, bytes]) -> dict[int, bytes] | None:
        """Outer step -> head, without a gap and up to the target, for what the guide's ledger leads along; None when
        it leads elsewhere. True as far as the target is: every head follows from the one before."""
        path: dict[int, bytes] = {}
        channel = await self._open(guide.peer_id)
        try:
            while True:
                since = max(path, default=0)
                answer: Heads = await channel.request(AskHeads(since=since), Heads)
                step, head = answer.first, answer.head
                if path and (step, head) != (since, path[since]):
                    raise Misbehaved(guide.peer_id, f"names other heads from outer step {since} on than before")
                path[step] = head
                for link in answer.links:
                    step, head = step + 1, next_head(head, link)
                    path[step] = head
                if step >= target[0] or len(answer.links) < MAX_LINKS:
                    break
        finally:
            channel.close()
        if path.get(target[0]) != target[1]:
            return None
        return {step: head for step, head in path.items() if step <= target[0]}

    def _common_step(self, path: dict[int, bytes]) -> int | None:
        mine = self.replica.ledger.heads()
        agreed = [step for step, head in mine.items() if path.get(step) == head]
        return max(agreed, default=None)

    def _beside(self, path: dict[int, bytes]) -> int:
        """Outer steps of mine that ``path`` leads past: the fork may be older than what either of us keeps."""
        since = min(path)
        return sum(path.get(step) != head for step, head in self.replica.ledger.heads().items() if step >= since)

    # -- updates -----------------------------------------------------------------------------------------------------

    async def _commit_updates(
        self, path: dict[int, bytes], common: int, target: tuple[int, bytes], tally: Tally
    ) -> bool:
        """From ``common`` along ``path``. Whether that has led to the target. What the replica has committed beyond
        ``common`` is given up no sooner than there is something to take in its place."""
        step, last = common, target[0]
        wanted = self._updates(path, step)
        download = self._download(wanted, range(step, last), step + wanted.ahead, self._donors(target))
        running = asyncio.create_task(download.run())
        try:
            while step < last:
                changed = download.changed.event
                found = wanted.take()
                if found is not None:
                    await self._roll_back(step)
                    await self._commit(*found)
                    step += 1
                    download.allow(step + wanted.ahead)
                elif download.over:
                    return await running
                else:
                    await heard(changed, self.timeouts.reduced_part_s)
            await self._roll_back(last)
            return True
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            tally.add(download)

    async def _commit_ahead(self, target: tuple[int, bytes]) -> bool:
        """Whether what was fetched ahead has led there."""
        (found, self._ahead), state = (self._ahead, None), self.replica.state
        if found is None or state is None or (found[0].header.parent, found[0].header.head) != (state.head, target[1]):
            return False
        try:
            await self._commit(*found)
        except RemoteError as error:
            drop(error, self.directory, self.transport.traffic)
            return False
        return True

    async def _roll_back(self, step: int) -> None:
        """To an outer step of the ledger's; where the replica stands there, nothing."""
        state = self.replica.state
        if state is not None and state.step == step:
            return
        self._given_up += 0 if state is None else max(state.step - step, 0)
        await asyncio.to_thread(self.replica.roll_back, step)

    async def _commit(self, update: Update, donor: str) -> None:
        try:
            await asyncio.to_thread(self.replica.commit, update)
        except ValueError as error:
            raise Misbehaved(donor, f"serves {error}") from error

    def _updates(self, heads: dict[int, bytes], next_step: int) -> Updates:
        return Updates(grid=self._grid, heads=heads, timeouts=self.timeouts, next_step=next_step)

    # -- snapshots ---------------------------------------------------------------------------------------------------

    async def _download_newest(self, path: dict[int, bytes], target: tuple[int, bytes], tally: Tally) -> bool:
        """A snapshot from which the updates lead to the target. Whether there is one in the ledger now."""
        for step, digest in self._snapshots_on(path, target):
            incoming = await self._ask_index(step, digest, tally)
            if incoming is None:
                return False  # who has it cannot serve now; that is no reason to believe fewer others
            if incoming.head == path[step]:
                return await self._download_snapshot(incoming, tally)
            log.info("the snapshot of outer step %d that most donors name is of another history", step)
        return False

    def _snapshots_on(self, path: dict[int, bytes], target: tuple[int, bytes]) -> list[tuple[int, bytes]]:
        """(outer step, digest) of what donors of the target offer, as far as to be believed: the genesis that the
        manifest names, else what most peers name, then the newest. Known weakness: where a snapshot is so new that few
        have it yet, few can lie about it."""
        named = Counter((record.snapshot_step, record.snapshot_digest) for record in self._helpers())
        genesis = bytes.fromhex(self.replica.manifest.genesis)
        offered = {(record.snapshot_step, record.snapshot_digest) for record in self._donors(target)}
        believed = [(step, digest) for step, digest in offered if step in path and (step > 0 or digest == genesis)]
        return sorted(believed, key=lambda one: (-named[one], -one[0], one[1]))

    def _holders(self, step: int, digest: bytes) -> list[Record]:
        """Who says that it has the snapshot, then who has a newer one and may have kept this one, too."""
        helpers = self._helpers()
        naming = [r for r in helpers if (r.snapshot_step, r.snapshot_digest) == (step, digest)]
        return naming + [r for r in helpers if r.snapshot_step > step]

    async def _ask_index(self, step: int, digest: bytes, tally: Tally) -> IncomingSnapshot | None:
        """The snapshot with this digest, to be filled: head and chunk hashes are true, whoever sent them."""
        size = HASH_BYTES * (1 + len(chunk_slices(self._grid.n)))
        for donor in self._holders(step, digest):
            try:
                channel = await self._open(donor.peer_id)
                try:
                    await channel.send(AskIndex(step=step, digest=digest))
                    data = await channel.receive_blob(size, self.timeouts.reduced_part_s)
                finally:
                    channel.close()
                head, *hashes = (data[i : i + HASH_BYTES] for i in range(0, size, HASH_BYTES))
                if len(data) != size or state_digest(step, head, hashes) != digest:
                    raise Misbehaved(donor.peer_id, "serves the index of another snapshot")
                tally.bytes_received += size
            except RemoteError as error:
                tally.refused |= isinstance(error, Refused)
                drop(error, self.directory, self.transport.traffic)
                continue
            folder, run_id, n = self.replica.ledger.folder, self.replica.manifest.run_id, self._grid.n
            return IncomingSnapshot(folder, step=step, head=head, chunk_hashes=tuple(hashes), n=n, run_id=run_id)
        return None

    async def _download_snapshot(self, incoming: IncomingSnapshot, tally: Tally) -> bool:
        """Whether all of it came, and is in the ledger now."""
        async with self._downloading:
            held = await asyncio.to_thread(incoming.open)
            chunks = range(len(incoming.slices))
            missing = [chunk for chunk in chunks if chunk not in held]
            size_mb, share = snapshot_bytes(self._grid.n) / 1e6, len(missing) / len(chunks)
            log.info(
                "downloading the snapshot of outer step %d, %.0f %% of %.1f MB", incoming.step, 100 * share, size_mb
            )
            self.events.write("phase", phase="download", step=incoming.step)
            wanted = Chunks(incoming=incoming, timeouts=self.timeouts)
            donors = self._holders(incoming.step, incoming.digest)
            download = self._download(wanted, missing, len(chunks), donors)
            try:
                if not await download.run():
                    return False
            finally:
                tally.add(download)
            try:
                await asyncio.to_thread(self.replica.adopt_snapshot, incoming.path, incoming.digest)
            except ValueError as error:
                log.warning("what was downloaded is not what the disk gives back (%s); look at the disk", error)
                await asyncio.to_thread(remove_incoming, incoming.path.parent)
                return False
            return True

    # -- asking ------------------------------------------------------------------------------------------------------

    def _download(self, wanted: Wanted, items: Sequence[int], limit: int, donors: list[Record]) -> Download:
        return Download(
            transport=self.transport,
            protocol=self.protocol,
            directory=self.directory,
            timeouts=self.timeouts,
            wanted=wanted,
            items=items,
            limit=limit,
            donors=donors,
        )

    async def _open(self, peer_id: str) -> Channel:
        return await self.transport.open(peer_id, self.directory.maddrs(peer_id), self.protocol)
