"""What a peer shows in a terminal: where it stands, and a table of everybody; also the table of ``status``.

What others say about themselves (names above all) is shown as text and nothing else: no markup, no control characters,
no marks that turn the direction of writing. Everything fits into 80 columns. Bars are of characters that differ, and so
tell how far something is where there are no colors, too.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from p2p_diloco.core.config import MAX_NAME_CHARS
from p2p_diloco.core.peer_row import PeerRow
from p2p_diloco.look.ways_in import join_line, join_note

if TYPE_CHECKING:
    from p2p_diloco.learn.swarm import Swarm

STDOUT = Console(highlight=False, soft_wrap=False)

REFRESHES_PER_S = 4
OTHER_COLUMNS = 68
"""Of the table of peers, beside the name."""
HEADER_LINES = 13
"""All but the rows of the table, and the prompt that comes back."""
NOTHING = "–"
DONE, TO_DO = "█", "░"
OWN_BAR_COLUMNS = 40
IN_ASCII = str.maketrans("█░▸≠·–…→✓✗", "#.>!|-~>+x")
"""What is shown instead where the terminal's encoding is not UTF-8."""


@dataclass(frozen=True)
class Legible:
    """Shows ``what`` in characters that the console's encoding has: others would be shown as numbers."""

    what: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self.what, options):
            if options.ascii_only and not segment.control:
                text = segment.text.translate(IN_ASCII).encode("ascii", "replace").decode()
                yield Segment(text, segment.style)
            else:
                yield segment


def is_live(console: Console) -> bool:
    """Returns whether a table can be kept up to date there: not in a file, and not on a terminal that cannot go
    back."""
    return console.is_terminal and not console.is_dumb_terminal


def bar(done: float, of: float, columns: int) -> str:
    """Returns a bar of ``columns`` characters, which is full only when all is done."""
    share = min(max(done / of, 0.0), 1.0) if of else 0.0
    full = int(share * columns)
    return DONE * full + TO_DO * (columns - full)


@dataclass(frozen=True, kw_only=True)
class View:
    """Says what the screen of one peer shows."""

    run: str
    run_id: str
    role: str
    step: int
    steps: int
    """Outer steps of the whole run."""
    head: str
    inner_step: int
    planned: int
    loss: float | None
    tokens_per_s: float
    rows: Sequence[PeerRow]
    """Mine first."""
    evaluation: tuple[int, float] | None
    """As ``Swarm.evaluation``."""
    join_line: str
    """Empty for a peer that nobody can dial."""
    join_note: str
    """For whom that line does not work; empty where it does for all."""

    @classmethod
    def of(cls, swarm: Swarm) -> View:
        """Returns what the screen of ``swarm``'s peer shows now."""
        rows = swarm.rows
        return cls(
            run=swarm.manifest.spec.name,
            run_id=swarm.manifest.run_id,
            role=rows[0].role if rows else "",
            step=swarm.step,
            steps=swarm.manifest.spec.outer.steps,
            head=swarm.head,
            inner_step=swarm.inner_step,
            planned=swarm.planned,
            loss=swarm.loss,
            tokens_per_s=swarm.tokens_per_s,
            rows=rows,
            evaluation=swarm.evaluation,
            join_line=join_line(swarm.maddrs),
            join_note=join_note(swarm.maddrs),
        )


@contextmanager
def live_table(swarm: Swarm, console: Console) -> Iterator[None]:
    """Keeps the screen below everything else that ``console`` prints; nothing where it cannot (``is_live``)."""
    if not is_live(console):
        yield
        return

    def screen() -> RenderableType:
        return screen_of(View.of(swarm), width=console.width, height=console.height)

    with Live(console=console, get_renderable=screen, refresh_per_second=REFRESHES_PER_S):
        console.show_cursor(True)  # hidden, it would stay so after a second Ctrl+C, which ends the process at once
        yield


def screen_of(view: View, *, width: int, height: int) -> RenderableType:
    """Returns the screen of one peer, which fits into ``width`` columns and ``height`` lines."""
    facts = f"run {view.run} {view.run_id[:12]} · outer step {view.step} of {view.steps}"
    lines: list[RenderableType] = [Text(facts, style="bold")]
    if view.role == "trainer":
        own = f"loss {decimal(view.loss)} · {count(view.tokens_per_s)} tokens/s"
        lines += [Text(f"{own} · {held_out(view.evaluation)}"), Text(last_round(view.rows[0])), own_bar(view)]
    else:
        lines.append(Text(held_out(view.evaluation)))
    lines += [Text(), peers_table(view.rows, head=view.head, width=width, most=max(height - HEADER_LINES, 1), own=True)]
    if view.join_line:
        lines += [Text(), Text(view.join_line, style="dim", overflow="fold")]
        lines += [Text(view.join_note.partition(";")[0], style="dim")] if view.join_note else []
    return Legible(Group(*lines))


