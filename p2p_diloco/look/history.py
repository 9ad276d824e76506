"""What became of the swarm while somebody watched: the curve, a point an outer step, and the pace, a point every few
seconds. Both are bounded: where there are too many points, every second one goes, for good.

It lies in one small JSON file, so that a monitor that starts again goes on with the curve. What happened meanwhile is
not invented: the curve lacks those steps, and the pace has a gap.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from p2p_diloco.core.records import Finite, Natural
from p2p_diloco.ledger.disk import replacing
from p2p_diloco.look.overview import Overview

log = logging.getLogger(__name__)

MAX_POINTS = 512
"""Of the curve, and of the pace."""
PACE_EVERY_S = 5.0
"""Between two points of the pace, in the beginning."""
GAP = 6
"""So many times longer without a point, and nobody has watched."""


class CurvePoint(BaseModel):
    """The losses at one outer step."""

    model_config = ConfigDict(strict=True, extra="forbid")

    step: Natural
    held_out_loss: Finite | None = None
    """Nats per token, of theta."""
    loss: Finite | None = None
    """Nats per token, of the trainers, when they were last seen at this step."""


class PacePoint(BaseModel):
    """Says how fast the swarm was at one moment."""

    model_config = ConfigDict(strict=True, extra="forbid")

    at_s: Finite
    """Unix time."""
    tokens_per_s: Finite | None
    """Of all; None at the end of a time in which nobody watched."""
    peers: Natural


class History(BaseModel):
    """The curve and the pace of one run."""

    model_config = ConfigDict(strict=True, extra="forbid")

    run_id: str
    step: Natural = 0
    """The swarm's, when it was last seen."""
    step_since_s: Finite | None = None
    """Unix time at which it was first seen there."""
    curve: Annotated[list[CurvePoint], Field(max_length=MAX_POINTS)] = []
    """In the order of steps."""
    curve_stride: Annotated[int, Field(gt=0)] = 1
    """Only outer steps that it divides have a point, and the newest ones."""
    pace: Annotated[list[PacePoint], Field(max_length=MAX_POINTS)] = []
    """In the order of time."""
    pace_every_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = PACE_EVERY_S

    @classmethod
    def load(cls, path: Path, run_id: str) -> History:
        """Returns what a file has; a new one where there is none, or none that can be read."""
        try:
            history = cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return cls(run_id=run_id)
        except (OSError, ValidationError) as error:
            log.warning("%s: cannot be read, the curve begins anew (%s)", path, type(error).__name__)
            return cls(run_id=run_id)
        return history if history.run_id == run_id else cls(run_id=run_id)

    def save(self, path: Path) -> None:
        """Writes it to a file, whole or not at all. To lose it costs a curve, so a disk that fails is only told."""
        try:
            with replacing(path) as file:
                file.write(self.model_dump_json().encode())
        except OSError as error:
            log.warning("%s: cannot be written (%s)", path, error.strerror)

    def learn(self, overview: Overview) -> None:
        """Takes in what is seen now."""
        if overview.step is not None:
            if overview.step != self.step or self.step_since_s is None:
                self.step, self.step_since_s = overview.step, overview.now_s
            if overview.loss is not None:
                self._point_at(overview.step).loss = overview.loss
        if overview.held_out_loss is not None:
            self._point_at(overview.held_out_step).held_out_loss = overview.held_out_loss
        while len(self.curve) > MAX_POINTS:
            self.curve_stride *= 2
            self._thin_curve(overview)
        self._thin_curve(overview)
        self._keep_pace(overview)

    def _point_at(self, step: int) -> CurvePoint:
        later = len(self.curve)
        while later and self.curve[later - 1].step > step:
            later -= 1
        if not later or self.curve[later - 1].step < step:
            self.curve.insert(later, CurvePoint(step=step))
            later += 1
        return self.curve[later - 1]

    def _thin_curve(self, overview: Overview) -> None:
        newest = (self.step, overview.held_out_step)
        self.curve = [point for point in self.curve if point.step % self.curve_stride == 0 or point.step in newest]

    def _keep_pace(self, overview: Overview) -> None:
        now_s = overview.now_s
        if self.pace and self.pace[-1].at_s > now_s:  # the clock was set back
            self.pace = [point for point in self.pace if point.at_s < now_s]
        waited_s = now_s - self.pace[-1].at_s if self.pace else self.pace_every_s
        if waited_s < self.pace_every_s:
            return
        if waited_s > GAP * self.pace_every_s:
            gap = PacePoint(at_s=self.pace[-1].at_s + self.pace_every_s, tokens_per_s=None, peers=0)
            self.pace.append(gap)
        point = PacePoint(at_s=now_s, tokens_per_s=overview.tokens_per_s, peers=len(overview.records))
        self.pace.append(point)
        if len(self.pace) > MAX_POINTS:
            self.pace, self.pace_every_s = self.pace[::2], 2 * self.pace_every_s

    def curve_columns(self) -> dict[str, list[float | None]]:
        """Returns the curve in columns, as the page draws it."""
        return {
            "step": [point.step for point in self.curve],
            "held_out_loss": [point.held_out_loss for point in self.curve],
            "loss": [point.loss for point in self.curve],
        }

    def pace_columns(self) -> dict[str, list[float | None]]:
        """Returns the pace in columns, as the page draws it."""
        return {
            "at_s": [round(point.at_s, 1) for point in self.pace],
            "tokens_per_s": [point.tokens_per_s for point in self.pace],
            "peers": [point.peers for point in self.pace],
        }
