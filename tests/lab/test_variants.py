from __future__ import annotations

import numpy as np
import pytest
import torch

from p2p_diloco.core.codec import Vector
from p2p_diloco.core.codecs import encode
from p2p_diloco.core.grid import Grid
from p2p_diloco.core.outer import OuterState, genesis_state
from p2p_diloco.core.update import Part, Update, UpdateHeader, contributor_mask
from p2p_diloco.lab.simulated_run import SimulationSpec
from p2p_diloco.lab.variants import OuterRule, prune, quantize, quantized_bytes
from p2p_diloco.learn.parameters import Layout

N = 1000
LAYOUT = Layout(names=("w", "b"), shapes=((2, 4), (4,)), n=12)


def values(seed: int, n: int = N) -> Vector:
    drawn: Vector = np.random.default_rng(seed).standard_normal(n).astype(np.float32)
    return drawn


# -- pruning -----------------------------------------------------------------------------------------------------------


def test_pruning_keeps_the_elected_sign_and_the_largest() -> None:
    """By hand: rows elect +, -, and the vector +; two of four go from each."""
    gradient = np.array([5, -1, 2, -4, -3, 1, -2, -1, 1, 2, 3, 4], np.float32)
    prune(gradient, LAYOUT, 0.5)
    assert gradient.tolist() == [5, 0, 2, 0, -3, 0, -2, 0, 0, 0, 3, 4]


def test_pruning_leaves_that_share() -> None:
    layout = Layout(names=("w",), shapes=((10, 100),), n=N)
    for share in (0.25, 0.5, 0.75):
        gradient = values(1)
        prune(gradient, layout, share)
        assert (gradient.reshape(10, 100) == 0).sum(axis=1).tolist() == [round(100 * share)] * 10
        assert set(gradient[gradient != 0]) <= set(values(1))
    untouched = values(1)
    prune(untouched, layout, 0.0)
    assert np.array_equal(untouched, values(1))


# -- two bits, and one -------------------------------------------------------------------------------------------------


def test_two_bits_are_three_levels_a_block() -> None:
    block = np.array([4, 1.9, 2.1, -4, -1, 0], np.float32)
    assert quantize(block, "int2").tolist() == [4, 0, 4, -4, 0, 0]
    assert quantize(np.zeros(5, np.float32), "int2").tolist() == [0] * 5
    levels = {len(set(np.abs(part)) - {0}) for part in np.split(quantize(values(2, 640), "int2"), 10)}
    assert levels == {1}


def test_one_bit_is_the_sign_times_the_mean_magnitude() -> None:
    block = np.tile(np.array([1, -3], np.float32), 32)
    assert quantize(block, "int1").tolist() == [2, -2] * 32


def test_fewer_bits_take_fewer_bytes_and_err_more() -> None:
    errors = [float(np.abs(quantize(values(3), bits) - values(3)).mean()) for bits in ("int2", "int1")]
    assert all(0 < error < np.abs(values(3)).mean() for error in errors)
    assert (quantized_bytes(64, "int2"), quantized_bytes(64, "int1"), quantized_bytes(65, "int1")) == (20, 12, 17)


# -- outer optimizers --------------------------------------------------------------------------------------------------


def update_of(state: OuterState, gradient: Vector) -> Update:
    part = Part(mask=contributor_mask([0]), data=encode(gradient, "fp32"))
    header = UpdateHeader(step=state.step, parent=state.head, contributors=(("a", 1),), part_hashes=(part.hash,))
    return Update(header=header, parts=(part,))


@pytest.mark.parametrize(
    ("outer", "lr", "momentum"),
    [
        ("nesterov", 0.7, 0.9),
        ("nesterov", 0.5, 0.0),
        ("momentum", 0.7, 0.9),
        ("momentum", 1.0, 0.0),
        ("adam", 0.3, 0.9),
    ],
)
def test_an_outer_rule_is_torchs_optimizer(outer: str, lr: float, momentum: float) -> None:
    """Adam's eps counts for little in torch's, too, beside gradients of about 1."""
    spec = SimulationSpec.model_validate({"outer": outer})
    parameter = torch.nn.Parameter(torch.from_numpy(values(0)))
    optimizer: torch.optim.Optimizer
    if outer == "adam":
        betas = (momentum, spec.adam_beta2)
        optimizer = torch.optim.Adam([parameter], lr=lr, betas=betas, eps=spec.adam_eps)
    else:
        nesterov = outer == "nesterov" and momentum > 0
        optimizer = torch.optim.SGD([parameter], lr=lr, momentum=momentum, nesterov=nesterov)
    state = genesis_state(values(0))
    rule = OuterRule(spec=spec, grid=Grid(n=N, codec="fp32"), lr=lr, momentum=momentum, second=np.zeros(N, np.float32))
    for step in range(5):
        gradient = values(10 + step)
        update = update_of(state, gradient)
        rule.step(state, update)
        assert (state.step, state.head) == (step + 1, update.header.head)
        parameter.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
    np.testing.assert_allclose(state.theta, parameter.detach().numpy(), rtol=0, atol=2e-6)


def test_an_update_that_does_not_follow_changes_nothing() -> None:
    spec = SimulationSpec(outer="adam")
    state = genesis_state(values(0))
    stale = update_of(state, values(1))
    rule = OuterRule(spec=spec, grid=Grid(n=N, codec="fp32"), lr=0.3, momentum=0.9, second=np.zeros(N, np.float32))
    rule.step(state, stale)
    before = state.theta.copy()
    with pytest.raises(ValueError, match="does not follow"):
        rule.step(state, stale)
    assert np.array_equal(state.theta, before)
