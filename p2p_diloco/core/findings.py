"""What a peer has found of others as reducers, and for how long it remembers that. Pure: outer steps are arguments.

    wrong         a part was not the mean of what was contributed, which signatures prove
    left out      my contribution is not in a part, though I delivered it
    not answered  the contributions to a part were not shown

Who is found so has no share in the rounds that this peer leads, the worst ones first. Who is found wrong does not lead
this peer either, as long as there are others. It may contribute: memory whose bits flip makes honest peers wrong, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import msgpack

from p2p_diloco.core.identity import MAX_PEER_ID_CHARS
from p2p_diloco.core.records import unpack_plain

FindingKind = Literal["wrong", "left out", "not answered"]
AuditResult = Literal["sound", "wrong", "not answered"]
WRONG_STEPS = 100
SLIGHT_STEPS = 10
LASTS_STEPS: Mapping[FindingKind, int] = {
    "wrong": WRONG_STEPS,
    "left out": SLIGHT_STEPS,
    "not answered": SLIGHT_STEPS,
}
"""So many outer steps a finding counts; the worst kind first."""
MAX_FOUND = 256
"""Peers of each kind that are remembered. Those that would be forgotten first anyway make room."""


@dataclass(eq=False)
class Findings:
    """Holds of each kind the peers that were found so."""

    until: dict[FindingKind, dict[str, int]] = field(default_factory=lambda: {kind: {} for kind in LASTS_STEPS})
    """Kind -> peer id -> the outer step from which on it counts no more."""

    def note(self, peer_id: str, kind: FindingKind, step: int) -> None:
        """Remembers what was found of a peer at an outer step."""
        found = self.until[kind]
        found[peer_id] = max(step + LASTS_STEPS[kind], found.get(peer_id, 0))
        if len(found) > MAX_FOUND:
            del found[min(found, key=lambda one: (found[one], one))]

    def is_wrong(self, peer_id: str, step: int) -> bool:
        """Returns whether a peer was found to have reduced wrongly, and that counts at an outer step."""
        return step < self.until["wrong"].get(peer_id, 0)

    def unfit(self, step: int) -> list[str]:
        """Returns the peers that shall have no share at an outer step, the worst first."""
        order = (peer_id for found in self.until.values() for peer_id in sorted(found) if step < found[peer_id])
        return list(dict.fromkeys(order))

    def count(self, kind: FindingKind, step: int) -> int:
        """Returns how many peers are found so at an outer step."""
        return sum(step < until for until in self.until[kind].values())

    def forget(self, step: int) -> None:
        """Forgets what counts no more at an outer step."""
        for kind, found in self.until.items():
            self.until[kind] = {peer_id: until for peer_id, until in found.items() if step < until}

    def to_bytes(self) -> bytes:
        """Returns the findings as they lie on disk."""
        packed: bytes = msgpack.packb([sorted(map(list, found.items())) for found in self.until.values()])
        return packed

    @classmethod
    def from_bytes(cls, data: bytes) -> Findings:
        """Returns the findings that ``to_bytes`` has packed. ValueError for any other bytes."""
        content: Any = unpack_plain(data)
        try:
            tables = [{peer_id: until for peer_id, until in table} for table in content]
        except (TypeError, ValueError) as error:
            raise ValueError("not findings") from error
        if len(tables) != len(LASTS_STEPS) or not all(_is_sound(table) for table in tables):
            raise ValueError("not findings: a field is out of its bounds")
        return cls(until=dict(zip(LASTS_STEPS, tables)))


def _is_sound(table: Mapping[Any, Any]) -> bool:
    """Tells whether this is peer id -> outer step."""
    return len(table) <= MAX_FOUND and all(
        type(peer_id) is str and 0 < len(peer_id) <= MAX_PEER_ID_CHARS and type(until) is int and 0 <= until < 2**40
        for peer_id, until in table.items()
    )
