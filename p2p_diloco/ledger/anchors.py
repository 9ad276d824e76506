"""The anchors on the disk: all that a peer goes by, from the first one on, in one file that is written whole.

    for each anchor, in the order of their numbers:
        length              2 bytes, big-endian
        anchor              ``Anchor.to_bytes``

A few hundred bytes for each: a run of a thousand anchors has a file of a quarter of a megabyte. The file ends before
the first one that is damaged; those from there on come back from other peers. Raises LedgerError when the disk
fails.
"""

from __future__ import annotations

from pathlib import Path

from p2p_diloco.core.anchor import MAX_ANCHOR_BYTES, MAX_ANCHORS, Anchor, Anchors, leads_on, open_anchor
from p2p_diloco.core.manifest import RunManifest
from p2p_diloco.ledger.disk import disk_errors, write_whole

LENGTH_BYTES = 2
MAX_FILE_BYTES = 2 * MAX_ANCHORS * (LENGTH_BYTES + MAX_ANCHOR_BYTES)
"""Twice what a run can need: the owner may have to settle between some."""


def anchors_path(ledger: Path) -> Path:
    """Returns where the anchors lie in a ledger's folder."""
    return ledger / "anchors"


def read_anchors(ledger: Path, manifest: RunManifest) -> tuple[Anchors, str]:
    """Returns the anchors in a ledger's folder up to the first that is not sound, and what is wrong with that one;
    empty where nothing is. Blocks: it verifies every signature."""
    path = anchors_path(ledger)
    with disk_errors(path):
        if not path.exists():
            return Anchors(), ""
        if path.stat().st_size > MAX_FILE_BYTES:
            return Anchors(), f"it has more than {MAX_FILE_BYTES} bytes"
        data = path.read_bytes()
    chain: list[Anchor] = []
    stop = 0
    try:
        while stop < len(data):
            start = stop + LENGTH_BYTES
            stop = start + int.from_bytes(data[stop:start], "big")
            anchor = open_anchor(data[start:stop], run_id=manifest.run_id, owner=manifest.owner)
            if not leads_on(chain[-1] if chain else None, anchor):
                raise ValueError(f"anchor {anchor.number} does not name the one before it")
            chain.append(anchor)
    except ValueError as error:
        return Anchors(chain=tuple(chain)), str(error)
    return Anchors(chain=tuple(chain)), ""


def keep_anchors(ledger: Path, anchors: Anchors) -> None:
    """Writes the anchors into a ledger's folder; they are durable on return."""
    pieces = [anchor.to_bytes() for anchor in anchors.chain]
    data = b"".join(len(piece).to_bytes(LENGTH_BYTES, "big") + piece for piece in pieces)
    write_whole(anchors_path(ledger), [data], len(data))
