"""Manifest -> transformers model; parameters <-> one float32 vector; loss and evaluation.

A config comes from a stranger's manifest, so it names no code and no place: only model types that the installed
transformers library has are built, and keys that make it fetch something, or that a peer chooses alone (precision,
attention kernels), are dropped on both ends. How large the model is has to be what the manifest says, before memory is
taken for it (``model_of``).

The vector holds the trainable parameters in the order of ``named_parameters``, tied ones once.

transformers takes 5 s to import, so it is imported in functions: whoever needs only the vector's layout does not pay.
"""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from p2p_diloco.codec import Vector
from p2p_diloco.errors import LocalError, UsageError
from p2p_diloco.hub import find_model
from p2p_diloco.manifest import ModelSpec, RunManifest
from p2p_diloco.outer import digest
from p2p_diloco.text import first_line

NOT_OF_THE_RUN = (
    *("transformers_version", "name_or_path", "architectures", "auto_map", "dtype", "torch_dtype"),
    *("quantization_config", "attn_implementation", "experts_implementation"),
)
"""Keys of a config that vary with the library or the machine, or name code; and all that start with an underscore."""
NEEDS_DECODER = "this model would see the tokens that it is to predict; give a decoder (is_decoder = true)"
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
ROPE_KEYS = ("rope_theta", "rope_scaling", "partial_rotary_factor")
"""Older names, which the library moves into rope_parameters."""
PROBE_TOKENS = 8
"""Enough to see whether a model looks ahead."""
LOOKS_AHEAD = 3e-5
"""By which share of the largest logit others must change for that. Small encoders with random weights change by 5e-4
and more; rounding, where experts get another number of tokens, made 2e-7 of it."""
UNTRAINED_VALUES = 2**26
"""Buffers and frozen parameters that any model may have; a larger one may have as many as trained ones."""


def resolve_config(spec: ModelSpec, *, base: Path, vocab_size: int) -> dict[str, Any]:
    """The full transformers config, with every default written out, so that another library version cannot change it.

    ``base``: the folder that ``spec.path`` is relative to. ``vocab_size``: of the run's tokenizer; the config's may be
    larger, and is this one where the config does not say. UsageError names the key.
    """
    config_class: Any
    if spec.config is not None:
        source, given = "model.config", dict(spec.config)
        config_class = config_class_of(given, source)
        parameters = inspect.signature(config_class.__init__).parameters
        known = {*parameters, *config_class.attribute_map, *NOT_OF_THE_RUN, "model_type"}
        known |= set(ROPE_KEYS) if "rope_parameters" in known else set()
        for key in given:
            if key not in known:
                nearest = difflib.get_close_matches(key, sorted(known.difference(NOT_OF_THE_RUN)), n=1)
                hint = f"did you mean {nearest[0]!r}?" if nearest else f"{given['model_type']} has no such setting"
                raise UsageError(f"unknown key '{source}.{key}'; {hint}")
        given.setdefault("vocab_size", vocab_size)
        # An encoder's type is a language model only as a decoder: it would see the tokens that it is to predict.
        # Of a folder ``check_causal`` tells: some types, as gpt_neox, do not look ahead whatever the key says.
        if "is_decoder" in parameters and not given.setdefault("is_decoder", True):
            raise UsageError(f"key '{source}.is_decoder': false; {NEEDS_DECODER}")
        # A type's default special tokens belong to another vocabulary; a padding token would never be trained.
        for key in SPECIAL_TOKENS:
            if key in parameters and "None" in str(parameters[key].annotation):
                given.setdefault(key, None)
    else:
        path = find_model(str(spec.path), base, with_weights=False) / "config.json"
        source, given = str(path), read_config(path)
        config_class = config_class_of(given, source)
    resolved = instantiate(config_class, given, source)
    if not vocab_size <= getattr(resolved, "vocab_size", 0):
        raise UsageError(
            f"key '{source}.vocab_size': {getattr(resolved, 'vocab_size', 0)} is less than the tokenizer's {vocab_size}"
        )
    config: dict[str, Any] = portable(json.loads(resolved.to_json_string(use_diff=False)))
    return config


