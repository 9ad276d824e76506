"""A member of a round, and what its leader, or a later leader, does to it: words that break one rule each."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest

from p2p_diloco.core.errors import RemoteError
from p2p_diloco.core.waiting import now_s
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.message import Message
from p2p_diloco.wire.messages import No, Size
from p2p_diloco.wire.round_messages import Again, AskCommit, AskPart, Certifies, Commit, Contribute, Eta, Receipt, Took
from tests.support.builders import identity
from tests.support.fakes import run_simulated
from tests.support.meetings import N_PARTS, PROTOCOL, TIMEOUTS, Losses, Round, Transport

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
                await channel.send_frame(meeting.frame(part, meeting.mean(part, range(meeting.count))))

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


@pytest.mark.parametrize(
    ("after_s", "held_back_s"), [(0.0, 0.0), (0.02, 0.0), (0.03, 0.0), (0.0, 0.5), (0.03, 0.5), (0.07, 0.5), (0.3, 0.5)]
)
def test_a_receipts_stream_that_closes_at_once_is_tried_again(
    losses: Losses, after_s: float, held_back_s: float
) -> None:
    """Everybody is there, and nobody loses the leader. It may have the receipt when the stream closes, while it waits
    for the last one, and takes its sender for gone: the second one counts all the same."""

    async def main() -> None:
        meeting = Round(5, by_hand=(4,), clients=(4,))
        meeting.trouble.closing_s = {(meeting.ids[2], meeting.ids[0]): after_s}

        async def comes_late() -> None:
            await asyncio.gather(*(meeting.contribute(4, i) for i in range(4)))
            await asyncio.sleep(held_back_s)
            await meeting.receipt(4, 0, [b""] * N_PARTS)

        await meeting.run(comes_late())
        assert not meeting.trouble.closing_s
        assert list(meeting.update().parts) == meeting.means(range(5))
        assert [meeting.settlements[i].leads for i in meeting.honest] == [True, False, False, False]
        assert not losses.by(2)
        assert set(losses) <= {(0, 2, "Gone: closed the stream")}
        assert max(meeting.took_s.values()) < held_back_s + 1.0
        await meeting.all_streams_end()

    run_simulated(main())


def test_a_receipts_stream_that_closes_twice_ends_with_the_next_leader(losses: Losses) -> None:
    async def main() -> None:
        meeting = Round(3, by_hand=(0,))
        receipts = 0

        async def closes(channel: Channel, receipt: Receipt) -> None:
            nonlocal receipts
            receipts += 1

        await meeting.run(lead_by_hand(meeting, closes))
        assert receipts == 2 * len(meeting.honest)
        assert list(meeting.update().parts) == meeting.means(range(3))
        meeting.check_blamed(0)

    run_simulated(main())


@pytest.mark.parametrize("credit_s", [None, 7.0, -5.0])
def test_a_leader_that_promises_for_ever(credit_s: float | None) -> None:
    """It has the time in which an honest one collects, and its credit; then the next in rank leads."""

    async def main() -> None:
        meeting = Round(3, by_hand=(0,))
        for i in (1, 2):
            if credit_s is not None:
                meeting.settlements[i].meeting.credits_s = {meeting.ids[0]: credit_s}

        async def promises_for_ever(channel: Channel, receipt: Receipt) -> None:
            while True:
                await channel.send(Eta(eta_s=86400.0))
                await asyncio.sleep(1.0)

        began_s = now_s()
        await meeting.run(lead_by_hand(meeting, promises_for_ever))
        assert list(meeting.update().parts) == meeting.means(range(3))
        has_s = TIMEOUTS.record_life_s if credit_s is None else max(credit_s, 0.0)
        assert now_s() - began_s == pytest.approx(TIMEOUTS.settle_s + has_s, abs=1)
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
    """It lets the others reduce again and again a part that they hold: they forget it, and come to the same one each
    time."""

    async def main() -> None:
        meeting = Round(3, by_hand=(0,))
        asked: list[int] = []

        async def settle(channel: Channel, receipt: Receipt) -> None:
            for number in numbers:
                asked.append(number)
                await channel.send(Again(number=number, members=[1, 2], parts=[0]))
                assert (await channel.receive(Receipt, timeout_s=10.0)).number == number

        await meeting.run(lead_by_hand(meeting, settle))
        assert list(meeting.update().parts) == [meeting.mean(0, (1, 2)), *meeting.means(range(3))[1:]]
        assert sorted(asked) == sorted(2 * numbers[: believed + 1]), "each of both believes it so often"
        meeting.check_blamed(0)
        assert {reason for _, _, reason in losses} == {"Misbehaved: asks to reduce again what does not fit the round"}

    run_simulated(main())


def test_a_leader_that_gives_up_costs_the_round() -> None:
    async def main() -> None:
        meeting = Round(3, by_hand=(0,))

        async def settle(channel: Channel, receipt: Receipt) -> None:
            await channel.send(No(reason="not today"))

        await meeting.run(lead_by_hand(meeting, settle))
        assert meeting.missed() == {("failed", "not today")}
        meeting.check_blamed()
        await meeting.all_streams_end()

    run_simulated(main())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda hashes: [UNKNOWN, *hashes[1:]],
        lambda hashes: [*hashes[1:], hashes[0]],
    ],
)
@pytest.mark.parametrize("certifies", [False, True])
def test_a_commit_that_names_what_no_reducer_has_sent(
    losses: Losses, spoil: Callable[[list[bytes]], list[bytes]], certifies: bool
) -> None:
    """Nobody signs it, whatever the leader says then, and the next one does better."""

    async def main() -> None:
        meeting = Round(3, by_hand=(0,))
        answers: list[Took | No] = []

        async def settle(channel: Channel, receipt: Receipt) -> None:
            commit = Commit(part_hashes=spoil([part.hash for part in meeting.means(range(3))]), holders=[0] * 6)
            await channel.send(commit)
            answers.append(await channel.receive(Took, No, timeout_s=10.0))
            signature = meeting.signature(0, commit)
            if certifies:
                await channel.send(Certifies(full=b"\x07", members=[0, 1], signatures=[signature] * 2))
            else:
                await channel.send(No(reason="most of the group did not sign the update"))

        await meeting.run(lead_by_hand(meeting, settle))
        assert list(meeting.update().parts) == meeting.means(range(3))
        assert [answer.reason for answer in answers if isinstance(answer, No)] == [
            "part 0 is not what its reducer sent me"
        ] * 2
        meeting.check_blamed(0)
        await meeting.all_streams_end()

    run_simulated(main())


def test_a_commit_of_a_part_that_nobody_gives() -> None:
    """A reducer is gone with its parts, and the leader names something for them that it does not give."""

    async def main() -> None:
        meeting = Round(4, by_hand=(0, 1))

        async def settle(channel: Channel, receipt: Receipt) -> None:
            hashes = [held or UNKNOWN for held in receipt.part_hashes]
            assert hashes.count(UNKNOWN) == len(meeting.parts_of(1))
            await channel.send(Commit(part_hashes=hashes, holders=[0] * N_PARTS))
            with pytest.raises(RemoteError, match="parts of it do not come"):
                await channel.receive(Took, timeout_s=10.0)

        async def dies(to: int) -> None:
            (await meeting.contribute(1, to)).close()

        await meeting.run(lead_by_hand(meeting, settle), dies(2), dies(3))
        assert meeting.missed() == {COULD_NOT_FETCH}

    run_simulated(main())


Certifying = Callable[[Round, Commit], Certifies]


def signed_by(meeting: Round, commit: Commit, *members: int, full: Sequence[int] = (0, 1, 2)) -> list[bytes]:
    return [meeting.taken(commit, full).sign(meeting.members[i]) for i in members]


@pytest.mark.parametrize(
    ("certifying", "complaint"),
    [
        (lambda m, c: Certifies(full=b"\x07", members=[0], signatures=signed_by(m, c, 0)), "too few of those"),
        (lambda m, c: Certifies(full=b"\x07", members=[0, 1], signatures=signed_by(m, c, 0)), "does not fit the round"),
        (
            lambda m, c: Certifies(full=b"\x07", members=[0, 1], signatures=signed_by(m, c, 0, 0)),
            "of member 1",
        ),
        (
            lambda m, c: Certifies(full=b"\x07", members=[0, 9], signatures=signed_by(m, c, 0, 1)),
            "of member 9",
        ),
        (
            lambda m, c: Certifies(full=b"\x03", members=[0, 1], signatures=signed_by(m, c, 0, 1)),
            "of member 0",
        ),
        (
            lambda m, c: Certifies(full=b"\x03", members=[0, 1], signatures=signed_by(m, c, 0, 1, full=(0, 1))),
            "names other contributors",
        ),
        (
            lambda m, c: Certifies(
                full=b"\x07", members=[0, 1], signatures=signed_by(m, c, 0, 1), witness=signed_by(m, c, 0)[0]
            ),
            "not the run's owner",
        ),
    ],
)
def test_a_certificate_that_is_none(losses: Losses, certifying: Certifying, complaint: str) -> None:
    """Its leader has lied; the next one has the others' signatures, and the same update certified."""

    async def main() -> None:
        meeting = Round(3, by_hand=(0,))

        async def settle(channel: Channel, receipt: Receipt) -> None:
            commit = Commit(part_hashes=[part.hash for part in meeting.means(range(3))], holders=[0] * 6)
            await channel.send(commit)
            await channel.receive(Took, timeout_s=10.0)
            await channel.send(certifying(meeting, commit))

        await meeting.run(lead_by_hand(meeting, settle))
        assert list(meeting.update().parts) == meeting.means(range(3))
        assert {complaint in why for _, _, why in losses} == {True}, losses
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


