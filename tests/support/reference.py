"""Oracles. Textbook DiLoCo (arXiv 2311.08105, algorithm 1): K replicas in one process, plain torch, no network. And the
weighted mean, in plain numpy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from p2p_diloco.core.codec import Vector

Loss = Callable[[torch.nn.Module, int, int], torch.Tensor]
"""(model, replica, inner step counted over the whole run) -> the loss on that replica's batch of that step."""
Inner = Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]


def diloco(
    model: torch.nn.Module,
    loss: Loss,
    inner: Inner,
    *,
    weights: list[float],
    inner_steps: int,
    outer_steps: int,
    outer_lr: float,
    outer_momentum: float,
) -> None:
    """Trains ``model``, which holds theta, in place. One weight per replica."""
    replicas = [copy.deepcopy(model) for _ in weights]
    inner_optimizers = [inner(replica.parameters()) for replica in replicas]
    outer_optimizer = torch.optim.SGD(
        model.parameters(), lr=outer_lr, momentum=outer_momentum, nesterov=outer_momentum > 0
    )
    for t in range(outer_steps):
        for k, (replica, optimizer) in enumerate(zip(replicas, inner_optimizers)):
            replica.load_state_dict(model.state_dict())
            for h in range(t * inner_steps, (t + 1) * inner_steps):
                optimizer.zero_grad()
                loss(replica, k, h).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        for theta, *locals_ in zip(model.parameters(), *(replica.parameters() for replica in replicas)):
            outer_gradients = torch.stack([w * (theta - local) for w, local in zip(weights, locals_)])
            theta.grad = outer_gradients.sum(0).detach() / sum(weights)
        outer_optimizer.step()


def weighted_mean(contributions: Sequence[tuple[int, Vector]], total_weight: int | None = None) -> Vector:
    """Returns float32 [n], the sum of weight / W * values over all (weight, values), from the left. W is
    ``total_weight`` or, without it, the sum of the weights."""
    total = sum(weight for weight, _ in contributions) if total_weight is None else total_weight
    mean: Vector = np.zeros_like(contributions[0][1])
    for weight, values in contributions:
        mean = mean + np.float32(weight / total) * values
    return mean
