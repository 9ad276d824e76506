"""What a case returns, and how it is printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Cell = str | int | float


@dataclass(frozen=True, kw_only=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[Cell, ...]]
    notes: tuple[str, ...] = ()
    missed: Sequence[str] = ()
    """Bounds that the case misses, a line each; one is enough to fail it."""


def layout(table: Table) -> str:
    """The first column to the left, the others to the right."""
    grid = [table.columns, *(tuple(show(cell) for cell in row) for row in table.rows)]
    widths = [max(len(row[i]) for row in grid) for i in range(len(table.columns))]
    lines = [
        "  ".join(text.rjust(width) if i else text.ljust(width) for i, (text, width) in enumerate(zip(row, widths)))
        for row in grid
    ]
    rule = "-" * len(lines[0])
    return "\n".join([table.title, rule, lines[0], rule, *lines[1:], *(f"  {note}" for note in table.notes)])


def markdown(table: Table) -> str:
    lines = [" | ".join(table.columns), " | ".join("---" for _ in table.columns)]
    lines += [" | ".join(map(show, row)) for row in table.rows]
    return "\n".join([f"{table.title}.", "", *(f"| {line} |" for line in lines), "", *table.notes])


def show(cell: Cell) -> str:
    """Floats with three significant digits or more."""
    if not isinstance(cell, float):
        return f"{cell:,}" if isinstance(cell, int) else cell
    digits = 3 if abs(cell) < 10 else 1 if abs(cell) < 1000 else 0
    return f"{cell:,.{digits}f}"
