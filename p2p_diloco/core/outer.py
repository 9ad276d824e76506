"""The outer state, the same bits on every peer, and how an update leads to the next one.

The outer state ``S_t = (theta_t, momentum_t, head_t)`` is the same bits on every peer. An update ``U_t`` is the
averaged outer gradient as it went over the wire. Then ``S_{t+1} = apply(S_t, U_t)`` and
``head_{t+1} = H(head_t, U_t)``, so that 32 bytes name the whole history.

Rules of this file: numpy float32 only, every multiply and every add a ufunc of its own (a fused multiply-add rounds
once instead of twice, and not every processor has it), no BLAS, no reductions in ``apply``, no clock, no I/O.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import blake3
import numpy as np

from p2p_diloco.core.codec import Vector
from p2p_diloco.core.digest import digest
from p2p_diloco.core.grid import Grid, part_slices
from p2p_diloco.core.update import Update, check_parts


@dataclass(kw_only=True)
class OuterState:
    """``S_t``. ``theta`` and ``momentum`` are float32 [n], written in place by ``apply`` and nothing else."""

    step: int
    head: bytes
    theta: Vector
    momentum: Vector

    def chunk_hashes(self) -> tuple[bytes, ...]:
        """Returns blake3 of every part of theta, then of every part of momentum: 1 MiB each, the last one of either
        less."""
        slices = part_slices(len(self.theta))
        return tuple(
            blake3.blake3(vector[where].data.cast("B")).digest()
            for vector in (self.theta, self.momentum)
            for where in slices
        )

    def parts(self) -> list[tuple[Vector, Vector]]:
        """Returns (theta, momentum) of every part: views of the state."""
        return [(self.theta[where], self.momentum[where]) for where in part_slices(len(self.theta))]

    def digest(self) -> bytes:
        """Returns 32 bytes that name all bits of the state: equal digests, equal replicas."""
        return state_digest(self.step, self.head, self.chunk_hashes())


def state_digest(step: int, head: bytes, chunk_hashes: Iterable[bytes]) -> bytes:
    """Returns the digest of a state, as ``OuterState.digest`` does, from the hashes of its chunks. Who trusts it can
    check a list of chunk hashes against it, and then every chunk alone, whoever sends them."""
    return digest(b"state", step.to_bytes(8, "big"), head, *chunk_hashes)


def genesis_state(theta: Vector) -> OuterState:
    """Returns ``S_0``. Its head names theta, so runs that start from other values never share a head."""
    momentum = np.zeros_like(theta)
    head = digest(b"genesis", blake3.blake3(theta.data.cast("B")).digest())
    return OuterState(step=0, head=head, theta=theta, momentum=momentum)


def apply(state: OuterState, update: Update, grid: Grid, *, lr: float, momentum: float) -> None:
    """Makes one Nesterov step in place, as torch.optim.SGD(nesterov=True) does it (DiLoCo, arXiv 2311.08105, algorithm
    1):

    ``m = mu * m + g``; ``theta = theta - lr * (g + mu * m)`` with ``g`` the decoded update.

    Everything is checked before the first value changes. Raises ValueError when the update does not follow from
    ``state``, has the wrong number of parts, or a part does not decode.
    """
    check_update(state, update, grid)
    apply_checked(state, update, grid, lr=lr, momentum=momentum)


def check_update(state: OuterState, update: Update, grid: Grid) -> None:
    """Raises ValueError unless ``update`` can be applied to ``state``. Decodes every part once."""
    header = update.header
    if (header.step, header.parent) != (state.step, state.head):
        raise ValueError(f"update {header.step} does not follow from the state at outer step {state.step}")
    check_parts(update.parts, grid)


def apply_checked(state: OuterState, update: Update, grid: Grid, *, lr: float, momentum: float) -> None:
    """Does what ``apply`` does with an update that ``check_update`` has passed."""
    header = update.header
    for i, (part, (theta, m)) in enumerate(zip(update.parts, state.parts())):
        apply_part(theta, m, grid.decode(i, part.data), lr=lr, momentum=momentum)
    state.step, state.head = header.step + 1, header.head


def apply_part(theta: Vector, m: Vector, g: Vector, *, lr: float, momentum: float) -> None:
    """Does the arithmetic of ``apply`` on one part: theta and its momentum ``m`` change in place; ``g`` is the decoded
    update."""
    lr32, mu32 = np.float32(lr), np.float32(momentum)
    np.multiply(m, mu32, out=m)
    np.add(m, g, out=m)
    nesterov = np.multiply(m, mu32)
    np.add(g, nesterov, out=nesterov)
    np.multiply(nesterov, lr32, out=nesterov)
    np.subtract(theta, nesterov, out=theta)
