"""How the members of a round agree on its outcome: some die, stop or cannot hear each other, at any instant."""

from __future__ import annotations

import asyncio
import gc
import random
import weakref
from collections.abc import Callable
from itertools import combinations, product
from pathlib import Path
from typing import Literal

import msgpack
import pytest

from p2p_diloco.core.audit import parse_contributions
from p2p_diloco.core.errors import Refused
from p2p_diloco.core.signed_part import Inputs
from p2p_diloco.round.kept import Kept
from p2p_diloco.round.outcome import Settled
from p2p_diloco.round.settle import RoundCost
from p2p_diloco.wire.audit_messages import AskContributions
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.message import Message
from p2p_diloco.wire.messages import No
from p2p_diloco.wire.round_messages import AskCommit, Commit, Contribute, Eta, TookBefore
from tests.support.fakes import run_simulated
from tests.support.meetings import N_PARTS, PROTOCOL, TIMEOUTS, Losses, Round, server

pytestmark = pytest.mark.usefixtures("small_parts")


def test_who_pretends_that_the_leader_is_gone_cannot_take_its_place() -> None:
    """Member 1 asks everybody, as if it had to lead, while they still reduce: they tell it what the first leader
    commits, and nothing before."""

    async def main() -> None:
        meeting = Round(4, by_hand=(1,), clients=(3,))
        answers: list[TookBefore | No] = []

        async def hand(channel: Channel, message: Message) -> None:
            assert isinstance(message, Contribute), "nobody takes it for the leader"
            await asyncio.sleep(TIMEOUTS.request_s)
            for part in meeting.parts_of(1):
                await channel.send_frame(meeting.frame(part, meeting.mean(part, range(4))))

        async def ask(to: int) -> None:
            await meeting.contribute(1, to) if to != 3 else None
            channel = await meeting.say(1, to, AskCommit(round_id=meeting.round_id))
            answer: Eta | TookBefore | No = await channel.receive(Eta, timeout_s=1.0)
            while isinstance(answer, Eta):
                answer = await channel.receive(Eta, TookBefore, No, timeout_s=TIMEOUTS.request_s)
            answers.append(answer)

        meeting.serve(1, hand)
        await meeting.run(ask(0), ask(2), ask(3))
        hashes = [part.hash for part in meeting.update().parts]
        taken = [answer for answer in answers if isinstance(answer, TookBefore)]
        assert [answer.part_hashes for answer in taken] == [hashes] * 3
        signatures = {meeting.signature(i, taken[0]) for i in (0, 2, 3)}
        assert {answer.signature for answer in taken} == signatures
        assert meeting.settlements[0].leads
        assert meeting.committed() == [0, 2, 3]

    run_simulated(main())


def test_the_streams_of_a_member_are_counted_and_not_kept() -> None:
    """However many it opens, each with something in it that nobody reads."""

    async def main() -> None:
        meeting = Round(3)
        served: list[weakref.ref[Channel]] = []
        settlement = meeting.settlements[0]

        async def serve(channel: Channel) -> None:
            served.append(weakref.ref(channel))
            await server(settlement)(channel)

        meeting.transports[0].handlers[PROTOCOL] = serve
        await meeting.run()
        before_bytes = settlement.cost().bytes_received
        for _ in range(20):
            channel = await meeting.say(1, 0, AskCommit(round_id=meeting.round_id))
            await channel.send_frame(bytes(1000))
            await channel.receive(Commit, timeout_s=10.0)
            channel.close()
        await meeting.all_streams_end()
        del channel
        gc.collect()
        assert len(served) >= 22
        assert [kept() for kept in served] == [None] * len(served)
        assert settlement.cost().bytes_received - before_bytes == 20 * len(framed_ask(meeting.round_id))

    run_simulated(main())


def test_a_round_that_nobody_met_for_costs_nothing() -> None:
    assert set(vars(RoundCost()).values()) == {0}


def framed_ask(round_id: bytes) -> bytes:
    ask = AskCommit(round_id=round_id)
    message: bytes = msgpack.packb([ask.tag, ask.model_dump()])
    return len(message).to_bytes(4, "big") + message


# -- faults at any instant ------------------------------------------------------------------------------------------

Fault = Literal["kill", "stop"]
STEP_S = 0.015
"""Shorter than a link's latency: no message between two instants."""
CALM_S = 0.225
"""What a round of four or five takes that nothing happens to."""
REDUCE_S = TIMEOUTS.reduced_part_s
ASK_S = TIMEOUTS.heartbeat_s


