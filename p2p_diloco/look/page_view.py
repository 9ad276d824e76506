"""What the page asks for every few seconds: the run, its figures and its peers, as one JSON object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from p2p_diloco.core.admission import invited_as
from p2p_diloco.core.manifest import RunManifest
from p2p_diloco.core.records import Reached, Record, Role
from p2p_diloco.look.display import label, plain
from p2p_diloco.look.history import History
from p2p_diloco.look.overview import CertificateRow, Overview, SeatRow, State, addresses_to_join, state_of
from p2p_diloco.look.ways_in import join_note


@dataclass(frozen=True, kw_only=True)
class PageRun:
    """Holds what the page says of the run itself."""

    name: str
    id: str
    steps: int
    n_params: int
    byte_level: bool
    """A token is a byte."""


@dataclass(frozen=True, kw_only=True)
class PageRow:
    """A peer on the page."""

    peer: str
    name: str
    role: Role
    state: State
    step: int
    inner_step: int
    planned: int
    loss: float | None
    tokens: int
    tokens_per_s: float
    version: str
    invitation: str
    """Under which it takes part; empty where it needs none."""
    known: bool
    """At its head, as it says."""
    reached: Reached
    share_percent: int

    @classmethod
    def of(cls, record: Record) -> PageRow:
        """Returns the row of a record."""
        return cls(
            peer=record.peer_id,
            name=label(record.name, record.peer_id),
            role=record.role,
            state=state_of(record),
            step=record.step,
            inner_step=record.inner_step,
            planned=record.inner_steps_planned,
            loss=record.loss,
            tokens=record.tokens,
            tokens_per_s=record.tokens_per_s,
            version=plain(record.version),
            invitation=invited_as(record),
            known=record.known,
            reached=record.reached,
            share_percent=record.share_percent,
        )


@dataclass(frozen=True, kw_only=True)
class Page:
    """Is what the page asks for every few seconds; ``overview.Overview`` and ``history.History`` say what figures
    mean."""

    run: PageRun
    now_s: float
    up: bool
    step: int
    step_since_s: float | None
    heads: int
    peers: Mapping[State, int]
    tokens: int
    tokens_per_s: float | None
    loss: float | None
    held_out_loss: float | None
    held_out_step: int
    join_line: str
    """Empty while nobody can be dialled."""
    join_note: str
    """For whom that line does not work; empty where it does for all."""
    rows: tuple[PageRow, ...]
    curve: Mapping[str, list[float | None]]
    """Columns."""
    pace: Mapping[str, list[float | None]]
    known_members: int | None
    certificate: CertificateRow | None
    waits_for_owner: bool
    by_invitation: bool
    """Who wants to join needs an invitation."""
    seats: tuple[SeatRow, ...]
    anchored_step: int
    found_wrong: int
    barred: int


def page_of(manifest: RunManifest, overview: Overview, history: History, initial_peers: Sequence[str]) -> Page:
    """Returns what the page shows: trainers before seeds, whoever has trained on most tokens first. ``initial_peers``:
    the monitor's."""
    to_join = addresses_to_join(overview.records, initial_peers)
    addresses = " ".join(to_join)
    by_invitation = manifest.spec.membership == "invite"
    more = " --invite FILE" if by_invitation else ""
    return Page(
        run=PageRun(
            name=manifest.spec.name,
            id=manifest.run_id,
            steps=manifest.spec.outer.steps,
            n_params=manifest.n_params,
            byte_level=not manifest.tokenizer_json,
        ),
        now_s=overview.now_s,
        up=overview.step is not None,
        step=history.step,
        step_since_s=history.step_since_s,
        heads=overview.heads,
        peers=overview.peers,
        tokens=overview.tokens,
        tokens_per_s=overview.tokens_per_s,
        loss=overview.loss,
        held_out_loss=overview.held_out_loss,
        held_out_step=overview.held_out_step,
        join_line=addresses and f"p2p-diloco peer --initial-peers {addresses} --run-id {manifest.run_id}{more}",
        join_note=join_note(to_join),
        rows=tuple(PageRow.of(r) for r in sorted(overview.records, key=lambda r: (r.role == "seed", -r.tokens))),
        curve=history.curve_columns(),
        pace=history.pace_columns(),
        known_members=overview.known_members,
        certificate=overview.certificate,
        waits_for_owner=overview.waits_for_owner,
        by_invitation=by_invitation,
        seats=tuple(overview.seats),
        anchored_step=overview.anchored_step,
        found_wrong=overview.found_wrong,
        barred=overview.barred,
    )
