"""Turns in upload slots, with a clock that the tests set."""

from __future__ import annotations

import pytest

from p2p_diloco.core.config import Timeouts
from p2p_diloco.peer import turns
from p2p_diloco.peer.turns import FORGIVEN_AFTER_S, Turn, Turns

TIMEOUTS = Timeouts(first_message_s=10.0, slow_rate_bytes_per_s=100.0, min_rate_bytes_per_s=10.0)


def taken(all_: Turns, peer_id: str, now_s: float) -> Turn:
    turn = all_.take(peer_id, now_s)
    assert turn is not None
    return turn


def waits(turn: Turn, since_s: float, until_s: float, size_bytes: int = 0) -> None:
    turn.wait(since_s)
    turn.go_on(until_s, size_bytes)


def test_only_the_time_that_we_wait_counts() -> None:
    all_ = Turns(slots=1, timeouts=TIMEOUTS)
    turn = taken(all_, "a", 0.0)
    waits(turn, 5.0, 12.0)
    assert turn.spare_s(100.0) == 3.0
    turn.wait(100.0)
    assert turn.spare_s(102.0) == 1.0
    assert all_.take("b", 102.9) is None
    assert all_.take("b", 103.1) is not None
    assert (turn.why_over, turn.over.is_set()) == ("busy serving others", True)


def test_the_slowest_makes_room() -> None:
    all_ = Turns(slots=3, timeouts=TIMEOUTS)
    slow, slowest, fast = (taken(all_, name, 0.0) for name in ("slow", "slowest", "fast"))
    waits(slow, 0.0, 12.0, 100)
    waits(slowest, 0.0, 12.0, 50)
    waits(fast, 0.0, 12.0, 1200)
    waits(slow, 12.0, 14.0)
    waits(slowest, 12.0, 14.0)
    assert (slow.spare_s(14.0), slowest.spare_s(14.0), fast.spare_s(14.0)) == (-3.0, -3.5, 10.0)
    taken(all_, "new", 14.0)
    assert [bool(turn.why_over) for turn in (slow, slowest, fast)] == [False, True, False]
    taken(all_, "newer", 14.0)
    assert [bool(turn.why_over) for turn in (slow, slowest, fast)] == [True, True, False]
    assert all_.take("newest", 14.0) is None, "nobody is slow"


def test_who_was_too_slow_takes_no_slot_from_anybody_but_a_free_one() -> None:
    all_ = Turns(slots=1, timeouts=TIMEOUTS)
    first = taken(all_, "first", 0.0)
    waits(first, 0.0, 12.0, 50)
    second = taken(all_, "second", 12.0)
    waits(second, 12.0, 24.0, 50)
    assert all_.take("first", 24.0) is None, "both were slow"
    all_.leave(first, 24.0)
    all_.leave(second, 25.0)
    again = taken(all_, "first", 26.0)
    assert again.spare_s(26.0) == -1.5
    taken(all_, "third", 26.0)
    assert again.why_over
    assert all_.take("first", 25.9 + FORGIVEN_AFTER_S) is None
    all_.leave(again, 27.0)


def test_under_the_least_rate_nobody_gets_a_slot_until_it_is_forgiven() -> None:
    all_ = Turns(slots=2, timeouts=TIMEOUTS)
    turn = taken(all_, "a", 0.0)
    waits(turn, 0.0, 10.1)
    assert turn.least.left_s < 0
    assert all_.take("a", 10.2) is None, "nor its next stream"
    all_.leave(turn, 10.3)
    assert all_.take("a", 10.2 + FORGIVEN_AFTER_S) is None
    assert taken(all_, "a", 10.4 + FORGIVEN_AFTER_S).least.left_s == 10.0


def test_a_new_stream_goes_on_with_the_turn_of_the_old_one() -> None:
    all_ = Turns(slots=1, timeouts=TIMEOUTS)
    old = taken(all_, "a", 0.0)
    old.wait(1.0)
    new = taken(all_, "a", 5.0)
    assert old.why_over == "another stream of yours is served"
    assert new.spare_s(5.0) == 6.0
    all_.leave(old, 6.0)
    assert new.spare_s(6.0) == 6.0, "what we waited before counts once"
    assert all_.take("b", 6.0) is None, "the slot is still taken"
    all_.leave(new, 7.0)
    assert taken(all_, "a", 8.0).spare_s(8.0) == 6.0
    assert not all_._ending


def test_no_more_streams_finish_than_there_are_slots() -> None:
    all_ = Turns(slots=1, timeouts=TIMEOUTS)
    streams = []
    for i in range(4):
        turn = taken(all_, str(i), 20.0 * i)
        turn.wait(20.0 * i)
        streams.append(turn)
    assert [turn.cut_off for turn in streams] == [True, True, False, False]
    assert [bool(turn.why_over) for turn in streams] == [True, True, True, False]


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "MAX_RATED_PEERS", 3)
    all_ = Turns(slots=1, timeouts=TIMEOUTS)
    for i in range(10):
        turn = taken(all_, str(i), float(i))
        waits(turn, i, i + 5.0, 0)
        all_.leave(turn, float(i))
    assert list(all_._ended) == ["7", "8", "9"]
