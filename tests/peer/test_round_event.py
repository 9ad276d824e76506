"""What is told of a round, field by field. Whole outer steps are tried in ``test_peer``."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from p2p_diloco.core.aggregate import Alignment
from p2p_diloco.core.event import NOT_YET
from p2p_diloco.core.swarm_head import Standing
from p2p_diloco.peer.round_event import round_ended
from p2p_diloco.round.outcome import Missed
from p2p_diloco.round.settle import RoundCost
from tests.support.events import COMMITTED, MISSED

MEMBERS = [SimpleNamespace(peer_id=name, dropped=name == "b") for name in "abc"]
COST = RoundCost(reduce_s=0.25, settle_s=0.125, bytes_sent=1000, bytes_received=2000)
SETTLEMENT: Any = SimpleNamespace(
    group=SimpleNamespace(members=MEMBERS), meeting=SimpleNamespace(lost={2, 0}), cost=lambda: COST
)
ALIGNMENT = Alignment(contribution_norm=3.0, update_norm=2.0, cosine=-0.5)


def test_a_round_that_committed_is_told_as_it_was() -> None:
    standing = Standing(step=4, head=b"\x0b", heads=())
    told = round_ended(standing, None, SETTLEMENT, gather_s=0.5, apply_s=0.0625, alignment=ALIGNMENT)
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
        contribution_norm=3.0,
        update_norm=2.0,
        cosine=-0.5,
        wall_s=NOT_YET,
        mono_s=NOT_YET,
    )


def test_a_round_that_found_nobody_is_told_with_the_reason() -> None:
    standing = Standing(step=3, head=b"\x0a", heads=())
    told = round_ended(standing, Missed(reason="alone", detail="nobody to meet"), gather_s=1.5)
    assert told == replace(MISSED, wall_s=NOT_YET, mono_s=NOT_YET)
