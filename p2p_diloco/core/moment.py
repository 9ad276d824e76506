"""What every event of a peer has: its kind, and when it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pydantic import ConfigDict

from p2p_diloco.core.runfile import NotNegative

NOT_YET = -1.0
"""The time of an event that no log has written. A line that does not say when it was written is no event, therefore."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Every event has its kind and two times. The log sets both times when it writes the event."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, allow_inf_nan=False, validate_default=True)

    event: str
    wall_s: NotNegative = NOT_YET
    """Unix time."""
    mono_s: NotNegative = NOT_YET
    """Seconds of a clock that is never set back."""
