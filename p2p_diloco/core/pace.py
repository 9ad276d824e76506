"""How far a trainer is, how many inner steps it plans, and when its outer step is due. Pure: times are arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median_low

LARGEST_SPEED_OVER_MEDIAN = 4
NEARLY = 0.9


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Says how far the trainer is, as it last reported. Times are the event loop's."""

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


def planned_steps(inner_steps: int, *, trained_s: float, second: int, step_s: float) -> int:
    """Returns how many inner steps a peer plans, so that all finish together (dynamic local updates, arXiv 2401.09135,
    section 4): as many as it makes in the time in which the second fastest peer makes all.

    ``inner_steps``: H, what the fastest ones make. ``trained_s``: how long this peer has trained between two heads.
    ``second``: how many inner steps the second fastest made in that time, as ``second_most_steps`` has it; what is
    beyond H counts as H. ``step_s``: an inner step of this peer. 0 where one of them is not known: all H.

    Nobody can shorten the time, and one false weight cannot make ``second`` larger than the largest true one. A peer
    that is nearly as fast makes all H: speeds measured on a shared processor differ by as much from one round to the
    next.
    """
    if trained_s <= 0 or step_s <= 0 or second <= 0:
        return inner_steps
    planned = trained_s * inner_steps / min(second, inner_steps) / step_s
    return inner_steps if planned >= NEARLY * inner_steps else max(1, round(planned))


def second_most_steps(weights: Sequence[int], tokens_per_inner_step: int) -> int:
    """Returns the second largest number of inner steps behind an update, or the only one, from the ``weights`` in its
    header: tokens, at most a multiple of their median. Of one that keeps its parameters when it misses a round, they
    are those of several phases."""
    ranked = sorted(weights, reverse=True)
    return ranked[min(1, len(ranked) - 1)] // tokens_per_inner_step if ranked else 0


def claimed_steps(inner_steps: int, mine: float, others: Sequence[float]) -> int:
    """Returns how many inner steps a peer makes while the fastest makes all, as far as others are believed. It may
    plan more for what they claim, and never fewer.

    Speeds are in tokens per second, 0 where unknown; one that is more than four times the median counts as four times
    the median.
    """
    known = [speed for speed in (mine, *others) if speed > 0]
    if mine <= 0 or len(known) < 2:
        return inner_steps
    fastest = min(max(known), LARGEST_SPEED_OVER_MEDIAN * median_low(known))
    return inner_steps if mine >= NEARLY * fastest else max(1, round(inner_steps * mine / fastest))


@dataclass(kw_only=True)
class Phase:
    """Measures how long a trainer has trained since the last head, as its network side sees it, and plans its inner
    steps. Times are the event loop's."""

    inner_steps: int
    """H."""
    planned: int = field(init=False)
    trained_s: float = 0.0
    """Until it last came for an outer step; without rounds."""
    called_s: float = 0.0
    """The same, until it was called to the last round; all of it where it came by itself."""
    _whole: bool = False
    """Whether all that the trainer offers was made in that time."""
    _began_s: float | None = None
    _came_s: float | None = None
    """When it last came by itself; None when it was called."""

    def __post_init__(self) -> None:
        self.planned = self.inner_steps

    def end(self, now_s: float, called_s: float | None, likely_s: float, *, whole_plan: bool = False) -> None:
        """Notes that the trainer comes for an outer step. ``called_s``: when it was called to the round; None when it
        was not. ``likely_s``: what the steps that it offers should have taken; where that is longer than it has
        trained, some are from before it joined, or of another head, and nothing follows from the time. ``whole_plan``:
        it has made all H, so the call has not cut it short."""
        if self._began_s is not None:
            if called_s is None or whole_plan:
                until_s = self._came_s = now_s
            else:
                until_s, self._came_s = min(max(called_s, self._began_s), now_s), None
            self.called_s = self.trained_s + until_s - self._began_s
            self.trained_s += now_s - self._began_s
            self._began_s = None
            self._whole = self._whole and self.trained_s >= NEARLY * likely_s

    def wait(self, called_s: float) -> None:
        """Notes when the round was called for which the trainer had come by itself: until then others trained, and it
        would have. Else one that has planned too few steps would plan as few again."""
        if self._came_s is not None:
            waited_s = max(called_s - self._came_s, 0.0)
            self.trained_s, self.called_s = self.trained_s + waited_s, self.called_s + waited_s
            self._came_s = None

    def plan(self, second: int, step_s: float, claimed: int = 1) -> None:
        """Plans the next phase, after an update has committed. ``second`` and ``step_s``: as ``planned_steps`` has
        them. ``claimed``: as ``claimed_steps`` has it; no fewer are planned, in case the time says less, as after a
        phase that began later than the others'.

        Where the second fastest had time for all H, others may have waited for this peer since it was called: that time
        is left out. But no more than half: a round may have been called long before anybody was ready.
        """
        full = second >= NEARLY * self.inner_steps
        trained_s = max(self.called_s, self.trained_s / 2) if full else self.trained_s
        if self._whole:
            timed = planned_steps(self.inner_steps, trained_s=trained_s, second=second, step_s=step_s)
            self.planned = max(timed, claimed)

    def go_on(self, now_s: float, *, moved: bool) -> None:
        """Notes that the trainer trains again. ``moved``: from another head."""
        self._began_s = now_s
        if moved:
            self.trained_s, self.called_s, self._whole = 0.0, 0.0, True


def outer_step_due(*, inner_step: int, planned: int, step_s: float, closes_in_s: float | None, behind: bool) -> bool:
    """Returns whether a trainer that has just ended an inner step offers what it has: its steps are done, the round
    closes before another one ends, or the swarm went on without it."""
    if behind or inner_step >= planned:
        return True
    return inner_step > 0 and closes_in_s is not None and closes_in_s < step_s
