"""One all-reduce, with senders and reducers written by hand that break one rule each: what that costs the round."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import msgpack
import numpy as np
import pytest

from p2p_diloco.core.aggregate import AggregateName
from p2p_diloco.core.codecs import CodecName, decode, encode
from p2p_diloco.core.errors import Gone, RemoteError
from p2p_diloco.core.recent import Recent
from p2p_diloco.core.signed_part import REDUCTION_BYTES, Contribution, Inputs, Reduction
from p2p_diloco.core.update import Part, contributor_mask
from p2p_diloco.core.waiting import now_s, run_all
from p2p_diloco.round import measured
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.message import Message
from p2p_diloco.wire.messages import No
from p2p_diloco.wire.round_messages import AskCommit, AskPart, Commit, Contribute, Receipt
from tests.support.builders import identity
from tests.support.fakes import FakeNetwork, run_simulated
from tests.support.meetings import (
    N_PARTS,
    PROTOCOL,
    SMALL_PART_VALUES,
    TIMEOUTS,
    Losses,
    Round,
    Transport,
    calm_rounds,
    frame_of,
)

pytestmark = pytest.mark.usefixtures("small_parts")


def all_opened(meeting: Round, reducer: int) -> bool:
    """Whether every other member has opened a stream to this one in the round's own butterfly."""
    senders = meeting.settlements[reducer].member.butterflies[0].intake.senders.values()
    return not any(sender.awaited for sender in senders)


# -- everybody is honest -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("codec", ["fp32", "int4"])
def test_all_commit_the_weighted_mean(count: int, codec: CodecName) -> None:
    async def main() -> None:
        meeting = Round(count, codec=codec, min_group=1)
        await meeting.run()
        update = meeting.update()
        assert list(update.parts) == meeting.means(range(count))
        assert update.header.contributors == tuple((peer_id, 100 * (i + 1)) for i, peer_id in enumerate(meeting.ids))
        meeting.check_blamed()
        await meeting.all_streams_end(1.0)
        for i, settlement in meeting.settlements.items():
            assert not meeting.complaints(i)
            cost = settlement.cost()
            assert min(cost.bytes_sent, cost.bytes_received) > 0 or count == 1

    run_simulated(main())


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_all_commit_the_robust_mean(count: int) -> None:
    """One of five and more points away from the others: it is in no part, and blamed for nothing."""

    async def main() -> None:
        meeting = Round(count, aggregate="robust", codec="int4", min_group=1)
        common = np.random.default_rng(2).standard_normal(meeting.n).astype(np.float32)
        for i, local in enumerate(meeting.locals):
            local -= 2 * common if i != count - 2 or count < 5 else -4 * common
        await meeting.run()
        update = meeting.update()
        assert list(update.parts) == meeting.means(range(count))
        inside = [i for i in range(count) if i != count - 2 or count < 5]
        assert {part.mask for part in update.parts} == {contributor_mask(inside)}
        meeting.check_blamed()

    run_simulated(main())


def test_a_part_is_taken_that_the_rule_made_without_most_of_the_known_members() -> None:
    """All contributions came. Three of the five known ones point away from the others, two newcomers among these."""

    async def main() -> None:
        meeting = Round(7, unknown=(1, 4), aggregate="robust")
        common = np.random.default_rng(2).standard_normal(meeting.n).astype(np.float32)
        away = (0, 3, 6)
        for i, local in enumerate(meeting.locals):
            local[:] = meeting.theta - (common + (meeting.theta - local) / 10) * (-1 if i in away else 1)
        await meeting.run()
        update = meeting.update()
        assert list(update.parts) == meeting.means(range(7))
        assert {part.mask for part in update.parts} == {contributor_mask([1, 2, 4, 5])}
        assert not any(settlement.meeting.refused for settlement in meeting.settlements.values())
        meeting.check_blamed()

    run_simulated(main())


@pytest.mark.parametrize("last", [None, 0.3])
def test_a_slow_member_takes_what_faster_ones_made(last: float | None) -> None:
    """In the first outer step learning rates rise from zero: who makes a tenth of the inner steps comes a hundredth of
    the way, and everybody else's mean looks long to it."""

    async def main() -> None:
        slow_first = (10, 200, 300, 400)
        meeting = Round(4, aggregate="robust", weights=slow_first)
        for tokens, local in zip(slow_first, meeting.locals):
            share = (tokens / 300) ** (1 if last else 2)
            local[:] = meeting.theta - np.float32(share) * np.ones(meeting.n, np.float32)
        for settlement in meeting.settlements.values():
            settlement.meeting.last_norms = None if last is None else [last] * N_PARTS
        await meeting.run()
        assert len(meeting.update().parts) == N_PARTS
        meeting.check_blamed()

    run_simulated(main())


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_contribution_of_any_size_moves_the_mean_no_further_than_the_others_go(count: int) -> None:
    async def main() -> None:
        meeting = Round(count, aggregate="robust", codec="fp32", n=N_PARTS * SMALL_PART_VALUES)
        honest = [meeting.theta - local for local in meeting.locals[:-1]]
        meeting.locals[-1][:] = -1e30
        await meeting.run()
        longest = 4 if count == 2 else 1
        for where, part in zip(meeting.slices, meeting.update().parts):
            norm = np.linalg.norm(decode(part.data, SMALL_PART_VALUES, "fp32").astype(np.float64))
            usual = max(float(np.linalg.norm(values[where])) for values in honest)
            assert norm <= longest * usual * (1 + 1e-6)

    run_simulated(main())


def test_client_mode_members_contribute_and_receive() -> None:
    async def main() -> None:
        meeting = Round(4, clients=(0, 2))
        await meeting.run()
        assert list(meeting.update().parts) == meeting.means(range(4))
        assert [i for i in meeting.honest if meeting.settlements[i].leads] == [1]
        reduced = {i: all_opened(meeting, i) for i in meeting.honest}
        assert reduced == {0: False, 1: True, 2: False, 3: True}, "streams come to those who can be dialled"
        meeting.check_blamed()

    run_simulated(main())


