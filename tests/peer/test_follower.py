"""What is told of a catch-up, field by field. Following itself is tried in ``test_peer``."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

from p2p_diloco.core.event import PeerCaughtUp
from p2p_diloco.peer.catchup import CaughtUp
from p2p_diloco.peer.follower import Follower
from tests.support.builders import NOW_S, identity, record_of


def test_a_catch_up_is_told_as_it_was() -> None:
    told: list[Any] = []
    follower: Any = SimpleNamespace(events=SimpleNamespace(write=told.append))
    came = CaughtUp(from_step=3, to_step=9, rolled_back=1, snapshot=True, bytes_received=4096, donors=2)
    Follower._log(follower, came, 2.5)
    assert told == [PeerCaughtUp(seconds=2.5, **asdict(came))]


def test_a_newcomer_does_not_go_where_others_that_have_no_state_seem_to_be() -> None:
    """However many they are: it would look there for donors in vain."""
    seed = record_of(identity(0), head=b"\x01" * 32)
    newcomers = [record_of(identity(k), head=bytes(32), phase="joining") for k in (1, 2, 3)]
    directory = SimpleNamespace(before={}, believed=lambda now_s: [*newcomers, seed])
    follower: Any = SimpleNamespace(
        here=SimpleNamespace(directory=directory, seat=SimpleNamespace(anchor=None), wall_s=lambda: NOW_S),
        replica=SimpleNamespace(state=None),
    )
    assert Follower.target(follower) == (0, seed.head)
    directory.believed = lambda now_s: newcomers
    assert Follower.target(follower) is None
