"""Which keys a transformers config can have: those that its class, or the code of its model, reads.

A config class of transformers takes any key and keeps it. A key that is misspelt would be kept, too, and change
nothing, so a run file may only have keys that something reads. Many are no fields of the class: other names for a
field, what the class looks for among further keys, and what the model looks for with a default of its own, as
``getattr(config, "head_dim", ...)``. They are found in the library's source: no list here could follow its versions.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from types import ModuleType
from typing import Any

from p2p_diloco.core.errors import UsageError

MODELS = "transformers.models."
"""Code that belongs to a type of models; what all types share is not searched."""
ROPE_KEYS = ("rope_theta", "rope_scaling", "partial_rotary_factor")
"""Older names, which the library moves into rope_parameters."""


def refuse_unread(
    given: Mapping[str, Any], config_class: Any, source: str, *, dropped: tuple[str, ...], outer: frozenset[str]
) -> None:
    """Raises UsageError for the first key of ``given``, at any depth, that nothing reads; it names the nearest that is
    read.

    ``source``: where the keys stand, for messages. ``dropped``: keys that are taken out of every config. ``outer``:
    what the code around a table of this table's kind reads of it; empty at the top.
    """
    known = {*keys_read(config_class), *outer, *dropped, "model_type"}
    for key, value in given.items():
        if key not in known:
            nearest = difflib.get_close_matches(key, sorted(known.difference(dropped)), n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"{config_class.model_type} has no such setting"
            raise UsageError(f"unknown key '{source}.{key}'; {hint}")
        inner = inner_class(config_class, key, value) if isinstance(value, Mapping) else None
        if inner is not None:
            around = outer.union(name for _, name in reads_of_code(config_class))  # it hands the table on
            refuse_unread(value, inner, f"{source}.{key}", dropped=dropped, outer=around)


def inner_class(config_class: Any, key: str, value: Mapping[str, Any]) -> Any:
    """Returns the config class of a table inside a config; None where that is plain values, or not known."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    inner = config_class.sub_configs.get(key)
    if inner is None or issubclass(inner, PreTrainedConfig):
        return inner
    default = getattr(getattr(config_class, "sub_configs_defaults", {}).get(key), "model_type", None)
    model_type = value.get("model_type", default)
    return CONFIG_MAPPING.get(model_type, None)


def keys_read(config_class: Any) -> frozenset[str]:
    """Returns every key that this class, or the code of its model, reads."""
    known = {*inspect.signature(config_class.__init__).parameters} - {"self", "args", "kwargs"}
    known |= {*config_class.attribute_map, *config_class.attribute_map.values()}
    known |= set(read_by_class(config_class))
    known |= {key for holder, key in reads_of_code(config_class) if holder not in config_class.sub_configs}
    return frozenset(known.union(ROPE_KEYS) if "rope_parameters" in known else known)


def read_by_class(config_class: Any) -> Iterator[str]:
    """Yields the keys that this class takes from ``kwargs``, or looks for on itself, beyond what every config does."""
    from transformers import PreTrainedConfig

    for base in config_class.__mro__:
        if base in PreTrainedConfig.__mro__:
            continue
        for node in walk(importlib.import_module(base.__module__), base.__name__):
            for holder, key in reads_of(node):
                if holder in ("kwargs", "self") and is_key(key, config_class):
                    yield key


@lru_cache(maxsize=256)
def reads_of_code(config_class: Any) -> frozenset[tuple[str, str]]:
    """Returns (holder, key) of what the code of its model looks for: ``config.key``, or ``config.text_config.key`` with
    the holder text_config. Searched is whatever the model's class leads to, but for what is given the config of another
    part of the model."""
    waiting = [one for one in model_classes(config_class) if is_given(getattr(*one), config_class)]
    seen, found = set(waiting), set()
    while waiting:
        module, name = waiting.pop()
        own = is_given(getattr(module, name), config_class)
        for node in walk(module, name):
            if own:
                found |= {(holder, key) for holder, key in reads_of(node) if holder.endswith("config")}
            if isinstance(node, ast.Name) and (there := origin(module, node.id)) is not None and there not in seen:
                seen.add(there)
                waiting.append(there)
    return frozenset((holder, key) for holder, key in found if is_key(key, config_class))


