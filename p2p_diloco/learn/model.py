"""Manifest -> transformers model; its loss, and how it is evaluated.

How large a stranger's model is has to be what the manifest says, before memory is taken for it (``model_of``). What the
owner of a run starts from is checked, too: that it looks at earlier tokens alone, and that peers can get all of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.modules.module import register_module_module_registration_hook

from p2p_diloco.core.errors import LocalError, UsageError
from p2p_diloco.core.manifest import RunManifest, TransformersConfig
from p2p_diloco.learn.architecture import NEEDS_DECODER, config_class_of, instantiate, read_config, reason
from p2p_diloco.learn.parameters import layout_of, write_parameters
from p2p_diloco.learn.text import first_line
from p2p_diloco.learn.tokenizer import Tokenizer, open_tokenizer
from p2p_diloco.ledger.folder import load_state

PROBE_TOKENS = 8
"""Enough to see whether a model looks ahead."""
LOOKS_AHEAD = 3e-5
"""By which share of the largest logit others must change for that. Small encoders with random weights change by 5e-4
and more; rounding, where experts get another number of tokens, made 2e-7 of it."""
UNTRAINED_VALUES = 2**26
"""Buffers and frozen parameters that any model may have; a larger one may have as many as trained ones."""
MAX_MODULES = 2**18
"""Layers, experts, and what they are made of: some ten seconds to build, however few values they hold."""


def build_model(config: TransformersConfig, *, seed: int | None) -> torch.nn.Module:
    """Returns a causal language model in float32 on the CPU, in training mode.

    Random values are those of ``seed``, and the same on every machine with this version of torch; None where they are
    overwritten anyway. The global generator is left as it was.
    """
    from transformers import AutoModelForCausalLM

    config_object = instantiate(config_class_of(config, "model config"), config, "model config")
    try:
        with torch.random.fork_rng(devices=[]), few_modules():
            torch.default_generator.manual_seed(seed or 0)
            model: torch.nn.Module = AutoModelForCausalLM.from_config(
                config_object, dtype=torch.float32, trust_remote_code=False
            )
    except (
        *(ValueError, TypeError, AttributeError, LookupError, AssertionError),
        *(ArithmeticError, RuntimeError, ImportError),
    ) as error:
        raise UsageError(f"transformers cannot build this {config.get('model_type')} model: {reason(error)}") from error
    return model.train()


@contextmanager
def few_modules() -> Iterator[None]:
    """Raises UsageError from within as soon as there are more than MAX_MODULES: what a stranger's config asks for may
    be as much work as a large number can say."""
    count = 0

    def counted(module: torch.nn.Module, name: str, submodule: torch.nn.Module | None) -> None:
        nonlocal count
        count += 1
        if count > MAX_MODULES:
            raise UsageError(f"this model has more than {MAX_MODULES} layers and parts of them, and a run's may not")

    handle = register_module_module_registration_hook(counted)
    try:
        yield
    finally:
        handle.remove()


def model_of(manifest: RunManifest) -> torch.nn.Module:
    """Returns the run's model in float32 on the CPU, in training mode, with values that mean nothing yet. The manifest
    may be a stranger's: UsageError, before memory is taken, unless the model has the parameters that it counts."""
    config = manifest.transformers_config
    with torch.device("meta"):
        outline = build_model(config, seed=None)
    layout = layout_of(outline)
    if (layout.n, layout.digest) != (manifest.n_params, manifest.layout_digest):
        raise UsageError(
            "the installed transformers builds this model with other parameters than the run's; "
            "install the version that the run's owner uses"
        )
    values = sum(tensor.numel() for tensor in (*outline.parameters(), *outline.buffers()))
    if values - layout.n > max(layout.n, UNTRAINED_VALUES):
        raise UsageError(f"this model has {layout.n} values that are trained and {values - layout.n} that are not")
    return build_model(config, seed=None)


def load_model(run: Path) -> tuple[torch.nn.Module, Tokenizer]:
    """Loads the newest theta of a run folder as a model on the CPU, in evaluation mode, and the run's tokenizer."""
    manifest, state = load_state(run)
    model = model_of(manifest)
    write_parameters(model, state.theta)
    return model.eval(), open_tokenizer(manifest.tokenizer_json)


def require_weights(folder: Path) -> None:
    """Raises UsageError unless ``folder`` looks like one that ``load_pretrained`` reads; without reading it."""
    if not folder.is_dir():
        raise UsageError(
            f"{folder}: no such folder; a transformers folder with config.json and model.safetensors is needed"
        )
    if not any(folder.glob("*.safetensors")):
        raise UsageError(f"{folder}: no weights here; a run starts from those of a model.safetensors")


