"""One peer's copy of the outer state: in memory, and on disk as a ledger. The two move together or not at all.

Certificate and update are on the disk before the update is applied, so a crash at any instant leaves a state that the
ledger leads to. Memory and disk are compared at every snapshot, which is made from the files alone: a bit that flips in
memory gets neither onto the disk nor to other peers. Methods block (disk, hashing); the network side calls them in a
thread, one at a time.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from p2p_diloco.core.certificate import Certificate, Certified
from p2p_diloco.core.codec import Vector
from p2p_diloco.core.errors import Gap, LedgerError
from p2p_diloco.core.known import Known
from p2p_diloco.core.manifest import RunManifest
from p2p_diloco.core.outer import OuterState, apply_checked, check_update
from p2p_diloco.core.roster_rules import RosterRules
from p2p_diloco.core.swarm_head import Standing
from p2p_diloco.core.update import Update, UpdateHeader, in_most_parts
from p2p_diloco.ledger.comparison import agreed, differing
from p2p_diloco.ledger.history import ChainHistory
from p2p_diloco.ledger.ledger import Ledger
from p2p_diloco.ledger.replay import Replay, load
from p2p_diloco.ledger.snapshot import SnapshotInfo

log = logging.getLogger(__name__)

What = Literal["state", "snapshot", "update"]


@dataclass(frozen=True, kw_only=True)
class Repair:
    """A repair that was made: something of this peer's was not what it should be, and is again."""

    what: What
    step: int
    """The state's or snapshot's outer step, or that which the update ends."""
    how: Literal["replayed", "fetched", "rewritten"]
    """From the other files here; from another peer; or a snapshot of the state in memory stands in for it."""


