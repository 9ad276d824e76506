"""What a file of faults says, and when which fault is due. No process, no clock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p_diloco.core.errors import UsageError
from p2p_diloco.core.event import Event, LoggedPhase, PhaseBegan, TrainerStalled
from p2p_diloco.lab.children import names_of
from p2p_diloco.lab.faults import (
    OPPOSITE,
    Act,
    Done,
    Fault,
    FaultPlan,
    due,
    is_undone,
    plights,
    restarts_to_come,
    waits_for_phase,
)

NAMES = names_of(4)
TRAINERS = NAMES[1:]


def load(folder: Path, text: str) -> FaultPlan:
    path = folder / "faults.toml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    return FaultPlan.load(path, NAMES)


def plan_of(*faults: dict[str, Any], seed: int = 0) -> FaultPlan:
    return FaultPlan(seed=seed, fault=[Fault.model_validate(fault) for fault in faults])


def begins(phase: LoggedPhase, step: int) -> Event:
    return PhaseBegan(phase=phase, step=step)


class Play:
    """A swarm in which whatever is due happens at once, and nothing else does."""

    def __init__(self, plan: FaultPlan) -> None:
        self.plan = plan
        self.done: list[Done] = []
        self.running = set(NAMES)

    def at(self, now_s: float, **fresh: list[Event]) -> list[tuple[str, str]]:
        """(action, peer) of what is due now, and is done."""
        events = {name.replace("_", "-"): log for name, log in fresh.items()}
        acts = due(self.plan, now_s, fresh=events, done=self.done, trainers=TRAINERS, running=self.running)
        for act in acts:
            self.do(act, now_s)
        return [(act.action, act.peer) for act in acts]

    def do(self, act: Act, now_s: float) -> None:
        hit = act.action == "restart" or act.peer in self.running
        self.done.append(Done(act=act, at_s=now_s, mono_s=now_s, pids=(1,) if hit else (), phase="", step=0))
        if act.action == "kill" and act.process not in ("guard", "p2pd"):
            self.running.discard(act.peer)
        elif act.action == "restart":
            self.running.add(act.peer)


# -- the file ----------------------------------------------------------------------------------------------------------


def test_a_file_of_faults(tmp_path: Path) -> None:
    plan = load(
        tmp_path,
        """
        seed = 7
        [[fault]]
        action = "kill"
        phase = "reduce"
        outer_step = 3
        peer = "peer-2"
        process = "network"
        for_s = 5
        [[fault]]
        action = "cut"
        at_s = 12.5
        peer = ["peer-1", "seed"]
        """,
    )
    assert plan.seed == 7
    assert plan.fault[0] == Fault(
        action="kill", phase="reduce", outer_step=3, peer=["peer-2"], process="network", for_s=5.0
    )
    assert plan.fault[1] == Fault(action="cut", at_s=12.5, peer=["peer-1", "seed"])
    assert plan.cuts
    assert not FaultPlan(fault=plan.fault[:1]).cuts


KILL = '[[fault]]\naction = "kill"\nat_s = 1\npeer = "peer-1"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fault =", "not valid TOML"),
        ("\udcff", "not a text file in UTF-8"),
        ("sede = 1", "unknown key 'sede'; did you mean 'seed'?"),
        ("seed = -1", "key 'seed'"),
        ("[fault]\naction = 'kill'", "key 'fault'"),
        (KILL + KILL + "proces = 'all'", "unknown key 'fault.2.proces'; did you mean 'process'?"),
        (KILL.replace("peer", "piir"), "key 'fault.1.peer' is missing"),
        (KILL.replace("kill", "slay"), "key 'fault.1.action': input should be 'kill', 'stop', 'cut', 'restart'"),
        (
            KILL + "process = 'p2p'",
            "key 'fault.1.process': input should be 'trainer', 'network', 'guard', 'p2pd' or 'all'",
        ),
        (KILL.replace("peer-1", "peer-5"), "key 'fault.1.peer': no peer 'peer-5'; there are seed, peer-1, "),
        (KILL.replace('"peer-1"', "[]"), "key 'fault.1.peer': list should have at least 1 item"),
        (KILL.replace('"peer-1"', '["peer-1", "peer-1"]'), "key 'fault.1': peer names somebody twice"),
        (KILL.replace('"peer-1"', '["peer-1", "random"]'), "key 'fault.1': peer names somebody twice, or random"),
        (KILL.replace("at_s = 1", ""), "key 'fault.1': give either at_s or phase"),
        (KILL + "phase = 'inner'", "key 'fault.1': give either at_s or phase"),
        (KILL.replace("at_s = 1", "phase = 'iner'"), "key 'fault.1.phase'"),
        (KILL.replace("at_s = 1", "at_s = nan"), "key 'fault.1.at_s'"),
        (KILL.replace("at_s = 1", "at_s = true"), "key 'fault.1.at_s'"),
        (KILL + "outer_step = 1", "key 'fault.1': outer_step goes with phase"),
        (KILL.replace("at_s = 1", "phase = 'inner'\nevery_s = 1"), "key 'fault.1': every_s goes with at_s"),
        (KILL + "for_s = 0", "key 'fault.1.for_s': input should be greater than 0 (got '0')"),
        (KILL + "process = 'p2pd'\nfor_s = 1", "a peer starts its p2pd again by itself"),
        (KILL + "process = 'guard'\nfor_s = 1", "a peer starts its p2pd again by itself"),
        (KILL.replace("kill", "cut") + "process = 'p2pd'", "process goes with kill, stop and resume, not with cut"),
        (KILL.replace("kill", "restart") + "for_s = 1", "phase and for_s go with kill, stop and cut, not with restart"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        load(tmp_path, text)
    assert str(raised.value).startswith(f"{tmp_path / 'faults.toml'}: ")
    assert message in str(raised.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.toml: no such file of faults"):
        FaultPlan.load(tmp_path / "none.toml", NAMES)


# -- when --------------------------------------------------------------------------------------------------------------


def test_a_fault_at_a_time_comes_once_and_its_opposite_after_it() -> None:
    play = Play(plan_of({"action": "stop", "at_s": 2, "peer": "peer-1", "process": "p2pd", "for_s": 3}))
    assert play.at(1.9) == []
    assert play.at(2.5) == [("stop", "peer-1")]
    assert play.at(5.4) == []
    assert play.at(5.5) == [("resume", "peer-1")]
    assert play.at(60.0) == []
    assert [past.act.process for past in play.done] == ["p2pd", "p2pd"]


def test_a_fault_at_a_phase_is_the_peers_own_and_at_its_outer_step() -> None:
    play = Play(plan_of({"action": "kill", "phase": "reduce", "outer_step": 3, "peer": "peer-2"}))
    assert waits_for_phase(play.plan, play.done)
    assert play.at(1.0, peer_1=[begins("reduce", 3)]) == []
    assert play.at(2.0, peer_2=[begins("reduce", 2), begins("gather", 3)]) == []
    assert play.at(3.0, peer_2=[TrainerStalled(step=3, seconds=0.5)]) == []
    assert play.at(4.0, peer_2=[begins("gather", 3), begins("reduce", 3), begins("settle", 3)]) == [("kill", "peer-2")]
    assert not waits_for_phase(play.plan, play.done)
    assert play.at(5.0, peer_2=[begins("reduce", 3)]) == []


def test_a_random_peer_is_one_of_those_that_come_to_the_phase() -> None:
    play = Play(plan_of({"action": "kill", "phase": "serve", "peer": "random"}))
    assert play.at(1.0, peer_2=[begins("inner", 1)], seed=[begins("serve", 1)]) == []
    assert play.at(2.0, peer_3=[begins("serve", 1)]) == [("kill", "peer-3")]
    assert play.at(3.0, peer_2=[begins("serve", 1)]) == []


def test_without_an_outer_step_the_first_time_counts() -> None:
    play = Play(plan_of({"action": "kill", "phase": "serve", "peer": "seed"}))
    assert play.at(4.0, seed=[begins("serve", 11)]) == [("kill", "seed")]
    assert play.at(5.0, seed=[begins("serve", 12)]) == []


def test_several_peers_are_hit_at_the_same_moment() -> None:
    play = Play(plan_of({"action": "cut", "phase": "inner", "peer": ["peer-3", "peer-4"], "for_s": 4}))
    assert play.at(1.0, peer_4=[begins("inner", 0)]) == []
    assert play.at(2.0, peer_3=[begins("inner", 0)]) == [("cut", "peer-3"), ("cut", "peer-4")]
    assert {past.act.island for past in play.done} == {"island-0"}
    assert play.at(6.0) == [("restore", "peer-3"), ("restore", "peer-4")]
    alone = Play(plan_of({"action": "cut", "at_s": 0, "peer": "peer-3"}))
    alone.at(0.0)
    assert alone.done[0].act.island == ""


def test_what_could_not_be_done_stays_due() -> None:
    """The restart of a peer of which something is left is not done."""
    plan = plan_of({"action": "kill", "at_s": 0, "peer": ["peer-1", "peer-2"], "for_s": 1})
    play = Play(plan)
    play.at(0.0)
    acts = due(plan, 1.0, fresh={}, done=play.done, trainers=TRAINERS, running=play.running)
    assert [act.peer for act in acts] == ["peer-1", "peer-2"]
    play.do(acts[1], 1.0)
    assert restarts_to_come(plan, play.done)
    assert play.at(1.1) == [("restart", "peer-1")]
    assert not restarts_to_come(plan, play.done)
    assert play.at(9.0) == []


def test_every_so_often_a_random_peer_of_those_that_run() -> None:
    plan = plan_of({"action": "kill", "at_s": 10, "every_s": 5, "peer": "random", "for_s": 12}, seed=3)
    play = Play(plan)
    hit: list[str] = []
    for tenth in range(1200):
        for action, peer in play.at(tenth / 10):
            assert peer in TRAINERS
            if action == "kill":
                hit.append(peer)
        assert len(play.running) >= len(NAMES) - 3
    assert len(hit) == 22
    assert set(hit) == set(TRAINERS)
    again = Play(plan)
    assert [peer for tenth in range(1200) for action, peer in again.at(tenth / 10) if action == "kill"] == hit
    other = Play(plan.model_copy(update={"seed": 4}))
    assert [peer for tenth in range(1200) for action, peer in other.at(tenth / 10) if action == "kill"] != hit


def test_opposites_choose_among_those_that_need_them() -> None:
    play = Play(
        plan_of(
            {"action": "stop", "at_s": 1, "peer": "peer-2"},
            {"action": "cut", "at_s": 1, "peer": "peer-3"},
            {"action": "resume", "at_s": 2, "peer": "random"},
            {"action": "restore", "at_s": 2, "peer": "random"},
            {"action": "restart", "at_s": 2, "peer": "random"},
            {"action": "kill", "at_s": 3, "peer": "peer-4"},
        )
    )
    play.at(1.0)
    assert plights(play.done) == {"peer-2": "stopped", "peer-3": "cut off"}
    assert play.at(2.0) == [("resume", "peer-2"), ("restore", "peer-3")]
    assert plights(play.done) == {}
    assert play.at(3.0) == [("kill", "peer-4")]
    assert restarts_to_come(play.plan, play.done)
    assert play.at(3.1) == [("restart", "peer-4")]


def test_a_random_peer_is_not_one_that_is_down_already() -> None:
    play = Play(plan_of({"action": "stop", "at_s": 0, "every_s": 1, "peer": "random"}))
    stopped = [peer for second in range(9) for _, peer in play.at(float(second))]
    assert sorted(stopped) == TRAINERS


def test_a_peer_that_has_ended_is_neither_chosen_nor_started_again() -> None:
    play = Play(plan_of({"action": "kill", "at_s": 1, "peer": "random"}))
    play.running -= set(TRAINERS)
    assert play.at(2.0) == []
    named = Play(plan_of({"action": "kill", "at_s": 1, "peer": "peer-1", "for_s": 1}))
    named.running.discard("peer-1")
    assert named.at(1.0) == [("kill", "peer-1")]
    assert named.at(9.0) == []
    assert not restarts_to_come(named.plan, named.done)


@pytest.mark.parametrize("process", ["guard", "p2pd"])
def test_a_peer_that_lost_its_p2pd_is_not_down(process: str) -> None:
    play = Play(plan_of({"action": "kill", "at_s": 1, "peer": "peer-1", "process": process}))
    play.at(1.0)
    assert plights(play.done) == {}
    assert not restarts_to_come(play.plan, play.done)


@st.composite
def faults(draw: st.DrawFn) -> Fault:
    action = draw(st.sampled_from(["kill", "stop", "cut"]))
    fields: dict[str, Any] = {
        "action": action,
        "peer": draw(st.sampled_from([*NAMES, "random", ["peer-1", "peer-3"]])),
        "for_s": draw(st.none() | st.floats(0.1, 10.0)),
    }
    if draw(st.booleans()):
        fields |= {"at_s": draw(st.floats(0.0, 20.0)), "every_s": draw(st.none() | st.floats(1.0, 9.0))}
    else:
        fields |= {"phase": "reduce", "outer_step": draw(st.none() | st.integers(0, 3))}
    return Fault.model_validate(fields)


@given(st.lists(faults(), max_size=4), st.lists(st.integers(0, 20), max_size=60), st.integers(0, 99))
def test_whatever_the_plan_opposites_are_no_more_than_faults_and_follow_in_time(
    planned: list[Fault], pauses: list[int], seed: int
) -> None:
    play, now_s = Play(FaultPlan(seed=seed, fault=planned)), 0.0
    for step, tenths in enumerate(pauses):
        now_s += tenths / 10
        play.at(now_s, peer_1=[begins("reduce", step)], seed=[begins("reduce", step)])
    for number, fault in enumerate(planned):
        mine = [past for past in play.done if past.act.fault == number]
        begun = [past for past in mine if not past.act.follows]
        followed = [past for past in mine if past.act.follows]
        assert len(followed) <= len(begun)
        assert all(past.act.action == OPPOSITE[fault.action] for past in followed)
        if fault.every_s is None:
            assert len(begun) <= len(fault.peer)
        if fault.for_s is not None:
            late = [past for past in begun if now_s >= past.at_s + fault.for_s]
            assert all(is_undone(past, play.done) for past in late)
