"""The directory: the newest record of every other peer, and which of them this peer believes and waits for."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import replace
from itertools import islice, pairwise

from p2p_diloco.core.admission import IDS_PER_PLACE, Admission, counts_as
from p2p_diloco.core.barred import Barred
from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.places import Places
from p2p_diloco.core.proven import Proven
from p2p_diloco.core.reach import IPV4_ALONE, reaches
from p2p_diloco.core.records import Record, Unsound, is_current, open_record

DEFAULT_TIMEOUTS = Timeouts()
MAX_PEERS_KNOWN = 4096
MAX_LINKS_KNOWN = 16384
MAX_DOUBTS = 4
"""So often the time in which a peer has no vote is doubled: at most sixteen times as long."""


class Directory:
    """The newest record of every other peer, and which peers did not answer although their records say that they
    live. Of at most MAX_PEERS_KNOWN: ``places`` says who makes room, and the peers that are ``favoured`` do so last."""

    def __init__(
        self,
        peer_id: str,
        run_id: str,
        timeouts: Timeouts = DEFAULT_TIMEOUTS,
        favoured: Container[str] = (),
        admission: Admission | None = None,
    ) -> None:
        """Begins without records. ``admission``: to everybody where there is none."""
        self.peer_id = peer_id
        self.run_id = run_id
        admission = admission or Admission.to_all(run_id)
        self.barred = Barred(run_id=run_id, me=peer_id, owner=admission.owner, favoured=favoured)
        """Who is proved to lie: of such a peer no record is taken in."""
        self.admission = replace(admission, barred=self.barred)
        """Whose records are taken in. Another one takes its place when tokens are revoked."""
        self.step = 0
        """The outer step at which I stand: a revocation is from one on."""
        self.proven = Proven(least_pause_s=timeouts.refresh_s, most_pause_s=timeouts.record_life_s)
        """Who is waited for. A vote does not depend on it."""
        self._favoured = favoured
        self._places = Places(MAX_PEERS_KNOWN)
        self._records: dict[str, Record] = {}
        self._sealed: dict[str, bytes] = {}
        self._verified: dict[bytes, str] = {}
        """The same the other way round: records are read again and again, and a signature costs 0.1 ms to verify."""
        self._suspects: dict[str, float] = {}
        """Peer id -> ``issued_s`` of the record that turned out untrue."""
        self._doubts: dict[str, float] = {}
        """Peer id -> the time until which its claims have no weight."""
        self._doubted: dict[str, int] = {}
        """Peer id -> how often it was, as one of a few."""
        self._met: tuple[frozenset[str], int, bytes] = (frozenset(), 0, b"")
        self.ways = IPV4_ALONE
        """Over which families I reach others."""
        self.before: dict[bytes, bytes] = {}
        """Head -> the one that it follows from. Verified, not claimed."""

    def learn(self, sealed: bytes, now_s: float) -> Record | None:
        """Takes in a record from anywhere, and returns the newest one known of its peer. None when it is ours, out of
        date, or of another run, when its peer's seat has lapsed, or when there is no place for one more peer. Unsound
        when it is not sound, or its peer has no seat in a run by invitation."""
        return self._learn(sealed, now_s, came=False)

    def _learn(self, sealed: bytes, now_s: float, *, came: bool) -> Record | None:
        if sealed in self._verified:
            record = self._records[self._verified[sealed]]
            self._places.take(record.peer_id, came=came, favoured=self._favoured)
            return record if self._is_there(record, now_s) else None
        record = open_record(sealed)
        if record.peer_id == self.peer_id or record.run_id != self.run_id or not is_current(record, now_s):
            return None
        invitation = self.admission.invitation_of(record)
        if not self._is_there(record, now_s):
            return None
        if record.peer_id not in self._records and invitation is not None:
            alike = sum(counts_as(other) == invitation.token for other in self.current(now_s))
            if alike >= IDS_PER_PLACE * invitation.places:
                return None
        has_place, made_room = self._places.take(record.peer_id, came=came, favoured=self._favoured)
        if made_room is not None:
            self._forget(made_room)
        if not has_place:
            return None
        newest = self._records.get(record.peer_id)
        if newest is None or newest.issued_s < record.issued_s:
            if newest is not None:
                del self._verified[self._sealed[record.peer_id]]
            self._records[record.peer_id] = record
            self._verified[sealed] = record.peer_id
            self._sealed[record.peer_id] = sealed
        return self._records[record.peer_id]

    def learn_from(self, peer_id: str, sealed: bytes, now_s: float) -> Record | None:
        """Does the same as ``learn`` with a record that comes from the peer that it is about. Unsound when that is
        another one: a stranger could fill the directory with peers that it has invented, each of them dialled by
        all."""
        if open_record(sealed).peer_id != peer_id:
            raise Unsound("other", "somebody else's record")
        return self._learn(sealed, now_s, came=True)

    def suspect(self, peer_id: str) -> None:
        """Counts on this peer no more until it signs a newer record, and waits for it no more until it answers."""
        self.proven.failed(peer_id)
        if peer_id in self._records:
            self._suspects[peer_id] = self._records[peer_id].issued_s

    def live(self, now_s: float) -> list[Record]:
        """Returns the records of the peers that are there, in the order of their ids."""
        return [record for record in self.current(now_s) if self._answers(record)]

    def _answers(self, record: Record) -> bool:
        """Tells whether this peer has not failed to answer me since it signed this record."""
        return self._suspects.get(record.peer_id, -1.0) < record.issued_s

    def current(self, now_s: float) -> list[Record]:
        """Returns the same as ``live``, and those that did not answer."""
        for peer_id in [p for p, record in self._records.items() if not self._is_there(record, now_s)]:
            self._places.leave(peer_id)
            self._forget(peer_id)
        return [record for _, record in sorted(self._records.items()) if record.phase != "left"]

    def _is_there(self, record: Record, now_s: float) -> bool:
        """Returns whether a record is of this time, and its peer still one that may take part."""
        return is_current(record, now_s) and self.admission.admits(record, now_s=now_s, step=self.step)

    def _forget(self, peer_id: str) -> None:
        """Forgets all about a peer that is gone, or has made room for another one."""
        del self._records[peer_id]
        del self._verified[self._sealed.pop(peer_id)]
        self._suspects.pop(peer_id, None)
        self._doubts.pop(peer_id, None)
        self._doubted.pop(peer_id, None)

    def doubt(self, head: bytes, now_s: float, life_s: float) -> int:
        """Takes the vote of all peers that claim this head for ``life_s``, whatever newer records they sign. Returns
        how many there are. When they are fewer than half of those that are there, it is for twice as long each time
        again, MAX_DOUBTS times: else one that lies could hold up the others for most of their time."""
        current = self.current(now_s)
        claim = [record.peer_id for record in current if head in (record.head, *record.heads)]
        few = 2 * len(claim) < len(current) + 1
        for peer_id in claim:
            self._take_vote(peer_id, now_s, life_s, again=few)
        return len(claim)

    def disbelieve(self, peer_id: str, now_s: float, life_s: float) -> None:
        """Takes the vote of one peer, which has shown a history that is not to be followed, for ``life_s``, and for
        twice as long each time again, as ``doubt`` does that of a few."""
        if peer_id in self._records:
            self._take_vote(peer_id, now_s, life_s, again=True)

    def _take_vote(self, peer_id: str, now_s: float, life_s: float, *, again: bool) -> None:
        """Takes a vote for ``life_s``; for longer where that is done once ``again``."""
        before = self._doubted.get(peer_id, 0)
        self._doubts[peer_id] = now_s + life_s * (1 << before if again else 1)
        if again:
            self._doubted[peer_id] = min(before + 1, MAX_DOUBTS)

    def believed(self, now_s: float) -> list[Record]:
        """Returns the voters: the same as ``live``, without those in doubt, and with all whose record is current of
        those in client mode, or with no address of a family that I have. They cannot be dialled, so it means little
        that one does not answer; and if its vote came and went with every try, each half of a swarm that was cut in two
        could take itself for the larger one. Of all peers of one token one votes: which one, ``electors`` says."""
        return [
            record
            for record in self.current(now_s)
            if (self._is_beyond_call(record) or self._answers(record))
            and self._doubts.get(record.peer_id, now_s) <= now_s
        ]

    def _is_beyond_call(self, record: Record) -> bool:
        """Returns whether I cannot dial a peer that may well be there."""
        return record.client_mode or not reaches(self.ways, record)

    def show(self, way: Sequence[bytes]) -> None:
        """Notes that of these heads, newest first, each follows from the next. The oldest that are known make room."""
        self.before |= pairwise(way)
        for head in list(islice(self.before, max(len(self.before) - MAX_LINKS_KNOWN, 0))):
            del self.before[head]

    def met(self, peer_ids: Iterable[str], step: int, head: bytes) -> None:
        """Notes that a round with these peers has just led me to ``head``."""
        self._met = frozenset(peer_ids), step, head

    def expected(self, now_s: float) -> list[Record]:
        """Returns the records of the peers to wait for: the same as ``live``, but the peers that I met last stand where
        that round led, although their records, which take seconds to get here, do not say so yet. Not for any vote."""
        peer_ids, step, head = self._met
        return [
            r.model_copy(update={"step": step, "head": head}) if r.peer_id in peer_ids and r.step < step else r
            for r in self.live(now_s)
        ]

    def get(self, peer_id: str) -> Record | None:
        """Returns the newest record of a peer."""
        return self._records.get(peer_id)

    def sealed(self, peer_id: str) -> bytes | None:
        """Returns the same as ``get``, as its peer has signed it."""
        return self._sealed.get(peer_id)

    def maddrs(self, peer_id: str) -> list[str]:
        """Returns the addresses that a peer's newest record names, none where there is no record."""
        record = self._records.get(peer_id)
        return record.maddrs if record else []