# -- shares by uplink --------------------------------------------------------------------------------------------------

FAST, SLOW = 1 << 20, 1 << 16
FIRST_IS_SLOW = ({}, *[{0: SLOW, **dict.fromkeys(range(1, 5), FAST)}] * 4)
"""What five members say of each other."""


def test_who_is_slow_leads_and_reduces_nothing() -> None:
    async def main() -> None:
        meeting = Round(5, uplinks=FIRST_IS_SLOW)
        await meeting.run()
        assert list(meeting.update().parts) == meeting.means(range(5))
        assert [i for i in meeting.honest if meeting.settlements[i].leads] == [0]
        for i in meeting.honest:
            assert meeting.settlements[i].part_counts == (0, 2, 2, 1, 1)
            reduced_by = [one.reducer for one in meeting.settlements[i].meeting.reductions if one is not None]
            assert reduced_by == [1, 2, 3, 4, 1, 2]
            came = all_opened(meeting, i)
            assert came == (i != 0), "nobody opens a stream to it, and it opens one to all others"
        meeting.check_blamed()
        await meeting.all_streams_end(1.0)

    run_simulated(main())


@pytest.mark.parametrize("dead", [(1,), (1, 2), (3, 4)])
def test_the_parts_of_fast_ones_that_die_are_shared_the_same_way(dead: tuple[int, ...]) -> None:
    async def main() -> None:
        meeting = Round(5, by_hand=dead, uplinks=FIRST_IS_SLOW)
        for i in dead:
            meeting.kill(i)
        await meeting.run()
        left = [i for i in range(5) if i not in dead]
        assert list(meeting.update().parts) == meeting.means(left)
        by = {one.reducer for one in meeting.settlements[0].meeting.reductions if one is not None}
        assert by == set(left) - {0}
        meeting.check_blamed(*dead)

    run_simulated(main())


@pytest.mark.parametrize("absurd", [0, 2**60])
def test_what_one_liar_says_of_the_others_changes_no_share(absurd: int) -> None:
    async def main() -> None:
        honest = dict.fromkeys(range(5), FAST)
        lie = dict.fromkeys(range(5), absurd)
        meeting = Round(5, uplinks=(honest, lie, *[honest] * 3))
        await meeting.run()
        assert list(meeting.update().parts) == meeting.means(range(5))
        assert [settlement.part_counts for settlement in meeting.settlements.values()] == [None] * 5
        meeting.check_blamed()

    run_simulated(main())


def test_with_equal_shares_none_are_told() -> None:
    async def main() -> None:
        meeting = Round(4)
        await meeting.run()
        assert [settlement.part_counts for settlement in meeting.settlements.values()] == [None] * 4

    run_simulated(main())


def test_a_reducer_measures_who_sends_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Member 3 sends a contribution of 168 bytes to each reducer every second. What member 2 sends at once is read no
    faster than that, and this is not its fault."""
    monkeypatch.setattr(measured, "LEAST_MEASURED_BYTES", 300)

    async def main() -> None:
        meeting = Round(4, by_hand=(2, 3), clients=(2, 3), n=16 * SMALL_PART_VALUES)

        async def send(me: int, to: int, every_s: float) -> None:
            channel = await meeting.contribute(me, to, 0)
            for part in meeting.parts_of(to):
                await asyncio.sleep(every_s)
                await channel.send_frame(meeting.signed(me, part))

        await meeting.run(*(send(2, to, 0.0) for to in (0, 1)), *(send(3, to, 1.0) for to in (0, 1)))
        for i in (0, 1):
            uplinks = meeting.settlements[i].member.butterflies[0].uplinks()
            assert uplinks.keys() == {1 - i, 2, 3}
            assert uplinks[3] == 2 * 168, "to two reducers"
            assert min(uplinks[1 - i], uplinks[2]) > 100 * 168

    run_simulated(main())


def test_what_a_reducer_sends_beside_its_contributions_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Member 2 would reduce as much as the others: it has contributions for two, and means for two."""
    monkeypatch.setattr(measured, "LEAST_MEASURED_BYTES", 300)

    async def main() -> None:
        meeting = Round(3, by_hand=(2,), n=15 * SMALL_PART_VALUES)

        async def send(to: int) -> None:
            channel = await meeting.contribute(2, to, 0)
            for part in meeting.parts_of(to):
                await asyncio.sleep(1.0)
                await channel.send_frame(meeting.signed(2, part))

        await meeting.run(send(0), send(1))
        assert [meeting.settlements[i].uplinks()[2] for i in (0, 1)] == [4 * 168] * 2

    run_simulated(main())


def test_nobody_measures_who_cannot_reduce(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "LEAST_MEASURED_BYTES", 0)

    async def main() -> None:
        meeting = Round(3, clients=(2,))
        await meeting.run()
        assert [sorted(one.uplinks()) for one in meeting.settlements.values()] == [[1], [0], []]

    run_simulated(main())


# -- senders: member 2 is a client, so the parts 0, 2, 4 are member 0's to reduce and 1, 3, 5 member 1's -----------


async def nothing_more(channel: Channel) -> None:
    """Keeps the stream open and reads."""


async def close(channel: Channel) -> None:
    channel.close()


