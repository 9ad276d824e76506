"""The rehearsal: a model is tried as a peer will use it, before anybody else gets it.

    learn       full seq_len, all layers, training mode, forward and backward: losses and gradients are finite
    evaluate    as peers do between outer steps
    learn       again, forward alone, with the loss that transformers computes beside ours

After each of these every parameter, and every buffer that belongs to the model's state, is what it was, bit for bit.
What peers would stumble over is then said in one line, to the owner alone.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from p2p_diloco.core.codec import Vector
from p2p_diloco.core.errors import LocalError, UsageError
from p2p_diloco.learn.model import PROBE_TOKENS, added_loss, evaluate, losses_of, mean_cross_entropy
from p2p_diloco.learn.parameters import trainable
from p2p_diloco.learn.text import first_line

NAMED = 3
"""Tensors without a gradient that are named; of the others the number is told."""
LOSS_TOLERANCE = 1e-4
"""Relative: two ways to one loss are this near; a term that is left out is further off, or does not matter."""


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """Says what it took, and what is worth knowing of a model that passed."""

    tokens: int
    """Of one row."""
    loss: float
    """Cross-entropy of arbitrary tokens, nats per token."""
    wall_s: float
    peak_bytes: int
    """Of this process, at most, since it began."""
    without_gradient: tuple[str, ...]
    """Trained tensors that no gradient reached; they stay what they are."""

    def line(self) -> str:
        """Returns all of this in a line, for a person."""
        took = f"{self.wall_s:.1f} s, at most {self.peak_bytes / 1e9:.1f} GB in this process"
        passed = f"learns from and is evaluated on a row of {self.tokens} tokens: {took}"
        if not self.without_gradient:
            return passed
        named = ", ".join(self.without_gradient[:NAMED])
        more = len(self.without_gradient) - NAMED
        return f"{passed}; no gradient reaches {named}{f' and {more} more' if more > 0 else ''}"


def rehearse(model: torch.nn.Module, theta: Vector, *, vocab_size: int, seq_len: int) -> Rehearsal:
    """Returns what it took to train ``model`` for a moment; UsageError names the tensor or key when it cannot be.

    ``theta``: float32 [n], the parameters as built or loaded, read before anything was run. The model is in training
    mode before and after, has no gradients, and holds ``theta``. The global generator is left as it was. It takes the
    memory of one more copy of the parameters, for gradients, and that of the activations of one row.
    """
    began_s = time.monotonic()
    require_finite(model)
    row = row_of_tokens(model, vocab_size, seq_len)
    kept = {name: tensor.detach().clone() for name, tensor in untrained(model)}
    held = dict(model.named_parameters())
    device = next(model.parameters()).device
    tokens = torch.from_numpy(row).to(device)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        try:
            losses = losses_of(model, tokens)
            losses.trained.backward()  # type: ignore[no-untyped-call]
        except Exception as error:  # models of transformers raise what they like
            raise failure(model, tokens, "in training", error) from error
        loss = float(losses.cross_entropy.detach())
        require_finite_loss(float(losses.trained.detach()), "in training")
        without_gradient = tuple(missing_gradients(model))
        require_some_gradient(model)
        model.zero_grad(set_to_none=True)
        del losses
        require_unchanged(model, theta, kept, "a forward and backward pass in training mode")

        try:
            evaluated = evaluate(model, [row])
        except Exception as error:
            raise failure(model, tokens, "in an evaluation", error) from error
        require_finite_loss(evaluated, "in an evaluation")
        require_unchanged(model, theta, kept, "an evaluation")

        try:
            with torch.no_grad():
                again = losses_of(model, tokens)
        except Exception as error:
            raise failure(model, tokens, "in training after an evaluation", error) from error
        require_finite_loss(float(again.trained), "in training after an evaluation")
        require_whole_loss(model, tokens[:, :-1])
        require_unchanged(model, theta, kept, "training after an evaluation")
        require_held(model, held)
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB on Linux, bytes on macOS
    return Rehearsal(
        tokens=seq_len,
        loss=loss,
        wall_s=time.monotonic() - began_s,
        peak_bytes=usage if sys.platform == "darwin" else usage * 1024,
        without_gradient=without_gradient,
    )


def failure(model: torch.nn.Module, tokens: torch.Tensor, when: str, error: Exception) -> LocalError:
    """Returns what a peer would die of, for the owner; it is the length's fault where a short row does no harm."""
    if isinstance(error, LocalError):
        return error
    seq_len = tokens.shape[1] - 1
    try:
        with torch.no_grad():
            losses_of(model, tokens[:, : PROBE_TOKENS + 1])
    except Exception:
        return UsageError(
            f"the model fails {when}: {first_line(error)}; give another type of models, or another config"
        )
    return UsageError(
        f"key 'data.seq_len': {seq_len}, but the model fails {when} on as many tokens ({first_line(error)}); lower it, "
        f"or raise the model's limit (some types need max_position_embeddings to be larger than data.seq_len)"
    )


