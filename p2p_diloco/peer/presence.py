"""What a peer makes known about itself, and how it hears of the others: records in the DHT, and pushed directly.

The DHT is for peers that do not know us yet, and slow: a record is seconds old when it arrives. A peer that joins,
catches up or leaves therefore pushes its record to all that it knows, and each answers with its own.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

from p2p_diloco import __version__
from p2p_diloco.core.addresses import Endpoint, fitting
from p2p_diloco.core.admission import LAPSED, Lapsed
from p2p_diloco.core.errors import UsageError
from p2p_diloco.core.event import PhaseBegan, RoundEnded
from p2p_diloco.core.events import EventLog
from p2p_diloco.core.records import HEADS_SHOWN, RUNS_KEY, Phase, Record, Role, peers_key, seal_record
from p2p_diloco.core.roster import announces_run
from p2p_diloco.core.swarm_head import Standing
from p2p_diloco.core.waiting import Bell, heard, run_all
from p2p_diloco.ledger.replica import Replica
from p2p_diloco.ledger.snapshot import IncomingSnapshot, SnapshotInfo
from p2p_diloco.peer.families import Families
from p2p_diloco.peer.pushes import Pushes
from p2p_diloco.round.company import Company
from p2p_diloco.round.here import Here
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.state_messages import Push

log = logging.getLogger(__name__)

FAVOURED_STEPS = 16
"""Who has contributed to one of so many last updates is favoured, and so is the run's owner, whose seed contributes
nothing: they have places that strangers cannot take. A claim moves nobody in here; the ledger does."""
MADDRS_BYTES = 560
"""Of all addresses in a record, that of the metrics included: beside a seat, the rest takes up to 790 bytes."""
CANNOT_BE_DIALLED = "behind a router: others cannot dial this peer, so it contributes, and they average"


@dataclass(kw_only=True)
class Trained:
    """The trainer's newest figures, for the record."""

    loss: float | None = None
    tokens: int = 0
    tokens_per_s: float = 0.0
    held_out_loss: float | None = None
    held_out_step: int = 0


@dataclass(frozen=True, kw_only=True)
class LastRound:
    """This peer's last round, for the record."""

    group: int = 0
    seconds: float = 0.0
    bytes: int = 0
    """Sent and received."""


