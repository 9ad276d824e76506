from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from p2p_diloco.core.errors import UsageError
from p2p_diloco.learn.model import build_model
from p2p_diloco.learn.rehearsal import Rehearsal, rehearse
from tests.support.small_models import llama, resolved, vector_of

RWKV = {"model_type": "rwkv", "hidden_size": 16, "intermediate_size": 32, "vocab_size": 256, "context_length": 16}
ENCODER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
ENCODER |= {"is_decoder": True, "vocab_size": 256, "pad_token_id": 1}


def rehearsed(model: torch.nn.Module, *, vocab_size: int = 256, seq_len: int = 16) -> Rehearsal:
    return rehearse(model, vector_of(model), vocab_size=vocab_size, seq_len=seq_len)


def test_a_model_that_can_be_trained_is_left_as_it_was() -> None:
    model = llama(seed=3, attention_dropout=0.5)
    before, state = vector_of(model), torch.random.get_rng_state()
    first = rehearsed(model)
    assert np.array_equal(vector_of(model), before)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert (first.tokens, first.without_gradient) == (16, ())
    assert 5.0 < first.loss < 6.1, "about that of guessing, log(256)"
    assert rehearsed(model).loss == first.loss, "dropout is drawn alike"
    assert first.peak_bytes > 10**7
    line = r"learns from and is evaluated on a row of 16 tokens: \d+\.\d s, at most \d+\.\d GB in this process"
    assert re.fullmatch(line, first.line())


def test_tensors_that_no_gradient_reaches_are_named() -> None:
    model = llama()
    for name in "abcde":
        model.register_parameter(name, torch.nn.Parameter(torch.zeros(2)))
    assert rehearsed(model).without_gradient == tuple("abcde")
    assert rehearsed(model).line().endswith("; no gradient reaches a, b, c and 2 more")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"])
def test_a_value_that_is_not_finite_is_refused_with_its_tensor(name: str, value: float) -> None:
    model = llama(tie_word_embeddings=False)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[5] = value
    with pytest.raises(UsageError, match=rf"^{name}: 1 of \d+ values of this model are not finite; give another$"):
        rehearsed(model)


def test_a_value_that_is_not_finite_is_refused_where_nobody_trains_it() -> None:
    """And though no loss shows it."""
    model = llama()
    model.register_parameter("frozen", torch.nn.Parameter(torch.tensor([1.0, float("nan")]), requires_grad=False))
    with pytest.raises(UsageError, match=r"^frozen: 1 of 2 values of this model are not finite; give another$"):
        rehearsed(model)


def test_a_loss_that_is_not_finite_is_refused() -> None:
    model = llama(tie_word_embeddings=False)
    with torch.no_grad():
        model.get_parameter("lm_head.weight").fill_(3e38)
    with pytest.raises(UsageError, match=r"^the loss of this model is (nan|inf) in training"):
        rehearsed(model)


