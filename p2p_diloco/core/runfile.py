"""The run file: what a person writes about a run in TOML, checked key by key.

``RunSpec`` is the whole file: model, data, inner and outer optimizer, limits of a round. What follows from it, and what
the owner signs, is the manifest.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from p2p_diloco.core.aggregate import AggregateName
from p2p_diloco.core.codecs import CodecName
from p2p_diloco.core.errors import UsageError
from p2p_diloco.core.toml import read_toml

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(gt=0, lt=2**40)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def has_nan(value: object) -> bool:
    """Returns whether there is a nan anywhere in what TOML or JSON can hold. Infinity is allowed: some types of models
    have it as a limit."""
    if isinstance(value, dict):
        return any(map(has_nan, value.values()))
    if isinstance(value, list):
        return any(map(has_nan, value))
    return isinstance(value, float) and math.isnan(value)


class ModelSpec(Section):
    """``[model]``: either a transformers config, or a folder with one and with weights to start from."""

    config: dict[str, object] | None = None
    """A transformers config, ``model_type`` and whatever differs from that type's defaults."""
    path: str | None = None
    """A transformers folder with weights, relative to the run file, or ``hub:OWNER/NAME`` on the Hugging Face hub. The
    run starts from these weights; its owner alone fetches them."""

    @model_validator(mode="after")
    def _one_of_both(self) -> ModelSpec:
        if (self.config is None) == (self.path is None):
            raise ValueError("give either config or path")
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError('config needs a model_type, for example model_type = "llama"')
        if has_nan(self.config):
            raise ValueError("config has a nan")
        return self


class DataSpec(Section):
    """``[data]``"""

    source: Literal["builtin", "path", "hub"] = "builtin"
    """``builtin``: the Python sources of torch, on every machine. ``path``: files of text (``textfiles.py`` says
    which). ``hub``: a data set of the Hugging Face hub, or a local folder of the datasets library; every peer needs the
    extra ``hf``."""
    path: str | None = None
    """File or folder for ``source = "path"``, relative to the run file. A volunteer names their own with ``--data``.
    For ``source = "hub"``: a folder, or OWNER/NAME on the hub, with @REVISION after it where it shall never change."""
    config: str | None = None
    """Configuration of a hub data set, for example ``en`` of allenai/c4."""
    split: Annotated[str, Field(min_length=1)] = "train"
    """Of a hub data set: what is trained on."""
    held_out_split: Annotated[str, Field(min_length=1)] | None = None
    """Of a hub data set: what is evaluated on. Without it, some of ``split`` are held out, by a hash of their text."""
    max_documents: Annotated[int, Field(gt=0, le=10**7)] = 100_000
    """Of a hub data set: how many documents a peer reads before it starts. Others than its neighbours read, if there
    are enough; ``hub.py`` says which, and what it costs."""
    text_key: Annotated[str, Field(min_length=1, max_length=64)] = "text"
    """The field of rows in JSON, and the column of .parquet files and hub data sets, that holds the text."""
    tokenizer: Annotated[str, Field(min_length=1)] = "bytes"
    """``bytes``; or the path, relative to the run file, of a tokenizer.json or of a folder that has one; or
    ``hub:OWNER/NAME``. The owner alone looks for it: it travels in the manifest."""
    end_token: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """The tokenizer's token after each document. Without this key, what its folder says: ``eos_token`` of
    tokenizer_config.json or special_tokens_map.json, or ``eos_token_id`` of generation_config.json or config.json; and
    else a usual name. The owner alone looks for it, too."""
    seq_len: Annotated[int, Field(ge=8, le=1_048_576)] = 256
    """Tokens a model sees at once; a batch row has one more, the last target."""
    held_out: Annotated[float, Field(gt=0, le=0.5)] = 0.02
    """Share of the documents, by a hash of their text (of the built-in text: of their paths), that nobody trains on."""
    eval_tokens: Annotated[int, Field(gt=0, le=2**26)] = 65_536
    """Held-out tokens that theta is evaluated on at every outer step."""

    @model_validator(mode="after")
    def _path_for_path(self) -> DataSpec:
        if (self.source == "builtin") != (self.path is None):
            raise ValueError('path goes with source = "path" or source = "hub", and these need a path')
        return self

    @model_validator(mode="after")
    def _end_token_of_a_tokenizer(self) -> DataSpec:
        if self.end_token is not None and self.tokenizer == "bytes":
            raise ValueError("end_token goes with a tokenizer; where bytes are tokens, a 0 byte ends a document")
        return self

    @model_serializer(mode="wrap")
    def _without_absent_keys(self, serialize: SerializerFunctionWrapHandler) -> dict[str, object]:
        """Leaves out a key that came later where it is not given: a run keeps its id."""
        table: dict[str, object] = serialize(self)
        if self.end_token is None:
            table.pop("end_token", None)
        return table

    @model_validator(mode="after")
    def _hub_keys_for_hub(self) -> DataSpec:
        for key in ("config", "split", "held_out_split", "max_documents"):
            if self.source != "hub" and getattr(self, key) != DataSpec.model_fields[key].default:
                raise ValueError(f'{key} goes with source = "hub"')
        if self.held_out_split == self.split:
            raise ValueError("held_out_split is split: nothing would be held out; leave it out, or name another")
        return self


