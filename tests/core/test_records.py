from __future__ import annotations

from collections.abc import Callable

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2p_diloco.core import manifest
from p2p_diloco.core.reach import IPV4
from p2p_diloco.core.records import (
    MAX_RECORD_BYTES,
    SIGNATURE_CONTEXT,
    Record,
    Signed,
    Unsound,
    is_current,
    open_record,
    seal_record,
    unpack_plain,
    unseal,
)
from p2p_diloco.core.roster import READINESS_CONTEXT, open_readiness, seal_readiness
from p2p_diloco.peer.probes import CONSENT_CONTEXT, DialConsent
from tests.support.builders import (
    NOW_S,
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
        ("maddrs", ["x"] * 6),
        ("maddrs", ["x" * 193]),
        ("maddrs", [b"x"]),
        ("client_mode", None),
        ("reached_over", 0),
        ("reached_over", 4),
        ("reaches_over", 0),
        ("reaches_over", True),
        ("helps", 1),
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


def test_a_record_has_at_most_two_kilobytes() -> None:
    """Checked before anything is parsed, and before we would publish what nobody takes."""
    long = SOUND.model_copy(update={"maddrs": ["x" * 500] * 3, "seat": bytes(512)})
    with pytest.raises(ValueError, match="shorten"):
        seal_record(long, OTHER)
    with pytest.raises(ValueError, match="too large"):
        open_record(signed(values_of(long)))
    with pytest.raises(ValueError, match="too large"):
        open_record(bytes(2049))


def test_a_peer_that_has_done_nothing_yet_says_so() -> None:
    said = {name: field.default for name, field in Record.model_fields.items() if not field.is_required()}
    nothing_yet = {"loss": None, "held_out_loss": None, "name": "", "version": "", "metrics_addr": "", "seat": b""}
    others = {"anchor": b"", "barred_digest": b"", "share_percent": 100, "reached_over": IPV4, "reaches_over": IPV4}
    assert said == dict.fromkeys(said, 0) | nothing_yet | others


@pytest.mark.parametrize(
    ("offset_s", "current"), [(-30.0, False), (-29.9, True), (0.0, True), (29.9, True), (30.0, False)]
)
def test_clocks_may_differ_by_a_records_life(offset_s: float, current: bool) -> None:
    assert is_current(SOUND, NOW_S - offset_s) is current


# -- the directory -------------------------------------------------------------------------------------------------
