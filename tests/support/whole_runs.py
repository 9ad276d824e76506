"""A run of many outer steps on a disk, as a seed's folder has it: made at once by three trainers that are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from p2p_diloco.core.anchor import Anchors
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.manifest import RunManifest
from p2p_diloco.core.outer import genesis_state
from p2p_diloco.core.update import Part, contributor_mask
from p2p_diloco.ledger.anchors import keep_anchors
from p2p_diloco.ledger.folder import MANIFEST_FILE
from p2p_diloco.ledger.ledger import Ledger
from p2p_diloco.ledger.replica import Replica
from tests.support.builders import OWNER, identity
from tests.support.certificates import made_by
from tests.support.fakes import make_manifest

THREE = tuple(identity(i + 1) for i in range(3))


def whole_run(
    folder: Path,
    *,
    n: int,
    steps: int,
    snapshot_every: int,
    keep_snapshots: int = 2,
    members: tuple[Identity, ...] = THREE,
    anchored: bool = True,
) -> RunManifest:
    """Writes the folder of a run that ``members`` have brought to outer step ``steps``; the owner has anchored it up to
    two snapshots before, or not at all."""
    genesis = np.random.default_rng(steps).standard_normal(n).astype(np.float32)
    manifest = make_manifest(n, genesis, OWNER, codec="int8", outer_steps=steps, snapshot_every=snapshot_every, lr=0.01)
    outer = manifest.spec.outer
    ledger = Ledger(
        folder / "ledger",
        grid=manifest.grid,
        lr=outer.lr,
        momentum=outer.momentum,
        snapshot_every=snapshot_every,
        keep_snapshots=keep_snapshots,
        run_id=manifest.run_id,
    )
    (folder / MANIFEST_FILE).write_bytes(manifest.signed(OWNER))
    ledger.write_snapshot(genesis_state(genesis.copy()))
    replica = Replica(manifest, ledger, np.empty(n, np.float32), np.empty(n, np.float32))
    replica.load()
    random, anchors = np.random.default_rng(7), Anchors()
    for step in range(steps):
        commit_round(replica, members, random)
        if (step + 1) % snapshot_every == 0:
            replica.make_snapshots()
            state = replica.loaded
            if anchored and state.step <= steps - 2 * snapshot_every:
                anchor = anchors.next(
                    manifest.run_id, step=state.step, head=state.head, state=state.digest(), owner=OWNER
                )
                anchors = anchors.offered([anchor])
    if anchored:
        keep_anchors(ledger.folder, anchors)
    return manifest


def commit_round(replica: Replica, members: tuple[Identity, ...], random: np.random.Generator) -> None:
    """One outer step of all ``members``, to values drawn at random."""
    grid, mask = replica.ledger.grid, contributor_mask(range(len(members)))
    values = (random.standard_normal(grid.n_values(part)).astype(np.float32) for part in range(grid.n_parts))
    parts = [Part(mask=mask, data=grid.encode(one)) for one in values]
    head, state = replica.loaded.head, replica.digest_due()
    update, certificate = made_by(members, parts, replica.rules, replica.known(), head, owner=OWNER, state=state)
    replica.commit(update, certificate)
