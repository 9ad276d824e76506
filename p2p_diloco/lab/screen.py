"""What ``swarm`` shows of its trainers: a table on a terminal, a line for each outer step elsewhere, and the last
words.

Pure: it shows what ``outcome`` has found in the event logs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from p2p_diloco.lab.outcome import Log, SwarmOutcome, TrainerNow, guests, held_out
from p2p_diloco.look.display import Legible, bar, count, fraction

RUN_BAR_COLUMNS, INNER_BAR_COLUMNS = 40, 5
PEER_COLUMNS = 10
"""Of a guest's label, and a space."""


@dataclass(frozen=True)
class RunClock:
    """Says how long a run is, and how long it has taken."""

    outer_steps: int
    """Of the whole run."""
    elapsed_s: float


def screen(
    run: str,
    trainers: Mapping[str, TrainerNow],
    logs: Mapping[str, Log],
    clock: RunClock,
    join_line: str,
    *,
    width: int,
) -> RenderableType:
    """Returns the table on the terminal. The bar above it counts the inner steps of the whole run. Headings have the
    unit in their second line; losses are per token."""
    made = sum(one.step + one.inner_step / max(one.planned, 1) for one in trainers.values()) / max(len(trainers), 1)
    newest = max((one.step for one in trainers.values()), default=0)
    losses = [loss for _, loss in held_out(logs)]
    facts = (
        run,
        f"outer step {newest} of {clock.outer_steps}",
        "held-out loss " + (f"{losses[0]:.4f} -> {losses[-1]:.4f}" if losses else "not yet known"),
        f"{sum(one.tokens_per_s for one in trainers.values()):,.0f} tokens/s",
        f"{clock.elapsed_s:.0f} s",
    )
    header = Text("\n".join([*packed(facts, width), f"join: {join_line}"]), overflow="fold")
    header.stylize("bold", 0, len(run))
    whole = f"the run {bar(made, clock.outer_steps, RUN_BAR_COLUMNS)} {100 * made / clock.outer_steps:.0f} %"
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("peer", no_wrap=True, min_width=PEER_COLUMNS)
    table.add_column("phase", no_wrap=True)
    for column in ("outer\nstep", "inner\nsteps"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for column in ("loss\nnats", "tokens\n/s", "group\npeers"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("last round\ntime, traffic", no_wrap=True)
    for name, one in trainers.items():
        table.add_row(
            name,
            one.phase,
            count(one.step),
            fraction(one.inner_step, one.planned) if one.planned else "",
            bar(one.inner_step, one.planned, INNER_BAR_COLUMNS) if one.planned else "",
            "" if one.loss is None else f"{one.loss:.3f}",
            count(one.tokens_per_s),
            str(one.group or ""),
            f"{one.round_s:.2f} s, {one.round_bytes / 1e6:.2f} MB" if one.group else "",
        )
    for peer_id, step in guests(logs).items():
        table.add_row(f"…{peer_id[-8:]}", "guest" if step == newest else "guest, absent", count(step))
    return Legible(Group(header, Text(whole), Text(), table))


def packed(facts: Sequence[str], width: int) -> list[str]:
    """Returns lines of at most ``width`` characters in which no fact is cut in two, where each is that short."""
    lines = [facts[0]]
    for fact in facts[1:]:
        longer = f"{lines[-1]}   {fact}"
        if len(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(fact)
    return lines


def step_line(trainers: Mapping[str, TrainerNow], step: int, loss: float | None, clock: RunClock) -> str:
    """Returns the line of an outer step for output that is no terminal. ``loss``: held-out, of that step."""
    group, speed = max(one.group for one in trainers.values()), sum(one.tokens_per_s for one in trainers.values())
    text = "" if loss is None else f"held-out loss {loss:.4f}, "
    text += f"group of {group}, {speed:,.0f} tokens/s, {clock.elapsed_s:.0f} s"
    return f"outer step {step} of {clock.outer_steps}: {text}"


def last_words(outcome: SwarmOutcome, *, byte_level: bool) -> list[tuple[str, str]]:
    """Returns what is said of a run at its end, as (what, figure). ``byte_level``: a token is a byte."""
    lines = []
    if outcome.held_out:
        losses = [outcome.held_out[0][1], outcome.held_out[-1][1]]
        text = " -> ".join(f"{loss:.4f}" for loss in losses) + " nats per token"
        if byte_level:
            text += ", " + " -> ".join(f"{loss / math.log(2):.3f}" for loss in losses) + " bits per byte"
        lines.append(("held-out loss", text))
    if outcome.outer_steps:
        same = "identical" if outcome.identical else "NOT identical"
        lines += [
            ("heads", f"{same} after {outcome.outer_steps} outer steps"),
            ("stalled", f"{outcome.stalled_s.median:.2f} s per outer step (median)"),
            ("speed", f"{outcome.tokens_per_s.total:,.0f} tokens/s in all"),
        ]
    return lines
