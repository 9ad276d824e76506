"""Places for peers, under floods."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from p2p_diloco.core.places import Places, Taken

NOBODY: frozenset[str] = frozenset()


def full(size: int, *, came: bool = False) -> Places:
    """Of ``p0``, ``p1`` and so on, in this order."""
    places = Places(size)
    for i in range(size):
        assert places.take(f"p{i}", came=came, favoured=NOBODY) == Taken(True)
    return places


def test_a_newcomer_gets_in_and_the_others_that_turn_over_make_room_the_oldest_first() -> None:
    places = full(8)
    lost = [places.take(f"new{i}", came=False, favoured=NOBODY).made_room for i in range(4)]
    assert lost == ["p6", "p7", "new0", "new1"]
    assert list(places) == [*(f"p{i}" for i in range(6)), "new2", "new3"]
    assert places.take("p0", came=False, favoured=NOBODY) == Taken(True)
    assert len(places) == 8


def test_who_was_heard_of_makes_room_first_and_takes_no_place_from_who_came() -> None:
    places = full(8)
    assert places.take("a", came=True, favoured=NOBODY).made_room == "p6"
    assert places.take("b", came=False, favoured=NOBODY).made_room == "p7"
    assert places.take("c", came=True, favoured=NOBODY).made_room == "b"
    assert places.take("d", came=False, favoured=NOBODY) == Taken(False)
    assert "d" not in places
    assert places.take("e", came=True, favoured=NOBODY).made_room == "a"


def test_who_was_heard_of_and_then_comes_is_one_that_came() -> None:
    places = full(8)
    assert places.take("p7", came=True, favoured=NOBODY) == Taken(True)
    assert places.take("a", came=False, favoured=NOBODY).made_room == "p6"
    assert places.take("b", came=False, favoured=NOBODY).made_room == "a"
    assert places.take("c", came=True, favoured=NOBODY).made_room == "b"
    assert places.take("d", came=True, favoured=NOBODY).made_room == "p7"


def test_a_favoured_peer_takes_a_kept_place_from_the_youngest_that_is_not() -> None:
    places, favoured = full(8, came=True), {"good", "p5", "p7"}
    assert places.take("good", came=False, favoured=favoured) == Taken(True, "p6")
    assert places.take("p7", came=True, favoured=favoured) == Taken(True), "it had one that turns over"
    assert list(places) == ["p0", "p1", "p2", "p5", "good", "p7", "p4", "p3"]
    for i in range(20):
        places.take(f"flood{i}", came=True, favoured=favoured)
    assert list(places)[:6] == ["p0", "p1", "p2", "p5", "good", "p7"]


def test_where_all_kept_places_are_favoured_peers_one_more_gets_one_that_turns_over() -> None:
    favoured = {f"p{i}" for i in range(6)} | {"more"}
    places = full(8)
    assert places.take("more", came=False, favoured=favoured) == Taken(True, "p6")
    assert places.take("heard of", came=False, favoured=favoured) == Taken(True, "p7")
    assert places.take("heard of later", came=False, favoured=favoured) == Taken(True, "heard of")


def test_who_waited_longest_gets_the_kept_place_of_who_is_gone() -> None:
    places = full(8)
    places.take("p7", came=True, favoured=NOBODY)
    places.leave("p2")
    assert list(places) == ["p0", "p1", "p3", "p4", "p5", "p7", "p6"]
    places.leave("p6")
    places.leave("unknown")
    places.leave("p0")
    assert list(places) == ["p1", "p3", "p4", "p5", "p7"]
    assert places.take("a", came=False, favoured=NOBODY) == Taken(True)


EVENTS = st.lists(
    st.tuples(st.sampled_from(["take", "come", "leave", "favour"]), st.integers(0, 30)), min_size=1, max_size=120
)


@given(size=st.integers(2, 12), events=EVENTS)
@settings(max_examples=200, deadline=None)
def test_never_more_than_there_are_and_who_loses_its_place_is_named(size: int, events: list[tuple[str, int]]) -> None:
    places, held, favoured = Places(size), set[str](), set[str]()
    for what, i in events:
        peer_id = f"p{i}"
        if what == "leave":
            places.leave(peer_id)
            held.discard(peer_id)
            continue
        if what == "favour":
            favoured.add(peer_id)
        had, before = peer_id in places, len(places)
        has_place, made_room = places.take(peer_id, came=what == "come", favoured=favoured)
        assert has_place or not had
        if made_room is not None:
            assert made_room in held
            assert made_room != peer_id
            assert before == size
            held.remove(made_room)
        held |= {peer_id} if has_place else set()
        assert set(places) == held
        assert sorted(places) == sorted(held), "each one once"
        assert len(places) <= size


@given(
    size=st.integers(8, 40),
    flood=st.lists(st.tuples(st.integers(0, 10**6), st.booleans()), max_size=400),
    known=st.integers(1, 30),
    good=st.integers(0, 6),
)
@settings(max_examples=200, deadline=None)
def test_no_flood_takes_the_place_of_who_was_there_before_or_is_favoured(
    size: int, flood: list[tuple[int, bool]], known: int, good: int
) -> None:
    kept = size - max(size // 4, 1)
    known, good = min(known, kept), min(good, kept - min(known, kept))
    favoured = {f"good{i}" for i in range(good)}
    places = Places(size)
    for i in range(known):
        places.take(f"old{i}", came=False, favoured=favoured)
    for number, (i, came) in enumerate(flood):
        places.take(f"flood{i}", came=came, favoured=favoured)
        for name in favoured if number == len(flood) // 2 else ():
            assert places.take(name, came=True, favoured=favoured).has_place
    assert all(f"old{i}" in places for i in range(known))
    assert len(flood) == 0 or all(name in places for name in favoured)


@given(size=st.integers(8, 40), before=st.integers(0, 300), after=st.lists(st.booleans(), max_size=300))
@settings(max_examples=200, deadline=None)
def test_a_newcomer_that_comes_gets_in_at_once_and_stays_for_a_while(size: int, before: int, after: list[bool]) -> None:
    places = Places(size)
    for i in range(before):
        places.take(f"a{i}", came=True, favoured=NOBODY)
    assert places.take("new", came=True, favoured=NOBODY).has_place
    came = 0
    for i, comes in enumerate(after):
        places.take(f"b{i}", came=comes, favoured=NOBODY)
        came += comes
        assert "new" in places or came >= max(size // 4, 1), "as many others have come since"
