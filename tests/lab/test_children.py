"""What the trainers of a swarm on this machine are given."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2p_diloco.core.runfile import DataSpec
from p2p_diloco.lab.children import text_on_disk


def test_trainers_get_the_text_that_the_run_file_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for folder in ("runs", "home"):
        (tmp_path / folder / "text").mkdir(parents=True)
    base = tmp_path / "runs"
    assert text_on_disk(DataSpec(source="path", path="text"), base) == base / "text"
    assert text_on_disk(DataSpec(source="path", path="~/text"), base) == tmp_path / "home" / "text"
    assert text_on_disk(DataSpec(source="path", path=str(base / "text")), tmp_path) == base / "text"
    assert text_on_disk(DataSpec(source="hub", path="allenai/c4"), base) is None
    assert text_on_disk(DataSpec(), base) is None