async def after(delay_s: float, what: Callable[[int], None], member: int) -> None:
    await asyncio.sleep(delay_s)
    what(member)


def test_a_round_that_nothing_happens_to() -> None:
    """So that the instants below are instants of a round."""

    async def main() -> None:
        for count in (4, 5):
            meeting = Round(count, clients=(count - 1,))
            await meeting.run()
            assert CALM_S - STEP_S < max(meeting.took_s.values()) < CALM_S

    run_simulated(main())


@pytest.mark.parametrize(
    ("fault", "victim", "longest_s"),
    [
        ("kill", 0, 0.0),  # all see its streams end
        ("kill", 1, TIMEOUTS.settle_s),  # done with reducing, before its receipt: it has no stream then
        ("kill", 2, TIMEOUTS.settle_s),
        ("kill", 3, TIMEOUTS.part_s),  # before its streams come
        ("stop", 0, TIMEOUTS.reduced_part_s + ASK_S),
        ("stop", 1, TIMEOUTS.reduced_part_s),
        ("stop", 2, TIMEOUTS.reduced_part_s),
        ("stop", 3, TIMEOUTS.part_s),
    ],
)
def test_one_member_fails_at_any_instant(fault: Fault, victim: int, longest_s: float) -> None:
    """The others all commit, the same update, in that round, within one time-out (and the time to ask a silent leader
    once more), and blame nobody else. It has the same update, if it comes back, or knows that it has none."""
    survivors = [i for i in range(4) if i != victim]
    outcomes: set[bool] = set()

    async def main(instant_s: float) -> None:
        meeting = Round(4, clients=(3,))
        await meeting.run(after(instant_s, getattr(meeting, fault), victim))
        assert set(meeting.committed()) - {victim} == set(survivors), instant_s
        for i in survivors:
            assert meeting.lost(i) <= {victim}
            assert meeting.took_s[i] < longest_s + 1
        outcomes.add(isinstance(meeting.outcomes.get(victim), Settled))
        await meeting.all_streams_end()

    for i in range(int(CALM_S / STEP_S)):
        run_simulated(main(i * STEP_S))
    assert (False in outcomes) or (fault, victim != 0) == ("stop", True), "it came to grief at some instant"


@pytest.mark.parametrize("faults", list(product(("kill", "stop"), repeat=2)), ids="-".join)
def test_two_of_five_fail(faults: tuple[Fault, Fault]) -> None:
    """At once, one after the other, or the second while the others do without the first."""
    generator = random.Random("-".join(faults))

    async def main() -> None:
        meeting = Round(5, clients=(4,))
        first, second = generator.sample(range(5), 2)
        first_s = generator.uniform(0, CALM_S)
        second_s = generator.choice([0.0, TIMEOUTS.part_s, REDUCE_S, REDUCE_S + ASK_S]) + first_s
        second_s += generator.uniform(-CALM_S / 2, CALM_S)
        await meeting.run(
            after(first_s, getattr(meeting, faults[0]), first),
            after(max(second_s, 0.0), getattr(meeting, faults[1]), second),
        )
        survivors = {i for i in range(5) if i not in (first, second)}
        assert survivors <= set(meeting.committed()), ("three of five are most", first, first_s, second, second_s)
        for i in survivors:
            assert meeting.lost(i) <= {first, second}
            assert meeting.took_s[i] < 2 * TIMEOUTS.reduced_part_s

    for _ in range(40):
        run_simulated(main())


def test_two_of_four_fail_and_nobody_commits() -> None:
    """Those who are left know it, and meet again on the same head."""

    async def main() -> None:
        meeting = Round(4, clients=(3,))
        await meeting.run(after(0.05, meeting.kill, 0), after(0.05, meeting.kill, 2))
        assert meeting.missed([1, 3]) == {("failed", "2 of 4 members are left, too few to commit")}

    run_simulated(main())


@pytest.mark.parametrize("pair", list(combinations(range(4), 2)), ids=str)
def test_two_members_cannot_hear_each_other(pair: tuple[int, int]) -> None:
    """A cable between them is pulled, at any instant; both still hear the others. All four commit."""

    async def main(instant_s: float) -> None:
        meeting = Round(4, clients=(3,))
        await meeting.run(after(instant_s, lambda _: meeting.cut(*pair), 0))
        assert meeting.committed() == [0, 1, 2, 3], instant_s
        assert all(meeting.lost(i) <= set(pair) - {i} for i in range(4)), "a leader does without one that is late"
        assert max(meeting.took_s.values()) < TIMEOUTS.reduced_part_s + TIMEOUTS.settle_s + 1

    for i in range(int(CALM_S / STEP_S)):
        run_simulated(main(i * STEP_S))


