"""A study: one question, as a TOML file of arms that differ in some keys, each with several seeds.

    base = "base.toml"                       # a run file, perhaps with [simulate]; keys below change it, seeds its seed
    set = { "inner.steps" = 50 }             # in all arms
    [[arm]]
    name = "drop 50 %"
    set = { "simulate.drop" = 0.5 }
    [quick]                                  # --quick: smaller
    seeds = [0]
    set = { "outer.steps" = 10 }
    [large]                                  # --large: for a GPU
    base = "large.toml"

Arms with the same seed start from the same values and, where their replicas have the same names, draw the same batches:
differences between them are paired.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from p2p_diloco.core.digest import digest
from p2p_diloco.core.errors import UsageError
from p2p_diloco.core.manifest import canonical_json
from p2p_diloco.core.paths import beside
from p2p_diloco.core.runfile import RunSpec, Section, explain
from p2p_diloco.core.toml import TomlTable, read_toml
from p2p_diloco.lab.simulated_run import SimulatedRun, listed
from p2p_diloco.learn.hub import END_FILES
from p2p_diloco.learn.source import listing
from p2p_diloco.learn.text import reading, walk
from p2p_diloco.learn.textfiles import text_files

Size = Literal["full", "quick", "large"]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Seeds = Annotated[tuple[Seed, ...], BeforeValidator(listed), Field(min_length=1, max_length=100)]
Keys = dict[str, object]


def check_arm_name(name: str) -> str:
    """Returns ``name``. ValueError where it would break a table in Markdown."""
    if "|" in name or not name.isprintable():
        raise ValueError("a name is one line without |")
    return name


class Arm(Section):
    """One variant of a study's run."""

    name: Annotated[str, Field(min_length=1, max_length=60), AfterValidator(check_arm_name)]
    set: Keys = Field(default_factory=dict)
    """Dotted keys of the run file, or of ``simulate``, and their values."""


class Variation(Section):
    """A smaller or larger size of a study: what is different about it."""

    base: str | None = None
    """Instead of the study's."""
    seeds: Seeds | None = None
    set: Keys = Field(default_factory=dict)
    """After the study's own keys, before the arm's."""


class StudySpec(Section):
    """A study's file."""

    title: str
    paper: str
    """Where the claim stands that this looks at."""
    base: str
    """Path of the run file, relative to this one."""
    seeds: Seeds = (0, 1, 2)
    reference: str
    """The arm that differences are from."""
    gap: Annotated[tuple[str, str], BeforeValidator(listed)] | None = None
    """Two arms: what part of the way from the first one's loss to the second one's do the others go?"""
    set: Keys = Field(default_factory=dict)
    arm: Annotated[tuple[Arm, ...], BeforeValidator(listed), Field(min_length=1)]
    quick: Variation | None = None
    large: Variation | None = None

    @model_validator(mode="after")
    def _known_arms(self) -> StudySpec:
        names = [arm.name for arm in self.arm]
        if len(set(names)) != len(names):
            raise ValueError("two arms have the same name")
        for name in (self.reference, *(self.gap or ())):
            if name not in names:
                raise ValueError(f"there is no arm {name!r}")
        return self


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One simulation of a study: an arm with a seed."""

    arm: str
    seed: int
    what: SimulatedRun
    files: list[list[Any]] = field(default_factory=list)
    """``files_of`` it."""

    @property
    def name(self) -> str:
        """Returns the arm and the seed, in words."""
        return f"{self.arm}, seed {self.seed}"

    @cached_property
    def key(self) -> str:
        """Returns the name of what is simulated: studies that have the same arm have the same simulation, which is
        made once."""
        files = [canonical_json(self.files)] if self.files else []
        what = self.what.model_dump(mode="json")
        if what["run"]["outer"]["aggregate"] == "mean":
            # As before there was another rule: simulations that were made then are still those of their studies.
            del what["run"]["outer"]["aggregate"]
        return digest(b"trial", canonical_json(what), *files)[:8].hex()


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study of one size, and all its simulations."""

    name: str
    spec: StudySpec
    size: Size
    base: Path
    """What the paths of the run file are relative to."""
    trials: tuple[Trial, ...]
    """Seed by seed, so that after the first one all arms can be compared."""

    @classmethod
    def load(cls, path: Path, size: Size) -> Study:
        """Returns the study in a file. Raises UsageError that names file, arm and key."""
        table = read_toml(path, "study")
        try:
            spec = StudySpec.model_validate(table)
        except ValidationError as error:
            raise UsageError(f"{path}: {explain(error, StudySpec)}") from error
        variation = {"full": Variation(), "quick": spec.quick, "large": spec.large}[size]
        if variation is None:
            raise UsageError(f"{path}: has no table [{size}], so no {size} variant")
        run_file = beside(path.parent, variation.base or spec.base, "base")
        base = read_toml(run_file, "run file")
        folder, shared = run_file.parent, [spec.set, variation.set]
        try:
            trials = tuple(
                trial_of(base, arm, seed, [*shared, arm.set], folder, f"{path}: arm {arm.name!r}")
                for seed in variation.seeds or spec.seeds
                for arm in spec.arm
            )
        except UsageError:
            SimulatedRun.parse(base, str(run_file))  # what is wrong there is no arm's fault
            raise
        return cls(name=path.stem, spec=spec, size=size, base=folder, trials=trials)


def trial_of(base: TomlTable, arm: Arm, seed: int, changes: list[Keys], folder: Path, source: str) -> Trial:
    """Returns one simulation: ``base`` with the changes, in their order. UsageError that names ``source`` and the
    key."""
    table = copy.deepcopy(dict(base))
    for keys in changes:
        if "seed" in keys:
            raise UsageError(f"{source}: key 'seed' cannot be set; give seeds = [...]")
        for key, value in keys.items():
            change(table, key, value, source)
    what = SimulatedRun.parse({**table, "seed": seed}, source)
    return Trial(arm=arm.name, seed=seed, what=what, files=files_of(what.run, folder))


def files_of(spec: RunSpec, folder: Path) -> list[list[Any]]:
    """Returns where the files and folders are that the run file names, relative to ``folder``, and the size and time of
    all that is in them: with these, it is another simulation. Raises DataError."""
    data, found = spec.data, []
    tokenizer = None if data.tokenizer == "bytes" else data.tokenizer
    named = {"data.path": data.path, "model.path": spec.model.path, "data.tokenizer": tokenizer}
    for key, path in ((key, beside(folder, name, key)) for key, name in named.items() if name is not None):
        with reading(str(path)):
            if not path.exists():
                continue
            if key == "data.path" and data.source == "path":
                files = text_files(path).listing()  # follows links, as who reads the text does
            elif path.is_dir():
                files = listing(path, walk(path))
            else:  # what names a tokenizer's end token lies beside it
                more = [path.with_name(name) for name in END_FILES] if key == "data.tokenizer" else []
                files = listing(path.parent, [path, *(file for file in more if file.is_file())])
            found.append([str(path.resolve()), files])
    return found


def change(table: dict[str, object], key: str, value: object, source: str) -> None:
    """Sets a dotted key. UsageError where it goes through something that is no table."""
    *sections, last = key.split(".")
    for section in sections:
        inner = table.setdefault(section, {})
        if not isinstance(inner, dict):
            raise UsageError(f"{source}: key {key!r}: {section!r} is not a table")
        table = inner
    table[last] = value
