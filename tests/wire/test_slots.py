"""Which streams a peer takes: pure decisions."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2p_diloco.wire.slots import (
    MAX_STREAMS,
    MAX_STREAMS_OF_STRANGERS,
    MAX_STREAMS_PER_PEER,
    STREAMS_LEFT_TO_STRANGERS,
    Room,
    Slot,
    room_for,
)

GOOD = frozenset(f"good{i}" for i in range(200))


def silent(peer_id: str, count: int, used_s: float = 0.0) -> list[Slot]:
    return [Slot(peer_id, has_spoken=False, used_s=used_s)] * count


def each(name: str, peers: int, streams: int) -> list[Slot]:
    return [slot for i in range(peers) for slot in silent(f"{name}{i}", streams)]


def test_half_of_the_slots_are_no_stranger_s() -> None:
    strangers = each("bad", 8, MAX_STREAMS_PER_PEER)
    assert len(strangers) == MAX_STREAMS_OF_STRANGERS == MAX_STREAMS // 2
    assert room_for("good0", strangers, GOOD) == Room(True)
    assert room_for("bad0", strangers, GOOD) == Room(False), "it has its eight"
    there_is, instead_of = room_for("new", strangers, GOOD)
    assert there_is
    assert instead_of is not None


def test_who_has_most_loses_a_stream_a_silent_one_and_the_one_that_was_idle_longest() -> None:
    slots = [
        *each("some", 29, 2),
        Slot("most", has_spoken=True, used_s=1.0),
        Slot("most", has_spoken=False, used_s=9.0),
        Slot("most", has_spoken=False, used_s=8.0),
        *[Slot("most", has_spoken=True, used_s=2.0)] * 3,
    ]
    assert len(slots) == MAX_STREAMS_OF_STRANGERS
    assert room_for("new", slots, GOOD) == Room(True, 60)
    assert slots[60] == Slot("most", has_spoken=False, used_s=8.0)


def test_nobody_loses_a_stream_to_who_has_as_many() -> None:
    slots = each("bad", 32, 2)
    assert room_for("bad0", slots, GOOD) == Room(False)
    one_less = [*slots[1:], *silent("new", 1)]
    assert room_for("new", one_less, GOOD).there_is
    assert room_for("bad1", one_less, GOOD) == Room(False)


def test_a_newcomer_among_as_many_as_there_are_slots_gets_the_turn_of_the_idlest() -> None:
    slots = [Slot(f"bad{i}", has_spoken=True, used_s=100.0 - i) for i in range(64)]
    assert room_for("new", slots, GOOD) == Room(True, 63)
    slots[5] = Slot("bad5", has_spoken=False, used_s=100.0)
    assert room_for("new", slots, GOOD) == Room(True, 5)


def test_favoured_peers_leave_some_to_strangers() -> None:
    most = MAX_STREAMS - STREAMS_LEFT_TO_STRANGERS
    good = each("good", 14, 8)
    assert len(good) == most
    assert room_for("stranger", good, GOOD) == Room(True)
    assert room_for("good100", good, GOOD) == Room(True, 0), "of who has eight"
    alike = each("good", most, 1)
    assert room_for("good190", alike, GOOD) == Room(False), "a round's streams end for nobody that is alike"
    full = [*each("good", 12, 8), *each("bad", 16, 2)]
    assert len(full) == MAX_STREAMS
    there_is, instead_of = room_for("good100", full, GOOD)
    assert there_is
    assert instead_of is not None
    assert full[instead_of].peer_id.startswith("bad")
    assert room_for("new", full, GOOD).instead_of is not None, "of another stranger"


PEERS = st.sampled_from([*(f"bad{i}" for i in range(20)), *(f"good{i}" for i in range(20))])


@pytest.mark.parametrize("attackers", [8, 16, 40, 64])
def test_sixteen_identities_that_open_what_they_can_keep_no_newcomer_out(attackers: int) -> None:
    slots: list[Slot] = []

    def opens(peer_id: str) -> bool:
        there_is, instead_of = room_for(peer_id, slots, GOOD)
        if instead_of is not None:
            del slots[instead_of]
        if there_is:
            slots.append(Slot(peer_id, has_spoken=False, used_s=float(len(slots))))
        return there_is

    for turn in range(MAX_STREAMS_PER_PEER * 2):
        for i in range(attackers):
            opens(f"bad{i}")
        assert opens(f"good{turn}")
    for i in range(3):
        assert opens(f"new{i}")
    for i in range(attackers):
        opens(f"bad{i}")
    held = Counter(slot.peer_id for slot in slots)
    if attackers <= 40:
        assert all(held[f"new{i}"] for i in range(3)), "those that have more cannot end a newcomer's only stream"
    assert sum(held[f"good{i}"] for i in range(16)) == 16


@given(opened=st.lists(st.tuples(PEERS, st.booleans(), st.floats(0, 100)), max_size=300))
@settings(max_examples=100, deadline=None)
def test_limits_hold_whoever_comes(opened: list[tuple[str, bool, float]]) -> None:
    slots: list[Slot] = []
    for peer_id, has_spoken, used_s in opened:
        there_is, instead_of = room_for(peer_id, slots, GOOD)
        assert there_is or instead_of is None
        if instead_of is not None:
            assert slots.pop(instead_of).peer_id != peer_id
        if there_is:
            slots.append(Slot(peer_id, has_spoken, used_s))
        held = Counter(slot.peer_id for slot in slots)
        assert len(slots) <= MAX_STREAMS
        assert max(held.values()) <= MAX_STREAMS_PER_PEER
        assert sum(n for name, n in held.items() if name not in GOOD) <= MAX_STREAMS_OF_STRANGERS
        assert sum(n for name, n in held.items() if name in GOOD) <= MAX_STREAMS - STREAMS_LEFT_TO_STRANGERS
