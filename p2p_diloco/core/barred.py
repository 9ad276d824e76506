"""The peers that are barred from a run, each with the proof that it lies.

Whoever has the proof forms no round with a barred peer, and takes no notice of its records: it does not lead, reduce,
certify or vote here any more, for as long as the run lasts. What has been committed with it stays. A proof is about the
peer that it is about, whoever brings it, so nothing of this is a vote, and no two peers need have heard the same.

A proof against an identity that nobody knows costs its maker nothing. So there are places for MAX_BARRED peers, and who
is favoured, as contributors to the last updates are, takes one from who is not.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Iterator
from dataclasses import dataclass, field

from p2p_diloco.core.digest import digest
from p2p_diloco.core.equivocation import Proof, check_proof, pack_proof, parse_proof
from p2p_diloco.core.records import BARRED_DIGEST_BYTES, MAX_BARRED
from p2p_diloco.core.waiting import Bell

log = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class Barred:
    """Holds one proof for each peer that is barred here."""

    run_id: str
    me: str
    """This peer, which bars itself for nothing."""
    owner: str
    """The peer id of the run's."""
    favoured: Container[str] = ()
    changed: Bell = field(default_factory=Bell)
    """Rings when somebody has been barred."""
    _proofs: dict[str, bytes] = field(default_factory=dict, init=False)
    """Peer id -> proof, the newest last."""

    def __contains__(self, peer_id: object) -> bool:
        return peer_id in self._proofs

    def __iter__(self) -> Iterator[str]:
        return iter(self._proofs)

    def __len__(self) -> int:
        return len(self._proofs)

    def proof(self, peer_id: str) -> bytes | None:
        """Returns the proof against a peer, as it travels; None where there is none."""
        return self._proofs.get(peer_id)

    def digest(self) -> bytes:
        """Returns 8 bytes that tell whether two peers have barred the same ones; empty where nobody is barred."""
        if not self._proofs:
            return b""
        return digest(b"barred", *(peer_id.encode() for peer_id in sorted(self._proofs)))[:BARRED_DIGEST_BYTES]

    def take(self, data: bytes) -> str | None:
        """Bars the peer that a proof is about, and returns its id; None where it is barred already, has no place, or is
        this one. ValueError for anything that proves nothing."""
        proof = parse_proof(data)
        if proof.peer_id in self._proofs:
            return None
        check_proof(proof, run_id=self.run_id, owner=self.owner)
        if proof.peer_id == self.me:
            log.error("others hold a proof that this peer has signed %s, and meet it no more", proof.what)
            return None
        return proof.peer_id if self._bar(proof.peer_id, data) else None

    def add(self, proof: Proof) -> bool:
        """Bars a peer with a proof that was found here. Returns whether it is news, another peer, and has a place."""
        known = proof.peer_id in self._proofs or proof.peer_id == self.me
        return not known and self._bar(proof.peer_id, pack_proof(proof))

    def _bar(self, peer_id: str, data: bytes) -> bool:
        """Returns whether there is a place, or one that a peer has to leave which is not favoured."""
        if len(self._proofs) >= MAX_BARRED:
            oldest = next((other for other in self._proofs if other not in self.favoured), None)
            if oldest is None or peer_id not in self.favoured:
                return False
            del self._proofs[oldest]
        self._proofs[peer_id] = data
        self.changed.ring()
        return True
