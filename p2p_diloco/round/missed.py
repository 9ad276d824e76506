"""A round that did not commit, as a value: there is nothing to clean up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MissedReason = Literal["alone", "behind", "failed", "leaving", "diverged", "repaired"]


@dataclass(frozen=True, kw_only=True)
class Missed:
    """A round that did not commit here, and why."""

    reason: MissedReason
    detail: str
