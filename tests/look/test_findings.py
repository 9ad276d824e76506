from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence

import pytest
from rich.console import Console

from p2p_diloco.core.errors import NetworkError
from p2p_diloco.look.findings import (
    Checklist,
    Finding,
    Kind,
    Report,
    amount,
    error_finding,
    exit_code,
    late_finding,
    span,
)

RUN_A = "a" * 40
OK = Finding(kind="ok", what="x", measured="good")
WARNING = Finding(kind="warning", what="y", measured="so so", remedy="wait")
PROBLEM = Finding(kind="problem", what="z", measured="bad", remedy="mend it")


def check(finding: Finding, kind: Kind, measured: str, remedy: str) -> None:
    """``measured`` and ``remedy`` are in it; an empty remedy means that there is none."""
    assert finding.kind == kind, finding
    assert measured in finding.measured
    assert remedy in finding.remedy
    assert bool(remedy) == bool(finding.remedy)
    assert bool(finding.remedy) == (finding.kind != "ok"), "whatever is not well has a remedy, and nothing else has"
    assert "\n" not in finding.line


# -- what findings come to ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("findings", "code"), [([], 0), ([OK, WARNING], 0), ([OK, PROBLEM, WARNING], 1)])
def test_only_a_problem_stops_it(findings: Sequence[Finding], code: int) -> None:
    assert exit_code(findings) == code
    read = json.loads(Report.of(RUN_A, findings).to_json())
    assert (read["can_train"], read["run_id"]) == (code == 0, RUN_A)
    assert [Finding(**finding) for finding in read["findings"]] == list(findings)


def test_json_is_written_in_this_order() -> None:
    written = Report.of(RUN_A, [OK, PROBLEM]).to_json()
    assert written == (
        f'{{"can_train": false, "run_id": "{RUN_A}", "findings": [{{"kind": "ok", "what": "x", "measured": "good", '
        '"remedy": ""}, {"kind": "problem", "what": "z", "measured": "bad", "remedy": "mend it"}]}'
    )


def test_a_finding_is_one_line_that_ends_with_the_remedy() -> None:
    assert (OK.line, PROBLEM.line) == ("good", "bad; mend it")


def test_our_errors_bring_their_remedy() -> None:
    check(error_finding("network", NetworkError("no way; take another")), "problem", "no way", "take another")
    assert error_finding("network", NetworkError("no way")).line == "no way"
    check(late_finding("dialling", 50.0), "problem", "not over after 50.0 s, stopped while dialling", "try again")


# -- how it is said ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "said"),
    [(0, "0 B"), (999, "999 B"), (999.6, "1 kB"), (26_400_000_000, "26.4 GB"), (3.2e15, "3.2e+03 TB")],
)
def test_amounts(number: float, said: str) -> None:
    assert amount(number) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.0, "1 ms"), (0.0234, "23 ms"), (1.24, "1.2 s"), (89.9, "89.9 s"), (90, "2 min"), (86400, "24.0 h")],
)
def test_spans(seconds: float, said: str) -> None:
    assert span(seconds) == said


# -- findings ----------------------------------------------------------------------------------------------------------

GOOD = Finding(kind="ok", what="clock", measured="within 0.1 s of 2 peers")
BAD = Finding(kind="problem", what="address", measured="x" * 200 + ": \x1b[31mrefused\n\u202e", remedy="ask again")


def listed(*findings: Finding, terminal: bool) -> tuple[str, int]:
    console = Console(file=io.StringIO(), width=80, force_terminal=terminal, color_system=None)
    with Checklist(console) as checklist:
        checklist.measure("dialling")
        for finding in findings:
            checklist.add(finding)
        assert checklist.measuring == "dialling"
    code = checklist.conclude()
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue(), code


def test_findings_are_plain_lines_where_there_is_no_terminal() -> None:
    text, code = listed(GOOD, BAD, terminal=False)
    good, bad, end = text.splitlines()
    assert good == "ok       clock        within 0.1 s of 2 peers"
    assert bad == f"problem  address      {'x' * 200}: [31mrefused; ask again"
    assert (end, code) == ("1 problem to mend", 1)
    assert listed(GOOD, terminal=False)[0].splitlines()[-1] == "this machine can train"
    assert listed(GOOD, terminal=False)[1] == 0


def test_findings_on_a_terminal_have_marks_and_the_remedy_on_a_line_of_its_own() -> None:
    text, code = listed(GOOD, BAD, terminal=True)
    left = re.sub(r"[^\n]*\r\x1b\[2K", "", text)  # the line that says what is being measured is erased again
    shown = re.sub(r"\x1b\[\??[0-9;]*[a-zA-Z]", "", left)
    lines = [line.rstrip() for line in shown.splitlines()]
    assert max(map(len, lines)) <= 80
    assert "✓ clock        within 0.1 s of 2 peers" in lines
    assert "dialling" in text
    assert "               → ask again" in lines
    assert "\u202e" not in text
    assert (lines[-1], code) == ("1 problem to mend", 1)


def test_findings_on_a_terminal_without_utf_8_have_marks_of_its_own() -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with Checklist(Console(file=file, width=80, color_system=None, force_terminal=True, no_color=True)) as checklist:
        checklist.measure("dialling")
        checklist.add(GOOD)
        checklist.add(BAD)
    file.seek(0)
    shown = re.sub(r"\x1b\[\??[0-9;]*[a-zA-Z]", "", file.read())
    assert "+ clock        within 0.1 s of 2 peers" in shown
    assert "x address " in shown
    assert "               > ask again" in shown


def test_findings_for_a_program_are_kept_and_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with Checklist(None) as checklist:
        checklist.add(BAD)
    assert checklist.conclude() == 1
    assert checklist.findings == [BAD]
    assert capsys.readouterr() == ("", "")
