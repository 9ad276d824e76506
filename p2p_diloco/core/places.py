"""A bounded number of places for peers: who keeps its own, and who makes room for a newcomer.

Three quarters of the places are kept: by who came first, for as long as it stays. The others turn over: when they are
taken, a newcomer gets the place of who has had one of them longest. So no flood of new identities takes the place of
anybody who was there before it, and a newcomer always gets in, to stay until as many others have come after it.

Two things weigh more than age. A favoured peer takes a kept place from the youngest that is not favoured. And who was
only heard of makes room before who came itself, and takes no place from it: an identity that is invented costs nothing,
one that comes costs a connection. Known weakness: who comes first with many identities, and stays, keeps three quarters
of the places until favoured peers come.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from itertools import chain
from typing import NamedTuple


class Taken(NamedTuple):
    """Says what became of a peer that asked for a place."""

    has_place: bool
    made_room: str | None = None
    """Id of the peer that has lost its place for that."""


class Places:
    """Decides which peers have one of ``size`` places. Age is the order in which they came; there is no clock."""

    def __init__(self, size: int) -> None:
        turning = max(size // 4, 1)
        self.size = size
        self._most_kept = size - turning
        self._kept: dict[str, None] = {}
        """Who came first stands first."""
        self._came: dict[str, None] = {}
        """Places that turn over, of peers that came themselves; the oldest stands first."""
        self._heard_of: dict[str, None] = {}
        """The others that turn over."""

    def __len__(self) -> int:
        return len(self._kept) + len(self._came) + len(self._heard_of)

    def __contains__(self, peer_id: str) -> bool:
        return peer_id in self._kept or peer_id in self._came or peer_id in self._heard_of

    def __iter__(self) -> Iterator[str]:
        return chain(self._kept, self._came, self._heard_of)

    def take(self, peer_id: str, *, came: bool, favoured: Container[str]) -> Taken:
        """Gives a peer a place if it has none, and returns whether it has one now, and who has lost its own for that.
        Whoever has a place keeps it; a better one is given to who has become favoured, or ``came`` itself."""
        if peer_id in self._kept:
            return Taken(True)
        held = peer_id in self
        if peer_id in favoured and self._make_kept(favoured):
            self._came.pop(peer_id, None)
            self._heard_of.pop(peer_id, None)
            self._kept[peer_id] = None
            return Taken(True, self._shrink())
        if held:
            if came and peer_id in self._heard_of:
                del self._heard_of[peer_id]
                self._came[peer_id] = None
            return Taken(True)
        if len(self._kept) < self._most_kept:
            self._kept[peer_id] = None
            return Taken(True)
        came = came or peer_id in favoured
        if len(self) >= self.size and not (came or self._heard_of):
            return Taken(False)
        (self._came if came else self._heard_of)[peer_id] = None
        return Taken(True, self._shrink())

    def leave(self, peer_id: str) -> None:
        """Takes the place of a peer that is gone, if it has one. A kept one goes to who has waited longest for it."""
        for some in (self._came, self._heard_of):
            some.pop(peer_id, None)
        if peer_id in self._kept:
            del self._kept[peer_id]
            for some in (self._came, self._heard_of):
                for oldest in some:
                    del some[oldest]
                    self._kept[oldest] = None
                    return

    def _make_kept(self, favoured: Container[str]) -> bool:
        """Returns whether there is a kept place for one more favoured peer: a free one, or that of the youngest that is
        not favoured, which has one that turns over from now on."""
        if len(self._kept) < self._most_kept:
            return True
        youngest = next((peer_id for peer_id in reversed(self._kept) if peer_id not in favoured), None)
        if youngest is None:
            return False
        del self._kept[youngest]
        self._came[youngest] = None
        return True

    def _shrink(self) -> str | None:
        """Takes the place of one that has had its turn, if there are too many, and returns whose that was."""
        if len(self) <= self.size:
            return None
        some = self._heard_of or self._came
        oldest = next(iter(some))
        del some[oldest]
        return oldest
