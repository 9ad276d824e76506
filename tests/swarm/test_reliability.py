"""Faults on real processes: from a file, as a user writes it; and of ``benchmarks`` what there is time for."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator

import pytest

from benchmarks.churn import SETTLING_S, SPARE_DESCRIPTORS, SPARE_MB, churn, figures
from benchmarks.matrix import TRAINERS, Case, run_case
from benchmarks.onslaught import kill_all
from benchmarks.partition import APART, part_and_heal
from benchmarks.processes import Usage, usage_of
from benchmarks.stage import SPEC, Stage
from p2p_diloco.core.event import PeerStarted
from p2p_diloco.core.runfile import InnerSpec
from p2p_diloco.lab.namespaces import Network, why_not
from tests.swarm.places import START_S, Place, wait_until

FAULTS = """
[[fault]]
action = "stop"
phase = "gather"
outer_step = 0
peer = "peer-1"
process = "trainer"
for_s = 0.5

[[fault]]
action = "kill"
phase = "gather"
outer_step = 1
peer = "peer-2"
process = "network"
for_s = 0.5
"""
CUT = """
[[fault]]
action = "cut"
phase = "reduce"
outer_step = 2
peer = "peer-1"
for_s = 1
"""
CABLES = why_not()
needs_cables = pytest.mark.skipif(CABLES is not None, reason=f"no network namespaces: {CABLES}")


def test_what_a_fault_does_is_no_failure_and_anything_else_is() -> None:
    place = Place(outer_steps=4, inner_steps=10, min_group=2, gather_s=5.0, snapshot_every=2)
    try:
        swarm_with_faults(place)
    finally:
        place.clear()


def swarm_with_faults(place: Place) -> None:
    faults = place.root / "faults.toml"
    faults.write_text(FAULTS + (CUT if CABLES is None else ""))
    swarm = place.swarm(peers="3", faults=str(faults), patience="0.5")
    os.kill(wait_until(lambda: place.main_process_of("peer-3"), swarm), signal.SIGKILL)
    assert swarm.process.wait(2 * START_S) == 1, swarm.text
    place.assert_nothing_left()

    summary = place.summary
    assert summary["exit_codes"] == {"seed": 0, "peer-1": 0, "peer-2": 0, "peer-3": -9}
    assert (summary["outer_steps"], summary["identical"]) == (4, True)
    of_peer_1, of_peer_2 = ([f for f in summary["faults"] if f["peer"] == name] for name in ("peer-1", "peer-2"))
    actions = ["stop", "resume", *(["cut", "restore"] if CABLES is None else [])]
    assert [fault["action"] for fault in of_peer_1] == actions
    assert [fault["action"] for fault in of_peer_2] == ["kill", "restart"]
    # Of so small a model a phase may be over when it is seen.
    assert of_peer_2[0]["step"] >= 1
    assert all(fault["step"] >= 2 for fault in of_peer_1[2:])
    stopped, resumed, killed, restarted = (fault["pids"] for fault in (*of_peer_1[:2], *of_peer_2))
    assert len(stopped) == len(killed) == len(restarted) == 1
    assert stopped == resumed
    assert [event.pid for event in place.events("peer-2", PeerStarted)][:-1] == killed
    assert f"kill peer-2 network ({killed[0]}), " in swarm.text
    assert "peer-3 failed with exit code -9: " in swarm.text
    assert "peer-2 failed" not in swarm.text


# -- one swarm for all that follows ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    """When it is left, every process and temporary file of it must be gone."""
    spec = SPEC.model_copy(update={"inner": InnerSpec(steps=30)})
    with Stage(TRAINERS, spec=spec, places=Network() if CABLES is None else None) as stage:
        yield stage


@pytest.fixture(scope="module")
def usage_of_seed() -> list[dict[str, Usage]]:
    """After each case: process -> what it holds."""
    return []


CASES = [
    Case("inner", "stop", "trainer"),
    Case("gather", "stop", "network"),
    Case("reduce", "kill", "network"),
    Case("settle", "kill", "p2pd"),
    Case("apply", "stop", "network"),
    Case("snapshot", "stop", "p2pd"),
    Case("download", "kill", "trainer"),
    Case("reduce", "cut"),
]


@pytest.mark.parametrize(("number", "case"), list(enumerate(CASES)), ids=list(map(str, CASES)))
def test_the_others_go_on_and_the_victim_comes_back(
    stage: Stage, usage_of_seed: list[dict[str, Usage]], number: int, case: Case
) -> None:
    if case.action == "cut" and CABLES is not None:
        pytest.skip(f"no network namespaces: {CABLES}")
    assert run_case(stage, case, number, down_s=4.0).hit
    usage_of_seed.append(
        {name: usage_of(pid) or Usage(0, 0.0) for name, pid in stage.children.named("seed").processes().items()}
    )


def test_the_seed_has_not_grown(usage_of_seed: list[dict[str, Usage]]) -> None:
    """Since the third case: by then it has done everything once."""
    for name, spare_mb in SPARE_MB.items():
        before, after = usage_of_seed[2][name], usage_of_seed[-1][name]
        assert 0 < after.descriptors <= before.descriptors + SPARE_DESCRIPTORS
        assert after.resident_mb <= before.resident_mb + spare_mb


def test_all_killed_at_once_go_on_where_the_first_of_them_was(stage: Stage) -> None:
    generator = random.Random(2)
    for _ in range(2):
        kill_all(stage, generator)


def test_peers_that_come_and_go_hold_nobody_up(stage: Stage) -> None:
    """Two deaths, so that two are left however long the new ones take to start. It is too short to see whether anybody
    grows. From here on the swarm has other members."""
    result = churn(stage, seconds=60.0, every_s=40.0, settling_s=SETTLING_S)
    assert result.killed == 2
    assert [one for one in figures(stage, result) if one[1] > one[2]] == []


@needs_cables
def test_halves_that_are_connected_again_have_one_history(stage: Stage) -> None:
    """The last test of this swarm: from here on its peers' logs tell of two histories."""
    healed = part_and_heal(stage)
    assert all(steps >= APART for steps in healed.made.values())
    assert all(steps >= APART for steps in healed.given_up.values())
    assert len(healed.given_up) == TRAINERS / 2
