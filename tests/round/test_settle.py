"""How the members of a round agree on its outcome: leaders, receipts and commits that break one rule each, and members
that die, stop or cannot hear each other, at any instant."""

from __future__ import annotations

import asyncio
import gc
import random
import weakref
from collections.abc import Awaitable, Callable
from itertools import combinations, product
from typing import Literal

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.errors import RemoteError
from p2p_diloco.core.update import Update
from p2p_diloco.core.waiting import now_s
from p2p_diloco.round.settle import HEARTBEATS, LEADERS_SHARE, RoundCost, choose_parts
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.messages import Again, AskCommit, AskPart, Commit, Contribute, Eta, Message, No, Receipt, Size
from tests.support.builders import identity
from tests.support.fakes import run_simulated
from tests.support.meetings import N_PARTS, PROTOCOL, TIMEOUTS, Losses, Round, Transport, frame_of, server

pytestmark = pytest.mark.usefixtures("small_parts")

UNKNOWN = b"\x01" * 32
COULD_NOT_FETCH = ("behind", "the round committed, but parts of the update could not be fetched")


# -- leaders: member 0 of three is written by hand ------------------------------------------------------------------

Settle = Callable[[Channel, Receipt], Awaitable[None]]


async def lead_by_hand(meeting: Round, settle: Settle) -> None:
    """Member 0 contributes and reduces as it should, and settles as ``settle`` says."""

    async def hand(channel: Channel, message: Message) -> None:
        if isinstance(message, Receipt):
            await settle(channel, message)
        elif isinstance(message, Contribute):
            for part in meeting.parts_of(0):
                await channel.receive_frame(1000, 10.0)
                await channel.send_frame(frame_of(meeting.mean(part, range(meeting.count))))

    meeting.serve(0, hand)
    for i in meeting.honest:
        await meeting.contribute(0, i)


async def sleeps(channel: Channel, receipt: Receipt) -> None:
    await asyncio.sleep(500)


async def dies(channel: Channel, receipt: Receipt) -> None:
    pass


async def talks_nonsense(channel: Channel, receipt: Receipt) -> None:
    await channel.send(receipt)


async def promises_and_sleeps(channel: Channel, receipt: Receipt) -> None:
    for _ in range(3):
        await channel.send(Eta(eta_s=1.0))
        await asyncio.sleep(TIMEOUTS.request_s - 1)
    await asyncio.sleep(500)


@pytest.mark.parametrize(
    ("settle", "why", "costs_s"),
    [
        (sleeps, "Silent: has sent nothing for 10 s", TIMEOUTS.request_s),
        (promises_and_sleeps, "Silent: has sent nothing for 10 s", 3 * TIMEOUTS.request_s - 2),
        (dies, "Gone: closed the stream", 0.0),
        (talks_nonsense, "Misbehaved: sends receipt out of turn", 0.0),
    ],
)
def test_a_leader_that_does_not_settle(losses: Losses, settle: Settle, why: str, costs_s: float) -> None:
    """It costs one time-out after its last word; then the next in rank leads."""

    async def main() -> None:
        meeting = Round(3, by_hand=(0,))
        began_s = now_s()
        await meeting.run(lead_by_hand(meeting, settle))
        assert list(meeting.update().parts) == meeting.means(range(3))
        assert costs_s <= now_s() - began_s < costs_s + 3
        assert [meeting.settlements[i].leads for i in (1, 2)] == [True, False]
        meeting.check_blamed(0)
        assert {why} == {reason for _, _, reason in losses}
        await meeting.all_streams_end()

    run_simulated(main())


def test_a_leader_that_promises_for_ever() -> None:
    """It has most of the time that the round has left; then the next in rank leads."""

    async def main() -> None:
        meeting = Round(3, by_hand=(0,))

        async def promises_for_ever(channel: Channel, receipt: Receipt) -> None:
            while True:
                await channel.send(Eta(eta_s=86400.0))
                await asyncio.sleep(1.0)

        began_s = now_s()
        await meeting.run(lead_by_hand(meeting, promises_for_ever))
        assert list(meeting.update().parts) == meeting.means(range(3))
        assert now_s() - began_s == pytest.approx(TIMEOUTS.round_s * LEADERS_SHARE, abs=1)
        meeting.check_blamed(0)

    run_simulated(main())


