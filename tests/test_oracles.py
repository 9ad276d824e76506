"""Our outer step, from contributions to theta, against plain torch and the textbook (tests/support/reference.py).

A two-layer network on synthetic data; contributions go through the real codec, mean, update and apply.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import pytest
import torch

from p2p_diloco.core.aggregate import AGGREGATIONS
from p2p_diloco.core.codec import Vector
from p2p_diloco.core.codecs import CODECS, CodecName, decode
from p2p_diloco.core.grid import Grid, part_slices
from p2p_diloco.core.outer import OuterState, apply, genesis_state
from p2p_diloco.core.update import Update, UpdateHeader
from tests.support.reference import Inner, Loss, diloco

BATCH = 16
ADAMW: Inner = functools.partial(torch.optim.AdamW, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
SGD: Inner = functools.partial(torch.optim.SGD, lr=0.1)
ModelT = TypeVar("ModelT", bound=torch.nn.Module)


def network() -> torch.nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))


def batch_of(replica: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one distribution, and never the same twice."""
    rng = np.random.default_rng([replica, step])
    x = rng.standard_normal((BATCH, 8)).astype(np.float32)
    y = np.sin(x[:, :3] + x[:, 3:6]).astype(np.float32)
    return torch.from_numpy(x), torch.from_numpy(y)


def loss_of(model: torch.nn.Module, replica: int, step: int) -> torch.Tensor:
    x, y = batch_of(replica, step)
    return torch.nn.functional.mse_loss(model(x), y)


def train(model: torch.nn.Module, loss: Loss, inner: torch.optim.Optimizer, replica: int, steps: Sequence[int]) -> None:
    for step in steps:
        inner.zero_grad()
        loss(model, replica, step).backward()  # type: ignore[no-untyped-call]
        inner.step()


def vector_of(model: torch.nn.Module) -> Vector:
    vector: Vector = torch.nn.utils.parameters_to_vector(model.parameters()).detach().numpy().copy()
    return vector


def set_vector(model: ModelT, vector: Vector) -> ModelT:
    torch.nn.utils.vector_to_parameters(torch.from_numpy(vector.copy()), model.parameters())
    return model


def update_from(state: OuterState, locals_: Sequence[Vector], weights: Sequence[int], codec: CodecName) -> Update:
    """What a group without faults agrees on: every contribution crosses the wire, and so does every mean."""
    parts, grid = [], Grid(n=len(state.theta), codec=codec)
    for i, where in enumerate(grid.slices):
        sent = [grid.encode(state.theta[where] - local[where]) for local in locals_]
        came = {k: grid.decode(i, data) for k, data in enumerate(sent)}
        parts.append(AGGREGATIONS["mean"].reduce(came, weights, i, grid))
    header = UpdateHeader(
        step=state.step,
        parent=state.head,
        contributors=tuple((f"peer {k}", weight) for k, weight in enumerate(weights)),
        part_hashes=tuple(part.hash for part in parts),
    )
    return Update(header=header, parts=tuple(parts))


def ours(
    model: torch.nn.Module,
    loss: Loss,
    inner: Inner,
    *,
    weights: list[int],
    inner_steps: int,
    outer_steps: int,
    outer_lr: float,
    outer_momentum: float,
    codec: CodecName = "fp32",
) -> Vector:
    """The same run as ``reference.diloco``, and theta at its end. ``model`` stays as it is."""
    state = genesis_state(vector_of(model))
    replicas = [copy.deepcopy(model) for _ in weights]
    inner_optimizers = [inner(replica.parameters()) for replica in replicas]
    for t in range(outer_steps):
        for k, (replica, optimizer) in enumerate(zip(replicas, inner_optimizers)):
            set_vector(replica, state.theta)
            train(replica, loss, optimizer, k, range(t * inner_steps, (t + 1) * inner_steps))
        update = update_from(state, [vector_of(replica) for replica in replicas], weights, codec)
        apply(state, update, Grid(n=len(state.theta), codec=codec), lr=outer_lr, momentum=outer_momentum)
    return state.theta


def test_1_one_replica_without_momentum_is_plain_adamw() -> None:
    theta = ours(network(), loss_of, ADAMW, weights=[7], inner_steps=5, outer_steps=6, outer_lr=1.0, outer_momentum=0.0)
    plain = network()
    train(plain, loss_of, ADAMW(plain.parameters()), 0, range(30))
    np.testing.assert_allclose(theta, vector_of(plain), rtol=1e-6, atol=1e-6)
    assert np.abs(theta - vector_of(network())).max() > 0.1


