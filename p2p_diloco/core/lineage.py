"""A chain of headers and certificates, followed from one to the next. Pure.

Each certificate is checked against those before it: they say who was known. Whoever has followed a chain from the
genesis, or from an entry that it had followed before, needs to believe nobody about how a run came to its head.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable

from p2p_diloco.core.certificate import Certified, check_certificate
from p2p_diloco.core.known import WINDOW_STEPS, Known, known_at
from p2p_diloco.core.roster_rules import RosterRules


class Lineage:
    """Keeps where a chain has been followed to, and who is known there."""

    def __init__(
        self, rules: RosterRules, *, step: int = 0, head: bytes = b"", last: Iterable[Collection[str]] = ()
    ) -> None:
        """Begins at outer step ``step``, on ``head``; empty at a genesis that is not known yet. ``last``: of each of
        the last WINDOW_STEPS updates before, the peers in most of its parts."""
        self.step = step
        self.head = head
        self._rules = rules
        self._last: deque[Collection[str]] = deque(last, maxlen=WINDOW_STEPS)

    def known(self) -> Known:
        """Returns who is known here."""
        return known_at(self.step, self._last)

    def follow(self, certified: Certified) -> None:
        """Goes on by one update. Raises ValueError, and stays, unless the update follows from here and its certificate
        is sound. Blocks: some milliseconds for a large group."""
        header = certified.header
        if header.step != self.step or (self.head and header.parent != self.head):
            raise ValueError(f"update {header.step} does not follow from outer step {self.step}")
        check_certificate(certified, self._rules, self.known())
        self._last.append(certified.in_most_parts())
        self.step, self.head = header.step + 1, header.head
