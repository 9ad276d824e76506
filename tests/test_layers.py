"""The package's shape: imports point one way, and the network side starts without torch."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

import p2p_diloco

PACKAGE = Path(p2p_diloco.__file__).parent
ROOT = PACKAGE.parent

ORDER = (
    *("__init__", "interpreter", "errors", "toml", "paths", "interruption"),
    *("identity", "codec", "outer", "alignment", "manifest", "config", "addresses", "endpoint"),
    *("snapshot", "ledger", "replay", "records", "rounds", "replica"),
    *("textreport", "textfiles", "text", "hub", "tokenizer", "source", "data", "prompt"),
    *("settings", "architecture", "layout", "stored", "model", "rehearsal", "genesis"),
    *("export", "sample", "inner", "totals", "events"),
    *("waiting", "rate", "web", "traffic", "messages", "wire", "quota"),
    *("guard", "kademlia", "hardening", "daemon", "streams", "node", "discovery"),
    *("seat", "company", "gathering", "matchmaking", "meeting", "butterfly"),
    *("settle", "download", "catchup", "uploads", "upkeep", "presence", "probes", "follower", "reception", "peer"),
    *("metrics", "control", "network"),
    *("process", "swarm", "keeper", "train"),
    *("simulation", "variants", "shards", "recount", "checkpoint", "replicas", "simulate"),
    *("study", "report", "experiment", "doctor", "fitness", "trial", "display", "status", "survey", "listener"),
    *("checkup", "summary", "overview", "history", "exposition", "monitor"),
    *("faults", "namespaces", "child", "children", "injector", "local"),
    *("options", "arguments", "facts"),
    *("commands_join", "commands_look", "commands_model", "commands_study", "cli", "__main__"),
)
"""Lowest first. A module imports from those before it, and from no other."""

HEAVY = {"torch", "transformers", "datasets", "huggingface_hub"}


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module}.py").read_text())


def imported(nodes: Iterable[ast.AST]) -> Iterator[tuple[str, int]]:
    """What import statements among ``nodes`` name, with the line: ``hivemind.dht``, ``p2p_diloco.codec``."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            assert node.module is not None
            if node.module == "p2p_diloco":
                yield from ((f"p2p_diloco.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield node.module, node.lineno


def at_module_level(node: ast.AST) -> Iterator[ast.AST]:
    """The statements that run on import: not those in functions or under ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            yield from (deeper for other in child.orelse for deeper in (other, *at_module_level(other)))
            continue
        yield child
        yield from at_module_level(child)


def own(name: str) -> str | None:
    """The module of ours that an import names, if any; a name taken from the package itself is ``__init__``'s."""
    package, _, rest = name.partition(".")
    if package != "p2p_diloco":
        return None
    module = rest.partition(".")[0]
    return module if module in ORDER else "__init__"


def test_every_module_has_its_place() -> None:
    assert len(set(ORDER)) == len(ORDER)
    assert set(ORDER) == {path.stem for path in PACKAGE.glob("*.py")}


@pytest.mark.parametrize("module", ORDER)
def test_imports_point_down(module: str) -> None:
    for name, line in imported(ast.walk(tree_of(module))):
        target = own(name)
        if target is not None:
            assert ORDER.index(target) < ORDER.index(module), f"{module}.py:{line} imports {target}, which is above it"


@pytest.mark.parametrize("module", ORDER[: ORDER.index("kademlia")])
def test_hivemind_starts_at_kademlia(module: str) -> None:
    for name, line in imported(ast.walk(tree_of(module))):
        assert name.partition(".")[0] != "hivemind", f"{module}.py:{line} imports hivemind"


def test_network_side_starts_without_torch() -> None:
    """What the network process imports, which starts before torch is touched, and on a seed, which never needs it."""
    seen, waiting = set(), [("network", "network")]
    while waiting:
        current, path = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        for name, _ in imported(at_module_level(tree_of(current))):
            assert name.partition(".")[0] not in HEAVY, f"{path} -> {name}"
            target = own(name)
            if target is not None:
                waiting.append((target, f"{path} -> {target}"))
    assert {"peer", "node", "ledger", "metrics"} <= seen
    assert not {"architecture", "layout", "model", "source", "data", "train"} & seen


def test_readme_lists_every_file() -> None:
    """One line for each file of the package, under the heading Files, lowest first."""
    readme = (ROOT / "README.md").read_text()
    section = re.search(r"^## Files\n(.*?)(?=^## |\Z)", readme, re.MULTILINE | re.DOTALL)
    assert section is not None, "README.md has no section '## Files'"
    assert tuple(re.findall(r"^\| `(\w+)\.py`", section[1], re.MULTILINE)) == ORDER
    for path in sorted(PACKAGE.glob("*.py")):
        lines = re.findall(rf"^.*(?<!\w){re.escape(path.name)}.*$", section[1], re.MULTILINE)
        assert len(lines) == 1, f"{path.name} is named in {len(lines)} lines"
        assert len(lines[0].partition(path.name)[2].strip(" `|-:")) > 10, f"{path.name}: its line says nothing"


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_text_is_utf8_whatever_the_locale(path: Path) -> None:
    """Who opens a file as text says in what encoding."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        if name in ("read_text", "write_text"):
            assert any(keyword.arg == "encoding" for keyword in node.keywords), f"line {node.lineno}: no encoding"
        elif name == "open" and ast.unparse(function) in ("open", "path.open", "self.path.open", "io.open"):
            modes = [word.value for word in node.args if isinstance(word, ast.Constant)]
            binary = any(isinstance(mode, str) and "b" in mode for mode in modes)
            assert binary or any(word.arg == "encoding" for word in node.keywords), f"line {node.lineno}: no encoding"
