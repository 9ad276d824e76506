"""A model's parameters, and one float32 vector that holds the same values.

The vector has the trainable parameters in the order of ``named_parameters``, tied ones once. A trainer's model belongs
to its vector ``local`` in one of two ways, and nothing else in the package asks which:

    Bound    the parameters lie in ``local``: one memory, nothing to copy. So it is on the CPU
    Copied   the parameters lie elsewhere, on an accelerator, and are copied when somebody asks

Both give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from p2p_diloco.core.codec import Vector
from p2p_diloco.core.digest import digest


@dataclass(frozen=True)
class Layout:
    """Says which values of the vector are which parameter."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    n: int
    """Values in all."""

    @property
    def digest(self) -> str:
        """Returns 32 bytes in hex over names and shapes."""
        return digest(b"layout", *(f"{name} {shape}".encode() for name, shape in zip(self.names, self.shapes))).hex()


def layout_of(model: torch.nn.Module) -> Layout:
    """Returns the layout of the model's trainable parameters."""
    trained = list(trainable(model))
    return Layout(
        names=tuple(name for name, _, _ in trained),
        shapes=tuple(tuple(parameter.shape) for _, parameter, _ in trained),
        n=sum(parameter.numel() for _, parameter, _ in trained),
    )


def trainable(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter, slice]]:
    """Yields name and parameter, and where its values are in the vector."""
    start = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter, slice(start, start + parameter.numel())
            start += parameter.numel()


# -- a trainer's model -------------------------------------------------------------------------------------------------


class Parameters(Protocol):
    """The parameters of a trainer's model. Vectors are float32 [n]."""

    def read(self, out: Vector) -> None:
        """Writes the parameters into ``out``."""

    def write(self, vector: Vector) -> None:
        """Gives the parameters the values of ``vector``."""

    def showing(self, theta: Vector) -> AbstractContextManager[None]:
        """Gives the parameters the values of ``theta`` for the length of the block, then their own again."""


@dataclass(frozen=True, eq=False)
class Bound:
    """Parameters that lie in ``local``. Who changes ``local`` changes the model, and the other way round."""

    local: Vector

    def read(self, out: Vector) -> None:
        if out is not self.local:
            out[:] = self.local

    def write(self, vector: Vector) -> None:
        if vector is not self.local:
            self.local[:] = vector

    @contextmanager
    def showing(self, theta: Vector) -> Iterator[None]:
        own = self.local.copy()
        self.local[:] = theta
        try:
            yield
        finally:
            self.local[:] = own


@dataclass(frozen=True, eq=False)
class Copied:
    """Parameters that lie in memory of their own, on any device."""

    model: torch.nn.Module

    def read(self, out: Vector) -> None:
        read_parameters(self.model, out)

    def write(self, vector: Vector) -> None:
        write_parameters(self.model, vector)

    @contextmanager
    def showing(self, theta: Vector) -> Iterator[None]:
        own: Vector = np.empty(len(theta), np.float32)
        self.read(own)
        self.write(theta)
        try:
            yield
        finally:
            self.write(own)


def tie(model: torch.nn.Module, local: Vector) -> Parameters:
    """Gives the model the values of ``local``, float32 [n], and returns its parameters: ``Bound`` to ``local`` from
    then on where the model is on the CPU, else ``Copied``."""
    if next(model.parameters()).device.type == "cpu":
        bind_parameters(model, local)
        return Bound(local)
    write_parameters(model, local)
    return Copied(model)


def parameters_of(model: torch.nn.Module, local: Vector) -> Parameters:
    """Returns the model's parameters: ``Bound`` where ``tie`` has put them into ``local``, else ``Copied``. A wrapper
    around the tied model has the same parameters."""
    _, first, _ = next(trainable(model))
    tied = first.is_cpu and first.data_ptr() == local.ctypes.data
    return Bound(local) if tied else Copied(model)


# -- any model ---------------------------------------------------------------------------------------------------------


def read_parameters(model: torch.nn.Module, out: Vector) -> None:
    """Writes the values of a model on any device into ``out``, float32 [n]."""
    check_length(model, out)
    for _, parameter, where in trainable(model):
        torch.from_numpy(out[where]).copy_(parameter.detach().reshape(-1))


@torch.no_grad()
def write_parameters(model: torch.nn.Module, vector: Vector) -> None:
    """Gives a model on any device the values of ``vector``, float32 [n]."""
    check_length(model, vector)
    for _, parameter, where in trainable(model):
        values = vector[where] if vector.flags.writeable else vector[where].copy()  # torch warns of read-only memory
        parameter.copy_(torch.from_numpy(values).view(parameter.shape))


def bind_parameters(model: torch.nn.Module, vector: Vector) -> None:
    """Makes every parameter a view of ``vector``, float32 [n], with its values: from then on both are one memory.

    An optimizer that exists keeps its parameters. The model must be on the CPU, or ValueError is raised; moving it away
    ends the binding.
    """
    check_length(model, vector)
    for name, parameter, where in trainable(model):
        if parameter.device.type != "cpu" or parameter.dtype != torch.float32:
            raise ValueError(f"{name} is {parameter.dtype} on {parameter.device}; only float32 on the CPU can be bound")
        parameter.data = torch.from_numpy(vector[where]).view(parameter.shape)


def check_length(model: torch.nn.Module, vector: Vector) -> None:
    """Raises ValueError unless ``vector`` is float32 [n] for this model."""
    n = layout_of(model).n
    if vector.shape != (n,) or vector.dtype != np.float32:
        raise ValueError(f"the model has {n} values, the vector is {vector.dtype} {list(vector.shape)}")