def read_config(path: Path) -> dict[str, Any]:
    """As it lies there. ``path``: of a config.json with plain weights beside it; UsageError for anything else."""
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; model.path is a transformers folder with config.json") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise UsageError(f"{path}: not a transformers config")
    if config.get("quantization_config"):
        raise UsageError(f"{path}: the weights are quantized; a run needs a folder with plain weights")
    return config


def config_class_of(config: Mapping[str, Any], source: str) -> Any:
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    model_type = config.get("model_type")
    if model_type not in CAUSAL or model_type not in CONFIG_MAPPING:
        nearest = difflib.get_close_matches(str(model_type), sorted(CAUSAL), n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else "for example llama, gpt2, qwen3"
        raise UsageError(f"key '{source}.model_type': transformers has no language model {model_type!r}; {hint}")
    return CONFIG_MAPPING[model_type]


def instantiate(config_class: Any, config: Mapping[str, Any], source: str) -> Any:
    """A config object, from a dict of plain JSON, where infinity is ``{"__float__": "Infinity"}`` as in the library."""
    from huggingface_hub.errors import StrictDataclassError

    def plain(table: dict[str, Any]) -> Any:
        return float(table["__float__"]) if set(table) == {"__float__"} else table

    try:
        values = json.loads(json.dumps(portable(config)), object_hook=plain)
        values.pop("model_type")
        return config_class(**values)
    except (StrictDataclassError, ValueError, TypeError, AttributeError, KeyError, ZeroDivisionError) as error:
        raise UsageError(f"{source}: {reason(error)}") from error


def portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without the keys that are not the run's to choose, at any depth."""
    kept = ((k, v) for k, v in config.items() if k == "__float__" or not (k in NOT_OF_THE_RUN or k.startswith("_")))
    return {key: portable(value) if isinstance(value, Mapping) else value for key, value in kept}


def reason(error: BaseException) -> str:
    """The last line of a message: transformers and its validators put the cause there."""
    if isinstance(error, KeyError):
        return f"unknown {error}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]


def build_model(config: dict[str, Any], *, seed: int | None) -> torch.nn.Module:
    """A causal language model in float32 on the CPU, in training mode.

    Random values are those of ``seed``, and the same on every machine with this version of torch; None where they are
    overwritten anyway. The global generator is left as it was.
    """
    from transformers import AutoModelForCausalLM

    config_object = instantiate(config_class_of(config, "model config"), config, "model config")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed or 0)
            model: torch.nn.Module = AutoModelForCausalLM.from_config(
                config_object, dtype=torch.float32, trust_remote_code=False
            )
    except (ValueError, TypeError, AttributeError, KeyError, AssertionError, RuntimeError, ImportError) as error:
        raise UsageError(f"transformers cannot build this {config.get('model_type')} model: {reason(error)}") from error
    return model.train()


def model_of(manifest: RunManifest) -> torch.nn.Module:
    """As ``build_model``, of a manifest that may be a stranger's: UsageError, before memory is taken, unless it has the
    parameters that the manifest counts."""
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


def require_weights(folder: Path) -> None:
    """UsageError unless ``folder`` looks like one that ``load_pretrained`` reads; without reading it."""
    if not folder.is_dir():
        raise UsageError(
            f"{folder}: no such folder; a transformers folder with config.json and model.safetensors is needed"
        )
    if not any(folder.glob("*.safetensors")):
        raise UsageError(f"{folder}: no weights here; a run starts from those of a model.safetensors")