class Replica:
    """The outer state of one peer. ``theta`` and ``momentum`` are float32 [n] and written in place; theta may be shared
    with another process."""

    def __init__(self, manifest: RunManifest, ledger: Ledger, theta: Vector, momentum: Vector) -> None:
        self.manifest = manifest
        self.ledger = ledger
        self.history = ChainHistory(manifest, ledger.chain)
        self.theta = theta
        self.momentum = momentum
        self.state: OuterState | None = None
        self.sound = True
        """False: the state in memory is not what the files lead to. ``mend`` it before it is used."""
        self.repairs: list[Repair] = []
        """Made since somebody last looked, who takes them out."""
        self._flipped = 0
        """Values that a ``mend`` under way has found to be wrong."""
        self.rules = RosterRules.of(manifest)
        """What the run says of rosters, and with that of certificates."""
        self._lock = threading.Lock()

    def load(self, at_most: int | None = None) -> bool:
        """Takes the newest state that ledger and chain lead to, or that at outer step ``at_most``. False: there is
        none."""
        with self._lock:
            return self._load(at_most)

    def _load(self, at_most: int | None) -> bool:
        end = self.ledger.chain.end  # who is known beyond cannot be told
        at_most = end if at_most is None else min(at_most, end)
        self.state = load(self.ledger, self.theta, self.momentum, at_most=at_most)
        self.sound = True
        return self.state is not None

    def commit(self, update: Update, certificate: Certificate) -> None:
        """Writes certificate and update, then applies it. The certificate's signatures have been verified before.
        Raises ValueError, with nothing changed, when the update does not follow from the state, or others are in most
        of its parts than the certificate has."""
        with self._lock:
            state, outer = self.loaded, self.manifest.spec.outer
            if certificate.full != in_most_parts([part.mask for part in update.parts]):
                raise ValueError(f"update {update.header.step} has others in most of its parts than its certificate")
            check_update(state, update, self.ledger.grid)
            self.ledger.append(update, certificate)
            apply_checked(state, update, self.ledger.grid, lr=outer.lr, momentum=outer.momentum)

    def extend(self, entries: Sequence[Certified]) -> None:
        """Takes verified headers and certificates into the chain, as ``Ledger.extend`` does. What it abandons may be
        what led to the state in memory."""
        with self._lock:
            self.ledger.extend(entries)

    def roll_back(self, step: int, entries: Sequence[Certified] = ()) -> None:
        """Goes back to outer step ``step``, which the ledger leads to, and puts aside what came after. The chain leads
        on from there by ``entries``, which have been verified."""
        with self._lock:
            self.ledger.go_back(step, entries)
            self._load(step)
            if self.state is None or self.state.step != step:
                raise Gap(f"{self.ledger.folder}: no longer leads to outer step {step}; restart to download it")

    # -- snapshots ---------------------------------------------------------------------------------------------------

    def missing_snapshots(self) -> list[tuple[int, bytes]]:
        """Returns (outer step, head) of those that ought to be there and that updates lead to, newest first: the last
        one that is due, and what was found damaged."""
        state, ledger = self.loaded, self.ledger
        wanted = {lost.step: lost.head for lost in ledger.lost_snapshots.values()}
        due = ledger.newest_due(state.step)
        wanted[due] = state.head if due == state.step else ledger.heads().get(due, b"")
        for held in ledger.snapshots():
            wanted.pop(held.step, None)
        ordered = sorted(wanted.items(), reverse=True)
        return [(step, head) for step, head in ordered if ledger.way_to(step, head) is not None]

    def make_snapshots(self) -> None:
        """Makes what is missing from the snapshot before and the updates since, all of which are verified on the way;
        and see whether memory, if it stands there, holds the same."""
        with self._lock:
            while missing := self.missing_snapshots():
                self._make_snapshot(*missing[0])

    def _make_snapshot(self, step: int, head: bytes) -> None:
        """Makes one snapshot, unless a file on the way turns out to be damaged, and there is no other way."""
        lost = step in self.ledger.lost_snapshots
        try:
            replay = Replay(self.ledger, step, head)
            parts = self._compared(replay) if step == self.loaded.step else replay.parts()
            self.ledger.write_parts(parts, step=step, head=head)
        except Gap as gap:
            log.debug("no snapshot: %s", gap)
            return
        if lost:
            self._note(Repair(what="snapshot", step=step, how="replayed"))

    def _compared(self, replay: Replay) -> Iterator[tuple[Vector, Vector]]:
        """Yields the parts of the replay. On the way, memory is compared with them."""
        for part, memory in enumerate(self.loaded.parts()):
            pair = agreed(replay, part, memory)
            if differing(pair, memory):
                self.sound = False
            yield pair

    def adopt_snapshot(self, path: Path, digest: bytes, entries: Sequence[Certified] = ()) -> None:
        """Takes in a downloaded snapshot as ``Ledger.adopt_snapshot`` does; the state in memory stays what it is.
        ``entries`` have been verified."""
        with self._lock:
            self.ledger.adopt_snapshot(path, digest, entries)

    def digest_due(self) -> bytes:
        """Returns the digest of the state where a snapshot of it is due, and nothing elsewhere. It is that of the
        snapshot, which was made from the files, where there is one. Blocks: it hashes 8 bytes for each parameter
        otherwise, or waits for a snapshot that is being made."""
        with self._lock:
            state = self.loaded
            if self.ledger.newest_due(state.step) != state.step:
                return b""
            made = (s.digest for s in self.ledger.snapshots() if (s.step, s.head) == (state.step, state.head))
            return next(made, None) or state.digest()

    # -- repairs -----------------------------------------------------------------------------------------------------

    def mend(self) -> bool:
        """Gives memory the bits that the files lead to, and returns whether any were others. Nobody may use theta
        meanwhile, and who has, takes it anew. Gap, with some of it mended, when the files do not lead here."""
        with self._lock:
            state = self.loaded
            replay = Replay(self.ledger, state.step, state.head)
            for part, memory in enumerate(state.parts()):
                pair = agreed(replay, part, memory)
                self._flipped += differing(pair, memory)
                for mine, stored in zip(memory, pair):
                    mine[:] = stored
            flipped, self._flipped, self.sound = self._flipped, 0, True
            if flipped:
                log.error(
                    "memory: %d values of the state were not what its updates lead to; bits have flipped", flipped
                )
                self._note(Repair(what="state", step=state.step, how="replayed"))
            return flipped > 0

    def lost_updates(self) -> list[UpdateHeader]:
        """Returns the updates between the oldest snapshot and here whose files turned out damaged, or gone."""
        return [header for step, header in sorted(self.ledger.updates.lost.items()) if step < self.loaded.step]

    def fill(self, update: Update) -> None:
        """Takes in an update that is lost, whose certificate the chain has; one that is not, changes nothing."""
        with self._lock:
            if update.header in self.lost_updates():
                self.ledger.restore(update)
                self._note(Repair(what="update", step=update.header.step, how="fetched"))

    def do_without(self) -> None:
        """Gives up what is lost, for nobody has it. If a restart would not find the state without it, a snapshot of the
        state in memory stands in for it; unless that is known to be wrong."""
        with self._lock:
            state, ledger = self.loaded, self.ledger
            lost = [Repair(what="snapshot", step=step, how="rewritten") for step in ledger.lost_snapshots]
            lost += [Repair(what="update", step=header.step, how="rewritten") for header in self.lost_updates()]
            if not lost or not self.sound:
                return
            if ledger.way_to(state.step, state.head) is None:
                ledger.write_snapshot(state)
                for repair in lost:
                    self._note(repair)
            ledger.lost_snapshots, ledger.updates.lost = {}, {}

    def took_snapshot(self, step: int) -> None:
        """Notes that the snapshot of outer step ``step`` was taken from another peer: this peer's was wrong, and so is
        what memory has made of it."""
        self.sound = False
        self._note(Repair(what="snapshot", step=step, how="fetched"))

    def _note(self, repair: Repair) -> None:
        log.warning("repaired: the %s of outer step %d (%s)", repair.what, repair.step, repair.how)
        self.repairs.append(repair)

    # -- where it stands ---------------------------------------------------------------------------------------------

    @property
    def loaded(self) -> OuterState:
        """Returns the state. Raises LedgerError before there is one."""
        if self.state is None:
            raise LedgerError(f"{self.ledger.folder}: holds no state yet")
        return self.state

    def standing(self) -> Standing:
        """Returns where this peer stands, and the heads that its ledger leads back to without a gap."""
        state, heads, way = self.loaded, self.ledger.heads(), [self.loaded.head]
        for step in range(state.step - 1, -1, -1):
            header = self.ledger.header(step)
            if header is None or header.head != way[-1] or header.parent != heads.get(step):
                break
            way.append(header.parent)
        return Standing(step=state.step, head=state.head, heads=tuple(way[1:]))

    def known(self) -> Known:
        """Returns who is known where the state stands."""
        return self.ledger.chain.known_at(self.loaded.step)

    def contributors(self, steps: int) -> set[str]:
        """Returns the ids of the peers that have contributed to any of the last ``steps`` updates, as far as these are
        in the ledger."""
        headers = map(self.ledger.header, range(max(self.loaded.step - steps, 0), self.loaded.step))
        return {peer_id for header in headers if header is not None for peer_id, _ in header.contributors}

    def newest_snapshot(self) -> SnapshotInfo:
        """Returns what is known of the newest snapshot. Raises LedgerError where there is none."""
        snapshots = self.ledger.snapshots()
        if not snapshots:
            raise LedgerError(f"{self.ledger.folder}: holds no snapshot")
        return snapshots[-1]
