"""What only experiments do to an outer gradient, or with it: pruning, two bits and one, other outer optimizers.

Rules of this file: numpy float32, as in ``outer``; no clock, no I/O. None of it is part of a run: a study needs
something to compare with.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from p2p_diloco.core.codec import Vector
from p2p_diloco.core.grid import Grid
from p2p_diloco.core.outer import OuterState, apply_checked, check_update
from p2p_diloco.core.update import Update
from p2p_diloco.lab.simulated_run import SimulationSpec
from p2p_diloco.learn.parameters import Layout

BLOCK = 64
"""Values with a scale of their own, as in int4."""


def prune(gradient: Vector, layout: Layout, share: float) -> None:
    """Zeroes, in place, ``share`` of each neuron's values (a row of a matrix; a vector is one neuron).

    The sign that has more of the neuron's magnitude is elected, as in TIES-Merging (arXiv 2306.01708, section 4), from
    which the paper takes its pruning; values of the other sign go first, then those of the smallest magnitude.
    """
    start = 0
    for shape in layout.shapes:
        n = int(np.prod(shape))
        rows = gradient[start : start + n].reshape(shape[0] if len(shape) > 1 else 1, -1)  # a view
        start += n
        pruned = round(share * rows.shape[1])
        if not pruned:
            continue
        elected = np.where(rows.sum(axis=1, keepdims=True) >= 0, 1, -1)
        agrees = rows * elected > 0
        order = np.where(agrees, np.abs(rows), -1 / (1 + np.abs(rows)))  # all of the other sign below all of this one
        out = np.argpartition(order, pruned - 1, axis=1)[:, :pruned]
        np.put_along_axis(rows, out, np.float32(0), axis=1)


def quantize(values: Vector, bits: str) -> Vector:
    """Returns float32 [n] as it comes back from two bits or one a value, in blocks of 64 with a scale each.

    int2: -1, 0 or 1 times the largest magnitude of the block. int1: the sign times the block's mean magnitude.
    """
    n = len(values)
    blocks = np.pad(values, (0, -n % BLOCK)).reshape(-1, BLOCK)
    magnitudes = np.abs(blocks)
    if bits == "int2":
        scales = magnitudes.max(axis=1, keepdims=True)
        levels = np.rint(np.divide(blocks, scales, out=np.zeros_like(blocks), where=scales > 0))
    else:
        scales, levels = magnitudes.mean(axis=1, keepdims=True), np.sign(blocks)
    quantized: Vector = (levels * scales).astype(np.float32).reshape(-1)[:n]
    return quantized


BITS = {"int2": 2, "int1": 1}


def quantized_bytes(n: int, bits: str) -> int:
    """Returns the bytes that ``n`` values would take: the integers, and a float32 scale a block."""
    return -(-n * BITS[bits] // 8) + 4 * -(-n // BLOCK)


@dataclass(kw_only=True)
class OuterRule:
    """Says how a simulation makes an outer step. ``nesterov`` is a peer's own; ``second`` is Adam's second moment."""

    spec: SimulationSpec
    grid: Grid
    lr: float
    momentum: float
    second: Vector

    def step(self, state: OuterState, update: Update) -> None:
        """Makes ``state`` the next one, in place. ValueError when the update does not follow from it."""
        check_update(state, update, self.grid)
        if self.spec.outer == "nesterov":
            apply_checked(state, update, self.grid, lr=self.lr, momentum=self.momentum)
            return
        for i, (part, where) in enumerate(zip(update.parts, self.grid.slices)):
            g = self.grid.decode(i, part.data)
            theta, m, v = state.theta[where], state.momentum[where], self.second[where]
            if self.spec.outer == "momentum":
                m[:] = np.float32(self.momentum) * m + g
                theta -= np.float32(self.lr) * m
            else:
                beta1, beta2, count = self.momentum, self.spec.adam_beta2, state.step + 1
                m[:] = np.float32(beta1) * m + np.float32(1 - beta1) * g
                v[:] = np.float32(beta2) * v + np.float32(1 - beta2) * g * g
                denominator = np.sqrt(v / np.float32(1 - beta2**count)) + np.float32(self.spec.adam_eps)
                theta -= np.float32(self.lr / (1 - beta1**count)) * m / denominator
        state.step, state.head = update.header.step + 1, update.header.head
