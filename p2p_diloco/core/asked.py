"""Whom a peer has asked for something of late, so that each is asked once in a while."""

from __future__ import annotations

from collections.abc import Iterable

from p2p_diloco.core.records import Record


class Asked:
    """Remembers for each peer until when it is not asked again."""

    def __init__(self) -> None:
        self._until_s: dict[str, float] = {}

    def unasked(self, records: Iterable[Record], now_s: float) -> list[Record]:
        """Returns those of the records whose peers may be asked now. What has lapsed is forgotten."""
        self._until_s = {peer_id: until_s for peer_id, until_s in self._until_s.items() if until_s > now_s}
        return [record for record in records if record.peer_id not in self._until_s]

    def note(self, peer_ids: Iterable[str], until_s: float) -> None:
        """Notes that these peers are asked, and not again until ``until_s``."""
        self._until_s |= dict.fromkeys(peer_ids, until_s)