Spoiled = Callable[[list[bytes]], Message]
COMMITS: dict[str, tuple[Spoiled, str]] = {
    "too few parts": (lambda h: Commit(part_hashes=h[:-1], holders=[0] * 5), "a commit that does not fit the round"),
    "too few holders": (lambda h: Commit(part_hashes=h, holders=[0] * 5), "a commit that does not fit the round"),
    "too many parts": (
        lambda h: Commit(part_hashes=[*h, UNKNOWN], holders=[0] * 7),
        "a commit that does not fit the round",
    ),
    "no parts": (lambda h: Commit(part_hashes=[], holders=[]), "a commit that does not fit the round"),
    "a holder beyond": (lambda h: Commit(part_hashes=h, holders=[0] * 5 + [3]), "a commit that does not fit the round"),
    "a holder far beyond": (lambda h: Commit(part_hashes=h, holders=[255] * 6), "a commit that does not fit the round"),
    "a holder no byte holds": (
        lambda h: Commit.model_construct(part_hashes=h, holders=[256] * 6),
        "sends a malformed message",
    ),
    "a part that nobody holds": (
        lambda h: Commit.model_construct(part_hashes=[b"", *h[1:]], holders=[0] * 6),
        "sends a malformed message",
    ),
    "again in butterfly 0": (
        lambda h: Again.model_construct(number=0, members=[1, 2], parts=[0]),
        "sends a malformed message",
    ),
    "again beyond all members": (lambda h: Again(number=3, members=[1, 2], parts=[0]), "asks to reduce again"),
    "again far beyond": (lambda h: Again(number=255, members=[1, 2], parts=[0]), "asks to reduce again"),
    "again without me": (lambda h: Again(number=1, members=[0], parts=[0]), "asks to reduce again"),
    "again with nobody": (lambda h: Again(number=1, members=[], parts=[0]), "asks to reduce again"),
    "again with a stranger": (lambda h: Again(number=1, members=[1, 2, 3], parts=[0]), "asks to reduce again"),
    "again with one twice": (lambda h: Again(number=1, members=[1, 1, 2], parts=[0]), "asks to reduce again"),
    "again in disorder": (lambda h: Again(number=1, members=[2, 1], parts=[0]), "asks to reduce again"),
    "again of no part": (lambda h: Again(number=1, members=[1, 2], parts=[]), "asks to reduce again"),
    "again of a part twice": (lambda h: Again(number=1, members=[1, 2], parts=[3, 3]), "asks to reduce again"),
    "again of parts in disorder": (lambda h: Again(number=1, members=[1, 2], parts=[3, 1]), "asks to reduce again"),
    "again of a part beyond": (lambda h: Again(number=1, members=[1, 2], parts=[N_PARTS]), "asks to reduce again"),
}


@pytest.mark.parametrize(("spoil", "why"), COMMITS.values(), ids=COMMITS)
def test_a_leader_whose_word_does_not_fit_the_round(losses: Losses, spoil: Spoiled, why: str) -> None:
    """It is believed nothing; the next one leads."""

    async def main() -> None:
        meeting = Round(3, by_hand=(0,))

        async def settle(channel: Channel, receipt: Receipt) -> None:
            await channel.send(spoil([part.hash for part in meeting.means(range(3))]))

        began_s = now_s()
        await meeting.run(lead_by_hand(meeting, settle))
        assert list(meeting.update().parts) == meeting.means(range(3))
        meeting.check_blamed(0)
        assert {reason.startswith(f"Misbehaved: {why}") or why in reason for _, _, reason in losses} == {True}, losses
        assert now_s() - began_s < 3
        await meeting.all_streams_end()

    run_simulated(main())


