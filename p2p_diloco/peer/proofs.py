"""The proofs that a peer holds against others: how it keeps them, tells of them, and hears of more.

A peer's record says how many peers it has barred, and has a digest of who they are. Whoever has barred others than that
asks, and fetches the proofs that it does not have. Nobody has to be believed, for each proof is checked before it bars
anybody; one that proves nothing is held against whoever has sent it. But who is cut off from all that have a proof does
not hear of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass

from p2p_diloco.core.asked import Asked
from p2p_diloco.core.barred import Barred
from p2p_diloco.core.equivocation import MAX_PROOF_BYTES, parse_proof
from p2p_diloco.core.errors import Gone, Misbehaved, RemoteError
from p2p_diloco.core.events import EventLog
from p2p_diloco.core.trust_event import PeerBarred
from p2p_diloco.core.waiting import deadline, heard, now_s
from p2p_diloco.ledger.proofs import keep_proofs, read_proofs
from p2p_diloco.ledger.replica import Replica
from p2p_diloco.peer.presence import Presence
from p2p_diloco.round.here import Here
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.messages import No
from p2p_diloco.wire.proof_messages import AskBarred, AskProof, BarredPeers

log = logging.getLogger(__name__)

ASKED_AT_ONCE = 4


@dataclass(kw_only=True, eq=False)
class Proofs:
    """Keeps the proofs against those whom this peer has barred, and exchanges them with others."""

    here: Here
    replica: Replica
    presence: Presence
    events: EventLog

    def __post_init__(self) -> None:
        self._told: set[str] = set()
        """Those whose barring has been written down."""
        self._asked = Asked()

    @property
    def barred(self) -> Barred:
        """Returns those whom this peer has barred."""
        return self.here.directory.barred

    def read(self) -> None:
        """Bars those against whom there is a proof on the disk."""
        read_proofs(self.replica.ledger.folder, self.barred)
        self._told = set(self.barred)
        if self._told:
            log.info("%d peers are barred from this run: each has signed two of what is signed once", len(self._told))

    async def run(self) -> None:
        """Writes down who is barred, tells the others, and asks them, every ``refresh_s`` and whenever somebody has
        been barred, until it is cancelled."""
        while True:
            changed = self.barred.changed.event
            await self.hear()
            if self._write_down():
                await asyncio.to_thread(keep_proofs, self.replica.ledger.folder, self.barred)
                self.presence.seal()
                self.presence.publish_now.ring()
                await self.presence.pushes.to_all()
            await heard(changed, self.here.timeouts.refresh_s)

    def _write_down(self) -> bool:
        """Tells the log of those that have been barred since the last time. Returns whether there are any."""
        news = [peer_id for peer_id in self.barred if peer_id not in self._told]
        for peer_id in news:
            proof = parse_proof(self.barred.proof(peer_id) or b"")
            log.warning("peer %s is barred: it signed %s", peer_id, proof.what)
            self.events.write(PeerBarred(step=self.here.seat.standing.step, peer=peer_id, why=proof.kind))
        self._told = set(self.barred)
        return bool(news)

    # -- from others -------------------------------------------------------------------------------------------------

    async def hear(self) -> None:
        """Asks peers whose records say that they have barred others than I have, each once within
        ``record_life_s``."""
        asked_s, mine = now_s(), self.barred.digest()
        live = self.here.live()
        others = self._asked.unasked((r for r in live if r.barred and r.barred_digest != mine), asked_s)
        others.sort(key=lambda record: -record.barred)
        chosen = [record.peer_id for record in others[:ASKED_AT_ONCE]]
        self._asked.note(chosen, asked_s + self.here.timeouts.record_life_s)
        await asyncio.gather(*map(self._ask, chosen))

    async def _ask(self, peer_id: str) -> None:
        """Takes the proofs of a peer that I do not have, as many as come within ``request_s``."""
        try:
            async with deadline(self.here.timeouts.request_s):
                channel = await self.here.open(peer_id)
                try:
                    theirs: BarredPeers = await channel.request(AskBarred(), BarredPeers)
                    for other in theirs.peer_ids:
                        if other not in self.barred:
                            await self._fetch(channel, other)
                finally:
                    channel.close()
        except asyncio.TimeoutError:
            log.debug("%s takes too long to send its proofs", peer_id[-8:])
        except RemoteError as error:
            log.debug("no proofs of %s: %s", peer_id[-8:], error.reason)
            self.here.transport.traffic.reject(error)

    async def _fetch(self, channel: Channel, other: str) -> None:
        """Bars ``other`` with the proof that is sent. Misbehaved when it proves nothing of this peer."""
        await channel.send(AskProof(peer_id=other))
        data = await channel.receive_blob(MAX_PROOF_BYTES, self.here.timeouts.request_s)
        try:
            if parse_proof(data).peer_id != other:
                raise ValueError("a proof about another peer than was asked for")
            self.barred.take(data)
        except ValueError as error:
            raise Misbehaved(channel.peer_id, f"sends {error}") from error

    async def serve(self, channel: Channel) -> None:
        """Answers a peer that asks whom I have barred, and gives it the proofs that it wants."""
        if not len(self.barred):
            await channel.send(No(reason="nobody is barred"))
            return
        await channel.send(BarredPeers(peer_ids=list(self.barred)))
        with contextlib.suppress(Gone):  # who has what it wants closes the stream
            for _ in range(len(self.barred)):
                ask = await channel.receive(AskProof, timeout_s=self.here.timeouts.first_message_s)
                proof = self.barred.proof(ask.peer_id)
                if proof is None:
                    await channel.send(No(reason="not barred here"))
                    return
                await channel.send_blob(proof)
