"""Upkeep: what this peer holds stays what it should be, on disk and in memory, and the same as the others'.

    snapshot   when one is due: the files since the last one are verified, and memory is compared with what they lead to
    gaps       an update whose file was damaged is fetched again; if nobody has it, a fresh snapshot stands in for it
    dispute    the certificate of an update names another digest of the state that it leads on from: that state is taken

Files are read in threads, while training goes on; memory is mended only when its owner (``Peer``) says that nobody uses
it. All bytes that a restart needs are read once between two snapshots: 8 a parameter for the older one, and what the
updates since take.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from dataclasses import dataclass, field

from p2p_diloco.core.errors import Gap
from p2p_diloco.core.event import DamageRepaired, PhaseBegan
from p2p_diloco.core.events import EventLog
from p2p_diloco.core.trust_event import StateDisputed
from p2p_diloco.core.waiting import Bell, heard
from p2p_diloco.ledger.replica import Replica
from p2p_diloco.peer.catchup import Catchup
from p2p_diloco.round.here import Here

log = logging.getLogger(__name__)

TRIES = 3
"""How often an update that is lost is asked for before it is done without."""


@dataclass(kw_only=True, eq=False)
class Upkeep:
    """Keeps one peer's replica sound: its snapshots, its files, its bits."""

    here: Here
    replica: Replica
    catchup: Catchup
    events: EventLog
    mends: int = 0
    """How often memory was not what it should be."""
    _snapshot: asyncio.Task[None] | None = None
    _due: Bell = field(default_factory=Bell)
    """There is something to do now."""
    _told: tuple[int, bytes] | None = None
    """Outer step and digest of my last snapshot that was found to be wrong."""

    async def run(self) -> None:
        """Mends what there is to mend, every ``record_every_s``, after each snapshot and when an update is lost, until
        it is cancelled."""
        while True:
            due = self._due.event
            await self.settled()
            await self._replace_lost()
            if self.replica.sound:
                await self._compare()
            self._report()
            await heard(due, self.here.timeouts.record_every_s)

    # -- snapshots ---------------------------------------------------------------------------------------------------

    def moved(self) -> None:
        """Begins to write the snapshot that is due, if there is one, now that the state has moved. An update that is
        lost is seen to at once: the others delete theirs some outer steps later."""
        self._begin_snapshot()
        if self.replica.lost_updates():
            self._due.ring()

    def _begin_snapshot(self) -> None:
        missing = self.replica.missing_snapshots()
        if missing and (self._snapshot is None or self._snapshot.done()):
            self.events.write(PhaseBegan(phase="snapshot", step=missing[0][0]))
            self._snapshot = asyncio.create_task(self._write_snapshot())

    async def settled(self) -> None:
        """Returns when the state may move: it must not while memory is compared with the files. Raises what the disk
        did."""
        if self._snapshot is not None:
            await asyncio.shield(self._snapshot)

    async def _write_snapshot(self) -> None:
        try:
            await asyncio.to_thread(self.replica.make_snapshots)
        finally:
            self._due.ring()

    # -- repairs -----------------------------------------------------------------------------------------------------

    async def mend(self) -> None:
        """Gives memory the bits that the files lead to; nobody may use theta meanwhile. Raises Gap when the files do
        not lead here."""
        asked = Counter[bytes]()
        while True:
            await self.settled()
            try:
                self.mends += await asyncio.to_thread(self.replica.mend)
            except Gap:
                if not await self._fetch_lost(asked):
                    raise
            else:
                self._report()
                return

    async def _replace_lost(self) -> None:
        """Replaces what was damaged on the disk: from other peers, from the other files, or by what is in memory."""
        asked = Counter[bytes]()
        while True:
            self._begin_snapshot()
            await self.settled()
            if not await self._fetch_lost(asked):
                break
        await asyncio.to_thread(self.replica.do_without)

    async def _fetch_lost(self, asked: Counter[bytes]) -> bool:
        """Asks for the updates that are lost, but those that have been ``asked`` for TRIES times. Returns whether there
        were any. When one does not come, it waits until donors have signed their next records."""
        lost = [header for header in self.replica.lost_updates() if asked[header.head] < TRIES]
        in_vain = False
        for header in lost:
            asked[header.head] += 1
            update = await self.catchup.fetch_update(header.step, header.head)
            if update is not None:
                await asyncio.to_thread(self.replica.fill, update)
            in_vain |= update is None and asked[header.head] < TRIES
        if in_vain:
            await asyncio.sleep(self.here.timeouts.record_every_s)
        return bool(lost)

    async def _compare(self) -> None:
        """Compares my snapshots with the digests that manifest and certificates name. Mine follow from my own files, so
        one that differs has been wrong since I joined, or my machine computes otherwise than those that signed."""
        for mine in self.replica.ledger.snapshots():
            digest = await asyncio.to_thread(self.replica.history.certified_digest, mine.step)
            if digest in (b"", mine.digest):
                continue
            if (mine.step, mine.digest) != self._told:
                self._told = mine.step, mine.digest
                others = await asyncio.to_thread(self.replica.history.signers, mine.step)
                self.events.write(StateDisputed(step=mine.step, others=others))
                log.warning("the state at outer step %d has other bits at %s", mine.step, ", ".join(others))
            if await self.catchup.fetch_snapshot(mine.step, digest):
                self.replica.took_snapshot(mine.step)

    def _report(self) -> None:
        while self.replica.repairs:
            repair = self.replica.repairs.pop(0)
            self.events.write(DamageRepaired(what=repair.what, step=repair.step, how=repair.how))
