"""What was read of a run's text, and what was skipped, with the reason: a few lines for whoever starts or joins a run.

    TextTally    counts while text is read
    TextReport   the figures of a text that was read, kept beside its tokens

What is skipped is no error by itself. It is one where more bytes that may be text are skipped than read, or more rows
without text than documents: a folder of which a tenth is trained on looks just like one that is trained on as a whole.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict

from p2p_diloco.core.errors import DataError

log = logging.getLogger(__name__)

EXAMPLES = 3
"""So many skipped files are named."""

UNKNOWN = "files with a suffix that is not read"
NO_TEXT = "files without text under data.text_key"
NULL = "rows whose text is null"
ZERO = "rows with a NUL character in their text, which ends a document"
HIDDEN = "hidden files or folders"
EMPTY = "empty files"
IRREGULAR = "pipes, sockets or devices"
DANGLING = "links that lead nowhere"
TWICE = "links to what is read under another name"
OTHER = "pictures, sound, films, fonts or weights"

ROWS = (NULL, ZERO)
"""Of these reasons, skipped rows are weighed against the documents that were read."""
MAY_BE_TEXT = (UNKNOWN, NO_TEXT)
"""Of these reasons, the skipped bytes are weighed against those that were read."""


class Skipped(BaseModel):
    """Says what was not read, for one reason."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reason: str
    """One of those above."""
    count: int
    n_bytes: int = 0
    """On the disk; 0 for rows, and where it does not matter."""
    examples: tuple[str, ...] = ()
    """Names of the first ones."""

    @property
    def line(self) -> str:
        """Returns the reason, how many there are, and the first names."""
        size = f", {size_of(self.n_bytes)}" if self.n_bytes else ""
        more = ", ..." if self.examples and self.count > len(self.examples) else ""
        names = f" ({', '.join(self.examples)}{more})" if self.examples else ""
        return f"{self.reason}: {self.count}{size}{names}"


@dataclass
class TextTally:
    """Says what was read so far, and what was skipped."""

    files: int = 0
    """In which there was text."""
    n_bytes: int = 0
    """Of these files, on the disk."""
    documents: int = 0
    """Complete ones: a .txt file is one, however many pieces it is cut into; so is a row of any other file."""
    skipped: dict[str, Skipped] = field(default_factory=dict)
    """By reason."""

    def skip(self, reason: str, name: str = "", n_bytes: int = 0) -> None:
        """Counts a file or row that is skipped. ``name``: of a file, for messages; bytes that are no UTF-8 are
        replaced."""
        known = self.skipped.get(reason, Skipped(reason=reason, count=0))
        examples = known.examples
        if name and len(examples) < EXAMPLES:
            examples = (*examples, os.fsencode(name).decode("utf-8", "replace"))
        self.skipped[reason] = Skipped(
            reason=reason, count=known.count + 1, n_bytes=known.n_bytes + n_bytes, examples=examples
        )


class TextReport(BaseModel):
    """Says what was read of a run's text, and what was skipped, once all of it is read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    files: int = 0
    """With text in them; 0 for a data set of the hub, whose files are not counted."""
    documents: int = 0
    """A .txt file is one, however many pieces it is cut into; so is a row of any other file."""
    train_tokens: int = 0
    held_out_tokens: int = 0
    separator: str = ""
    """The token after each document, for a person; empty where the tokenizer has none."""
    skipped: tuple[Skipped, ...] = ()

    @property
    def lines(self) -> list[str]:
        """Returns a line on what was read, then one for each reason why something was skipped."""
        return [self.read, *(f"skipped {kind.line}" for kind in self.skipped)]

    @property
    def read(self) -> str:
        """Returns a line on what was read."""
        tokens = self.train_tokens + self.held_out_tokens
        files = f"{counted(self.files, 'file')}, " if self.files else ""
        end = f"each followed by {self.separator}" if self.separator else "none followed by an end token"
        return (
            f"{files}{counted(self.documents, 'document')}, {end}; {counted(tokens, 'token')}, "
            f"{100 * self.held_out_tokens / max(tokens, 1):.1f} % of them held out"
        )


def log_report(report: TextReport) -> None:
    """Logs the report's lines."""
    for line in report.lines:
        log.info("text: %s", line)


def refuse_mostly_empty_rows(source: str, tally: TextTally) -> None:
    """Raises DataError where more rows were skipped than documents were read."""
    rows = [kind for kind in tally.skipped.values() if kind.reason in ROWS]
    lost_rows = sum(kind.count for kind in rows)
    if lost_rows > tally.documents:
        raise DataError(
            f"{source}: {counted(lost_rows, 'row')} would be left out and {counted(tally.documents, 'document')} read; "
            f"{'; '.join(kind.line for kind in rows)}; remove these rows, or choose another data.text_key"
        )


def refuse_mostly_skipped(source: str, read_bytes: int, skipped: Iterable[Skipped]) -> None:
    """Raises DataError where what may be text and was skipped has more bytes on the disk than what was read."""
    weighed = [kind for kind in skipped if kind.reason in MAY_BE_TEXT]
    lost_bytes = sum(kind.n_bytes for kind in weighed)
    if lost_bytes > read_bytes:
        raise DataError(
            f"{source}: {size_of(lost_bytes)} would be left out and {size_of(read_bytes)} read; "
            f"{'; '.join(kind.line for kind in weighed)}; convert these files, or move them elsewhere"
        )


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def size_of(n_bytes: int) -> str:
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if n_bytes >= unit:
            return f"{n_bytes / unit:.3g} {name}"
    return counted(n_bytes, "byte")
