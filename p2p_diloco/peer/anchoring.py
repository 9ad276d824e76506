"""The anchors of the run's owner: how its seed makes them, and how a peer hears of them, keeps and serves them.

    read    take what lies in the folder of the ledger
    hear    ask peers whose records name an anchor that this peer does not have
    make    at the owner: sign the state that is old enough

The owner signs what it has itself computed: a snapshot that it has made from the one before, after two more were due.
It asks for newer anchors of its own first: its folder may be an old copy. It signs only what most of those that are
known carry on (``known.carried_to``): where it is in the smaller half of a network that is cut, its word would lead
newcomers to a history that is given up. While two anchors contradict each other, nobody changes what it goes by; the
owner alone is led by the votes again, and its next anchor settles it.

Known weaknesses: after a snapshot that it had to download, the owner signs what follows from there. Of the outer steps
between it has seen the certificates alone. And where most of those that are known leave at once and for good, nothing
is anchored any more: that looks like a network that is cut.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from p2p_diloco.core.anchor import ANCHORED_AFTER, Anchor, Anchors, anchored_steps, open_anchor
from p2p_diloco.core.asked import Asked
from p2p_diloco.core.errors import Misbehaved, RemoteError
from p2p_diloco.core.events import EventLog
from p2p_diloco.core.known import carried_to
from p2p_diloco.core.records import Record
from p2p_diloco.core.trust_event import AnchorContradicted, AnchorTaken
from p2p_diloco.core.waiting import deadline, heard, now_s
from p2p_diloco.ledger.anchors import keep_anchors, read_anchors
from p2p_diloco.ledger.ledger import Ledger
from p2p_diloco.ledger.replica import Replica
from p2p_diloco.peer.presence import Presence
from p2p_diloco.round.here import Here
from p2p_diloco.wire.anchor_messages import ANCHORS_SENT, AnchorList, AskAnchors
from p2p_diloco.wire.channel import Channel

log = logging.getLogger(__name__)

ANCHORS_ASKED_AT_ONCE = 4


@dataclass(kw_only=True, eq=False)
class Anchoring:
    """Keeps the anchors that this peer goes by; at the run's owner, it makes them."""

    here: Here
    replica: Replica
    presence: Presence
    events: EventLog

    def __post_init__(self) -> None:
        self.is_owner = self.here.peer_id == self.replica.manifest.owner
        self._asked = Asked()
        self._taking = asyncio.Lock()
        """Held while the file of the anchors is written."""
        self._computed: dict[int, tuple[bytes, bytes]] = {}
        """Outer step -> head and digest of a snapshot that was made here from the one before."""
        self._held_back: int | None = None
        """The outer step up to which the history is carried on, where a state beyond that is old enough."""

    @property
    def anchors(self) -> Anchors:
        """Returns those that I go by."""
        return self.here.seat.anchors

    async def run(self) -> None:
        """Hears of anchors, and makes them at the run's owner, every ``refresh_s``, until it is cancelled."""
        while True:
            news = await self.hear()
            if await self.make():
                await self.presence.pushes.to_all()
            elif news:
                self.presence.publish_now.ring()
            await self._pause()

    async def _pause(self) -> None:
        """Returns after ``refresh_s``. Where outer steps are shorter than that, the owner sees its snapshots all the
        same, whenever it moves: only the last two are kept."""
        if not self.is_owner:
            await asyncio.sleep(self.here.timeouts.refresh_s)
            return
        ends_s = now_s() + self.here.timeouts.refresh_s
        while (left_s := ends_s - now_s()) > 0:
            changed = self.here.seat.changed.event
            self._note_computed()
            await heard(changed, left_s)

    async def read(self) -> None:
        """Takes the anchors on the disk."""
        anchors, problem = await asyncio.to_thread(read_anchors, self.replica.ledger.folder, self.replica.manifest)
        if problem:
            log.warning(
                "the anchors after number %d are not sound: %s; they are fetched again", anchors.number, problem
            )
        self.here.seat.anchors, self.here.seat.anchor = anchors, anchors.newest

    async def hear(self) -> bool:
        """Asks those that name an anchor which I do not know, the owner first, each once in a record's life. Returns
        whether any leads on from mine."""
        asked_s, timeouts = now_s(), self.here.timeouts
        unknown = self._asked.unasked(filter(self._is_news, self.here.live()), asked_s)
        unknown.sort(key=lambda record: (record.peer_id != self.replica.manifest.owner, -record.anchored_step))
        chosen = [record.peer_id for record in unknown[:ANCHORS_ASKED_AT_ONCE]]
        self._asked.note(chosen, asked_s + timeouts.record_life_s)
        before = self.anchors.number
        await asyncio.gather(*map(self._ask, chosen))
        return self.anchors.number > before

    def _is_news(self, record: Record) -> bool:
        return record.anchor != b"" and record.anchor not in self.anchors.digests

    async def _ask(self, peer_id: str) -> None:
        """Takes the anchors that a peer sends, page by page, within ``request_s``."""
        try:
            async with deadline(self.here.timeouts.request_s):
                channel = await self.here.open(peer_id)
                try:
                    since = max(self.anchors.number - 1, 0)  # one of the same number may contradict mine
                    while page := await self._page(channel, since):
                        await self._take(page)
                        since = page[-1].number
                        if len(page) < ANCHORS_SENT:
                            break
                finally:
                    channel.close()
        except asyncio.TimeoutError:
            log.debug("%s takes too long to send its anchors", peer_id[-8:])
        except RemoteError as error:
            log.debug("no anchors of %s: %s", peer_id[-8:], error.reason)
            self.here.transport.traffic.reject(error)

    async def _page(self, channel: Channel, since: int) -> list[Anchor]:
        """Returns the anchors after number ``since`` that a peer sends at a time, all of them sound."""
        manifest = self.replica.manifest
        answer: AnchorList = await channel.request(AskAnchors(since=since), AnchorList)
        try:
            page = [open_anchor(one, run_id=manifest.run_id, owner=manifest.owner) for one in answer.anchors]
            if any(one.number <= since for one in page):
                raise ValueError("anchors that were not asked for")
        except ValueError as error:
            raise Misbehaved(channel.peer_id, f"sends {error}") from error
        return sorted(page, key=lambda anchor: anchor.number)

    async def _take(self, offered: list[Anchor]) -> None:
        """Goes by sound anchors from now on, if they lead on from mine; says so where they contradict mine."""
        async with self._taking:
            before, after = self.anchors, self.anchors.offered(offered)
            if after.number > before.number:
                await asyncio.to_thread(keep_anchors, self.replica.ledger.folder, after)
                self._go_by(after)
                self._tell(after.chain[-1], made=False)
            elif after.contrary != before.contrary and after.contrary is not None:
                self._go_by(after)
                self._warn(after.chain[-1], after.contrary)

    def _go_by(self, anchors: Anchors) -> None:
        """Goes by these from now on. The owner itself is not bound by anchors of its own that contradict each other."""
        seat = self.here.seat
        seat.anchors = anchors
        seat.anchor = None if self.is_owner and anchors.contrary is not None else anchors.newest
        self.presence.seal()
        self.presence.heard.ring()

    def _tell(self, anchor: Anchor, *, made: bool) -> None:
        log.info("outer step %d is anchored by the run's owner (anchor %d)", anchor.step, anchor.number)
        taken = AnchorTaken(step=anchor.step, head=anchor.head.hex(), number=anchor.number, made=made)
        self.events.write(taken)

    def _warn(self, mine: Anchor, other: Anchor) -> None:
        log.warning(
            "the run's owner has signed anchors that contradict each other: number %d of outer step %d, and number %d "
            "of outer step %d; I stay with the first one until the owner settles it",
            *(mine.number, mine.step, other.number, other.step),
        )
        self.events.write(AnchorContradicted(step=mine.step, number=mine.number, other_step=other.step))

    async def serve(self, channel: Channel, message: AskAnchors) -> None:
        """Answers a peer that asks for my anchors."""
        page = self.anchors.since(message.since, ANCHORS_SENT)
        await channel.send(AnchorList(anchors=[anchor.to_bytes() for anchor in page]))

    # -- the owner ---------------------------------------------------------------------------------------------------

    async def make(self) -> bool:
        """Signs the newest state that may be anchored by now, at the owner, and returns whether there was one. Others
        are asked for newer anchors before."""
        if not self.is_owner or self.replica.state is None:
            return False
        self._note_computed()
        old_enough = self.here.seat.standing.step - ANCHORED_AFTER * self.replica.manifest.spec.round.snapshot_every
        newest_due = self._due(old_enough)
        if newest_due is None:
            return False
        await self.hear()
        carried = await asyncio.to_thread(self._carried_to)
        async with self._taking:
            due = self._due(min(old_enough, carried))
            self._tell_of_held_back(carried if carried < newest_due[0] else None)
            if due is None:
                return False
            step, (head, digest) = due
            if await asyncio.to_thread(self.replica.history.certified_digest, step) not in (b"", digest):
                return False  # ``upkeep`` has said so, and takes the other state
            run_id, owner = self.replica.manifest.run_id, self.here.identity
            anchor = self.anchors.next(run_id, step=step, head=head, state=digest, owner=owner)
            anchors = self.anchors.offered([anchor])
            await asyncio.to_thread(keep_anchors, self.replica.ledger.folder, anchors)  # before anybody hears of it
            self._go_by(anchors)
            self._tell(anchor, made=True)
            return True

    def _note_computed(self) -> None:
        """Remembers the snapshots that were made here: from an older one that is still there, by all updates since."""
        ledger = self.replica.ledger
        for info in ledger.snapshots():
            if info.step not in self._computed and is_computed(ledger, info.step, info.head):
                self._computed[info.step] = info.head, info.digest
        oldest = self.here.seat.standing.step - 4 * self._every
        self._computed = {step: what for step, what in self._computed.items() if step >= oldest}

    def _carried_to(self) -> int:
        """Returns the outer step up to which my history is carried on by most of those known (``known``). Blocks where
        the newest anchor is long ago."""
        newest = self.here.seat.anchor
        since = 0 if newest is None else newest.step
        return carried_to(since, self.replica.ledger.chain.contributed(since), self.replica.rules.least_known)

    def _tell_of_held_back(self, carried: int | None) -> None:
        """Says so, once, when nothing is anchored because most of those known have not gone on. ``carried``: since
        where; None where they have."""
        if carried is not None and carried != self._held_back:
            log.warning(
                "no outer step after %d is anchored until most of those known there have gone on from it", carried
            )
        self._held_back = carried

    def _due(self, last: int) -> tuple[int, tuple[bytes, bytes]] | None:
        """Returns the newest state up to outer step ``last`` that may be anchored: (outer step, (head, digest)). It is
        on the way to where I stand, and beyond the newest anchor."""
        newest = self.here.seat.anchor
        for step in sorted(self._computed, reverse=True):
            head, digest = self._computed[step]
            if newest is not None and step <= newest.step:
                return None
            on_my_way = self.replica.ledger.chain.head_at(step) == head
            if step <= last and step % self._every == 0 and on_my_way:
                return step, (head, digest)
        return None

    @property
    def _every(self) -> int:
        spec = self.replica.manifest.spec
        return anchored_steps(spec.outer.steps, spec.round.snapshot_every)


def is_computed(ledger: Ledger, step: int, head: bytes) -> bool:
    """Returns whether an older snapshot and the updates since, all of which are in the ledger, lead to a head."""
    for older in ledger.snapshots():
        if older.step < step:
            leading_on = ledger.updates.following(older.step, older.head)
            if any((header.step + 1, header.head) == (step, head) for header in leading_on):
                return True
    return False
