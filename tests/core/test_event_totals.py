from __future__ import annotations

from typing import Any

import pytest

from p2p_diloco.core.events import LIMITS_S, Durations, LastCommit, Totals


def round_event(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "event": "round",
        "wall_s": 7.0,
        "committed": True,
        "reason": "",
        "group": ["a", "b", "c"],
        "lost": [],
        "gather_s": 0.01,
        "reduce_s": 0.2,
        "settle_s": 3.0,
        "apply_s": 40.0,
        "contribution_norm": 3.0,
        "update_norm": 2.0,
        "cosine": 0.5,
    }
    return fields | changes


def missed(reason: str, **changes: Any) -> dict[str, Any]:
    """As the log has it: without what only a commit has."""
    event = round_event(committed=False, reason=reason, apply_s=0.0, **changes)
    return {key: value for key, value in event.items() if key not in ("contribution_norm", "update_norm", "cosine")}


def totals_of(*events: dict[str, Any]) -> Totals:
    totals = Totals()
    for event in events:
        totals.add(event)
    return totals


def test_durations_are_counted_between_limits() -> None:
    durations = Durations()
    for seconds in (0.0, LIMITS_S[0], LIMITS_S[0] + 1e-9, LIMITS_S[-1], LIMITS_S[-1] + 1, 1e9):
        durations.add(seconds)
    assert durations.counts == [2, 1, *[0] * (len(LIMITS_S) - 3), 1, 2]
    assert durations.sum_s == pytest.approx(1e9 + 2 * LIMITS_S[-1] + 1 + 2 * LIMITS_S[0])


def test_rounds_by_result_with_the_phases_that_they_came_to() -> None:
    totals = totals_of(
        round_event(),
        round_event(wall_s=9.0, lost=["b"], cosine=-1.0),
        missed("failed", lost=["a", "c"]),
        missed("alone", group=[], reduce_s=0.0, settle_s=0.0),
    )
    assert totals.rounds == {"committed": 2, "failed": 1, "alone": 1}
    assert totals.members_lost == 3
    assert {phase: sum(durations.counts) for phase, durations in totals.phases.items()} == {
        "gather": 4,
        "reduce": 3,
        "settle": 3,
        "apply": 2,
    }
    assert totals.phases["settle"].sum_s == pytest.approx(9.0)
    assert totals.last_commit == LastCommit(wall_s=9.0, contribution_norm=3.0, update_norm=2.0, cosine=-1.0)
    totals.add({**missed("", wall_s=10.0), "committed": True})
    assert totals.last_commit == LastCommit(wall_s=10.0, contribution_norm=None, update_norm=None, cosine=None)


def test_the_other_events() -> None:
    totals = totals_of(
        {"event": "stall", "step": 1, "seconds": 0.3},
        {"event": "caught_up", "rolled_back": 2, "snapshot": False},
        {"event": "caught_up", "rolled_back": 0, "snapshot": True},
        {"event": "repaired", "what": "state", "step": 3, "how": "replayed"},
        {"event": "repaired", "what": "update", "step": 3, "how": "fetched"},
        {"event": "disputed", "step": 3},
    )
    assert (sum(totals.stalls.counts), totals.stalls.sum_s) == (1, 0.3)
    assert (totals.catch_ups, totals.rolled_back, totals.disputes) == (2, 2, 1)
    assert totals.repairs == {"state": 1, "update": 1}


def test_what_is_not_known_counts_for_nothing() -> None:
    assert totals_of({"event": "inner", "loss": 1.0}, {"event": "round", "step": 1}, {"event": "left"}, {}) == Totals()
