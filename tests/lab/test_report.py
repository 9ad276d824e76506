from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p_diloco.core.errors import UsageError
from p2p_diloco.lab.report import (
    COLORS,
    apart,
    arm_results,
    check_plots,
    figure_of,
    figures_json,
    markdown,
    plot,
    style_of,
)
from p2p_diloco.lab.simulation_result import TrialResult
from p2p_diloco.lab.study import Study
from tests.lab.test_study import ARMS, HEAD, write


def study_of(folder: Path) -> Study:
    arms = ARMS + '[[arm]]\nname = "best"\nset = { "simulate.prune" = 0.5 }\n'
    text = HEAD + 'seeds = [1, 2]\ngap = ["plain", "best"]\n' + arms
    return Study.load(write(folder, text), "full")


def result_of(losses: list[float | None], tokens: int = 2_000_000) -> TrialResult:
    curve = [
        {
            "step": step,
            "head": "ab",
            "held_out_loss": loss,
            "loss": None,
            "tokens": step * tokens // (len(losses) - 1),
            "sent_bytes": step * 500_000,
        }
        for step, loss in enumerate(losses)
    ]
    held_out = [[point["step"], point["held_out_loss"]] for point in curve if point["held_out_loss"] is not None]
    about = {"digest": "00", "torch": "2", "device": "cpu", "wall_s": 1.0}
    return TrialResult.parse({"curve": curve, "held_out": held_out, **about})


def results_of(study: Study) -> dict[str, TrialResult]:
    final = {
        ("plain", 1): 2.0,
        ("half", 1): 1.7,
        ("best", 1): 1.4,
        ("plain", 2): 2.2,
        ("half", 2): 2.1,
        ("best", 2): 1.8,
    }
    return {trial.key: result_of([3.0, 2.5, final[trial.arm, trial.seed]]) for trial in study.trials}