class InnerSpec(Section):
    """``[inner]``: AdamW, as in the paper (arXiv 2311.08105, section 3)."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """``sgd``: without momentum; with ``steps`` 1 and an outer mean, that is training on one large batch."""
    steps: Count = 500
    """H: inner steps between two outer steps."""
    batch_size: Annotated[int, Field(gt=0, le=65_536)] = 16
    """Sequences in one forward pass."""
    grad_accumulation: Annotated[int, Field(gt=0, le=65_536)] = 1
    """Forward passes in one inner step."""
    lr: Positive = 4e-4
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Where the cosine ends, as a share of ``lr``."""
    warmup_steps: Annotated[int, Field(ge=0, lt=2**40)] = 1000
    """Inner steps of linear warm-up; the cosine spans the rest of all inner steps of the run."""
    weight_decay: NotNegative = 0.1
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    clip: Positive = 1.0
    """Largest norm of an inner gradient. Outer gradients are not clipped."""


class OuterSpec(Section):
    """``[outer]``: SGD with Nesterov momentum on the averaged outer gradient."""

    steps: Count = 100
    """Outer steps of the whole run."""
    lr: Positive = 0.7
    momentum: Fraction = 0.9
    codec: CodecName = "int8"
    """How parts of outer gradients and updates go over the wire."""
    aggregate: AggregateName = "robust"
    """What a reducer makes of contributions. ``mean``: their weighted mean, as in the paper. ``robust``: the same, with
    bounds on the norm and the weight of each, and without a minority that points away from the others."""


OnMissed = Literal["adopt", "keep"]
SeedsReduce = Literal["auto", "always", "never"]


class RoundSpec(Section):
    """``[round]``"""

    min_group: Annotated[int, Field(gt=0, le=100)] = 2
    """Fewest peers that may make an outer step."""
    max_group: Annotated[int, Field(gt=0, le=100)] = 64
    gather_s: Annotated[float, Field(gt=0, le=600)] = 5.0
    """How long a round waits, once enough are ready (``core.call``), for others to finish their inner steps. Later ones
    contribute what they have."""
    snapshot_every: Count = 10
    """Outer steps between two snapshots in the ledger."""
    on_missed: OnMissed = "adopt"
    """What becomes of the inner steps of a peer that misses a round. ``adopt``: they are lost, it goes on from theta.
    ``keep``: it goes on from its own parameters, and its next outer gradient is from the theta of then to these, as in
    the paper's ablation; the mean is then over all who train, with nothing from those who are absent."""
    audit_parts: Annotated[int, Field(ge=0, le=16)] = 1
    """After an outer step each peer takes the mean of so many parts again, which others have reduced, from what was
    contributed to them. Whose part is wrong reduces and leads no more. 0: nobody looks."""

    seeds_reduce: SeedsReduce = "auto"
    """Whether the seed of the run's owner leads rounds and reduces for the trainers; it contributes nothing. ``auto``:
    where no trainer can be dialled, as when all are behind home routers, or one does not reach all that can, for want
    of IPv4 or IPv6. ``always``: in every round. ``never``."""

    @model_serializer(mode="wrap")
    def _without_absent_keys(self, serialize: SerializerFunctionWrapHandler) -> dict[str, object]:
        """Leaves out keys that came later where they have their default: a run keeps its id."""
        table: dict[str, object] = serialize(self)
        for key in ("audit_parts", "seeds_reduce"):
            if getattr(self, key) == type(self).model_fields[key].default:
                table.pop(key, None)
        return table

    @model_validator(mode="after")
    def _ordered(self) -> RoundSpec:
        if self.min_group > self.max_group:
            raise ValueError("min_group is larger than max_group")
        return self


