"""What peers say of each other's uplinks, against literal expectations and the protocol's page; and what liars gain."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p_diloco.core.shares import part_counts
from p2p_diloco.core.uplinks import (
    LARGEST_UPLINK,
    MAX_UPLINKS,
    UPLINK_BYTES,
    check_uplinks,
    counted_uplinks,
    mark_of,
    pack_uplinks,
    tag_of,
    unpack_uplinks,
    uplink_at,
)
from tests.support.builders import head
from tests.support.decoded_shares import uplinks_of

HEAD = head("abc")
NAMES = [f"peer {i}" for i in range(6)]
FAST, SLOW = uplink_at(mark_of(12_500_000)), uplink_at(mark_of(1_250_000))
USUAL = [FAST] * 5 + [SLOW]
ABSURD = (0, 8, 2**60)


def said_by(*tellers: int, of: list[int] = USUAL) -> dict[int, bytes]:
    """What these members say of all that are in ``of``, themselves included."""
    return {i: pack_uplinks(HEAD, dict(zip(NAMES, of))) for i in tellers}


def counted(said: dict[int, bytes], members: int = 6) -> tuple[int, ...]:
    return counted_uplinks(HEAD, NAMES[:members], said, range(members))


# -- a few bytes -------------------------------------------------------------------------------------------------------


def test_marks_are_the_last_ones_below() -> None:
    marks = [uplink_at(mark) for mark in range(mark_of(LARGEST_UPLINK) + 1)]
    assert (marks[0], marks[1], marks[8], marks[-1]) == (8, 9, 16, LARGEST_UPLINK)
    assert all(1 < later / earlier <= 1.125 for earlier, later in pairwise(marks))
    assert all(uplink_at(mark) == LARGEST_UPLINK for mark in range(len(marks), 256))
    for uplink in (8, 9, 17, 1000, 1_250_000, 12_500_000, LARGEST_UPLINK - 1, LARGEST_UPLINK):
        assert uplink_at(mark_of(uplink)) == max(mark for mark in marks if mark <= uplink)
    assert [mark_of(uplink) for uplink in (0, 7, 2**25, 2**60)] == [0, 0, len(marks) - 1, len(marks) - 1]


def test_the_slowest_are_named_where_there_are_too_many() -> None:
    uplinks = {f"peer {i}": 1000 + 100 * ((7 * i) % 40) for i in range(40)}
    packed = pack_uplinks(HEAD, uplinks)
    check_uplinks(packed)
    assert len(packed) == MAX_UPLINKS * UPLINK_BYTES
    slowest = sorted(uplinks, key=lambda peer_id: uplinks[peer_id])[:MAX_UPLINKS]
    assert unpack_uplinks(packed) == {
        tag_of(HEAD, peer_id): uplink_at(mark_of(uplinks[peer_id])) for peer_id in slowest
    }
    assert pack_uplinks(HEAD, {}) == b""


def test_a_tag_is_of_one_head() -> None:
    assert tag_of(HEAD, "peer 1") != tag_of(head("abcd"), "peer 1")


@pytest.mark.parametrize(
    "packed",
    [bytes(4), bytes(6), bytes(10), b"bbbb\0aaaa\0", b"aaaa\0aaaa\1", bytes(5) * 33],
)
def test_uplinks_that_are_not_sound(packed: bytes) -> None:
    with pytest.raises(ValueError, match=r"^uplinks"):
        check_uplinks(packed)


@given(st.binary(max_size=400) | st.lists(st.binary(min_size=5, max_size=5), max_size=40).map(b"".join))
def test_any_bytes_are_sound_or_refused(packed: bytes) -> None:
    try:
        check_uplinks(packed)
    except ValueError:
        return
    found = unpack_uplinks(packed)
    assert len(found) == len(packed) // UPLINK_BYTES <= MAX_UPLINKS
    assert all(8 <= uplink <= LARGEST_UPLINK for uplink in found.values())


# -- what a group makes of them ----------------------------------------------------------------------------------------


def test_who_is_slow_counts_as_a_fourth_at_least() -> None:
    assert counted(said_by(*range(6))) == (*[FAST] * 5, FAST // 4)


def test_who_is_fast_counts_as_four_times_at_most() -> None:
    assert counted(said_by(*range(6), of=[SLOW] * 5 + [FAST])) == (*[SLOW] * 5, 4 * SLOW)


def test_what_is_near_to_the_median_is_as_good_as_that() -> None:
    of = [1024, 768, 1280, 1024, 704, 1408]
    assert counted(said_by(*range(6), of=of)) == (1024, 1024, 1024, 1024, 704, 1408)


def test_of_whom_nobody_says_anything_counts_as_the_median() -> None:
    assert len(set(counted({}))) == 1
    assert len(set(counted({i: b"" for i in range(6)}))) == 1
    assert counted(said_by(0, 1, of=USUAL[:4])) == (FAST,) * 6


def test_nobody_is_heard_about_itself() -> None:
    said = said_by(0, 1, 2, 3, 4) | said_by(5, of=[FAST] * 6)
    assert counted(said)[5] == counted(said_by(*range(5)))[5] == FAST // 4
    alone = said_by(5, of=[FAST] * 6)
    assert unpack_uplinks(alone[5])[tag_of(HEAD, NAMES[5])] == FAST
    assert len(set(counted(alone))) == 1


def test_the_median_is_of_those_that_reduce() -> None:
    said = said_by(*range(6), of=[FAST, FAST, FAST, SLOW, SLOW, SLOW])
    assert counted_uplinks(HEAD, NAMES, said, [0, 1])[:2] == (FAST, FAST)
    assert counted_uplinks(HEAD, NAMES, said, [3, 4])[:2] == (4 * SLOW, 4 * SLOW)


@given(st.data())
def test_the_page_comes_to_the_same(data: st.DataObject) -> None:
    names = NAMES[: data.draw(st.integers(1, 6))]
    rates = st.dictionaries(st.sampled_from(NAMES), st.integers(0, 2**26))
    tellers = data.draw(st.sets(st.sampled_from(range(len(names)))))
    said = {i: pack_uplinks(HEAD, data.draw(rates)) for i in sorted(tellers)}
    reducing = data.draw(st.sets(st.sampled_from(range(len(names))), min_size=1))
    tags = [tag_of(HEAD, name) for name in names]
    assert list(counted_uplinks(HEAD, names, said, reducing)) == uplinks_of(tags, said, sorted(reducing))


# -- liars -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("absurd", ABSURD)
@pytest.mark.parametrize("liars", [1, 2])
def test_liars_that_are_few_among_those_who_measured_change_nothing(liars: int, absurd: int) -> None:
    honest = said_by(*range(liars, 6))
    lies = said_by(*range(liars), of=[absurd] * 6)
    assert counted(honest | lies) == counted(said_by(*range(6)))


@pytest.mark.parametrize("absurd", ABSURD)
def test_a_liar_that_alone_has_measured_costs_a_bounded_imbalance(absurd: int) -> None:
    """It calls one of five that are equal absurdly slow, or fast, and nobody else has measured that one."""
    honest = said_by(0, 1, 2, 3, of=[FAST] * 4)
    lie = {4: pack_uplinks(HEAD, {NAMES[4]: FAST, NAMES[5]: absurd})}
    found = counted(honest | lie)
    assert found[:5] == (FAST,) * 5
    assert found[5] in (FAST // 4, 4 * FAST, LARGEST_UPLINK)
    counts = part_counts(found, 6, 96)
    assert max(counts) <= 4 * 96 // 6
    longest = max(96 + 4 * count for count in counts)
    assert longest <= 2.25 * (96 + 4 * 96 // 6)
