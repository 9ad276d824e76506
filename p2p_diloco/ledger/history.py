"""What the chain of one ledger and the manifest say of a run's history: heads, electors, digests, signers."""

from __future__ import annotations

from p2p_diloco.core.electors import electors_at
from p2p_diloco.core.manifest import RunManifest
from p2p_diloco.ledger.chain import Chain


class ChainHistory:
    """Tells what a chain says about outer steps that are behind it. It is an ``electors.History``. Methods that read an
    entry may raise LedgerError when the disk fails."""

    def __init__(self, manifest: RunManifest, chain: Chain) -> None:
        self.manifest = manifest
        self.chain = chain

    def step_of(self, head: bytes) -> int | None:
        """Returns the outer step of a head of this history; None for any other."""
        return self.chain.step_of(head)

    def electors(self, step: int) -> frozenset[str]:
        """Returns the peers that have a vote about what follows an outer step of this history (``electors``)."""
        last = self.chain.last_contributors(min(step, self.chain.end))
        return electors_at(step, last, self.manifest.owner)

    def certified_digest(self, step: int) -> bytes:
        """Returns the digest of the state at an outer step, as the manifest names it, or the certificate of the update
        that leads on from there; empty where none does."""
        if step == 0:
            return bytes.fromhex(self.manifest.genesis)
        entry = self.chain.entry(step)
        return b"" if entry is None else entry.certificate.state

    def signers(self, step: int) -> tuple[str, ...]:
        """Returns the ids of the members that have signed the certificate of the update that leads on from an outer
        step; none where there is none."""
        entry = self.chain.entry(step)
        if entry is None:
            return ()
        ids = [peer_id for peer_id, _ in entry.header.contributors]
        return tuple(ids[member] for member, _ in entry.certificate.signatures)