@pytest.mark.parametrize(("numbers", "believed"), [((1, 2, 3), 2), ((1, 1), 1), ((2, 1), 1)])
def test_a_leader_that_never_has_enough(losses: Losses, numbers: tuple[int, ...], believed: int) -> None:
    """It lets the others reduce again and again a part that they hold. Its reducer has it anew and gives away what it
    had before; after one time each holds another one, and the smaller hash is taken."""

    async def main() -> None:
        meeting = Round(3, by_hand=(0,))
        asked: list[int] = []

        async def settle(channel: Channel, receipt: Receipt) -> None:
            for number in numbers:
                asked.append(number)
                await channel.send(Again(number=number, members=[1, 2], parts=[0]))
                assert (await channel.receive(Receipt, timeout_s=10.0)).number == number

        await meeting.run(lead_by_hand(meeting, settle))
        held = [meeting.mean(0, (1, 2)), *([meeting.mean(0, range(3))] if believed == 1 else [])]
        taken = min(held, key=lambda part: part.hash)
        assert list(meeting.update().parts) == [taken, *meeting.means(range(3))[1:]]
        assert sorted(asked) == sorted(2 * numbers[: believed + 1]), "each of both believes it so often"
        meeting.check_blamed(0)
        assert {reason for _, _, reason in losses} == {"Misbehaved: asks to reduce again what does not fit the round"}

    run_simulated(main())


@pytest.mark.parametrize(
    ("spoil", "expected", "blamed"),
    [
        (lambda hashes: No(reason="not today"), ("failed", "not today"), ()),
        (lambda hashes: Commit(part_hashes=[UNKNOWN, *hashes[1:]], holders=[0] * 6), COULD_NOT_FETCH, (0,)),
        (lambda hashes: Commit(part_hashes=[*hashes[1:], hashes[0]], holders=[0] * 6), COULD_NOT_FETCH, (0,)),
    ],
)
def test_a_commit_that_names_what_is_not_there(
    losses: Losses, spoil: Spoiled, expected: tuple[str, str], blamed: tuple[int, ...]
) -> None:
    """A leader that lies costs the round, and everybody knows."""

    async def main() -> None:
        meeting = Round(3, by_hand=(0,))

        async def settle(channel: Channel, receipt: Receipt) -> None:
            await channel.send(spoil([part.hash for part in meeting.means(range(3))]))

        await meeting.run(lead_by_hand(meeting, settle))
        assert meeting.missed() == {expected}
        meeting.check_blamed(*blamed)
        await meeting.all_streams_end()

    run_simulated(main())


def test_a_commit_whose_holder_is_who_receives_it() -> None:
    async def main() -> None:
        meeting = Round(3, by_hand=(0,))

        async def settle(channel: Channel, receipt: Receipt) -> None:
            me = meeting.ids.index(channel.peer_id)
            await channel.send(Commit(part_hashes=[UNKNOWN, *receipt.part_hashes[1:]], holders=[me] * 6))

        await meeting.run(lead_by_hand(meeting, settle))
        assert meeting.missed() == {COULD_NOT_FETCH}
        meeting.check_blamed(0)

    run_simulated(main())


@pytest.mark.parametrize("told", [1, 2])
def test_a_leader_that_dies_between_two_commit_messages(losses: Losses, told: int) -> None:
    """The other member learns the commit from the one that has it, whoever of them leads next."""

    async def main() -> None:
        meeting = Round(3, by_hand=(0,))
        hashes = [part.hash for part in meeting.means(range(3))]

        async def settle(channel: Channel, receipt: Receipt) -> None:
            if channel.peer_id == meeting.ids[told]:
                await channel.send(Commit(part_hashes=hashes, holders=[0] * 6))

        began_s = now_s()
        await meeting.run(lead_by_hand(meeting, settle))
        assert list(meeting.update().parts) == meeting.means(range(3))
        assert losses.by(3 - told) == [(0, "Gone: closed the stream")], "nobody honest is blamed"
        assert now_s() - began_s < 3
        await meeting.all_streams_end()

    run_simulated(main())


# -- members, when a round settles ----------------------------------------------------------------------------------

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
        assert answers == [Commit(part_hashes=hashes, holders=[0] * N_PARTS)]
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


