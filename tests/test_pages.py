"""The pages say what the program does: README and docs/ against the command line, the models and the messages.

A flag, a key or a message *stands on* a page where a row of a table defines it; other mentions, in prose or examples,
are free. Tables are told by the first cell of their head:

    flag of `peer`           the flags of one command, or those *of every command*. A row may name several, and may say
                             that they are as another command's
    key of `[data]`          the keys of one table of a file that a person writes; their second cell is the default
    key of a run file        those outside all tables: of a run file, a file of faults, a study
    message, what to do      what the program says, word for word, with ``...`` or ``N`` where it differs

Every flag and key has exactly one such row, on whatever page, and no row names what does not exist. Messages cannot be
counted so: every row's has to be in the code, and whatever the log warns of or ends a peer for its network or its disk
has to have a row. docs/log.md is history, and may name what is gone.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from pydantic import BaseModel

from p2p_diloco.cli.cli import app
from p2p_diloco.cli.options import NODE, Patience
from p2p_diloco.core.codecs import CODECS
from p2p_diloco.core.event import Event
from p2p_diloco.core.records import Phase
from p2p_diloco.core.runfile import ModelSpec, RunSpec, Section
from p2p_diloco.core.toml import read_toml
from p2p_diloco.lab.faults import FaultPlan
from p2p_diloco.lab.simulated_run import SimulationSpec
from p2p_diloco.lab.study import StudySpec
from tests.support.pages import (
    HISTORY,
    PAGES,
    PLACEHOLDER,
    README,
    ROOT,
    Row,
    anchors,
    code_blocks,
    commands_shown,
    links,
    literal_pieces,
    named_in,
    page_name,
    pattern_of,
    prose,
    rows_about,
    rows_under,
    text_of,
    texts_of,
)

PACKAGE = ROOT / "p2p_diloco"
SOURCES = sorted(PACKAGE.rglob("*.py"))
LIVING = [page for page in PAGES if page != HISTORY]
MOST_LINES = 200
LEAST_LETTERS = 8
"""Of a message: fewer could be found anywhere."""
REQUIRED = "must be given"
NO_DEFAULT = "none"
TROUBLES = {"warning", "error", "NetworkError", "LedgerError", "Gap"}
"""Calls whose first argument people have to understand: of a log, or of an exception that ends a peer."""
FILE_ENDINGS = {"json", "jsonl", "key", "toml", "py", "md", "log", "safetensors", "js", "css", "html"}


# -- the pages among themselves ----------------------------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_every_page_is_reached_from_the_readme() -> None:
    reached, new = {README}, [README]
    while new:
        page = new.pop()
        targets = {(page.parent / link.partition("#")[0]).resolve() for link in links(page)}
        found = [other for other in PAGES if other in targets - reached]
        reached.update(found)
        new += found
    assert reached == set(PAGES)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_and_anchors_resolve(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


# -- flags -------------------------------------------------------------------------------------------------------------


def flags_of(command: str) -> set[str]:
    arguments = app[command].assemble_argument_collection()
    return {name for argument in arguments for name in argument.names if name.startswith("-")}


COMMANDS = [name for name in app if not name.startswith("-")]
ALL_FLAGS = {command: flags_of(command) for command in COMMANDS}
SHARED = set.intersection(*ALL_FLAGS.values())
META = {*app.help_flags, *app.version_flags}
FLAGS = {
    "every command": SHARED | META,
    **{f"`{command}`": flags - SHARED for command, flags in ALL_FLAGS.items()},
}
"""What stands in the head of a table -> the flags that have to be in it."""


def flags_in(cell: str) -> list[str]:
    """``--peers N`` names --peers."""
    return [flag for span in named_in(cell) for flag in re.findall(r"(?<!\S)--?[a-z][a-z-]*", span)]


@pytest.mark.parametrize("whose", FLAGS)
def test_every_flag_stands_on_one_page(whose: str) -> None:
    standing = Counter(flag for row in rows_under(f"flag of {whose}") for flag in flags_in(row.cells[0]))
    assert standing == Counter(FLAGS[whose])


def test_tables_of_flags_are_of_commands() -> None:
    assert {row.head[0].removeprefix("flag of ") for row in rows_about("flag of ")} == set(FLAGS)


@pytest.mark.parametrize("page", LIVING, ids=page_name)
def test_commands_that_are_shown_exist(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for shown in commands_shown(page):
        program, command, *words = shown.split()
        if program == "make":
            assert command in targets, shown
        elif command != "COMMAND" and command not in META:
            assert command in COMMANDS, shown
            assert {word for word in words if word.startswith("--")} <= ALL_FLAGS[command] | META, shown


# -- keys --------------------------------------------------------------------------------------------------------------


def inner_sections(model: type[BaseModel]) -> Iterator[tuple[str, type[Section]]]:
    """What the tables below ``model`` are called, as in ``[data]`` or ``[[arm]]``, and their models."""
    for name, field in model.model_fields.items():
        shown = f"`[[{name}]]`" if get_origin(field.annotation) in (list, tuple) else f"`[{name}]`"
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, Section):
                yield shown, kind


FILES: dict[str, type[Section]] = {"a run file": RunSpec, "a file of faults": FaultPlan, "a study": StudySpec}
TABLES: dict[str, type[Section]] = {
    **FILES,
    **{name: model for file in FILES.values() for name, model in inner_sections(file)},
    "`[simulate]`": SimulationSpec,
}
"""What stands in the head of a table -> the model of its keys."""


def keys_of(whose: str) -> set[str]:
    """Without those that are tables of keys themselves: these have heads of their own."""
    model = TABLES[whose]
    inner = {name.strip("`[]") for name, _ in inner_sections(model)}
    return set(model.model_fields) - inner


def whose_keys(head: str) -> list[str]:
    """*key of `[quick]`, `[large]`* is of both."""
    return head.removeprefix("key of ").split(", ")


KEY_ROWS = [(whose, row) for row in rows_about("key of ") for whose in whose_keys(row.head[0])]


@pytest.mark.parametrize("whose", TABLES)
def test_every_key_stands_on_one_page(whose: str) -> None:
    standing = Counter(key for other, row in KEY_ROWS if other == whose for key in named_in(row.cells[0]))
    assert standing == Counter(keys_of(whose))


def test_tables_of_keys_are_of_files_that_people_write() -> None:
    assert {whose for whose, _ in KEY_ROWS} == set(TABLES)


@pytest.mark.parametrize(("whose", "row"), KEY_ROWS, ids=lambda value: value if isinstance(value, str) else "")
def test_defaults_are_those_of_the_code(whose: str, row: Row, tmp_path: Path) -> None:
    for key in named_in(row.cells[0]):
        field = TABLES[whose].model_fields[key]
        said = row.cells[1]
        if said in (REQUIRED, NO_DEFAULT):
            assert field.is_required() == (said == REQUIRED), key
            assert said == REQUIRED or field.default is None, key
            continue
        value = taken(f"value = {said.strip('`')}", tmp_path)["value"]
        assert value == as_written(field.get_default(call_default_factory=True)), key


def taken(toml: str, folder: Path) -> Mapping[str, Any]:
    (folder / "example.toml").write_text(toml, encoding="utf-8")
    return read_toml(folder / "example.toml", "example")


@pytest.mark.parametrize(("whose", "row"), KEY_ROWS, ids=lambda value: value if isinstance(value, str) else "")
def test_all_choices_of_a_key_are_named(whose: str, row: Row) -> None:
    for key in named_in(row.cells[0]):
        field = TABLES[whose].model_fields[key]
        choices = list(CODECS) if key == "codec" else [*literals(field.annotation)]
        assert [choice for choice in choices if f'`"{choice}"`' not in " ".join(row.cells[1:])] == []


def literals(annotation: Any) -> Iterator[str]:
    """Of ``Literal["a", "b"]``, or of that in a union."""
    for part in get_args(annotation):
        if isinstance(part, str):
            yield part
        else:
            yield from literals(part)


def as_written(default: Any) -> Any:
    """A tuple is a list in TOML, and a single entry may stand alone."""
    if not isinstance(default, tuple):
        return default
    return default[0] if len(default) == 1 else list(default)


def test_examples_of_files_are_taken(tmp_path: Path) -> None:
    """Every block of TOML on a page is a whole file, some tables of a run file, or options of `peer`."""
    blocks = [text for page in LIVING for language, text in code_blocks(page) if language == "toml"]
    examples = [taken(text, tmp_path) for text in blocks]
    assert examples
    for example in examples:
        if "fault" in example:
            FaultPlan.model_validate(example)
        elif "arm" in example:
            StudySpec.model_validate(example)
        elif set(example) & set(RunSpec.model_fields) - {"name"}:
            model = ModelSpec(path="hub:owner/name").model_dump()
            RunSpec.model_validate({"name": "example", "model": model, **example})
        else:
            assert {f"--{key}" for key in example} <= ALL_FLAGS["peer"]


# -- messages ----------------------------------------------------------------------------------------------------------

MESSAGE_ROWS = rows_under("message", "what to do")
MESSAGES = [message for row in MESSAGE_ROWS for message in named_in(row.cells[0])]


def letters(text: str) -> int:
    return sum(map(str.isalpha, text))


def test_a_message_stands_in_one_row() -> None:
    assert [message for message, count in Counter(MESSAGES).items() if count > 1] == []
    assert len(MESSAGES) == len(MESSAGE_ROWS)


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_one_of_the_code(message: str) -> None:
    assert letters("".join(literal_pieces(message))) >= LEAST_LETTERS
    assert any(pattern_of(message).search(text) for path in SOURCES for text in texts_of(path))


def troubles() -> Iterator[str]:
    """What the log warns of, and what ends a peer for its network or its disk; without those that are all values."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and node.args and called(node.func) in TROUBLES:
                text = text_of(node.args[0])
                if text is not None and letters(re.sub("%[a-z]", "", text)) >= LEAST_LETTERS:
                    yield text


