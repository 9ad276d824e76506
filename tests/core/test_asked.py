"""Each peer is asked once in a while."""

from __future__ import annotations

from p2p_diloco.core.asked import Asked
from tests.support.builders import identity, record_of

ONE, OTHER = identity(1), identity(2)
RECORDS = [record_of(ONE), record_of(OTHER)]


def test_who_was_asked_is_left_out_until_then() -> None:
    asked = Asked()
    assert asked.unasked(RECORDS, 10.0) == RECORDS
    asked.note([ONE.peer_id], 20.0)
    assert asked.unasked(RECORDS, 19.9) == RECORDS[1:]
    asked.note([OTHER.peer_id], 30.0)
    assert asked.unasked(RECORDS, 19.9) == []
    assert asked.unasked(RECORDS, 20.0) == RECORDS[:1]
    assert asked.unasked(RECORDS, 30.0) == RECORDS
