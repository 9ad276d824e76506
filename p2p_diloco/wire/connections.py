"""What the streams of one transport tell of the connections under them.

libp2p takes a connection for alive until its own keep-alives fail, which takes most of a minute: behind a router that
has a new address, or after a cable was pulled, streams over it open, and nothing ever comes. So a connection is given
up when a peer neither takes what we write nor answers what we ask, and nothing else has come from it meanwhile: then
the peer is dialled anew. A stream that is reset tells nothing of this: its connection may carry others.
"""

from __future__ import annotations

MAX_PEERS = 1024
"""Whose connections are remembered; the peers that were heard longest ago are forgotten."""


class Connections:
    """Knows which peers were heard, and whose connections have failed. Times are the event loop's."""

    def __init__(self) -> None:
        self._heard_s: dict[str, float] = {}
        """Peer -> when something came from it, over any stream; the newest last."""
        self._failed: dict[str, None] = {}

    def heard(self, peer_id: str, now_s: float) -> None:
        """Notes that something has come from a peer."""
        self._heard_s.pop(peer_id, None)
        self._heard_s[peer_id] = now_s
        self._failed.pop(peer_id, None)
        if len(self._heard_s) > MAX_PEERS:
            del self._heard_s[next(iter(self._heard_s))]

    def fell_silent(self, peer_id: str, since_s: float) -> None:
        """Notes that a peer has let a time-out pass that began at ``since_s``. Its connection has failed if nothing has
        come from it since then over any other stream."""
        if self._heard_s.get(peer_id, since_s) <= since_s:
            self._failed[peer_id] = None
            if len(self._failed) > MAX_PEERS:
                del self._failed[next(iter(self._failed))]

    def has_failed(self, peer_id: str) -> bool:
        """Returns whether the connection to a peer has failed since it was last renewed, or the peer heard."""
        return peer_id in self._failed

    def renewed(self, peer_id: str) -> None:
        """Notes that the connection to a peer was ended, so that the next one is another."""
        self._failed.pop(peer_id, None)
