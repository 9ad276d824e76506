"""The results of a study as a table in Markdown, a plot, and raw figures. Pure, but for the plot's file.

Losses are held-out, in nats per token, which is per byte where tokens are bytes. An arm's figures are means over its
seeds, with the smallest and the largest; differences are paired, seed by seed, which takes away what the seeds have in
common.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import IO, Any, TypedDict

from p2p_diloco.core.errors import UsageError
from p2p_diloco.lab.simulation_result import TrialResult
from p2p_diloco.lab.study import Study


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """Says what came of one arm; seeds in the study's order."""

    arm: str
    seeds: tuple[int, ...]
    losses: tuple[float, ...]
    """Final, held-out; infinite where theta was not finite."""
    differences: tuple[float, ...]
    """From the reference, seed by seed; empty for seeds that the reference does not have yet."""
    closed: float | None
    """Share of the gap that it closes, of the seeds that it has in common with both ends of it; None without any."""
    tokens: float
    """Trained on by all replicas."""
    sent_mb: float
    """By one replica that is always there (``Point.sent_bytes``)."""


def arm_results(study: Study, results: Mapping[str, TrialResult]) -> list[ArmResult]:
    """Returns what came of each arm that has results. ``results``: by ``Trial.key``."""
    found: dict[str, dict[int, TrialResult]] = {}
    for trial in study.trials:
        if trial.key in results:
            found.setdefault(trial.arm, {})[trial.seed] = results[trial.key]
    reference = found.get(study.spec.reference, {})
    ends = [found.get(arm, {}) for arm in study.spec.gap or ()]
    arms = []
    for arm, of_arm in found.items():
        arms.append(
            ArmResult(
                arm=arm,
                seeds=tuple(of_arm),
                losses=tuple(result.loss for result in of_arm.values()),
                differences=tuple(
                    result.loss - reference[seed].loss for seed, result in of_arm.items() if seed in reference
                ),
                closed=share_closed(of_arm, *ends) if ends else None,
                tokens=mean(result.last.tokens for result in of_arm.values()),
                sent_mb=mean(result.last.sent_bytes for result in of_arm.values()) / 1e6,
            )
        )
    return arms


def share_closed(
    arm: Mapping[int, TrialResult], start: Mapping[int, TrialResult], end: Mapping[int, TrialResult]
) -> float | None:
    """Returns how far ``arm`` goes, as a share of the way from the mean loss of ``start`` to that of ``end``; all by
    seed. None where they have no seed in common, or there is no way."""
    seeds = arm.keys() & start.keys() & end.keys()
    if not seeds:
        return None
    ours, first, last = (mean(of_arm[seed].loss for seed in seeds) for of_arm in (arm, start, end))
    return (first - ours) / (first - last) if first != last else None


def spread(values: Sequence[float], form: str) -> str:
    """Returns the mean in words, and the smallest and the largest of several."""
    if not values:
        return ""
    middle = format(mean(values), form)
    return f"{middle} ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else middle


def markdown(study: Study, arms: Sequence[ArmResult]) -> str:
    """Returns the table of a study. An arm without all the seeds of the others says which it has: its mean does not
    compare with theirs, and its differences do."""
    seeds = sorted({seed for arm in arms for seed in arm.seeds})
    ends = study.spec.gap if any(arm.closed is not None for arm in arms) else None
    heading = ["arm", "held-out loss", f"from {study.spec.reference}"]
    heading += ["gap closed"] if ends else []
    heading += ["tokens", "sent MB"]
    table = [heading, ["---"] * len(heading)]
    for arm in arms:
        partly = "" if sorted(arm.seeds) == seeds else f" ({named(arm.seeds)})"
        cells = [arm.arm + partly, spread(arm.losses, ".4f")]
        cells.append("" if arm.arm == study.spec.reference else spread(arm.differences, "+.4f"))
        if ends:
            cells.append("" if arm.closed is None else f"{100 * arm.closed:.0f} %")
        table.append([*cells, f"{arm.tokens / 1e6:.2f} M", f"{arm.sent_mb:.2f}"])
    lines = [f"| {' | '.join(cells)} |" for cells in table]
    counted = named(seeds).capitalize() + ("; mean (smallest to largest)." if len(seeds) > 1 else ".")
    gap = f" Gap: from {ends[0]} to {ends[1].removesuffix('.')}." if ends else ""
    return "\n".join(
        [f"### {study.spec.title}", "", *lines, "", f"{counted} Held-out loss in {unit_of(study)}.{gap}", ""]
    )


def unit_of(study: Study) -> str:
    """Returns the unit of its losses."""
    bytewise = all(trial.what.run.data.tokenizer == "bytes" for trial in study.trials)
    return "nats per byte" if bytewise else "nats per token"


def named(seeds: Sequence[int]) -> str:
    """Returns "seed 0", or "seeds 0, 1"."""
    return f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, sorted(seeds)))}"


def check_plots() -> None:
    """Raises UsageError when the plotting library is missing: before hours of computing, not after."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError("plots need matplotlib; install it with: pip install 'p2p-diloco[experiments]'") from None


COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
"""Okabe and Ito's palette, which those who see few colors can tell apart (jfly.uni-koeln.de/color), without its yellow,
which is too pale for a line on white."""
DASHES = ((), (5, 1.5), (1.2, 1.2), (6, 1.5, 1.2, 1.5), (10, 3))
"""Points drawn and left out in turn; () is a line without gaps."""
FIGURE_INCHES = (8.0, 5.0)
LABEL_POINTS = 8
"""Size of the type of a line's name."""
LABEL_LINE_POINTS = 1.45 * LABEL_POINTS
"""From one name to the next one, at least."""
FRAME_POINTS = 90
"""Of a figure's height: title, axis, margins."""