def test_parts_are_given_to_members_who_name_them() -> None:
    async def main() -> None:
        meeting = Round(3, by_hand=(2,), clients=(2,))
        await meeting.run()
        part = meeting.mean(4, range(2))

        async def ask(at: int, wanted: bytes) -> Channel:
            return await meeting.say(2, 0, AskPart(round_id=meeting.round_id, part=at, hash=wanted))

        channel = await ask(4, part.hash)
        assert await channel.receive(Size, timeout_s=10.0) == Size(size_bytes=len(part.data))
        assert await channel.receive_frame(1000, 10.0) == frame_of(part)
        for at, wanted in ((3, part.hash), (4, UNKNOWN), (N_PARTS, part.hash), (2**59, part.hash)):
            channel = await ask(at, wanted)
            assert await channel.receive(No, timeout_s=10.0) == No(reason="not held")

    run_simulated(main())


@pytest.mark.parametrize("count", [3, 5])
def test_a_member_that_takes_no_commit(losses: Losses, count: int) -> None:
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


def test_a_leader_whose_commit_most_do_not_take_applies_nothing() -> None:
    async def main() -> None:
        meeting = Round(3, by_hand=(1, 2), clients=(1, 2))

        async def misbehave(member: int) -> None:
            await meeting.contribute(member, 0)
            await meeting.receipt(member, 0, [b""] * N_PARTS, took=False)
            await asyncio.sleep(100)

        await meeting.run(misbehave(1), misbehave(2))
        assert meeting.missed() == {("failed", "most of the group did not take the commit")}
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


@pytest.mark.parametrize(
    ("number", "answer", "after_s"),
    [
        (1, No(reason="the round is over"), 0.0),
        (2, No(reason="the round is over"), 0.0),
        (3, None, 0.0),
        (255, None, 0.0),
    ],
)
def test_a_contribution_to_a_butterfly_that_never_was(number: int, answer: No | None, after_s: float) -> None:
    async def main() -> None:
        meeting = Round(3, by_hand=(2,), clients=(2,))
        heard_of: list[No | None] = []

        async def misbehave() -> None:
            for i in meeting.honest:
                await meeting.contribute(2, i)
            channel = await meeting.contribute(2, 0, number=number)
            try:
                heard_of.append(await channel.receive(No, timeout_s=30.0))
            except RemoteError:
                heard_of.append(None)

        await meeting.run(misbehave())
        assert list(meeting.update().parts) == meeting.means(range(3)), "counted, and counted once"
        assert heard_of == [answer]
        assert ((2, f"contributes to butterfly {number} of a round") in meeting.complaints(0)) == (answer is None)
        await meeting.all_streams_end()

    run_simulated(main())


# -- the question whether a commit was taken ------------------------------------------------------------------------


@pytest.mark.parametrize("asker", ["client", "stranger"])
def test_who_cannot_lead_is_told_of_no_commit(asker: str) -> None:
    async def main() -> None:
        meeting = Round(3, by_hand=(2,), clients=(2,))
        await meeting.run()
        trouble = meeting.trouble
        stranger = Transport(meeting.network, identity(99).peer_id, TIMEOUTS, trouble=trouble)
        transport = meeting.transports[2] if asker == "client" else stranger
        channel = await transport.open(meeting.ids[0], [], PROTOCOL)
        await channel.send(AskCommit(round_id=meeting.round_id))
        with pytest.raises(RemoteError, match="closed the stream"):
            await channel.receive(Commit, No, timeout_s=10.0)
        complaint = "asks for a commit, and cannot lead" if asker == "client" else "that it is no member of"
        assert complaint in meeting.transports[0].complaints[-1].reason

    run_simulated(main())


