"""How fast the others send, as this peer sees it: what it measures in a round, and what it keeps of several.

A peer that reduces reads the contributions of all others, and it is their senders' lines that it waits for. What it
sends itself, and the means that it receives, tell less: means come no faster than the slowest contribution to them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median_low

from p2p_diloco.core.uplinks import LARGEST_UPLINK

LEAST_MEASURED_BYTES = 2**18
"""Of fewer, a stream's rate is that of its first round trips."""
UPLINKS_KEPT = 5
"""Of one peer: their median is told."""
UPLINKS_KEPT_STEPS = 16
"""For so many outer steps a measurement is told: who reduces no more is not measured by those that reduce nothing."""
MAX_MEASURED = 256
"""Peers of which measurements are kept."""


@dataclass(kw_only=True)
class Arrivals:
    """Measures what arrives on one stream, from its first frame on."""

    size_bytes: int = 0
    """Of all frames that were waited for since the one before."""
    took_s: float = 0.0
    last_s: float | None = None
    """When the last frame came; None when the next one does not count, because it is not known how long it took."""

    def came(self, size_bytes: int, now_s: float) -> None:
        """Takes in that a frame has come."""
        if self.last_s is not None:
            self.size_bytes += size_bytes
            self.took_s += now_s - self.last_s
        self.last_s = now_s

    def held_back(self) -> None:
        """Takes in that the receiver has not read for a while: the next frame may have come long ago."""
        self.last_s = None

    def uplink(self, mine_bytes: int, all_bytes: Iterable[int]) -> int | None:
        """Returns the uplink of the sender, in bytes/s, at most LARGEST_UPLINK; None where too little has come.
        ``mine_bytes``: what the stream has in all. ``all_bytes``: the same of each stream that the sender sends at the
        same time, this one among them. Streams share a line alike, so as much has gone over each of the others as over
        this one, or all that it has."""
        if self.size_bytes < LEAST_MEASURED_BYTES:
            return None
        sent_bytes = self.size_bytes * sum(min(one, mine_bytes) for one in all_bytes) / mine_bytes
        return LARGEST_UPLINK if self.took_s * LARGEST_UPLINK <= sent_bytes else int(sent_bytes / self.took_s)


@dataclass(kw_only=True)
class Measured:
    """Holds the uplinks that this peer has measured in its last rounds. They are lost when it ends."""

    kept: dict[str, deque[tuple[int, int]]] = field(default_factory=dict)
    """Peer id -> (outer step, uplink in bytes/s) of its last measurements, who was measured last at the end."""

    def note(self, step: int, uplinks: Mapping[str, int]) -> None:
        """Keeps what was measured in a round at an outer step."""
        for peer_id, uplink in uplinks.items():
            self.kept[peer_id] = self.kept.pop(peer_id, deque(maxlen=UPLINKS_KEPT))
            self.kept[peer_id].append((step, uplink))
        while len(self.kept) > MAX_MEASURED:
            del self.kept[next(iter(self.kept))]

    def at(self, step: int) -> dict[str, int]:
        """Returns peer id -> its uplink in bytes/s, as this peer tells it at an outer step."""
        recent = {
            peer_id: [uplink for then, uplink in kept if step - UPLINKS_KEPT_STEPS <= then <= step]
            for peer_id, kept in self.kept.items()
        }
        return {peer_id: median_low(uplinks) for peer_id, uplinks in recent.items() if uplinks}
