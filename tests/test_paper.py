"""docs/paper.md says what its figures say: its tables are those of docs/paper/*.json, and its claims hold there."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from statistics import mean

import pytest

from p2p_diloco.lab.report import ArmResult, arm_results, markdown
from p2p_diloco.lab.simulation_result import TrialResult
from p2p_diloco.lab.study import Study

ROOT = Path(__file__).parent.parent
FIGURES = sorted((ROOT / "docs/paper").glob("*.json"))


@cache
def results(name: str) -> tuple[Study, dict[str, TrialResult]]:
    """A study as its file is now, and the committed figures of its arms and seeds."""
    figures = json.loads((ROOT / "docs/paper" / f"{name}.json").read_text())
    study = Study.load(ROOT / "peers/experiments" / f"{figures['study']}.toml", figures["size"])
    found = {(trial["arm"], trial["seed"]): trial for trial in figures["trials"]}
    keys = {(trial.arm, trial.seed): trial.key for trial in study.trials}
    assert all(keys[which] == trial["key"] for which, trial in found.items()), "the study is another one by now"
    return study, {keys[which]: TrialResult.parse(trial) for which, trial in found.items()}


def rows(name: str) -> dict[str, ArmResult]:
    return {row.arm: row for row in arm_results(*results(name))}


@pytest.mark.parametrize("path", FIGURES, ids=[path.stem for path in FIGURES])
def test_a_table_of_the_page_is_that_of_its_figures(path: Path) -> None:
    page = (ROOT / "docs/paper.md").read_text()
    study, summaries = results(path.stem)
    for line in markdown(study, arm_results(study, summaries)).splitlines():
        assert line.startswith("###") or line in page, line
    assert f"paper/{path.stem}.png" in page
    assert path.with_suffix(".png").exists()


def claims() -> dict[str, str]:
    """The third column of the page's first table, where it has figures."""
    main, drop, eight, steps = rows("main"), rows("drop"), rows("drop-eight"), rows("inner-steps")
    outer, replicas, pool, shards = rows("outer"), rows("replicas"), rows("pool"), rows("shards")
    pretraining, pruning, overlap, single = rows("pretraining"), rows("pruning"), rows("overlap"), rows("single")
    codecs, speeds = rows("codecs"), rows("speeds")
    diloco, updates = main["DiLoCo, 4 replicas"], main["one worker, 4 x steps"]
    lower = sum(ours < theirs for ours, theirs in zip(diloco.losses, updates.losses))
    gain, own = f"{-mean(diloco.differences):.3f}", "non-i.i.d., "
    return {
        "DiLoCo beats one worker in the same time": (
            f"{loss(diloco)} against {loss(main['one worker'])}, with every seed"
        ),
        "DiLoCo beats k times the batch at as many steps": (
            f"{loss(diloco)} against {loss(main['data-parallel, 4 x batch'])}, with every seed: "
            f"it closes {closed(diloco)} % of the gap"
        ),
        "k times the updates in one worker beat DiLoCo": (
            f"{loss(updates)} against {loss(diloco)}, DiLoCo lower with {lower} of 3 seeds: no difference"
        ),
        "dropped contributions cost little": (
            f"10, 30, 50 %: {', '.join(lost(drop, f'drop {p} %', 'DiLoCo, no drops') for p in (10, 30, 50))} % of the "
            f"gain; non-i.i.d. {', '.join(lost(drop, f'{own}drop {p} %', f'{own}no drops') for p in (10, 30, 50))} %; "
            f"50 % of eight replicas' {lost(eight, 'drop 50 %', '8 replicas')} % of theirs, non-i.i.d. "
            f"{lost(eight, f'{own}drop 50 %', 'non-i.i.d.')} %"
        ),
        "loss rises with H, slowly": (
            f"from H = 25 to 50, 100, 200: {off(steps['H = 50'])}, {off(steps['H = 100'])}, {off(steps['H = 200'])}, "
            f"with every seed; but H = 10 is {mean(steps['H = 10'].differences):.3f} worse than 25"
        ),
        "non-i.i.d. text costs little": (
            f"four replicas: {off(shards['non-i.i.d.'])} of {gain} to gain; eight: "
            f"{off(eight['non-i.i.d.'])} of {mean(eight['one worker'].differences):.3f}"
        ),
        "Nesterov is the best outer optimizer, SGD and Adam are poor": (
            f"Nesterov {loss(outer['Nesterov, 0.8, 0.8'])}, momentum {loss(outer['momentum, 0.8, 0.8'])}, "
            f"Adam {loss(outer['Adam, 0.3, 0.9'])}, averaging {loss(outer['averaging (SGD, 1.0)'])}; with every seed"
        ),
        "more replicas reach a lower loss, each with less": (
            f"from 1 to 2, 4, 8, 16: {', '.join(off(replicas[name]) for name in ('2', '4', '8', '16'))}"
        ),
        "how much is computed in all decides, not when": (
            "loss falls with computing; pools that grow end "
            f"{apart(pool, 'halving, 4 to 2', 'doubling, 2 to 4'):.3f} and "
            f"{apart(pool, 'ramp down, 4 to 1', 'ramp up, 1 to 4'):.3f} below those that shrink, with every seed"
        ),
        "DiLoCo needs little pretraining, or none": (
            f"a quarter of the steps is best; from random weights {apart(pretraining, 'none', 'a quarter'):+.2f}"
        ),
        "outer gradients can be pruned by sign": (
            f"{', '.join(off(pruning[f'{percent} % pruned']) for percent in (25, 50, 75))} of {gain} to gain"
        ),
        "an update may come late": (
            f"two of 25 steps late: {off(overlap['2 steps late, half and half'])}; eight: "
            f"{off(overlap['8 steps late, half and half'])}, theta alone {off(overlap['8 steps late, theta alone'])}"
        ),
        "the outer step helps one worker alone, too": (
            f"outer lr 0.4: {off(single['DiLoCo, 1 replica, 0.4, 0.8'])}, 0.8: {off(single['DiLoCo, 1 replica'])}; "
            "with every seed"
        ),
        "an outer gradient needs few bits": (
            f"int4 {mean(codecs['int4'].differences):+.4f}; two bits {off(codecs['int2'])}, one {off(codecs['int1'])}"
        ),
        "slow replicas help with as many inner steps as they can": (
            f"two of four at half the speed: {closed(speeds['two of half the speed'])} % of the gain, where two alone "
            f"have {closed(speeds['two alike'])} %"
        ),
    }


