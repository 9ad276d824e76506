"""What the wheel has in it: an editable install, which is what tests run with, hides what is missing there."""

from __future__ import annotations

import zipfile
from pathlib import Path

from tests.support.wheel import ROOT, build_wheel


def test_every_file_of_the_package_is_in_the_wheel_and_nothing_else(tmp_path: Path) -> None:
    there = {str(path.relative_to(ROOT)) for path in (ROOT / "p2p_diloco").rglob("*") if path.is_file()}
    expected = {name for name in there if "__pycache__" not in name}
    with zipfile.ZipFile(build_wheel(tmp_path)) as wheel:
        names = set(wheel.namelist())
    about = {name for name in names if ".dist-info/" in name}
    assert names - about == expected
    assert {"p2p_diloco/py.typed", "p2p_diloco/look/page/index.html", "p2p_diloco/wire/guard.py"} <= names
    assert {name.rpartition("/")[2] for name in about} >= {"METADATA", "entry_points.txt", "LICENSE"}
