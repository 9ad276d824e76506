"""What is simulated: a run file, and the table ``[simulate]`` that only simulations know. Pure.

A file without that table is a run as it is: ``simulate RUN.toml`` does what its swarm would do without any fault.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from p2p_diloco.core.errors import UsageError
from p2p_diloco.core.runfile import Fraction, OnMissed, RunSpec, Section, explain
from p2p_diloco.core.toml import TomlTable, read_toml

Replicas = Annotated[int, Field(gt=0, le=100)]
Speed = Annotated[float, Field(gt=0, le=1)]


def listed(value: Any) -> Any:
    """Returns a tuple of what a TOML file has as a list, or as a single value."""
    return tuple(value) if isinstance(value, list) else (value,) if isinstance(value, (int, float)) else value


class SimulationSpec(Section):
    """The table ``[simulate]`` of a run file."""

    replicas: Annotated[tuple[Replicas, ...], BeforeValidator(listed), Field(min_length=1)] = (4,)
    """How many train. A list divides the run into stages of equal length: [1, 2, 4] is a pool that grows."""
    shards: Literal["iid", "non-iid"] = "iid"
    """``iid``: everybody draws from all text. ``non-iid``: everybody has text of its own (``own_texts``). Of a data set
    of the hub, ``data.max_documents`` are everybody's own with ``iid``, and are divided among all with ``non-iid``."""
    speeds: Annotated[tuple[Speed, ...], BeforeValidator(listed)] = ()
    """Of the replicas, in turn, as a share of the fastest's; they make as many fewer inner steps. Empty: all alike."""
    drop: Fraction = 0.0
    """Probability that a contribution is dropped; what becomes of it then is ``round.on_missed``."""
    divisor: Literal["run", "arrived", "all"] = "run"
    """What the sum of the contributions is divided by: the weights of those that ``arrived``, of ``all`` who train, or
    as a ``run`` with this ``on_missed`` does it."""
    outer: Literal["nesterov", "momentum", "adam"] = "nesterov"
    """Rule of the outer step, with ``outer.lr`` and ``outer.momentum`` (Adam's first beta); SGD is momentum 0."""
    adam_beta2: Fraction = 0.95
    adam_eps: Annotated[float, Field(ge=1e-30, allow_inf_nan=False)] = 0.1
    """As the paper found best for its outer Adam (arXiv 2311.08105, section 3.1)."""
    prune: Fraction = 0.0
    """Share of every outer gradient that is left out, by sign and magnitude (``variants.prune``)."""
    quantize: Literal["none", "int2", "int1"] = "none"
    """Below what the codecs of a run offer; the bytes are counted as if it were one (``variants.quantize``)."""
    delay: Annotated[int, Field(ge=0, lt=2**40)] = 0
    """Inner steps by which an update comes late, while all train on (Streaming DiLoCo, arXiv 2501.18512)."""
    merge: Annotated[float, Field(ge=0, le=1)] = 0.5
    """What an update that comes late leaves of the local parameters; the rest is theta."""
    warm_steps: Annotated[int, Field(ge=0, lt=2**40)] = 0
    """Inner steps that one worker makes before, at the full learning rate, from the run's S_0: where all start from."""
    evaluate_every: Annotated[int, Field(gt=0, lt=2**40)] = 1
    """Outer steps between two evaluations of theta; the last one has one in any case."""

    @property
    def most_replicas(self) -> int:
        """Returns how many train at the same time, at most."""
        return max(self.replicas)

    def replicas_at(self, step: int, outer_steps: int) -> int:
        """Returns how many train in outer step ``step``, counted from 0."""
        return self.replicas[min(step * len(self.replicas) // outer_steps, len(self.replicas) - 1)]

    def inner_steps_of(self, replica: int, inner_steps: int) -> int:
        """Returns the inner steps that the replica makes while the fastest one makes ``inner_steps``; at least one."""
        return max(1, round(inner_steps * self.speeds[replica % len(self.speeds)])) if self.speeds else inner_steps

    def divided_by(self, on_missed: OnMissed) -> OnMissed:
        """Returns the policy by whose rule the sum is divided: ``adopt`` by those that arrived, ``keep`` by all."""
        policies: dict[str, OnMissed] = {"arrived": "adopt", "all": "keep"}
        return policies.get(self.divisor, on_missed)


class SimulatedRun(Section):
    """A run, and what is different about it in a simulation."""

    run: RunSpec
    simulate: SimulationSpec = SimulationSpec()

    @model_validator(mode="after")
    def _fitting(self) -> SimulatedRun:
        if self.simulate.delay >= self.run.inner.steps:
            raise ValueError(f"simulate.delay: {self.simulate.delay} is not below inner.steps")
        if self.run.round.max_group < self.simulate.most_replicas:
            raise ValueError(f"simulate.replicas: more than round.max_group, {self.run.round.max_group}")
        return self

    @classmethod
    def load(cls, path: Path) -> SimulatedRun:
        """Returns what a run file says. Raises UsageError that names file and key."""
        return cls.parse(read_toml(path, "run file"), str(path))

    def with_flags(self, *, replicas: int | None, drop: float | None) -> SimulatedRun:
        """Returns it with what the command line gives, which comes before the file. Raises UsageError."""
        given = {"replicas": None if replicas is None else (replicas,), "drop": drop}
        changed = {key: value for key, value in given.items() if value is not None}
        simulate = {**self.simulate.model_dump(), **changed}
        return self.parse({**self.run.model_dump(), "simulate": simulate}, "command line")

    @classmethod
    def parse(cls, table: TomlTable, source: str) -> SimulatedRun:
        """Returns what a table says. ``table``: a run file's, perhaps with ``simulate``. Raises UsageError that names
        ``source`` and the key."""
        run = {key: value for key, value in table.items() if key != "simulate"}
        try:
            spec = RunSpec.model_validate(run)
        except ValidationError as error:
            raise UsageError(f"{source}: {explain(error, RunSpec)}") from error
        try:
            simulate = SimulationSpec.model_validate(table.get("simulate", {}))
        except ValidationError as error:
            raise UsageError(f"{source}: [simulate]: {explain(error, SimulationSpec)}") from error
        try:
            return cls(run=spec, simulate=simulate)
        except ValidationError as error:
            raise UsageError(f"{source}: {explain(error, cls).removeprefix(TOP_LEVEL)}") from error


TOP_LEVEL = "key 'top level': "


def replica_names(count: int) -> list[str]:
    """Returns the names of so many replicas."""
    return [f"replica-{k}" for k in range(1, count + 1)]


def members_at(spec: SimulationSpec, names: Sequence[str], step: int, outer_steps: int) -> list[int]:
    """Returns the indices of those who train in outer step ``step``: the first ones, so who leaves is who came last."""
    return list(range(min(spec.replicas_at(step, outer_steps), len(names))))
