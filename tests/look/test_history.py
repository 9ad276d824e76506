"""The curve and the pace: what is kept, for how long, and over a restart."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from p2p_diloco.look.history import GAP, MAX_POINTS, PACE_EVERY_S, History
from p2p_diloco.look.overview import Overview, overview_of
from tests.support.builders import NOW_S, RUN_ID, identity, record_of


def seen(step: int, after_s: float = 0.0, **changes: Any) -> Overview:
    fields: dict[str, Any] = {"step": step, "loss": 10.0 - step, "tokens_per_s": 100.0}
    return overview_of([record_of(identity(1), "a", **fields | changes)], NOW_S + after_s)


def nobody(after_s: float) -> Overview:
    return overview_of([], NOW_S + after_s)


def test_the_curve_has_a_point_an_outer_step() -> None:
    history = History(run_id=RUN_ID)
    for step, held_out_step in ((0, 0), (1, 0), (1, 1), (2, 1)):
        history.learn(seen(step, loss=10.0 - step, held_out_loss=5.0 - held_out_step, held_out_step=held_out_step))
    columns = history.curve_columns()
    assert columns == {"step": [0, 1, 2], "held_out_loss": [5.0, 4.0, None], "loss": [10.0, 9.0, 8.0]}


def test_an_evaluation_that_comes_late_finds_its_step() -> None:
    history = History(run_id=RUN_ID)
    for step in (3, 7, 9):
        history.learn(seen(step, held_out_loss=4.0, held_out_step=5) if step == 9 else seen(step))
    assert history.curve_columns()["step"] == [3, 5, 7, 9]
    assert history.curve_columns()["held_out_loss"] == [None, 4.0, None, None]


def test_when_the_swarm_came_to_its_step() -> None:
    history, since = History(run_id=RUN_ID), []
    for step, after_s in ((4, 0.0), (4, 3.0), (5, 6.0), (5, 9.0)):
        history.learn(seen(step, after_s))
        since.append((history.step, history.step_since_s))
    history.learn(nobody(12.0))
    since.append((history.step, history.step_since_s))
    assert since == [(4, NOW_S), (4, NOW_S), (5, NOW_S + 6), (5, NOW_S + 6), (5, NOW_S + 6)]


def test_a_long_run_keeps_a_bounded_curve_from_its_first_step_to_its_last() -> None:
    history, longest = History(run_id=RUN_ID), 0
    for step in range(5 * MAX_POINTS + 7):
        history.learn(seen(step, step, held_out_loss=1.0, held_out_step=max(step - 1, 0)))
        longest = max(longest, len(history.curve), len(history.pace))
    steps = [point.step for point in history.curve]
    assert longest == MAX_POINTS
    assert steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (0, 5 * MAX_POINTS + 6)
    assert {later - earlier for earlier, later in pairwise(steps[:-3])} == {history.curve_stride}
    assert history.curve[-2].held_out_loss == 1.0


def test_steps_in_any_order_stay_in_order() -> None:
    history, generator = History(run_id=RUN_ID), random.Random(0)
    for i in range(500):
        history.learn(seen(generator.randrange(40), i))
    steps = [point.step for point in history.curve]
    assert steps == sorted(set(steps))


def test_the_pace_has_a_point_every_few_seconds_and_a_gap_where_nobody_watched() -> None:
    history = History(run_id=RUN_ID)
    for after_s in (0.0, 1.0, PACE_EVERY_S, PACE_EVERY_S + 1):
        history.learn(seen(1, after_s))
    late_s = PACE_EVERY_S * (GAP + 2)
    history.learn(nobody(late_s))
    assert [point.at_s - NOW_S for point in history.pace] == [0.0, PACE_EVERY_S, 2 * PACE_EVERY_S, late_s]
    assert [point.tokens_per_s for point in history.pace] == [100.0, 100.0, None, 0.0]
    assert [point.peers for point in history.pace] == [1, 1, 0, 0]


def test_a_clock_that_is_set_back_does_not_stop_the_pace() -> None:
    history = History(run_id=RUN_ID)
    for after_s in (0.0, 10.0, 20.0, 5.0, 12.0):
        history.learn(seen(1, after_s))
    assert [point.at_s - NOW_S for point in history.pace] == [0.0, 5.0, 12.0]


def test_it_goes_on_after_a_restart(tmp_path: Path) -> None:
    path, history = tmp_path / "history.json", History(run_id=RUN_ID)
    for step in range(3):
        history.learn(seen(step, 10.0 * step, held_out_loss=2.0, held_out_step=step))
    history.save(path)
    loaded = History.load(path, RUN_ID)
    assert loaded == history
    loaded.learn(seen(2, 25.0))
    assert loaded.step_since_s == NOW_S + 20
    assert [path.name for path in tmp_path.iterdir()] == ["history.json"]


def spoiled(history: History, **changes: Any) -> str:
    return json.dumps(history.model_dump() | changes)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"run_id": 7}',
        spoiled(History(run_id=RUN_ID), step=-1),
        spoiled(History(run_id=RUN_ID), curve_stride=0),
        spoiled(History(run_id=RUN_ID), pace_every_s=0.0),
        spoiled(History(run_id=RUN_ID), curve=[{"step": i} for i in range(MAX_POINTS + 1)]),
        spoiled(History(run_id=RUN_ID), surplus=1),
    ],
)
def test_a_damaged_file_is_told_and_the_curve_begins_anew(
    content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "history.json"
    path.write_text(content)
    assert History.load(path, RUN_ID) == History(run_id=RUN_ID)
    assert "cannot be read" in caplog.text


def test_the_history_of_another_run_is_not_this_runs(tmp_path: Path) -> None:
    path = tmp_path / "history.json"
    History(run_id="another", step=7).save(path)
    assert History.load(path, RUN_ID) == History(run_id=RUN_ID)


def test_a_disk_that_takes_nothing_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    History(run_id=RUN_ID).save(tmp_path / "nowhere" / "history.json")
    assert "cannot be written" in caplog.text
