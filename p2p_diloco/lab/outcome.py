"""Event logs -> what ``swarm`` shows and what became of the run: table, lines, ``summary.json``. Pure.

A *log* is one peer's events (``events`` lists them), oldest first. Steps are outer steps: where the peer stood after
the event.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from p2p_diloco.core.swarm_head import Evaluation, Standing, believed_losses, swarm_head
from p2p_diloco.look.display import Legible, bar, count, fraction

Event = Mapping[str, Any]
Log = Sequence[Event]

EVENTS_WITH_A_HEAD = ("joined", "round", "left")
RUN_BAR_COLUMNS, INNER_BAR_COLUMNS = 40, 5
PEER_COLUMNS = 10
"""Of a guest's label, and a space."""
ROUND_PARTS = ("gather_s", "reduce_s", "settle_s", "apply_s")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One peer now."""

    peer_id: str = ""
    phase: str = "starting"
    step: int = 0
    inner_step: int = 0
    planned: int = 0
    """Inner steps until the next outer step; 0 before the first inner step."""
    loss: float | None = None
    tokens_per_s: float = 0.0
    group: int = 0
    """Size of the last round's group."""
    round_s: float = 0.0
    round_bytes: int = 0


def latest(log: Log, kind: str) -> Event | None:
    return next((event for event in reversed(log) if event["event"] == kind), None)


def row_of(log: Log, fate: str | None = None) -> Row:
    """``fate``: what has become of the peer, if it does not run."""
    started, inner, last_round = latest(log, "started"), latest(log, "inner"), latest(log, "round")
    if started is None:
        return Row(phase=fate or "starting")
    trained: dict[str, Any] = {}
    if inner is not None:
        # The first inner step after an outer step has no speed yet.
        speeds = (event["tokens_per_s"] for event in reversed(log) if event["event"] == "inner")
        trained = {"loss": inner["loss"], "planned": inner["planned"], "tokens_per_s": next(filter(None, speeds), 0.0)}
        # The inner steps of an outer step that is over do not count towards the next.
        last = next(event["event"] for event in reversed(log) if event["event"] in ("inner", "round", "joined"))
        trained["inner_step"] = inner["inner_step"] if last == "inner" else 0
        if fate:
            trained["tokens_per_s"] = 0.0
    return Row(
        peer_id=started["peer_id"],
        phase=fate or phase_of(log),
        step=max(heads(log), default=0),
        group=len(last_round["group"]) if last_round else 0,
        round_s=sum(last_round[name] for name in ROUND_PARTS) if last_round else 0.0,
        round_bytes=last_round["bytes_sent"] + last_round["bytes_received"] if last_round else 0,
        **trained,
    )


def phase_of(log: Log) -> str:
    event = next(event for event in reversed(log) if event["event"] not in ("phase", "evaluated"))
    if event["event"] == "inner" and event["inner_step"] >= event["planned"]:
        return "outer step"
    return {"started": "joining", "left": "left"}.get(event["event"], "training")


def heads(log: Log) -> dict[int, str]:
    """Outer step -> head. Of a step that was rolled back and made again, the later one."""
    return {event["step"]: event["head"] for event in log if event["event"] in EVENTS_WITH_A_HEAD}


def held_out(logs: Mapping[str, Log]) -> list[tuple[int, float]]:
    """(outer step, loss), rising, of the steps that led to the swarm's head: what was evaluated on a branch that was
    given up is left out. One loss a step, though several may have evaluated S_0."""
    histories = [history_of(log) for log in logs.values()]
    swarm = swarm_head([standing_of(history) for history in histories if history], None)
    led_there = {
        (step, head.encode())
        for history in histories
        if swarm is not None and history.get(swarm[0], "").encode() == swarm[1]
        for step, head in history.items()
        if step <= swarm[0]
    }
    evaluations = []
    for log in logs.values():
        for step, head, loss in evaluated(log):
            place = (step, head.encode())
            evaluations.append(Evaluation(step=step, loss=loss, path=led_there if place in led_there else {place}))
    return believed_losses(evaluations, swarm)