def test_the_claims_are_those_of_the_figures() -> None:
    page = (ROOT / "docs/paper.md").read_text()
    cells = dict(re.findall(r"^\| (.+) \| .+ \| (.+) \| .+ \|$", page, re.MULTILINE))
    assert {claim: cells.get(claim) for claim in claims()} == claims()


def loss(row: ArmResult) -> str:
    return f"{mean(row.losses):.4f}"


def off(row: ArmResult) -> str:
    """From the study's reference."""
    return f"{mean(row.differences):+.3f}"


def closed(row: ArmResult) -> str:
    """Of the study's gap, in percent."""
    assert row.closed is not None
    return f"{100 * row.closed:.0f}"


def lost(study: dict[str, ArmResult], arm: str, none: str) -> str:
    """By dropping, of what the arm ``none`` gains on one worker; in percent."""
    return f"{100 * apart(study, arm, none) / apart(study, 'one worker', none):.0f}"


def apart(study: dict[str, ArmResult], one: str, other: str) -> float:
    return mean(study[one].losses) - mean(study[other].losses)


def test_diloco_beats_one_worker_and_four_times_the_batch() -> None:
    """With every seed. Four times the updates in one worker come to the same."""
    main = rows("main")
    worker, diloco = main["one worker"], main["DiLoCo, 4 replicas"]
    batch, updates = main["data-parallel, 4 x batch"], main["one worker, 4 x steps"]
    assert worker.seeds == diloco.seeds == batch.seeds == updates.seeds == (0, 1, 2)
    for one, ours, large in zip(worker.losses, diloco.losses, batch.losses):
        assert ours < large < one
    assert diloco.closed is not None
    assert diloco.closed > 1
    apart = [ours - theirs for ours, theirs in zip(diloco.losses, updates.losses)]
    assert min(apart) < 0 < max(apart)
    assert abs(mean(apart)) < 0.05 * -mean(diloco.differences)


def test_all_arms_of_the_main_study_start_alike() -> None:
    figures = json.loads((ROOT / "docs/paper/main.json").read_text())
    starts = {(trial["seed"], trial["held_out"][0][1]) for trial in figures["trials"]}
    assert len(starts) == 3


def test_nesterov_ends_below_all_other_outer_optimizers() -> None:
    """With every seed; plain averaging, and Adam, end between it and half the step."""
    outer = rows("outer")
    tuned = outer["Nesterov, 0.8, 0.8"]
    assert tuned.seeds == (0, 1, 2)
    for name in ("averaging (SGD, 1.0)", "SGD, 0.5", "momentum, 0.8, 0.8", "Adam, 0.3, 0.9"):
        assert outer[name].seeds == tuned.seeds
        assert all(ours < theirs for ours, theirs in zip(tuned.losses, outer[name].losses))
    assert max(outer["SGD, 0.5"].losses) == max(max(row.losses) for row in outer.values())
    assert abs(mean(outer["Nesterov, 0.7, 0.9"].losses) - mean(tuned.losses)) < 0.005


