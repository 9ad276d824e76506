from __future__ import annotations

from dataclasses import replace

import pytest

from p2p_diloco.core.event import DamageRepaired, Event, PeerCaughtUp, RoundEnded, TrainerStalled
from p2p_diloco.core.totals import LIMITS_S, Durations, Totals
from p2p_diloco.core.trust_event import BranchLeft, PartAudited, PeerBarred, ReducerFound, StateDisputed, WitnessAsked
from tests.support.events import (
    AUDITED,
    BRANCH,
    CAUGHT_UP,
    COMMITTED,
    DISPUTED,
    EVENTS,
    FOUND,
    REPAIRED,
    STALL,
    WITNESS,
)

ROUND = replace(
    COMMITTED,
    wall_s=7.0,
    group=("a", "b", "c"),
    dropped=(),
    lost=(),
    gather_s=0.01,
    reduce_s=0.2,
    settle_s=3.0,
    apply_s=40.0,
)


def missed(reason: str, *, lost: tuple[str, ...] = ()) -> RoundEnded:
    return replace(
        ROUND, committed=False, reason=reason, lost=lost, apply_s=0.0,
        contribution_norm=None, update_norm=None, cosine=None,
    )  # fmt: skip


def totals_of(*events: Event) -> Totals:
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
    second = replace(ROUND, wall_s=9.0, lost=("b",), cosine=-1.0)
    alone = replace(missed("alone"), group=(), reduce_s=0.0, settle_s=0.0)
    totals = totals_of(ROUND, second, missed("failed", lost=("a", "c")), alone)
    assert totals.rounds == {"committed": 2, "failed": 1, "alone": 1}
    assert totals.members_lost == 3
    assert {phase: sum(durations.counts) for phase, durations in totals.phases.items()} == {
        "gather": 4,
        "reduce": 3,
        "settle": 3,
        "apply": 2,
    }
    assert totals.phases["settle"].sum_s == pytest.approx(9.0)
    assert totals.last_commit == second
    third = replace(missed(""), wall_s=10.0, committed=True)
    totals.add(third)
    assert totals.last_commit == third


def test_the_other_events() -> None:
    totals = totals_of(
        replace(STALL, seconds=0.3),
        replace(CAUGHT_UP, rolled_back=2, snapshot=False),
        replace(CAUGHT_UP, rolled_back=0, snapshot=True),
        replace(REPAIRED, what="state", how="replayed"),
        replace(REPAIRED, what="update", how="fetched"),
        DISPUTED,
        AUDITED,
        replace(AUDITED, result="sound"),
        FOUND,
    )
    assert (sum(totals.stalls.counts), totals.stalls.sum_s) == (1, 0.3)
    assert (totals.catch_ups, totals.rolled_back, totals.disputes) == (2, 2, 1)
    assert totals.repairs == {"state": 1, "update": 1}
    assert (totals.audits, totals.found) == ({"wrong": 1, "sound": 1}, {"wrong": 1})


def test_certificates_that_came_and_that_did_not() -> None:
    unsigned = replace(missed("failed"), wall_s=11.0, uncertified="signatures")
    unwitnessed = replace(missed("alone"), wall_s=12.0, group=(), uncertified="witness")
    plain = replace(ROUND, witnessed=False, wall_s=20.0, helper="id-seed")
    totals = totals_of(ROUND, unsigned, unwitnessed, unwitnessed)
    assert totals.uncertified == {"signatures": 1, "witness": 2}
    assert (totals.witnessed, totals.uncertified_since_s, totals.last_round) == (1, 11.0, unwitnessed)
    totals.add(plain)
    assert (totals.witnessed, totals.uncertified_since_s, totals.last_round) == (1, None, plain)
    assert totals.helped == 1


def test_time_without_a_certificate_counts_from_when_others_were_there() -> None:
    alone = replace(missed("alone"), group=(), wall_s=8.0)
    failed = replace(missed("failed"), wall_s=13.0)
    totals = totals_of(ROUND, alone)
    assert totals.uncertified_since_s is None
    totals.add(failed)
    assert totals.uncertified_since_s == 13.0
    totals.add(replace(failed, wall_s=14.0))
    assert totals.uncertified_since_s == 13.0
    totals.add(CAUGHT_UP)
    assert totals.uncertified_since_s is None


def test_branches_left_and_what_the_owner_was_asked() -> None:
    totals = totals_of(BRANCH, WITNESS, replace(WITNESS, signed=True, reason=""), WITNESS)
    assert totals.branches_left == 1
    assert totals.witness_asked == {False: 2, True: 1}


def test_all_others_count_for_nothing() -> None:
    counted = (
        *(RoundEnded, TrainerStalled, PeerCaughtUp, BranchLeft, WitnessAsked, DamageRepaired, StateDisputed),
        *(PartAudited, ReducerFound, PeerBarred),
    )
    others = [event for event in EVENTS if not isinstance(event, counted)]
    assert len(others) == 11
    assert totals_of(*others) == Totals()
