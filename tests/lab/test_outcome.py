from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from p2p_diloco.core.event import (
    Event,
    InnerStepEnded,
    PeerJoined,
    PeerLeft,
    RoundEnded,
    ThetaEvaluated,
    TrainerStalled,
)
from p2p_diloco.lab.faults import ToldFault
from p2p_diloco.lab.outcome import (
    LocalRun,
    guests,
    held_out,
    outcome_of,
    summary_json,
    tokens_per_s,
    trainer_now,
)
from p2p_diloco.lab.screen import last_words
from tests.support.events import COMMITTED, STARTED


def started(name: str, mono_s: float = 0.0) -> Event:
    return replace(STARTED, mono_s=mono_s, peer_id=f"id-{name}", maddrs=())


def inner(mono_s: float, tokens: int, *, step: int = 0, inner_step: int = 1, planned: int = 10) -> InnerStepEnded:
    return InnerStepEnded(
        mono_s=mono_s, step=step, inner_step=inner_step, planned=planned, loss=2.5, tokens=tokens, tokens_per_s=100.0
    )


def made(step: int, head: str, group: list[str], *, committed: bool = True, lost: tuple[str, ...] = ()) -> RoundEnded:
    return replace(
        COMMITTED, step=step, head=head, committed=committed, reason="" if committed else "failed", group=tuple(group),
        dropped=(), lost=lost, bytes_sent=1000, bytes_received=2000,
        gather_s=0.25, reduce_s=0.5, settle_s=0.125, apply_s=0.125,
        signatures=2 * committed, certifying=2 * committed, witnessed=committed,
    )  # fmt: skip


def stall(step: int, seconds: float) -> Event:
    return TrainerStalled(step=step, seconds=seconds)


def evaluated(step: int, loss: float | None) -> Event:
    return ThetaEvaluated(step=step, held_out_loss=loss, tokens=1024, seconds=0.5)


def joined(step: int, head: str) -> Event:
    return PeerJoined(step=step, head=head, from_step=None, snapshot=True, seconds=1.0)


BOTH = ["id-a", "id-b"]


@pytest.fixture
def logs() -> dict[str, list[Event]]:
    """Two peers over two outer steps, the second of which b makes alone with a guest, after an attempt that failed."""
    return {
        "a": [
            started("a"), joined(0, "h0"), evaluated(0, 5.5), inner(1.0, 100), inner(2.0, 200, inner_step=10),
            made(1, "h1", BOTH), stall(1, 0.25), evaluated(1, 4.0),
        ],
        "b": [
            started("b"), joined(0, "h0"), evaluated(0, 5.5), inner(1.0, 50), inner(3.0, 150, inner_step=10),
            made(1, "h1", BOTH), stall(1, 0.75),
            made(1, "h1", BOTH, committed=False, lost=("id-a",)), stall(1, 1.0),
            made(2, "h2", ["id-b", "id-guest"]), stall(2, 0.5), evaluated(2, 3.0),
        ],
    }  # fmt: skip


def test_summary(logs: dict[str, list[Event]]) -> None:
    assert asdict(outcome_of(logs)) == {
        "outer_steps": 2,
        "peers": {"a": "id-a", "b": "id-b"},
        "guests": {"id-guest": 2},
        "heads": {"a": {0: "h0", 1: "h1"}, "b": {0: "h0", 1: "h1", 2: "h2"}},
        "identical": True,
        "held_out": [(0, 5.5), (1, 4.0), (2, 3.0)],
        "tokens_per_s": {"total": 150.0, "peers": {"a": 100.0, "b": 50.0}},
        "stalled_s": {"median": 0.5, "peers": {"a": {1: 0.25}, "b": {1: 1.75, 2: 0.5}}},
        "evaluate_s": {"a": {0: 0.5, 1: 0.5}, "b": {0: 0.5, 2: 0.5}},
        "bytes_sent": {"a": {1: 1000}, "b": {1: 2000, 2: 1000}},
        "bytes_received": {"a": {1: 2000}, "b": {1: 4000, 2: 2000}},
        "group": {1: 2, 2: 2},
        "lost": [{"step": 1, "peer": "id-a"}],
        "missed_rounds": 1,
        "certified": {1: (2, 2), 2: (2, 2)},
        "witnessed": [1, 2],
        "helped": [],
        "uncertified_rounds": {},
    }


