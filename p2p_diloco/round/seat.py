"""This peer, as its own network side sees it: where it stands, and what it does."""

from __future__ import annotations

from dataclasses import dataclass, field

from p2p_diloco.core.anchor import Anchor, Anchors
from p2p_diloco.core.electors import History, NoHistory
from p2p_diloco.core.known import NOBODY_KNOWN, Known
from p2p_diloco.core.pace import Progress
from p2p_diloco.core.reach import IPV4_ALONE, Ways
from p2p_diloco.core.records import Phase
from p2p_diloco.core.swarm_head import Standing
from p2p_diloco.core.waiting import Bell

MAX_READY_IN_S = 86400.0
"""More than any round waits, so that it fits into a message, however slow the trainer is."""


@dataclass(kw_only=True)
class Seat:
    """Says where this peer stands and what it does. The parts of a ``Peer`` share it: each writes what it is the first
    to know, and reads the rest."""

    standing: Standing
    known: Known = NOBODY_KNOWN
    """Who is known where I stand."""
    history: History = field(default_factory=NoHistory)
    """How I came there, as my ledger has it."""
    anchors: Anchors = field(default_factory=Anchors)
    """Of the run's owner, as far as I have heard."""
    anchor: Anchor | None = None
    """The newest of them, which no history may leave out."""
    role_trainer: bool
    client_mode: bool
    ways: Ways = IPV4_ALONE
    """Over which families I am reached, and reach others."""
    phase: Phase = "joining"
    progress: Progress = field(default_factory=Progress)
    sealed_record: bytes = b""
    """My newest record."""
    closes_s: float | None = None
    """Loop time at which the round that I have been told of closes."""
    in_round: bool = False
    changed: Bell = field(default_factory=Bell)

    def call_trainer(self, now_s: float, gather_s: float) -> float:
        """Calls the trainer to the round that closes on my head, and returns the seconds until it is ready."""
        if self.closes_s is None:
            self.closes_s = now_s + gather_s
            self.changed.ring()
        return min(self.progress.ready_in_s(now_s, gather_s), MAX_READY_IN_S)

    def all_steps_s(self, now_s: float) -> float:
        """Returns the seconds until the trainer has made all its steps."""
        return self.progress.ready_in_s(now_s, MAX_READY_IN_S)
