"""Findings: what was looked at, what was measured, and the exact remedy; and the list of them that ``doctor`` shows.

    ok        nothing to do
    warning   training works, but something costs time, or may come to stop it
    problem   ``p2p-diloco peer`` would not train, or would be in everybody's way

``network_findings`` and ``machine_findings`` say what measurements mean.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

from p2p_diloco.core.errors import LocalError
from p2p_diloco.look.display import Legible, plain

Kind = Literal["ok", "warning", "problem"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Says what came of looking at one thing."""

    kind: Kind
    what: str
    """One or two words: what was looked at."""
    measured: str
    remedy: str = ""

    @property
    def line(self) -> str:
        """Returns what was measured, and after a semicolon the remedy, where one is needed."""
        return f"{self.measured}; {self.remedy}" if self.remedy else self.measured


def exit_code(findings: Sequence[Finding]) -> int:
    """Returns 1 where one of them is a problem, else 0."""
    return int(any(finding.kind == "problem" for finding in findings))


@dataclass(frozen=True, kw_only=True)
class Report:
    """Holds what ``doctor --json`` says."""

    can_train: bool
    run_id: str
    """Empty where no run was found."""
    findings: tuple[Finding, ...]

    @classmethod
    def of(cls, run_id: str, findings: Sequence[Finding]) -> Report:
        """Returns the report on ``findings``: a machine with a problem cannot train."""
        return cls(can_train=exit_code(findings) == 0, run_id=run_id, findings=tuple(findings))

    def to_json(self) -> str:
        """Returns it as one JSON object on one line, with the fields' names as keys."""
        return json.dumps(asdict(self))


def error_finding(what: str, error: LocalError) -> Finding:
    """Returns the problem that ``error`` tells of: our errors say what is wrong, and after a semicolon how to mend
    it."""
    measured, _, remedy = str(error).partition("; ")
    return Finding(kind="problem", what=what, measured=measured, remedy=remedy)


def late_finding(doing: str, limit_s: float) -> Finding:
    """Returns the problem that the network was not measured within ``limit_s``. ``doing``: what was going on then."""
    measured = f"not over after {span(limit_s)}, stopped while {doing}"
    remedy = "try again when this machine and its network are less busy"
    return Finding(kind="problem", what="network", measured=measured, remedy=remedy)


# -- how figures are said ----------------------------------------------------------------------------------------------


def span(seconds: float) -> str:
    """Returns a duration in the unit that suits it: 12 ms, 3.4 s, 5 min, 2.0 h."""
    if seconds < 1:
        return f"{max(seconds * 1000, 1):.0f} ms"
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def amount(number: float, unit: str = "B") -> str:
    """Returns a number with a decimal prefix, as disks and networks are sold: 3.4 MB."""
    for prefix in ("", "k", "M", "G"):
        if number < 999.5:
            return f"{number:.3g} {prefix}{unit}"
        number /= 1000
    return f"{number:.3g} T{unit}"


# -- as they come ------------------------------------------------------------------------------------------------------


MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "problem": ("✗", "red")}
WHAT_COLUMNS = 12


class Checklist:
    """Collects findings, and shows each as it comes: on a terminal with a mark, the remedy on a line of its own, and
    what is being measured below them; elsewhere as one plain line. With ``console`` None it shows nothing."""

    def __init__(self, console: Console | None) -> None:
        self.findings: list[Finding] = []
        self.measuring = ""
        self._console = console
        self._status: Status | None = None

    def __enter__(self) -> Checklist:
        if self._console is not None and self._console.is_terminal:
            spinner = "line" if self._console.options.ascii_only else "dots"
            self._status = self._console.status("", spinner=spinner)
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def measure(self, what: str) -> None:
        """Says, while one waits for it, that ``what`` is being measured from now on."""
        self.measuring = what
        if self._status is not None:
            self._status.update(Text(what, style="dim"))

    def add(self, finding: Finding) -> None:
        """Keeps ``finding``, and shows it."""
        self.findings.append(finding)
        if self._console is None:
            return
        if not self._console.is_terminal:
            self._print(f"{finding.kind:<8} {finding.what:<{WHAT_COLUMNS}} {plain(finding.line)}")
            return
        mark, style = MARKS[finding.kind]
        row = Table.grid(padding=(0, 1))
        row.add_column(width=1)
        row.add_column(width=WHAT_COLUMNS)
        row.add_column(overflow="fold")
        row.add_row(Text(mark, style=style), Text(finding.what, style="bold"), Text(plain(finding.measured)))
        if finding.remedy:
            row.add_row("", "", Text(f"→ {plain(finding.remedy)}", style=style))
        self._console.print(Legible(row))

    def conclude(self) -> int:
        """Says in one line what all findings come to, and returns the exit code."""
        code = exit_code(self.findings)
        problems = sum(finding.kind == "problem" for finding in self.findings)
        said = f"{problems} problem{'s' if problems > 1 else ''} to mend" if problems else "this machine can train"
        if self._console is not None and self._console.is_terminal:
            self._console.print(Text(f"\n{said}", style="bold red" if problems else "bold green"))
        elif self._console is not None:
            self._print(said)
        return code

    def _print(self, line: str) -> None:
        """Prints one line, however long."""
        if self._console is not None:
            self._console.print(Text(line), soft_wrap=True)
