"""Which of the streams that others open a peer takes, and which of those that it has makes room.

A peer is *favoured* when it has done something for us (see ``Transport.favoured``); all others are strangers. Half of
the slots are for favoured peers alone, and some are for strangers alone, so that neither can keep the others out.
Where there is no room, the peer that has the most streams loses one, if it has more than the one that comes: first one
that has not said anything yet, then the one that was idle longest. Known weakness: among strangers every identity
counts as much as any other, so who has very many leaves a newcomer a short turn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import NamedTuple

MAX_STREAMS = 128
MAX_STREAMS_PER_PEER = 8
"""That others open to us."""
MAX_STREAMS_OF_STRANGERS = 64
STREAMS_LEFT_TO_STRANGERS = 16
"""Favoured peers take no more from them."""


@dataclass(frozen=True)
class Slot:
    """One stream that another peer has open to us."""

    peer_id: str
    has_spoken: bool
    used_s: float
    """Loop time of its last frame, in either direction."""


class Room(NamedTuple):
    """Says whether there is room for one more stream."""

    there_is: bool
    instead_of: int | None = None
    """Index of the stream that has to end first."""


def room_for(peer_id: str, slots: Sequence[Slot], favoured: Container[str]) -> Room:
    """Returns whether there is room for one more stream of a peer, beside those in ``slots``."""
    counts = Counter(slot.peer_id for slot in slots)
    mine = counts[peer_id]
    if mine >= MAX_STREAMS_PER_PEER:
        return Room(False)
    strangers = [i for i, slot in enumerate(slots) if slot.peer_id not in favoured]
    others = [i for i, slot in enumerate(slots) if slot.peer_id in favoured]
    full = len(slots) >= MAX_STREAMS
    if peer_id not in favoured:
        if not full and len(strangers) < MAX_STREAMS_OF_STRANGERS:
            return Room(True)
        may_end = [i for i in strangers if counts[slots[i].peer_id] > mine]
    elif len(others) >= MAX_STREAMS - STREAMS_LEFT_TO_STRANGERS:
        may_end = [i for i in others if counts[slots[i].peer_id] > mine + 1]  # none is ended for one that is alike
    elif full:
        may_end = strangers
    else:
        return Room(True)
    if not may_end:
        return Room(False)
    return Room(True, max(may_end, key=lambda i: (counts[slots[i].peer_id], not slots[i].has_spoken, -slots[i].used_s)))
