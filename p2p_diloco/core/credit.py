"""How long each other peer may keep this one waiting in vain. Pure: times are arguments.

Whoever is new has all the credit that there is. Time waited in vain for a peer is taken from its credit, which grows
again with time, CREDIT_SHARE of a second in each second. So what one peer can make another one lose is a share of the
time, in the long run, whatever it says and however often it comes back.

What is remembered belongs to an identity, and identities cost nothing: new ones have new credit.
"""

from __future__ import annotations

CREDIT_SHARE = 0.025
"""What a peer may cost of the time, in the long run."""
NEARLY_FULL = 0.9
MAX_DEBTORS = 4096
"""Peers whose credit is not full. Those that have the most left are forgotten first."""


class Credit:
    """The seconds that others may still cost this peer. ``full_s``: what a peer has that has cost nothing lately."""

    def __init__(self, full_s: float) -> None:
        self.full_s = full_s
        self._left_s: dict[str, tuple[float, float]] = {}
        """Peer id -> (seconds left, below zero for a debt; when that was)."""

    def left_s(self, peer_id: str, now_s: float) -> float:
        """Returns the seconds that a peer has left, below zero for a debt."""
        left_s, then_s = self._left_s.get(peer_id, (self.full_s, now_s))
        return min(left_s + CREDIT_SHARE * (now_s - then_s), self.full_s)

    def is_good(self, peer_id: str, now_s: float) -> bool:
        """Returns whether a peer has at least half of its credit left."""
        return self.left_s(peer_id, now_s) >= self.full_s / 2

    def in_debt(self, peer_id: str, now_s: float) -> bool:
        """Returns whether a peer has cost more than it may."""
        return self.left_s(peer_id, now_s) < 0

    def charge(self, peer_id: str, waited_s: float, now_s: float) -> None:
        """Takes the seconds that were waited for a peer in vain. No debt is larger than a full credit; and one that has
        nearly all of its credit loses no more than that: it may have been stopped, or cut off, and nobody is in debt
        after a single misfortune."""
        before_s = self.left_s(peer_id, now_s)
        least_s = 0.0 if before_s >= NEARLY_FULL * self.full_s else -self.full_s
        self._left_s[peer_id] = max(before_s - waited_s, least_s), now_s
        if len(self._left_s) > MAX_DEBTORS:
            del self._left_s[max(self._left_s, key=lambda debtor: self.left_s(debtor, now_s))]
