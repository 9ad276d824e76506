"""What is told of a catch-up, field by field. Following itself is tried in ``test_peer``."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

from p2p_diloco.core.event import PeerCaughtUp
from p2p_diloco.peer.catchup import CaughtUp
from p2p_diloco.peer.follower import Follower


def test_a_catch_up_is_told_as_it_was() -> None:
    told: list[Any] = []
    follower: Any = SimpleNamespace(events=SimpleNamespace(write=told.append))
    came = CaughtUp(from_step=3, to_step=9, rolled_back=1, snapshot=True, bytes_received=4096, donors=2)
    Follower._log(follower, came, 2.5)
    assert told == [PeerCaughtUp(seconds=2.5, **asdict(came))]
