"""What a run computes stays what it is, bit for bit: see ``golden``.

The file is never made anew to make a change pass.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest

from tests.golden import FAULTY, GOLDEN, SIMULATED, in_memory, simulated

WRITTEN_DOWN: dict[str, Any] = json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("case", SIMULATED)
def test_a_simulation_with_given_contributions_comes_to_the_same_bits(case: str) -> None:
    assert [asdict(step) for step in simulated(case)] == WRITTEN_DOWN[case]


@pytest.mark.parametrize("case", FAULTY)
def test_a_swarm_in_memory_comes_to_the_same_bits(case: str) -> None:
    assert [asdict(step) for step in in_memory(case)] == WRITTEN_DOWN[case]


def test_the_cases_differ() -> None:
    assert set(WRITTEN_DOWN) == {*SIMULATED, *FAULTY}
    last = [steps[-1] for steps in WRITTEN_DOWN.values()]
    assert len({step["theta"] for step in last}) == len(last) == len({step["head"] for step in last})
    assert all(len(steps) > 4 for steps in WRITTEN_DOWN.values())
