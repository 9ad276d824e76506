"""How fast a trainer makes inner steps: what it shows, and the pace by which peers plan how many to make.

Times are given, as ``time.monotonic`` has them. What passes between the end of the last inner step and ``begin`` (a
round, an evaluation) counts for neither.
"""

from __future__ import annotations

from collections import deque

SPEED_STEPS = 20
"""Inner steps over which the speed that is shown is averaged."""
PACE_ROUNDS = 4
"""Outer steps over which the pace is averaged."""


class Speed:
    """The inner steps of one trainer, as far as their times matter."""

    def __init__(self) -> None:
        self._began_s, self._began_tokens = 0.0, 0
        self._paces: deque[tuple[int, float]] = deque(maxlen=PACE_ROUNDS)
        """(tokens, seconds) of the inner steps before each of the last outer steps."""
        self._step_ends: list[float] = []
        """When the last inner steps ended; the first is when the first of them began."""

    def begin(self, now_s: float, tokens: int) -> None:
        """Notes that inner steps begin now, after ``tokens`` that were trained on earlier."""
        self._began_s, self._began_tokens = now_s, tokens
        self._step_ends = [now_s]

    def step_ended(self, now_s: float) -> None:
        """Notes that an inner step ends now."""
        self._step_ends = [*self._step_ends[-SPEED_STEPS:], now_s]

    @property
    def step_s(self) -> float:
        """Returns the mean seconds of the last inner steps; 0 before the first one has ended."""
        ends = self._step_ends
        return (ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else 0.0

    def ended_s(self, now_s: float) -> float:
        """Returns when the last inner step ended; before any has begun, that is now."""
        return self._step_ends[-1] if self._step_ends else now_s

    def offered(self, ended_s: float, tokens: int) -> float:
        """Notes an outer step whose inner steps ended then, after ``tokens`` in all. Returns the pace, in tokens per
        second, of the inner steps before it and before the last few outer steps."""
        self._paces.append((tokens - self._began_tokens, ended_s - self._began_s))
        trained, seconds = (sum(column) for column in zip(*self._paces))
        return trained / seconds if seconds else 0.0
