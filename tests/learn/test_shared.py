from __future__ import annotations

import os

import numpy as np
import pytest

from p2p_diloco.learn.shared import anonymous_memory, shared_vectors


@pytest.fixture(params=[True, False], ids=["memfd", "a file that is gone"])
def descriptor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    if not request.param:
        monkeypatch.delattr(os, "memfd_create")
    return anonymous_memory()


def test_two_processes_have_the_same_vectors(descriptor: int) -> None:
    os.ftruncate(descriptor, 2 * 4 * 5)
    assert not os.get_inheritable(descriptor)
    theta, local = shared_vectors(descriptor, 5)
    _, theirs = shared_vectors(descriptor, 5)
    local[:] = np.arange(5)
    np.testing.assert_array_equal(theirs, np.arange(5, dtype=np.float32))
    np.testing.assert_array_equal(theta, np.zeros(5, np.float32))
    with pytest.raises(ValueError, match="read-only"):
        theta[0] = 1
    os.close(descriptor)
    local[:] = 7  # the memory outlives its descriptor
    np.testing.assert_array_equal(theirs, local)
