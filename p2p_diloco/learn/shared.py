"""Memory that a trainer and its network process share: theta and local. It has no name, so nothing is left of it
whatever happens."""

from __future__ import annotations

import mmap
import os
import tempfile

import numpy as np

from p2p_diloco.core.codec import Vector


def anonymous_memory() -> int:
    """Returns a descriptor of memory without a name, empty: gone with the last process that has it open."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("p2p-diloco")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.set_inheritable(descriptor, False)
    return descriptor


def shared_vectors(memory: int, n: int) -> tuple[Vector, Vector]:
    """Returns theta, read-only here, and local, float32 [n] each, in the memory behind this descriptor."""
    shared = np.frombuffer(mmap.mmap(memory, 2 * 4 * n), np.float32)
    theta, local = shared[:n], shared[n:]
    theta.flags.writeable = False
    return theta, local
