"""Proofs against peers that lie, on the disk: one file for each peer that is barred, in the folder of the ledger.

    RUN-FOLDER/ledger/barred/PEER-ID.proof

They are there as long as the run, for a peer that is started again shall not forget them. Raises LedgerError when the
disk fails.
"""

from __future__ import annotations

import logging
from pathlib import Path

from p2p_diloco.core.barred import Barred
from p2p_diloco.core.equivocation import MAX_PROOF_BYTES
from p2p_diloco.core.records import MAX_BARRED
from p2p_diloco.ledger.disk import disk_errors
from p2p_diloco.ledger.seats import read_bounded, write_own

log = logging.getLogger(__name__)

SUFFIX = ".proof"


def read_proofs(ledger: Path, barred: Barred) -> None:
    """Bars every peer against whom there is a proof in a ledger's folder; MAX_BARRED files are read at most. A file
    that proves nothing is deleted, and a warning says so."""
    with disk_errors(ledger):
        paths = sorted((ledger / "barred").glob(f"*{SUFFIX}"))[:MAX_BARRED]
    for path in paths:
        data = read_bounded(path, MAX_PROOF_BYTES)
        try:
            barred.take(data or b"")
        except ValueError as error:
            log.warning("%s: damaged (%s), and deleted: a sound one comes back from other peers", path, error)
            with disk_errors(path):
                path.unlink(missing_ok=True)


def keep_proofs(ledger: Path, barred: Barred) -> None:
    """Writes the proofs that are not there yet into a ledger's folder, and deletes those of peers that are barred no
    more."""
    folder, kept = ledger / "barred", {f"{peer_id}{SUFFIX}": peer_id for peer_id in barred}
    with disk_errors(folder):
        there = {path.name: path for path in folder.glob(f"*{SUFFIX}")}
        for name in there.keys() - kept.keys():
            there[name].unlink(missing_ok=True)
    for name in sorted(kept.keys() - there.keys()):
        proof = barred.proof(kept[name])
        if proof is not None:
            write_own(folder / name, proof)