def called(function: ast.expr) -> str:
    """The last name of what is called."""
    return getattr(function, "attr", "") or getattr(function, "id", "")


def test_what_people_are_warned_of_is_explained() -> None:
    assert [
        text.replace(PLACEHOLDER, "...")
        for text in troubles()
        if not any(pattern_of(message).search(text) for message in MESSAGES)
    ] == []


@pytest.mark.parametrize(
    ("head", "there"),
    [
        (("event", "when, and what it tells"), [kind.event for kind in get_args(Event)]),
        (("phase", "what the peer does"), get_args(Phase)),
    ],
    ids=["events", "phases"],
)
def test_events_and_phases_are_those_of_the_code(head: tuple[str, str], there: Sequence[str]) -> None:
    named = [name for row in rows_under(*head) for name in named_in(row.cells[0])]
    assert sorted(named) == sorted(there)


def test_the_range_of_patience_is_told() -> None:
    """It stands in the text of its row, where no other test looks."""
    (allowed,) = Patience.__metadata__[0].validator  # type: ignore[attr-defined]
    said = f"{allowed.gte:g} to {allowed.lte:g} (default {NODE.patience:g})"
    assert said in (ROOT / "docs" / "join.md").read_text(encoding="utf-8")


# -- what is named of the code -----------------------------------------------------------------------------------------

