"""What the wheel has in it, and what it asks for: an editable install, which tests run with, hides what is missing."""

from __future__ import annotations

import ast
import re
import sys
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

from p2p_diloco.core.toml import read_toml
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


def test_what_is_imported_is_a_dependency() -> None:
    """Named, and not only there because another one needs it today."""
    project: Any = read_toml(ROOT / "pyproject.toml", "project")["project"]
    extras = [one for name, needed in project["optional-dependencies"].items() if name != "dev" for one in needed]
    named = {canonical(re.split(r"[^\w-]", one)[0]) for one in [*project["dependencies"], *extras]}
    imported = set[str]()
    for path in (ROOT / "p2p_diloco").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                imported.add(node.module.partition(".")[0])
    there = packages_distributions()
    others = imported - set(sys.stdlib_module_names) - {"p2p_diloco", "_typeshed"}
    assert {"torch", "hivemind", "h11"} <= others
    assert [name for name in sorted(others) if named.isdisjoint(map(canonical, there.get(name, [name])))] == []


def canonical(name: str) -> str:
    """A distribution's name, as different spellings of it have it."""
    return name.lower().replace("_", "-")
