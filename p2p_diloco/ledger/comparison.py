"""The comparison of a state in memory with the files: what is computed twice alike is right, and the other has flipped.

Rules of this file: bits are compared, so that zeros of two signs differ, and a NaN is what it is.
"""

from __future__ import annotations

import numpy as np

from p2p_diloco.core.codec import Vector
from p2p_diloco.core.errors import LedgerError
from p2p_diloco.ledger.replay import Replay


def agreed(replay: Replay, part: int, memory: tuple[Vector, Vector]) -> tuple[Vector, Vector]:
    """Returns (theta, momentum) of a part as the files have it. It is computed again where memory differs, for the
    error may be here: two of the three must agree. Raises LedgerError when all differ, and what ``Replay.part``
    does."""
    first = replay.part(part)
    if not differing(first, memory):
        return first
    second = replay.part(part)
    if differing(second, first) and differing(second, memory):
        raise LedgerError(
            f"this machine computes part {part} of outer step {replay.step} differently each time; its memory or "
            f"processor is faulty"
        )
    return second


def differing(one: tuple[Vector, Vector], other: tuple[Vector, Vector]) -> int:
    """Returns how many values of the two parts have other bits."""
    return sum(int(np.count_nonzero(a.view(np.uint32) != b.view(np.uint32))) for a, b in zip(one, other))
