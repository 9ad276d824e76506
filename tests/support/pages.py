"""The pages of the repository, README and all below docs/, as tests read them: tables, links, anchors, what is code.

A row of a table says what its first cell names: ``named_in`` gives the words in backticks there. What the table is of
stands in its head: *flag of `peer`*, *key of `[data]`*, *message* and *what to do*.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "monitoring" / "README.md"]
HISTORY = ROOT / "docs" / "log.md"
"""Names files and flags as they were when something was measured."""
PLACEHOLDER = "\0"
"""In a text of the code: where a value comes in."""


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@dataclass(frozen=True, kw_only=True)
class Row:
    page: Path
    head: tuple[str, ...]
    """Of the table."""
    cells: tuple[str, ...]


def named_in(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def is_code(line: str) -> bool:
    return line.startswith("    ")


@cache
def prose(page: Path) -> tuple[str, ...]:
    """The lines of a page without its blocks of code."""
    lines, fenced = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced and not is_code(line):
            lines.append(line)
    return tuple(lines)


def code_blocks(page: Path) -> Iterator[tuple[str, str]]:
    """The language, where one is named, and the text of each fenced block."""
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield match[1], match[2]


def commands_shown(page: Path) -> Iterator[str]:
    """What a reader may copy: spans of code, and lines of indented blocks, that begin with ``p2p-diloco`` or ``make``.
    Without the comment at the end."""
    text = page.read_text(encoding="utf-8")
    spans = (span for line in prose(page) for span in named_in(line))
    lines = (line.strip() for line in text.splitlines() if is_code(line))
    for command in (*spans, *lines):
        is_command = re.match(r"(p2p-diloco|make) [a-zA-Z-]+(\s|$)", command) is not None
        if is_command and r"\0" not in command:  # ``p2p-diloco dial consent\0`` is what a signature begins with
            yield re.sub(r"\s+#\s.*", "", command)


@cache
def rows(page: Path) -> tuple[Row, ...]:
    """Of all tables of a page."""
    found: list[Row] = []
    head: tuple[str, ...] = ()
    for line, following in zip(prose(page), (*prose(page)[1:], "")):
        if not line.startswith("|"):
            head = ()
        elif following.startswith(("|---", "| ---")):
            head = cells_of(line)
        elif head and not line.startswith(("|---", "| ---")):
            found.append(Row(page=page, head=head, cells=cells_of(line)))
    return tuple(found)


def cells_of(line: str) -> tuple[str, ...]:
    return tuple(cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|")))


def rows_under(*head: str) -> list[Row]:
    """Of all pages: the rows of tables whose head begins with these cells."""
    return [row for page in PAGES for row in rows(page) if row.head[: len(head)] == head]


def rows_about(beginning: str) -> list[Row]:
    """Of all pages: the rows of tables the first cell of whose head begins so."""
    return [row for page in PAGES for row in rows(page) if row.head[0].startswith(beginning)]


def links(page: Path) -> list[str]:
    """Where a page leads within the repository, pictures included."""
    text = "\n".join(prose(page))
    targets = [*re.findall(r"\]\(([^)\s]+)\)", text), *re.findall(r'src="([^"]+)"', text)]
    return [target for target in targets if "://" not in target]


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = [line.lstrip("#").strip() for line in prose(page) if re.match(r"#+ ", line)]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@cache
def texts_of(path: Path) -> tuple[str, ...]:
    """What a file of Python can print: its strings, f-strings with PLACEHOLDER for each value, no docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    silent = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return tuple(text for node in ast.walk(tree) if id(node) not in silent and (text := text_of(node)) is not None)


def text_of(node: ast.AST) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else PLACEHOLDER for part in node.values)
    return None


def pattern_of(message: str) -> re.Pattern[str]:
    """Of a message in a table, where ``...`` and ``N`` stand for what differs, perhaps in quotes."""
    return re.compile(".*".join(map(re.escape, literal_pieces(message))), re.DOTALL)


def literal_pieces(message: str) -> list[str]:
    return re.split(r"'?\.{3}'?|\bN\b", message)
