"""What became of a simulation: the curve, ``summary.json``, and what a study takes of it.

The keys in the file are the fields' names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from p2p_diloco.lab.simulated_run import SimulatedRun

SUMMARY_FILE = "summary.json"


@dataclass(frozen=True, kw_only=True)
class Point:
    """A point of the curve: where a simulation stands after ``step`` outer steps."""

    step: int
    head: str
    held_out_loss: float | None
    """Nats per token; None where theta was not evaluated, or is not finite."""
    loss: float | None
    """Mean of all replicas' inner steps; None before the first."""
    tokens: int
    """Trained on by all, since S_0."""
    sent_bytes: int
    """A contribution per outer step since S_0, as long as its encoding makes it: pruned or dropped or not."""

    def line(self) -> str:
        """Returns it in words."""
        held_out = "not finite" if self.held_out_loss is None else f"{self.held_out_loss:.4f}"
        loss = "" if self.loss is None else f", loss {self.loss:.4f}"
        return f"outer step {self.step}: held-out loss {held_out}{loss}, {self.tokens / 1e6:.2f} M tokens"


@dataclass(frozen=True, kw_only=True)
class Summary:
    """All that a simulation leaves in ``summary.json``."""

    what: SimulatedRun
    run_id: str
    digest: str
    """Of the last outer state."""
    heads: Mapping[int, str]
    """By outer step, which JSON writes as a string."""
    held_out: tuple[tuple[int, float], ...]
    """(outer step, loss), where theta was evaluated and is finite."""
    curve: tuple[Point, ...]
    wall_s: float
    torch: str
    """Its version."""
    device: str

    def to_json(self) -> bytes:
        """Returns the file's bytes."""
        what = json.loads(self.what.model_dump_json())
        written = {**vars(self), "what": what, "curve": [asdict(point) for point in self.curve]}
        return json.dumps(written, indent=1).encode() + b"\n"


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """Is what a study takes of one simulation, and writes among its figures."""

    last: Point
    held_out: tuple[tuple[int, float], ...]
    """As in ``Summary``; so the fields below."""
    digest: str
    torch: str
    device: str
    wall_s: float

    @classmethod
    def parse(cls, figures: Mapping[str, Any]) -> TrialResult:
        """Returns the result in ``figures``: a summary, of which the last point of the curve is taken, or what a study
        has written. KeyError or TypeError where something is missing."""
        last = figures["last"] if "last" in figures else figures["curve"][-1]
        return cls(
            last=Point(**last),
            held_out=tuple((step, loss) for step, loss in figures["held_out"]),
            digest=figures["digest"],
            torch=figures["torch"],
            device=figures["device"],
            wall_s=figures["wall_s"],
        )

    @property
    def loss(self) -> float:
        """Returns the final held-out loss; infinite where theta is not finite."""
        return math.inf if self.last.held_out_loss is None else self.last.held_out_loss

    def as_figures(self) -> Mapping[str, object]:
        """Returns what ``parse`` reads, in the order in which it is written."""
        return asdict(self)
