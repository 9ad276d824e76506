from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from p2p_diloco.core.codec import Vector
from p2p_diloco.learn.model import loss_of
from p2p_diloco.learn.parameters import (
    Bound,
    Copied,
    Parameters,
    bind_parameters,
    layout_of,
    parameters_of,
    read_parameters,
    tie,
    write_parameters,
)
from tests.support.small_models import llama, random_batch, vector_of


def test_the_layout_has_tied_parameters_once() -> None:
    tied, untied = layout_of(llama(tie_word_embeddings=True)), layout_of(llama(tie_word_embeddings=False))
    assert untied.n - tied.n == 256 * 16
    assert set(untied.names) - set(tied.names) == {"lm_head.weight"}
    assert tied.n == sum(math.prod(shape) for shape in tied.shapes)
    assert tied.digest != untied.digest
    assert len(tied.digest) == 64
    assert tied.digest == layout_of(llama(seed=9, tie_word_embeddings=True)).digest
    assert layout_of(llama(intermediate_size=64)).names == untied.names
    assert layout_of(llama(intermediate_size=64)).digest != untied.digest


def test_frozen_parameters_are_not_in_the_vector() -> None:
    model = llama()
    n = layout_of(model).n
    next(model.parameters()).requires_grad_(False)
    assert layout_of(model).n == n - 256 * 16


def test_read_and_write_are_inverse() -> None:
    vector = vector_of(llama(seed=1, tie_word_embeddings=True))
    vector.flags.writeable = False
    other = llama(seed=2, tie_word_embeddings=True)
    assert not np.array_equal(vector_of(other), vector)
    write_parameters(other, vector)
    assert np.array_equal(vector_of(other), vector)
    assert other.get_parameter("lm_head.weight") is other.get_parameter("model.embed_tokens.weight")
    broken_vectors: list[Any] = [vector[:-1], vector.astype(np.float64)]
    for broken in broken_vectors:
        with pytest.raises(ValueError, match=f"the model has {len(vector)} values"):
            write_parameters(other, broken)


def test_a_bound_model_trains_in_the_vector_itself() -> None:
    model, free = llama(seed=1, tie_word_embeddings=True), llama(seed=1, tie_word_embeddings=True)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, free)]
    vector = vector_of(model)
    bind_parameters(model, vector)
    for step in range(2):
        for m, optimizer in zip((model, free), optimizers):
            optimizer.zero_grad()
            loss_of(m, torch.from_numpy(random_batch(seed=step))).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    assert np.array_equal(vector, vector_of(free))
    assert not np.array_equal(vector, vector_of(llama(seed=1, tie_word_embeddings=True)))
    vector[:] = 0
    assert all(not parameter.any() for parameter in model.parameters())
    with pytest.raises(ValueError, match="only float32 on the CPU"):
        bind_parameters(free.half(), vector)


# -- a trainer's model: bound to its vector, as on a CPU, or copied, as on an accelerator ------------------------------


def placed(kind: type[Bound] | type[Copied], seed: int) -> tuple[torch.nn.Module, Parameters, Vector]:
    """A model of theta of seed 0 that was another one, its parameters, and its local."""
    model, local = llama(seed), vector_of(llama(0))
    if kind is Bound:
        return model, tie(model, local), local
    parameters = Copied(model)
    parameters.write(local)
    return model, parameters, local


@pytest.mark.parametrize("kind", [Bound, Copied])
def test_what_is_written_is_what_the_model_has_and_what_is_read(kind: type[Bound] | type[Copied]) -> None:
    model, parameters, local = placed(kind, seed=1)
    assert np.array_equal(vector_of(model), vector_of(llama(0)))
    theta = vector_of(llama(2))
    theta.flags.writeable = False
    parameters.write(theta)
    assert np.array_equal(vector_of(model), theta)
    for out in (local, np.zeros_like(local)):
        parameters.read(out)
        assert np.array_equal(out, theta)
    local[:] = 0.5
    parameters.write(local)
    assert np.array_equal(vector_of(model), local)
    parameters.read(local)
    assert (local == 0.5).all()


@pytest.mark.parametrize("kind", [Bound, Copied])
@pytest.mark.parametrize("fails", [False, True])
def test_theta_is_shown_for_a_while(kind: type[Bound] | type[Copied], fails: bool) -> None:
    model, parameters, _ = placed(kind, seed=1)
    theta = vector_of(llama(2))
    theta.flags.writeable = False

    def look() -> None:
        with parameters.showing(theta):
            assert np.array_equal(vector_of(model), theta)
            if fails:
                raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            look()
    else:
        look()
    assert np.array_equal(vector_of(model), vector_of(llama(0)))
    assert np.array_equal(theta, vector_of(llama(2)))


def test_bound_and_copied_learn_the_same_bits() -> None:
    """Through inner steps, a look at theta between them, an offer, and a theta that is taken."""
    learned = []
    for kind in (Bound, Copied):
        model, parameters, local = placed(kind, seed=1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        offered = []
        for step in range(4):
            optimizer.zero_grad()
            loss_of(model, torch.from_numpy(random_batch(seed=step))).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            with parameters.showing(vector_of(llama(3))):
                pass
            if step % 2:
                parameters.read(local)
                offered.append(local.tobytes())
                local *= np.float32(0.5)
                parameters.write(local)
        learned.append([*offered, vector_of(model).tobytes()])
    assert learned[0] == learned[1]
    assert len(set(learned[0])) == 3


def test_whose_parameters_lie_in_local_is_seen() -> None:
    model, local = llama(1), vector_of(llama(0))
    assert isinstance(parameters_of(model, local), Copied)
    assert isinstance(tie(model, local), Bound)
    assert isinstance(parameters_of(model, local), Bound)
    assert isinstance(parameters_of(torch.nn.Sequential(model), local), Bound), "a wrapper has the same parameters"
    assert isinstance(parameters_of(model, local.copy()), Copied)
    assert isinstance(parameters_of(llama(0), local), Copied)


def test_the_layout_tells_parameters_of_one_shape_apart() -> None:
    a, b = (torch.nn.ModuleDict({name: torch.nn.Linear(2, 2)}) for name in ("a", "b"))
    assert layout_of(a).shapes == layout_of(b).shapes
    assert layout_of(a).digest != layout_of(b).digest


@pytest.mark.parametrize(
    "change",
    [lambda out: out[:-1], lambda out: np.append(out, out[:1]), lambda out: out.astype(np.float64)],
    ids=["short", "long", "float64"],
)
def test_what_is_read_into_has_to_fit(change: Callable[[Vector], Vector]) -> None:
    with pytest.raises(ValueError, match="the model has"):
        read_parameters(llama(), change(vector_of(llama())))
