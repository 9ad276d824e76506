"""Figures of the whole swarm against plain arithmetic, and what liars can do to them."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p_diloco.core.records import Phase, Record, Role
from p2p_diloco.look.overview import STATES, addresses_to_join, overview_of, scrape_targets, state_of
from tests.support.builders import NOW_S, head, identity, record_of

IP = "203.0.113.7"
PUBLIC, PRIVATE, LOOPBACK = "/ip4/1.1.1.1/tcp/1", "/ip4/10.0.0.1/tcp/1", "/ip4/127.0.0.1/tcp/1"


def trainer(index: int, history: str = "ab", **changes: Any) -> Record:
    return record_of(identity(index), history, **changes)


def seed(index: int, history: str = "ab", **changes: Any) -> Record:
    return record_of(identity(index), history, role="seed", **changes)


def at(maddr: str, index: int) -> str:
    return f"{maddr}/p2p/{identity(index).peer_id}"


def test_aggregates_are_those_of_plain_arithmetic() -> None:
    records = [
        trainer(1, loss=2.0, tokens=100, tokens_per_s=30.0, group_size=3, round_s=1.0, held_out_loss=5.0),
        trainer(2, loss=4.0, tokens=50, tokens_per_s=10.0, group_size=3, round_s=5.0, phase="reduce"),
        trainer(3, tokens=7, tokens_per_s=5.0, phase="joining", round_s=99.0),
        seed(4, tokens=0, held_out_loss=3.0, held_out_step=2, group_size=3, round_s=2.0),
    ]
    overview = overview_of(records, NOW_S)
    assert (overview.step, overview.heads, overview.tokens, overview.tokens_per_s) == (2, 1, 157, 45.0)
    assert overview.peers == {"training": 1, "round": 1, "joining": 1, "seed": 1}
    assert overview.loss == pytest.approx((2.0 * 30 + 4.0 * 10) / 40)
    assert (overview.held_out_step, overview.held_out_loss) == (2, 3.0)
    assert overview.round_s == 2.0


def test_what_is_anchored_is_what_half_of_the_peers_say_at_least() -> None:
    """A claim costs nothing: one peer alone moves nobody."""
    said = [trainer(i, anchored_step=step) for i, step in enumerate((2**50, 20, 20, 10, 0), 1)]
    assert overview_of(said, NOW_S).anchored_step == 20
    assert overview_of(said[:2], NOW_S).anchored_step == 20
    assert overview_of([], NOW_S).anchored_step == 0


def test_who_lies_or_errs_is_what_half_of_the_peers_say_at_least() -> None:
    said = [trainer(i, found_wrong=wrong, barred=wrong // 2) for i, wrong in enumerate((128, 3, 2, 2, 0), 1)]
    assert (overview_of(said, NOW_S).found_wrong, overview_of(said, NOW_S).barred) == (2, 1)
    assert (overview_of(said[:2], NOW_S).found_wrong, overview_of(said[:2], NOW_S).barred) == (3, 1)
    assert (overview_of([], NOW_S).found_wrong, overview_of([], NOW_S).barred) == (0, 0)


def test_nobody_there_is_no_step_and_no_loss() -> None:
    overview = overview_of([], NOW_S)
    assert (overview.step, overview.loss, overview.held_out_loss, overview.round_s) == (None, None, None, None)
    assert (overview.heads, overview.tokens, overview.tokens_per_s) == (0, 0, 0.0)
    assert overview.peers == dict.fromkeys(STATES, 0)


@pytest.mark.parametrize("role", ["trainer", "seed"])
@pytest.mark.parametrize("phase", ["joining", "inner", "gather", "reduce", "settle", "apply", "evaluate"])
def test_a_peer_is_in_one_state(role: Role, phase: Phase) -> None:
    trains = {"joining": "joining", "inner": "training", "evaluate": "training"}.get(phase, "round")
    assert state_of(trainer(1, role=role, phase=phase)) == ("seed" if role == "seed" else trains)


def test_heads_in_disagreement_are_counted_at_the_swarms_step_alone() -> None:
    same = [trainer(i, "ab") for i in (1, 2, 3)]
    assert overview_of([*same, trainer(4, "ax"), trainer(5, "a")], NOW_S).heads == 2
    assert overview_of([*same, trainer(4, "a")], NOW_S).heads == 1


def test_one_who_claims_to_be_far_ahead_moves_nothing() -> None:
    honest = [trainer(i, "ab", held_out_loss=2.0, held_out_step=2) for i in (1, 2, 3)]
    liar = trainer(4, "ab", step=2**50, held_out_loss=-1.0, held_out_step=2**50, head=head("zz"), heads=[])
    overview = overview_of([*honest, liar], NOW_S)
    assert (overview.step, overview.held_out_step, overview.held_out_loss) == (2, 2, 2.0)


def test_of_several_evaluations_of_a_step_the_middle_one_counts() -> None:
    records = [trainer(i, held_out_loss=loss, held_out_step=2) for i, loss in enumerate([2.1, -1e300, 2.2], 1)]
    assert overview_of(records, NOW_S).held_out_loss == 2.1


def test_trainers_without_a_speed_count_alike() -> None:
    assert overview_of([trainer(1, loss=1.0), trainer(2, loss=3.0)], NOW_S).loss == 2.0
    assert overview_of([trainer(1, loss=1.0), trainer(2, loss=3.0, tokens_per_s=1.0)], NOW_S).loss == 3.0


huge = st.floats(allow_nan=False, allow_infinity=False)


@given(st.lists(st.tuples(huge, huge.map(abs), huge.map(abs)), max_size=6))
def test_whatever_peers_claim_every_figure_is_finite(claims: list[tuple[float, float, float]]) -> None:
    records = [
        trainer(i, loss=loss, tokens_per_s=speed, round_s=round_s, group_size=1, held_out_loss=loss)
        for i, (loss, speed, round_s) in enumerate(claims, 1)
    ]
    overview = overview_of(records, NOW_S)
    figures = (overview.tokens_per_s, overview.loss, overview.held_out_loss, overview.round_s)
    assert all(figure is None or math.isfinite(figure) for figure in figures)


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0.1, 1e6)), min_size=1, max_size=8))
def test_the_mean_loss_is_that_of_the_textbook(pairs: list[tuple[float, float]]) -> None:
    records = [trainer(i, loss=loss, tokens_per_s=speed) for i, (loss, speed) in enumerate(pairs, 1)]
    expected = statistics.fmean([loss for loss, _ in pairs], [speed for _, speed in pairs])
    assert overview_of(records, NOW_S).loss == pytest.approx(expected)


# -- addresses ---------------------------------------------------------------------------------------------------------


def test_to_join_named_peers_come_first_then_seeds_then_the_most_public() -> None:
    records = [
        trainer(1, maddrs=[at(PRIVATE, 1), at(PUBLIC, 1)]),
        seed(2, maddrs=[at(PRIVATE, 2)]),
        trainer(3, maddrs=[at(PRIVATE, 3)]),
        trainer(4, maddrs=[at(PUBLIC, 4)], client_mode=True),
        trainer(5, maddrs=[at(PRIVATE, 5)]),
    ]
    named = [at("/ip4/10.0.0.9/tcp/4001", 5), at(PRIVATE, 9)]
    assert addresses_to_join(records, named) == [named[0], at(PRIVATE, 2), at(PUBLIC, 1)]
    assert addresses_to_join([], named) == []


def test_to_join_nothing_is_less_public_than_what_was_named() -> None:
    records = [trainer(1, maddrs=[at(PRIVATE, 1)]), trainer(2, maddrs=[at(LOOPBACK, 2), at(PUBLIC, 2)])]
    assert addresses_to_join(records, [at(PUBLIC, 9)]) == [at(PUBLIC, 2)]
    assert addresses_to_join(records, [at("/dns/example.org/tcp/1", 9)]) == [at(PUBLIC, 2)]
    assert addresses_to_join(records, [at(PRIVATE, 9)]) == [at(PUBLIC, 2), at(PRIVATE, 1)]


@pytest.mark.parametrize(
    "maddr",
    [
        "/ip6/fe80::1%$(reboot)/tcp/1",
        "/ip6/fe80::1%;reboot;/tcp/1",
        "/ip4/1.1.1.1/tcp/1; reboot",
        "/dns/`reboot`/tcp/1",
        "/dns/a b/tcp/1",
        "/ip4/1.1.1.1/udp/1",
        "",
    ],
)
def test_to_join_nothing_is_offered_that_a_shell_would_run(maddr: str) -> None:
    assert addresses_to_join([trainer(1, maddrs=[at(maddr, 1)])], [at(LOOPBACK, 9)]) == []


def test_to_join_nobody_offers_anothers_address() -> None:
    assert addresses_to_join([trainer(1, maddrs=[at(PUBLIC, 2)])], [at(PUBLIC, 9)]) == []


@given(st.text(max_size=60))
def test_to_join_what_is_offered_is_plain(text: str) -> None:
    for maddr in addresses_to_join([trainer(1, maddrs=[at(text, 1)])], [at(LOOPBACK, 9)]):
        assert set(maddr) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/.:_-")


def test_scraped_is_who_announces_a_public_address() -> None:
    records = [trainer(1, metrics_addr="1.1.1.1:9100"), trainer(2, metrics_addr="[2606:4700::1]:9100"), trainer(3)]
    public = {"1.1.1.1:9100": records[0], "[2606:4700::1]:9100": records[1]}
    assert scrape_targets(records, private=False) == scrape_targets(records, private=True) == public


def test_of_two_that_announce_the_same_address_the_first_has_it() -> None:
    records = [trainer(1, metrics_addr="1.1.1.1:9100"), trainer(2, metrics_addr="1.1.1.1:9100")]
    assert scrape_targets(records, private=False) == {"1.1.1.1:9100": records[0]}


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "127.9.9.9", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1"),
        *("169.254.169.254", "224.0.0.1", "239.1.1.1", "255.255.255.255", "240.0.0.1", "192.0.2.1"),
        *("[::]", "[::1]", "[fe80::1]", "[fc00::1]", "[fd12::1]", "[ff02::1]", "[ff0e::1]", "[2001:db8::1]"),
        *("[::ffff:10.0.0.1]", "[::ffff:1.1.1.1]", "[::10.0.0.1]", "[64:ff9b::a00:1]", "[2002:a00:1::1]", "[2001::1]"),
        *("localhost", "metadata.internal", "example.org"),
    ],
)
def test_into_a_private_network_nobody_is_sent_unless_it_is_asked_for(host: str) -> None:
    records = [trainer(1, metrics_addr=f"{host}:9100")]
    assert scrape_targets(records, private=False) == {}
    assert list(scrape_targets(records, private=True).values()) == records


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("addr", ["", "1.1.1.1:99999", "1.1.1.1:0", "-:80"])
def test_what_is_no_address_is_not_scraped(addr: str, private: bool) -> None:
    assert scrape_targets([trainer(1, metrics_addr=addr)], private=private) == {}
