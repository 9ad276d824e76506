"""Schedules of faults: drawn the same every time, written down, and made smaller."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support.liars import IDLE, INVENTED_SNAPSHOT, KINDS, RETURNING, SILENT
from tests.support.schedules import (
    AMBUSHES,
    MAX_PEERS,
    WAITED_FOR,
    Fault,
    PeerPlan,
    Schedule,
    draw,
    shrink,
    smaller,
    without_peer,
)
from tests.support.schedules_with_liars import draw_with_liars, without_liars

SEEDS = range(300)


def test_a_seed_draws_one_schedule() -> None:
    assert draw(7) == draw(7)
    assert len({draw(seed).to_json() for seed in SEEDS}) == len(SEEDS)


def test_a_schedule_is_read_back_as_it_was_written() -> None:
    assert all(Schedule.from_json(draw(seed).to_json()) == draw(seed) for seed in SEEDS)


def test_what_is_drawn_makes_sense() -> None:
    for seed in SEEDS:
        schedule = draw(seed)
        trainers = sum(plan.role != "seed" for plan in schedule.peers)
        joiners = [fault.who for fault in schedule.faults if fault.kind == "join"]
        assert 3 <= len(schedule.peers) - len(joiners) <= 8
        assert len(schedule.peers) <= MAX_PEERS
        assert joiners == list(range(len(schedule.peers) - len(joiners), len(schedule.peers)))
        gone_for_good = {f.who for f in schedule.faults if f.kind in ("kill", "leave") and f.for_s == 0}
        assert trainers - len(gone_for_good) >= schedule.min_group
        assert any(plan.role == "trainer" for plan in schedule.peers)
        assert all(fault.nth > 0 and not fault.phase for fault in schedule.faults if fault.message)
        for fault in schedule.faults:
            assert max(fault.who, fault.other, *fault.side, 0) < len(schedule.peers)


def test_every_kind_of_fault_and_everything_else_is_drawn() -> None:
    drawn = [draw(seed) for seed in SEEDS]
    faults = [fault for schedule in drawn for fault in schedule.faults]
    assert len({fault.kind for fault in faults}) == 12
    assert {fault.how for fault in faults if fault.kind == "kill"} == {"", "silent", "disk", "wiped"}
    assert {plan.role for schedule in drawn for plan in schedule.peers} == {"trainer", "client", "seed"}
    assert {fault.message for fault in faults} == {"", *(message for message, _ in WAITED_FOR)}
    assert {fault.kind for fault in faults if fault.message} == {kind for kind, _ in AMBUSHES}
    assert {schedule.orderly for schedule in drawn} == {True, False}


def fault(kind: str, at_s: float, who: int = 0, **fields: object) -> Fault:
    return Fault(kind=kind, at_s=at_s, who=who, for_s=1.0, **fields)  # type: ignore[arg-type]


BIG = Schedule(
    seed=1,
    peers=tuple(PeerPlan(step_s=1.5) for _ in range(6)),
    faults=(fault("kill", 1, 2), fault("stop", 2, 4, how="whole"), fault("cut", 3, 1, other=4), fault("echo", 4)),
    codec="int8",
    parts=9,
)


def test_shrinking_keeps_what_makes_it_fail_and_nothing_else() -> None:
    def fails(schedule: Schedule) -> bool:
        return any(f.kind == "cut" for f in schedule.faults) and schedule.parts > 1

    small = shrink(BIG, fails)
    assert [f.kind for f in small.faults] == ["cut"]
    assert len(small.peers) == 2
    assert small.faults[0].who != small.faults[0].other
    assert (small.parts, small.codec) == (9, "fp32")
    assert {plan.step_s for plan in small.peers} == {1.0}


def test_shrinking_ends() -> None:
    tried: list[Schedule] = []

    def fails(schedule: Schedule) -> bool:
        tried.append(schedule)
        return len(schedule.peers) > 4

    shrink(BIG, fails, tries=20)
    assert len(tried) == 20
    assert not any(candidate == BIG for candidate in smaller(BIG))


def test_faults_follow_their_peers() -> None:
    fewer = without_peer(BIG, 1)
    assert fewer is not None
    assert [(f.kind, f.who) for f in fewer.faults] == [("kill", 1), ("stop", 3), ("echo", 0)]
    ambush = fault("cut", 1, 0, other=0, message="commit", nth=1)  # who they are is seen when it strikes
    fewer = without_peer(replace(BIG, faults=(ambush,)), 0)
    assert fewer is not None
    assert [f.message for f in fewer.faults] == ["commit"]
    parted = replace(BIG, faults=(fault("partition", 1, side=(0, 2, 5)),))
    fewer = without_peer(parted, 2)
    assert fewer is not None
    assert fewer.faults[0].side == (0, 4)


def test_a_swarm_keeps_two_trainers() -> None:
    pair = Schedule(seed=1, peers=(PeerPlan(role="seed"), PeerPlan(), PeerPlan()))
    assert without_peer(pair, 0) is not None
    assert without_peer(pair, 1) is None


@pytest.mark.parametrize("seed", range(0, 300, 10))
def test_every_smaller_schedule_is_one_that_can_be_run(seed: int) -> None:
    for candidate in smaller(draw(seed)):
        for one in candidate.faults:
            assert max(one.who, one.other, *one.side, 0) < len(candidate.peers)


@pytest.mark.parametrize("kind", KINDS)
def test_schedules_with_liars(kind: str) -> None:
    """Honest peers are enough for a round, and nothing is planned for a liar; without liars, the rest is the same."""
    for seed in range(50):
        schedule = draw_with_liars(kind, seed)
        assert schedule == draw_with_liars(kind, seed) == Schedule.from_json(schedule.to_json())
        assert len(schedule.peers) <= MAX_PEERS
        assert {schedule.peers[i].lie for i in schedule.liars} == ({kind} if kind != RETURNING else set())
        honest = [plan for plan in schedule.peers if not plan.lie]
        assert len(honest) > max(schedule.min_group, 2)
        assert (
            not {fault.who for fault in schedule.faults if fault.kind != "misled" and not fault.message}
            & schedule.liars
        )
        alone = without_liars(schedule)
        assert not alone.liars
        assert list(alone.peers) == honest
        struck = [schedule.peers[fault.who] for fault in schedule.faults if fault.kind in ("kill", "leave", "join")]
        assert struck == [alone.peers[fault.who] for fault in alone.faults if fault.kind in ("kill", "leave", "join")]


def test_some_lies_take_many() -> None:
    drawn = {kind: [draw_with_liars(kind, seed) for seed in range(50)] for kind in KINDS}
    assert {len(schedule.liars) for schedule in drawn[IDLE]} >= {6, 8}
    assert min(len(schedule.liars) for schedule in drawn[SILENT]) >= 5
    for schedule in drawn[INVENTED_SNAPSHOT]:
        assert len(schedule.liars) > sum(not plan.lie for plan in schedule.peers) - 2
        assert {schedule.peers[i].role for i in schedule.liars} == {"seed"}
    late = {kind for kind in KINDS for schedule in drawn[kind] for plan in schedule.peers if plan.lies_from_s}
    assert len(late) >= len(KINDS) - 3