def style_of(number: int) -> tuple[str, tuple[float, ...]]:
    """Returns (color, dashes) of an arm; different ones for as many arms as there are pairs, 35, colors first."""
    return COLORS[number % len(COLORS)], DASHES[number // len(COLORS) % len(DASHES)]


def apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Returns positions at least ``gap`` from each other and between ``low`` and ``high``, in the order of the wanted
    ones, and as near to them as that allows (least squares). Where the room does not suffice, they go beyond
    ``high``."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    # Less their gaps, the positions must not fall: neighbors that would are put where their mean is, as one.
    blocks: list[tuple[float, int]] = []
    for place, i in enumerate(order):
        middle, count = wanted[i] - place * gap, 1
        while blocks and blocks[-1][0] >= middle:
            before, of_before = blocks.pop()
            middle = (before * of_before + middle * count) / (of_before + count)
            count += of_before
        blocks.append((middle, count))
    last = max(high - (len(wanted) - 1) * gap, low)
    level = [min(max(middle, low), last) for middle, count in blocks for _ in range(count)]
    positions = [0.0] * len(wanted)
    for place, i in enumerate(order):
        positions[i] = level[place] + place * gap
    return positions


def plot(study: Study, results: Mapping[str, TrialResult], path: Path | IO[bytes]) -> None:
    """Writes the figure of a study as a PNG."""
    from matplotlib import pyplot

    figure = figure_of(study, results)
    figure.savefig(path, dpi=110, format="png")
    pyplot.close(figure)


class LineLook(TypedDict):
    """Says how a line looks, in the words of matplotlib."""

    color: str
    linestyle: str | tuple[int, tuple[float, ...]]
    """Without gaps, or (offset, dashes)."""
    linewidth: float


def figure_of(study: Study, results: Mapping[str, TrialResult]) -> Any:
    """Returns a figure of matplotlib: held-out loss against the share of training, an arm a line, which is named at its
    end: the mean over seeds, in a band of all of them. An arm keeps its color and dashes while others have no
    results."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    width, height = FIGURE_INCHES
    height = max(height, (FRAME_POINTS + LABEL_LINE_POINTS * len(study.spec.arm)) / 72)
    figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
    lowest, highest, lines = [], [], []
    for number, arm in enumerate(study.spec.arm):
        curves = [
            [(step / result.last.step, loss) for step, loss in result.held_out]
            for trial in study.trials
            if trial.arm == arm.name and (result := results.get(trial.key)) and result.held_out
        ]
        if not curves:
            continue
        shares = [share for share, _ in min(curves, key=len)]
        columns = list(zip(*([loss for _, loss in curve[: len(shares)]] for curve in curves)))
        color, dashes = style_of(number)
        look = LineLook(color=color, linestyle=(0, dashes) if dashes else "-", linewidth=1.4)
        means = [mean(column) for column in columns]
        axes.plot([100 * share for share in shares], means, **look)
        lines.append((literal(arm.name), (100 * shares[-1], means[-1]), look))
        if len(curves) > 1:
            low, high = [min(column) for column in columns], [max(column) for column in columns]
            axes.fill_between([100 * share for share in shares], low, high, color=color, alpha=0.12, linewidth=0)
        lowest.append(min(map(min, columns)))
        highest.append(max(columns[len(columns) // 4]))
    if lowest and math.isfinite(max(highest)):
        margin = 0.05 * (max(highest) - min(lowest))
        axes.set_ylim(min(lowest) - margin, max(highest) + margin)  # the steep beginning would flatten the rest
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of training, %")
    axes.set_ylabel(f"held-out loss, {unit_of(study)}")
    axes.set_title(literal(study.spec.title))
    axes.grid(alpha=0.3)
    name_lines(figure, axes, lines)
    return figure


NamedLine = tuple[str, tuple[float, float], LineLook]
"""Its name; where it ends, in data; how matplotlib is to draw it."""


def name_lines(figure: Any, axes: Any, lines: Sequence[NamedLine]) -> None:
    """Writes each name right of the axes, where it does not cover another one; a piece of the line leads there."""
    low, high = axes.get_ylim()
    place_of = {"xycoords": "axes fraction", "va": "center", "fontsize": LABEL_POINTS}
    names = [axes.annotate(name, (1.1, 0.5), **place_of) for name, _, _ in lines]
    figure.draw_without_rendering()  # how high the axes are is known once there is room for the names
    gap = LABEL_LINE_POINTS / (72 * axes.get_window_extent().height / figure.dpi)
    ends = [(x / 100, (min(max(loss, low), high) - low) / (high - low)) for _, (x, loss), _ in lines]
    places = apart([y for _, y in ends], gap, 0.5 * gap, 1 - 0.5 * gap)
    for (_, _, look), (x, y), name, place in zip(lines, ends, names, places):
        name.set_y(place)
        axes.plot([x, 1.03, 1.09], [y, place, place], transform=axes.transAxes, clip_on=False, **look)


def literal(text: str) -> str:
    """Returns ``text`` for matplotlib, to which dollars are mathematics."""
    return text.replace("$", r"\$")


def figures_json(study: Study, results: Mapping[str, TrialResult]) -> str:
    """Returns the figures of a study, as JSON of several lines. What its simulations left has more: every outer step's
    head, loss and bytes."""
    figures = {
        "study": study.name,
        "size": study.size,
        "title": study.spec.title,
        "paper": study.spec.paper,
        "trials": [
            {"arm": trial.arm, "seed": trial.seed, "key": trial.key, **result.as_figures()}
            for trial in study.trials
            if (result := results.get(trial.key)) is not None
        ],
    }
    return json.dumps(figures, indent=1) + "\n"
