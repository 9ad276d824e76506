"""How a peer gets to the swarm's head: chain, updates and snapshots from donors. What donors do is in ``uploads``, and
when a peer sets out is in ``follower``.

``Catchup.to`` is the one procedure for a newcomer, for a peer that was away or missed a round, and for one that went
another way:

    1. ask a donor, the guide, from which outer step on it has updates to the target, and what their heads are: it can
       leave some out, but invent none (``donors``)
    2. follow its chain to the target from where it leaves mine, or from the genesis: each certificate is verified
       (``chains``)
    3. find the newest outer step at which its ledger and mine agree; where there is none, download a snapshot whose
       digest a certificate names (``snapshots``)
    4. go back there, if I am elsewhere
    5. fetch the updates that lead along those heads, and commit them in order (``download``)

Snapshots and updates come from several donors at a time, each piece verified alone: a chunk by its hash, which the
snapshot's digest vouches for, an update by the head that it leads to. What has been downloaded stays, whatever comes
then.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from dataclasses import dataclass

from p2p_diloco.core.certificate import Certificate, Certified
from p2p_diloco.core.errors import LedgerError, Misbehaved, Refused, RemoteError, Silent
from p2p_diloco.core.events import EventLog
from p2p_diloco.core.records import Record
from p2p_diloco.core.update import Update
from p2p_diloco.core.waiting import deadline, heard, to_its_end
from p2p_diloco.ledger.replica import Replica
from p2p_diloco.peer.chains import Chains, Way
from p2p_diloco.peer.donors import Donors
from p2p_diloco.peer.download import Download, Tally, Updates, drop
from p2p_diloco.peer.handout import RECENT
from p2p_diloco.peer.snapshots import Snapshots
from p2p_diloco.round.here import Here

log = logging.getLogger(__name__)

GUIDES = 8
"""Asked for one target in a row. Each has ``Timeouts.least_wait_s`` to begin its answer; who is silent is asked
once more after the others, and may cost ``Timeouts.request_s`` then. The swarm goes on meanwhile."""


@dataclass(frozen=True, kw_only=True)
class CaughtUp:
    """Says what one catch-up that reached the swarm's head did, and what it took."""

    from_step: int | None
    """The outer step that it began at; None for a newcomer."""
    to_step: int
    rolled_back: int
    """Outer steps of mine that the swarm did not share."""
    snapshot: bool
    """Whether a snapshot had to be downloaded."""
    bytes_received: int
    donors: int
    """Peers that chunks or updates came from."""


@dataclass(frozen=True, kw_only=True)
class Ahead:
    """An update that was fetched before it is committed."""

    update: Update
    certificate: Certificate
    donor: str
    """Peer id of who sent the update."""