def model_classes(config_class: Any) -> list[tuple[ModuleType, str]]:
    """Returns the causal language model of this config, or else its model; all classes and functions beside it for a
    table that has no model of its own."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES):
        names = mapping.get(config_class.model_type, ())
        for name in [names] if isinstance(names, str) else names:
            model = getattr(transformers, name, None)
            if model is not None:
                return [(importlib.import_module(model.__module__), model.__name__)]
    module = importlib.import_module(config_class.__module__.replace(".configuration_", ".modeling_"))
    return [(module, name) for name in tree_of(module)]


def is_given(thing: Any, config_class: Any) -> bool:
    """Returns whether the ``config`` that this class or function of a model takes may be one of ``config_class``. Where
    it does not say which it takes, it is the one of a model that has only one."""
    from transformers import PreTrainedConfig

    taker = thing.__init__ if inspect.isclass(thing) else thing
    parameter = inspect.signature(taker).parameters.get("config")
    named = str(getattr(parameter, "annotation", ""))
    classes = [found for name in re.findall(r"\w+", named) if inspect.isclass(found := taken_from(thing, name))]
    configs: list[Any] = [found for found in classes if issubclass(found, PreTrainedConfig)]
    if not configs:
        return not config_class.sub_configs
    return any(
        issubclass(config_class, one)
        or issubclass(one, config_class)
        or config_class in one.sub_configs.values()  # Emu3 says so of layers that get the text's config
        for one in configs
    )


def taken_from(thing: Any, name: str) -> Any:
    return getattr(importlib.import_module(thing.__module__), name, None)


def is_key(name: str, config_class: Any) -> bool:
    """Returns whether what is read by this name can be a key of a config: no method, and nothing that is its
    class's."""
    from transformers import PreTrainedConfig

    method = callable(getattr(config_class, name, None)) or hasattr(dict, name)
    return not (method or name.startswith("_") or hasattr(PreTrainedConfig, name))


def origin(module: ModuleType, name: str) -> tuple[ModuleType, str] | None:
    """Returns where a class or function that ``module`` knows by this name is defined; None for others than models'
    code."""
    thing = getattr(module, name, None)
    if not inspect.isclass(thing) and not inspect.isfunction(thing):
        return None
    if not thing.__module__.startswith(MODELS):
        return None
    return importlib.import_module(thing.__module__), thing.__name__


def walk(module: ModuleType, name: str) -> Iterator[ast.AST]:
    """Yields every node of the source of a class or function of a module; nothing where it has none of that name."""
    there = tree_of(module).get(name)
    return iter(()) if there is None else ast.walk(there)


@lru_cache(maxsize=256)
def tree_of(module: ModuleType) -> dict[str, ast.AST]:
    """Returns the source of a module's classes and functions, by name."""
    nodes = ast.parse(inspect.getsource(module)).body
    return {node.name: node for node in nodes if isinstance(node, (ast.ClassDef, ast.FunctionDef))}


def reads_of(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Yields (holder, key) of ``holder.key``, ``holder["key"]``, ``"key" in holder``, ``getattr(holder, "key")``,
    ``hasattr(holder, "key")``, ``holder.get("key")`` and ``holder.pop("key")``."""
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        yield name_of(node.value), node.attr
    elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
        yield from named(node.value, node.slice)
    elif isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.In, ast.NotIn)):
        yield from named(node.comparators[0], node.left)
    elif isinstance(node, ast.Call) and node.args:
        if isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr") and len(node.args) > 1:
            yield from named(node.args[0], node.args[1])
        elif isinstance(node.func, ast.Attribute) and node.func.attr in ("get", "pop"):
            yield from named(node.func.value, node.args[0])


def named(holder: ast.expr, key: ast.expr) -> Iterator[tuple[str, str]]:
    if isinstance(key, ast.Constant) and isinstance(key.value, str):
        yield name_of(holder), key.value


def name_of(node: ast.expr) -> str:
    """Returns ``config`` of both ``config`` and ``self.config``; empty for whatever has no name."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
