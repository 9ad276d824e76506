"""The library: its names, what they cost to import, and that its page and its example use nothing else."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import p2p_diloco
from tests.support.scripted import ScriptedNetwork, joined, scripted_manifest

PACKAGE = Path(p2p_diloco.__file__).parent
ROOT = PACKAGE.parent
EXAMPLE = (ROOT / "peers" / "custom_loop.py").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
CODE = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)

HEAVY = {"torch", "transformers", "hivemind"}
LIGHT_NAMES = (
    *("LocalError", "NetworkError", "OuterResult", "PeerConfig", "RunManifest", "RunSpec"),
    *("Swarm", "Timeouts", "UsageError", "load_run"),
)
"""What a program may name that starts no training. The others need torch, or files that do."""


def rows_of(first: str) -> list[str]:
    """The names in the first column of the page's table whose heading there is ``first``."""
    table = re.search(rf"^\| {first} \|.*\n\|[-|]+\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    assert table is not None
    cells = [line.split("|")[1] for line in table[1].splitlines()]
    return [name for cell in cells for name in re.findall(r"`(\w+)", cell)]


def modules_after(code: str) -> set[str]:
    """Names of all that a new Python has loaded after ``code``."""
    shown = f"{code}; import sys; print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", shown], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    return set(output.split())


# -- the names ---------------------------------------------------------------------------------------------------------


def test_the_page_has_every_name_of_the_library_and_no_other() -> None:
    assert sorted(rows_of("name")) == p2p_diloco.__all__
    assert len(CODE) == 1


def test_what_the_page_says_of_a_swarm_is_there(tmp_path: Path) -> None:
    members, manifest = rows_of("member"), scripted_manifest()
    assert {"theta", "load_into", "report", "outer_step_due", "outer_step"} <= set(members)
    with joined(ScriptedNetwork(manifest), manifest, tmp_path) as swarm:
        assert [name for name in members if not hasattr(swarm, name)] == []


@pytest.mark.parametrize("name", p2p_diloco.__all__)
def test_a_name_is_what_its_file_has_and_says_what_it_is(name: str) -> None:
    found = getattr(p2p_diloco, name)
    assert found.__name__ == name
    assert found.__module__ == f"p2p_diloco.{p2p_diloco._HOMES[name]}"
    first = (found.__doc__ or "").strip().split("\n\n")[0]
    assert re.match(r"[A-Z].*[.]", first, re.DOTALL), f"{name}: {first}"


def test_a_type_checker_finds_the_names_where_they_are_at_run_time() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module != "importlib"]
    told = {alias.name: node.module for node in imports for alias in node.names}
    assert told == {name: f"p2p_diloco.{home}" for name, home in p2p_diloco._HOMES.items()}
    assert sorted(told) == p2p_diloco.__all__
    assert (PACKAGE / "py.typed").is_file()


def test_names_are_listed_before_they_are_used_and_others_are_refused() -> None:
    assert set(p2p_diloco.__all__) | {"__version__"} <= set(dir(p2p_diloco))
    with pytest.raises(AttributeError, match=r"no attribute 'Swam'; docs/library\.md lists what it has"):
        _ = p2p_diloco.Swam
    with pytest.raises(ImportError, match="cannot import name 'Swam'"):
        exec("from p2p_diloco import Swam")


# -- what an import costs ----------------------------------------------------------------------------------------------


def test_to_import_the_package_loads_nothing_else() -> None:
    """Not even of Python's own: a ``typing.py`` in the current folder is the user's (``interpreter``)."""
    assert modules_after("import p2p_diloco") - modules_after("pass") == {"p2p_diloco"}


def test_what_starts_no_training_is_there_without_torch() -> None:
    loaded = modules_after(f"from p2p_diloco import {', '.join(LIGHT_NAMES)}")
    assert "p2p_diloco.learn.swarm" in loaded
    assert not HEAVY & loaded


# -- the example -------------------------------------------------------------------------------------------------------


def test_the_page_shows_the_example_as_it_is() -> None:
    assert CODE == [EXAMPLE]


def test_the_example_uses_nothing_but_the_library() -> None:
    taken: set[str] = set()
    for node in ast.walk(ast.parse(EXAMPLE)):
        if isinstance(node, ast.Import):
            assert all(alias.name.partition(".")[0] != "p2p_diloco" for alias in node.names), f"line {node.lineno}"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "p2p_diloco":
            assert node.module == "p2p_diloco", f"line {node.lineno}"
            taken |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute):
            assert not node.attr.startswith("_"), f"line {node.lineno}"
            if isinstance(node.value, ast.Name) and node.value.id == "swarm":
                assert node.attr in rows_of("member"), f"line {node.lineno}"
    assert {"Swarm", "PeerConfig"} <= taken <= set(p2p_diloco.__all__)