def history_of(log: Log) -> dict[int, str]:
    """Outer step -> head of where the peer stands and of the way there, rising; without what it has given up."""
    history: dict[int, str] = {}
    for event in log:
        if event["event"] in EVENTS_WITH_A_HEAD:
            while history and next(reversed(history)) >= event["step"]:
                history.popitem()
            history[event["step"]] = event["head"]
    return history


def standing_of(history: Mapping[int, str]) -> Standing:
    """Where a peer of this history stands; of its way there, what has no gap."""
    newest = max(history)
    way = itertools.takewhile(lambda step: step in history, range(newest - 1, -1, -1))
    earlier = tuple(history[step].encode() for step in way)
    return Standing(step=newest, head=history[newest].encode(), heads=earlier)


def evaluated(log: Log) -> Iterator[tuple[int, str, float]]:
    """(outer step, head at that time, held-out loss) of every evaluation that is a number."""
    known: dict[int, str] = {}
    for event in log:
        if event["event"] in EVENTS_WITH_A_HEAD:
            known[event["step"]] = event["head"]
        elif event["event"] == "evaluated" and event["held_out_loss"] is not None and event["step"] in known:
            yield event["step"], known[event["step"]], event["held_out_loss"]


def tokens_per_s(log: Log) -> float:
    """Mean from the first to the last event about inner steps, stalls and evaluation included, times between a stop
    and the next start not."""
    tokens, seconds, before = 0, 0.0, None
    for event in log:
        if event["event"] == "started":
            before = None
        elif event["event"] == "inner":
            if before is not None:
                tokens += event["tokens"] - before["tokens"]
                seconds += event["mono_s"] - before["mono_s"]
            before = event
    return tokens / seconds if seconds else 0.0


def per_step(log: Log, kind: str, field: str) -> dict[int, float]:
    """Sum of a field over the events of one outer step."""
    sums: dict[int, float] = {}
    for event in log:
        if event["event"] == kind:
            sums[event["step"]] = sums.get(event["step"], 0) + event[field]
    return sums


def guests(logs: Mapping[str, Log]) -> dict[str, int]:
    """Peers met in rounds that keep no log here, and the last outer step that each was in the group of."""
    own = {row_of(log).peer_id for log in logs.values()}
    met: dict[str, int] = {}
    for log in logs.values():
        for event in log:
            if event["event"] == "round" and event["committed"]:
                for peer_id in set(event["group"]) - own:
                    met[peer_id] = max(met.get(peer_id, 0), event["step"])
    return met


def summarize(logs: Mapping[str, Log]) -> dict[str, Any]:
    """What trainers' logs tell. Every step is a key, which JSON writes as a string."""
    rounds = [event for log in logs.values() for event in log if event["event"] == "round"]
    rows = {name: row_of(log) for name, log in logs.items()}
    all_heads = {name: heads(log) for name, log in logs.items()}
    of_step: dict[int, set[str]] = {}
    for peer_heads in all_heads.values():
        for step, head in peer_heads.items():
            of_step.setdefault(step, set()).add(head)
    stalls = {name: per_step(log, "stall", "seconds") for name, log in logs.items()}
    speeds = {name: tokens_per_s(log) for name, log in logs.items()}
    lost = {(event["step"], peer_id) for event in rounds for peer_id in event["lost"]}
    return {
        "outer_steps": max((row.step for row in rows.values()), default=0),
        "peers": {name: row.peer_id for name, row in rows.items()},
        "guests": guests(logs),
        "heads": all_heads,
        "identical": bool(of_step) and all(len(found) == 1 for found in of_step.values()),
        "held_out": held_out(logs),
        "tokens_per_s": {"total": sum(speeds.values()), "peers": speeds},
        "stalled_s": {
            "median": statistics.median([s for steps in stalls.values() for s in steps.values()] or [0.0]),
            "peers": stalls,
        },
        "evaluate_s": {name: per_step(log, "evaluated", "seconds") for name, log in logs.items()},
        "bytes_sent": {name: per_step(log, "round", "bytes_sent") for name, log in logs.items()},
        "bytes_received": {name: per_step(log, "round", "bytes_received") for name, log in logs.items()},
        "group": {event["step"]: len(event["group"]) for event in rounds if event["committed"]},
        "lost": [{"step": step, "peer": peer_id} for step, peer_id in sorted(lost)],
        "missed_rounds": sum(not event["committed"] for event in rounds),
    }


