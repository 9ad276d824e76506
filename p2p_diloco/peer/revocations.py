"""Which tokens the owner of a run has revoked: how a peer hears of that, keeps it, and passes it on.

The owner's word is one signed, numbered list. It lies in the folder of the ledger; ``p2p-diloco revoke`` writes it
there while the owner's seed runs, which looks for it from time to time. A peer's record has the number of the list that
the peer has. Who has an older one asks: the owner first. So nobody has to be believed, and nobody can bring an older
list back; but who is cut off from all that have a list does not hear of it. In a run that is open nothing of this
happens.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol

from p2p_diloco.core.asked import Asked
from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.directory import Directory
from p2p_diloco.core.errors import Misbehaved, RemoteError
from p2p_diloco.core.invitation import open_revocations
from p2p_diloco.core.records import Record
from p2p_diloco.core.waiting import now_s
from p2p_diloco.ledger.replica import Replica
from p2p_diloco.ledger.seats import keep_revocations, read_revocations
from p2p_diloco.peer.presence import Presence
from p2p_diloco.round.here import Here
from p2p_diloco.wire.channel import Channel, run_protocol
from p2p_diloco.wire.messages import No
from p2p_diloco.wire.state_messages import AskRevocations, RevocationList
from p2p_diloco.wire.traffic import Traffic

log = logging.getLogger(__name__)

ASKED_AT_ONCE = 4


class Dialling(Protocol):
    """Is what it takes to ask others for a list. ``channel.Transport`` has it."""

    timeouts: Timeouts
    traffic: Traffic

    async def open(self, peer_id: str, maddrs: list[str], protocol: str) -> Channel:
        """Opens a stream to a peer. Raises Gone or Silent."""


@dataclass(kw_only=True, eq=False)
class NewestList:
    """Asks peers for the newest list of revocations, and has a directory go by it: for a peer, and for who looks on."""

    transport: Dialling
    directory: Directory
    owner: str
    """The peer id of the run's owner, who has signed the list."""
    sealed: bytes = b""
    """The list, as the owner has sealed it; empty where none has been heard of."""

    def __post_init__(self) -> None:
        self._asked = Asked()

    async def hear(self, live: Iterable[Record]) -> bool:
        """Asks for a newer list where one of the ``live`` records says that there is one, and returns whether there
        was. Nobody is asked in a run that is open."""
        asked_s, admission = now_s(), self.directory.admission
        if not admission.by_invitation:
            return False
        newer = self._asked.unasked((r for r in live if r.revocations > admission.number), asked_s)
        newer.sort(key=lambda record: (record.peer_id != admission.owner, -record.revocations))
        chosen = [record.peer_id for record in newer[:ASKED_AT_ONCE]]
        self._asked.note(chosen, asked_s + self.transport.timeouts.record_life_s)
        lists = await asyncio.gather(*map(self._ask, chosen))
        return any([self.take(sealed) for sealed in lists if sealed])

    async def _ask(self, peer_id: str) -> bytes:
        """Returns the list that a peer sends, sound; nothing where it sends none."""
        run_id = self.directory.run_id
        try:
            channel = await self.transport.open(peer_id, self.directory.maddrs(peer_id), run_protocol(run_id))
            try:
                answer: RevocationList = await channel.request(AskRevocations(), RevocationList)
            finally:
                channel.close()
            try:
                open_revocations(answer.sealed, run_id=run_id, owner=self.owner)
            except ValueError as error:
                raise Misbehaved(peer_id, f"sends {error}") from error
        except RemoteError as error:
            log.debug("no revocations of %s: %s", peer_id[-8:], error.reason)
            self.transport.traffic.reject(error)
            return b""
        return answer.sealed

    def take(self, sealed: bytes) -> bool:
        """Goes by a sound list from now on, if it is newer than mine. Returns whether it is."""
        directory = self.directory
        revocations = open_revocations(sealed, run_id=directory.run_id, owner=self.owner)
        if revocations.number <= directory.admission.number:
            return False
        self.sealed = sealed
        directory.admission = replace(directory.admission, revocations=revocations)
        log.info("invitations that the run's owner has revoked: %d", len(revocations.tokens))
        return True


@dataclass(kw_only=True, eq=False)
class Revoked:
    """Keeps the newest list of revocations that this peer has heard of."""

    here: Here
    replica: Replica
    presence: Presence

    def __post_init__(self) -> None:
        owner = self.replica.manifest.owner
        self.newest = NewestList(transport=self.here.transport, directory=self.here.directory, owner=owner)

    async def run(self) -> None:
        """Reads and hears of revocations every ``refresh_s``, until it is cancelled; returns in a run that is open."""
        while self.here.directory.admission.by_invitation:
            if self.read() or await self.hear():
                self.presence.publish_now.ring()
                await self.presence.pushes.to_all()
            await asyncio.sleep(self.here.timeouts.refresh_s)

    def read(self) -> bool:
        """Takes the list on the disk, if it is newer than mine, and returns whether it was."""
        if not self.here.directory.admission.by_invitation:
            return False
        sealed = read_revocations(self.replica.ledger.folder, self.replica.manifest)
        return sealed is not None and sealed != self.newest.sealed and self.newest.take(sealed)

    async def hear(self) -> bool:
        """Asks for a newer list where a record says that there is one, and returns whether there was. It is on the disk
        then."""
        heard = await self.newest.hear(self.here.live())
        if heard:
            await asyncio.to_thread(keep_revocations, self.replica.ledger.folder, self.newest.sealed)
        return heard

    async def serve(self, channel: Channel) -> None:
        """Answers a peer that asks for my list."""
        sealed = self.newest.sealed
        await channel.send(RevocationList(sealed=sealed) if sealed else No(reason="nothing is revoked"))
