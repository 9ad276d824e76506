"""The table of what is mutated names what is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutated import TESTS

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("path", TESTS)
def test_a_mutated_file_and_its_tests_are_there(path: str) -> None:
    assert (ROOT / path).is_file()
    for argument in TESTS[path]:
        file, _, test = argument.removeprefix("--deselect=").partition("::")
        assert f"def {test}" in (ROOT / file).read_text()