def test_rows_by_hand(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    plain, half, best = arm_results(study, results_of(study))
    assert (half.arm, half.seeds, half.losses) == ("half", (1, 2), (1.7, 2.1))
    assert half.differences == pytest.approx((-0.3, -0.1))
    assert half.closed == pytest.approx((2.1 - 1.9) / (2.1 - 1.6))
    assert (plain.closed, best.closed) == (0.0, 1.0)
    assert (half.tokens, half.sent_mb) == (2_000_000, 1.0)


def test_the_gap_is_that_of_the_seeds_an_arm_has(tmp_path: Path) -> None:
    """The second seed is a harder one: an arm that has only the first is not compared with both."""
    study = study_of(tmp_path)
    results = results_of(study)
    (second,) = (trial.key for trial in study.trials if (trial.arm, trial.seed) == ("half", 2))
    del results[second]
    rows = arm_results(study, results)
    assert rows[1].seeds == (1,)
    assert rows[1].closed == pytest.approx((2.0 - 1.7) / (2.0 - 1.4))
    assert "| half (seed 1) | 1.7000 | -0.3000 | 50 % | 2.00 M | 1.00 |" in markdown(study, rows)
    for trial in study.trials:
        if trial.arm == "best":
            del results[trial.key]
    table = markdown(study, arm_results(study, results))
    assert "| half (seed 1) | 1.7000 | -0.3000 | 2.00 M | 1.00 |" in table, "without an end there is no gap"
    assert "Gap" not in table
    assert "gap" not in table


def test_the_table(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    lines = markdown(study, arm_results(study, results_of(study))).splitlines()
    assert lines[0] == "### T"
    assert lines[2] == "| arm | held-out loss | from plain | gap closed | tokens | sent MB |"
    assert lines[5] == "| half | 1.9000 (1.7000 to 2.1000) | -0.2000 (-0.3000 to -0.1000) | 40 % | 2.00 M | 1.00 |"
    assert lines[4].startswith("| plain | 2.1000 (2.0000 to 2.2000) |  | 0 % |")
    assert lines[-1] == (
        "Seeds 1, 2; mean (smallest to largest). Held-out loss in nats per byte. Gap: from plain to best."
    )


def test_where_tokens_are_not_bytes_losses_are_per_token(tmp_path: Path) -> None:
    text = HEAD + 'set = { "data.tokenizer" = "tokenizer.json" }\n' + ARMS
    study = Study.load(write(tmp_path, text), "full")
    assert markdown(study, []).splitlines()[-1].endswith("Held-out loss in nats per token.")


def test_an_arm_that_diverged_is_infinitely_bad(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    results = results_of(study)
    results[study.trials[1].key] = result_of([3.0, None, None])
    half = arm_results(study, results)[1]
    assert half.losses == (math.inf, 2.1)
    assert "inf" in markdown(study, arm_results(study, results))


def test_what_is_not_there_yet_is_left_out(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    results = results_of(study)
    first = {study.trials[1].key: results[study.trials[1].key]}
    (row,) = arm_results(study, first)
    assert (row.arm, row.seeds, row.differences, row.closed) == ("half", (1,), (), None)
    assert "| half | 1.7000 |  | 2.00 M | 1.00 |" in markdown(study, [row])


@pytest.mark.parametrize("title", ["T", r"$\\foo$ and 5 $"])
def test_the_plot_is_a_picture_with_a_line_an_arm(tmp_path: Path, title: str) -> None:
    pytest.importorskip("matplotlib")
    study = study_of(tmp_path)
    study = replace(study, spec=study.spec.model_copy(update={"title": title}))
    results = results_of(study)
    results[study.trials[1].key] = result_of([3.0, None, None])
    path = tmp_path / "plot.png"
    plot(study, results, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert len(path.read_bytes()) > 10_000


def test_the_raw_figures_have_all(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    figures = json.loads(figures_json(study, results_of(study)))
    assert [(trial["arm"], trial["seed"]) for trial in figures["trials"]][:3] == [
        ("plain", 1),
        ("half", 1),
        ("best", 1),
    ]
    assert len(figures["trials"]) == 6
    assert figures["trials"][0]["last"]["held_out_loss"] == 2.0


def test_raw_figures_are_written_in_this_order(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    first = study.trials[0]
    text = figures_json(study, {first.key: result_of([3.0, 2.0])})
    assert text == json.dumps(json.loads(text), indent=1) + "\n"
    assert json.dumps(json.loads(text)) == (
        f'{{"study": "{study.name}", "size": "full", "title": "{study.spec.title}", "paper": "{study.spec.paper}", '
        f'"trials": [{{"arm": "plain", "seed": 1, "key": "{first.key}", '
        '"last": {"step": 1, "head": "ab", "held_out_loss": 2.0, "loss": null, "tokens": 2000000, '
        '"sent_bytes": 500000}, '
        '"held_out": [[0, 3.0], [1, 2.0]], "digest": "00", "torch": "2", "device": "cpu", "wall_s": 1.0}]}'
    )


def test_a_missing_library_is_told_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        UsageError, match=r"plots need matplotlib; install it with: pip install 'p2p-diloco\[experiments\]'"
    ):
        check_plots()


def test_as_many_arms_as_a_study_may_have_look_different() -> None:
    """For everybody: no two colors that those who see few take for one, and none too pale for white."""
    assert len({style_of(number) for number in range(32)}) == 32
    assert len({style_of(number)[0] for number in range(7)}) == 7
    for color in COLORS:
        red, green, blue = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
        assert 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.75, color
    assert style_of(0) != style_of(10), "as it was when one worker and non-i.i.d., drop 50 % had the same blue"


def test_names_are_kept_apart_and_in_order() -> None:
    assert apart([], 1.0, 0.0, 10.0) == []
    assert apart([2.0, 5.0], 1.0, 0.0, 10.0) == [2.0, 5.0]
    assert apart([5.0, 5.0], 1.0, 0.0, 10.0) == [4.5, 5.5]
    assert apart([5.2, 5.0, 5.1], 1.0, 0.0, 10.0) == pytest.approx([6.1, 4.1, 5.1])
    assert apart([0.0, 0.0], 1.0, 0.5, 10.0) == [0.5, 1.5]
    assert apart([9.0, 10.0, 10.0], 1.0, 0.0, 10.0) == [8.0, 9.0, 10.0]
    assert apart([1.0, 1.0, 1.0], 1.0, 0.0, 1.0) == [0.0, 1.0, 2.0]


@given(st.lists(st.floats(0, 1), max_size=40), st.floats(0.001, 0.02))
def test_names_fit_wherever_lines_end(wanted: list[float], gap: float) -> None:
    places = apart(wanted, gap, 0.0, 1.0)
    ordered = sorted(places)
    assert all(later - earlier > 0.999 * gap for earlier, later in pairwise(ordered))
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in places)
    for (one, of_one), (other, of_other) in combinations(zip(wanted, places), 2):
        assert one == other or (one < other) == (of_one < of_other)


@pytest.mark.parametrize("arms", [1, 12, 40])
def test_every_line_is_named_and_no_name_covers_another_one(tmp_path: Path, arms: int) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot

    more = "".join(f'[[arm]]\nname = "arm {i}"\nset = {{ "inner.steps" = {i + 1} }}\n' for i in range(arms))
    study = Study.load(write(tmp_path, HEAD.replace('reference = "plain"', 'reference = "arm 0"') + more), "full")
    results = {trial.key: result_of([3.0, 2.5, 2.0 + 0.001 * i]) for i, trial in enumerate(study.trials)}
    figure = figure_of(study, results)
    (axes,) = figure.axes
    figure.draw_without_rendering()
    boxes = {text.get_text(): text.get_window_extent() for text in axes.texts}
    assert set(boxes) == {f"arm {i}" for i in range(arms)}
    assert not any(one.overlaps(other) for one, other in combinations(boxes.values(), 2))
    assert all(figure.bbox.containsx(box.x1) and figure.bbox.containsy(box.y0) for box in boxes.values())
    looks = [(line.get_color(), str(line._dash_pattern)) for line in axes.get_lines()]
    assert looks[:arms] == looks[arms:], "what leads to a name looks as its line"
    assert len(set(looks)) == min(arms, 35)
    pyplot.close(figure)
