from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from p2p_diloco.core.errors import UsageError
from p2p_diloco.core.runfile import ModelSpec
from p2p_diloco.learn.architecture import resolve_config
from p2p_diloco.learn.model import (
    build_model,
    check_causal,
    check_untrained,
    evaluate,
    load_pretrained,
    loss_of,
    losses_of,
    model_of,
    pick_device,
)
from p2p_diloco.learn.parameters import layout_of, write_parameters
from tests.support.families import small
from tests.support.small_models import LLAMA, llama, manifest_of, random_batch, resolved, vector_of

SMALL_BERT = {**LLAMA, "model_type": "bert", "vocab_size": 256, "pad_token_id": 0}
XLNET = {"model_type": "xlnet", "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 32, "vocab_size": 256}
MIXTRAL = {"model_type": "mixtral", "num_local_experts": 4, "num_key_value_heads": 2, "vocab_size": 256}


@pytest.mark.parametrize("config", [SMALL_BERT, XLNET])
def test_a_model_that_looks_ahead_is_refused(config: dict[str, Any]) -> None:
    model = build_model(config, seed=0)
    with pytest.raises(UsageError, match=r"would see the tokens that it is to predict; give a decoder"):
        check_causal(model, vocab_size=256, seq_len=16)
    assert model.training


@pytest.mark.parametrize("config", [{"vocab_size": 256}, MIXTRAL, {"model_type": "gpt_neox", "vocab_size": 256}])
def test_a_model_that_does_not_look_ahead_is_taken(config: dict[str, Any]) -> None:
    for vocab_size in (256, 1):
        check_causal(build_model(LLAMA | config, seed=0), vocab_size=vocab_size, seq_len=8)


class Shy(torch.nn.Module):
    """Reads nothing shorter than 16 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        if input_ids.shape[1] < 16:
            raise RuntimeError("too short\nby far")
        return SimpleNamespace(logits=self.weight * input_ids[..., None])


def test_a_model_is_asked_with_as_many_tokens_as_it_needs() -> None:
    check_causal(Shy(), vocab_size=256, seq_len=16)
    with pytest.raises(UsageError, match=r"cannot read 15 tokens: too short$"):
        check_causal(Shy(), vocab_size=256, seq_len=15)


def test_what_peers_could_not_get_is_refused() -> None:
    """A router's correction, as of DeepSeek-V3: a buffer that is kept with the weights."""
    sizes = {"moe_intermediate_size": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
    sizes |= {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    config = resolved(model_type="deepseek_v3", n_group=2, topk_group=1, tie_word_embeddings=True, **sizes)
    model = build_model(config, seed=5)
    check_untrained(model, config)
    model.get_buffer("model.layers.1.mlp.gate.e_score_correction_bias")[0] = 0.5
    with pytest.raises(UsageError, match=r"^model\.layers\.1\.mlp\.gate\.e_score_correction_bias of this model is not"):
        check_untrained(model, config)
    frozen = llama(seed=5)
    frozen.get_parameter("model.norm.weight").requires_grad_(False)[3] = 2.0
    with pytest.raises(UsageError, match=r"^model\.norm\.weight of this model is not trained"):
        check_untrained(frozen, resolved())


def test_a_manifests_model_is_counted_before_memory_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = manifest_of(resolved(), layout_of(llama()))
    assert layout_of(model_of(honest)) == layout_of(llama())
    devices = []

    def built(*arguments: Any, **options: Any) -> torch.nn.Module:
        devices.append(torch.get_default_device().type)
        return build_model(*arguments, **options)

    monkeypatch.setattr("p2p_diloco.learn.model.build_model", built)
    huge = resolved(vocab_size=10**12)
    other = resolved(num_hidden_layers=3)
    for config in (huge, other):
        with pytest.raises(UsageError, match="with other parameters than the run's; install the version"):
            model_of(manifest_of(config, layout_of(llama())))
    assert devices == ["meta", "meta"]


def test_a_strangers_model_is_not_built_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = layout_of(llama())
    with pytest.raises(UsageError, match=r"num_hidden_layers is 1000000000, and may be 10000 at most"):
        model_of(manifest_of(resolved() | {"num_hidden_layers": 10**9}, layout))
    layers = resolved(num_hidden_layers=20)
    monkeypatch.setattr("p2p_diloco.learn.model.MAX_MODULES", 100)
    with pytest.raises(UsageError, match="this model has more than 100 layers and parts of them"):
        model_of(manifest_of(layers, layout))
    for _ in range(10):  # each model is counted by itself
        assert layout_of(model_of(manifest_of(resolved(), layout))) == layout


def test_a_manifests_buffers_are_counted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2p_diloco.learn.model.UNTRAINED_VALUES", 10)
    sizes = {"model_type": "ctrl", "n_embd": 16, "n_layer": 1, "n_head": 2, "dff": 16, "vocab_size": 256}
    config = resolve_config(ModelSpec(config={**sizes, "n_positions": 2000}), base=Path(), vocab_size=256)
    with pytest.raises(UsageError, match=r"values that are trained and .* that are not"):
        model_of(manifest_of(config, layout_of(build_model(config, seed=None))))


def test_a_strangers_config_names_no_code_and_no_kernel() -> None:
    hostile = {
        "auto_map": {"AutoModelForCausalLM": "somebody/else--modeling.Evil"},
        "_attn_implementation": "somebody/kernels",
        "attn_implementation": "somebody/kernels",
        "_name_or_path": "somebody/else",
        "dtype": "float16",
    }
    model = build_model(resolved() | hostile, seed=0)
    assert np.array_equal(vector_of(model), vector_of(llama()))
    assert type(model).__module__ == "transformers.models.llama.modeling_llama"
    with pytest.raises(UsageError, match="cannot build this llama model: unknown 'nonsense'"):
        build_model(resolved() | {"hidden_act": "nonsense"}, seed=0)
    with pytest.raises(UsageError, match="no language model None"):
        build_model({}, seed=0)


def test_a_config_that_the_library_cannot_compute_with_is_a_usage_error() -> None:
    config = {"model_type": "rwkv", "hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 256, "context_length": 16}
    with pytest.raises(UsageError, match=r"^transformers cannot build this rwkv model: .*division by zero"):
        build_model(config, seed=0)


def test_the_seed_makes_the_weights_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first = vector_of(llama(seed=5))
    assert torch.equal(torch.rand(3), expected)
    assert np.array_equal(first, vector_of(llama(seed=5)))
    assert not np.array_equal(first, vector_of(llama(seed=6)))
    assert first.std() > 0.01


def test_the_loss_is_nats_per_next_token() -> None:
    model, batch = llama().eval(), torch.from_numpy(random_batch())
    logits = model(input_ids=batch[:, :-1]).logits.double().log_softmax(-1)
    expected = -sum(logits[i, j, batch[i, j + 1]] for i in range(3) for j in range(12)) / 36
    assert math.isclose(loss_of(model, batch).item(), expected.item(), rel_tol=1e-6)
    write_parameters(model, np.zeros(layout_of(model).n, np.float32))
    assert math.isclose(loss_of(model, batch).item(), math.log(256), rel_tol=1e-6)


@pytest.mark.parametrize(
    ("model_type", "changed"),
    [
        ("mixtral", {"output_router_logits": True, "router_aux_loss_coef": 100.0}),
        ("qwen3_moe", {"output_router_logits": True, "router_aux_loss_coef": 10.0}),
        ("granitemoe", {"output_router_logits": True, "router_aux_loss_coef": 10.0}),
        ("jetmoe", {"output_router_logits": True, "aux_loss_coef": 10.0}),
        ("bamba", {"z_loss_coefficient": 0.5}),
    ],
)
def test_the_trained_loss_has_what_transformers_adds_and_the_reported_one_has_not(
    model_type: str, changed: dict[str, Any]
) -> None:
    config = resolve_config(ModelSpec(config=small(model_type) | changed), base=Path(), vocab_size=256)
    model, batch = build_model(config, seed=0), torch.from_numpy(random_batch())
    inputs, targets = batch[:, :-1], batch[:, 1:].contiguous()
    theirs = model(input_ids=inputs, labels=targets, shift_labels=targets, use_cache=False)
    found = losses_of(model, batch)
    plain = torch.nn.functional.cross_entropy(theirs.logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(found.trained, theirs.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.cross_entropy, plain, rtol=1e-6, atol=0)
    assert found.trained - found.cross_entropy > 1
    assert evaluate(model, [random_batch()]) == pytest.approx(plain.item(), rel=1e-6)


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "bamba", "deepseek_v3"])
def test_most_models_are_trained_with_the_cross_entropy_itself(model_type: str) -> None:
    config = resolve_config(ModelSpec(config=small(model_type)), base=Path(), vocab_size=256)
    found = losses_of(build_model(config, seed=0), torch.from_numpy(random_batch()))
    assert found.trained is found.cross_entropy


def test_evaluation_is_a_mean_over_tokens_without_dropout() -> None:
    model = llama(attention_dropout=0.5)
    large, small = random_batch(rows=5, seed=1), random_batch(rows=1, seed=2)
    together = evaluate(model, [np.concatenate([large, small])])
    assert math.isclose(evaluate(model, [large, small]), together, rel_tol=1e-6)
    assert evaluate(model, [large]) == evaluate(model, iter([large]))
    assert model.training
    model.eval()
    evaluate(model, [small])
    assert not model.training
    with pytest.raises(ValueError, match="no batch"):
        evaluate(model, [])


def test_a_folder_gives_its_config_and_its_weights(tmp_path: Path) -> None:
    model: Any = llama(seed=3, eos_token_id=7)
    model.save_pretrained(tmp_path / "start")
    spec = ModelSpec(path="start")
    config = resolve_config(spec, base=tmp_path, vocab_size=200)
    assert (config["vocab_size"], config["eos_token_id"]) == (256, 7)
    assert layout_of(build_model(config, seed=None)) == layout_of(model)
    loaded = load_pretrained(tmp_path / "start")
    assert loaded.training
    assert np.array_equal(vector_of(loaded), vector_of(model))
    with pytest.raises(UsageError, match="256 is less than the tokenizer's 300"):
        resolve_config(spec, base=tmp_path, vocab_size=300)


def test_a_folders_weights_need_no_kernel_that_its_config_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = llama(seed=3)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    wish = {"attn_implementation": "flash_attention_2", "_attn_implementation": "flash_attention_2"}
    (tmp_path / "config.json").write_text(json.dumps(config | wish))
    assert np.array_equal(vector_of(load_pretrained(tmp_path)), vector_of(model))

    def broken(*_: object, **__: object) -> None:
        raise ImportError("first\nlast")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", broken)
    with pytest.raises(UsageError, match="cannot load this folder: last"):
        load_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="no weights here"):
        load_pretrained(tmp_path)


def test_a_bad_folder_is_a_usage_error(tmp_path: Path) -> None:
    model: Any = llama()
    model.save_pretrained(tmp_path / "start")
    config = json.loads((tmp_path / "start/config.json").read_text())
    (tmp_path / "start/config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(UsageError, match=r"layers\.2\..* is missing or has another shape"):
        load_pretrained(tmp_path / "start")
    (tmp_path / "start/model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UsageError, match="transformers cannot load this folder"):
        load_pretrained(tmp_path / "start")
    with pytest.raises(UsageError, match="no such folder"):
        load_pretrained(tmp_path / "nowhere")
    for name, text, message in (
        ("a", None, "no such file"),
        ("b", "{", "not JSON"),
        ("c", "[]", "not a transformers config"),
        ("e", "[" * 100_000, "not JSON"),
        ("d", json.dumps(config | {"quantization_config": {"bits": 4}}), "the weights are quantized"),
    ):
        (tmp_path / name).mkdir()
        if text is not None:
            (tmp_path / name / "config.json").write_text(text)
        with pytest.raises(UsageError, match=message):
            resolve_config(ModelSpec(path=name), base=tmp_path, vocab_size=256)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    picked = [str(pick_device(name)) for name in ("auto", "cuda", "cuda:1", "cpu")]
    assert picked == ["cuda:0", "cuda:0", "cuda:1", "cpu"]
    with pytest.raises(UsageError, match=r"'cuda:2' is not available on this machine; it has: cpu, cuda:0, cuda:1"):
        pick_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(UsageError, match="'cuda' is not available on this machine; it has: cpu"):
        pick_device("cuda")
