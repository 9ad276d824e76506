"""Which peers are proven: they have answered me, or have come by themselves, since they last failed me. Pure: times are
arguments.

A record proves nothing: whoever signs one need not be there. Nor does a newer record make up for a failure, as it does
for a vote (``Directory.suspect``). Only proven peers are waited for; the others are called beside that, with a pause
that grows with every failure, and are proven as soon as they answer.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_PROVEN = 4096
"""Peers of which it is remembered. Those of which nothing was heard longest are forgotten first."""


@dataclass(kw_only=True)
class Contact:
    """Holds what is known of one peer."""

    proven: bool = False
    failures: int = 0
    """Since it last answered."""
    called_s: float = float("-inf")
    """When it was last called beside a round."""


class Proven:
    """Remembers which peers have answered me since they last failed me. ``least_pause_s``, ``most_pause_s``: between
    two calls of one that is not proven."""

    def __init__(self, *, least_pause_s: float, most_pause_s: float) -> None:
        self.least_pause_s = least_pause_s
        self.most_pause_s = most_pause_s
        self._contacts: dict[str, Contact] = {}

    def __contains__(self, peer_id: str) -> bool:
        contact = self._contacts.get(peer_id)
        return contact is not None and contact.proven

    def has_failed(self, peer_id: str) -> bool:
        """Returns whether a peer has failed me, and has not answered since."""
        contact = self._contacts.get(peer_id)
        return contact is not None and contact.failures > 0

    def answered(self, peer_id: str) -> None:
        """Notes that a peer has answered me, or has come by itself."""
        contact = self._of(peer_id)
        contact.proven, contact.failures = True, 0

    def failed(self, peer_id: str) -> None:
        """Notes that a peer did not answer me, or broke the protocol."""
        contact = self._of(peer_id)
        contact.proven, contact.failures = False, contact.failures + 1

    def call(self, peer_id: str, now_s: float) -> bool:
        """Returns whether a peer may be called now: always when it is proven, else when the pause since its last call
        is over, which is noted as called."""
        if peer_id in self:
            return True
        contact = self._of(peer_id)
        pause_s = min(self.least_pause_s * 2 ** min(max(contact.failures - 1, 0), 16), self.most_pause_s)
        if now_s < contact.called_s + pause_s:
            return False
        contact.called_s = now_s
        return True

    def _of(self, peer_id: str) -> Contact:
        contact = self._contacts[peer_id] = self._contacts.pop(peer_id, Contact())
        if len(self._contacts) > MAX_PROVEN:
            del self._contacts[next(iter(self._contacts))]
        return contact