Membership = Literal["open", "invite"]


class RunSpec(Section):
    """Holds what a run file says: model, data, inner and outer optimizer, round limits."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of the random initialization and of the order of the data."""
    membership: Membership = "open"
    """Who may train. ``open``: whoever has an address. ``invite``: who has an invitation of the run's owner."""
    model: ModelSpec
    data: Annotated[DataSpec, Field(validate_default=True)] = DataSpec()
    inner: InnerSpec = InnerSpec()
    outer: OuterSpec = OuterSpec()
    round: RoundSpec = RoundSpec()

    @field_validator("data")
    @classmethod
    def _tokenizer_of_the_weights(cls, data: DataSpec, info: ValidationInfo) -> DataSpec:
        model = info.data.get("model")
        if model is not None and model.path is not None and "tokenizer" not in data.model_fields_set:
            why = (
                "model.path has weights for a vocabulary: name its tokenizer, most often with the same words as "
                'model.path, or ask for "bytes"'
            )
            finding = InitErrorDetails(type=PydanticCustomError("no_tokenizer", why), loc=("tokenizer",), input={})
            raise ValidationError.from_exception_data(cls.__name__, [finding])  # only so it names the key itself
        return data

    @model_serializer(mode="wrap")
    def _without_absent_keys(self, serialize: SerializerFunctionWrapHandler) -> dict[str, object]:
        """Leaves out a key that came later where it says what was so before: a run keeps its id."""
        table: dict[str, object] = serialize(self)
        if self.membership == "open":
            table.pop("membership", None)
        return table

    @property
    def tokens_per_inner_step(self) -> int:
        return self.inner.batch_size * self.inner.grad_accumulation * self.data.seq_len

    @property
    def max_weight_tokens(self) -> int:
        """Returns the largest weight that a contribution may claim: what four rounds of H inner steps make."""
        return 4 * self.inner.steps * self.tokens_per_inner_step

    @classmethod
    def load(cls, path: Path) -> RunSpec:
        """Returns what the run file at ``path`` says. Raises UsageError that names file and key."""
        table = read_toml(path, "run file")
        if "simulate" in table:
            raise UsageError(f"{path}: [simulate] is for simulations alone; take it out for a run")
        try:
            return cls.model_validate(table)
        except ValidationError as error:
            raise UsageError(f"{path}: {explain(error, cls)}") from error


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Returns the first finding of pydantic in a line: the key, what is wrong, and the nearest known key for an unknown
    one. Entries of a list are counted from 1."""
    first = error.errors(include_url=False, include_context=False)[0]
    key = ".".join(str(piece + 1 if isinstance(piece, int) else piece) for piece in first["loc"]) or "top level"
    if first["type"] == "extra_forbidden":
        *section, name = (str(piece) for piece in first["loc"])
        known = list(fields_of(model, section))
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {', '.join(known)}"
        return f"unknown key {key!r}; {hint}"
    if first["type"] == "missing":
        return f"key {key!r} is missing"
    message = first["msg"].removeprefix("Value error, ")
    given = first["input"]
    shown = "" if isinstance(given, (Mapping, list, BaseModel)) else f" (got {str(given)[:80]!r})"
    return f"key {key!r}: {message[:1].lower()}{message[1:]}{shown}"


def fields_of(model: type[BaseModel], section: list[str]) -> Iterator[str]:
    for name in section:
        if name.isdecimal():
            continue  # an entry of a list of sections
        field = model.model_fields.get(name)
        annotation = None if field is None else field.annotation
        annotation = next(iter(get_args(annotation)), annotation)
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return
        model = annotation
    yield from model.model_fields
