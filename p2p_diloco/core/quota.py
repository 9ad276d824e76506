"""How often a peer may ask for something: a token bucket each. Bounded, however many peers ask."""

from __future__ import annotations

from collections import OrderedDict

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
