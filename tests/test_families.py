"""Every type of causal language models of the installed transformers, small, as a run would start with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from families import OUTSIZE, SEQ_LEN, TAKEN, VOCAB_SIZE, small
from small_models import vector_of
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from p2p_diloco.errors import UsageError
from p2p_diloco.genesis import make_start
from p2p_diloco.manifest import DataSpec, ModelSpec, RunSpec
from p2p_diloco.model import build_model

TYPES = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}.intersection(CONFIG_MAPPING).difference(OUTSIZE))


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.filterwarnings("ignore")  # of the library, about its own types
def test_a_type_that_could_be_trained_still_can_and_theta_is_the_built_model(model_type: str) -> None:
    model = ModelSpec(config=small(model_type))
    spec = RunSpec(name="small", seed=3, model=model, data=DataSpec(seq_len=SEQ_LEN))
    before = torch.random.get_rng_state()
    try:
        start = make_start(spec, Path(), "run.toml", VOCAB_SIZE)
    except UsageError as error:
        assert model_type not in TAKEN, error
        assert "\n" not in str(error)
    else:
        built = vector_of(build_model(start.config, seed=3))
        assert np.array_equal(start.theta.view(np.uint32), built.view(np.uint32))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_list_is_that_of_many_types() -> None:
    assert len(set(TAKEN)) == 172
    assert len({*TAKEN}.intersection(TYPES)) > 100, "of the installed transformers"
