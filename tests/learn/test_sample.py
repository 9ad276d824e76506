from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from p2p_diloco.core.errors import UsageError
from p2p_diloco.core.runfile import ModelSpec
from p2p_diloco.learn.architecture import resolve_config
from p2p_diloco.learn.export import INFO_FILE, export_model
from p2p_diloco.learn.model import build_model
from p2p_diloco.learn.parameters import layout_of, read_parameters
from p2p_diloco.learn.sample import choose, expectation, generate, in_margin, load_export, presented
from p2p_diloco.learn.tokenizer import ByteTokenizer
from tests.support import small_models
from tests.support.small_models import manifest_of, resolved

LLAMA = small_models.LLAMA | {"max_position_embeddings": 16}
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
RWKV = {"model_type": "rwkv", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "context_length": 64}
MAMBA = {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}


class Script(torch.nn.Module):
    """Says the bytes it was given, whatever it reads; a vocabulary of 300 with a favourite that no tokenizer has."""

    def __init__(self, text: bytes) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.text = list(text)
        self.config = SimpleNamespace(max_position_embeddings=None)
        self.read: list[list[int]] = []

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        self.read.append(input_ids[0].tolist())
        logits = torch.zeros(1, input_ids.shape[1], 300)
        logits[0, -1, self.text.pop(0)] = 50.0
        logits[0, -1, 299] = 100.0
        return SimpleNamespace(logits=logits)


def model_of(config: dict[str, Any]) -> torch.nn.Module:
    return build_model(resolve_config(ModelSpec(config=config), base=Path(), vocab_size=256), seed=3).eval()


def pieces(model: torch.nn.Module, prompt: str = "abc", **changed: Any) -> list[str]:
    options: dict[str, Any] = {"max_tokens": 12, "temperature": 1.0, "top_k": None, "seed": 0} | changed
    return list(generate(model, ByteTokenizer(), prompt, **options))


def test_characters_come_whole_and_as_soon_as_they_are_complete() -> None:
    text = "aü€\U0001f600b"
    model = Script(text.encode())
    assert [piece for piece in pieces(model, max_tokens=11) if piece] == ["a", "ü", "€", "\U0001f600", "b"]
    assert model.read[:3] == [list(b"abc"), list(b"abca"), list(b"abca\xc3")]


def test_broken_utf8_is_replaced_and_a_rest_is_not_lost() -> None:
    assert "".join(pieces(Script(b"a\xffb\xe2\x82"), max_tokens=5)) == "a\ufffdb\ufffd"


def test_the_end_of_a_document_ends_the_text() -> None:
    assert "".join(pieces(Script(b"one\0two"), max_tokens=7)) == "one"


def test_an_empty_prompt_begins_a_document() -> None:
    model = Script(b"x")
    assert "".join(pieces(model, "", max_tokens=1)) == "x"
    assert model.read == [[0]]


def test_the_seed_decides() -> None:
    model = model_of(LLAMA)
    assert pieces(model) == pieces(model)
    assert pieces(model) != pieces(model, seed=1)
    assert pieces(model, temperature=0) == pieces(model, top_k=1, seed=1)


@pytest.mark.parametrize("config", [LLAMA, GPT2, RWKV, MAMBA], ids=lambda config: config["model_type"])
def test_what_a_model_remembers_changes_nothing_and_saves_reading_it_again(config: dict[str, Any]) -> None:
    model = model_of(config)
    lengths: list[int] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    said = "".join(pieces(model, temperature=0))
    assert lengths == [3, *(len(lengths) - 1) * [1]]
    tokens = list(b"abc")
    for _ in range(12):
        with torch.no_grad():
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    assert 0 not in tokens
    assert said == bytes(tokens[3:]).decode("utf-8", "replace")


@pytest.mark.parametrize("prompt", ["abc", "a prompt that is longer than the context of the model"])
def test_text_goes_on_beyond_the_context(prompt: str) -> None:
    model = model_of(GPT2)
    lengths = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    pieces(model, prompt, max_tokens=40, seed=2)
    assert len(lengths) == 40
    assert max(lengths) <= 16
    assert lengths.count(1) > 30