def test_a_model_that_learns_nothing_is_refused() -> None:
    model = llama(tie_word_embeddings=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with pytest.raises(UsageError, match=r"^every gradient of this model is zero: it learns nothing"):
        rehearsed(model)


@pytest.mark.parametrize("model_type", ["roberta", "xlm-roberta", "camembert", "roberta-prelayernorm"])
def test_positions_that_begin_after_the_padding_token_are_counted(model_type: str) -> None:
    """They have two positions less than max_position_embeddings says; a token that is padding takes none."""
    config = ENCODER | {"model_type": model_type, "max_position_embeddings": 32}
    rehearsed(build_model(config, seed=0), seq_len=30)
    for seq_len in (31, 32):
        with pytest.raises(UsageError, match=rf"^key 'data.seq_len': {seq_len}, but the model fails in training on as"):
            rehearsed(build_model(config, seed=0), seq_len=seq_len)


@pytest.mark.parametrize("layers", [8, 13])
def test_what_an_evaluation_changes_is_named(layers: int) -> None:
    model = build_model(RWKV | {"num_hidden_layers": layers}, seed=0)
    rehearsed(model)
    model.config.rescale_every = 6  # type: ignore[union-attr]
    with pytest.raises(UsageError, match=r"^rwkv\.blocks\.6\.attention\.output\.weight: an evaluation changes it, so "):
        rehearsed(model)


class Guesser(torch.nn.Module):
    """Says the same after every token. What it does besides is up to those who inherit from it."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(pad_token_id=None), model_type="guesser")
        self.scores = torch.nn.Parameter(torch.arange(256.0) / 256)
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("length", torch.zeros(1), persistent=False)

    def act(self) -> None:
        """Whatever it does at each forward pass."""

    def own_loss(self, loss: torch.Tensor) -> torch.Tensor:
        return loss

    def forward(self, input_ids: torch.Tensor, use_cache: bool, labels: torch.Tensor | None = None) -> Any:
        self.act()
        logits = self.scores.expand(*input_ids.shape, 256)
        loss = None
        if labels is not None:
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            loss = self.own_loss(loss)
        return SimpleNamespace(logits=logits, loss=loss)


class MovingMean(Guesser):
    """As batch norm does, or a router that balances its load."""

    mean: torch.Tensor

    def act(self) -> None:
        if self.training:
            self.mean += 0.1


class MovingFrozen(Guesser):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = torch.nn.Parameter(torch.zeros(1), requires_grad=False)

    def act(self) -> None:
        self.frozen.data.add_(1)


class Counting(Guesser):
    """Its evaluations, in a buffer that is saved."""

    mean: torch.Tensor

    def act(self) -> None:
        if not self.training:
            self.mean += 1


class Vague(Guesser):
    """Its loss is finite in training alone."""

    def forward(self, input_ids: torch.Tensor, use_cache: bool, labels: torch.Tensor | None = None) -> Any:
        outputs = super().forward(input_ids, use_cache, labels)
        if not self.training:
            outputs.logits = outputs.logits * float("nan")
        return outputs


class Growing(Guesser):
    length: torch.Tensor

    def act(self) -> None:
        self.length += 1


class Rescaling(Guesser):
    def act(self) -> None:
        if self.training:
            self.scores.data *= 1.0000001


class Replacing(Guesser):
    def act(self) -> None:
        if not self.training:
            self.scores = torch.nn.Parameter(self.scores.detach().clone())


class Spoiled(Guesser):
    """An evaluation leaves it something that the next inner step computes with."""

    length: torch.Tensor

    def act(self) -> None:
        if not self.training:
            self.length.fill_(float("inf"))

    def forward(self, input_ids: torch.Tensor, use_cache: bool, labels: torch.Tensor | None = None) -> Any:
        outputs = super().forward(input_ids, use_cache, labels)
        if self.training:
            outputs.logits = outputs.logits + self.length
        return outputs


class Tired(Spoiled):
    def act(self) -> None:
        if self.training and self.length.isinf():
            raise RuntimeError("had enough")
        super().act()


class Penalized(Guesser):
    def own_loss(self, loss: torch.Tensor) -> torch.Tensor:
        return loss + 0.01


class Discounted(Guesser):
    def own_loss(self, loss: torch.Tensor) -> torch.Tensor:
        return loss - 0.01


class Steep(Guesser):
    """With a gradient that is not finite where its loss is: the root of 0."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: torch.Tensor, use_cache: bool, labels: torch.Tensor | None = None) -> Any:
        outputs = super().forward(input_ids, use_cache, labels)
        outputs.logits = outputs.logits * (1 + self.scale.sqrt())
        return outputs


class Untrainable(Guesser):
    def act(self) -> None:
        if self.training:
            raise RuntimeError("no kernel\nfor this")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (MovingMean, "mean: a forward and backward pass in training mode changes it, and peers do not exchange it"),
        (MovingFrozen, "frozen: a forward and backward pass in training mode changes it, and peers do not exchange it"),
        (
            Rescaling,
            "scores: a forward and backward pass in training mode changes it, so peers would not hold the same",
        ),
        (Replacing, "scores: this model replaces it when it is used, so it would not be trained"),
        (Counting, "mean: an evaluation changes it, and peers do not exchange it"),
        (Vague, "the loss of this model is nan in an evaluation"),
        (Spoiled, "the loss of this model is nan in training after an evaluation"),
        (Tired, "the model fails in training after an evaluation: had enough; give another type of models"),
        (Penalized, "transformers trains this type of models with a loss of further terms"),
        (Discounted, "transformers trains this type of models with a loss of further terms"),
        (Steep, "scale: its gradient is not finite"),
        (Untrainable, "the model fails in training: no kernel; give another type of models, or another"),
    ],
)
def test_what_peers_would_stumble_over_is_said_in_a_line(kind: type[Guesser], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        rehearsed(kind())
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [Guesser, Growing])
def test_what_does_no_harm_is_taken(kind: type[Guesser]) -> None:
    assert rehearsed(kind()).without_gradient == ()


def test_a_mixture_that_learns_its_routers_loss_is_taken() -> None:
    config = resolved() | {"model_type": "mixtral", "num_local_experts": 4, "output_router_logits": True}
    rehearsed(build_model(config | {"router_aux_loss_coef": 3.0}, seed=0))


def test_a_vocabulary_of_one_token_is_enough() -> None:
    assert rehearsed(llama(), vocab_size=1).tokens == 16


def test_every_token_of_the_vocabulary_has_to_be_known() -> None:
    model = build_model(resolved(), seed=0)
    with pytest.raises(UsageError, match="the model fails in training: index out of range"):
        rehearsed(model, vocab_size=257)
