"""The directory of records, with a clock that the tests set."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgpack
import pytest

from p2p_diloco.core import directory, records
from p2p_diloco.core.admission import IDS_PER_PLACE, Admission
from p2p_diloco.core.directory import Directory
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.invitation import Token, open_revocations
from p2p_diloco.core.records import (
    Record,
    Unsound,
    open_record,
    seal_record,
    unpack_plain,
)
from tests.core.test_records import ME, OTHER, SEALED, SOUND
from tests.support.builders import (
    NOW_S,
    RUN_ID,
    identity,
    record_of,
)
from tests.support.invited import OWNER, revocations_of, token_of


class Known(Directory):
    """A directory with a clock, to which others report."""

    def __init__(self) -> None:
        super().__init__(ME.peer_id, RUN_ID)
        self.now_s = NOW_S

    def hear(self, index: int = 2, history: str = "", **changes: Any) -> Record | None:
        record = record_of(identity(index), history, **({"issued_s": self.now_s} | changes))
        return self.learn(seal_record(record, identity(index)), self.now_s)

    @property
    def ids(self) -> list[str]:
        return [record.peer_id for record in self.live(self.now_s)]


def test_the_newest_record_wins_and_a_replay_changes_nothing() -> None:
    known = Known()
    old, new = (seal_record(record_of(OTHER, step, issued_s=NOW_S + i), OTHER) for i, step in enumerate(["a", "ab"]))
    assert known.learn(old, NOW_S) == open_record(old)
    assert known.learn(new, NOW_S) == open_record(new)
    assert known.learn(old, NOW_S) == open_record(new)
    assert known.learn(new, NOW_S) == open_record(new)
    assert known.live(NOW_S) == [open_record(new)]
    assert (known.get(OTHER.peer_id), known.sealed(OTHER.peer_id)) == (open_record(new), new)
    assert known.maddrs(OTHER.peer_id) == open_record(new).maddrs
    assert known.live(NOW_S + 40) == []
    assert [known.learn(sealed, NOW_S + 40) for sealed in (old, new)] == [None, None]


def test_of_two_records_of_one_instant_the_first_stays() -> None:
    known = Known()
    first = known.hear(history="a")
    assert known.hear(history="ab") == first


def test_who_is_unknown() -> None:
    known = Known()
    assert (known.get("x"), known.sealed("x"), known.maddrs("x")) == (None, None, [])
    known.suspect("x")
    assert known.live(NOW_S) == []


def test_a_record_is_verified_once(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Known()
    known.learn(SEALED, NOW_S)
    monkeypatch.setattr(records, "open_record", None)
    assert known.learn(SEALED, NOW_S) == SOUND


def test_records_expire_by_the_clock_that_is_given() -> None:
    known = Known()
    known.hear(2)
    known.hear(3, life_s=60.0)
    known.suspect(identity(3).peer_id)
    known.now_s += 29.9
    assert known.ids == [OTHER.peer_id]
    sealed = known.sealed(OTHER.peer_id)
    assert sealed is not None
    known.now_s += 0.1
    assert known.learn(sealed, known.now_s) is None
    assert known.ids == []
    assert known.get(OTHER.peer_id) is None
    assert known.learn(sealed, known.now_s) is None
    assert known.get(OTHER.peer_id) is None
    known.now_s += 30
    assert known.ids == []
    assert not any([known._records, known._sealed, known._verified, known._suspects])


@pytest.mark.parametrize("issued_s", [NOW_S - 31, NOW_S + 31])
def test_records_of_another_time_are_not_taken(issued_s: float) -> None:
    known = Known()
    assert known.hear(issued_s=issued_s) is None
    assert known.get(OTHER.peer_id) is None


def test_a_suspect_comes_back_with_a_newer_record() -> None:
    known = Known()
    known.hear(2)
    known.hear(3)
    known.suspect(OTHER.peer_id)
    assert known.ids == [identity(3).peer_id]
    known.hear(2)
    known.hear(2, issued_s=NOW_S - 1)
    assert known.ids == [identity(3).peer_id]
    known.now_s += 1
    known.hear(2)
    assert len(known.ids) == 2


def test_who_cannot_be_dialled_keeps_its_vote_when_it_does_not_answer() -> None:
    """It is not counted on, as nobody is that does not answer, but it is there until its record is out of date."""
    known = Known()
    known.hear(2, client_mode=True)
    known.hear(3)
    known.suspect(OTHER.peer_id)
    known.suspect(identity(3).peer_id)
    assert known.ids == []
    assert [record.peer_id for record in known.believed(known.now_s)] == [OTHER.peer_id]
    assert known.doubt(record_of(OTHER).head, known.now_s, 20.0) == 2
    assert known.believed(known.now_s) == []
    assert [record.peer_id for record in known.believed(known.now_s + 20)] == [OTHER.peer_id]
    assert known.believed(known.now_s + 30) == []


def test_who_is_in_doubt_is_there_but_is_not_believed_whatever_it_signs_meanwhile() -> None:
    known = Known()
    known.hear(2)
    known.hear(3, head=bytes([9]) * 32)
    known.hear(4, head=bytes([8]) * 32, heads=[bytes([9]) * 32])
    assert known.doubt(bytes([9]) * 32, NOW_S, 20.0) == 2
    known.now_s += 10
    for i in (2, 3, 4):
        known.hear(i)
    assert len(known.ids) == 3
    assert [record.peer_id for record in known.believed(known.now_s)] == [OTHER.peer_id]
    assert len(known.believed(NOW_S + 20)) == 3


def test_one_of_a_few_is_in_doubt_for_twice_as_long_each_time_and_most_are_not() -> None:
    known = Known()
    for i in (2, 3, 4, 5):
        known.hear(i, life_s=900.0)
    known.hear(6, life_s=900.0, head=bytes([9]) * 32)
    for times in (1, 2, 4, 8):
        assert known.doubt(bytes([9]) * 32, NOW_S, 20.0) == 1
        assert len(known.believed(NOW_S + 20 * times - 1)) == 4
        assert len(known.believed(NOW_S + 20 * times)) == 5
    for _ in range(3):
        assert known.doubt(record_of(OTHER).head, NOW_S, 20.0) == 4
        assert len(known.believed(NOW_S + 20)) == 4, "the one in doubt before"


def test_who_is_disbelieved_has_no_vote_for_twice_as_long_each_time_and_nobody_else_with_its_head() -> None:
    known = Known()
    for i in (2, 3, 4):
        known.hear(i, life_s=900.0)
    known.disbelieve(identity(500).peer_id, NOW_S, 20.0)
    for times in (1, 2, 4, 8, 16, 16):
        known.disbelieve(OTHER.peer_id, NOW_S, 20.0)
        assert len(known.believed(NOW_S + 20 * times - 1)) == 2
        assert len(known.believed(NOW_S + 20 * times)) == 3


def test_who_was_gone_for_a_record_life_begins_without_doubts() -> None:
    known, doubted = Known(), bytes([9]) * 32
    for _ in range(2):
        for i in (2, 3, 4, 5):
            known.hear(i)
        known.hear(6, head=doubted)
        assert known.doubt(doubted, known.now_s, 5.0) == 1
        assert len(known.believed(known.now_s + 4)) == 4
        assert len(known.believed(known.now_s + 5)) == 5, "not twice as long: nothing is known of another time"
        known.now_s += 1000
        assert known.ids == []


def test_another_peers_record_is_not_taken_from_a_stranger() -> None:
    known = Known()
    record = seal_record(record_of(OTHER), OTHER)
    with pytest.raises(Unsound, match="somebody else's record"):
        known.learn_from(identity(3).peer_id, record, NOW_S)
    assert known.ids == []
    assert known.learn_from(OTHER.peer_id, record, NOW_S) is not None


@pytest.mark.parametrize("value", [[0] * 65_537, {str(i): 0 for i in range(65)}, [[[0] * 65_537]]])
def test_more_than_any_message_needs_is_refused_before_it_is_made(value: object) -> None:
    with pytest.raises(Unsound, match="not plain msgpack"):
        unpack_plain(msgpack.packb(value))


def test_who_has_left_is_not_there() -> None:
    known = Known()
    known.hear(2)
    assert known.hear(2, phase="left", issued_s=NOW_S + 1) is not None
    assert known.ids == []
    known.hear(2)
    assert known.ids == []


def test_own_and_foreign_records_are_not_taken() -> None:
    known = Known()
    assert known.hear(1) is None
    assert known.hear(2, run_id="cd" * 20) is None
    with pytest.raises(ValueError, match="not signed"):
        known.learn(seal_record(SOUND, ME), NOW_S)
    assert known.live(NOW_S) == []


def test_the_number_of_peers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "MAX_PEERS_KNOWN", 4)
    known = Known()
    assert all(known.hear(i) is not None for i in range(2, 8))
    assert known.ids == sorted(identity(i).peer_id for i in (2, 3, 4, 7)), "a newcomer always gets in"
    assert len(known._verified) == len(known._sealed) == 4
    known.now_s += 1
    assert known.hear(2, history="a") is not None, "who is known stays up to date"
    known.now_s += 30
    assert known.ids == []
    assert all(known.hear(i) is not None for i in range(6, 10))
    assert len(known.ids) == 4


def test_no_flood_of_invented_peers_hides_who_is_known_who_comes_or_who_is_favoured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(directory, "MAX_PEERS_KNOWN", 16)
    favoured = {identity(4).peer_id}
    known = Directory(ME.peer_id, RUN_ID, favoured=favoured)

    def heard(i: int) -> Record | None:
        return known.learn(seal_record(record_of(identity(i)), identity(i)), NOW_S)

    def flood(start: int) -> None:
        for i in range(start, start + 40):
            heard(i)

    heard(2)
    flood(100)
    newcomer = identity(3)
    assert known.learn_from(newcomer.peer_id, seal_record(record_of(newcomer), newcomer), NOW_S) is not None
    heard(4)
    flood(200)
    live = {record.peer_id for record in known.live(NOW_S)}
    assert len(live) == 16
    assert {identity(i).peer_id for i in (2, 3, 4)} < live
    assert not any(known.get(identity(i).peer_id) for i in range(130, 140)), "they had their turn"


def test_who_was_heard_of_first_and_comes_then_is_one_that_came(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "MAX_PEERS_KNOWN", 8)
    known = Known()
    for i in range(2, 10):
        known.hear(i)
    sealed = known.sealed(identity(9).peer_id)
    assert sealed is not None
    assert known.learn_from(identity(9).peer_id, sealed, NOW_S) is not None, "the very record that was heard of"
    for i in range(20, 40):
        known.hear(i)
    assert known.get(identity(9).peer_id) is not None


def test_of_all_ways_that_were_shown_the_newest_links_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "MAX_LINKS_KNOWN", 4)
    known = Directory(ME.peer_id, RUN_ID)
    known.show([])
    known.show([b"a"])
    assert known.before == {}
    known.show([b"c", b"b", b"a"])
    known.show([b"d", b"c", b"b"])
    assert known.before == {b"d": b"c", b"c": b"b", b"b": b"a"}
    known.show([b"z", b"y", b"x"])
    assert known.before == {b"b": b"a", b"d": b"c", b"z": b"y", b"y": b"x"}


def test_whom_i_met_is_expected_where_we_got_to() -> None:
    known, met = Known(), [identity(i).peer_id for i in (2, 3, 4, 99)]
    known.hear(2, "a")
    known.hear(3, "abc")
    known.hear(5, "a")
    known.met(met, 2, b"h" * 32)
    expected = {record.peer_id: (record.step, record.head) for record in known.expected(NOW_S)}
    live = {record.peer_id: (record.step, record.head) for record in known.live(NOW_S)}
    assert expected == live | {OTHER.peer_id: (2, b"h" * 32)}
    assert live[OTHER.peer_id][0] == 1, "no vote moves with it"
    known.suspect(OTHER.peer_id)
    assert OTHER.peer_id not in {record.peer_id for record in known.expected(NOW_S)}
    known.now_s += 1
    known.hear(2, "ax")  # at the same step, but elsewhere after all
    assert known.expected(known.now_s) == known.live(known.now_s)


# -- by invitation ---------------------------------------------------------------------------------------------------

BY_INVITATION = Admission(run_id=RUN_ID, owner=OWNER.peer_id, by_invitation=True)


def invited(me: Identity = ME) -> Directory:
    return Directory(me.peer_id, RUN_ID, admission=BY_INVITATION)


def seated(index: int, token: Token, history: str = "a", **changes: Any) -> bytes:
    who = identity(index)
    return seal_record(record_of(who, history, seat=token.seat(who.peer_id), **changes), who)


def test_only_those_with_a_seat_are_known() -> None:
    known = invited()
    assert known.learn(seated(2, token_of()), NOW_S) is not None
    assert known.learn(seal_record(record_of(OWNER), OWNER), NOW_S) is not None
    with pytest.raises(Unsound, match="has not been invited") as error:
        known.learn(seal_record(record_of(identity(3)), identity(3)), NOW_S)
    assert error.value.fault == "seat"
    with pytest.raises(Unsound, match="of another run, or of another owner"):
        known.learn(seated(3, token_of(owner=identity(3))), NOW_S)
    stolen = record_of(identity(3), seat=token_of().seat(identity(2).peer_id))
    with pytest.raises(Unsound, match="has not signed for this peer"):
        known.learn(seal_record(stolen, identity(3)), NOW_S)
    assert {record.peer_id for record in known.live(NOW_S)} == {identity(2).peer_id, OWNER.peer_id}


def test_who_has_lapsed_is_forgotten_and_is_no_liar() -> None:
    """Somebody who has not heard of it may pass its record on."""
    known, token = invited(), token_of(expires_s=int(NOW_S) + 5)
    assert known.learn(seated(2, token), NOW_S) is not None
    assert known.live(NOW_S + 4.9)
    assert known.live(NOW_S + 5) == []
    assert known.learn(seated(2, token, issued_s=NOW_S + 1), NOW_S + 5) is None
    assert known.get(identity(2).peer_id) is None


def test_a_revocation_counts_from_the_step_at_which_i_stand() -> None:
    known, token = invited(), token_of()
    sealed = revocations_of({token.invitation.token: 7})
    listed = open_revocations(sealed, run_id=RUN_ID, owner=OWNER.peer_id)
    known.learn(seated(2, token), NOW_S)
    known.admission = replace(known.admission, revocations=listed)
    known.step = 6
    assert len(known.live(NOW_S)) == 1
    known.step = 7
    assert known.live(NOW_S) == []


def test_only_some_peers_of_one_token_are_known_at_a_time() -> None:
    known, token = invited(), token_of()
    taken = [known.learn(seated(index, token), NOW_S) is not None for index in range(2, 9)]
    assert taken == [True] * IDS_PER_PLACE + [False] * (7 - IDS_PER_PLACE)
    assert known.learn(seated(2, token, issued_s=NOW_S + 1), NOW_S + 1) is not None
    assert known.learn(seated(9, token_of(key=2001)), NOW_S) is not None
    assert known.learn(seated(8, token, issued_s=NOW_S + 30), NOW_S + 30) is not None  # the others are gone
