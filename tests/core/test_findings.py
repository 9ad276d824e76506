"""What a peer has found of reducers: how long it counts, whom it costs their share, how it lies on disk."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p_diloco.core.findings import MAX_FOUND, SLIGHT_STEPS, WRONG_STEPS, Findings


def test_a_finding_counts_for_as_long_as_its_kind_says() -> None:
    findings = Findings()
    findings.note("w", "wrong", 5)
    findings.note("l", "left out", 5)
    findings.note("n", "not answered", 6)
    assert findings.unfit(5) == ["w", "l", "n"], "the worst first"
    assert findings.unfit(5 + SLIGHT_STEPS) == ["w", "n"]
    assert findings.unfit(6 + SLIGHT_STEPS) == ["w"]
    assert findings.is_wrong("w", 4 + WRONG_STEPS)
    assert not findings.is_wrong("w", 5 + WRONG_STEPS)
    assert not findings.is_wrong("l", 5)
    assert [findings.count(kind, 16) for kind in findings.until] == [1, 0, 0]
    findings.forget(16)
    assert findings.until == {"wrong": {"w": 105}, "left out": {}, "not answered": {}}


def test_who_is_found_twice_is_named_once_and_for_as_long_as_the_later_one_counts() -> None:
    findings = Findings()
    findings.note("p", "not answered", 9)
    findings.note("p", "not answered", 3)
    findings.note("p", "wrong", 3)
    assert findings.unfit(10) == ["p"]
    assert findings.until["not answered"] == {"p": 9 + SLIGHT_STEPS}


def test_there_are_places_for_so_many() -> None:
    findings = Findings()
    for i in range(MAX_FOUND + 10):
        findings.note(f"p{i}", "wrong", i)
    assert len(findings.until["wrong"]) == MAX_FOUND
    assert "p9" not in findings.until["wrong"]
    assert f"p{MAX_FOUND + 9}" in findings.until["wrong"]


def test_findings_on_disk() -> None:
    findings = Findings()
    findings.note("b", "wrong", 5)
    findings.note("a", "wrong", 7)
    findings.note("c", "left out", 7)
    data = findings.to_bytes()
    assert Findings.from_bytes(data).until == findings.until
    assert Findings.from_bytes(Findings().to_bytes()).until == Findings().until
    for damaged in (b"", data[:-1], data + b"x", b"\x93\x90\x90", b"\x93\x90\x90\x91\x92\xa1a\xff", b"\x01"):
        with pytest.raises(ValueError, match=r"findings|msgpack"):
            Findings.from_bytes(damaged)


@given(st.binary(max_size=100))
def test_any_bytes_are_findings_or_a_value_error(data: bytes) -> None:
    try:
        findings = Findings.from_bytes(data)
    except ValueError:
        return
    assert all(len(found) <= MAX_FOUND for found in findings.until.values())