def load_pretrained(path: Path) -> torch.nn.Module:
    """The model of a local transformers folder in float32, in training mode; every weight must be there. Kernels and
    precision that its config asks for are not taken: peers build the model without these, too."""
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
    """UsageError when the model cannot read ``seq_len`` tokens, or when what it says after some of them depends on the
    next ones: its loss would mean nothing then."""
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
    """What the model says after all tokens but the last one, float32 [length - 1, vocab], for two different last ones.
    One sequence at a time: experts may be shared out among all tokens of a batch."""
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


def check_untrained(model: torch.nn.Module, config: dict[str, Any]) -> None:
    """UsageError when the model holds something, beside its trainable parameters, that ``build_model`` does not make of
    ``config`` alone: these are all that peers get."""
    trained = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    made = build_model(config, seed=None).state_dict()
    for name, value in model.state_dict().items():
        if name not in trained and not (name in made and same(value, made[name])):
            raise UsageError(f"{name} of this model is not trained, and peers could not get it; give another model")


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Loading and saving take a moment; transformers shows a bar for each, in the midst of other output."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@dataclass(frozen=True)
class Layout:
    """Which values of theta are which parameter."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    n: int
    """Values in all."""

    @property
    def digest(self) -> str:
        """32 bytes in hex over names and shapes."""
        return digest(b"layout", *(f"{name} {shape}".encode() for name, shape in zip(self.names, self.shapes))).hex()


def layout_of(model: torch.nn.Module) -> Layout:
    trained = list(trainable(model))
    return Layout(
        names=tuple(name for name, _, _ in trained),
        shapes=tuple(tuple(parameter.shape) for _, parameter, _ in trained),
        n=sum(parameter.numel() for _, parameter, _ in trained),
    )


def trainable(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter, slice]]:
    """Name, parameter, and where its values are in the vector."""
    start = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter, slice(start, start + parameter.numel())
            start += parameter.numel()


def read_parameters(model: torch.nn.Module, out: Vector) -> None:
    """Model, on any device -> ``out``: float32 [n]."""
    check_length(model, out)
    for _, parameter, where in trainable(model):
        torch.from_numpy(out[where]).copy_(parameter.detach().reshape(-1))


@torch.no_grad()
def write_parameters(model: torch.nn.Module, vector: Vector) -> None:
    """``vector``: float32 [n] -> model, on any device."""
    check_length(model, vector)
    for _, parameter, where in trainable(model):
        values = vector[where] if vector.flags.writeable else vector[where].copy()  # torch warns of read-only memory
        parameter.copy_(torch.from_numpy(values).view(parameter.shape))


def bind_parameters(model: torch.nn.Module, vector: Vector) -> None:
    """Make every parameter a view of ``vector``, float32 [n], and take its values: from then on both are one memory.

    An optimizer that exists keeps its parameters. For a model on the CPU; moving it away ends the binding.
    """
    check_length(model, vector)
    for name, parameter, where in trainable(model):
        if parameter.device.type != "cpu" or parameter.dtype != torch.float32:
            raise ValueError(f"{name} is {parameter.dtype} on {parameter.device}; only float32 on the CPU can be bound")
        parameter.data = torch.from_numpy(vector[where]).view(parameter.shape)


def check_length(model: torch.nn.Module, vector: Vector) -> None:
    n = layout_of(model).n
    if vector.shape != (n,) or vector.dtype != np.float32:
        raise ValueError(f"the model has {n} values, the vector is {vector.dtype} {list(vector.shape)}")


def loss_of(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """``batch``: int64 [rows, seq_len + 1] on the model's device -> float32 scalar, nats per token."""
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits  # [rows, seq_len, vocab]
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def evaluate(model: torch.nn.Module, batches: Iterable[npt.NDArray[np.int64]]) -> float:
    """Mean over all tokens of ``batches``, int64 [rows, seq_len + 1] each, in nats per token, without dropout."""
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
    """The longest sequence the model is made for, or None where its type has no limit."""
    context = getattr(model.config, "max_position_embeddings", None)
    return context if isinstance(context, int) and context > 0 else None


def pick_device(name: str) -> torch.device:
    """``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``. UsageError lists what this machine has."""
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