# -- what a member is asked for -------------------------------------------------------------------------------------


def test_parts_are_given_to_members_who_name_them() -> None:
    async def main() -> None:
        meeting = Round(3, by_hand=(2,), clients=(2,))
        await meeting.run()
        part = meeting.mean(4, range(2))

        async def ask(at: int, wanted: bytes) -> Channel:
            return await meeting.say(2, 0, AskPart(round_id=meeting.round_id, part=at, hash=wanted))

        channel = await ask(4, part.hash)
        assert await channel.receive(Size, timeout_s=10.0) == Size(size_bytes=len(part.data))
        assert await channel.receive_frame(1000, 10.0) == meeting.frame(4, part)
        for at, wanted in ((3, part.hash), (4, UNKNOWN), (N_PARTS, part.hash), (2**59, part.hash)):
            channel = await ask(at, wanted)
            assert await channel.receive(No, timeout_s=10.0) == No(reason="not held")

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


def test_who_knows_that_a_commit_is_certified_tells_it() -> None:
    async def main() -> None:
        meeting = Round(3, by_hand=(1,))
        answers: list[Commit | No] = []
        certified: list[Certifies] = []

        async def hand(channel: Channel, message: Message) -> None:
            for part in meeting.parts_of(1):
                await channel.receive_frame(1000, 10.0)
                await channel.send_frame(meeting.frame(part, meeting.mean(part, range(3))))

        async def ask() -> None:
            for i in meeting.honest:
                await meeting.contribute(1, i)
            await asyncio.sleep(TIMEOUTS.settle_s + 5)
            channel = await meeting.say(1, 2, AskCommit(round_id=meeting.round_id))
            answers.append(await channel.receive(Commit, No, timeout_s=10.0))
            certified.append(await channel.receive(Certifies, timeout_s=10.0))

        meeting.serve(1, hand)
        await meeting.run(ask())
        hashes = [part.hash for part in meeting.update().parts]
        assert answers == [Commit(part_hashes=hashes, holders=[2] * N_PARTS)]
        assert [one.members for one in certified] == [[0, 2]]

    run_simulated(main())