def test_four_bits_are_enough_and_one_is_not() -> None:
    codecs = rows("codecs")
    for name in ("fp16", "int8", "int4"):
        assert codecs[name].seeds == (0, 1, 2)
        assert all(abs(difference) < 0.005 for difference in codecs[name].differences)
    for two, one in zip(codecs["int2"].differences, codecs["int1"].differences):
        assert 0.02 < two < one


def test_the_more_seldom_the_worse() -> None:
    """From H = 25 on, with every seed; below that in the quick variant only."""
    quick, full = rows("inner-steps-quick"), rows("inner-steps")
    arms = ["H = 10", "H = 25", "H = 50", "H = 100", "H = 200"]
    assert list(quick) == list(full) == ["one worker", *arms]
    losses = [mean(quick[arm].losses) for arm in arms]
    assert losses == sorted(losses)
    assert all(row.seeds == (0, 1, 2) for row in full.values())
    for of_seed in zip(*(full[arm].losses for arm in arms)):
        assert list(of_seed[1:]) == sorted(of_seed[1:])
        assert of_seed[0] > of_seed[1]


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


def test_half_of_all_dropped_costs_half_of_what_four_gain_and_less_of_what_eight_do() -> None:
    four = (rows("drop")["drop 50 %"], rows("drop")["one worker"])
    eight = (rows("drop-eight")["drop 50 %"], rows("drop-eight")["one worker"])
    assert {row.seeds for row in (*four, *eight)} == {(0, 1, 2)}
    of_four, of_eight = (mean(half.differences) / mean(worker.differences) for half, worker in (four, eight))
    assert 0.4 < of_four < 0.6
    assert of_eight < 0.3
    for half, worker in (four, eight):
        assert all(lost < gained for lost, gained in zip(half.differences, worker.differences))


def test_text_of_ones_own_makes_little_difference() -> None:
    """Beside what there is to gain."""
    own, worker = rows("drop")["non-i.i.d., no drops"], rows("drop")["one worker"]
    assert abs(mean(own.differences)) < 0.25 * mean(worker.differences)
    assert own.seeds == (0, 1, 2)


def paired(name: str, *arms: str) -> list[tuple[float, ...]]:
    """Losses of these arms, seed by seed, of the seeds that all of them have."""
    losses = [dict(zip(row.seeds, row.losses)) for row in (rows(name)[arm] for arm in arms)]
    seeds = sorted(set.intersection(*map(set, losses)))
    assert seeds, f"no seed has {arms}"
    return [tuple(of_arm[seed] for of_arm in losses) for seed in seeds]


def test_the_more_replicas_the_better() -> None:
    for losses in paired("replicas", "16", "8", "4", "2", "1"):
        assert list(losses) == sorted(losses)


def test_text_of_ones_own_costs_something_with_eight_replicas() -> None:
    """And leaves most of what they gain."""
    for own, same in paired("shards", "non-i.i.d., 8 replicas", "i.i.d., 8 replicas"):
        assert same < own
    gain = rows("pool")["one worker"].differences
    assert mean(rows("shards")["non-i.i.d., 8 replicas"].differences) < 0.25 * mean(gain)


def test_in_a_pool_it_counts_how_much_is_computed_and_late_counts_more() -> None:
    arms = ("constant, 4", "doubling, 2 to 4", "halving, 4 to 2", "ramp up, 1 to 4", "ramp down, 4 to 1", "one worker")
    for losses in paired("pool", *arms):
        assert list(losses) == sorted(losses)


def test_a_quarter_of_the_steps_before_diloco_is_best_and_none_is_worst() -> None:
    for losses in paired("pretraining", "a quarter", "half", "three quarters", "none"):
        assert list(losses) == sorted(losses)


def test_a_quarter_of_an_outer_gradient_is_not_missed() -> None:
    assert mean(rows("pruning")["25 % pruned"].differences) < 0.002
    for half, most in zip(rows("pruning")["50 % pruned"].differences, rows("pruning")["75 % pruned"].differences):
        assert 0.01 < half < most


def test_theta_alone_is_better_than_half_of_it_where_updates_come_late() -> None:
    halves = [f"{steps} steps late, half and half" for steps in (2, 8, 20)]
    for losses in paired("overlap", "at once", "8 steps late, theta alone", *halves):
        assert list(losses) == sorted(losses)


def test_one_worker_gains_from_an_outer_step_of_the_right_size_only() -> None:
    for losses in paired("single", "DiLoCo, 1 replica, 0.4, 0.8", "one worker", "DiLoCo, 1 replica"):
        assert list(losses) == sorted(losses)


def test_slow_replicas_bring_part_of_what_fast_ones_do() -> None:
    arms = ("four alike", "two of half the speed", "two alike", "one fast, three of a quarter")
    for losses in paired("speeds", *arms):
        assert list(losses) == sorted(losses)