def changed(data: bytes) -> bytes:
    """With a scale that is not a number."""
    return np.float32(np.nan).tobytes() + data[4:]


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda data: data[:-1], "Misbehaved: sends a contribution that does not decode: 103 bytes for 100 values"),
        (lambda data: b"", "Misbehaved: sends a contribution that does not decode: 0 bytes"),
        (lambda data: data[:68], "Misbehaved: sends a contribution that does not decode: 4 bytes"),
        (lambda data: data + b"x", "Misbehaved: announces a frame of 169 bytes where at most 168 are due"),
        (lambda data: data * 4, "Misbehaved: announces a frame of 672 bytes where at most 168 are due"),
        (changed, "Misbehaved: sends a contribution that does not decode: a scale is not finite"),
        (lambda data: np.float32(1e30).tobytes() + data[4:], "or too large"),
        (lambda data: np.float32(-1).tobytes() + data[4:], "negative"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "Misbehaved: sends a contribution to part"),
        (lambda data: data[:9] + bytes([data[9] ^ 1]) + data[10:], "that it did not sign"),
    ],
)
@pytest.mark.parametrize("good_parts", [0, 2])
def test_a_contribution_that_does_not_decode(
    losses: Losses, good_parts: int, spoil: Callable[[bytes], bytes], why: str
) -> None:
    async def main() -> None:
        meeting = Round(3, by_hand=(2,), clients=(2,), n=600)

        async def send(to: int) -> None:
            channel = await meeting.contribute(2, to, good_parts)
            await asyncio.sleep(0.5)
            await channel.send_frame(spoil(meeting.signed(2, 0)))

        began_s = now_s()
        await meeting.run(send(0), send(1))
        left_out_from = 2 * good_parts
        expected = meeting.means(range(3))[:left_out_from] + meeting.means(range(2))[left_out_from:]
        assert list(meeting.update().parts) == expected
        meeting.check_blamed(2)
        assert all(why in reason for i in (0, 1) for _, reason in losses.by(i)), losses
        assert now_s() - began_s < 5, "nobody waits for one that was caught"
        await meeting.all_streams_end()

    run_simulated(main())


@pytest.mark.parametrize(
    ("then", "why", "costs_s"),
    [(close, "Gone: closed the stream", 0.0), (nothing_more, "silent", TIMEOUTS.part_s)],
)
@pytest.mark.parametrize("k", [0, 1, 2])
def test_a_sender_that_stops_after_part_k(
    losses: Losses, k: int, then: Callable[[Channel], Awaitable[None]], why: str, costs_s: float
) -> None:
    async def main() -> None:
        meeting = Round(3, by_hand=(2,), clients=(2,))

        async def send(to: int) -> None:
            channel = await meeting.contribute(2, to, k)
            await asyncio.sleep(0.5)
            await then(channel)

        began_s = now_s()
        await meeting.run(send(0), send(1))
        assert list(meeting.update().parts) == meeting.means(range(3))[: 2 * k] + meeting.means(range(2))[2 * k :]
        meeting.check_blamed(2)
        assert losses.by(0) == losses.by(1) == [(2, why)]
        assert costs_s <= now_s() - began_s < costs_s + 3
        await meeting.all_streams_end()

    run_simulated(main())


@pytest.mark.parametrize(
    ("recent", "costs_s"), [(Recent(), TIMEOUTS.part_s), (calm_rounds(), TIMEOUTS.least_wait_s)], ids=("first", "calm")
)
def test_a_member_that_never_comes(losses: Losses, recent: Recent, costs_s: float) -> None:
    async def main() -> None:
        meeting = Round(3, by_hand=(2,), clients=(2,), recent=recent)
        await meeting.run()
        assert list(meeting.update().parts) == meeting.means(range(2))
        meeting.check_blamed(2)
        assert losses.by(0) == losses.by(1) == [(2, "silent")]
        assert costs_s <= max(meeting.took_s.values()) < costs_s + 0.5

    run_simulated(main())


def test_a_sender_that_comes_too_late_is_served_but_not_for_ever(losses: Losses) -> None:
    """It sends all it has after the reducers gave it up: nobody takes its contributions from the queues any more."""

    async def main() -> None:
        meeting = Round(3, by_hand=(2,), clients=(2,), n=907)
        got: dict[int, list[Part]] = {}

        async def send(to: int) -> None:
            channel = await meeting.contribute(2, to, 0)
            await asyncio.sleep(TIMEOUTS.part_s + 1)
            for part in meeting.parts_of(to):
                await channel.send_frame(meeting.signed(2, part))
            got[to] = []
            for _ in meeting.parts_of(to):
                data = (await channel.receive_frame(1000, 10.0))[:-REDUCTION_BYTES]
                got[to].append(Part(mask=data[1 : 1 + data[0]], data=data[1 + data[0] :]))

        await meeting.run(send(0), send(1))
        update = meeting.update()
        assert list(update.parts) == meeting.means(range(2))
        assert sorted(losses) == [(0, 2, "silent"), (1, 2, "silent")]
        assert (got[0], got[1]) == (list(update.parts[0::2]), list(update.parts[1::2]))
        await meeting.all_streams_end()

    run_simulated(main())


def test_a_sender_that_is_lost_while_its_contributions_wait(losses: Losses) -> None:
    """Member 1 sends nothing, so those of member 2 wait; then member 2 fails as a reducer."""

    async def main() -> None:
        meeting = Round(3, by_hand=(1, 2), n=1507)  # member 0 reduces 0, 3, 6, 9, 12
        meeting.serve(2, lambda channel, message: asyncio.sleep(1.0))

        async def send() -> None:
            await meeting.contribute(2, 0)

        await meeting.run(send())
        assert (2, "Gone: closed the stream") in losses.by(0)
        assert meeting.lost(0) == {1, 2}
        await meeting.all_streams_end(10.0)

    run_simulated(main())


def test_a_third_stream_of_one_sender(losses: Losses) -> None:
    async def main() -> None:
        meeting = Round(3, by_hand=(2,), clients=(2,))

        async def send(to: int) -> None:
            for _ in range(3):
                await meeting.contribute(2, to)
            if to == 0:
                await meeting.receipt(2, 0, [b""] * N_PARTS)

        await meeting.run(send(0), send(1))
        assert list(meeting.update().parts) == meeting.means(range(3)), "counted, and counted once"
        for i in (0, 1):
            assert meeting.complaints(i) == [(2, "opens more than 2 streams in a round")]
        assert not losses

    run_simulated(main())


