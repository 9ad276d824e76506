from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from p2p_diloco.core.errors import UsageError
from p2p_diloco.core.manifest import canonical_json
from p2p_diloco.core.runfile import ModelSpec
from p2p_diloco.learn.architecture import config_class_of, instantiate, portable, resolve_config
from p2p_diloco.learn.model import build_model, context_tokens
from p2p_diloco.learn.parameters import layout_of
from tests.support.small_models import LLAMA, llama, random_batch, resolved


def test_every_default_is_written_out_and_nothing_of_this_machine() -> None:
    config = resolved(rope_theta=5000.0)
    assert config["num_key_value_heads"] == 2
    assert config["rope_parameters"]["rope_theta"] == 5000.0
    assert config["vocab_size"] == 256
    assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [None, None, None]
    assert not {"transformers_version", "_name_or_path", "dtype", "architectures"} & set(config)
    again = json.loads(canonical_json(config))
    assert layout_of(build_model(again, seed=0)) == layout_of(llama())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hiden_size": 8}, "unknown key 'model.config.hiden_size'; did you mean 'hidden_size'?"),
        ({"zzz": 8}, "unknown key 'model.config.zzz'; llama has no such setting"),
        (
            {"model_type": "lama"},
            "'model.config.model_type': transformers has no language model 'lama'; did you mean 'llama'",
        ),
        ({"model_type": "vit"}, "transformers has no language model 'vit'"),
        ({"hidden_size": "x"}, "model.config: TypeError: Field 'hidden_size' expected int, got str"),
        ({"hidden_size": 17}, "model.config: ValueError: The hidden size (17) is not a multiple"),
        ({"vocab_size": 255}, "key 'model.config.vocab_size': 255 is less than the tokenizer's 256"),
        (
            {"model_type": "bert", "is_decoder": False},
            "key 'model.config.is_decoder': false; this model would see the tokens that it is to predict",
        ),
    ],
)
def test_a_mistake_in_the_config_names_the_key(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolved(**changed)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changed",
    [
        {"num_labels": 10**9},
        {"model_type": "gpt_neo", "attention_types": [[["global"], 10**9]]},
        {"model_type": "gemma3", "text_config": {"num_hidden_layers": 10**9}},
        {"model_type": "cohere2_moe", "first_k_dense_replace": 10**9},
    ],
)
def test_a_config_takes_no_memory_for_what_it_counts(changed: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="is 1000000000, and may be 10000 at most"):
        build_model(resolved() | changed, seed=None)


def test_every_config_of_the_library_is_taken_as_it_is_and_written_out() -> None:
    taken = 0
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        config_class = config_class_of({"model_type": model_type}, "test")
        try:
            config_class()
        except Exception:  # some have no defaults
            continue
        config = instantiate(config_class, {"model_type": model_type}, "test")
        written = portable(json.loads(config.to_json_string(use_diff=False)))
        instantiate(config_class, {"model_type": model_type} | written, "test")
        taken += 1
    assert taken > 100


def test_a_larger_vocabulary_and_older_names_are_fine() -> None:
    assert resolved(vocab_size=300)["vocab_size"] == 300
    spec = ModelSpec(config={"model_type": "gpt2", "hidden_size": 16, "n_layer": 1, "n_head": 2})
    config = resolve_config(spec, base=Path(), vocab_size=256)
    assert config["n_embd"] == 16
    assert context_tokens(build_model(config, seed=None)) == 1024


def test_infinite_values_survive_canonical_json() -> None:
    sizes = {"hidden_size": 16, "num_heads": 4, "head_dim": 8, "state_size": 4, "num_hidden_layers": 1, "n_groups": 1}
    config = resolve_config(ModelSpec(config={"model_type": "mamba2", **sizes}), base=Path(), vocab_size=256)
    limit = config["time_step_limit"]
    assert isinstance(limit, list)
    assert {"__float__": "Infinity"} in limit
    model = build_model(json.loads(canonical_json(config)), seed=None)
    assert list(model.config.time_step_limit) == [0.0, math.inf]  # type: ignore[union-attr,arg-type]
    assert context_tokens(model) is None


def test_a_model_type_that_can_look_ahead_is_made_a_decoder() -> None:
    config = resolve_config(ModelSpec(config=LLAMA | {"model_type": "bert"}), base=Path(), vocab_size=256)
    model = build_model(config, seed=0).eval()
    tokens = torch.from_numpy(random_batch())
    changed = tokens.clone()
    changed[:, -1] = 0
    with torch.no_grad():
        before, after = (model(input_ids=ids).logits[:, :-1] for ids in (tokens, changed))
    assert torch.equal(before, after)
