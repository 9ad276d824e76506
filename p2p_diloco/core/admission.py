"""Who may take part in a run: everybody, or those whom its owner has invited. Pure: time and outer step are arguments.

Rules of this file, in a run by invitation:

    - A peer takes part under a seat that is sound, not expired and not revoked. The run's owner needs none.
    - All peers of one token have one vote, and one signature: that of the first of them in a roster.
    - No round has more members of one token than the token has places.
    - Expiry and revocation stop admission, and not history: what a round has committed stays.

In any run, whoever is proved to lie is barred (``barred``): that, too, stops admission, and not history.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Container, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from p2p_diloco.core.invitation import Invitation, Revocations, open_seat
from p2p_diloco.core.records import Record, Unsound

EXPIRY_LEEWAY_S = 300.0
"""A roster is believed for so long after a member's seat has expired: its leader, whose clock may be behind, has formed
it a moment ago."""
IDS_PER_PLACE = 4
"""Peers of one token that are known, for each of its places: a volunteer who starts anew in another folder is another
peer, until the old one's record has expired."""


LAPSED = (
    "this peer's invitation has expired, or was revoked; ask the run's owner for another one, and give it "
    "with --invite FILE"
)


class Lapsed(Unsound):
    """A peer that might take part once, and may not any more: its seat has expired, its token has been revoked, or it
    is barred. Who shows it, or passes it on, may not have heard of that: it is no lie."""

    def __init__(self, message: str) -> None:
        super().__init__("seat", message)


class Seated(Protocol):
    """Names what a record and a readiness have in common."""

    @property
    def peer_id(self) -> str: ...

    @property
    def seat(self) -> bytes: ...


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A peer, and what it shows."""

    peer_id: str
    seat: bytes


@dataclass(frozen=True, kw_only=True)
class Admission:
    """Says who may take part in one run, as far as this peer has heard."""

    run_id: str
    owner: str
    by_invitation: bool
    revocations: Revocations | None = None
    """The newest list that is known. None: no token has been revoked."""
    barred: Container[str] = ()
    """Peers that are proved to lie, as far as this peer knows: more of them as proofs come."""

    @classmethod
    def to_all(cls, run_id: str) -> Admission:
        """Returns the admission to a run that is open."""
        return cls(run_id=run_id, owner="", by_invitation=False)

    @cached_property
    def revoked(self) -> dict[str, int]:
        """Returns token -> the first outer step from which its peers are in no round."""
        return {} if self.revocations is None else dict(zip(self.revocations.tokens, self.revocations.steps))

    @property
    def number(self) -> int:
        """Returns the number of the newest list of revocations that is known; 0 where there is none."""
        return 0 if self.revocations is None else self.revocations.number

    def invitation_of(self, peer: Seated) -> Invitation | None:
        """Returns the invitation under which a peer takes part; None for one that needs none. Unsound when its seat is
        not sound, of another run or owner, missing, or where there ought to be none."""
        if not self.by_invitation or peer.peer_id == self.owner:
            if peer.seat:
                raise Unsound("seat", "a seat of a peer that needs none")
            return None
        if not peer.seat:
            raise Unsound("seat", "a peer that has not been invited")
        invitation = open_seat(peer.seat, peer.peer_id)
        if (invitation.run_id, invitation.peer_id) != (self.run_id, self.owner):
            raise Unsound("seat", "a seat of another run, or of another owner")
        return invitation

    def check(self, peer: Seated, *, now_s: float | None, step: int) -> Invitation | None:
        """Returns what ``invitation_of`` does. Lapsed where the peer is barred, or its seat has expired at Unix time
        ``now_s``, or is revoked at outer step ``step``. ``now_s`` is None for a round of the past."""
        if peer.peer_id in self.barred:
            raise Lapsed("a peer that is barred, for it has signed two of what is signed once")
        invitation = self.invitation_of(peer)
        if invitation is not None:
            if now_s is not None and now_s >= invitation.expires_s:
                raise Lapsed("a peer whose invitation has expired")
            revoked_from = self.revoked.get(invitation.token)
            if revoked_from is not None and step >= revoked_from:
                raise Lapsed("a peer whose invitation was revoked")
        return invitation

    def admits(self, peer: Seated, *, now_s: float, step: int) -> bool:
        """Returns whether a peer may be in a new round now, at outer step ``step``."""
        try:
            self.check(peer, now_s=now_s, step=step)
        except Unsound:
            return False
        return True

    def check_roster(
        self, members: Sequence[Seated], absent: Sequence[Seated], *, now_s: float | None, step: int
    ) -> None:
        """Raises Unsound unless every member of a round at outer step ``step``, and everybody that counts as absent,
        may take part, and no token has more of them than places. ``now_s`` as ``check`` has it."""
        late_s = None if now_s is None else now_s - EXPIRY_LEEWAY_S
        taken: Counter[str] = Counter()
        for peer in (*members, *absent):
            invitation = self.check(peer, now_s=late_s, step=step)
            if invitation is not None:
                taken[invitation.token] += 1
                if taken[invitation.token] > invitation.places:
                    raise Unsound("seat", "a roster with more peers of one token than it has places")

    def within_places(self, peers: Iterable[Seated], *, now_s: float, step: int) -> set[str]:
        """Returns the ids of those of ``peers`` that a round has places for, where the first ones come before the
        others."""
        taken: Counter[str] = Counter()
        chosen: set[str] = set()
        for peer in peers:
            try:
                invitation = self.check(peer, now_s=now_s, step=step)
            except Unsound:
                continue
            if invitation is not None:
                taken[invitation.token] += 1
                if taken[invitation.token] > invitation.places:
                    continue
            chosen.add(peer.peer_id)
        return chosen


def counts_as(peer: Seated) -> str:
    """Returns what a peer counts as, where each counts once: its token, or its own id where it has none. Its seat must
    have been found sound. Of any set of peers, as many votes or signatures count as there are different ones."""
    return open_seat(peer.seat, peer.peer_id).token if peer.seat else peer.peer_id


def votes(peers: Iterable[Seated]) -> int:
    """Returns how many votes these peers have together: all of one token have one. Their seats must be sound."""
    return len({counts_as(peer) for peer in peers})


def invited_as(peer: Seated) -> str:
    """Returns the name of the invitation under which a peer takes part; empty where there is none. Its seat must have
    been found sound."""
    return open_seat(peer.seat, peer.peer_id).name if peer.seat else ""


def one_vote_each(records: Iterable[Record], but: Collection[str] = ()) -> list[Record]:
    """Returns one record for each that has a vote (``counts_as``), in the order of their ids: of all peers of one token
    the one that is furthest, of equal ones that with the smallest id. ``but``: tokens without a vote."""
    votes: dict[str, Record] = {}
    for record in sorted(records, key=lambda record: (not record.beyond_genesis, -record.step, record.peer_id)):
        if (voter := counts_as(record)) not in but:
            votes.setdefault(voter, record)
    return sorted(votes.values(), key=lambda record: record.peer_id)
