"""One peer's copy of the outer state: in memory, and on disk as a ledger. The two move together or not at all.

An update is on the disk before it is applied, so a crash at any instant leaves a state that the ledger leads to.
Methods block (disk, hashing); the network side calls them in a thread, one at a time.
"""

from __future__ import annotations

import threading

from p2p_diloco.codec import Vector
from p2p_diloco.errors import LedgerError
from p2p_diloco.ledger import Ledger
from p2p_diloco.manifest import RunManifest
from p2p_diloco.outer import OuterState, Update, apply_checked, check_update
from p2p_diloco.rounds import Standing
from p2p_diloco.snapshot import SnapshotInfo

HEADS_KEPT = 4


class Replica:
    """``theta`` and ``momentum``: float32 [n], written in place; theta may be shared with another process."""

    def __init__(self, manifest: RunManifest, ledger: Ledger, theta: Vector, momentum: Vector) -> None:
        self.manifest = manifest
        self.ledger = ledger
        self.theta = theta
        self.momentum = momentum
        self.state: OuterState | None = None
        self._lock = threading.Lock()

    def load(self, at_most: int | None = None) -> bool:
        """Take the newest state that the ledger leads to, or that at outer step ``at_most``. False: there is none."""
        with self._lock:
            self.state = self.ledger.load(self.theta, self.momentum, at_most=at_most)
            return self.state is not None

    def commit(self, update: Update) -> None:
        """Write the update, then apply it. ValueError, with nothing changed, when it does not follow from the state."""
        with self._lock:
            state, outer = self.loaded, self.manifest.spec.outer
            check_update(state, update, outer.codec)
            self.ledger.append(update)
            apply_checked(state, update, codec=outer.codec, lr=outer.lr, momentum=outer.momentum)

    def snapshot_if_due(self) -> None:
        with self._lock:
            if self.ledger.snapshot_due(self.loaded.step):
                self.ledger.write_snapshot(self.loaded)

    def roll_back(self, step: int) -> None:
        """Go back to outer step ``step``, which the ledger leads to, and put aside what came after."""
        with self._lock:
            self.ledger.truncate(step)
            self.state = self.ledger.load(self.theta, self.momentum, at_most=step)
            if self.state is None or self.state.step != step:
                raise LedgerError(f"{self.ledger.folder}: no longer leads to outer step {step}; restart to download it")

    @property
    def loaded(self) -> OuterState:
        if self.state is None:
            raise LedgerError(f"{self.ledger.folder}: holds no state yet")
        return self.state

    def standing(self) -> Standing:
        state, heads = self.loaded, self.ledger.heads()
        before = [heads[step] for step in range(state.step - 1, state.step - 1 - HEADS_KEPT, -1) if step in heads]
        return Standing(step=state.step, head=state.head, heads=tuple(before), committed=state.step > 0)

    def newest_snapshot(self) -> SnapshotInfo:
        snapshots = self.ledger.snapshots()
        if not snapshots:
            raise LedgerError(f"{self.ledger.folder}: holds no snapshot")
        return snapshots[-1]
