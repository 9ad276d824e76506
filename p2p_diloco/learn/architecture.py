"""The [model] table of a run -> a full transformers config, the same for every peer.

A config comes from a stranger's manifest, so it names no code and no place: only model types that the installed
transformers library has are built, and keys that make it fetch something, or that a peer chooses alone (precision,
attention kernels), are dropped on both ends.

transformers takes 5 s to import, so it is imported in functions, here and in ``model``.
"""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from p2p_diloco.core.errors import UsageError
from p2p_diloco.core.manifest import TransformersConfig
from p2p_diloco.core.runfile import ModelSpec
from p2p_diloco.learn.hub import find_model
from p2p_diloco.learn.settings import refuse_unread

NOT_OF_THE_RUN = (
    *("transformers_version", "name_or_path", "architectures", "auto_map", "dtype", "torch_dtype"),
    *("quantization_config", "attn_implementation", "experts_implementation"),
)
"""Keys of a config that vary with the library or the machine, or name code; and all that start with an underscore."""
NEEDS_DECODER = "this model would see the tokens that it is to predict; give a decoder (is_decoder = true)"
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
FIXED = {"rescale_every": 0}
"""Keys with one value in every run, wherever a type has them, also in the configs of older runs and of folders. With
any other, RWKV divides some of its weights in place when it is evaluated, for float16, and takes that back when it is
trained: theta, which peers evaluate, would be changed. What the model computes is the same."""
WHY_FIXED = "with others an evaluation changes weights; leave it out"
COUNTS = ("layer", "layers", "labels", "_dense_replace", "attention_types")
"""How keys end for whose integers a config makes a list of as many names, as soon as it is made."""
MAX_COUNT = 10_000
"""Of those. Keys that nobody here knows of may do the same: a stranger's run can then take this peer's memory."""


def resolve_config(spec: ModelSpec, *, base: Path, vocab_size: int) -> TransformersConfig:
    """Returns the full transformers config, with every default written out, so that another library version cannot
    change it.

    ``base``: the folder that ``spec.path`` is relative to. ``vocab_size``: of the run's tokenizer; the config's may be
    larger, and is this one where the config does not say. UsageError names the key.
    """
    config_class: Any
    if spec.config is not None:
        source, given = "model.config", dict(spec.config)
        config_class = config_class_of(given, source)
        parameters = inspect.signature(config_class.__init__).parameters
        refuse_unread(given, config_class, source, dropped=NOT_OF_THE_RUN, outer=frozenset())
        for key, value in FIXED.items():
            if given.get(key, value) != value:
                raise UsageError(f"key '{source}.{key}': {given[key]}, and a run has {value} alone: {WHY_FIXED}")
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
    config: TransformersConfig = portable(json.loads(resolved.to_json_string(use_diff=False)))
    if spec.config is not None:
        peers = instantiate(config_class, config, source)
        for key in given:
            if key not in parameters and vars(peers).get(key) != vars(resolved).get(key):
                raise UsageError(f"key '{source}.{key}': transformers writes it into no config, so peers do not get it")
    return config


def read_config(path: Path) -> TransformersConfig:
    """Returns the config as it lies in the folder. ``path`` is that of a config.json with plain weights beside it;
    UsageError for anything else."""
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
    """Returns the library's class for this config's type. Raises UsageError, which names ``source``, where the library
    has no language model of it."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    model_type = config.get("model_type")
    if model_type not in CAUSAL or model_type not in CONFIG_MAPPING:
        nearest = difflib.get_close_matches(str(model_type), sorted(CAUSAL), n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else "for example llama, gpt2, qwen3"
        raise UsageError(f"key '{source}.model_type': transformers has no language model {model_type!r}; {hint}")
    return CONFIG_MAPPING[model_type]


def instantiate(config_class: Any, config: Mapping[str, Any], source: str) -> Any:
    """Returns a config object, from a dict of plain JSON, where infinity is ``{"__float__": "Infinity"}`` as in the
    library."""
    from huggingface_hub.errors import StrictDataclassError

    def plain(table: dict[str, Any]) -> Any:
        return float(table["__float__"]) if set(table) == {"__float__"} else table

    try:
        values = json.loads(json.dumps(portable(config)), object_hook=plain)
        values.pop("model_type")
        check_counts("", values)
        made = config_class(**values)
        for key, value in FIXED.items():
            if hasattr(made, key):
                setattr(made, key, value)
        return made
    except (
        *(StrictDataclassError, ValueError, TypeError, AttributeError, KeyError),
        *(ArithmeticError, MemoryError),
    ) as error:
        raise UsageError(f"{source}: {reason(error)}") from error


def check_counts(key: str, value: Any) -> None:
    """Raises ValueError for what would take long, or all memory, before anything of a model is built. At any depth."""
    if isinstance(value, Mapping):
        for inner_key, inner in value.items():
            check_counts(inner_key, inner)
    elif isinstance(value, list):
        for inner in value:
            check_counts(key, inner)
    elif isinstance(value, int) and value > MAX_COUNT and key.endswith(COUNTS):
        raise ValueError(f"{key} is {value}, and may be {MAX_COUNT} at most")


def portable(config: Mapping[str, Any]) -> TransformersConfig:
    """Returns the config without the keys that are not the run's to choose, at any depth."""
    kept = ((k, v) for k, v in config.items() if k == "__float__" or not (k in NOT_OF_THE_RUN or k.startswith("_")))
    return {key: portable(value) if isinstance(value, Mapping) else value for key, value in kept}


def reason(error: BaseException) -> str:
    """Returns the last line of a message: transformers and its validators put the cause there."""
    if isinstance(error, KeyError):
        return f"unknown {error}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
