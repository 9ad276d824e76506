"""Token buckets: a rate that is kept, and how often each peer may ask. Arithmetic alone; the clock is an argument."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

BURST_S = 1.0
"""After a pause, as much may go at once as flows in in this time."""


@dataclass(kw_only=True)
class Rate:
    """A rate that is kept: in any ``t`` seconds go at most ``(BURST_S + t) * bytes_per_s`` bytes, whoever sends them; a
    piece that is larger than a burst waits for all of it, and goes at once then."""

    bytes_per_s: float
    _level_bytes: float = field(init=False)
    """Below zero: what has been promised to those who wait."""
    _then_s: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._level_bytes = BURST_S * self.bytes_per_s

    def wait_s(self, size_bytes: int, now_s: float) -> float:
        """Returns how long to wait before these bytes are sent. Counted as sent from now on: the next one waits for
        them."""
        flowed_in = (now_s - self._then_s) * self.bytes_per_s
        self._level_bytes = min(self._level_bytes + flowed_in, BURST_S * self.bytes_per_s) - size_bytes
        self._then_s = now_s
        return max(-self._level_bytes / self.bytes_per_s, 0.0)


@dataclass(kw_only=True)
class Allowance:
    """A least rate that is asked of somebody: time that it may take, up to ``longest_s``, won back by what it takes in
    that time at ``bytes_per_s``. So it may pause, and nothing that it did long ago lets it pause for longer."""

    bytes_per_s: float
    longest_s: float
    left_s: float = field(init=False)
    """Below zero: it has been slower than that."""

    def __post_init__(self) -> None:
        self.left_s = self.longest_s

    def spend(self, taken_s: float, size_bytes: int) -> None:
        """Counts that it has taken ``size_bytes`` in ``taken_s``."""
        self.left_s = min(self.left_s + size_bytes / self.bytes_per_s - taken_s, self.longest_s)


MAX_RATED_PEERS = 4096


class Quota:
    """A token bucket per peer; the peers that were quiet longest are forgotten."""

    def __init__(self, per_s: float, burst: float) -> None:
        self._per_s = per_s
        self._burst = burst
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, peer_id: str, now_s: float) -> bool:
        tokens, then_s = self._buckets.pop(peer_id, (self._burst, now_s))
        tokens = min(self._burst, tokens + (now_s - then_s) * self._per_s)
        allowed = tokens >= 1
        self._buckets[peer_id] = (tokens - allowed, now_s)
        if len(self._buckets) > MAX_RATED_PEERS:
            self._buckets.popitem(last=False)
        return allowed
