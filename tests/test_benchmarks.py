"""The figures of the benchmarks: what is made of event logs. Times are not tested."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import __main__ as commands
from benchmarks import dropped, liars, newcomers, sleepers, tiny, traffic
from benchmarks.churn import SPARE_MB, growth_of
from benchmarks.histories import (
    began,
    calm_stall,
    first_commit,
    first_stall,
    missed_rounds,
    newest,
    on_head,
    swarm_step,
)
from benchmarks.loopback import Log, Run, write_run_file
from benchmarks.matrix import ALL_CASES, Case, able_since
from benchmarks.processes import Usage
from benchmarks.serving import inner_and_stall
from benchmarks.stall import stalls_of
from benchmarks.table import Table, layout, markdown
from p2p_diloco.core.codecs import encoded_bytes
from p2p_diloco.core.event import LoggedPhase, PhaseBegan, RoundEnded, TrainerStalled
from p2p_diloco.core.runfile import RunSpec
from p2p_diloco.lab.faults import Act, Action, Done, ProcessName
from p2p_diloco.lab.recount import Past
from tests.support.events import CAUGHT_UP, COMMITTED, EVALUATED, INNER, JOINED, MISSED, OFFERED, RESTARTED
from tests.support.schedules_with_liars import without_liars

ROUND = replace(
    COMMITTED,
    group=("a", "b"),
    dropped=(),
    lost=(),
    gather_s=0.1,
    reduce_s=0.2,
    settle_s=0.0,
    apply_s=0.0,
    bytes_sent=0,
)


def stalled(step: int, seconds: float, mono_s: float = 0.0) -> TrainerStalled:
    return TrainerStalled(step=step, seconds=seconds, mono_s=mono_s)


def began_at(phase: LoggedPhase, mono_s: float, step: int = 0) -> PhaseBegan:
    return PhaseBegan(phase=phase, step=step, mono_s=mono_s)


def two_cycles(tokens: int) -> Log:
    """Inner steps for 10 s, a stall of 2 s; 10 s and 2 s again, with an evaluation of 3 s between."""
    return [
        replace(INNER, mono_s=10.0, tokens=tokens),
        stalled(1, 2.0, mono_s=12.0),
        replace(EVALUATED, mono_s=15.0, step=1, seconds=3.0),
        replace(INNER, mono_s=25.0, tokens=2 * tokens),
        stalled(2, 2.0, mono_s=27.0),
    ]


def test_tokens_per_second_are_those_of_whole_cycles_after_the_first() -> None:
    run = Run(spec=sleepers.SPEC, values=1, logs=[two_cycles(300), two_cycles(150)])
    assert tiny.swarm_tokens_per_s(run) == pytest.approx((450 / 15, 450 / 10))


def test_inner_steps_and_stalls_that_lie_between_two_moments() -> None:
    """An outer step whose inner steps had begun before, or whose stall comes after, is none of them."""
    log: Log = []
    for start_s in (0.0, 4.0, 8.0, 12.0):
        log += [
            began_at("inner", start_s),
            stalled(1, 0.1 * start_s, mono_s=start_s + 0.1),
            began_at("serve", start_s + 1.0),
            replace(OFFERED, mono_s=start_s + 3.0),
            began_at("gather", start_s + 3.1),
        ]
    assert list(inner_and_stall(log, 1.0, 13.0)) == [(3.0, 0.8), (3.0, pytest.approx(1.2))]


def test_a_stall_has_all_rounds_since_the_last_one() -> None:
    log: Log = [
        replace(ROUND, step=0, committed=False),
        replace(ROUND, step=1),
        stalled(1, 0.7),
        replace(ROUND, step=2),
        stalled(2, 0.3),
    ]
    first, second = stalls_of(log)
    assert first.gather_s == pytest.approx(0.2)
    assert first.reduce_s == pytest.approx(0.4)
    assert first.rest_s == pytest.approx(0.1)
    assert second.rest_s == pytest.approx(0.0)


def test_bytes_are_compared_with_the_butterflys_minimum_in_whole_groups_only() -> None:
    vector = encoded_bytes(1000, "int8")
    logs: list[Log] = [
        [replace(ROUND, step=1, bytes_sent=vector), replace(ROUND, step=2, group=("a",), bytes_sent=7)],
        [replace(ROUND, step=1, bytes_sent=2 * vector), replace(ROUND, step=2, committed=False, bytes_sent=7)],
    ]
    row = traffic.traffic_row("x", Run(spec=sleepers.SPEC, values=1000, logs=logs))
    assert row[:4] == ("x", 1000, 1, 1)
    assert row[5:] == pytest.approx((1.5 * vector / 1e6, 1.5, 2 * vector / 1e6, 2.0))


@pytest.mark.parametrize("spec", [tiny.shortened(), sleepers.SPEC, dropped.spec_of_run()], ids=lambda spec: spec.name)
def test_run_files_say_what_the_specs_say(spec: RunSpec, tmp_path: Path) -> None:
    assert RunSpec.load(write_run_file(spec, tmp_path)) == spec


def test_a_table_is_aligned() -> None:
    table = Table(title="T", columns=("a", "bb"), rows=[("long name", 12345), ("x", 1.5)], notes=("n",))
    assert layout(table).splitlines()[2:] == [
        "a              bb",
        "-----------------",
        "long name  12,345",
        "x           1.500",
        "  n",
    ]


def test_a_table_in_markdown() -> None:
    table = Table(title="T", columns=("a", "bb"), rows=[("x", 1.5)], notes=("n",))
    assert markdown(table) == "T.\n\n| a | bb |\n| --- | --- |\n| x | 1.500 |\n\nn"


# -- what is read from the logs of a swarm with faults -----------------------------------------------------------------


def made(mono_s: float, step: int, group: int = 2, lost: tuple[str, ...] = ()) -> RoundEnded:
    return replace(COMMITTED, mono_s=mono_s, step=step, group=("x",) * group, lost=lost)


def missed(mono_s: float, step: int) -> RoundEnded:
    return replace(MISSED, mono_s=mono_s, step=step)


def test_calm_is_an_outer_step_that_all_have_made_together() -> None:
    a: Log = [made(1.0, 1), stalled(1, 0.2, mono_s=1.1), made(5.0, 2), stalled(2, 0.4, mono_s=5.1)]
    b: Log = [made(1.0, 1), stalled(1, 0.3, mono_s=1.1), made(5.0, 2), stalled(2, 0.8, mono_s=5.2)]
    assert calm_stall([a, b]) == pytest.approx(0.6)
    assert calm_stall([a, b], since_s=5.0) == pytest.approx(0.6)
    assert calm_stall([a, b], since_s=5.1) is None
    assert calm_stall([a, b[:-1]]) is None  # its trainer stands still
    assert calm_stall([a, b[:-2]]) is None  # another outer step
    assert calm_stall([a, b, []]) is None
    assert calm_stall([a, [*b, missed(6.0, 2)]]) is None
    assert calm_stall([a, [*b[:-2], made(5.0, 2, group=1), b[-1]]]) is None
    assert calm_stall([a, [*b[:-2], made(5.0, 2, lost=("x",)), b[-1]]]) is None


def test_the_first_outer_step_beyond_the_one_of_the_fault() -> None:
    log: Log = [
        made(1.0, 3),
        stalled(3, 0.1, mono_s=1.1),
        missed(4.0, 3),
        made(5.0, 4),
        stalled(4, 2.5, mono_s=5.1),
        made(8.0, 5),
        stalled(5, 0.3, mono_s=8.1),
    ]
    assert first_commit(log, 3) == log[3]
    assert first_stall(log, 3) == 2.5
    assert missed_rounds(log, 2.0, 3) == 1
    assert missed_rounds(log, 4.5, 3) == 0
    assert first_commit(log, 5) is None
    assert first_stall(log, 5) is None
    assert first_stall(log[:-1], 4) is None
    assert swarm_step([log, []], 7.9) == 4
    assert newest(log) == 5


def test_a_peer_is_back_where_it_shows_itself_on_the_swarms_head() -> None:
    others: list[Log] = [[made(5.0, 4), made(9.0, 5)]]
    resumed: Log = [began_at("reduce", 3.0, step=3), began_at("inner", 6.0, step=3)]
    assert on_head(resumed, others, able_s=5.5, step=3) is None
    behind = [*resumed, replace(CAUGHT_UP, mono_s=9.5, from_step=3, to_step=4)]
    assert on_head(behind, others, able_s=5.5, step=3) is None  # the swarm has gone on
    back = [*behind, replace(CAUGHT_UP, mono_s=9.9, from_step=4, to_step=5)]
    assert on_head(back, others, able_s=5.5, step=3) == back[-1]
    assert on_head(back, others, able_s=10.0, step=3) is None
    joined: Log = [replace(JOINED, mono_s=7.0, step=4)]
    assert on_head(joined, others, able_s=7.0, step=4) == joined[0]
    assert began([*resumed, began_at("reduce", 7.0, step=4)], "reduce", 6.0) == 3.0


def done(action: Action, mono_s: float, process: ProcessName = "all", *, follows: bool = False) -> Done:
    act = Act(fault=0, action=action, peer="a", process=process, follows=follows)
    return Done(act=act, at_s=mono_s, mono_s=mono_s, pids=(1,), phase="inner", step=1)


def test_when_a_victim_can_act_again() -> None:
    joined: Log = [replace(JOINED, mono_s=1.0, step=0), replace(JOINED, mono_s=9.0, step=3)]
    assert able_since([done("stop", 2.0)], []) is None
    assert able_since([done("stop", 2.0), done("resume", 4.0, follows=True)], []) == 4.0
    assert able_since([done("kill", 2.0, "p2pd")], joined) is None
    assert able_since([done("kill", 2.0, "p2pd")], [*joined, replace(RESTARTED, mono_s=9.5)]) == 9.5
    assert able_since([done("kill", 2.0), done("restart", 4.0, follows=True)], joined[:1]) is None
    assert able_since([done("kill", 2.0), done("restart", 4.0, follows=True)], joined) == 9.0


def test_every_phase_process_and_fault_is_a_case() -> None:
    assert len({str(case) for case in ALL_CASES}) == len(ALL_CASES) == 8 * (3 * 2 + 1)
    assert Case("reduce", "cut").fault("a", 8.0).for_s == 8.0
    assert Case("reduce", "kill", "p2pd").fault("a", 8.0).for_s is None
    assert Case("download", "cut").fault("a", 8.0).for_s == 4.0


def life(*resident_mb: float, descriptors: int = 9) -> list[tuple[float, Usage]]:
    return [(float(second), Usage(descriptors, mb)) for second, mb in enumerate(resident_mb)]


def test_growth_is_that_of_long_lives_after_they_have_settled() -> None:
    grown = growth_of([life(*range(10)), life(7.0, 500.0), life(*[5.0] * 10, descriptors=30)], settling_s=4.0)
    assert grown.processes == 2
    assert grown.resident_mb == 4.0  # of 4 to 9: from the middle of 4 and 5 to that of 8 and 9
    assert grown.descriptors == 0
    assert growth_of([], settling_s=4.0).processes == 0
    assert set(SPARE_MB) == {"trainer", "network", "p2pd"}


# -- the ablation ------------------------------------------------------------------------------------------------------


def test_a_swarms_curve_stands_beside_the_simulations() -> None:
    swarm = {0: 5.0, 4: 3.0, 8: 2.0}
    half = dropped.Curves(
        drop=0.5, swarm=swarm, recounted=swarm | {8: 2.25}, simulated={4: 3.5, 8: 2.5}, inner_steps=5, empty=1
    )
    none = dropped.Curves(
        drop=0.0, swarm=swarm, recounted={8: 2.0}, simulated={4: 3.25, 8: 1.75}, inner_steps=5, empty=0
    )
    assert dropped.rows_of([none, half], outer_steps=10) == [
        ("4", "3.0000", "3.2500", "3.0000", "3.5000"),
        ("8", "2.0000", "1.7500", "2.0000", "2.5000"),
    ]
    assert dropped.largest_difference([none, half]) == 0.25


def test_an_outer_step_is_empty_where_all_who_made_it_were_dropped() -> None:
    both, one = {"a": (5,), "b": (5,)}, {"b": (5,)}
    past = Past(
        names=("a", "b"),
        inner_steps={0: both, 1: both, 2: one, 3: both},
        dropped={0: frozenset(), 1: frozenset("a"), 2: frozenset("b"), 3: frozenset("ab")},
        heads={},
    )
    assert dropped.empty_steps(past) == 2
    assert dropped.inner_steps_of(past) == 5


@pytest.mark.parametrize("case", liars.CASES, ids=str)
def test_a_swarm_with_liars_and_the_one_that_it_is_compared_with(case: liars.Case) -> None:
    """The newcomer comes after them, where there is room for one."""
    for known in (False, True):
        schedule = liars.schedule_of(case, known=known)
        assert len(schedule.liars) == case.liars
        assert {schedule.peers[i].lie for i in schedule.liars} == {case.kind}
        joins = [fault for fault in schedule.faults if fault.kind == "join"]
        assert [fault.who for fault in joins] == [len(schedule.peers) - 1] * (len(schedule.peers) - case.liars - 4)
        alone = without_liars(schedule)
        assert len(alone.peers) == liars.HONEST + len(joins)
        assert all(fault.at_s < schedule.lasts_s for fault in schedule.faults)


CASE = liars.Case(row=29, kind="always busy")
ALONE = liars.Figures(steps=50, inner_steps=10.0, invented=0, blamed=0, violated="", joined_s=3.0, lost_after=None)


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({"steps": 45}, []),
        ({"steps": 44}, ["always busy, new: 44 honest outer steps of 50, fewer than 90%"]),
        ({"invented": 2}, ["always busy, new: 2 invented updates applied by honest peers"]),
        ({"blamed": 1, "steps": 0}, ["always busy, new: 0 honest outer steps of 50, fewer than 90%",
                                     "always busy, new: honest peers blamed 1 times"]),
    ],
)  # fmt: skip
def test_a_bound_that_is_missed_is_named(changes: dict[str, int], missed: list[str]) -> None:
    compared = liars.Compared(case=CASE, known=False, lied_to=replace(ALONE, **changes), alone=ALONE)  # type: ignore[arg-type]
    assert compared.missed() == missed
    assert list(liars.table_of([compared]).missed) == missed


def test_eight_idle_members_may_cost_twice_as_much_as_one_liar() -> None:
    case = next(case for case in liars.CASES if case.kind == "idle members")
    compared = liars.Compared(case=case, known=True, lied_to=replace(ALONE, steps=40), alone=ALONE)
    assert compared.missed() == []
    assert replace(compared, lied_to=replace(ALONE, steps=39)).missed() == [
        "idle members, 8, known: 39 honest outer steps of 50, fewer than 80%"
    ]


def newcomer(began_s: float, joined_s: float, donors: int) -> Log:
    download = began_at("download", began_s)
    caught_up = replace(CAUGHT_UP, mono_s=joined_s, donors=donors)
    return [began_at("joining", 0.0), download, caught_up, replace(JOINED, mono_s=joined_s)]


def test_newcomers_at_once_are_compared_with_one() -> None:
    alone = [newcomer(2.0, 12.0, 1)]
    four = [newcomer(1.0 + k, 13.0 + 2 * k, 2 + k) for k in range(4)]
    table = newcomers.table_of([alone, four])
    assert table.rows == [(1, 10.0, 10.0, 1.0, 1), (4, 13.5, 15.0, 1.5, 3.5)]
    assert table.missed == []
    four[2] = newcomer(1.0, 16.1, 4)
    assert newcomers.table_of([alone, four]).missed == [
        "4 newcomers at once: download to joined takes 1.51 times as long as for one; at most 1.5 are asked"
    ]


def test_a_case_that_misses_a_bound_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = Table(title="liars", columns=("liar",), rows=[("busy",)], missed=["busy: too few"])
    monkeypatch.setitem(commands.ALL, "liars", lambda: bad)
    assert commands.main(["liars"], None, layout) == 1
    assert capsys.readouterr().out.endswith("missed: busy: too few\n")
    monkeypatch.setitem(commands.ALL, "liars", lambda: replace(bad, missed=()))
    assert commands.main(["liars"], None, layout) == 0


@pytest.mark.parametrize("kind", ["flipped", "Eta(86400)"])
def test_a_share_of_the_liars_bench(kind: str) -> None:
    """Eight outer steps of thirty simulated seconds each. A promise costs one of them, a contribution none."""
    case = next(case for case in liars.CASES if case.kind == kind)
    schedule = replace(liars.schedule_of(case, known=False), lasts_s=8 * liars.OUTER_S, faults=())
    schedule = replace(schedule, peers=schedule.peers[: liars.HONEST + 1])
    lied_to, alone = liars.play(schedule), liars.play(without_liars(schedule))
    assert alone.steps >= 7
    assert lied_to.steps >= alone.steps - (kind != "flipped")
    assert (lied_to.invented, lied_to.blamed, alone.invented) == (0, 0, 0)
