"""One round that is being formed, as its leader sees it. ``gatherings`` says how it goes on."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field
from typing import TypeAlias

from p2p_diloco.core.waiting import Bell
from p2p_diloco.wire.round_messages import Behind, NoWitness, Redirect, Roster, TooFew

Answer: TypeAlias = Roster | TooFew | NoWitness | Behind | Redirect


@dataclass(kw_only=True)
class Gathering:
    """One round being formed, at its leader."""

    head: bytes
    opened_s: float = math.inf
    """Loop time at which enough were ready to call the others."""
    ready: dict[str, bytes] = field(default_factory=dict)
    """Peer id -> sealed readiness."""
    deadlines_s: dict[str, float] = field(default_factory=dict)
    """Peer id -> loop time until which a peer that is expected is waited for."""
    closes_s: float = 0.0
    """Loop time at which the round closes, as far as is known: the latest of these deadlines."""
    answer: Answer | None = None
    """What everybody that is ready hears, as soon as the round has closed."""
    changed: Bell = field(default_factory=Bell)
    task: asyncio.Task[None] | None = None
    idle: set[str] = field(default_factory=set)
    """Peers that have said that they are in no other round on this head."""
    notices: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    """Peer id -> the talk with a peer that has been called."""
    hailed: set[str] = field(default_factory=set)
    """Peers that have been told that it is there, before it was open."""
    claims: dict[str, Redirect] = field(default_factory=dict)
    """Better-ranked peer -> what leads to it, since it says that it gathers."""
    awaited: set[str] = field(default_factory=set)
    """Peers whose roster somebody else waits for."""
    declined: set[str] = field(default_factory=set)
    """Peers that were ready and are left out: I lost them in earlier rounds, or their token has no more places."""

    @property
    def is_uncalled(self) -> bool:
        """Returns whether too few are ready yet to call the others."""
        return self.answer is None and self.opened_s == math.inf
