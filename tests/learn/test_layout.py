from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from p2p_diloco.learn.layout import bind_parameters, layout_of, write_parameters
from p2p_diloco.learn.model import loss_of
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
