"""The package's shape: imports point one way, hivemind stays in one room, and the network side starts without torch."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

import p2p_diloco

PACKAGE = Path(p2p_diloco.__file__).parent

ROOMS = ("core", "ledger", "wire", "round", "peer", "learn", "look", "lab", "cli")
"""A package imports from those before it, and from no other."""
MODULES = sorted(path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.glob("*/*.py"))
"""``core/codec``, ``core/__init__``, ... Beside them there are the package's own ``__init__`` and ``__main__``."""
FILES = [module for module in MODULES if not module.endswith("__init__")]

HEAVY = {"torch", "transformers", "datasets", "huggingface_hub"}


def is_heavy(name: str) -> bool:
    """Whether an import needs one of them: ``safetensors.torch`` does."""
    return not HEAVY.isdisjoint(name.split("."))


def room_of(module: str) -> str:
    return module.partition("/")[0]


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))


def imported(nodes: Iterable[ast.AST]) -> Iterator[tuple[str, int]]:
    """What import statements among ``nodes`` name, with the line: ``hivemind.dht``, ``core/codec``."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((own(alias.name) or alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            assert node.module is not None
            if node.module == "p2p_diloco" or node.module in {f"p2p_diloco.{room}" for room in ROOMS}:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                names = [node.module]
            yield from ((own(name) or name, node.lineno) for name in names)


def own(name: str) -> str | None:
    """The file of ours that a dotted name leads to, if any; what the package itself has is ``__init__``'s."""
    package, *parts = name.split(".")
    if package != "p2p_diloco":
        return None
    if len(parts) < 2 or parts[0] not in ROOMS:
        return "__init__"
    file = f"{parts[0]}/{parts[1]}"
    return file if file in MODULES else f"{parts[0]}/__init__"


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


def test_every_file_is_in_a_room() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", "__main__"}
    assert {path.parent.name for path in PACKAGE.glob("*/*.py")} == set(ROOMS)
    assert len(MODULES) == len(list(PACKAGE.rglob("*.py"))) - 2


@pytest.mark.parametrize("module", FILES)
def test_imports_point_to_rooms_below(module: str) -> None:
    """Also those inside functions, and those for types alone."""
    for name, line in imported(ast.walk(tree_of(module))):
        if name in MODULES:
            here, there = room_of(module), room_of(name)
            assert ROOMS.index(there) <= ROOMS.index(here), f"{module}.py:{line} imports {name}, which is above it"


@pytest.mark.parametrize("module", FILES)
def test_the_librarys_names_are_for_others(module: str) -> None:
    """The package itself takes them from their files: ``p2p_diloco`` has names of all rooms."""
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.ImportFrom) and node.module == "p2p_diloco":
            taken = [alias.name for alias in node.names]
            assert taken == ["__version__"], f"{module}.py:{node.lineno} imports {taken}"
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.partition(".")[0] == "p2p_diloco"]
            assert names == [], f"{module}.py:{node.lineno} imports {names}"


@pytest.mark.parametrize("module", FILES)
def test_nothing_is_imported_by_a_name_in_a_text(module: str) -> None:
    """No other test here would see it."""
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("import_module", "__import__"):
            names = [word.value for word in node.args if isinstance(word, ast.Constant)]
            assert names == [], f"{module}.py:{node.lineno} imports {names}"


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_imports_in_a_circle(room: str) -> None:
    inside = {module: set[str]() for module in FILES if room_of(module) == room}
    for module, names in inside.items():
        names |= {name for name, _ in imported(ast.walk(tree_of(module))) if name in inside}
    while free := [module for module, names in inside.items() if not names]:
        for module in free:
            del inside[module]
        for names in inside.values():
            names -= set(free)
    assert not inside, f"these import each other: {inside}"


@pytest.mark.parametrize("module", FILES)
def test_hivemind_stays_in_wire(module: str) -> None:
    for name, line in imported(ast.walk(tree_of(module))):
        if room_of(module) != "wire":
            assert name.partition(".")[0] != "hivemind", f"{module}.py:{line} imports hivemind"


@pytest.mark.parametrize("module", FILES)
def test_torch_begins_at_learn(module: str) -> None:
    if ROOMS.index(room_of(module)) < ROOMS.index("learn"):
        for name, line in imported(ast.walk(tree_of(module))):
            assert not is_heavy(name), f"{module}.py:{line} imports {name}"


def test_network_side_starts_without_torch() -> None:
    """What the network process imports, which starts before torch is touched, and on a seed, which never needs it."""
    seen, waiting = set[str](), [("peer/network", "peer/network")]
    while waiting:
        current, path = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        for name, _ in imported(at_module_level(tree_of(current))):
            assert not is_heavy(name), f"{path} -> {name}"
            if name in MODULES or name == "__init__":
                waiting.append((name, f"{path} -> {name}"))
    assert {"peer/peer", "wire/node", "ledger/ledger", "peer/metrics"} <= seen
    assert not {module for module in seen if room_of(module) in ("learn", "look", "lab", "cli")}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_its_files_are(room: str) -> None:
    """Its ``__init__`` is a docstring, with a line for each file."""
    tree = tree_of(f"{room}/__init__")
    docstring = ast.get_docstring(tree)
    assert docstring is not None
    assert len(tree.body) == 1, "nothing but the docstring"
    listed = re.findall(r"^    (\w+)  +\S.{9,}$", docstring, re.MULTILINE)
    assert sorted(listed) == sorted(module.partition("/")[2] for module in FILES if room_of(module) == room)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
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


NO_VERBS = {"Always", "As", "Bytes", "Is", "Its", "Perhaps", "Seconds", "Steps", "This", "Tokens", "Unless"}


@pytest.mark.parametrize("module", FILES)
def test_the_docstring_of_a_function_begins_with_a_sentence(module: str) -> None:
    """Whose verb comes first: Returns ..., Tells ..., Waits ... That of a command is its help, and says: Make ..."""
    for node in ast.walk(tree_of(module)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        docstring = ast.get_docstring(node)
        if docstring is not None and (module, node.name) not in commands():
            first = docstring.split(maxsplit=1)[0].rstrip(",:;.")
            verb = re.fullmatch(r"[A-Z][a-z]+s", first) and first not in NO_VERBS
            assert verb, f"{module}.py:{node.lineno} {node.name}: {first} ..."


@cache
def commands() -> frozenset[tuple[str, str]]:
    """Returns (module, function) of every command: the command line takes them from ``commands_*``."""
    taken = [node for node in tree_of("cli/cli").body if isinstance(node, ast.ImportFrom)]
    found = ((own(node.module or ""), alias.name) for node in taken for alias in node.names)
    return frozenset((module, name) for module, name in found if module and module.startswith("cli/commands_"))


def test_docstrings_name_what_there_is() -> None:
    """``module.Name`` in a docstring or comment is what the module has. In small letters it may be a key."""
    stems = {Path(module).name: module for module in FILES}
    for module in FILES:
        for stem, name in re.findall(r"``(\w+)\.([A-Z]\w*)", (PACKAGE / f"{module}.py").read_text(encoding="utf-8")):
            assert stem in stems or stem not in ROOMS, f"{module}.py: {stem} is a package"
            if stem in stems:
                assert name in names_in(stems[stem]), f"{module}.py: ``{stem}.{name}``"


@cache
def names_in(module: str) -> frozenset[str]:
    """Returns what a module binds at its top level, its imports left out."""
    found: set[str] = set()
    for node in tree_of(module).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return frozenset(found)
