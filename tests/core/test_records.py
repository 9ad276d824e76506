from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2p_diloco.core import manifest, records
from p2p_diloco.core.records import (
    MAX_RECORD_BYTES,
    SIGNATURE_CONTEXT,
    Directory,
    Record,
    Signed,
    Unsound,
    is_current,
    open_record,
    seal_record,
    unpack_plain,
    unseal,
)
from p2p_diloco.core.rounds import READINESS_CONTEXT, open_readiness, seal_readiness
from p2p_diloco.peer.probes import CONSENT_CONTEXT, DialConsent
from tests.support.builders import (
    NOW_S,
    RUN_ID,
    damaged,
    identity,
    plain_values,
    readiness_of,
    record_of,
    sealed_anyhow,
    values_of,
)

ME, OTHER = identity(1), identity(2)
SOUND = record_of(OTHER, "abcde", loss=2.5, maddrs=["/ip4/192.0.2.1/tcp/4001/p2p/" + OTHER.peer_id] * 2, tokens=7)
SEALED = seal_record(SOUND, OTHER)
CONSENT = DialConsent(peer_id=OTHER.peer_id, asker=ME.peer_id, dialler=identity(3).peer_id, ports=[4001])
FIELDS = list(Record.model_fields)


def signed(values: object) -> bytes:
    return sealed_anyhow(values, SIGNATURE_CONTEXT, OTHER)


# -- one record ----------------------------------------------------------------------------------------------------


def test_a_record_comes_back_as_it_was_signed() -> None:
    assert open_record(SEALED) == SOUND
    assert len(SEALED) <= MAX_RECORD_BYTES
    assert (SOUND.expires_s, SOUND.label, record_of(OTHER, name="ada").label) == (
        NOW_S + 30.0,
        OTHER.peer_id[-8:],
        "ada",
    )


@given(st.binary(max_size=1100) | damaged(SEALED))
@settings(max_examples=200)
def test_bytes_that_nobody_signed_are_no_record(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"record|msgpack"):
        open_record(data)


STATEMENTS: dict[bytes, tuple[Signed, Callable[[bytes], Signed]]] = {
    SIGNATURE_CONTEXT: (SOUND, open_record),
    READINESS_CONTEXT: (readiness_of(OTHER), open_readiness),
    CONSENT_CONTEXT: (CONSENT, lambda sealed: unseal(sealed, DialConsent, CONSENT_CONTEXT)),
}
"""Every kind of statement that a peer signs, by what is signed before it, with what opens it."""
CONTEXTS = [*STATEMENTS, manifest.SIGNATURE_CONTEXT]


@pytest.mark.parametrize("kind", STATEMENTS, ids=lambda context: context.decode().strip("\0"))
@pytest.mark.parametrize("signed_as", CONTEXTS, ids=lambda context: context.decode().strip("\0"))
def test_a_signature_under_one_kind_of_statement_is_none_under_another(kind: bytes, signed_as: bytes) -> None:
    """Whoever gets a peer to sign one thing has not got it to sign another, whatever stands in it."""
    statement, opened = STATEMENTS[kind]
    sealed = sealed_anyhow(values_of(statement), signed_as, OTHER)
    if signed_as == kind:
        assert opened(sealed) == statement
    else:
        with pytest.raises(Unsound, match="is not signed by its peer") as refused:
            opened(sealed)
        assert refused.value.fault == "signature"


def test_what_is_signed_says_of_what_kind_it_is() -> None:
    """No context is how another one begins: bytes that follow the shorter could make up the difference."""
    assert len(set(CONTEXTS)) == 4
    assert not any(one != other and one.startswith(other) for one in CONTEXTS for other in CONTEXTS)
    assert all(context.count(b"\0") == 1 and context.endswith(b"\0") for context in CONTEXTS)


@given(
    changes=st.dictionaries(st.sampled_from(FIELDS), plain_values, max_size=4),
    rest=st.lists(plain_values, max_size=1),
    cut=st.integers(0, 2),
)
@settings(max_examples=200)
def test_whatever_a_peer_signs_is_a_sound_record_or_a_value_error(
    changes: dict[str, object], rest: list[object], cut: int
) -> None:
    values = [*values_of(SOUND, **changes)[: len(FIELDS) - cut], *rest]
    try:
        opened = open_record(signed(values))
    except ValueError:
        return
    assert values_of(opened) == values
    assert open_record(seal_record(opened, OTHER)) == opened


@given(plain_values)
def test_a_signature_makes_nothing_else_a_record(values: object) -> None:
    with pytest.raises(ValueError, match="another version"):
        open_record(signed(values))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peer_id", ""),
        ("run_id", "AB" * 20),
        ("run_id", "ab" * 21),
        ("run_id", "ab" * 20 + "\n"),
        ("run_name", "x" * 65),
        ("issued_s", float("nan")),
        ("issued_s", float("inf")),
        ("issued_s", -1.0),
        ("life_s", 0.0),
        ("life_s", 900.1),
        ("life_s", float("nan")),
        ("role", "monitor"),
        ("phase", "idle"),
        ("step", -1),
        ("step", 2**60),
        ("step", True),
        ("step", 3.0),
        ("head", bytes(31)),
        ("head", "0" * 32),
        ("committed", 1),
        ("heads", [bytes(32)] * 5),
        ("heads", [bytes(33)]),
        ("heads", {}),
        ("maddrs", ["x"] * 4),
        ("maddrs", ["x" * 161]),
        ("maddrs", [b"x"]),
        ("client_mode", None),
        ("name", "x" * 33),
        ("loss", float("nan")),
        ("held_out_loss", float("-inf")),
        ("tokens_per_s", -1.0),
        ("tokens", 1e30),
        ("metrics_addr", "a" * 60 + ":9100"),
        ("metrics_addr", "a:9100\n"),
        ("metrics_addr", "http://a:9100"),
        ("metrics_addr", "a:9100/x"),
        ("metrics_addr", "a"),
        ("metrics_addr", "[::1%1]:9100"),
    ],
)
def test_a_field_out_of_its_bounds(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"record field {field}"):
        open_record(signed(values_of(SOUND, **{field: value})))


