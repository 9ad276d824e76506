"""Snapshots from donors: which one to believe, its index, and its chunks.

    index    the head and the chunks' hashes: true, whoever sent them, for the snapshot's digest is the hash of them
    chunks   from several donors at a time, each verified by its hash, and from those who download the same one
             (``partners``); what has come stays on the disk, also when the download breaks off, and the next one goes
             on from there

A snapshot is believed when its digest is the manifest's (outer step 0), or that in the certificate of the update that
leads on from it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from random import Random

from p2p_diloco.core.digest import HASH_BYTES
from p2p_diloco.core.errors import Misbehaved, Refused, RemoteError
from p2p_diloco.core.event import PhaseBegan
from p2p_diloco.core.events import EventLog
from p2p_diloco.core.outer import state_digest
from p2p_diloco.core.records import Record
from p2p_diloco.core.waiting import run_all
from p2p_diloco.ledger.replica import Replica
from p2p_diloco.ledger.snapshot import IncomingSnapshot, chunk_slices, remove_incoming, snapshot_bytes
from p2p_diloco.peer.chains import Way
from p2p_diloco.peer.donors import Donors
from p2p_diloco.peer.download import Chunks, Download, Tally, drop
from p2p_diloco.peer.partners import Partners
from p2p_diloco.round.here import Here
from p2p_diloco.wire.state_messages import AskIndex

log = logging.getLogger(__name__)


class Snapshots:
    """Downloads snapshots into the ledger of ``replica``, one at a time: they share its folder."""

    def __init__(self, *, here: Here, replica: Replica, events: EventLog, donors: Donors) -> None:
        self.here = here
        self.replica = replica
        self.events = events
        self.donors = donors
        self._n = replica.manifest.n_params
        self._downloading = asyncio.Lock()

    async def fetch(self, step: int, digest: bytes, tally: Tally) -> bool:
        """Downloads the snapshot with this digest, whoever has it. Returns whether it is in the ledger now."""
        incoming = await self._ask_index(step, digest, tally)
        return incoming is not None and await self._download(incoming, Way(step=step), tally)

    async def fetch_newest(self, path: Mapping[int, bytes], way: Way, tally: Tally) -> bool:
        """Downloads the newest snapshot that a donor gives of those from which the updates along ``path`` lead on, and
        whose digest ``way`` vouches for. Returns whether there is one in the ledger now."""
        for step in sorted(path, reverse=True):
            if self.replica.ledger.newest_due(step) != step:
                continue
            digest = await asyncio.to_thread(way.state_at, step, self.replica)
            incoming = await self._ask_index(step, digest, tally) if digest else None
            if incoming is not None and incoming.head == path[step]:
                return await self._download(incoming, way, tally)
        return False

    async def tidy(self) -> None:
        """Removes what downloads that broke off have left on the disk, unless one is running."""
        if not self._downloading.locked():
            await asyncio.to_thread(remove_incoming, self.replica.ledger.folder)

    async def _ask_index(self, step: int, digest: bytes, tally: Tally) -> IncomingSnapshot | None:
        """Returns the snapshot with this digest, to be filled; None when no donor sends its index."""
        for donor in self.donors.of_snapshot(step, digest):
            try:
                head, *hashes = await self._index_from(donor, step, digest)
            except RemoteError as error:
                tally.refused |= isinstance(error, Refused)
                drop(error, self.here)
                continue
            tally.bytes_received += HASH_BYTES * (1 + len(hashes))
            ledger, run_id = self.replica.ledger.folder, self.replica.manifest.run_id
            return IncomingSnapshot(ledger, step=step, head=head, chunk_hashes=tuple(hashes), n=self._n, run_id=run_id)
        return None

    async def _index_from(self, donor: Record, step: int, digest: bytes) -> list[bytes]:
        """Returns the head and the hashes of all chunks, verified. Raises RemoteError."""
        size = HASH_BYTES * (1 + len(chunk_slices(self._n)))
        channel = await self.here.open(donor.peer_id)
        try:
            await channel.send(AskIndex(step=step, digest=digest))
            data = await channel.receive_blob(size, self.here.timeouts.reduced_part_s)
        finally:
            channel.close()
        head, *hashes = index = [data[i : i + HASH_BYTES] for i in range(0, size, HASH_BYTES)]
        if len(data) != size or state_digest(step, head, hashes) != digest:
            raise Misbehaved(donor.peer_id, "serves the index of another snapshot")
        return index

    async def _download(self, incoming: IncomingSnapshot, way: Way, tally: Tally) -> bool:
        """Returns whether all chunks came, and the snapshot is in the ledger now, whose chain is on ``way`` then."""
        async with self._downloading:
            held = await asyncio.to_thread(incoming.open)
            chunks = range(len(incoming.slices))
            missing = [chunk for chunk in chunks if chunk not in held]
            size_mb, share = snapshot_bytes(self._n) / 1e6, len(missing) / len(chunks)
            log.info(
                "downloading the snapshot of outer step %d, %.0f %% of %.1f MB", incoming.step, 100 * share, size_mb
            )
            self.events.write(PhaseBegan(phase="download", step=incoming.step))
            self.replica.ledger.incoming = incoming
            self.here.seat.changed.ring()
            try:
                return await self._fetch(incoming, missing, tally) and await self._adopt(incoming, way)
            finally:
                self.replica.ledger.incoming = None

    async def _fetch(self, incoming: IncomingSnapshot, missing: list[int], tally: Tally) -> bool:
        """Fetches the missing chunks. Returns whether all came."""
        donors = self.donors.of_snapshot(incoming.step, incoming.digest)
        download = Download(
            here=self.here,
            wanted=Chunks(incoming=incoming, timeouts=self.here.timeouts, draw=Random(self.here.peer_id)),
            items=missing,
            limit=len(incoming.slices),
            donors=donors,
        )
        partners = Partners(here=self.here, donors=self.donors, incoming=incoming, download=download)
        try:
            await run_all(download.run(), partners.run())
            return not download.handout.missing
        finally:
            tally.add(download)

    async def _adopt(self, incoming: IncomingSnapshot, way: Way) -> bool:
        """Takes a snapshot of which all chunks have come into the ledger. Returns whether it is there now."""
        try:
            await asyncio.to_thread(self.replica.adopt_snapshot, incoming.path, incoming.digest, way.entries)
        except ValueError as error:
            log.warning("what was downloaded is not what the disk gives back (%s); look at the disk", error)
            await asyncio.to_thread(remove_incoming, incoming.path.parent)
            return False
        return True
