"""Who has one of a donor's few upload slots, and when it loses it. No I/O; the clock is an argument.

A peer has one slot at most, and its turn there lasts while it takes what it asks for. Only the time in which it lets us
wait counts: for its next request, or for what we send to be taken. The time that we take ourselves, to read the disk or
to keep to our own rate, does not.

    slower than ``min_rate_bytes_per_s``      its turn ends
    slower than ``slow_rate_bytes_per_s``     its turn ends when somebody asks for a slot and all are taken, the slowest
                                              one's first

Both after a pause of ``first_message_s``, which it wins back by taking things faster. Whose turn has ended for another
one finishes what it is being sent, unless as many as there are slots do so: then who has done so longest is cut off.
A turn is remembered for FORGIVEN_AFTER_S: who comes back meanwhile goes on where it was, and while it was too slow it
takes no slot from anybody, so neither a new stream nor a new request makes its turn new. Known weakness: a new identity
does.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field

from p2p_diloco.core.buckets import MAX_RATED_PEERS, Allowance
from p2p_diloco.core.config import Timeouts

FORGIVEN_AFTER_S = 60.0


@dataclass(kw_only=True, eq=False)
class Turn:
    """One peer's turn in a slot."""

    peer_id: str
    least: Allowance
    """By the rate under which it ends."""
    wanted: Allowance
    """By the rate under which it makes room for others."""
    why_over: str = ""
    """Why it ends after the request that is being answered, for the peer to read; empty while it does not."""
    over: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when ``why_over`` is."""
    cut_off: bool = False
    """It ends at once."""
    _waiting_since_s: float | None = None

    def end(self, why: str) -> None:
        """Has the turn end after the request that is being answered."""
        self.why_over = self.why_over or why
        self.over.set()

    def wait(self, now_s: float) -> None:
        """Notes that we wait for the peer from now on."""
        self._waiting_since_s = now_s

    def go_on(self, now_s: float, size_bytes: int = 0) -> None:
        """Notes that we do not wait any more: the peer has taken ``size_bytes``, or asked for something."""
        waited_s, self._waiting_since_s = self._waited_s(now_s), None
        for allowance in (self.least, self.wanted):
            allowance.spend(waited_s, size_bytes)

    def spare_s(self, now_s: float) -> float:
        """Returns how much longer we may wait before the turn may be given to others; below zero, it may."""
        return self.wanted.left_s - self._waited_s(now_s)

    def _waited_s(self, now_s: float) -> float:
        return 0.0 if self._waiting_since_s is None else now_s - self._waiting_since_s


@dataclass(kw_only=True, eq=False)
class Turns:
    """The turns in ``slots`` slots."""

    slots: int
    timeouts: Timeouts
    _held: dict[str, Turn] = field(default_factory=dict)
    """By peer id."""
    _ending: dict[Turn, None] = field(default_factory=dict)
    """Turns that have lost their slots, and finish what they send; the oldest first."""
    _ended: OrderedDict[str, tuple[float, Turn]] = field(default_factory=OrderedDict)
    """Peer id -> when it lost its last slot, and its turn there; the oldest first."""

    def take(self, peer_id: str, now_s: float) -> Turn | None:
        """Returns the turn that a stream of this peer has from now on; None when all slots are taken, or when the peer
        was too slow a moment ago. An older stream of this peer loses its turn to it."""
        held = self._held.get(peer_id)
        before = held or self._last(peer_id, now_s)
        if before is not None and before.least.left_s < 0:
            return None
        tired = before is not None and before.wanted.left_s < 0
        if held is None and len(self._held) >= self.slots and (tired or not self._make_room(now_s)):
            return None
        if held is not None:
            held.go_on(now_s)
            self._lose_slot(held, "another stream of yours is served", now_s)
        turn = self._held[peer_id] = self._new(peer_id)
        if before is not None:
            turn.least, turn.wanted = before.least, before.wanted
        return turn

    def leave(self, turn: Turn, now_s: float) -> None:
        """Ends a turn: its stream is closed."""
        turn.go_on(now_s)
        self._ending.pop(turn, None)
        if self._held.get(turn.peer_id) is turn:
            self._remember(self._held.pop(turn.peer_id), now_s)

    def _make_room(self, now_s: float) -> bool:
        """Ends the turn of the slowest peer. Returns whether there is one that is slow."""
        slowest = min(self._held.values(), key=lambda turn: turn.spare_s(now_s))
        if slowest.spare_s(now_s) >= 0:
            return False
        self._lose_slot(slowest, "busy serving others", now_s)
        return True

    def _lose_slot(self, turn: Turn, why: str, now_s: float) -> None:
        turn.end(why)
        self._remember(self._held.pop(turn.peer_id), now_s)
        self._ending[turn] = None
        if len(self._ending) > self.slots:
            oldest = next(iter(self._ending))
            oldest.cut_off = True
            del self._ending[oldest]

    def _remember(self, turn: Turn, now_s: float) -> None:
        self._ended.pop(turn.peer_id, None)
        self._ended[turn.peer_id] = (now_s, turn)
        if len(self._ended) > MAX_RATED_PEERS:
            self._ended.popitem(last=False)

    def _last(self, peer_id: str, now_s: float) -> Turn | None:
        """Returns the turn that a peer lost, or left, a moment ago."""
        ended_s, turn = self._ended.get(peer_id, (0.0, None))
        return turn if now_s - ended_s < FORGIVEN_AFTER_S else None

    def _new(self, peer_id: str) -> Turn:
        longest_s = self.timeouts.first_message_s
        return Turn(
            peer_id=peer_id,
            least=Allowance(bytes_per_s=self.timeouts.min_rate_bytes_per_s, longest_s=longest_s),
            wanted=Allowance(bytes_per_s=self.timeouts.slow_rate_bytes_per_s, longest_s=longest_s),
        )