def load_pretrained(path: Path) -> torch.nn.Module:
    """Returns the model of a local transformers folder in float32, in training mode; every weight must be there.
    Kernels and precision that its config asks for are not taken: peers build the model without these, too."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    require_weights(path)
    source = path / "config.json"
    config = read_config(source)
    config_object = instantiate(config_class_of(config, str(source)), config, str(source))
    try:
        model: torch.nn.Module
        with no_progress_bars():
            model, info = AutoModelForCausalLM.from_pretrained(
                path,
                config=config_object,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (
        *(OSError, ValueError, KeyError, RuntimeError, SafetensorError),
        *(ImportError, TypeError, AttributeError),
    ) as error:
        raise UsageError(f"{path}: transformers cannot load this folder: {reason(error)}") from error
    if info["missing_keys"] or info["mismatched_keys"]:
        first = sorted(map(str, info["missing_keys"] or info["mismatched_keys"]))[0]
        raise UsageError(f"{path}: its weights are not those of its config, {first} is missing or has another shape")
    return model.train()


def check_causal(model: torch.nn.Module, *, vocab_size: int, seq_len: int) -> None:
    """Raises UsageError when the model cannot read ``seq_len`` tokens, or when what it says after some of them depends
    on the next ones: its loss would mean nothing then."""
    was_training = model.training
    model.eval()
    try:
        before, after = probe(model, vocab_size, min(seq_len, PROBE_TOKENS))
    except UsageError:  # some types have a shortest sequence
        before, after = probe(model, vocab_size, seq_len)
    finally:
        model.train(was_training)
    if (before - after).abs().max() > LOOKS_AHEAD * before.abs().max():
        raise UsageError(NEEDS_DECODER)


@torch.no_grad()
def probe(model: torch.nn.Module, vocab_size: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what the model says after all tokens but the last one, float32 [length - 1, vocab], for two different
    last ones. One sequence at a time: experts may be shared out among all tokens of a batch."""
    device = next(model.parameters()).device
    tokens = torch.arange(length, device=device)[None] % vocab_size  # int64 [1, length]
    others = tokens.clone()
    others[0, -1] = (others[0, -1] + max(vocab_size // 2, 1)) % vocab_size
    try:
        before, after = (model(input_ids=ids, use_cache=False).logits[0, :-1].float() for ids in (tokens, others))
    except LocalError:
        raise
    except Exception as error:  # models of transformers raise what they like
        raise UsageError(f"the model cannot read {length} tokens: {first_line(error)}") from error
    return before, after


def check_untrained(model: torch.nn.Module, config: TransformersConfig) -> None:
    """Raises UsageError when the model holds something, beside its trainable parameters, that ``build_model`` does not
    make of ``config`` alone: these are all that peers get."""
    trained = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    made = build_model(config, seed=None).state_dict()
    for name, value in model.state_dict().items():
        if name not in trained and not (name in made and same(value, made[name])):
            raise UsageError(f"{name} of this model is not trained, and peers could not get it; give another model")


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Returns whether two tensors have the same type and the same values."""
    return a.dtype == b.dtype and torch.equal(a, b)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Hides the bars that transformers shows when it loads and saves, in the midst of other output."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@dataclass(frozen=True)
class Losses:
    """Two losses of one batch, float32 scalars."""

    trained: torch.Tensor
    """What training lowers: the cross-entropy, and what transformers adds to it for this type of models. It *is*
    ``cross_entropy`` for all others."""
    cross_entropy: torch.Tensor
    """Nats per token: what is reported, and compared between runs."""


def losses_of(model: torch.nn.Module, batch: torch.Tensor) -> Losses:
    """Returns both losses of ``batch``, int64 [rows, seq_len + 1] on the model's device."""
    outputs = model(input_ids=batch[:, :-1], use_cache=False)
    cross_entropy = mean_cross_entropy(outputs.logits, batch[:, 1:])
    added = added_loss(model, outputs)
    return Losses(cross_entropy if added is None else cross_entropy + added, cross_entropy)


def loss_of(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Returns the cross-entropy of ``batch``, int64 [rows, seq_len + 1] on the model's device: float32 scalar, nats per
    token."""
    return losses_of(model, batch).cross_entropy


def mean_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Returns the mean over all tokens, float32 scalar, nats per token. ``logits``: [rows, length, vocab]; ``targets``:
    int64 [rows, length]."""
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def added_loss(model: torch.nn.Module, outputs: Any) -> torch.Tensor | None:
    """Returns what transformers adds to the cross-entropy of ``outputs``; None where that is nothing.

    Covered are the load-balancing loss of mixtures, which a model computes where its config has output_router_logits,
    and Bamba's z-loss. ``rehearsal`` compares with what transformers computes, and refuses what has further terms.
    """
    terms: list[torch.Tensor] = []
    balance = getattr(outputs, "aux_loss", None)
    if isinstance(balance, torch.Tensor):
        name = "router_aux_loss_coef" if hasattr(model, "router_aux_loss_coef") else "aux_loss_coef"  # JetMoe's
        terms.append(vars(model)[name] * balance)
    z_loss = vars(model).get("z_loss_coefficient")
    if z_loss:
        terms.append(z_loss * outputs.logits.float().logsumexp(-1).square().mean())
    return sum(terms[1:], start=terms[0]) if terms else None


def evaluate(model: torch.nn.Module, batches: Iterable[npt.NDArray[np.int64]]) -> float:
    """Returns the mean cross-entropy over all tokens of ``batches``, int64 [rows, seq_len + 1] each, in nats per token,
    without dropout."""
    device = next(model.parameters()).device
    was_training = model.training
    total, tokens = 0.0, 0
    model.eval()
    try:
        with torch.inference_mode():
            for batch in batches:
                n = batch.shape[0] * (batch.shape[1] - 1)
                total += n * float(loss_of(model, torch.from_numpy(batch).to(device)))
                tokens += n
    finally:
        model.train(was_training)
    if not tokens:
        raise ValueError("no batch to evaluate on")
    return total / tokens


def context_tokens(model: torch.nn.Module) -> int | None:
    """Returns the longest sequence the model is made for, or None where its type has no limit."""
    context = getattr(model.config, "max_position_embeddings", None)
    return context if isinstance(context, int) and context > 0 else None


def pick_device(name: str) -> torch.device:
    """Returns the device of this name: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``. UsageError lists what this
    machine has."""
    cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    mps = ["mps"] if torch.backends.mps.is_available() else []
    available = ["cpu", *cuda, *mps]
    if name == "auto":
        return torch.device((cuda + mps + ["cpu"])[0])
    if name == "cuda" and cuda:
        return torch.device("cuda:0")
    if name not in available:
        raise UsageError(f"device {name!r} is not available on this machine; it has: {', '.join(available)}")
    return torch.device(name)