@pytest.mark.parametrize("count", [3, 4])
def test_a_leader_that_was_away_for_a_second_hears_what_became_of_the_round(count: int) -> None:
    """Its p2pd dies, at any instant, and is there again: those who could not reach it have gone on to the next leader.
    It does not wait for their receipts beyond ``settle_s``, and where it needs to, it learns their commit."""
    heard_late: list[bool] = []

    async def main(instant_s: float) -> None:
        meeting = Round(count, clients=(count - 1,))
        others = range(1, count)

        async def lose_p2pd() -> None:
            await asyncio.sleep(instant_s)
            for i in others:
                meeting.network.cut(meeting.ids[0], meeting.ids[i], "reset")
            await asyncio.sleep(1.0)
            for i in others:
                meeting.network.restore(meeting.ids[0], meeting.ids[i])

        await meeting.run(lose_p2pd())
        assert set(meeting.committed()) >= set(others), instant_s
        assert max(meeting.took_s[i] for i in others) < TIMEOUTS.settle_s, instant_s
        assert meeting.took_s[0] < TIMEOUTS.settle_s + 2, instant_s
        heard_late.append(isinstance(meeting.outcomes[0], Settled) and meeting.took_s[0] > TIMEOUTS.settle_s)

    for i in range(int(CALM_S / STEP_S)):
        run_simulated(main(i * STEP_S))
    assert any(heard_late)


# -- faults at moments that no clock shows --------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["kill", "stop"])
@pytest.mark.parametrize("given", [0, 1, 2, 3])
def test_a_leader_fails_when_it_has_decided_and_given_some_commits(fault: Fault, given: int) -> None:
    """None, and nobody has heard of its decision, or up to all. A stopped one is resumed when the others are done: it
    has what they have, or nothing; never does it apply alone."""

    async def main() -> None:
        meeting = Round(4, clients=(3,))
        leader, trouble = meeting.settlements[0].member, meeting.trouble
        at: list[int] = []

        def watch() -> None:
            if not at and leader.pledge.taken is not None and len(trouble.commits) >= given:
                at.append(len(trouble.commits))
                getattr(meeting, fault)(0)

        meeting.watch(watch)
        await meeting.run()
        assert at == [given], "the fault came when it should"
        assert set(meeting.committed()) - {0} == {1, 2, 3}
        assert max(meeting.took_s[i] for i in (1, 2, 3)) < TIMEOUTS.request_s + ASK_S + 1
        if fault == "stop" and given < 2:
            assert meeting.missed([0]) == {("failed", "most of the group did not sign the update")}
        assert all(meeting.lost(i) <= {0} for i in (1, 2, 3))
        await meeting.all_streams_end()

    run_simulated(main())


@pytest.mark.parametrize("fault", ["kill", "stop"])
@pytest.mark.parametrize("given", [0, 1])
def test_the_second_leader_fails_as_well(fault: Fault, given: int) -> None:
    """Each when it has decided; the second one perhaps after one member has its commit."""

    async def main() -> None:
        meeting = Round(5, clients=(4,))
        first, second = meeting.settlements[0].member, meeting.settlements[1].member
        failed: list[int] = []

        def watch() -> None:
            commits = [source for source, _ in meeting.trouble.commits]
            if not failed and first.pledge.taken is not None:
                failed.append(0)
                getattr(meeting, fault)(0)
            elif failed == [0] and second.pledge.taken is not None and commits.count(meeting.ids[1]) >= given:
                failed.append(1)
                getattr(meeting, fault)(1)

        meeting.watch(watch)
        await meeting.run()
        assert failed == [0, 1]
        assert set(meeting.committed()) - {0, 1} == {2, 3, 4}
        assert list(meeting.update([2, 3, 4]).parts) == meeting.means(range(5)), "all had contributed before"
        assert meeting.settlements[2].leads or given, "unless the one commit came to it"
        if fault == "stop":
            assert meeting.missed([0]) == {("failed", "most of the group did not sign the update")}
        assert max(meeting.took_s[i] for i in (2, 3, 4)) < 2 * (TIMEOUTS.request_s + ASK_S) + 1

    run_simulated(main())


