"""What the inner steps of one trainer come to: its tokens, its loss, and how fast it is.

Times are given, as ``speed`` has them.
"""

from __future__ import annotations

import math

from p2p_diloco.learn.speed import Speed
from p2p_diloco.peer.control import InnerStep


class InnerSteps:
    """The inner steps that one trainer has made since it joined."""

    def __init__(self) -> None:
        self.tokens = 0
        """Trained on since joining."""
        self.tokens_since_theta = 0
        """What the next contribution stands for."""
        self.tokens_this_step = 0
        """Since the outer step at which this peer stands; fewer than since theta, where a lost contribution is kept."""
        self.tokens_per_s = 0.0
        self.loss: float | None = None
        """Of the last one, in nats per token."""
        self.speed = Speed()

    def begin(self, now_s: float) -> None:
        """Notes that inner steps begin now, after something else."""
        self.speed.begin(now_s, self.tokens)

    def resume(self, tokens: int) -> None:
        """Counts the tokens that an earlier process of this peer has trained on since theta."""
        self.tokens_since_theta = self.tokens_this_step = tokens

    def ended(self, loss: float, tokens: int, now_s: float) -> None:
        """Notes that an inner step ends now: its mean loss, and the tokens it took."""
        self.loss = loss
        self.tokens += tokens
        self.tokens_since_theta += tokens
        self.tokens_this_step += tokens
        self.speed.step_ended(now_s)
        if self.speed.step_s:
            self.tokens_per_s = tokens / self.speed.step_s

    def moved(self, *, kept: bool) -> None:
        """Notes that theta is a new one. ``kept``: the model goes on from its own parameters all the same."""
        self.tokens_this_step = 0
        if not kept:
            self.tokens_since_theta = 0

    def line(self, inner_step: int, planned: int) -> InnerStep:
        """Returns what the network process is told of the last inner step, the ``inner_step``-th of ``planned``."""
        loss = self.loss if self.loss is not None and math.isfinite(self.loss) else None
        return InnerStep(
            inner_step=inner_step,
            planned=planned,
            step_s=self.speed.step_s,
            loss=loss,
            tokens=self.tokens,
            tokens_per_s=self.tokens_per_s,
        )
