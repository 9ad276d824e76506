"""What is told of a round, field by field. Whole outer steps are tried in ``test_peer``."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from p2p_diloco.core.aggregate import Alignment
from p2p_diloco.core.event import Uncertified
from p2p_diloco.core.known import Known
from p2p_diloco.core.moment import NOT_YET
from p2p_diloco.core.swarm_head import Standing
from p2p_diloco.peer.round_event import round_ended
from p2p_diloco.round.outcome import Missed, Settled
from p2p_diloco.round.seat import Seat
from p2p_diloco.round.settle import RoundCost
from tests.support.events import COMMITTED, MISSED

MEMBERS = [SimpleNamespace(peer_id=name, dropped=name in "bd") for name in "abcd"]
"""The last one helps."""
COST = RoundCost(reduce_s=0.25, settle_s=0.125, bytes_sent=1000, bytes_received=2000)
SETTLEMENT: Any = SimpleNamespace(
    group=SimpleNamespace(members=MEMBERS, trainers=MEMBERS[:3], helper="d", voting=frozenset((0, 1, 2))),
    meeting=SimpleNamespace(lost={2, 0}, owner="d"),
    cost=lambda: COST,
    part_counts=(4, 1, 0, 2),
    share_percent=57,
)
CERTIFICATE: Any = SimpleNamespace(signatures=((0, b"a"), (2, b"c")), witness=b"d")
SETTLED = Settled(update=cast(Any, None), certificate=CERTIFICATE)
ALIGNMENT = Alignment(contribution_norm=3.0, update_norm=2.0, cosine=-0.5)


def seat_at(step: int, head: bytes) -> Seat:
    known = Known(step=step, peers=frozenset(("a", "b")))
    standing = Standing(step=step, head=head, heads=())
    return Seat(standing=standing, known=known, role_trainer=True, client_mode=False)


def test_a_round_that_committed_is_told_as_it_was() -> None:
    told = round_ended(seat_at(4, b"\x0b"), SETTLED, SETTLEMENT, gather_s=0.5, apply_s=0.0625, alignment=ALIGNMENT)
    assert told == replace(
        COMMITTED,
        step=4,
        head="0b",
        group=("a", "b", "c"),
        dropped=("b",),
        lost=("a", "c"),
        gather_s=0.5,
        apply_s=0.0625,
        reduce_s=0.25,
        settle_s=0.125,
        bytes_sent=1000,
        bytes_received=2000,
        known=2,
        signatures=2,
        certifying=3,
        witnessed=True,
        contribution_norm=3.0,
        update_norm=2.0,
        cosine=-0.5,
        helper="d",
        parts=(4, 1, 0, 2),
        share_percent=57,
        wall_s=NOT_YET,
        mono_s=NOT_YET,
    )


def test_nobody_helps_most_rounds() -> None:
    group = SimpleNamespace(**vars(SETTLEMENT.group) | {"helper": ""})
    settlement: Any = SimpleNamespace(**vars(SETTLEMENT) | {"group": group})
    assert round_ended(seat_at(4, b"\x0b"), SETTLED, settlement).helper is None


def test_a_round_that_found_nobody_is_told_with_the_reason() -> None:
    told = round_ended(seat_at(3, b"\x0a"), Missed(reason="alone", detail="nobody to meet"), gather_s=1.5)
    assert told == replace(MISSED, known=2, wall_s=NOT_YET, mono_s=NOT_YET)


@pytest.mark.parametrize(("owner", "witness", "witnessed"), [("a", b"", True), ("b", b"", False), ("d", b"d", True)])
def test_the_owner_witnesses_as_a_member_or_beside_the_round(owner: str, witness: bytes, witnessed: bool) -> None:
    settlement = SimpleNamespace(**vars(SETTLEMENT) | {"meeting": SimpleNamespace(lost=set(), owner=owner)})
    certificate = SimpleNamespace(**vars(CERTIFICATE) | {"witness": witness})
    settled = Settled(update=cast(Any, None), certificate=cast(Any, certificate))
    told = round_ended(seat_at(4, b"\x0b"), settled, cast(Any, settlement))
    assert (told.witnessed, told.uncertified) == (witnessed, "")


@pytest.mark.parametrize("uncertified", ["signatures", "witness"])
def test_an_update_without_a_certificate_is_told_with_what_it_lacks(uncertified: Uncertified) -> None:
    missed = Missed(reason="failed", detail="why", uncertified=uncertified)
    told = round_ended(seat_at(3, b"\x0a"), missed, SETTLEMENT)
    assert (told.uncertified, told.signatures, told.certifying, told.witnessed) == (uncertified, 0, 0, False)