class Catchup:
    """Brings the replica to the swarm's head. The caller sees to it that nobody else moves it while ``to`` runs."""

    def __init__(self, *, here: Here, replica: Replica, events: EventLog) -> None:
        self.here = here
        self.replica = replica
        self.donors = Donors(here=here)
        self.chains = Chains(here=here, replica=replica)
        self.snapshots = Snapshots(here=here, replica=replica, events=events, donors=self.donors)
        self.promising = False
        """After a ``to`` that did not succeed: something came, or a donor was busy, so it is worth asking again."""
        self._given_up = 0
        """Outer steps that were rolled back since the last catch-up that succeeded."""
        self._took_s: deque[float] = deque(maxlen=RECENT)
        """How long the last updates took to come: of one that follows every outer step, each is a download by itself,
        and the donor that it asks first may be gone without a word."""
        self._ahead: Ahead | None = None
        """What ``fetch_ahead`` got."""
        self._grid = replica.ledger.grid

    async def to(self, target: tuple[int, bytes]) -> CaughtUp | None:
        """Brings the replica to the swarm's head ``(outer step, head)``. Returns None when no donor could help; the
        replica may have come part of the way then."""
        start, tally = self.replica.state, Tally()
        from_step = start.step if start else None
        self.promising = False
        if target[0] > self.replica.manifest.spec.outer.steps:
            return None  # nobody can be there: so far, no donor shall make us read its heads
        if await self._commit_ahead(target, tally):
            return self._arrived(from_step, target, tally)
        timeouts, guides = self.here.timeouts, self.donors.of_head(target[1])[:GUIDES]
        asked = deque((guide, timeouts.least_wait_s) for guide in guides)
        while asked:
            guide, answer_s = asked.popleft()
            try:
                if await self._go(guide, target, answer_s, tally):
                    arrived = self._arrived(from_step, target, tally)
                    await self.snapshots.tidy()
                    return arrived
            except RemoteError as error:
                if isinstance(error, Silent) and answer_s < timeouts.request_s:
                    asked.append((guide, timeouts.request_s))
                    continue
                tally.refused |= isinstance(error, Refused)
                drop(error, self.here)
            finally:
                self.promising = tally.refused or tally.bytes_received > 0
        return None

    async def check_ahead(self, target: tuple[int, bytes]) -> Certified | None:
        """Returns the verified entry that leads to ``target``, where it is the only one that is missing, and has not
        been fetched ahead; else None. Whoever shows one that is not sound has no vote for a while."""
        step = self.replica.loaded.step
        if target[0] != step + 1 or (self._ahead is not None and self._ahead.update.header.head == target[1]):
            return None
        return await self.chains.entry_after(step, target[1], self.donors.of_head(target[1]))

    async def fetch_ahead(self, entry: Certified) -> None:
        """Fetches the update that ``check_ahead`` has returned the entry of, for ``to`` to commit later. While the
        trainer ends its inner step the state must not move; a peer that fetched only then could be one outer step late
        for ever."""
        step, head = entry.header.step, entry.header.head
        found = await self._fetch_one(step, head, self.donors.of_head(head))
        if found is not None:
            self._ahead = Ahead(update=found[0], certificate=entry.certificate, donor=found[1])

    async def learn_way(self, record: Record) -> None:
        """Asks a peer how it came to where its record says that it stands, and tells the directory. It ends within
        ``request_s``, whatever the peer does."""
        if record.step > self.replica.manifest.spec.outer.steps:
            return
        try:
            async with deadline(self.here.timeouts.request_s):
                way = await self.donors.ask_way(record, self.here.seat.history)
        except asyncio.TimeoutError:
            log.info("%s takes too long to show the way to outer step %d", record.label, record.step)
        except RemoteError as error:
            drop(error, self.here)
        else:
            self.here.directory.show(way)

    async def fetch_update(self, step: int, head: bytes) -> Update | None:
        """Returns the update that leads from outer step ``step`` to ``head``, verified and not committed, from whoever
        has it; None when nobody gives it."""
        found = await self._fetch_one(step, head, self.donors.of_update(step))
        return found[0] if found else None

    async def fetch_snapshot(self, step: int, digest: bytes) -> bool:
        """Downloads the snapshot with this digest, whoever has it. Returns whether it is in the ledger now."""
        return await self.snapshots.fetch(step, digest, Tally())

    # -- the way -----------------------------------------------------------------------------------------------------

    async def _go(self, guide: Record, target: tuple[int, bytes], answer_s: float, tally: Tally) -> bool:
        """Follows one guide: steps 1 to 5 of this file. Returns whether the replica is at the target now."""
        path = await self.donors.ask_path(guide, target, answer_s)
        way = None if path is None else await self.chains.follow(guide, path, target, tally)
        if path is None or way is None:
            return False
        common = await asyncio.to_thread(self._common_step, path)
        if common is None:
            start = self.replica.state
            if not await self.snapshots.fetch_newest(path, way, tally):
                return False
            await asyncio.to_thread(self.replica.load)
            tally.snapshot = True
            self._given_up += max(start.step - way.step, 0) if start and way.entries else 0
            way = Way(step=target[0])  # all of it is in my chain now
            common = await asyncio.to_thread(self._common_step, path)
            if common is None:
                return False  # the disk has lost it again
        return await self._commit_updates(path, common, way, tally)

    def _arrived(self, from_step: int | None, target: tuple[int, bytes], tally: Tally) -> CaughtUp:
        rolled_back, self._given_up = self._given_up, 0
        return CaughtUp(
            from_step=from_step,
            to_step=target[0],
            rolled_back=rolled_back,
            snapshot=tally.snapshot,
            bytes_received=tally.bytes_received,
            donors=len(tally.donors),
        )

    def _common_step(self, path: dict[int, bytes]) -> int | None:
        """Returns the newest outer step at which my ledger is on ``path``; None when it never is."""
        mine = self.replica.ledger.heads()
        agreed = [step for step, head in mine.items() if path.get(step) == head]
        return max(agreed, default=None)

    # -- updates -----------------------------------------------------------------------------------------------------

    async def _commit_updates(self, path: dict[int, bytes], common: int, way: Way, tally: Tally) -> bool:
        """Fetches and commits the updates from ``common`` along ``path``. Returns whether that has led to its end. What
        the replica has committed beyond ``common`` is given up no sooner than there is something to take in its
        place."""
        step, last = common, max(path)
        wanted = self._updates(path, step)
        donors = self.donors.of_head(path[last])
        download = Download(
            here=self.here,
            wanted=wanted,
            items=range(step, last),
            limit=step + wanted.ahead,
            donors=donors,
            took_s=self._took_s,
        )
        running = asyncio.create_task(download.run())
        try:
            while step < last:
                changed = download.changed.event
                found = wanted.take()
                if found is not None:
                    await self._roll_back(step, way)
                    await self._commit_along(*found)
                    step += 1
                    download.allow(step + wanted.ahead)
                elif download.over:
                    return await running
                else:
                    await heard(changed, self.here.timeouts.reduced_part_s)
            await self._roll_back(last, way)
            return True
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            tally.add(download)

    async def _commit_ahead(self, target: tuple[int, bytes], tally: Tally) -> bool:
        """Commits what was fetched ahead, if it leads to the target. Returns whether the replica is there now."""
        (ahead, self._ahead), state = (self._ahead, None), self.replica.state
        found = None if ahead is None else (ahead.update.header.parent, ahead.update.header.head)
        if ahead is None or state is None or found != (state.head, target[1]):
            return False
        try:
            await self._commit(ahead.update, ahead.certificate, ahead.donor)
        except RemoteError as error:
            drop(error, self.here)
            return False
        tally.donors.add(ahead.donor)
        return True

    async def _roll_back(self, step: int, way: Way) -> None:
        """Takes the replica back to an outer step of the ledger, and its chain to ``way``; where it stands there,
        nothing happens."""
        state = self.replica.state
        if state is not None and state.step == step:
            return
        self._given_up += 0 if state is None else max(state.step - step, 0)
        await to_its_end(asyncio.to_thread(self.replica.roll_back, step, way.entries))

    async def _commit_along(self, update: Update, donor: str) -> None:
        """Commits an update of which my chain has the entry."""
        entry = await asyncio.to_thread(self.replica.ledger.chain.entry, update.header.step)
        if entry is None:
            raise LedgerError(f"{self.replica.ledger.chain.path}: is damaged; restart to mend it")
        await self._commit(update, entry.certificate, donor)

    async def _commit(self, update: Update, certificate: Certificate, donor: str) -> None:
        try:
            await to_its_end(asyncio.to_thread(self.replica.commit, update, certificate))
        except ValueError as error:
            raise Misbehaved(donor, f"serves {error}") from error

    async def _fetch_one(self, step: int, head: bytes, donors: list[Record]) -> tuple[Update, str] | None:
        wanted = self._updates({step + 1: head}, step)
        items = range(step, step + 1)
        download = Download(
            here=self.here, wanted=wanted, items=items, limit=step + 1, donors=donors, took_s=self._took_s
        )
        await download.run()
        return wanted.take()

    def _updates(self, heads: dict[int, bytes], next_step: int) -> Updates:
        return Updates(grid=self._grid, heads=heads, timeouts=self.here.timeouts, next_step=next_step)
