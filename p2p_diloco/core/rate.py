"""A rate that is kept: a token bucket. Arithmetic alone; the clock is an argument."""

from __future__ import annotations

from dataclasses import dataclass, field

BURST_S = 1.0
"""After a pause, as much may go at once as flows in in this time."""


@dataclass(kw_only=True)
class Rate:
    """In any ``t`` seconds go at most ``(BURST_S + t) * bytes_per_s`` bytes, whoever sends them; a piece that is larger
    than a burst waits for all of it, and goes at once then."""

    bytes_per_s: float
    _level_bytes: float = field(init=False)
    """Below zero: what has been promised to those who wait."""
    _then_s: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._level_bytes = BURST_S * self.bytes_per_s

    def wait_s(self, size_bytes: int, now_s: float) -> float:
        """How long to wait before these bytes are sent. Counted as sent from now on: the next one waits for them."""
        flowed_in = (now_s - self._then_s) * self.bytes_per_s
        self._level_bytes = min(self._level_bytes + flowed_in, BURST_S * self.bytes_per_s) - size_bytes
        self._then_s = now_s
        return max(-self._level_bytes / self.bytes_per_s, 0.0)
