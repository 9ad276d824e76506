"""Who is proven, with a clock that the tests set."""

from __future__ import annotations

import pytest

from p2p_diloco.core import proven
from p2p_diloco.core.proven import Proven


def known() -> Proven:
    return Proven(least_pause_s=2.5, most_pause_s=30.0)


def test_who_answers_is_proven_until_it_fails() -> None:
    peers = known()
    assert "a" not in peers
    assert not peers.has_failed("a")
    peers.answered("a")
    assert "a" in peers
    assert not peers.has_failed("a")
    peers.failed("a")
    assert "a" not in peers
    assert peers.has_failed("a")
    peers.answered("a")
    assert "a" in peers
    assert not peers.has_failed("a")


def test_the_pause_between_two_calls_grows_with_every_failure_and_ends_with_an_answer() -> None:
    peers, now_s, called_s = known(), 0.0, []
    while now_s < 200:
        if peers.call("a", now_s):
            called_s.append(now_s)
            peers.failed("a")
        now_s += 0.5
    assert called_s == [0.0, 2.5, 7.5, 17.5, 37.5, 67.5, 97.5, 127.5, 157.5, 187.5]
    peers.answered("a")
    assert all(peers.call("a", now_s) for _ in range(2)), "who is proven is called at any time"
    peers.failed("a")
    assert peers.call("a", now_s), "the last call was long ago"
    assert not peers.call("a", now_s + 2.4)
    assert peers.call("a", now_s + 2.5)


def test_the_number_of_peers_is_bounded_and_the_quietest_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proven, "MAX_PROVEN", 2)
    peers = known()
    for peer_id in "abac":
        peers.answered(peer_id)
    assert [peer_id in peers for peer_id in "abc"] == [True, False, True]
