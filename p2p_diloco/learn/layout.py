"""A model's parameters <-> one float32 vector.

The vector holds the trainable parameters in the order of ``named_parameters``, tied ones once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from p2p_diloco.core.codec import Vector
from p2p_diloco.core.digest import digest


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
