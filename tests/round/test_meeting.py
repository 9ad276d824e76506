"""What a member makes of the parts that come to it: two versions of one, both signed by its reducer, bar that one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from unittest import mock

import pytest

from p2p_diloco.core import grid
from p2p_diloco.core.signed_part import Inputs, Place, Reduction
from tests.support.builders import pipe
from tests.support.fakes import run_simulated
from tests.support.meetings import SMALL_PART_VALUES, Round, frame_of

ALL = (0, 1, 2, 3)
REDUCER = PART = 1
"""The second part is the second member's."""


@pytest.fixture(autouse=True)
def _small_parts() -> Iterator[None]:
    with mock.patch.object(grid, "PART_VALUES", SMALL_PART_VALUES):
        yield


def version(one: Round, of: Sequence[int] = ALL, *, number: int = 0, sent_to: int = 0) -> bytes:
    """A part with the contributions ``of`` some members in it, as its reducer signs it: it says that they were sent to
    the butterfly ``sent_to``."""
    inputs = Inputs.of({i: one.sent(i, PART, sent_to) for i in of})
    place = Place(round_id=one.round_id, number=number, part=PART)
    mean = one.mean(PART, of)
    return frame_of(mean, Reduction.of(place, mean, inputs, REDUCER, one.members[REDUCER]).to_bytes())


def barred_by(
    of: Sequence[int] = ALL, *, number: int = 0, sent_to: int = 0, me: int = 0, owner: int | None = None
) -> list[int]:
    """Whom a member has barred that has got a part as it is, and then another version of it."""
    barred: list[int] = []

    async def main() -> None:
        one = Round(4)
        meeting = one.settlements[me].meeting
        meeting.owner = meeting.owner if owner is None else one.ids[owner]
        for frame in (version(one), version(one, of, number=number, sent_to=sent_to)):
            mine, theirs = pipe()
            await theirs.send_frame(frame)
            await meeting.receive_part(mine, PART, 1.0)
        barred.extend(one.ids.index(peer_id) for peer_id in meeting.directory.barred)

    run_simulated(main())
    return barred


def test_who_has_signed_two_versions_of_a_part_is_barred() -> None:
    assert barred_by((0, 1, 2)) == [REDUCER]


def test_who_says_that_other_contributions_made_the_same_mean_has_signed_another_version() -> None:
    assert barred_by(sent_to=1) == [REDUCER]


def test_a_part_that_comes_twice_bars_nobody() -> None:
    """As from its reducer, and once more from another member."""
    assert barred_by() == []


def test_a_part_that_was_reduced_again_bars_nobody() -> None:
    """In another butterfly of the round, without a member that was lost."""
    assert barred_by((0, 1, 2), number=1) == []


def test_nobody_bars_the_owner_or_itself() -> None:
    assert barred_by((0, 1, 2), owner=REDUCER) == []
    assert barred_by((0, 1, 2), me=REDUCER) == []
