"""Every stream that another peer opens to this one: its first message says what it is for, and who here answers it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TypeAlias

from p2p_diloco.core.waiting import Bell, heard, now_s
from p2p_diloco.ledger.replica import Replica
from p2p_diloco.peer.anchoring import Anchoring
from p2p_diloco.peer.audits import Audits
from p2p_diloco.peer.presence import Presence
from p2p_diloco.peer.probes import Probes
from p2p_diloco.peer.revocations import Revoked
from p2p_diloco.peer.uploads import Uploads
from p2p_diloco.peer.witness import Witness
from p2p_diloco.round.here import Here
from p2p_diloco.round.matchmaking import Matchmaker
from p2p_diloco.round.settle import Settlement
from p2p_diloco.wire.anchor_messages import AskAnchors
from p2p_diloco.wire.audit_messages import Accuses, AskContributions
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.message import Message
from p2p_diloco.wire.messages import No
from p2p_diloco.wire.probe_messages import AskDialBack, AskTransfer
from p2p_diloco.wire.round_messages import AskCommit, AskPart, AskWitness, Closing, Contribute, Ready, Receipt
from p2p_diloco.wire.state_messages import (
    AskChain,
    AskChunk,
    AskHeads,
    AskIndex,
    AskManifest,
    AskRevocations,
    AskUpdate,
    Push,
)

ROUNDS_KEPT = 2
"""Finished rounds whose parts are still served to members that are late."""
OF_A_ROUND = (Contribute, Receipt, AskPart, AskCommit, AskContributions)
OfARound: TypeAlias = Contribute | Receipt | AskPart | AskCommit | AskContributions
OF_A_DONOR = (AskHeads, AskChain, AskIndex, AskChunk, AskUpdate)
OF_OTHERS = (Accuses, AskDialBack, AskTransfer, Push, AskRevocations, AskAnchors)
REQUESTS = (Ready, Closing, *OF_A_ROUND, AskWitness, *OF_A_DONOR, *OF_OTHERS)
MAX_REQUEST_BYTES = 6144
"""Two sealed statements, in ``Ready``, and what goes around them."""
RECEIPT_BYTES = 34
"""Of one part in a receipt: the only request that is larger in larger runs."""


@dataclass(kw_only=True, eq=False)
class Reception:
    """Reads the first message of every stream that comes in, and has it answered."""

    here: Here
    signed_manifest: bytes
    replica: Replica
    matchmaker: Matchmaker
    presence: Presence
    uploads: Uploads
    probes: Probes
    revoked: Revoked
    anchoring: Anchoring
    witness: Witness
    audits: Audits
    rounds: deque[Settlement] = field(default_factory=lambda: deque(maxlen=ROUNDS_KEPT))
    _round_opened: Bell = field(default_factory=Bell)

    def __post_init__(self) -> None:
        n_parts, is_owner = self.replica.ledger.grid.n_parts, self.here.peer_id == self.replica.manifest.owner
        largest = AskWitness.max_bytes if is_owner else 0
        self._max_request_bytes = max(MAX_REQUEST_BYTES + RECEIPT_BYTES * n_parts, largest)

    def open_round(self, settlement: Settlement) -> None:
        """Serves the members of a round from now on, and forgets the one before the last."""
        if len(self.rounds) == ROUNDS_KEPT:
            self.rounds[0].close()
        self.audits.cancel()
        self.rounds.append(settlement)
        self._round_opened.ring()

    async def give_manifest(self, channel: Channel) -> None:
        """Serves a stream of the manifest's protocol."""
        await channel.receive(AskManifest, timeout_s=self.here.timeouts.first_message_s)
        await channel.send_blob(self.signed_manifest)

    async def receive(self, channel: Channel) -> None:
        """Serves a stream of the run's protocol."""
        message: Message = await channel.receive(
            *REQUESTS, timeout_s=self.here.timeouts.first_message_s, max_bytes=self._max_request_bytes
        )
        self.here.directory.proven.answered(channel.peer_id)
        if self.here.seat.phase == "left":
            await channel.send(No(reason="leaving"))
        elif isinstance(message, Push):
            await self.presence.on_push(channel, message)
        elif isinstance(message, AskRevocations):
            await self.revoked.serve(channel)
        elif isinstance(message, AskAnchors):
            await self.anchoring.serve(channel, message)
        elif self.replica.state is None:
            await channel.send(No(reason="joining"))
        elif isinstance(message, Ready):
            await self.matchmaker.on_ready(channel, message)
        elif isinstance(message, Closing):
            await self.matchmaker.on_closing(channel, message)
        elif isinstance(message, OF_A_ROUND):
            await self._serve_round(channel, message)
        elif isinstance(message, AskWitness):
            await self.witness.on_ask_witness(channel, message)
        elif isinstance(message, OF_A_DONOR):
            await self.uploads.serve(channel, message)
        elif isinstance(message, Accuses):
            await self.audits.on_accuses(channel, message)
        elif isinstance(message, AskDialBack):
            await self.probes.on_ask_dial_back(channel, message)
        elif isinstance(message, AskTransfer):
            await self.probes.on_ask_transfer(channel, message)

    async def _serve_round(self, channel: Channel, message: OfARound) -> None:
        settlement = await self._find_round(message.round_id)
        if settlement is not None:
            await settlement.serve(channel, message)
        elif not isinstance(message, Receipt):  # whose sender takes a closed stream for a leader that is gone
            await channel.send(No(reason="no such round"))

    async def _find_round(self, round_id: bytes) -> Settlement | None:
        """Returns the round that a member means. It may know the roster a moment before I do: then I wait for mine, up
        to ``request_s``."""
        deadline_s = now_s() + self.here.timeouts.request_s
        while True:
            opened = self._round_opened.event
            for settlement in self.rounds:
                if settlement.group.round_id == round_id:
                    return settlement
            if now_s() >= deadline_s:
                return None
            await heard(opened, deadline_s - now_s())
