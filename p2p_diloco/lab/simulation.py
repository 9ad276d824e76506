"""K replicas in one process, without a network: what a swarm of K peers does, bit for bit, and what studies vary.

    outer_step    inner steps of one replica after another, then the round: contributions, parts, update, apply

The inner step, batches, codec, weights, reduction, update and outer step are the peer's own functions. The same file
and names give the same heads, also after an interruption (``simulate``), and also as a swarm of processes
(``recount``). Nothing here touches the disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from p2p_diloco.core.aggregate import AGGREGATIONS
from p2p_diloco.core.codec import Vector
from p2p_diloco.core.manifest import RunManifest
from p2p_diloco.core.outer import OuterState
from p2p_diloco.core.roster import counted_weights, rank
from p2p_diloco.core.update import Part, Update, UpdateHeader
from p2p_diloco.lab.checkpoint import Origin
from p2p_diloco.lab.recount import Past
from p2p_diloco.lab.simulated_run import SimulatedRun, members_at
from p2p_diloco.lab.simulation_result import Point
from p2p_diloco.lab.trainers import SimulatedTrainer
from p2p_diloco.lab.variants import BITS, OuterRule, prune, quantize, quantized_bytes
from p2p_diloco.learn.data import Corpus
from p2p_diloco.learn.inner import draws_drop
from p2p_diloco.learn.model import evaluate
from p2p_diloco.learn.parameters import layout_of, tie

EVALUATED_ROWS = 32
"""In one forward pass: small batches would take longer to evaluate on than to learn from."""


@dataclass(kw_only=True)
class Simulation:
    """A simulated swarm, at one outer step after another."""

    what: SimulatedRun
    manifest: RunManifest
    folder: Path
    """Where ``simulate`` keeps it."""
    device: torch.device
    state: OuterState
    replicas: list[SimulatedTrainer]
    rule: OuterRule
    held_out: Corpus
    model: torch.nn.Module
    """Theta, for evaluation."""
    origin: Origin
    past: Past | None = None
    """What a swarm did, for a simulation that does it again."""
    curve: list[Point] = field(default_factory=list)
    wall_s: float = 0.0
    """That it has taken, of all starts."""

    @property
    def done(self) -> bool:
        """Returns whether it has made its last outer step, or nothing will come of further ones."""
        last = self.what.run.outer.steps if self.past is None else len(self.past.inner_steps)
        return self.state.step >= last or self.diverged

    @property
    def diverged(self) -> bool:
        """Returns whether theta is not finite: nothing will come of it."""
        return not np.isfinite(self.state.theta).all()

    def differing_heads(self) -> list[int]:
        """Returns the outer steps at which it has another head than the swarm that it does again."""
        heads = {} if self.past is None else self.past.heads
        return [point.step for point in self.curve if point.step in heads and point.head != heads[point.step]]

    # -- one outer step ------------------------------------------------------------------------------------------------

    def outer_step(self) -> Point:
        """Makes one outer step, and returns its point of the curve: the members learn alone, one after another, and
        offer; their mean is applied; and all take theta, except who keeps what was dropped, or takes it late."""
        spec, options, step = self.what.run, self.what.simulate, self.state.step
        members = [self.replicas[k] for k in self._members(step)]
        losses, trained = [], 0
        for k, replica in zip(self._members(step), members):
            inner_steps = self._inner_steps(step, k)
            losses += replica.learn(self.what, self.state, inner_steps)
            trained += sum(inner_steps) * spec.tokens_per_inner_step
        members.sort(key=lambda replica: rank(self.state.head, replica.name))
        diverged = {replica.name for replica in members if not np.isfinite(replica.local).all()}
        dropped = diverged | {replica.name for replica in members if self._is_dropped(step, replica)}
        update, sent_bytes = self._reduce(members, dropped)
        self.rule.step(self.state, update)
        late = {replica.name for replica in members} - dropped if options.delay and not self.done else set()
        for replica in self.replicas:
            if replica.name in diverged:  # as a peer does: it takes theta, and begins with new moments
                replica.inner.forget()
            elif replica.name in dropped and spec.round.on_missed == "keep":
                continue
            replica.tokens = 0
            replica.late = replica.name in late
            if not replica.late:
                replica.local[:] = self.state.theta
                replica.write_local()
        mean_loss = sum(losses) / len(losses)
        self.add_point(mean_loss if np.isfinite(mean_loss) else None, trained, sent_bytes)
        return self.curve[-1]

    def _members(self, step: int) -> list[int]:
        if self.past is not None:
            there = self.past.inner_steps[step]
            return [k for k, replica in enumerate(self.replicas) if replica.name in there]
        names = [replica.name for replica in self.replicas]
        return members_at(self.what.simulate, names, step, self.what.run.outer.steps)

    def _inner_steps(self, step: int, k: int) -> tuple[int, ...]:
        if self.past is not None:
            return self.past.inner_steps[step][self.replicas[k].name]
        return (self.what.simulate.inner_steps_of(k, self.what.run.inner.steps),)

    def _is_dropped(self, step: int, replica: SimulatedTrainer) -> bool:
        if self.past is not None:
            return replica.name in self.past.dropped[step]
        return draws_drop(self.what.run.seed, replica.name, step, self.what.simulate.drop)

    def _reduce(self, members: Sequence[SimulatedTrainer], dropped: set[str]) -> tuple[Update, int]:
        """Returns the update of a round of ``members``, in the order of rank; and the bytes of one contribution."""
        spec, options, state = self.what.run, self.what.simulate, self.state
        grid, lossy = self.rule.grid, options.quantize
        policy = options.divided_by(spec.round.on_missed)
        claimed = [min(replica.tokens, spec.max_weight_tokens) for replica in members]
        aggregation = AGGREGATIONS[spec.outer.aggregate]
        weights, total_weight = counted_weights(claimed, aggregation, policy, absent=0)
        offered = {i: self._outer_gradient(replica) for i, replica in enumerate(members) if replica.name not in dropped}
        parts = []
        for i, where in enumerate(grid.slices):
            came = {who: grid.decode(i, grid.encode(gradient[where])) for who, gradient in offered.items()}
            part = aggregation.reduce(came, weights, i, grid, total_weight)
            if lossy != "none":
                part = Part(mask=part.mask, data=grid.encode(quantize(grid.decode(i, part.data), lossy)))
            parts.append(part)
        contributors = tuple((replica.name, weight) for replica, weight in zip(members, weights))
        header = UpdateHeader(
            step=state.step,
            parent=state.head,
            contributors=contributors,
            part_hashes=tuple(part.hash for part in parts),
        )
        return Update(header=header, parts=tuple(parts)), self._contribution_bytes()

    def _outer_gradient(self, replica: SimulatedTrainer) -> Vector:
        """Returns, as float32 [n], theta - local, and what is left of it."""
        gradient: Vector = np.subtract(self.state.theta, replica.local)
        options = self.what.simulate
        if options.prune:
            prune(gradient, layout_of(replica.inner.model), options.prune)
        return gradient if options.quantize == "none" else quantize(gradient, options.quantize)

    def _contribution_bytes(self) -> int:
        grid, lossy = self.rule.grid, self.what.simulate.quantize
        return quantized_bytes(grid.n, lossy) if lossy in BITS else grid.vector_bytes

    def add_point(self, loss: float | None, tokens: int, sent_bytes: int) -> None:
        """Appends where it stands to the curve; theta is evaluated if it is time to. ``tokens``, ``sent_bytes``: since
        the point before."""
        spec, step = self.what.run, self.state.step
        last = self.curve[-1] if self.curve else None
        held_out: float | None = None
        if (step % self.what.simulate.evaluate_every == 0 or self.done) and not self.diverged:
            batches = self.held_out.held_out_batches(
                batch_size=EVALUATED_ROWS, seq_len=spec.data.seq_len, max_tokens=spec.data.eval_tokens
            )
            tie(self.model, self.state.theta)
            held_out = evaluate(self.model, batches)
        point = Point(
            step=step,
            head=self.state.head.hex(),
            held_out_loss=held_out if held_out is not None and np.isfinite(held_out) else None,
            loss=loss,
            tokens=tokens + (last.tokens if last else 0),
            sent_bytes=sent_bytes + (last.sent_bytes if last else 0),
        )
        self.curve.append(point)
