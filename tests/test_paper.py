"""docs/paper.md says what its figures say: its tables are those of docs/paper/*.json, and its claims hold there."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from statistics import mean

import pytest

from p2p_diloco.report import Row, Summary, markdown, rows_of
from p2p_diloco.study import Study

ROOT = Path(__file__).parent.parent
FIGURES = sorted((ROOT / "docs/paper").glob("*.json"))


@cache
def results(name: str) -> tuple[Study, dict[str, Summary]]:
    """A study as its file is now, and the committed figures of its arms and seeds."""
    figures = json.loads((ROOT / "docs/paper" / f"{name}.json").read_text())
    study = Study.load(ROOT / "peers/experiments" / f"{figures['study']}.toml", figures["size"])
    found = {(trial["arm"], trial["seed"]): {**trial, "curve": [trial["last"]]} for trial in figures["trials"]}
    keys = {(trial.arm, trial.seed): trial.key for trial in study.trials}
    return study, {keys[which]: summary for which, summary in found.items()}


def rows(name: str) -> dict[str, Row]:
    return {row.arm: row for row in rows_of(*results(name))}


@pytest.mark.parametrize("path", FIGURES, ids=[path.stem for path in FIGURES])
def test_a_table_of_the_page_is_that_of_its_figures(path: Path) -> None:
    page = (ROOT / "docs/paper.md").read_text()
    study, summaries = results(path.stem)
    for line in markdown(study, rows_of(study, summaries)).splitlines():
        assert line.startswith("###") or line in page, line
    assert f"paper/{path.stem}.png" in page
    assert path.with_suffix(".png").exists()


def test_diloco_is_between_one_worker_and_four_times_the_batch() -> None:
    """With every seed; and it closes more than half of the gap."""
    main = rows("main")
    worker, diloco = main["one worker"], main["DiLoCo, 4 replicas"]
    batch, updates = main["data-parallel, 4 x batch"], main["one worker, 4 x steps"]
    assert worker.seeds == diloco.seeds == batch.seeds == (0, 1, 2)
    for one, ours, large in zip(worker.losses, diloco.losses, batch.losses):
        assert large < ours < one
    assert mean(updates.losses) < mean(diloco.losses)
    assert diloco.closed is not None
    assert diloco.closed > 0.5


def test_the_more_seldom_the_worse() -> None:
    """From H = 25 on; below that in the quick variant only."""
    quick, full = ([mean(row.losses) for row in rows(name).values()] for name in ("inner-steps-quick", "inner-steps"))
    assert len(quick) == len(full) == 5
    assert quick == sorted(quick)
    assert full[1:] == sorted(full[1:])
    assert full[0] > full[1]


@pytest.mark.parametrize("kind", ["", "non-i.i.d., "])
def test_the_more_is_dropped_the_more_it_costs_and_never_all(kind: str) -> None:
    drop = rows("drop")
    none = drop["non-i.i.d., no drops" if kind else "DiLoCo, no drops"]
    arms = [none, *(drop[f"{kind}drop {percent} %"] for percent in (10, 30, 50))]
    for seed in arms[-1].seeds:
        losses = [dict(zip(row.seeds, row.losses))[seed] for row in arms]
        assert losses == sorted(losses), seed
    worker = dict(zip(drop["one worker"].seeds, drop["one worker"].losses))
    assert all(loss < worker[seed] for row in arms for seed, loss in zip(row.seeds, row.losses))


def test_half_of_all_dropped_costs_less_than_half_of_what_there_is_to_gain() -> None:
    half, worker = rows("drop")["drop 50 %"], rows("drop")["one worker"]
    assert mean(half.differences) < 0.5 * mean(worker.differences)
    assert half.seeds == worker.seeds == (0, 1, 2)


def test_text_of_ones_own_makes_little_difference() -> None:
    """Beside what there is to gain."""
    own, worker = rows("drop")["non-i.i.d., no drops"], rows("drop")["one worker"]
    assert abs(mean(own.differences)) < 0.25 * mean(worker.differences)
    assert own.seeds == (0, 1, 2)