def test_2_one_inner_step_is_large_batch_sgd() -> None:
    theta = ours(
        network(), loss_of, SGD, weights=[1, 1, 1, 1], inner_steps=1, outer_steps=20, outer_lr=1.0, outer_momentum=0.0
    )

    def loss_of_all(model: torch.nn.Module, _: int, step: int) -> torch.Tensor:
        batches = [batch_of(replica, step) for replica in range(4)]
        x, y = (torch.cat(tensors) for tensors in zip(*batches))
        return torch.nn.functional.mse_loss(model(x), y)

    plain = network()
    train(plain, loss_of_all, SGD(plain.parameters()), 0, range(20))
    assert np.abs(theta - vector_of(plain)).max() < 1e-6
    assert np.abs(theta - vector_of(network())).max() > 0.01


def local_models(weights: list[int], steps: int) -> list[Vector]:
    """Where every replica gets to alone, each from the same start."""
    models = [network() for _ in weights]
    for k, model in enumerate(models):
        train(model, loss_of, ADAMW(model.parameters()), k, range(steps))
    return [vector_of(model) for model in models]


def test_3_outer_lr_1_without_momentum_is_federated_averaging() -> None:
    weights = [100, 300, 50]
    theta = ours(
        network(), loss_of, ADAMW, weights=weights, inner_steps=10, outer_steps=1, outer_lr=1.0, outer_momentum=0.0
    )
    mean = np.average(np.array(local_models(weights, 10), np.float64), axis=0, weights=weights)
    np.testing.assert_allclose(theta, mean, atol=1e-6)
    plain_mean = np.mean(local_models(weights, 10), axis=0)
    assert np.abs(theta - plain_mean).max() > 1e-3


def test_4_one_outer_step_in_all_is_souping() -> None:
    weights = [1, 1, 1]
    theta = ours(
        network(), loss_of, ADAMW, weights=weights, inner_steps=40, outer_steps=1, outer_lr=1.0, outer_momentum=0.0
    )
    np.testing.assert_allclose(theta, np.mean(local_models(weights, 40), axis=0), atol=1e-6)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("lr", "momentum"), [(0.7, 0.9), (1.0, 0.5), (0.7, 0.0)])
def test_5_apply_is_torchs_nesterov_step(codec: CodecName, lr: float, momentum: float) -> None:
    n = 2**18 + 1000
    rng = np.random.default_rng(0)
    state = genesis_state(rng.standard_normal(n).astype(np.float32))
    theta = torch.from_numpy(state.theta.copy()).requires_grad_()
    optimizer = torch.optim.SGD([theta], lr=lr, momentum=momentum, nesterov=momentum > 0)
    for _ in range(5):
        update = update_from(state, [state.theta - rng.standard_normal(n).astype(np.float32) * 0.1], [1], codec)
        slices = part_slices(n)
        gradient = [decode(part.data, i.stop - i.start, codec) for part, i in zip(update.parts, slices)]
        theta.grad = torch.from_numpy(np.concatenate(gradient))
        optimizer.step()
        apply(state, update, Grid(n=len(state.theta), codec=codec), lr=lr, momentum=momentum)
        np.testing.assert_allclose(state.theta, theta.detach().numpy(), rtol=1e-6, atol=1e-6)


# 6 needs a network; without one: K replicas in a loop are the textbook's K replicas, within the codec's rounding.

TEXTBOOK = {"inner_steps": 8, "outer_steps": 5}


@pytest.mark.parametrize("inner", [ADAMW, SGD], ids=["adamw", "sgd"])
@pytest.mark.parametrize(
    ("codec", "tolerance"),
    [("fp32", 1e-6), ("fp16", 4e-4), ("int8", 1e-2), ("int4", 1.5e-1)],
    ids=lambda value: str(value),
)
def test_6_replicas_follow_the_textbook(inner: Inner, codec: CodecName, tolerance: float) -> None:
    weights = [300, 100, 200]
    theta = ours(network(), loss_of, inner, weights=weights, outer_lr=0.7, outer_momentum=0.9, codec=codec, **TEXTBOOK)
    textbook = network()
    diloco(textbook, loss_of, inner, weights=[3.0, 1.0, 2.0], outer_lr=0.7, outer_momentum=0.9, **TEXTBOOK)
    moved = np.abs(vector_of(textbook) - vector_of(network())).max()
    assert moved > 0.1
    assert np.abs(theta - vector_of(textbook)).max() <= tolerance


def test_the_textbook_itself_learns_and_is_adamw_in_the_simplest_case() -> None:
    textbook, plain = network(), network()
    diloco(textbook, loss_of, ADAMW, weights=[1.0], inner_steps=5, outer_steps=6, outer_lr=1.0, outer_momentum=0.0)
    train(plain, loss_of, ADAMW(plain.parameters()), 0, range(30))
    np.testing.assert_allclose(vector_of(textbook), vector_of(plain), atol=1e-6)
    assert loss_of(textbook, 9, 0).item() < 0.8 * loss_of(network(), 9, 0).item()