@dataclass(kw_only=True, eq=False)
class Presence:
    """Makes and publishes one peer's record, and reads the others'."""

    here: Here
    replica: Replica
    company: Company
    events: EventLog
    role: Role
    name: str
    metrics: Endpoint | None
    """Where metrics are served."""
    trained: Trained = field(default_factory=Trained)
    last_round: LastRound = field(default_factory=LastRound)
    publish_now: Bell = field(default_factory=Bell)
    heard: Bell = field(default_factory=Bell)
    """Records have come."""

    def __post_init__(self) -> None:
        self._run_id = self.replica.manifest.run_id
        self.families = Families(here=self.here, company=self.company)
        self.pushes = Pushes(here=self.here)
        self._maddrs: list[str] = []
        self._last_issued_s = 0.0
        self._told_helps = False

    async def publish_loop(self) -> None:
        """Publishes a new record every ``record_every_s``, and whenever ``publish_now`` rings, until it is
        cancelled."""
        while True:
            rung = self.publish_now.event
            await self.publish()
            await heard(rung, self.here.timeouts.record_every_s)

    async def publish(self) -> None:
        """Signs a new record and stores it in the DHT; with few peers about, also under the key where newcomers
        look."""
        self._maddrs = await self.here.transport.maddrs()
        self._note_whether_dialable()
        self._note_families()
        record = self.record()
        self._check_seat(record)
        sealed = self.here.seat.sealed_record = seal_record(record, self.here.identity)
        if record.helps != self._told_helps:
            self._told_helps = record.helps
            await self.pushes.to_all()
        await self.here.transport.publish(peers_key(self._run_id), sealed, record.expires_s)
        if announces_run(self.here.live(), self.here.peer_id):
            await self.here.transport.publish(RUNS_KEY, sealed, record.expires_s)

    def _note_whether_dialable(self) -> None:
        """Takes in that others can dial me now, or cannot any more: a router has opened a port, or my address has
        changed, and over which families."""
        seat, dialable = self.here.seat, self.here.transport.dialable
        seat.ways = self.here.directory.ways = self.here.transport.ways
        if seat.client_mode == dialable:
            seat.client_mode = not dialable
            log.info("others can dial this peer now" if dialable else CANNOT_BE_DIALLED)

    def _note_families(self) -> None:
        """Takes in what the others' records say of their families. All hear it at once when I begin to lead by that."""
        self.families.note()
        if self.families.helps != self._told_helps:
            self.seal()
            self.publish_now.ring()

    def _check_seat(self, record: Record) -> None:
        """Raises UsageError when my seat has lapsed: others take no notice of me any more."""
        admission, step = self.here.directory.admission, self.here.seat.standing.step
        try:
            admission.check(record, now_s=self.here.wall_s(), step=step)
        except Lapsed as error:
            raise UsageError(LAPSED) from error

    async def refresh(self) -> None:
        """Reads everybody's record in the DHT."""
        for sealed in await self.here.transport.look_up(peers_key(self._run_id)):
            try:
                self.here.directory.learn(sealed, self.here.wall_s())
            except ValueError as error:
                log.debug("a record in the DHT is not sound: %s", error)
        self._note_families()
        self.heard.ring()

    async def refresh_loop(self) -> None:
        """Reads the others' records every ``refresh_s``, until it is cancelled."""
        while True:
            await asyncio.sleep(self.here.timeouts.refresh_s)
            await self.refresh()
            self.pushes.call_unproven()

    async def show_download(self) -> None:
        """Publishes my record and reads the others' from when I download a snapshot on, until it is cancelled: who
        downloads it, too, and I have chunks for each other then."""
        while self.replica.ledger.incoming is None:
            await self.here.seat.changed.event.wait()
        await self.publish()
        await self.refresh()
        self.pushes.call_unproven()
        await run_all(self.publish_loop(), self.refresh_loop())

    async def on_push(self, channel: Channel, message: Push) -> None:
        """Takes the record that a peer pushes, and answers with mine."""
        self.pushes.learn(channel.peer_id, message.record)
        self._note_families()
        await channel.send(Push(record=self.here.seat.sealed_record))
        self.heard.ring()

    def enter(self, phase: Phase) -> None:
        """Begins a phase: the record, the event log and whatever waits for a change of the seat have it at once."""
        self.here.seat.phase = phase
        self.events.write(PhaseBegan(phase=phase, step=self.here.seat.standing.step))
        self.seal()
        self.here.seat.changed.ring()

    def take_standing(self) -> None:
        """Brings the seat and the record to where the state has moved."""
        standing = self.here.seat.standing = self.replica.standing()
        self.here.seat.known = self.replica.known()
        self.here.seat.changed.ring()
        self.here.directory.step = standing.step
        self.here.directory.show((standing.head, *standing.heads))
        favoured, manifest = self.here.transport.favoured, self.replica.manifest
        favoured.clear()
        favoured.update(self.replica.contributors(FAVOURED_STEPS), (manifest.owner,))
        self.seal()

    def seal(self) -> None:
        """Signs a new record: whoever asks from now on hears where I stand now."""
        self.here.seat.sealed_record = seal_record(self.record(), self.here.identity)

    def record(self) -> Record:
        """Returns what I say about myself now."""
        seat, totals, trained = self.here.seat, self.events.totals, self.trained
        standing, progress = seat.standing, seat.progress
        made = totals.last_commit if _ended_at(totals.last_commit, standing) else None
        waits = totals.last_round if _ended_at(totals.last_round, standing) else None
        snapshot, newest = self._snapshot(), seat.anchors.newest
        metrics_addr = self.metrics.announced(self._maddrs) if self.metrics else ""
        return Record(
            peer_id=self.here.peer_id,
            run_id=self._run_id,
            run_name=self.replica.manifest.spec.name,
            issued_s=self._date_s(),
            life_s=self.here.timeouts.record_life_s,
            role=self.role,
            phase=seat.phase,
            step=standing.step,
            head=standing.head,
            committed=standing.beyond_genesis,
            heads=list(standing.heads[:HEADS_SHOWN]),
            snapshot_step=snapshot.step if snapshot else 0,
            snapshot_digest=snapshot.digest if snapshot else bytes(32),
            maddrs=fitting(self._maddrs, MADDRS_BYTES - len(metrics_addr)),
            client_mode=seat.client_mode,
            name=self.name,
            version=__version__,
            inner_step=progress.inner_step,
            inner_steps_planned=progress.planned,
            loss=trained.loss,
            held_out_loss=trained.held_out_loss,
            held_out_step=trained.held_out_step,
            tokens=trained.tokens,
            tokens_per_s=trained.tokens_per_s,
            group_size=self.last_round.group,
            round_s=self.last_round.seconds,
            round_bytes=self.last_round.bytes,
            metrics_addr=metrics_addr,
            seat=self.here.sealed_seat,
            revocations=self.here.directory.admission.number,
            known=self.here.peer_id in seat.known.peers,
            known_members=len(seat.known.peers),
            signatures=made.signatures if made else 0,
            certifying=made.certifying if made else 0,
            witnessed=made is not None and made.witnessed,
            awaits_witness=waits is not None and waits.uncertified == "witness",
            anchored_step=newest.step if newest else 0,
            anchor=newest.digest if newest else b"",
            barred=len(self.here.directory.barred),
            barred_digest=self.here.directory.barred.digest(),
            found_wrong=self.company.findings.count("wrong", standing.step),
            helped=made is not None and made.helper is not None,
            share_percent=100 if made is None or made.share_percent is None else made.share_percent,
            reached_over=seat.ways.reached_over,
            reaches_over=seat.ways.reaches_over,
            helps=self.families.helps,
        )

    def _snapshot(self) -> SnapshotInfo | IncomingSnapshot | None:
        """Returns the newest snapshot that I serve; while I am joining, the one that I download, if I do."""
        ledger = self.replica.ledger
        if self.here.seat.phase == "joining" and ledger.incoming is not None:
            return ledger.incoming
        return next(reversed(ledger.snapshots()), None)

    def _date_s(self) -> float:
        """Returns the date of a new record. Every one is newer than the last, even within one tick of the clock."""
        now_s = self.here.wall_s()
        if self._last_issued_s > now_s + self.here.timeouts.record_life_s:
            self._last_issued_s = 0.0  # our clock was set back: nobody would believe a record from there
        self._last_issued_s = max(now_s, self._last_issued_s + 1e-3)
        return self._last_issued_s


def _ended_at(ended: RoundEnded | None, standing: Standing) -> bool:
    """Tells whether a round has ended where I stand."""
    return ended is not None and ended.head == standing.head.hex()
