"""Partners of a download: peers that download the same snapshot at the same time, and have chunks for each other.

Their records name the snapshot while they are joining. A partner is asked again and again which chunks it has, on a
stream of its own, and for those that are missing here. What it says is a claim, and every chunk is verified: who shows
chunks that it does not give costs one refusal or one time-out, and who has nothing of use loses its place. The donors
go on meanwhile, in places of their own.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

from p2p_diloco.core.asked import Asked
from p2p_diloco.core.errors import Misbehaved, Refused, RemoteError
from p2p_diloco.core.records import Record
from p2p_diloco.core.waiting import heard, now_s, run_beside
from p2p_diloco.ledger.snapshot import IncomingSnapshot, held_bytes, open_held
from p2p_diloco.peer.donors import Donors
from p2p_diloco.peer.download import Download, drop
from p2p_diloco.round.here import Here
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.state_messages import AskHave, Have

log = logging.getLogger(__name__)

PARTNERS = 4
"""At a time."""
HAVE_EVERY_S = 0.5
"""Between two looks for partners, and two questions which chunks one has."""
USELESS_S = 10.0
"""A partner that has had nothing of use for so long loses its place."""
SMALL_ANSWER_BYTES = 1024
"""Of an answer, beside the chunks in it."""


@dataclass(kw_only=True, eq=False)
class Partners:
    """Fetches chunks of one download from its partners."""

    here: Here
    donors: Donors
    incoming: IncomingSnapshot
    download: Download
    _left: Asked = field(default_factory=Asked)
    """Those that have lost their places, for a while."""
    _running: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    """By peer id."""

    def __post_init__(self) -> None:
        self._ask = AskHave(step=self.incoming.step, digest=self.incoming.digest)
        self._chunks = len(self.incoming.slices)
        self._givers = {donor.peer_id for donor in self.download.donors}

    async def run(self) -> None:
        """Fetches from partners until nothing is missing, or the donors are of no more help and no partner is there.
        Raises LocalError for the own disk."""
        look_s = now_s()
        try:
            while self.download.handout.missing:
                changed = self.download.changed.event
                for peer_id in [peer_id for peer_id, task in self._running.items() if task.done()]:
                    self._running.pop(peer_id).result()
                if now_s() >= look_s:
                    look_s = now_s() + HAVE_EVERY_S
                    self._look()
                if self.download.over and not self._running:
                    return
                await heard(changed, look_s - now_s())
        finally:
            for task in self._running.values():
                task.cancel()
            await asyncio.gather(*self._running.values(), return_exceptions=True)

    def _look(self) -> None:
        """Gives the free places to peers that download the same now."""
        found = self.donors.downloading(self.incoming.step, self.incoming.digest)
        self.download.handout.share(self.here.peer_id, [record.peer_id for record in found])
        for record in self._left.unasked(found, now_s()):
            if len(self._running) < PARTNERS and record.peer_id not in (*self._running, *self._givers):
                self._running[record.peer_id] = asyncio.create_task(self._fetch_from(record))

    async def _fetch_from(self, partner: Record) -> None:
        """Fetches from one partner while it is of use."""
        self.download.handout.show(partner.peer_id, 0)
        pause_s = self.here.timeouts.record_life_s
        try:
            await run_beside(self._ask_along(partner), self.download.fetch_from(partner))
        except RemoteError as error:
            if isinstance(error, Refused):
                pause_s = self.here.timeouts.refresh_s  # it may be busy
            drop(error, self.here)
        finally:
            self.download.handout.give_back(partner.peer_id)
            self._left.note([partner.peer_id], now_s() + pause_s)
            self.download.changed.ring()

    async def _ask_along(self, partner: Record) -> None:
        """Asks a partner again and again what it has. Returns when it has had nothing of use for USELESS_S."""
        handout, useful_s = self.download.handout, now_s()
        channel = await self.here.transport.open(partner.peer_id, partner.maddrs, self.here.protocol)
        try:
            while handout.missing:
                handout.show(partner.peer_id, await self._shown(channel))
                self.download.changed.ring()
                if handout.is_of_use(partner.peer_id):
                    useful_s = now_s()
                elif now_s() - useful_s >= USELESS_S:
                    log.debug("%s has had no chunk for me for %g s", partner.label, USELESS_S)
                    return
                await asyncio.sleep(HAVE_EVERY_S)
        finally:
            channel.close()

    async def _shown(self, channel: Channel) -> int:
        """Returns the chunks that a partner has, as it says."""
        await channel.send(self._ask)
        most = SMALL_ANSWER_BYTES + held_bytes(self._chunks)
        answer = await channel.receive(Have, timeout_s=self.here.timeouts.request_s, max_bytes=most)
        try:
            return open_held(answer.chunks, self._chunks)
        except ValueError as error:
            raise Misbehaved(channel.peer_id, f"shows {error}") from error
