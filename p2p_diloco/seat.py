"""This peer, as its own network side sees it: where it stands, and what it is at."""

from __future__ import annotations

from dataclasses import dataclass, field

from p2p_diloco.records import Phase
from p2p_diloco.rounds import Progress, Standing
from p2p_diloco.waiting import Bell


@dataclass(kw_only=True)
class Seat:
    """The parts of a ``Peer`` share it: each writes what it is the first to know, and reads the rest."""

    standing: Standing
    role_trainer: bool
    client_mode: bool
    phase: Phase = "joining"
    progress: Progress = field(default_factory=Progress)
    sealed_record: bytes = b""
    """My newest record."""
    closes_s: float | None = None
    """Loop time at which the round that I have been told of closes."""
    in_round: bool = False
    changed: Bell = field(default_factory=Bell)
