"""What senders and reducers sign: only they, only these bytes, only for this place."""

from __future__ import annotations

from dataclasses import replace

import blake3
import pytest

from p2p_diloco.core.signed_part import REDUCTION_BYTES, Contribution, Inputs, Place, Reduction
from p2p_diloco.core.update import Part
from tests.support.builders import identity
from tests.support.decoder import h, is_signed, public_key

SENDER, REDUCER = identity(1), identity(2)
PLACE = Place(round_id=b"r" * 32, number=3, part=70000)
OTHER_PLACES = [replace(PLACE, round_id=b"s" * 32), replace(PLACE, number=2), replace(PLACE, part=1)]
PART = Part(mask=b"\x05", data=b"mean")
NAMED = h(PLACE.round_id, b"\x03", (70000).to_bytes(4, "big"))


def test_a_contribution_is_signed_for_one_place_by_its_sender() -> None:
    sent = Contribution.of(PLACE, b"data", SENDER)
    assert Contribution.from_frame(sent.data + sent.signature) == sent
    assert sent.is_signed(PLACE, SENDER.peer_id)
    assert not sent.is_signed(PLACE, REDUCER.peer_id)
    assert not any(sent.is_signed(place, SENDER.peer_id) for place in OTHER_PLACES)
    assert not replace(sent, data=b"date").is_signed(PLACE, SENDER.peer_id)
    signed = b"p2p-diloco contribution\0" + h(NAMED, blake3.blake3(b"data").digest())
    assert is_signed(public_key(SENDER.peer_id), signed, sent.signature)


@pytest.mark.parametrize("frame", [b"", b"x", bytes(63), bytes(64), bytes(65)])
def test_a_frame_of_any_length_is_no_contribution(frame: bytes) -> None:
    assert not Contribution.from_frame(frame).is_signed(PLACE, SENDER.peer_id)


def test_a_reduction_is_signed_for_one_part_with_its_inputs_by_its_reducer() -> None:
    came = {5: Contribution.of(PLACE, b"b", REDUCER), 0: Contribution.of(PLACE, b"a", SENDER)}
    inputs = Inputs.of(came)
    entries = [bytes([i]) + blake3.blake3(came[i].data).digest() + came[i].signature for i in (0, 5)]
    assert inputs.to_bytes() == b"\x21" + bytes(31) + h(*entries)
    assert Inputs.from_bytes(inputs.to_bytes()) == inputs
    reduction = Reduction.of(PLACE, PART, inputs, 5, REDUCER)
    assert len(reduction.to_bytes()) == REDUCTION_BYTES
    assert Reduction.from_bytes(reduction.to_bytes()) == reduction
    assert reduction.is_signed(PLACE.round_id, PLACE.part, PART, REDUCER.peer_id)
    assert not reduction.is_signed(PLACE.round_id, PLACE.part, PART, SENDER.peer_id)
    assert not reduction.is_signed(bytes(32), PLACE.part, PART, REDUCER.peer_id)
    assert not reduction.is_signed(PLACE.round_id, 1, PART, REDUCER.peer_id)
    others = Inputs.of({}), replace(inputs, senders=b"\x25"), replace(inputs, digest=bytes(32))
    for changed in (replace(reduction, number=2), *(replace(reduction, inputs=other) for other in others)):
        assert not changed.is_signed(PLACE.round_id, PLACE.part, PART, REDUCER.peer_id)
    for part in (replace(PART, mask=b"\x01"), replace(PART, data=b"Mean")):
        assert not reduction.is_signed(PLACE.round_id, PLACE.part, part, REDUCER.peer_id)
    signed = b"p2p-diloco reduction\0" + h(NAMED, inputs.to_bytes(), PART.hash)
    assert is_signed(public_key(REDUCER.peer_id), signed, reduction.signature)


def test_inputs_stand_for_who_sent_what_under_which_signature() -> None:
    sent = Contribution.of(PLACE, b"a", SENDER)
    others = [{}, {1: sent}, {0: replace(sent, data=b"b")}, {0: replace(sent, signature=bytes(64))}, {0: sent, 1: sent}]
    assert len({Inputs.of(came) for came in [{0: sent}, *others]}) == 6