# -- a sender behind a slow line -----------------------------------------------------------------------------------

MANY = 40 * SMALL_PART_VALUES
NARROW = replace(TIMEOUTS, slow_rate_bytes_per_s=1000.0, part_s=3.0)


def behind_a_slow_line(rate_bytes_per_s: float, **how: Any) -> Round:
    """Member 3 of four is a client behind it. The others need some milliseconds for each part."""
    network = FakeNetwork(latency_s=0.01, buffer_bytes=256)
    meeting = Round(4, clients=(3,), n=MANY, network=network, **{"timeouts": NARROW, **how})
    meeting.network.uplinks = dict.fromkeys(meeting.ids, 50_000.0) | {meeting.ids[3]: rate_bytes_per_s}
    return meeting


def took_s(rate_bytes_per_s: float, **how: Any) -> tuple[float, float, Round]:
    """How long the others took, and the slow one."""

    async def main() -> Round:
        meeting = behind_a_slow_line(rate_bytes_per_s, **how)
        await meeting.run()
        return meeting

    meeting = run_simulated(main())
    return max(meeting.took_s[i] for i in range(3)), meeting.took_s[3], meeting


def test_a_sender_that_is_slow_is_waited_for_once() -> None:
    """Its contribution to all parts is some 7 kB, and its line makes 300 B/s of the 1,000 B/s that are asked of it."""
    alone_s, _, _ = took_s(50_000.0)
    first_s, _, first = took_s(300.0)
    then_s, slow_s, then = took_s(300.0, lapsed=(3,))
    assert first.lost(0) == then.lost(0) == {3}
    assert NARROW.part_s < first_s < NARROW.part_s + 7_000 / 1_000
    assert then_s < 1.3 * alone_s
    assert slow_s < 0.6 * 7_000 / 300, "it sends no more than what still counts"
    assert then.outcomes[3] == then.outcomes[0]


def test_a_sender_that_is_fast_enough_counts_whole_however_long_that_takes() -> None:
    others_s, _, meeting = took_s(1200.0)
    assert others_s > 2 * NARROW.part_s
    assert list(meeting.update().parts) == meeting.means(range(4))
    assert not any(meeting.lost(i) for i in range(4))


@pytest.mark.parametrize("measured", [{}, {3: 1200}, {3: 50_000}])
def test_calm_rounds_let_nobody_fall_that_sends_as_fast_as_was_measured(measured: dict[int, int]) -> None:
    """Each of its contributions takes half a second, and such waits are short here. Who is not measured is waited for
    as long as who may just be that slow."""
    calm, waits = calm_rounds(), replace(NARROW, least_wait_s=0.1)
    _, _, meeting = took_s(1200.0, recent=calm, measured=measured, timeouts=waits)
    assert meeting.lost(0) == ({3} if measured == {3: 50_000} else set())


@pytest.mark.parametrize("lapsed", [(3,), (2, 3), (0, 1, 2, 3)])
def test_who_was_late_before_and_comes_in_time_is_in_all_parts(lapsed: tuple[int, ...]) -> None:
    """Also where all have lost each other, as the two sides of a network that was cut have."""
    _, _, meeting = took_s(50_000.0, lapsed=lapsed)
    assert list(meeting.update().parts) == meeting.means(range(4))