@dataclass(frozen=True)
class Progress:
    outer_steps: int
    """Of the whole run."""
    elapsed_s: float


def screen(
    run: str, rows: Mapping[str, Row], logs: Mapping[str, Log], progress: Progress, join_line: str, *, width: int
) -> RenderableType:
    """The table on the terminal. The bar above it counts the inner steps of the whole run. Headings have the unit in
    their second line; losses are per token."""
    made = sum(row.step + row.inner_step / max(row.planned, 1) for row in rows.values()) / max(len(rows), 1)
    newest = max((row.step for row in rows.values()), default=0)
    losses = [loss for _, loss in held_out(logs)]
    facts = (
        run,
        f"outer step {newest} of {progress.outer_steps}",
        "held-out loss " + (f"{losses[0]:.4f} -> {losses[-1]:.4f}" if losses else "not yet known"),
        f"{sum(row.tokens_per_s for row in rows.values()):,.0f} tokens/s",
        f"{progress.elapsed_s:.0f} s",
    )
    header = Text("\n".join([*packed(facts, width), f"join: {join_line}"]), overflow="fold")
    header.stylize("bold", 0, len(run))
    whole = f"the run {bar(made, progress.outer_steps, RUN_BAR_COLUMNS)} {100 * made / progress.outer_steps:.0f} %"
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("peer", no_wrap=True, min_width=PEER_COLUMNS)
    table.add_column("phase", no_wrap=True)
    for column in ("outer\nstep", "inner\nsteps"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for column in ("loss\nnats", "tokens\n/s", "group\npeers"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("last round\ntime, traffic", no_wrap=True)
    for name, row in rows.items():
        table.add_row(
            name,
            row.phase,
            count(row.step),
            fraction(row.inner_step, row.planned) if row.planned else "",
            bar(row.inner_step, row.planned, INNER_BAR_COLUMNS) if row.planned else "",
            "" if row.loss is None else f"{row.loss:.3f}",
            count(row.tokens_per_s),
            str(row.group or ""),
            f"{row.round_s:.2f} s, {row.round_bytes / 1e6:.2f} MB" if row.group else "",
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


def step_line(rows: Mapping[str, Row], step: int, loss: float | None, progress: Progress) -> str:
    """For output that is no terminal. ``loss``: held-out, of that step."""
    group, speed = max(row.group for row in rows.values()), sum(row.tokens_per_s for row in rows.values())
    text = "" if loss is None else f"held-out loss {loss:.4f}, "
    text += f"group of {group}, {speed:,.0f} tokens/s, {progress.elapsed_s:.0f} s"
    return f"outer step {step} of {progress.outer_steps}: {text}"


def findings(summary: Mapping[str, Any], *, byte_level: bool) -> list[tuple[str, str]]:
    """The last word of a run, as (what, figure). ``byte_level``: a token is a byte."""
    lines = []
    if summary["held_out"]:
        losses = [summary["held_out"][0][1], summary["held_out"][-1][1]]
        text = " -> ".join(f"{loss:.4f}" for loss in losses) + " nats per token"
        if byte_level:
            text += ", " + " -> ".join(f"{loss / math.log(2):.3f}" for loss in losses) + " bits per byte"
        lines.append(("held-out loss", text))
    if summary["outer_steps"]:
        same = "identical" if summary["identical"] else "NOT identical"
        lines += [
            ("heads", f"{same} after {summary['outer_steps']} outer steps"),
            ("stalled", f"{summary['stalled_s']['median']:.2f} s per outer step (median)"),
            ("speed", f"{summary['tokens_per_s']['total']:,.0f} tokens/s in all"),
        ]
    return lines
