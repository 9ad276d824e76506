"""The leader of a round, and what members that are written by hand do to it: receipts that break one rule each, commits
that are not taken, answers that do not come."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import pytest

from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.recent import Recent
from p2p_diloco.core.waiting import now_s
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.message import Message
from p2p_diloco.wire.messages import No
from p2p_diloco.wire.round_messages import Again, AskCommit, AskPart, Commit, Contribute, Eta, Receipt, TookBefore
from tests.support.fakes import run_simulated
from tests.support.meetings import N_PARTS, TIMEOUTS, Losses, Round, calm_rounds

pytestmark = pytest.mark.usefixtures("small_parts")

UNKNOWN = b"\x01" * 32
DOES_NOT_FIT = "sends a receipt that does not fit the round"


@pytest.mark.parametrize(
    ("hashes", "complaint", "why"),
    [
        ([], DOES_NOT_FIT, f"Misbehaved: {DOES_NOT_FIT}"),
        ([b""] * 5, DOES_NOT_FIT, f"Misbehaved: {DOES_NOT_FIT}"),
        ([UNKNOWN] * 7, DOES_NOT_FIT, f"Misbehaved: {DOES_NOT_FIT}"),
        ([b"\x01"] * 6, "sends a malformed message", "silent"),
        ([bytes(33)] * 6, "sends a malformed message", "silent"),
    ],
)
@pytest.mark.parametrize("count", [2, 3])
def test_a_receipt_that_does_not_fit(losses: Losses, count: int, hashes: list[bytes], complaint: str, why: str) -> None:
    async def main() -> None:
        liar = count - 1
        meeting = Round(count, by_hand=(liar,), clients=(liar,))

        async def misbehave() -> None:
            for i in meeting.honest:
                await meeting.contribute(liar, i)
            await asyncio.sleep(1)
            message = Receipt.model_construct(round_id=meeting.round_id, number=0, part_hashes=hashes)
            await meeting.say(liar, 0, message)

        await meeting.run(misbehave())
        if count == 2:
            assert meeting.missed() == {("failed", "1 of 2 members are left, too few to commit")}
        else:
            assert list(meeting.update().parts) == meeting.means(range(count))
        assert [(who, reason.startswith(complaint)) for who, reason in meeting.complaints(0)] == [(liar, True)]
        assert losses.by(0) == [(liar, why)]
        await meeting.all_streams_end()

    run_simulated(main())


@pytest.mark.parametrize("number", [1, 2, 200, 255])
def test_a_receipt_of_a_butterfly_that_never_was(losses: Losses, number: int) -> None:
    """Nor does it keep the parts that are really lost from being reduced again."""

    async def main() -> None:
        meeting = Round(5, by_hand=(3, 4), clients=(4,))

        async def lie() -> None:
            for i in meeting.honest:
                await meeting.contribute(4, i)
            await meeting.say(4, 0, Receipt(round_id=meeting.round_id, number=number, part_hashes=[b""] * N_PARTS))

        await meeting.run(lie())
        lost = meeting.parts_of(3)
        assert list(meeting.update().parts) == meeting.means((0, 1, 2, 4), but=lost, of=(0, 1, 2))
        assert (4, f"Misbehaved: {DOES_NOT_FIT}") in losses.by(0)

    run_simulated(main())


def test_a_receipt_to_who_leads_only_later_is_answered_by_the_commit() -> None:
    async def main() -> None:
        meeting = Round(4, by_hand=(3,), clients=(3,))
        answers: list[Again | Commit | No] = []

        async def ask() -> None:
            for i in meeting.honest:
                await meeting.contribute(3, i)
            answers.append(await meeting.receipt(3, 2, [b""] * N_PARTS))

        await meeting.run(ask())
        hashes = [part.hash for part in meeting.update().parts]
        assert answers == [Commit(part_hashes=hashes, holders=[2] * N_PARTS)]
        assert meeting.complaints(2) == []

    run_simulated(main())


def test_a_receipt_to_who_cannot_lead() -> None:
    async def main() -> None:
        meeting = Round(3, by_hand=(1,), clients=(2,))

        async def misbehave() -> None:
            await meeting.contribute(1, 0)
            await meeting.say(1, 2, Receipt(round_id=meeting.round_id, part_hashes=[b""] * N_PARTS))

        await meeting.run(misbehave())
        meeting.update()
        assert meeting.complaints(2) == [(1, DOES_NOT_FIT)]

    run_simulated(main())


def test_a_false_receipt_changes_nothing_for_most(losses: Losses) -> None:
    async def main() -> None:
        meeting = Round(3, by_hand=(2,), clients=(2,))
        answers: list[Again | Commit | No] = []

        async def misbehave() -> None:
            for i in meeting.honest:
                await meeting.contribute(2, i)
            answers.append(await meeting.receipt(2, 0, [bytes(32)] * N_PARTS))
            answers.append(await meeting.receipt(2, 0, [b""] * N_PARTS))  # late: the same answer

        await meeting.run(misbehave())
        means = meeting.means(range(3))
        assert list(meeting.update().parts) == means
        assert answers == [Commit(part_hashes=[part.hash for part in means], holders=[0] * N_PARTS)] * 2
        assert not losses

    run_simulated(main())


def test_a_false_receipt_in_a_pair_costs_the_round_and_names_the_liar(losses: Losses) -> None:
    async def main() -> None:
        meeting = Round(2, by_hand=(1,), clients=(1,))

        async def refuse(channel: Channel, message: Message) -> None:
            assert isinstance(message, AskPart)

        async def misbehave() -> None:
            await meeting.contribute(1, 0)
            await meeting.receipt(1, 0, [bytes(32)] * N_PARTS)

        meeting.serve(1, refuse)
        await meeting.run(misbehave())
        assert meeting.missed() == {("failed", "1 of 2 members are left, too few to commit")}
        assert losses == [(0, 1, "Gone: closed the stream")]

    run_simulated(main())


@pytest.mark.parametrize("count", [3, 5])
def test_a_member_that_does_not_sign(losses: Losses, count: int) -> None:
    """The others do."""

    async def main() -> None:
        last = count - 1
        meeting = Round(count, by_hand=(last,), clients=(last,))

        async def misbehave() -> None:
            for i in meeting.honest:
                await meeting.contribute(last, i)
            await meeting.receipt(last, 0, [b""] * N_PARTS, took=False)
            await asyncio.sleep(TIMEOUTS.request_s + 1)

        await meeting.run(misbehave())
        assert list(meeting.update().parts) == meeting.means(range(count))
        assert meeting.took_s[0] < 3, "nobody waits for it"
        assert losses == [(0, last, "Silent: has sent nothing for 10 s")]
        await meeting.all_streams_end()

    run_simulated(main())


def test_a_leader_whose_commit_most_do_not_sign_applies_nothing() -> None:
    async def main() -> None:
        meeting = Round(3, by_hand=(1, 2), clients=(1, 2))

        async def misbehave(member: int) -> None:
            await meeting.contribute(member, 0)
            await meeting.receipt(member, 0, [b""] * N_PARTS, took=False)
            await asyncio.sleep(100)

        await meeting.run(misbehave(1), misbehave(2))
        assert meeting.missed() == {("failed", "most of the group did not sign the update")}
        assert meeting.uncertified() == {"signatures"}
        assert meeting.took_s[0] == pytest.approx(TIMEOUTS.settle_s, abs=2)

    run_simulated(main())


def test_who_asks_when_the_round_is_over_is_told_so() -> None:
    async def main() -> None:
        meeting = Round(3, by_hand=(1, 2), clients=(1, 2), timeouts=Timeouts(round_s=5.0))
        answers: list[Again | Commit | No] = []

        async def settle() -> None:
            answers.append(await meeting.receipt(2, 0, [b""] * N_PARTS))
            assert meeting.outcomes

        await meeting.run(settle())
        answers.append(await meeting.receipt(2, 0, [b""] * N_PARTS))
        assert answers == [No(reason="the round is over")] * 2
        assert meeting.missed() == {("failed", "the round took longer than its time")}
        assert meeting.took_s[0] == pytest.approx(5.0, abs=0.5)
        await meeting.all_streams_end()

    run_simulated(main())


# -- the question whether a commit was taken ------------------------------------------------------------------------


def test_who_is_asked_for_a_commit_and_promises_for_ever() -> None:
    """The leader is gone, and its successor hears of one member only that an answer is to come."""

    async def main() -> None:
        meeting = Round(5, by_hand=(0, 3))
        asked: list[Message] = []

        async def promises(channel: Channel, message: Message) -> None:
            asked.append(message)
            while isinstance(message, AskCommit):
                await channel.send(Eta(eta_s=3.0))
                await asyncio.sleep(1.0)

        meeting.serve(0, promises)
        meeting.serve(3, promises)
        began_s = now_s()
        await meeting.run()
        assert meeting.committed() == [1, 2, 4]
        assert now_s() - began_s < TIMEOUTS.round_s
        assert any(isinstance(message, AskCommit) for message in asked)

    run_simulated(main())


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (TookBefore(part_hashes=[UNKNOWN] * 5, signature=bytes(64)), "says that it has signed a commit that"),
        (TookBefore(part_hashes=[UNKNOWN] * 7, signature=bytes(64)), "says that it has signed a commit that"),
        (Commit(part_hashes=[UNKNOWN] * 5, holders=[3] * 5), "sends a commit that"),
        (Commit(part_hashes=[UNKNOWN] * 6, holders=[5] * 6), "sends a commit that"),
    ],
)
def test_who_is_asked_for_a_commit_and_names_one_that_does_not_fit(
    losses: Losses, answer: TookBefore | Commit, why: str
) -> None:
    """The leader is gone; its successor says who has answered so, and settles the round without it."""

    async def main() -> None:
        meeting = Round(5, by_hand=(0, 3), clients=(3,))

        async def lies(channel: Channel, message: Message) -> None:
            if isinstance(message, AskCommit):
                await channel.send(answer)

        async def contribute() -> None:
            for i in meeting.honest:
                await meeting.contribute(3, i)

        meeting.serve(3, lies)
        meeting.kill(0)
        await meeting.run(contribute())
        assert meeting.committed() == [1, 2, 4]
        assert (3, f"Misbehaved: {why} does not fit the round") in losses.by(1)

    run_simulated(main())


def test_who_reduces_and_then_only_promises_costs_half_of_the_time_that_is_left() -> None:
    """The other half is enough to settle. The leader has reduced, and is gone; nobody has failed its successor yet."""

    async def main() -> None:
        meeting = Round(5, by_hand=(0, 3))
        asked_s: list[float] = []

        def hand(me: int) -> Callable[[Channel, Message], Awaitable[None]]:
            async def serve(channel: Channel, message: Message) -> None:
                if isinstance(message, Contribute):
                    for part in meeting.parts_of(me):
                        await channel.send_frame(meeting.frame(part, meeting.mean(part, range(5))))
                while isinstance(message, AskCommit) and me == 3:
                    asked_s.append(now_s())
                    await channel.send(Eta(eta_s=1.0))
                    await asyncio.sleep(1.0)

            return serve

        async def contribute(me: int, to: int) -> None:
            channel = await meeting.contribute(me, to)
            for _ in meeting.parts_of(to):
                await channel.receive_frame(1000, 10.0)

        for me in (0, 3):
            meeting.serve(me, hand(me))
        await meeting.run(*(contribute(me, to) for me in (0, 3) for to in meeting.honest))
        assert list(meeting.update([1, 2, 4]).parts) == meeting.means(range(5))
        successor = meeting.settlements[1].member
        half_s = (successor.ends_s - asked_s[0]) / 2
        assert meeting.took_s[1] == pytest.approx(asked_s[0] + half_s - successor.started_s, abs=0.1)

    run_simulated(main())


@pytest.mark.parametrize(
    ("recent", "costs_s"),
    [(Recent(), TIMEOUTS.settle_s), (calm_rounds(), TIMEOUTS.least_wait_s)],
    ids=("first", "calm"),
)
def test_a_receipt_that_never_comes(
    losses: Losses, recent: Recent, costs_s: float, caplog: pytest.LogCaptureFixture
) -> None:
    """Its sender has contributed to everything, and is in the update."""
    caplog.set_level(logging.INFO)

    async def main() -> None:
        meeting = Round(4, by_hand=(3,), clients=(3,), recent=recent)
        await meeting.run(*(contributes(meeting, 3, to) for to in range(3)))
        assert list(meeting.update().parts) == meeting.means(range(4))
        assert losses.by(0) == [(3, "silent")]
        assert costs_s <= max(meeting.took_s.values()) < costs_s + 0.5
        in_vain_s = meeting.settlements[0].leader.hearing.receipts_s
        assert (max(in_vain_s), len(in_vain_s)) == (TIMEOUTS.settle_s, 3)
        assert f"{meeting.ids[3][-8:]} is late with its receipt, waited {costs_s:.2f} s" in caplog.text

    run_simulated(main())


async def contributes(meeting: Round, sender: int, to: int) -> None:
    """A member that contributes, and is silent after that."""
    await meeting.contribute(sender, to)
