"""Every type of causal language models of the installed transformers, small, as a run would start with it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from p2p_diloco.core.errors import UsageError
from p2p_diloco.core.runfile import DataSpec, ModelSpec, RunSpec
from p2p_diloco.learn.architecture import resolve_config
from p2p_diloco.learn.genesis import Start, make_config, make_start
from p2p_diloco.learn.model import build_model
from tests.support.families import SEQ_LEN, TAKEN, VOCAB_SIZE, small
from tests.support.small_models import vector_of

TYPES = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}.intersection(CONFIG_MAPPING)
MANY_VALUES = 30_000_000

pytestmark = pytest.mark.filterwarnings("ignore")  # of the library, about its own types


def start_of(model_type: str) -> Start:
    spec = RunSpec(name="small", seed=3, model=ModelSpec(config=small(model_type)), data=DataSpec(seq_len=SEQ_LEN))
    config = make_config(spec, Path(), "run.toml", VOCAB_SIZE)
    return make_start(spec, config, Path(), "run.toml", VOCAB_SIZE)


@pytest.mark.parametrize("model_type", sorted(TYPES.intersection(TAKEN)))
def test_a_type_that_could_be_trained_still_can_and_theta_is_the_built_model(model_type: str) -> None:
    before = torch.random.get_rng_state()
    start = start_of(model_type)
    assert torch.equal(torch.random.get_rng_state(), before)
    built = vector_of(build_model(start.config, seed=3))
    assert np.array_equal(start.theta.view(np.uint32), built.view(np.uint32))
    assert np.isfinite(start.rehearsal.loss)


@pytest.mark.parametrize("model_type", sorted(TYPES.difference(TAKEN)))
def test_no_other_type_ends_in_a_traceback(model_type: str) -> None:
    with suppress(UsageError):
        config = resolve_config(ModelSpec(config=small(model_type)), base=Path(), vocab_size=VOCAB_SIZE)
        with torch.device("meta"):
            outline = build_model(config, seed=None)
        if sum(parameter.numel() for parameter in outline.parameters()) > MANY_VALUES:
            pytest.skip("nothing in the table makes it small")
        start_of(model_type)


def test_the_list_is_that_of_many_types() -> None:
    assert len(set(TAKEN)) == 172
    assert len(TYPES.intersection(TAKEN)) > 100, "of the installed transformers"