@pytest.mark.parametrize(("fault", "longest_s"), [("kill", 1.0), ("stop", 2 * TIMEOUTS.reduced_part_s)])
def test_a_reducer_fails_in_the_second_butterfly_as_well(fault: Fault, longest_s: float) -> None:
    """What it owed is reduced a third time."""

    async def main() -> None:
        meeting = Round(5, clients=(4,), n=(4 * N_PARTS - 1) * 100)
        failed: list[int] = []

        def watch() -> None:
            if failed == [2] and all(1 in meeting.settlements[i].member.butterflies for i in (0, 1, 3, 4)):
                failed.append(3)
                getattr(meeting, fault)(3)

        async def first() -> None:
            await asyncio.sleep(0.03)
            failed.append(2)
            getattr(meeting, fault)(2)

        meeting.watch(watch)
        await meeting.run(first())
        assert failed == [2, 3]
        update = meeting.update([0, 1, 4])
        in_first = [(i, who) for i in range(len(update.parts)) for who in (range(5), (0, 1, 3, 4))]
        assert any(update.parts[i] == meeting.mean(i, who) for i, who in in_first), "what was reduced stays"
        thrice = {meeting.mean(i, (0, 1, 4)) for i in meeting.parts_of(2)} & set(update.parts)
        assert thrice, "what the second butterfly was to make, the third one did"
        assert sorted(meeting.settlements[0].member.butterflies) == [0, 1, 2]
        assert all(meeting.lost(i) == {2, 3} for i in (0, 1, 4))
        assert max(meeting.took_s[i] for i in (0, 1, 4)) < longest_s

    run_simulated(main())


# -- parts that leave most out, members without a share, and what a reducer shows -----------------------------------


def test_parts_that_leave_most_of_the_group_out_are_reduced_by_others(losses: Losses) -> None:
    """Their reducer may have been cut off: it is not blamed, and takes no part in reducing them."""

    async def main() -> None:
        meeting = Round(4, by_hand=(3,))

        async def hand(channel: Channel, message: Message) -> None:
            if isinstance(message, Contribute):
                for part in meeting.parts_of(3):
                    await channel.receive_frame(1000, 10.0)
                    await channel.send_frame(meeting.frame(part, meeting.mean(part, (3,))))

        async def contribute(to: int) -> None:
            channel = await meeting.contribute(3, to)
            for _ in meeting.parts_of(to):
                await channel.receive_frame(1000, 10.0)
            if to == 0:
                await meeting.receipt(3, 0, [b""] * N_PARTS)

        meeting.serve(3, hand)
        await meeting.run(*(contribute(to) for to in range(3)))
        assert list(meeting.update().parts) == meeting.means(range(4), but=meeting.parts_of(3), of=(0, 1, 2))
        assert meeting.settlements[0].meeting.lonely == {3}
        assert not losses
        assert [max(meeting.settlements[i].member.butterflies) for i in range(3)] == [1, 1, 1], "the fault fired"

    run_simulated(main())


def test_members_that_the_roster_leaves_idle_contribute_certify_and_reduce_nothing(losses: Losses) -> None:
    async def main() -> None:
        meeting = Round(4, idle=(0, 2))
        assert meeting.group.reducers == (1, 3)
        await meeting.run()
        assert list(meeting.update().parts) == meeting.means(range(4))
        assert [meeting.settlements[i].leads for i in range(4)] == [False, True, False, False]
        assert [len(meeting.parts_of(i)) for i in range(4)] == [0, N_PARTS // 2, 0, N_PARTS // 2]
        assert not losses

    run_simulated(main())


def test_a_reducer_shows_the_contributions_that_it_has_signed_for_once_to_each_member(tmp_path: Path) -> None:
    async def main() -> None:
        meeting = Round(3)
        reducer = meeting.settlements[1].meeting
        reducer.kept, reducer.audit_parts = Kept(tmp_path), 1
        await meeting.run()

        async def ask(who: int, part: int, number: int = 0) -> bytes | No:
            ask = AskContributions(round_id=meeting.round_id, number=number, part=part)
            channel = await meeting.say(who, 1, ask)
            try:
                return await channel.receive_blob(10_000, 10.0)
            except Refused as error:
                return No(reason=error.reason)

        shown = await ask(0, 4)
        assert isinstance(shown, bytes)
        came = parse_contributions(shown, 3)
        assert came == {i: meeting.sent(i, 4) for i in range(3)}
        held = meeting.settlements[0].meeting.reductions[4]
        assert held is not None
        assert held.inputs == Inputs.of(came)
        assert await ask(0, 4) == No(reason="nothing more is shown")
        assert await ask(2, 3) == No(reason="nothing is kept"), "somebody else's part"
        assert await ask(2, 1) == No(reason="nothing more is shown")
        meeting.settlements[1].close()
        reducer.audit_parts = 5
        assert await ask(2, 4) == No(reason="nothing is kept")

    run_simulated(main())
