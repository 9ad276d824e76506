from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from p2p_diloco.core.errors import UsageError
from p2p_diloco.core.runfile import ModelSpec
from p2p_diloco.learn.architecture import resolve_config
from p2p_diloco.learn.model import build_model
from tests.support.families import small


def resolved(model_type: str, **changed: Any) -> dict[str, Any]:
    return resolve_config(ModelSpec(config=small(model_type) | changed), base=Path(), vocab_size=256)


def shape_of(config: dict[str, Any], name: str) -> tuple[int, ...]:
    return tuple(build_model(config, seed=None).get_parameter(name).shape)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "olmoe", "granite", "phi"])
def test_what_the_models_code_looks_for_is_a_key_and_peers_get_it(model_type: str) -> None:
    """These have no field head_dim, and read it."""
    assert "head_dim" not in small(model_type)
    config = resolved(model_type, head_dim=24)
    assert config["head_dim"] == 24
    assert shape_of(config, "model.layers.0.self_attn.q_proj.weight") == (48, 32)


@pytest.mark.parametrize(
    ("model_type", "key", "field", "value"),
    [
        ("bloom", "n_embed", "hidden_size", 48),
        ("lfm2", "block_ff_dim", "intermediate_size", 96),
        ("qwen3_moe", "num_local_experts", "num_experts", 6),
    ],
)
def test_another_name_of_a_field_is_a_key(model_type: str, key: str, field: str, value: int) -> None:
    given = {name: entry for name, entry in small(model_type).items() if name != field}
    config = resolve_config(ModelSpec(config=given | {key: value}), base=Path(), vocab_size=256)
    assert value in (config.get(field), config.get(key))
    build_model(config, seed=None)


def test_a_key_in_a_table_of_the_config_is_one_of_that_table() -> None:
    text = small("gemma3")["text_config"]
    config = resolved("gemma3", text_config=text | {"sliding_window_pattern": 2})
    assert config["text_config"]["layer_types"] == ["sliding_attention", "full_attention"]


@pytest.mark.parametrize(
    ("model_type", "changed", "message"),
    [
        ("qwen3_moe", {"head_dmi": 32}, "unknown key 'model.config.head_dmi'; did you mean 'head_dim'?"),
        (
            "mixtral",
            {"num_experts_per_token": 2},
            "'model.config.num_experts_per_token'; did you mean 'num_experts_per",
        ),
        ("llama", {"sliding_window": 8}, "unknown key 'model.config.sliding_window'; llama has no such setting"),
        ("llama", {"rescale_every": 6}, "unknown key 'model.config.rescale_every'; llama has no such setting"),
        ("gpt2", {"num_labels": 3}, "unknown key 'model.config.num_labels'; "),
        ("gpt2", {"pop": 3}, "unknown key 'model.config.pop'; "),
        ("gemma3", {"hidden_size": 32}, "unknown key 'model.config.hidden_size'; "),
        (
            "gemma3",
            {"text_config": {"hiden_size": 32}},
            "unknown key 'model.config.text_config.hiden_size'; did you mean 'hidden_size'?",
        ),
        (
            "qwen3_5",
            {"vision_config": {"zzz": 1}},
            "unknown key 'model.config.vision_config.zzz'; qwen3_5_vision has no such setting",
        ),
        (
            "rwkv",
            {"rescale_every": 6},
            "key 'model.config.rescale_every': 6, and a run has 0 alone: with others an eval",
        ),
    ],
)
def test_a_key_that_nothing_reads_is_refused(model_type: str, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolved(model_type, **changed)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rwkv_is_never_rescaled() -> None:
    config = resolved("rwkv", rescale_every=0)
    assert config == resolved("rwkv")
    assert config["rescale_every"] == 0
    older: Any = build_model(config | {"rescale_every": 6}, seed=None)  # of a run that was started before
    assert older.config.rescale_every == 0
