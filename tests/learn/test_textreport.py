from __future__ import annotations

import pytest

from p2p_diloco.core.errors import DataError
from p2p_diloco.learn.textreport import (
    HIDDEN,
    NULL,
    OTHER,
    UNKNOWN,
    ZERO,
    Skipped,
    TextReport,
    TextTally,
    refuse_mostly_empty_rows,
    refuse_mostly_skipped,
    size_of,
)


def test_a_report_has_a_line_for_what_was_read_and_for_each_reason() -> None:
    tally = TextTally()
    for i in range(5):
        tally.skip(UNKNOWN, f"{i}.md", 1000)
    for _ in range(3):
        tally.skip(NULL)
    report = TextReport(
        files=2,
        documents=1,
        train_tokens=900,
        held_out_tokens=100,
        separator="</s> (token 2)",
        skipped=tuple(tally.skipped.values()),
    )
    assert report.lines == [
        "2 files, 1 document, each followed by </s> (token 2); 1000 tokens, 10.0 % of them held out",
        "skipped files with a suffix that is not read: 5, 5 kB (0.md, 1.md, 2.md, ...)",
        "skipped rows whose text is null: 3",
    ]
    assert TextReport.model_validate_json(report.model_dump_json()) == report
    assert TextReport(documents=2).lines == [
        "2 documents, none followed by an end token; 0 tokens, 0.0 % of them held out"
    ]


def test_a_name_that_is_no_utf8_can_be_kept_and_shown() -> None:
    tally = TextTally()
    tally.skip(HIDDEN, ".caf\udce9")
    assert tally.skipped[HIDDEN] == Skipped(reason=HIDDEN, count=1, examples=(".caf\ufffd",))


@pytest.mark.parametrize(
    ("read_bytes", "skipped", "refused"),
    [
        (10, {UNKNOWN: 11}, True),
        (10, {UNKNOWN: 10}, False),
        (10, {OTHER: 1000, HIDDEN: 1000}, False),
        (0, {}, False),
    ],
)
def test_what_may_be_text_is_weighed_against_what_is_read(
    read_bytes: int, skipped: dict[str, int], refused: bool
) -> None:
    kinds = [Skipped(reason=reason, count=1, n_bytes=n_bytes) for reason, n_bytes in skipped.items()]
    if not refused:
        refuse_mostly_skipped("texts", read_bytes, kinds)
        return
    with pytest.raises(DataError) as caught:
        refuse_mostly_skipped("texts", read_bytes, kinds)
    assert str(caught.value) == (
        "texts: 11 bytes would be left out and 10 bytes read; files with a suffix that is not read: 1, 11 bytes; "
        "convert these files, or move them elsewhere"
    )


def test_rows_without_text_are_weighed_against_documents() -> None:
    tally = TextTally(documents=2)
    for _ in range(2):
        tally.skip(NULL)
    refuse_mostly_empty_rows("texts", tally)
    tally.skip(ZERO)
    with pytest.raises(DataError) as caught:
        refuse_mostly_empty_rows("texts", tally)
    assert str(caught.value) == (
        "texts: 3 rows would be left out and 2 documents read; rows whose text is null: 2; rows with a NUL character "
        "in their text, which ends a document: 1; remove these rows, or choose another data.text_key"
    )


def test_sizes_are_read_at_a_glance() -> None:
    assert [size_of(n) for n in (0, 1, 999, 1000, 12_345, 2_500_000, 3 * 10**9)] == [
        *("0 bytes", "1 byte", "999 bytes", "1 kB", "12.3 kB", "2.5 MB", "3 GB"),
    ]