def test_who_has_taken_a_commit_tells_it() -> None:
    async def main() -> None:
        meeting = Round(3, by_hand=(1,))
        answers: list[Commit | No] = []

        async def hand(channel: Channel, message: Message) -> None:
            for part in meeting.parts_of(1):
                await channel.receive_frame(1000, 10.0)
                await channel.send_frame(frame_of(meeting.mean(part, range(3))))

        async def ask() -> None:
            for i in meeting.honest:
                await meeting.contribute(1, i)
            await asyncio.sleep(TIMEOUTS.settle_s + 5)
            channel = await meeting.say(1, 2, AskCommit(round_id=meeting.round_id))
            answers.append(await channel.receive(Commit, No, timeout_s=10.0))

        meeting.serve(1, hand)
        await meeting.run(ask())
        hashes = [part.hash for part in meeting.update().parts]
        assert answers == [Commit(part_hashes=hashes, holders=[0] * N_PARTS)]

    run_simulated(main())


def test_who_pretends_that_the_leader_is_gone_cannot_take_its_place() -> None:
    """Member 1 asks everybody, as if it had to lead, while they still reduce: they tell it what the first leader
    commits, and nothing before."""

    async def main() -> None:
        meeting = Round(4, by_hand=(1,), clients=(3,))
        answers: list[Commit | No] = []

        async def hand(channel: Channel, message: Message) -> None:
            assert isinstance(message, Contribute), "nobody takes it for the leader"
            await asyncio.sleep(TIMEOUTS.request_s)
            for part in meeting.parts_of(1):
                await channel.send_frame(frame_of(meeting.mean(part, range(4))))

        async def ask(to: int) -> None:
            await meeting.contribute(1, to) if to != 3 else None
            channel = await meeting.say(1, to, AskCommit(round_id=meeting.round_id))
            answer: Eta | Commit | No = await channel.receive(Eta, timeout_s=1.0)
            while isinstance(answer, Eta):
                answer = await channel.receive(Eta, Commit, No, timeout_s=TIMEOUTS.request_s)
            answers.append(answer)

        meeting.serve(1, hand)
        await meeting.run(ask(0), ask(2), ask(3))
        hashes = [part.hash for part in meeting.update().parts]
        assert answers == [Commit(part_hashes=hashes, holders=[0] * N_PARTS)] * 3
        assert meeting.settlements[0].leads
        assert meeting.committed() == [0, 2, 3]

    run_simulated(main())


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


def test_who_reduces_and_then_only_promises_costs_half_of_the_time_that_is_left() -> None:
    """The other half is enough to settle. The leader has reduced, and is gone; nobody has failed its successor yet."""

    async def main() -> None:
        meeting = Round(5, by_hand=(0, 3))
        asked_s: list[float] = []

        def hand(me: int) -> Callable[[Channel, Message], Awaitable[None]]:
            async def serve(channel: Channel, message: Message) -> None:
                if isinstance(message, Contribute):
                    for part in meeting.parts_of(me):
                        await channel.send_frame(frame_of(meeting.mean(part, range(5))))
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
        successor = meeting.settlements[1]
        half_s = (successor.ends_s - asked_s[0]) / 2
        assert meeting.took_s[1] == pytest.approx(asked_s[0] + half_s - successor.started_s, abs=0.1)

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
CALM_S = 0.15
"""What a round of four or five takes that nothing happens to."""
REDUCE_S = TIMEOUTS.reduced_part_s
ASK_S = TIMEOUTS.request_s / HEARTBEATS


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
        outcomes.add(isinstance(meeting.outcomes.get(victim), Update))
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
        heard_late.append(isinstance(meeting.outcomes[0], Update) and meeting.took_s[0] > TIMEOUTS.settle_s)

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
        leader, trouble = meeting.settlements[0], meeting.trouble
        at: list[int] = []

        def watch() -> None:
            if not at and leader.taken is not None and len(trouble.commits) >= given:
                at.append(len(trouble.commits))
                getattr(meeting, fault)(0)

        meeting.watch(watch)
        await meeting.run()
        assert at == [given], "the fault came when it should"
        assert set(meeting.committed()) - {0} == {1, 2, 3}
        assert max(meeting.took_s[i] for i in (1, 2, 3)) < TIMEOUTS.request_s + ASK_S + 1
        if fault == "stop" and given < 2:
            assert meeting.missed([0]) == {("failed", "most of the group did not take the commit")}
        assert all(meeting.lost(i) <= {0} for i in (1, 2, 3))
        await meeting.all_streams_end()

    run_simulated(main())


