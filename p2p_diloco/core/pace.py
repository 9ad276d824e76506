"""How far a trainer is, how many inner steps it plans, and when its outer step is due. Pure: times are arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low

LARGEST_SPEED_OVER_MEDIAN = 4
NEARLY = 0.9


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far the trainer is, as it last reported. Times are the event loop's."""

    inner_step: int = 0
    """Since its last outer step."""
    planned: int = 0
    step_s: float = 0.0
    """Mean seconds of an inner step; 0 before the first one has ended."""
    reported_s: float = 0.0

    def ready_in_s(self, now_s: float, gather_s: float) -> float:
        """Returns the seconds until this trainer is ready, as ``ready_in_s`` has them."""
        return ready_in_s(
            remaining_steps=self.planned - self.inner_step,
            step_s=self.step_s,
            since_step_s=now_s - self.reported_s,
            gather_s=gather_s,
        )


def ready_in_s(*, remaining_steps: int, step_s: float, since_step_s: float, gather_s: float) -> float:
    """Returns the seconds until a trainer is ready that hears now that the round closes in ``gather_s``.

    It finishes its steps if there is time, else it stops at the last step that ends in time, but not before one has
    ended: that alone may take longer than ``gather_s``. A trainer that has not finished a step yet, so that nobody
    knows its speed, takes all the time there is.
    """
    if step_s <= 0:
        return gather_s if remaining_steps > 0 else 0.0
    next_end_s = max(step_s - since_step_s, 0.0)
    if remaining_steps <= 0:
        return 0.0
    finish_s = next_end_s + (remaining_steps - 1) * step_s
    if finish_s <= gather_s:
        return finish_s
    steps_in_time = int((gather_s - next_end_s) // step_s) if gather_s > next_end_s else 0
    return next_end_s + steps_in_time * step_s


def planned_steps(inner_steps: int, mine: float, others: Sequence[float]) -> int:
    """Returns how many inner steps a peer plans, so that all finish together.

    They are in proportion to its speed (dynamic local updates, arXiv 2401.09135, section 4). ``inner_steps``: H, the
    number that the fastest peer makes. Speeds are in tokens per second, 0 where unknown; one that is more than four
    times the median counts as four times the median: a false claim gains little. A peer that is nearly as fast as the
    fastest makes all H: speeds measured on a shared processor differ by as much from one round to the next.
    """
    known = [speed for speed in (mine, *others) if speed > 0]
    if mine <= 0 or len(known) < 2:
        return inner_steps
    fastest = min(max(known), LARGEST_SPEED_OVER_MEDIAN * median_low(known))
    return inner_steps if mine >= NEARLY * fastest else max(1, round(inner_steps * mine / fastest))


def outer_step_due(*, inner_step: int, planned: int, step_s: float, closes_in_s: float | None, behind: bool) -> bool:
    """Returns whether a trainer that has just ended an inner step offers what it has: its steps are done, the round
    closes before another one ends, or the swarm went on without it."""
    if behind or inner_step >= planned:
        return True
    return inner_step > 0 and closes_in_s is not None and closes_in_s < step_s