def test_json_is_written_in_this_order(logs: dict[str, list[Event]]) -> None:
    del logs["b"]
    fault = ToldFault(at_s=0.5, action="kill", peer="a", process="all", pids=(7, 8), phase="reduce", step=1)
    run = LocalRun(run_id="ab", run_name="tiny", command="swarm", wall_s=1.5, exit_codes={"seed": 0}, faults=[fault])
    written = summary_json(run, outcome_of(logs)).decode()
    assert written == json.dumps(json.loads(written), indent=2) + "\n"
    assert json.dumps(json.loads(written)) == (
        '{"run_id": "ab", "run_name": "tiny", "command": "swarm", "wall_s": 1.5, "exit_codes": {"seed": 0}, '
        '"faults": [{"at_s": 0.5, "action": "kill", "peer": "a", "process": "all", "pids": [7, 8], "phase": "reduce", '
        '"step": 1}], "outer_steps": 1, "peers": {"a": "id-a"}, "guests": {"id-b": 1}, '
        '"heads": {"a": {"0": "h0", "1": "h1"}}, '
        '"identical": true, "held_out": [[0, 5.5], [1, 4.0]], "tokens_per_s": {"total": 100.0, "peers": {"a": 100.0}}, '
        '"stalled_s": {"median": 0.25, "peers": {"a": {"1": 0.25}}}, "evaluate_s": {"a": {"0": 0.5, "1": 0.5}}, '
        '"bytes_sent": {"a": {"1": 1000}}, "bytes_received": {"a": {"1": 2000}}, "group": {"1": 2}, "lost": [], '
        '"missed_rounds": 0, "certified": {"1": [2, 2]}, "witnessed": [1], "helped": [], "uncertified_rounds": {}}'
    )


def test_rounds_without_a_certificate_count_by_what_was_missing(logs: dict[str, list[Event]]) -> None:
    failed = made(1, "h1", BOTH, committed=False)
    logs["a"] += [replace(failed, uncertified="witness"), replace(failed, uncertified="signatures"), failed]
    last = replace(made(3, "h3", BOTH), signatures=1, witnessed=False, helper="id-seed")
    logs["b"] += [replace(failed, uncertified="witness", helper="id-seed"), last]
    outcome = outcome_of(logs)
    assert outcome.uncertified_rounds == {"witness": 2, "signatures": 1}
    assert outcome.certified[3] == (1, 2)
    assert (outcome.witnessed, outcome.helped) == ([1, 2], [3])


def test_other_head_at_one_step_is_told(logs: dict[str, list[Event]]) -> None:
    logs["a"].append(made(2, "another", ["id-a"]))
    outcome = outcome_of(logs)
    assert not outcome.identical
    assert ("heads", "NOT identical after 2 outer steps") in last_words(outcome, byte_level=False)


def test_head_made_again_after_rolling_back_counts(logs: dict[str, list[Event]]) -> None:
    logs["a"] += [made(2, "another", ["id-a"]), made(2, "h2", BOTH)]
    assert outcome_of(logs).identical


def test_nothing_happened() -> None:
    assert not outcome_of({}).identical
    outcome = outcome_of({"a": []})
    assert outcome.outer_steps == 0
    assert last_words(outcome, byte_level=True) == []


def test_held_out_keeps_one_loss_a_step() -> None:
    there = [joined(0, "h0"), made(1, "h1", BOTH)]
    a, b = [*there, evaluated(1, 4.0), evaluated(0, 5.5)], [*there, evaluated(0, 5.5)]
    assert held_out({"a": a, "b": b}) == [(0, 5.5), (1, 4.0)]


