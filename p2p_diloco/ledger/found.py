"""What a peer has found of reducers, as it lies in its ledger's folder: RUN-FOLDER/ledger/findings."""

from __future__ import annotations

import logging
from pathlib import Path

from p2p_diloco.core.findings import Findings
from p2p_diloco.ledger.seats import read_bounded, write_own

log = logging.getLogger(__name__)

MAX_FINDINGS_BYTES = 128 * 1024


def keep_findings(ledger: Path, findings: bytes) -> None:
    """Writes findings, packed, into a ledger's folder. Raises LedgerError when the disk fails."""
    write_own(ledger / "findings", findings)


def read_findings(ledger: Path) -> Findings | None:
    """Returns the findings in a ledger's folder; None where there are none, or where the file is damaged. Raises
    LedgerError when the disk fails."""
    data = read_bounded(ledger / "findings", MAX_FINDINGS_BYTES)
    if data is None:
        return None
    try:
        return Findings.from_bytes(data)
    except ValueError as error:
        log.warning("%s: %s; what was found of others is forgotten", ledger / "findings", error)
        return None