def row_of_tokens(model: torch.nn.Module, vocab_size: int, seq_len: int) -> np.ndarray[tuple[int, int], Any]:
    """Returns int64 [1, seq_len + 1]: the vocabulary's last token, then arbitrary ones, the same each time. None is the
    padding token, which some models give no position of its own: a row without any is the longest for them."""
    tokens = np.random.default_rng(0).integers(vocab_size, size=(1, seq_len + 1))
    tokens[0, 0] = vocab_size - 1
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)  # type: ignore[union-attr,operator]
    if vocab_size > 1:
        tokens[tokens == padding] = 1 if padding == 0 else 0
    return tokens


def untrained(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields frozen parameters, and the buffers that are saved with a model. Others are computed anew when it is built,
    and may grow with the sequence."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            yield name, parameter
    saved = model.state_dict(keep_vars=True)
    for name, buffer in model.named_buffers():
        if name in saved:
            yield name, buffer


def require_finite(model: torch.nn.Module) -> None:
    """Raises UsageError where a parameter is not finite."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            bad = int((~torch.isfinite(parameter)).sum())
            raise UsageError(f"{name}: {bad} of {parameter.numel()} values of this model are not finite; give another")


def require_finite_loss(loss: float, when: str) -> None:
    """Raises UsageError where the loss is not finite. ``when`` says in the message what the model was used for."""
    if not np.isfinite(loss):
        raise UsageError(f"the loss of this model is {loss} {when}; give another start, or another config")


def missing_gradients(model: torch.nn.Module) -> Iterator[str]:
    """Yields the names of trained tensors without a gradient. UsageError where one is not finite."""
    for name, parameter, _ in trainable(model):
        if parameter.grad is None:
            yield name
        elif not torch.isfinite(parameter.grad).all():
            raise UsageError(f"{name}: its gradient is not finite; give another start, or another config")


def require_some_gradient(model: torch.nn.Module) -> None:
    """Raises UsageError where every gradient is zero. Some may be at the start, behind a layer of zeros, say."""
    if not any(parameter.grad.any() for _, parameter, _ in trainable(model) if parameter.grad is not None):
        raise UsageError(
            "every gradient of this model is zero: it learns nothing; give another start, or another config"
        )


def require_unchanged(model: torch.nn.Module, theta: Vector, kept: Mapping[str, torch.Tensor], by: str) -> None:
    """Raises UsageError unless every parameter is what ``theta`` has, and every other tensor what ``kept`` has."""
    for name, parameter, where in trainable(model):
        if not torch.equal(bits(parameter), torch.from_numpy(theta[where].view(np.uint8))):
            raise UsageError(f"{name}: {by} changes it, so peers would not hold the same model; give another type")
    now = dict(untrained(model))
    for name, tensor in kept.items():
        if name not in now or not torch.equal(bits(now[name]), bits(tensor)):
            raise UsageError(f"{name}: {by} changes it, and peers do not exchange it; give another type of models")


def require_held(model: torch.nn.Module, held: Mapping[str, torch.nn.Parameter]) -> None:
    """Raises UsageError when a parameter is no longer the object that an optimizer would hold, whatever its values."""
    now = dict(model.named_parameters())
    for name, parameter in held.items():
        if now.get(name) is not parameter:
            raise UsageError(
                f"{name}: this model replaces it when it is used, so it would not be trained; give another"
            )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Returns uint8 [bytes]: two tensors are the same where these are, whatever they hold."""
    return tensor.detach().cpu().reshape(-1).view(torch.uint8)


@torch.no_grad()
def require_whole_loss(model: torch.nn.Module, tokens: torch.Tensor) -> None:
    """Raises UsageError when transformers trains this type with more terms than ``added_loss`` knows of. ``tokens``:
    int64 [1, seq_len]. Types that compute no loss for text alone (GIT wants pictures) have none to compare with."""
    try:
        outputs = model(input_ids=tokens, labels=tokens, use_cache=False)
    except Exception:
        return
    if outputs.loss is None:
        return
    theirs = float(outputs.loss)
    added = added_loss(model, outputs)
    shifted = mean_cross_entropy(outputs.logits[:, :-1], tokens[:, 1:])
    unshifted = mean_cross_entropy(outputs.logits, tokens)  # decoders of translation models leave it to the caller
    ours = [float(loss if added is None else loss + added) for loss in (shifted, unshifted)]
    if not any(abs(loss - theirs) <= LOSS_TOLERANCE * max(abs(theirs), 1.0) for loss in ours):
        raise UsageError(
            f"transformers trains this type of models with a loss of further terms ({theirs:.4f} where p2p-diloco "
            f"computes {ours[0]:.4f}); set their coefficients to 0, or give another type"
        )