def test_only_a_peer_itself_speaks_for_it() -> None:
    with pytest.raises(ValueError, match="not signed by its peer"):
        open_record(seal_record(SOUND, ME))
    with pytest.raises(ValueError, match="not signed by its peer"):
        open_record(signed(values_of(SOUND, peer_id=ME.peer_id)))
    with pytest.raises(ValueError, match="not signed by its peer"):
        open_record(sealed_anyhow(values_of(SOUND), b"p2p-diloco readiness\0", OTHER))
    with pytest.raises(ValueError, match="another version"):
        open_record(seal_readiness(readiness_of(OTHER), OTHER))
    rsa_like = "Qm" + "a" * 44
    with pytest.raises(ValueError, match="not signed by its peer"):
        open_record(signed(values_of(SOUND, peer_id=rsa_like)))


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (bytes(MAX_RECORD_BYTES + 1), "size"),
        (b"\xc1", "form"),
        (b"\x92\x01\x02", "form"),
        (signed(values_of(SOUND)[:-1]), "version"),
        (signed(values_of(SOUND, step=-1)), "field"),
        (seal_record(SOUND, ME), "signature"),
    ],
)
def test_why_it_is_refused_is_one_of_few_words(data: bytes, fault: str) -> None:
    with pytest.raises(Unsound) as error:
        open_record(data)
    assert error.value.fault == fault


NESTED = b"\x91" * 400 + b"\x90"
EXTENSION = msgpack.packb(msgpack.ExtType(5, b"x" * 4))
TIMESTAMP = msgpack.packb(msgpack.Timestamp(1))


@pytest.mark.parametrize("hostile", [NESTED, EXTENSION, TIMESTAMP, b"\xc1", b"\x81\x01\x02", b"\xd9\x01\xff"])
def test_nested_and_foreign_types_are_refused_wherever_they_stand(hostile: bytes) -> None:
    body, signature = unpack_plain(SEALED)
    with pytest.raises(ValueError, match=r"record|msgpack"):
        open_record(hostile)
    with pytest.raises(ValueError, match=r"record|msgpack"):
        open_record(b"\x92" + hostile + msgpack.packb(signature))
    start = msgpack.Packer().pack_array_header(len(FIELDS))
    for at in range(len(FIELDS)):
        packed = [msgpack.packb(value) for value in values_of(SOUND)]
        packed[at] = hostile
        body = start + b"".join(packed)
        with pytest.raises(ValueError, match=r"record|msgpack"):
            open_record(msgpack.packb([body, OTHER.sign(SIGNATURE_CONTEXT + body)]))


@pytest.mark.parametrize("hostile", [b"\x91" * 100_000 + b"\x90", EXTENSION, b"\x91" + EXTENSION, b"\x90\x90", b""])
def test_what_is_not_plain_msgpack(hostile: bytes) -> None:
    """Depth is bounded before the stack is."""
    with pytest.raises(ValueError, match="not plain msgpack"):
        unpack_plain(hostile)


def test_a_record_has_at_most_one_kilobyte() -> None:
    """Checked before anything is parsed, and before we would publish what nobody takes."""
    long = SOUND.model_copy(update={"maddrs": ["x" * 160] * 3, "name": "\N{DNA DOUBLE HELIX}" * 32})
    with pytest.raises(ValueError, match="shorten"):
        seal_record(long, OTHER)
    with pytest.raises(ValueError, match="too large"):
        open_record(signed(values_of(long)))
    with pytest.raises(ValueError, match="too large"):
        open_record(bytes(1025))


def test_a_peer_that_has_done_nothing_yet_says_so() -> None:
    said = {name: field.default for name, field in Record.model_fields.items() if not field.is_required()}
    nothing_yet = {"loss": None, "held_out_loss": None, "name": "", "version": "", "metrics_addr": ""}
    assert said == dict.fromkeys(said, 0) | nothing_yet


@pytest.mark.parametrize(
    ("offset_s", "current"), [(-30.0, False), (-29.9, True), (0.0, True), (29.9, True), (30.0, False)]
)
def test_clocks_may_differ_by_a_records_life(offset_s: float, current: bool) -> None:
    assert is_current(SOUND, NOW_S - offset_s) is current


# -- the directory -------------------------------------------------------------------------------------------------


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
    monkeypatch.setattr(records, "MAX_PEERS_KNOWN", 3)
    known = Known()
    heard = [known.hear(i) for i in range(2, 7)]
    assert [record is not None for record in heard] == [True] * 3 + [False] * 2
    assert len(known.ids) == 3
    known.now_s += 1
    assert known.hear(2, history="a") is not None, "who is known stays up to date"
    known.now_s += 30
    assert known.ids == []
    assert known.hear(6) is not None


def test_of_all_ways_that_were_shown_the_newest_links_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_LINKS_KNOWN", 4)
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