def test_what_has_come_in_time_of_a_sender_that_is_slow_counts(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    _, _, meeting = took_s(300.0)
    masks = [part.mask for part in meeting.update().parts]
    with_it, without = contributor_mask(range(4)), contributor_mask(range(3))
    for reducer in range(3):
        mine = masks[reducer::3]
        came = mine.count(with_it)
        assert mine == [with_it] * came + [without] * (len(mine) - came)
        assert 0 < came < len(mine)
    assert f"{meeting.ids[3][-8:]} is late with part " in caplog.text
    assert ", waited " in caplog.text


# -- a stream that closes at once, while both of its ends are there ------------------------------------------------


@pytest.mark.parametrize("sender", [0, 1, 4])
@pytest.mark.parametrize("aggregate", ["mean", "robust"])
def test_a_stream_that_closes_at_once_is_tried_again(
    losses: Losses, sender: int, aggregate: AggregateName, caplog: pytest.LogCaptureFixture
) -> None:
    """Member 4 is a client. One stream of the sender to each reducer is reset as soon as it is open."""
    caplog.set_level(logging.INFO)

    async def main() -> None:
        meeting = Round(5, clients=(4,), aggregate=aggregate)
        reducers = [i for i in range(4) if i != sender]
        meeting.trouble.closing += [(meeting.ids[sender], meeting.ids[i]) for i in reducers]
        await meeting.run()
        assert not meeting.trouble.closing
        assert list(meeting.update().parts) == meeting.means(range(5))
        meeting.check_blamed()
        assert not losses
        assert max(meeting.took_s.values()) < 1.0
        assert {why for i in meeting.honest for _, why in meeting.complaints(i)} == {"closed the stream"}
        assert caplog.text.count("closed the stream at once: tried again") == len(reducers)

    run_simulated(main())


@pytest.mark.parametrize("after_s", [0.0, 0.005, 0.01, 0.015, 0.02, 0.025])
def test_it_may_be_on_its_way_when_the_stream_closes(losses: Losses, after_s: float) -> None:
    """The reducer may have heard of the stream, may have taken something that came over it, or may wait for others."""

    async def main() -> None:
        meeting = Round(4, clients=(3,), n=1207, network=FakeNetwork(latency_s=0.01))

        async def reset() -> None:
            await asyncio.sleep(meeting.network.latency_s + 0.001 + after_s)
            meeting.network.reset(meeting.ids[3], meeting.ids[1])

        await meeting.run(reset())
        assert not [one for i in meeting.honest for one in meeting.complaints(i) if "more than" in one[1]]
        assert max(meeting.took_s.values()) < 1.0
        parts = list(meeting.update().parts)
        assert all(part in (meeting.mean(i, range(4)), meeting.mean(i, range(3))) for i, part in enumerate(parts))
        if after_s < 0.01:
            assert parts == meeting.means(range(4))
        if parts == meeting.means(range(4)):
            assert not losses
        else:
            assert set(losses) == {(1, 3, "Gone: closed the stream")}
        await meeting.all_streams_end()

    run_simulated(main())


@pytest.mark.parametrize("after_s", [0.0, 0.5, TIMEOUTS.heartbeat_s - 0.2, TIMEOUTS.heartbeat_s + 0.2])
def test_a_stream_that_closes_twice_or_later_is_not_tried_again(losses: Losses, after_s: float) -> None:
    """Nobody comes after the second try, and the reducer, played by hand, is the only one that is lost."""

    async def main() -> None:
        meeting = Round(3, by_hand=(2,))
        opened: Counter[str] = Counter()

        async def close_later(channel: Channel, message: Message) -> None:
            if isinstance(message, Contribute):
                opened[channel.peer_id] += 1
                await asyncio.sleep(after_s)

        meeting.serve(2, close_later)

        async def send(to: int) -> None:
            await meeting.contribute(2, to)

        await meeting.run(send(0), send(1))
        times = 2 if after_s < TIMEOUTS.heartbeat_s else 1
        assert opened == {meeting.ids[0]: times, meeting.ids[1]: times}
        assert losses.by(0)[0] == (2, "Gone: closed the stream")

    run_simulated(main())


def test_a_client_whose_streams_close_for_good_costs_no_more_than_the_wait_for_a_second_one(losses: Losses) -> None:
    async def main() -> None:
        meeting = Round(3, by_hand=(2,), clients=(2,))

        async def send(to: int) -> None:
            (await meeting.contribute(2, to, 0)).close()

        await meeting.run(send(0), send(1))
        assert list(meeting.update().parts) == meeting.means(range(2))
        assert losses.by(0) == losses.by(1) == [(2, "Gone: closed the stream")]
        assert TIMEOUTS.again_s < max(meeting.took_s.values()) < TIMEOUTS.again_s + 0.3

    run_simulated(main())


def test_a_second_stream_goes_on_where_the_first_one_is_still_open(losses: Losses) -> None:
    """The sender has given its first stream up, for which the reducer has no sign: it holds one part of it."""

    async def main() -> None:
        meeting = Round(3, by_hand=(2,), clients=(2,))
        got: list[Part] = []

        async def send(to: int) -> None:
            await meeting.contribute(2, to, 1)
            await asyncio.sleep(0.5)
            channel = await meeting.contribute(2, to)
            for _ in meeting.parts_of(to):
                data = (await channel.receive_frame(1000, 10.0))[:-REDUCTION_BYTES]
                got.append(Part(mask=data[1 : 1 + data[0]], data=data[1 + data[0] :]))

        await meeting.run(send(0), send(1))
        update = meeting.update()
        assert list(update.parts) == meeting.means(range(3))
        assert sorted(got, key=lambda part: part.data) == sorted(update.parts, key=lambda part: part.data)
        assert not [loss for loss in losses if loss[2] != "silent"], "no receipt came"
        assert not any(meeting.complaints(i) for i in (0, 1))
        await meeting.all_streams_end()

    run_simulated(main())


def test_a_sender_that_never_reads(losses: Losses) -> None:
    async def main() -> None:
        meeting = Round(3, by_hand=(2,), clients=(2,))
        for i in (0, 1):
            meeting.trouble.deaf[meeting.ids[i]] = {meeting.ids[2]}

        async def send(to: int) -> None:
            await meeting.contribute(2, to)

        began_s = now_s()
        await meeting.run(send(0), send(1))
        update = meeting.update()
        assert update.parts[0] == meeting.mean(0, range(3))
        assert update.parts[4] in (meeting.mean(4, range(3)), meeting.mean(4, range(2)))
        assert 2 in meeting.lost(0)
        assert now_s() - began_s < TIMEOUTS.write_s + TIMEOUTS.part_s + TIMEOUTS.settle_s
        await meeting.all_streams_end()
        for i in (0, 1):
            assert (2, "does not read what we send") in meeting.complaints(i)

    run_simulated(main())


def test_strangers_have_no_say_in_a_round(losses: Losses) -> None:
    async def main() -> None:
        meeting = Round(2)
        stranger = Transport(meeting.network, identity(99).peer_id, TIMEOUTS)
        gone = []

        async def meddle(message: Message) -> None:
            channel = await stranger.open(meeting.ids[0], [], PROTOCOL)
            await channel.send(message)
            try:
                await channel.receive_frame(1000, 10.0)
            except RemoteError as error:
                gone.append(error.reason)

        round_id = meeting.round_id
        await meeting.run(
            meddle(Contribute(round_id=round_id)),
            meddle(Receipt(round_id=round_id, part_hashes=[bytes(32)] * N_PARTS)),
            meddle(AskPart(round_id=round_id, part=0, hash=meeting.mean(0, range(2)).hash)),
            meddle(AskCommit(round_id=round_id)),
        )
        assert list(meeting.update().parts) == meeting.means(range(2))
        complaints = [(error.peer_id, error.reason) for error in meeting.transports[0].complaints]
        assert complaints == [(stranger.peer_id, "meddles with a round that it is no member of")] * 4
        assert gone == ["closed the stream"] * 4
        assert not losses

    run_simulated(main())


def test_a_sender_that_takes_almost_every_time_out(losses: Losses) -> None:
    """It makes no reducer late: waiting for one sender has a limit as a whole."""

    async def main() -> None:
        meeting = Round(4, by_hand=(3,), clients=(3,), n=(5 * N_PARTS - 1) * 100)
        began_s = now_s()

        async def send(to: int) -> None:
            channel = await meeting.contribute(3, to, 0)
            for part in meeting.parts_of(to):
                await asyncio.sleep(TIMEOUTS.part_s - 1)
                await channel.send_frame(meeting.signed(3, part))

        await meeting.run(*(send(i) for i in range(3)))
        late = [part for i in range(3) for part in meeting.parts_of(i)[1:]]
        assert list(meeting.update().parts) == meeting.means(range(4), but=late, of=(0, 1, 2))
        meeting.check_blamed(3)
        assert meeting.took_s[0] == pytest.approx(TIMEOUTS.part_s, abs=2)
        assert now_s() - began_s < 100
        await meeting.all_streams_end()

    run_simulated(main())


# -- reducers: member 2 of three has parts 2 and 5 ------------------------------------------------------------------


Answers = Callable[[int, Part], Part | bytes | None]
"""(to whom, what an honest reducer would answer) -> the part that it signs and sends; the frame, where it is no such
part; or None to end the stream."""


async def reduce_by_hand(
    meeting: Round, answers: Answers, receipt: Sequence[bytes] | None, held: Part | None = None
) -> None:
    """Member 2 contributes as it should, answers as a reducer what ``answers`` says, and gives ``held`` afterwards."""

    async def hand(channel: Channel, message: Message) -> None:
        if isinstance(message, AskPart):
            if held is not None:
                await meeting.answer_part(channel, message.part, held)
            return
        for part in meeting.parts_of(2):
            await channel.receive_frame(1000, 10.0)
            frame = answers(meeting.ids.index(channel.peer_id), meeting.mean(part, range(meeting.count)))
            if frame is None:
                return
            await channel.send_frame(meeting.frame(part, frame) if isinstance(frame, Part) else frame)

    meeting.serve(2, hand)
    for i in meeting.honest:
        await meeting.contribute(2, i)
    if receipt is not None:
        await meeting.receipt(2, 0, receipt)


Spoil = Callable[[Part], Part | bytes | None]
SPOILED: list[tuple[Spoil, str]] = [
    (lambda part: None, "Gone: closed the stream"),
    (lambda part: b"", "Misbehaved: sends part 2 with a wrong length"),
    (lambda part: msgpack.packb(["no", {"reason": "leaving"}]), "Refused: leaving"),
    (lambda part: msgpack.packb(["closing", {}]), "Misbehaved: sends part 2 with a wrong length"),
    (lambda part: frame_of(part)[:-1], "Misbehaved: sends part 2 with a wrong length"),
    (lambda part: frame_of(part) + b"x", "Misbehaved: sends part 2 with a wrong length"),
    (lambda part: frame_of(part) + bytes(200), "Misbehaved: announces a frame of 436 bytes where at most 267 are due"),
    (lambda part: bytes([33]) + bytes(32) + frame_of(part)[2:], "Misbehaved: sends part 2 with a wrong length"),
    (
        lambda part: Part(mask=part.mask, data=changed(part.data)),
        "Misbehaved: sends part 2 that does not decode: a scale",
    ),
    (
        lambda part: Part(mask=b"\x0f", data=part.data),
        "Misbehaved: sends part 2 that does not decode: a mask names others",
    ),
    (
        lambda part: Part(mask=b"\x07\x00", data=part.data),
        "Misbehaved: sends part 2 that does not decode: a mask names others",
    ),
    (frame_of, "Misbehaved: sends part 2 that its reducer did not sign"),
]


@pytest.mark.parametrize(("spoil", "why"), SPOILED, ids=[str(i) for i in range(len(SPOILED))])
def test_a_reducer_whose_means_are_no_parts(losses: Losses, spoil: Spoil, why: str) -> None:
    """Its parts are reduced again, without it; its contributions to the others' parts count."""

    async def main() -> None:
        meeting = Round(3, by_hand=(2,))
        began_s = now_s()
        await meeting.run(reduce_by_hand(meeting, lambda _, part: spoil(part), receipt=None))
        assert list(meeting.update().parts) == meeting.means(range(3), but=(2, 5), of=(0, 1))
        assert now_s() - began_s < 3, "who is caught costs no time"
        meeting.check_blamed(2)
        assert [len(losses.by(i)) for i in (0, 1)] == [1, 1]
        assert all(reason.startswith(why) for _, _, reason in losses), losses
        await meeting.all_streams_end()

    run_simulated(main())


def scaled(meeting: Round, part: Part, factor: float) -> Part:
    """All values of a part that is not the last, times a factor."""
    values = decode(part.data, SMALL_PART_VALUES, meeting.codec)
    return Part(mask=part.mask, data=encode(values * np.float32(factor), meeting.codec))


@pytest.mark.parametrize("factor", [-100.0, 100.0, 1e28])
def test_a_reducer_whose_mean_is_longer_than_honest_ones_are(losses: Losses, factor: float) -> None:
    """Who receives it is without that part, and blames the reducer."""

    async def main() -> None:
        meeting = Round(3, by_hand=(2,), aggregate="robust", n=N_PARTS * SMALL_PART_VALUES)
        await meeting.run(reduce_by_hand(meeting, lambda _, part: scaled(meeting, part, factor), receipt=None))
        assert list(meeting.update().parts) == meeting.means(range(3), but=(2, 5), of=(0, 1))
        meeting.check_blamed(2)
        assert all(reason.startswith("Misbehaved: sends part 2 with a norm of") for _, _, reason in losses), losses

    run_simulated(main())


def test_a_mean_of_what_the_last_update_was_is_no_lie(losses: Losses) -> None:
    """The same lie, where the last update was as long."""

    async def main() -> None:
        meeting = Round(3, by_hand=(2,), aggregate="robust", n=N_PARTS * SMALL_PART_VALUES)
        for settlement in meeting.settlements.values():
            settlement.meeting.last_norms = [100.0] * N_PARTS
        lied = [part if i in (2, 5) else None for i, part in enumerate(meeting.means(range(3)))]
        lied = [part and scaled(meeting, part, -10.0) for part in lied]
        await meeting.run(
            reduce_by_hand(
                meeting,
                lambda _, part: scaled(meeting, part, -10.0),
                receipt=[part.hash if part else b"" for part in lied],
            )
        )
        assert [part for i, part in enumerate(meeting.update().parts) if i in (2, 5)] == [lied[2], lied[5]]
        assert not losses

    run_simulated(main())


def test_a_mean_that_another_member_took_is_refused_without_blaming_that_one(losses: Losses) -> None:
    """The leader expects shorter means than 1 does, who has the last update: it settles on others."""

    async def main() -> None:
        meeting = Round(3, by_hand=(2,), aggregate="robust", n=N_PARTS * SMALL_PART_VALUES)
        meeting.settlements[1].meeting.last_norms = [1000.0] * N_PARTS
        await meeting.run(reduce_by_hand(meeting, lambda _, part: scaled(meeting, part, -100.0), receipt=None))
        assert meeting.settlements[0].meeting.refused, "1 held what the leader refuses"
        assert list(meeting.update().parts) == meeting.means(range(3), but=(2, 5), of=(0, 1))
        assert {(by, member) for by, member, _ in losses} == {(0, 2)}, "who believed it had no reason to complain"

    run_simulated(main())


def test_a_committed_part_that_is_too_long_is_not_signed(losses: Losses) -> None:
    """A leader whose means were sound commits others, which it has made up. The next leader commits what was
    reduced."""

    async def main() -> None:
        meeting = Round(3, by_hand=(0,), aggregate="robust", n=N_PARTS * SMALL_PART_VALUES)
        lied = [scaled(meeting, part, 1e28) for part in meeting.means(range(3))]

        async def hand(channel: Channel, message: Message) -> None:
            if isinstance(message, Receipt):
                hashes, holders = [part.hash for part in lied], [0] * N_PARTS
                await channel.send(Commit(part_hashes=hashes, holders=holders))
                await channel.receive(No, timeout_s=10.0)
                await channel.send(No(reason="most of the group did not sign the update"))
            elif isinstance(message, AskPart):
                await meeting.answer_part(channel, message.part, lied[message.part])
            else:
                for part in meeting.parts_of(0):
                    await channel.receive_frame(1000, 10.0)
                    await channel.send_frame(meeting.frame(part, meeting.mean(part, range(3))))

        async def contribute() -> None:
            for i in meeting.honest:
                await meeting.contribute(0, i)

        meeting.serve(0, hand)
        await meeting.run(contribute())
        assert list(meeting.update().parts) == meeting.means(range(3))
        complaint = "Refused: commits what most do not sign: part 0 is not what its reducer sent me"
        assert sorted(losses) == [(i, 0, complaint) for i in (1, 2)]

    run_simulated(main())


@pytest.mark.parametrize(
    ("mask", "senders", "why"),
    [
        (b"\x06", b"\x07", "that no rule makes of what came to its reducer"),
        (b"\x07", b"\x06", "that no rule makes of what came to its reducer"),
        (b"\x07", b"\x0f", "that does not decode: a mask names others than the 3 contributors"),
    ],
)
def test_a_mean_of_others_than_have_sent(losses: Losses, mask: bytes, senders: bytes, why: str) -> None:
    """Of three nobody may be left out that is said to have sent."""

    async def main() -> None:
        meeting = Round(3, by_hand=(2,))
        told = Part(mask=mask, data=meeting.mean(2, range(3)).data)
        sent = meeting.frame(2, told, senders)
        await meeting.run(reduce_by_hand(meeting, lambda *_: sent, receipt=None))
        assert list(meeting.update().parts) == meeting.means(range(3), but=(2, 5), of=(0, 1))
        assert losses.by(0) == losses.by(1) == [(2, f"Misbehaved: sends part 2 {why}")]

    run_simulated(main())


@pytest.mark.parametrize(
    ("by", "at", "number"),
    [(1, 2, 0), (2, 5, 0), (2, 2, 1), (9, 2, 0)],
    ids=["another reducer's", "another part's", "another butterfly's", "nobody's"],
)
def test_a_mean_that_is_signed_for_something_else(losses: Losses, by: int, at: int, number: int) -> None:
    """Neither another member's signature nor one for another place makes a part."""

    async def main() -> None:
        meeting = Round(3, by_hand=(2,))
        told = meeting.mean(2, range(3))
        signer = meeting.members[by] if by < 3 else identity(99)
        inputs = Inputs.of({i: meeting.sent(i, 2) for i in range(3)})
        signed = Reduction.of(meeting.place(at, number), told, inputs, by, signer).to_bytes()
        sent = frame_of(told, bytes([0]) + signed[1:])
        await meeting.run(reduce_by_hand(meeting, lambda *_: sent, receipt=None))
        assert list(meeting.update().parts) == meeting.means(range(3), but=(2, 5), of=(0, 1))
        why = "sends part 2 of another reducer" if by == 1 else "sends part 2 that its reducer did not sign"
        assert losses.by(0) == losses.by(1) == [(2, f"Misbehaved: {why}")]

    run_simulated(main())


def test_a_contribution_that_is_signed_for_another_round(losses: Losses) -> None:
    """A reducer cannot be given, or show, what somebody has sent at another time."""

    async def main() -> None:
        meeting = Round(3, by_hand=(2,), clients=(2,))

        async def send(to: int) -> None:
            channel = await meeting.contribute(2, to, 0)
            old = replace(meeting.place(meeting.parts_of(to)[0]), round_id=bytes(32))
            sent = Contribution.of(old, meeting.contribution(2, old.part), meeting.members[2])
            await channel.send_frame(sent.data + sent.signature)

        await meeting.run(send(0), send(1))
        assert list(meeting.update().parts) == meeting.means(range(2))
        complaint = "Misbehaved: sends a contribution to part {} that it did not sign"
        assert [losses.by(i) for i in (0, 1)] == [[(2, complaint.format(i))] for i in (0, 1)]

    run_simulated(main())


def test_a_reducer_that_claims_to_hold_what_it_gives_to_nobody(losses: Losses) -> None:
    async def main() -> None:
        meeting = Round(3, by_hand=(2,))
        claimed = [part.hash for part in meeting.means(range(3))]
        await meeting.run(reduce_by_hand(meeting, lambda *_: None, receipt=claimed))
        assert list(meeting.update().parts) == meeting.means(range(3), but=(2, 5), of=(0, 1))
        meeting.check_blamed(2)

    run_simulated(main())


def test_a_holder_that_gives_other_bytes(losses: Losses) -> None:
    """A sound part, but not the one of the commit."""

    async def main() -> None:
        meeting = Round(3, by_hand=(2,))
        await meeting.run(
            reduce_by_hand(
                meeting,
                lambda *_: None,
                receipt=[part.hash for part in meeting.means(range(3))],
                held=meeting.mean(2, range(2)),
            )
        )
        assert list(meeting.update().parts) == meeting.means(range(3), but=(2, 5), of=(0, 1))
        assert meeting.complaints(2) == []
        meeting.check_blamed(2)

    run_simulated(main())


def test_a_reducer_that_tells_everybody_something_else(losses: Losses, caplog: pytest.LogCaptureFixture) -> None:
    """Settling shows it, and makes one set of bytes of it."""

    async def main() -> None:
        meeting = Round(4, by_hand=(2,))  # its parts: 2
        mean = meeting.mean(2, range(4))
        told = {0: mean, 1: mean, 3: Part(mask=mean.mask, data=encode(np.zeros(100, np.float32), "int8"))}
        with caplog.at_level(logging.WARNING):
            await meeting.run(
                reduce_by_hand(
                    meeting,
                    lambda to, part: told[to],
                    receipt=[part.hash for part in meeting.means(range(4))],
                )
            )
        assert list(meeting.update().parts) == meeting.means(range(4))
        assert "part 2: its reducer sent different bytes to different members" in caplog.text
        assert not losses
        await meeting.all_streams_end()

    run_simulated(main())


def test_a_reducer_that_dies_after_it_told_one(losses: Losses) -> None:
    """Who has a part gives it to the others."""

    async def main() -> None:
        meeting = Round(3, by_hand=(2,))
        await meeting.run(reduce_by_hand(meeting, lambda to, part: part if to == 1 else None, receipt=None))
        assert list(meeting.update().parts) == meeting.means(range(3))
        assert meeting.lost(0) == {2}
        assert losses.by(0) == [(2, "Gone: closed the stream")]

    run_simulated(main())


def test_a_reducer_that_never_reads_or_answers(losses: Losses) -> None:
    async def main() -> None:
        meeting = Round(3, by_hand=(2,))
        for i in meeting.honest:
            meeting.trouble.deaf[meeting.ids[i]] = {meeting.ids[2]}

        async def hand(channel: Channel, message: Message) -> None:
            await asyncio.sleep(500)

        meeting.serve(2, hand)
        began_s = now_s()

        async def send(to: int) -> None:
            await meeting.contribute(2, to)

        await meeting.run(send(0), send(1))
        assert list(meeting.update().parts) == meeting.means(range(3), but=(2, 5), of=(0, 1))
        meeting.check_blamed(2)
        assert {reason for _, _, reason in losses} == {"Silent: does not read what we send"}
        assert now_s() - began_s < TIMEOUTS.write_s + 3
        await meeting.all_streams_end()

    run_simulated(main())


def test_a_reducer_that_takes_almost_every_time_out(losses: Losses) -> None:
    """Reducing has a limit as a whole, too; there is time left then to do without the one that is slow."""

    async def main() -> None:
        meeting = Round(3, by_hand=(2,), n=(4 * N_PARTS - 1) * 100)

        async def hand(channel: Channel, message: Message) -> None:
            for part in meeting.parts_of(2):
                await asyncio.sleep(TIMEOUTS.reduced_part_s - 1)
                await channel.send_frame(meeting.frame(part, meeting.mean(part, range(3))))

        async def send(to: int) -> None:
            await meeting.contribute(2, to)

        meeting.serve(2, hand)
        began_s = now_s()
        await meeting.run(send(0), send(1))
        update = meeting.update()
        late = meeting.parts_of(2)[1:]
        assert list(update.parts) == meeting.means(range(3), but=late, of=(0, 1))
        meeting.check_blamed(2)
        assert now_s() - began_s < TIMEOUTS.round_s
        await meeting.all_streams_end()

    run_simulated(main())


def test_a_failure_ends_what_runs_beside_it_before_it_is_raised() -> None:
    """What was cancelled may have a stream to close first."""
    ended: list[str] = []

    async def fail() -> None:
        raise Gone("somebody", "closed the stream")

    async def close_slowly() -> None:
        try:
            await asyncio.sleep(100.0)
        finally:
            await asyncio.sleep(1.0)
            ended.append("closed")

    async def main() -> None:
        with pytest.raises(Gone):
            await run_all(fail(), close_slowly())
        assert ended == ["closed"]

    run_simulated(main())
