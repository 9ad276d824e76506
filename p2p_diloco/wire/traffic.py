"""What goes over one transport, counted: bytes by what they were for, and the streams that others spoiled."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal
from weakref import WeakSet

from p2p_diloco.core.errors import RemoteError

Purpose = Literal["reduce", "catchup", "dht", "other"]
"""A round's streams; heads, updates and snapshots between ledgers; records in the DHT; matchmaking, pushes,
manifests, and what others measure."""


@dataclass(kw_only=True, eq=False)
class Traffic:
    """Counts what we hand to p2pd and get from it: encryption, and what p2pd says of its own accord, not included."""

    sent: Counter[Purpose] = field(default_factory=Counter)
    received: Counter[Purpose] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    """By the name of the error's class, in small letters."""
    _counted: WeakSet[RemoteError] = field(default_factory=WeakSet)

    def reject(self, error: RemoteError) -> None:
        """Counts an error of another peer, wherever it ends: in the server of a stream, a round, a catch-up,
        matchmaking or a push. An error that two of them see is counted once."""
        if error not in self._counted:
            self._counted.add(error)
            self.rejected[type(error).__name__.lower()] += 1
