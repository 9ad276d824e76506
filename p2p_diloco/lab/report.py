"""Results of a study -> a table in Markdown, a plot, and the raw figures. Pure, but for the plot's file.

Losses are held-out, in nats per token, which is per byte where tokens are bytes. An arm's figures are means over its
seeds, with the smallest and the largest; differences are paired, seed by seed, which takes away what the seeds have in
common.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import IO, Any

from p2p_diloco.core.errors import UsageError
from p2p_diloco.lab.study import Study

Summary = Mapping[str, Any]
"""``summary.json`` of a simulation."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One arm. Seeds in the study's order."""

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


def final_loss(summary: Summary) -> float:
    last = summary["curve"][-1]["held_out_loss"]
    return math.inf if last is None else float(last)


def rows_of(study: Study, summaries: Mapping[str, Summary]) -> list[Row]:
    """Of the arms that have results. ``summaries``: by ``Trial.key``."""
    found: dict[str, dict[int, Summary]] = {}
    for trial in study.trials:
        if trial.key in summaries:
            found.setdefault(trial.arm, {})[trial.seed] = summaries[trial.key]
    reference = found.get(study.spec.reference, {})
    ends = [found.get(arm, {}) for arm in study.spec.gap or ()]
    rows = []
    for arm, of_arm in found.items():
        last = [summary["curve"][-1] for summary in of_arm.values()]
        rows.append(
            Row(
                arm=arm,
                seeds=tuple(of_arm),
                losses=tuple(map(final_loss, of_arm.values())),
                differences=tuple(
                    final_loss(summary) - final_loss(reference[seed])
                    for seed, summary in of_arm.items()
                    if seed in reference
                ),
                closed=share_closed(of_arm, *ends) if ends else None,
                tokens=mean(point["tokens"] for point in last),
                sent_mb=mean(point["sent_bytes"] for point in last) / 1e6,
            )
        )
    return rows


def share_closed(arm: Mapping[int, Summary], start: Mapping[int, Summary], end: Mapping[int, Summary]) -> float | None:
    """Of the way from the mean loss of ``start`` to that of ``end``; all by seed."""
    seeds = arm.keys() & start.keys() & end.keys()
    if not seeds:
        return None
    ours, first, last = (mean(final_loss(of_arm[seed]) for seed in seeds) for of_arm in (arm, start, end))
    return (first - ours) / (first - last) if first != last else None


def spread(values: Sequence[float], form: str) -> str:
    """Mean, and the smallest and the largest of several."""
    if not values:
        return ""
    middle = format(mean(values), form)
    return f"{middle} ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else middle


def markdown(study: Study, rows: Sequence[Row]) -> str:
    """An arm without all the seeds of the others says which it has: its mean does not compare with theirs, and its
    differences do."""
    seeds = sorted({seed for row in rows for seed in row.seeds})
    ends = study.spec.gap if any(row.closed is not None for row in rows) else None
    heading = ["arm", "held-out loss", f"from {study.spec.reference}"]
    heading += ["gap closed"] if ends else []
    heading += ["tokens", "sent MB"]
    table = [heading, ["---"] * len(heading)]
    for row in rows:
        partly = "" if sorted(row.seeds) == seeds else f" ({named(row.seeds)})"
        cells = [row.arm + partly, spread(row.losses, ".4f")]
        cells.append("" if row.arm == study.spec.reference else spread(row.differences, "+.4f"))
        if ends:
            cells.append("" if row.closed is None else f"{100 * row.closed:.0f} %")
        table.append([*cells, f"{row.tokens / 1e6:.2f} M", f"{row.sent_mb:.2f}"])
    lines = [f"| {' | '.join(cells)} |" for cells in table]
    counted = named(seeds).capitalize() + ("; mean (smallest to largest)." if len(seeds) > 1 else ".")
    gap = f" Gap: from {ends[0]} to {ends[1].removesuffix('.')}." if ends else ""
    return "\n".join(
        [f"### {study.spec.title}", "", *lines, "", f"{counted} Held-out loss in {unit_of(study)}.{gap}", ""]
    )


def unit_of(study: Study) -> str:
    """Of its losses."""
    bytewise = all(trial.what.run.data.tokenizer == "bytes" for trial in study.trials)
    return "nats per byte" if bytewise else "nats per token"


def named(seeds: Sequence[int]) -> str:
    return f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, sorted(seeds)))}"


def check_plots() -> None:
    """UsageError when the plotting library is missing: before hours of computing, not after."""
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
    """Positions at least ``gap`` from each other and between ``low`` and ``high``, in the order of the wanted ones, and
    as near to them as that allows (least squares). Where the room does not suffice, they go beyond ``high``."""
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


def plot(study: Study, summaries: Mapping[str, Summary], path: Path | IO[bytes]) -> None:
    from matplotlib import pyplot

    figure = figure_of(study, summaries)
    figure.savefig(path, dpi=110, format="png")
    pyplot.close(figure)


def figure_of(study: Study, summaries: Mapping[str, Summary]) -> Any:
    """A figure of matplotlib: held-out loss against the share of training, an arm a line, which is named at its end:
    the mean over seeds, in a band of all of them. An arm keeps its color and dashes while others have no results."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    width, height = FIGURE_INCHES
    height = max(height, (FRAME_POINTS + LABEL_LINE_POINTS * len(study.spec.arm)) / 72)
    figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
    lowest, highest, lines = [], [], []
    for number, arm in enumerate(study.spec.arm):
        curves = [
            [(step / summary["curve"][-1]["step"], loss) for step, loss in summary["held_out"]]
            for trial in study.trials
            if trial.arm == arm.name and (summary := summaries.get(trial.key)) and summary["held_out"]
        ]
        if not curves:
            continue
        shares = [share for share, _ in min(curves, key=len)]
        columns = list(zip(*([loss for _, loss in curve[: len(shares)]] for curve in curves)))
        color, dashes = style_of(number)
        look: dict[str, Any] = {"color": color, "linestyle": (0, dashes) if dashes else "-", "linewidth": 1.4}
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


Line = tuple[str, tuple[float, float], Mapping[str, Any]]
"""Its name; where it ends, in data; how matplotlib is to draw it."""


def name_lines(figure: Any, axes: Any, lines: Sequence[Line]) -> None:
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
    """For matplotlib, to which dollars are mathematics."""
    return text.replace("$", r"\$")


KEPT = ("held_out", "digest", "torch", "device", "wall_s")


def raw(study: Study, summaries: Mapping[str, Summary]) -> dict[str, Any]:
    """The figures of a study, as JSON. What its simulations left has more: every outer step's head, loss and bytes."""
    return {
        "study": study.name,
        "size": study.size,
        "title": study.spec.title,
        "paper": study.spec.paper,
        "trials": [
            {"arm": trial.arm, "seed": trial.seed, "key": trial.key, "last": summary["curve"][-1]}
            | {name: summary[name] for name in KEPT}
            for trial in study.trials
            if (summary := summaries.get(trial.key)) is not None
        ],
    }