def test_top_k_and_temperature() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0])
    generator = torch.Generator().manual_seed(0)

    def share(token: int, temperature: float, top_k: int | None) -> float:
        return sum(choose(logits, temperature, top_k, generator) == token for _ in range(1000)) / 1000

    assert share(3, 0, None) == 1
    assert share(0, 5.0, 2) == share(1, 5.0, 2) == 0
    assert abs(share(2, 1.0, 2) - 0.269) < 0.05
    assert share(3, 0.2, None) > 0.98
    assert abs(share(0, 100.0, 99) - 0.25) < 0.05


def test_any_temperature_above_0_divides() -> None:
    logits = torch.tensor([0.0, 90.0, 91.0, -torch.inf])
    generator = torch.Generator().manual_seed(0)
    for temperature in (1e-45, 5e-324, 1e-10):
        assert choose(logits, temperature, None, generator) == choose(logits, temperature, 2, generator) == 2


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_model_that_has_diverged_says_so(temperature: float, broken: float) -> None:
    with pytest.raises(UsageError, match="training has diverged"):
        choose(torch.tensor([0.0, broken, 1.0]), temperature, None, torch.Generator())


def test_an_export_speaks_and_nothing_else_does(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = resolved(max_position_embeddings=16)
    model = build_model(config, seed=3).eval()
    layout = layout_of(model)
    manifest = manifest_of(config, layout)
    theta = np.empty(layout.n, np.float32)
    read_parameters(model, theta)
    export_model(manifest, theta, tmp_path / "model", step=5, head=b"")

    loaded, tokenizer, info = load_export(tmp_path / "model")
    assert (info.step, tokenizer.vocab_size, loaded.training) == (5, 256, False)
    assert pieces(loaded) == pieces(model)
    assert capfd.readouterr() == ("", "")

    (tmp_path / "model/model.safetensors").unlink()
    with pytest.raises(UsageError, match="no weights here"):
        load_export(tmp_path / "model")
    (tmp_path / "model" / INFO_FILE).unlink()
    with pytest.raises(UsageError, match="no exported model here"):
        load_export(tmp_path / "model")


# -- for people --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_margin_marks_every_line_and_long_gaps_are_told(size: int) -> None:
    """In whatever pieces the text comes."""
    text = (
        "  one\n    two\n\n \n\n    three"
        + 30 * " "
        + "four"
        + 24 * " "
        + "five\n"
        + 70 * " "
        + "six"
        + 50 * " "
        + "\n\n"
    )
    shown = "".join(in_margin([text[i : i + size] for i in range(0, len(text), size)], "> "))
    assert shown.split("\n") == [
        *(">   one", ">     two", "> ", ">     three[30 spaces]four" + 24 * " " + "five", "> [70 spaces]six"),
    ]
    assert "".join(in_margin([], "> ")) == "> "


def test_a_prompt_and_what_follows_are_told_apart() -> None:
    assert "".join(presented("def f():\n", ["    re", "turn 1\n"], 842_000)) == (
        "held-out text, which no peer has trained on:\n\n  | def f():\n\nhow the model goes on:\n\n  >     return 1\n\n"
        "What to expect: a model of 0.842 million parameters learns the look of its text, such as words, brackets and "
        "indentation, but no sense. Early in a run it is worse.\n"
    )


def test_more_is_expected_of_a_larger_model() -> None:
    said = [expectation(n) for n in (1_000_000, 30_000_000, 150_000_000, 1_100_000_000, 10**12)]
    assert [line.split(" parameters ")[0].split("of ")[1] for line in said[:4]] == [
        *("1 million", "30 million", "150 million", "1.1 billion"),
    ]
    assert "stories" in said[1]
    assert len({line.split(" parameters ")[1] for line in said}) == 4
