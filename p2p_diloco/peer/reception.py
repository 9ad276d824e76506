"""Every stream that another peer opens to this one: its first message says what it is for, and who here answers it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TypeAlias

from p2p_diloco.core.errors import Misbehaved
from p2p_diloco.core.group import Group, is_roster_signed
from p2p_diloco.core.roster import on_head
from p2p_diloco.core.waiting import Bell, heard, now_s
from p2p_diloco.ledger.replica import Replica
from p2p_diloco.peer.anchoring import Anchoring
from p2p_diloco.peer.audits import Audits
from p2p_diloco.peer.presence import Presence
from p2p_diloco.peer.probes import Probes
from p2p_diloco.peer.proofs import Proofs
from p2p_diloco.peer.revocations import Revoked
from p2p_diloco.peer.uploads import Uploads
from p2p_diloco.peer.witness import Witness
from p2p_diloco.round.here import Here
from p2p_diloco.round.matchmaking import Matchmaker
from p2p_diloco.round.settle import Settlement
from p2p_diloco.wire.anchor_messages import AskAnchors
from p2p_diloco.wire.audit_messages import Accuses, AskContributions
from p2p_diloco.wire.channel import NOT_THROUGH_A_RELAY, Channel
from p2p_diloco.wire.message import Message
from p2p_diloco.wire.messages import No
from p2p_diloco.wire.probe_messages import AskDialBack, AskTransfer
from p2p_diloco.wire.proof_messages import AskBarred, AskOther, AskRoster
from p2p_diloco.wire.round_messages import AskCommit, AskPart, AskWitness, Closing, Contribute, Ready, Receipt
from p2p_diloco.wire.state_messages import (
    AskChain,
    AskChunk,
    AskHave,
    AskHeads,
    AskIndex,
    AskManifest,
    AskRevocations,
    AskUpdate,
    Push,
)

ROUNDS_KEPT = 2
"""Finished rounds whose parts are still served to members that are late."""
MAX_TELLERS = 64
"""Peers of whose round I remember the leader."""
OF_A_ROUND = (Contribute, Receipt, AskPart, AskCommit, AskContributions, AskOther)
OfARound: TypeAlias = Contribute | Receipt | AskPart | AskCommit | AskContributions | AskOther
OF_A_DONOR = (AskHeads, AskChain, AskIndex, AskHave, AskChunk, AskUpdate)
OF_A_SNAPSHOT = (AskHave, AskChunk)
"""Asked of a newcomer, too, which has no state yet."""
OF_OTHERS = (Accuses, AskDialBack, AskTransfer, Push, AskRevocations, AskAnchors, AskBarred)
REQUESTS = (Ready, Closing, *OF_A_ROUND, AskRoster, AskWitness, *OF_A_DONOR, *OF_OTHERS)
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
    proofs: Proofs
    witness: Witness
    audits: Audits
    rounds: deque[Settlement] = field(default_factory=lambda: deque(maxlen=ROUNDS_KEPT))
    _round_opened: Bell = field(default_factory=Bell)
    _tellers: dict[str, tuple[bytes, str]] = field(default_factory=dict)
    """Peer -> the head and the leader of its round, as it told me last; the newest last."""

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
        elif channel.relayed and message.bulk:
            await channel.send(No(reason=NOT_THROUGH_A_RELAY))
        elif isinstance(message, Push):
            await self.presence.on_push(channel, message)
        elif isinstance(message, AskRevocations):
            await self.revoked.serve(channel)
        elif isinstance(message, AskAnchors):
            await self.anchoring.serve(channel, message)
        elif isinstance(message, AskBarred):
            await self.proofs.serve(channel)
        elif self.replica.state is None and not isinstance(message, OF_A_SNAPSHOT):
            await channel.send(No(reason="joining"))
        elif isinstance(message, (Ready, Closing)) and channel.peer_id in self.here.directory.barred:
            await channel.send(No(reason="barred from this run: you have signed two of what is signed once"))
        elif isinstance(message, Ready):
            await self.matchmaker.on_ready(channel, message)
        elif isinstance(message, Closing):
            await self.matchmaker.on_closing(channel, message)
        elif isinstance(message, OF_A_ROUND):
            await self._serve_round(channel, message)
        elif isinstance(message, AskRoster):
            await self._show_roster(channel, message)
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

    async def _show_roster(self, channel: Channel, message: AskRoster) -> None:
        """Answers a member of a round that asks whether I am in another one of its leader. When my roster comes later
        than the question, I ask back (``around``)."""
        if not is_roster_signed(message.leader, message.round_id, message.signature):
            raise Misbehaved(channel.peer_id, "shows a roster that its leader did not sign")
        self._tellers.pop(channel.peer_id, None)
        self._tellers[channel.peer_id] = message.head, message.leader
        for oldest in list(self._tellers)[:-MAX_TELLERS]:
            del self._tellers[oldest]
        for settlement in reversed(self.rounds):
            group = settlement.group
            alike = (group.head, group.sealed.leader) == (message.head, message.leader)
            if alike and group.round_id != message.round_id:
                await settlement.rosters.show(channel)
                return
        await channel.send(No(reason="no other roster of this leader"))

    def around(self, group: Group) -> tuple[str, ...]:
        """Returns the peers that may be in another round of the leader of mine: who has told me so, and then those that
        are expected on my head, and can be dialled."""
        directory, members = self.here.directory, {member.peer_id for member in group.members}
        told = [who for who, said in self._tellers.items() if said == (group.head, group.sealed.leader)]
        expected = on_head(directory.expected(self.here.wall_s()), group.head)
        around = [r.peer_id for r in expected if r.peer_id in directory.proven and not r.client_mode]
        return tuple(dict.fromkeys(peer_id for peer_id in (*told, *around) if peer_id not in members))

    async def _serve_round(self, channel: Channel, message: OfARound) -> None:
        patience_s = 0.0 if isinstance(message, AskOther) else self.here.timeouts.request_s
        settlement = await self._find_round(message.round_id, patience_s)
        if settlement is not None:
            await settlement.serve(channel, message)
        elif not isinstance(message, Receipt):  # whose sender takes a closed stream for a leader that is gone
            await channel.send(No(reason="no such round"))

    async def _find_round(self, round_id: bytes, patience_s: float) -> Settlement | None:
        """Returns the round that a member means. It may know the roster a moment before I do: then I wait for mine, up
        to ``patience_s``."""
        deadline_s = now_s() + patience_s
        while True:
            opened = self._round_opened.event
            for settlement in self.rounds:
                if settlement.group.round_id == round_id:
                    return settlement
            if now_s() >= deadline_s:
                return None
            await heard(opened, deadline_s - now_s())