def last_round(me: PeerRow) -> str:
    """Returns the words for the last round of the peer of this row."""
    if not me.group_size:
        return "last round: none yet"
    cost = f"{me.round_s:.2f} s" if me.round_s < 100_000 else "huge"
    return f"last round: group of {count(me.group_size)}, {cost}, {count(me.round_bytes)}B"


def own_bar(view: View) -> RenderableType:
    """Returns the bar of this peer's inner steps since its last outer step."""
    done = f"{bar(view.inner_step, view.planned, OWN_BAR_COLUMNS)} {fraction(view.inner_step, view.planned)}"
    return Text(f"inner steps {done}")


def peers_table(rows: Sequence[PeerRow], *, head: str, width: int, most: int, own: bool) -> RenderableType:
    """Returns a table of the first ``most`` rows. ``head``: rows of peers that stand on another one are marked.
    ``own``: the first row is this peer's. Headings have the unit in their second line; losses are per token."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("")
    table.add_column("peer")
    table.add_column("role")
    table.add_column("phase")
    for column in ("outer\nstep", "inner\nsteps", "loss\nnats", "tokens\n/s", "tokens\nso far", "group\npeers"):
        table.add_column(column, justify="right", no_wrap=True)
    name_columns = max(min(width - OTHER_COLUMNS, MAX_NAME_CHARS), 8)
    for number, row in enumerate(rows[:most]):
        mine = own and number == 0
        elsewhere = row.head != head
        trains = row.role == "trainer"
        name = Text(label(row.name, row.peer_id))
        name.truncate(name_columns, overflow="ellipsis")
        table.add_row(
            "▸" if mine else "≠" if elsewhere else "",
            name,
            Text(row.role),
            Text(row.phase),
            count(row.step),
            fraction(row.inner_step, row.inner_steps_planned) if trains else NOTHING,
            decimal(row.loss),
            count(row.tokens_per_s) if trains else NOTHING,
            count(row.tokens) if trains else NOTHING,
            count(row.group_size) if row.group_size else NOTHING,
            style="bold" if mine else "yellow" if elsewhere else "",
        )
    notes = []
    if len(rows) > most:
        notes.append(f"and {len(rows) - most} more")
    if any(row.head != head for row in rows[int(own) : most]):
        notes.append("≠ on another head")
    return Group(table, Text("; ".join(notes), style="dim")) if notes else table


def label(name: str, peer_id: str) -> str:
    """Returns what a peer is called: its name, or the end of its id where it shows none."""
    return plain(name)[:MAX_NAME_CHARS].strip() or peer_id[-8:]


def plain(text: str, keep: str = "") -> str:
    """Returns ``text`` without characters that do anything but show: control, format and direction marks, line
    separators, surrogates; those in ``keep`` stay. What a stranger sent may not steer the terminal. Bytes of a path
    that are no text are shown as numbers."""
    text = BYTE.sub(lambda byte: f"\\x{ord(byte[0]) - 0xDC00:02x}", text)
    return "".join(c for c in text if c in keep or unicodedata.category(c) not in UNSEEN)


BYTE = re.compile("[\udc80-\udcff]")
"""As Python has one that is no text, in a path."""
UNSEEN = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"}


def held_out(evaluation: tuple[int, float] | None) -> str:
    """Returns the words for ``evaluation``, the swarm's newest one: (outer step, held-out loss)."""
    if evaluation is None:
        return "held-out loss: not evaluated yet"
    step, loss = evaluation
    return f"held-out loss {decimal(loss)} at outer step {count(step)}"


def count(number: float) -> str:
    """Returns a number in at most six characters: 99999, 123k, 4.56M."""
    if number < 100_000:
        return f"{number:.0f}"
    for unit in "kMGTPE":
        number /= 1000
        if number < 999.5:
            return f"{number:.3g}{unit}"
    return "huge"


def fraction(done: int, of: int) -> str:
    """Returns "57/100"."""
    return f"{count(done)}/{count(of)}"


def decimal(number: float | None) -> str:
    """Returns a loss as it is shown, and a dash for one that is not known or not finite."""
    if number is None or not math.isfinite(number):
        return NOTHING
    return f"{number:.4f}" if abs(number) < 1000 else f"{number:.1e}"