def test_held_out_is_that_of_the_history_which_the_swarm_kept(logs: dict[str, list[Event]]) -> None:
    """A was cut off and went on alone, further than the others; then it takes their history."""
    branch = [made(step, f"x{step}", ["id-a"]) for step in (2, 3)]
    logs["a"] += [branch[0], evaluated(2, 0.5), branch[1], evaluated(3, 0.25)]
    logs["c"] = [
        joined(0, "h0"),
        made(1, "h1", BOTH),
        made(2, "h2", BOTH),
        evaluated(2, None),
    ]
    kept = [(0, 5.5), (1, 4.0), (2, 3.0)]
    assert held_out(logs) == kept
    assert outcome_of(logs).held_out == kept
    logs["a"] += [made(2, "h2", BOTH), evaluated(2, 3.25)]
    assert held_out(logs) == kept
    logs["a"].append(made(3, "h3", ["id-a", "id-c"]))
    logs["a"].append(evaluated(3, 2.5))
    assert held_out(logs) == [*kept, (3, 2.5)]


def test_held_out_knows_what_those_who_died_evaluated(logs: dict[str, list[Event]]) -> None:
    logs["b"] += [made(step, f"h{step}", ["id-b"]) for step in range(3, 12)]
    assert held_out(logs) == [(0, 5.5), (1, 4.0), (2, 3.0)]
    del logs["b"][-4]  # it came to outer step 9 by a download, of which its log has no head
    assert held_out(logs) == [(0, 5.5), (1, 4.0), (2, 3.0)]


def test_held_out_of_who_has_not_come_anywhere_is_nothing() -> None:
    assert held_out({}) == held_out({"a": []}) == held_out({"a": [started("a"), evaluated(0, 5.5)]}) == []


def test_speed_does_not_count_the_time_between_two_starts() -> None:
    assert tokens_per_s([started("a"), inner(1.0, 10)]) == 0.0
    log = [started("a"), inner(1.0, 10), inner(2.0, 20), started("a", 99.0), inner(100.0, 5), inner(101.0, 35)]
    assert tokens_per_s(log) == 20.0


def test_guests_are_those_without_a_log(logs: dict[str, list[Event]]) -> None:
    assert guests(logs) == {"id-guest": 2}
    assert guests({"b": logs["b"], "guest": [started("guest")], "a": []}) == {"id-a": 1}


def test_row_follows_the_events() -> None:
    log: list[Event] = []
    assert trainer_now(log).phase == "starting"
    assert trainer_now(log, "failed").phase == "failed"
    log.append(started("a"))
    assert (trainer_now(log).phase, trainer_now(log).peer_id) == ("joining", "id-a")
    log += [joined(3, "h3"), inner(1.0, 100, step=3, inner_step=4)]
    row = trainer_now(log)
    assert (row.phase, row.step, row.inner_step, row.planned, row.loss) == ("training", 3, 4, 10, 2.5)
    log.append(replace(inner(2.0, 200, step=3, inner_step=10), tokens_per_s=0.0))
    assert (trainer_now(log).phase, trainer_now(log).tokens_per_s) == ("outer step", 100.0)
    log.append(made(4, "h4", BOTH))
    row = trainer_now(log)
    assert (row.phase, row.step, row.inner_step, row.group) == ("training", 4, 0, 2)
    assert (row.round_s, row.round_bytes) == (1.0, 3000)
    assert (trainer_now(log, "done").phase, trainer_now(log, "done").tokens_per_s) == ("done", 0.0)
    log.append(PeerLeft(step=4, head="h4", reason="done"))
    assert trainer_now(log).phase == "left"


def test_who_was_lost_to_several_is_told_once(logs: dict[str, list[Event]]) -> None:
    logs["c"] = [started("c"), made(1, "h1", BOTH, committed=False, lost=("id-a",))]
    assert [(one.step, one.peer) for one in outcome_of(logs).lost] == [(1, "id-a")]


def test_who_made_no_outer_step_is_no_guest(logs: dict[str, list[Event]]) -> None:
    logs["b"].append(made(2, "h2", ["id-b", "id-stranger"], committed=False))
    assert guests(logs) == {"id-guest": 2}