@pytest.mark.parametrize("fault", ["kill", "stop"])
@pytest.mark.parametrize("given", [0, 1])
def test_the_second_leader_fails_as_well(fault: Fault, given: int) -> None:
    """Each when it has decided; the second one perhaps after one member has its commit."""

    async def main() -> None:
        meeting = Round(5, clients=(4,))
        failed: list[int] = []

        def watch() -> None:
            commits = [source for source, _ in meeting.trouble.commits]
            if not failed and meeting.settlements[0].taken is not None:
                failed.append(0)
                getattr(meeting, fault)(0)
            elif failed == [0] and meeting.settlements[1].taken is not None and commits.count(meeting.ids[1]) >= given:
                failed.append(1)
                getattr(meeting, fault)(1)

        meeting.watch(watch)
        await meeting.run()
        assert failed == [0, 1]
        assert set(meeting.committed()) - {0, 1} == {2, 3, 4}
        assert list(meeting.update([2, 3, 4]).parts) == meeting.means(range(5)), "all had contributed before"
        assert meeting.settlements[2].leads or given, "unless the one commit came to it"
        if fault == "stop":
            assert meeting.missed([0]) == {("failed", "most of the group did not take the commit")}
        assert max(meeting.took_s[i] for i in (2, 3, 4)) < 2 * (TIMEOUTS.request_s + ASK_S) + 1

    run_simulated(main())


@pytest.mark.parametrize(("fault", "longest_s"), [("kill", 1.0), ("stop", 2 * TIMEOUTS.reduced_part_s)])
def test_a_reducer_fails_in_the_second_butterfly_as_well(fault: Fault, longest_s: float) -> None:
    """What it owed is reduced a third time."""

    async def main() -> None:
        meeting = Round(5, clients=(4,), n=(4 * N_PARTS - 1) * 100)
        failed: list[int] = []

        def watch() -> None:
            if failed == [2] and all(1 in meeting.settlements[i].butterflies for i in (0, 1, 3, 4)):
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
        assert sorted(meeting.settlements[0].butterflies) == [0, 1, 2]
        assert all(meeting.lost(i) == {2, 3} for i in (0, 1, 4))
        assert max(meeting.took_s[i] for i in (0, 1, 4)) < longest_s

    run_simulated(main())


# -- the choice of parts --------------------------------------------------------------------------------------------

A, B = b"a" * 32, b"b" * 32


@pytest.mark.parametrize(
    ("receipts", "hashes", "holders"),
    [
        ({0: [A], 1: [A], 2: [B]}, [A], [0]),
        ({0: [A], 1: [B], 2: [B]}, [B], [1]),
        ({5: [B], 1: [A]}, [A], [1]),
        ({1: [B], 0: [b""]}, [B], [1]),
        ({0: [A, b""], 1: [b"", B]}, [A, B], [0, 1]),
        ({0: [A]}, [A], [0]),
        ({0: [A, b""], 1: [A, b""]}, [A, b""], [0, 0]),
    ],
)
def test_choose_parts(receipts: dict[int, list[bytes]], hashes: list[bytes], holders: list[int]) -> None:
    assert choose_parts(receipts, len(hashes)) == (hashes, holders)
    assert choose_parts(dict(reversed(receipts.items())), len(hashes)) == (hashes, holders)


@given(
    st.dictionaries(
        st.integers(0, 255), st.lists(st.sampled_from([b"", A, B]), min_size=3, max_size=3), min_size=1, max_size=6
    )
)
@settings(max_examples=60)
def test_whoever_is_named_as_a_holder_said_so(receipts: dict[int, list[bytes]]) -> None:
    hashes, holders = choose_parts(receipts, 3)
    for part, (wanted, holder) in enumerate(zip(hashes, holders)):
        assert receipts[holder][part] == wanted
        assert bool(wanted) == any(held[part] for held in receipts.values())