FOLDERS = ("p2p_diloco", "tests", "peers", "docs", "monitoring", "benchmarks")
IN_FOLDERS = re.compile(rf"(?<![\w/.-])(?:{'|'.join(FOLDERS)})/[\w./*-]*[\w/*]")
MODULES = [path for path in SOURCES if path.stem != "__init__"]


@pytest.mark.parametrize("page", LIVING, ids=page_name)
def test_paths_exist(page: Path) -> None:
    for path in IN_FOLDERS.findall(page.read_text(encoding="utf-8")):
        assert any(ROOT.glob(path.rstrip("/"))), path
    for span in (span for line in prose(page) for span in named_in(line)):
        if re.fullmatch(r"\w+\.py", span):  # without its folder
            assert any(found for folder in FOLDERS for found in (ROOT / folder).rglob(span)), span


@pytest.mark.parametrize("page", LIVING, ids=page_name)
def test_names_in_modules_exist(page: Path) -> None:
    """`config.Timeouts` is there; a key, as `round.on_missed`, is told by the models."""
    for span in (span for line in prose(page) for span in named_in(line)):
        match = re.fullmatch(r"([a-z_]+)\.(\w+)", span)
        if match is None or match[2] in FILE_ENDINGS:
            continue
        section, modules = TABLES.get(f"`[{match[1]}]`"), [path for path in MODULES if path.stem == match[1]]
        is_key = section is not None and match[2] in section.model_fields
        assert is_key or not modules or any(match[2] in defined_in(path) for path in modules), span


def defined_in(path: Path) -> set[str]:
    """Names at the top of a file."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names
