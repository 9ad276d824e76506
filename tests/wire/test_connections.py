from __future__ import annotations

from p2p_diloco.wire.connections import MAX_PEERS, Connections


def test_a_connection_has_failed_when_nothing_came_over_it_in_a_whole_time_out() -> None:
    connections = Connections()
    assert not connections.has_failed("a")
    connections.heard("a", 5.0)
    connections.fell_silent("a", 4.9)  # it has said something meanwhile, over another stream
    assert not connections.has_failed("a")
    connections.fell_silent("a", 5.0)
    assert connections.has_failed("a")
    assert not connections.has_failed("b")


def test_a_peer_that_was_never_heard_may_have_a_connection_that_has_failed() -> None:
    connections = Connections()
    connections.fell_silent("a", 0.0)
    assert connections.has_failed("a")


def test_a_connection_that_was_renewed_or_carries_something_has_not_failed() -> None:
    connections = Connections()
    connections.fell_silent("a", 0.0)
    connections.fell_silent("b", 0.0)
    connections.renewed("a")
    connections.heard("b", 1.0)
    assert not connections.has_failed("a")
    assert not connections.has_failed("b")
    connections.renewed("c")


def test_memory_is_bounded() -> None:
    connections = Connections()
    for i in range(2 * MAX_PEERS):
        connections.heard(str(i), float(i))
        connections.fell_silent(f"silent {i}", 0.0)
    assert len(connections._heard_s) == len(connections._failed) == MAX_PEERS
    assert connections.has_failed(f"silent {2 * MAX_PEERS - 1}")
    assert not connections.has_failed("silent 0")
