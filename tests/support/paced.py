"""A trainer that rests after each inner step: ``python -m tests.support.paced peer``, like ``p2p-diloco peer``.

It computes what all do, and leaves the cores to others most of the time: several fit on two of them, and one that
starts meanwhile is soon there.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from tests.support.lying import override

REST_S = 0.05


def rest_after_steps() -> None:
    """From now on in this process."""
    from p2p_diloco.learn.inner import InnerOptimizer

    def resting(real: Callable[..., float]) -> Callable[..., float]:
        def step(*of: Any, **at: Any) -> float:
            loss = real(*of, **at)
            time.sleep(REST_S)
            return loss

        return step

    override(InnerOptimizer, "step", resting)


if __name__ == "__main__":
    from p2p_diloco.__main__ import main

    rest_after_steps()
    sys.exit(main())
