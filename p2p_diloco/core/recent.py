"""How long others have kept this peer waiting in recent rounds, and how long it waits for them because of that. Pure:
times are arguments.

A wait is the median of all members' times plus SPREADS times their median absolute deviation: fewer than half of the
members move neither far, whatever they do. It is no shorter than a floor, nor than LINK_MARGIN times what the
line of who is waited for needs, as it was measured; and no longer than the constant that stands where fewer than
LEAST_ROUNDS rounds were seen. Who did not come counts as that constant: where most become slower, waits become longer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median

from p2p_diloco.core.config import Timeouts

WINDOW_ROUNDS = 12
"""Of each kind of times the last ones are kept."""
LEAST_ROUNDS = 5
MAX_ANSWERS = 64
"""That are kept of one round."""
SPREADS = 6.0
LINK_MARGIN = 1.2


def wait_s(rounds_s: Sequence[Sequence[float]], *, floor_s: float, cap_s: float, need_s: float = 0.0) -> float:
    """Returns how long to wait, in seconds. ``rounds_s``: for each round, the times of its members. ``need_s``: what
    the line needs for the bytes that are to come."""
    times_s = [one for times in rounds_s for one in times]
    if len(rounds_s) < LEAST_ROUNDS or not times_s:
        return cap_s
    usual_s = median(times_s)
    spread_s = median(abs(one - usual_s) for one in times_s)
    return min(max(usual_s + SPREADS * spread_s, LINK_MARGIN * need_s, floor_s), cap_s)


def _window() -> deque[tuple[float, ...]]:
    return deque(maxlen=WINDOW_ROUNDS)


@dataclass(kw_only=True)
class Recent:
    """Holds the times of recent rounds, in seconds; those of one round together. They are lost when a peer ends."""

    answers: deque[list[float]] = field(default_factory=lambda: deque(maxlen=WINDOW_ROUNDS))
    """How long peers took to answer while a round was formed: those that I called, or that I asked to lead."""
    answers_on: bytes = b""
    """The head on which the last of these rounds was formed."""
    contributions: deque[tuple[float, ...]] = field(default_factory=_window)
    """The longest that I waited for a contribution of each sender, as a reducer."""
    receipts: deque[tuple[float, ...]] = field(default_factory=_window)
    """How long each member's receipt took, as a leader."""

    def note_answer(self, head: bytes, took_s: float) -> None:
        """Keeps how long a peer took to answer while a round was formed on a head."""
        if head != self.answers_on or not self.answers:
            self.answers_on = head
            self.answers.append([])
        if len(self.answers[-1]) < MAX_ANSWERS:
            self.answers[-1].append(took_s)

    def note_round(self, contributions_s: Iterable[float], receipts_s: Iterable[float]) -> None:
        """Keeps how long the members of a round that was committed took."""
        _note(self.contributions, contributions_s)
        _note(self.receipts, receipts_s)

    def forget_rounds(self) -> None:
        """Waits as long as at first, for a round has failed: perhaps because waits were too short."""
        self.contributions.clear()
        self.receipts.clear()

    def answer_s(self, timeouts: Timeouts) -> float:
        """Returns how long to wait for the first answer of a peer while a round is formed."""
        return wait_s(self.answers, floor_s=timeouts.least_wait_s, cap_s=timeouts.request_s)

    def contribution_s(self, timeouts: Timeouts, need_s: float) -> float:
        """Returns how long a reducer waits for a sender that needs ``need_s`` to send what it sends in that time."""
        return wait_s(self.contributions, floor_s=timeouts.least_wait_s, cap_s=timeouts.part_s, need_s=need_s)

    def receipt_s(self, timeouts: Timeouts, need_s: float) -> float:
        """Returns how long a leader waits for receipts. A member leads few rounds: how prompt others were with their
        contributions tells as well. ``need_s``: so much longer than I others may need for what comes to them."""
        rounds_s = [*self.contributions, *self.receipts]
        return wait_s(rounds_s, floor_s=timeouts.least_wait_s, cap_s=timeouts.settle_s, need_s=need_s)


def _note(window: deque[tuple[float, ...]], times_s: Iterable[float]) -> None:
    if times := tuple(times_s):
        window.append(times)
