"""How fast others send: what is measured of one stream, and what is kept of several rounds."""

from __future__ import annotations

import pytest

from p2p_diloco.core.uplinks import LARGEST_UPLINK
from p2p_diloco.round.measured import (
    LEAST_MEASURED_BYTES,
    MAX_MEASURED,
    UPLINKS_KEPT,
    UPLINKS_KEPT_STEPS,
    Arrivals,
    Measured,
)

FRAME_BYTES = 2**17


def arrived(*times_s: float, held_after: int | None = None) -> Arrivals:
    arrivals = Arrivals()
    for i, at_s in enumerate(times_s):
        arrivals.came(FRAME_BYTES, at_s)
        if i == held_after:
            arrivals.held_back()
    return arrivals


def test_the_time_of_all_frames_but_the_first() -> None:
    assert arrived(100.0, 101.0, 103.0, 104.0).uplink(1, [1]) == 3 * FRAME_BYTES // 4


def test_of_too_little_nothing_is_said() -> None:
    assert arrived().uplink(1, [1]) is None
    assert arrived(1.0, 2.0).uplink(1, [1]) is None
    assert FRAME_BYTES < LEAST_MEASURED_BYTES == 2 * FRAME_BYTES
    assert arrived(1.0, 2.0, 3.0).uplink(1, [1]) == FRAME_BYTES


def test_what_has_come_while_nobody_read_says_nothing() -> None:
    """The fourth frame may have come at any time since the third one."""
    times_s = (0.0, 1.0, 2.0, 9.0, 10.0)
    assert arrived(*times_s, held_after=2).uplink(1, [1]) == FRAME_BYTES
    assert arrived(*times_s).uplink(1, [1]) == 4 * FRAME_BYTES // 10


def test_frames_that_come_at_once_are_as_fast_as_counts() -> None:
    assert arrived(1.0, 1.0, 1.0).uplink(1, [1]) == LARGEST_UPLINK
    assert arrived(0.0, 1e-3, 2e-3).uplink(1, [1]) == LARGEST_UPLINK


@pytest.mark.parametrize(
    ("mine_bytes", "all_bytes", "times"),
    [
        (50, [50], 1.0),
        (50, [50, 50, 50], 3.0),
        (50, [50, 25, 25], 2.0),  # the others were done in half of the time
        (25, [50, 25, 25], 3.0),  # up to my last frame as much had gone to each
        (50, [50, 50, 0, 0], 2.0),
    ],
)
def test_the_other_streams_take_their_share_of_a_line(mine_bytes: int, all_bytes: list[int], times: float) -> None:
    assert arrived(0.0, 1.0, 2.0).uplink(mine_bytes, all_bytes) == times * FRAME_BYTES


# -- kept --------------------------------------------------------------------------------------------------------------


def test_the_lower_median_of_the_last_ones_is_told() -> None:
    measured = Measured()
    assert measured.at(0) == {}
    told = []
    for step, uplink in enumerate([900, 100, 500, 300, 700, 800, 600]):
        measured.note(step, {"a": uplink})
        told.append(measured.at(step + 1)["a"])
    assert told == [900, 100, 500, 300, 500, 500, 600]
    assert UPLINKS_KEPT == 5


def test_what_is_old_is_told_no_more() -> None:
    measured = Measured()
    measured.note(3, {"a": 100, "b": 200})
    measured.note(5, {"b": 300})
    assert measured.at(3 + UPLINKS_KEPT_STEPS) == {"a": 100, "b": 200}
    assert measured.at(4 + UPLINKS_KEPT_STEPS) == {"b": 300}
    assert measured.at(6 + UPLINKS_KEPT_STEPS) == {}


def test_nor_is_what_was_measured_on_a_branch_that_was_left() -> None:
    measured = Measured()
    measured.note(9, {"a": 100})
    assert measured.at(4) == {}


def test_no_more_peers_are_kept_than_fit() -> None:
    measured = Measured()
    for i in range(MAX_MEASURED):
        measured.note(1, {str(i): i})
    measured.note(2, {"0": 7, "new": 9})
    assert len(measured.kept) == MAX_MEASURED
    assert "1" not in measured.kept, "the one that was measured least lately"
    assert measured.at(2)["0"] == 0
