"""Two certified updates of one round: who hears of both, what comes of the round, and who is barred."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from p2p_diloco.core.certificate import Taken
from p2p_diloco.core.equivocation import check_proof, parse_proof
from p2p_diloco.round.outcome import Missed, Settled
from p2p_diloco.round.settle_once import enough, late
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.messages import No
from p2p_diloco.wire.proof_messages import AskOther, Other
from tests.support.builders import OWNER, RUN_ID
from tests.support.fakes import run_simulated
from tests.support.lying import override
from tests.support.meetings import Round

pytestmark = pytest.mark.usefixtures("small_parts")

ELSEWHERE = bytes([7]) * 32
"""The link of an update that nobody has made."""


def told(meeting: Round, signers: Sequence[int], link: bytes = ELSEWHERE) -> AskOther:
    taken = Taken(round_id=meeting.round_id, link=link, full=b"\x07", state=b"")
    signatures = [taken.sign(meeting.members[i]) for i in signers]
    return AskOther(round_id=meeting.round_id, link=link, full=b"\x07", members=list(signers), signatures=signatures)


def signers_of(settled: Settled | Missed) -> set[int]:
    assert isinstance(settled, Settled)
    return {member for member, _ in settled.certificate.signatures}


def barred_by(meeting: Round, member: int) -> set[int]:
    """Whoever is, there is a proof of it."""
    barred = meeting.settlements[member].meeting.directory.barred
    for peer_id in barred:
        assert check_proof(parse_proof(barred.proof(peer_id) or b""), run_id=RUN_ID, owner=OWNER.peer_id) == peer_id
    return {meeting.ids.index(peer_id) for peer_id in barred}


def test_each_member_tells_the_reducers_before_it_applies_an_update() -> None:
    async def main() -> None:
        meeting = Round(4, clients=(3,))
        await meeting.run()
        link = meeting.update().header.link
        assert [meeting.settlements[i].once.first is not None for i in range(4)] == [True] * 4
        channel = await meeting.say(3, 1, told(meeting, (0, 1, 2, 3), link))
        assert await channel.receive(Other, No, timeout_s=10.0) == No(reason="no other one")
        assert not any(barred_by(meeting, i) for i in range(4))

    run_simulated(main())


def test_who_has_applied_an_update_answers_with_it_and_bars_who_has_signed_both() -> None:
    async def main() -> None:
        meeting = Round(3)
        await meeting.run()
        update, signed = meeting.update(), signers_of(meeting.outcomes[0])
        channel = await meeting.say(2, 0, told(meeting, (1, 2)))
        answer: Other = await channel.receive(Other, timeout_s=10.0)
        assert answer.link == update.header.link
        assert barred_by(meeting, 0) == signed & {1, 2} != set()

    run_simulated(main())


def test_a_round_of_which_two_updates_are_certified_is_void_for_all_that_hear_of_both() -> None:
    """Member 2 is told of the other one first, and tells those that tell it."""

    async def main() -> None:
        meeting = Round(3)
        channel = await meeting.say(1, 2, told(meeting, (0, 1)))
        assert await channel.receive(Other, No, timeout_s=10.0) == No(reason="no other one")
        await meeting.run()
        assert meeting.missed() == {("failed", "the round is void: two updates of it are certified")}
        assert barred_by(meeting, 2) <= {0, 1}
        assert all(barred_by(meeting, i) for i in range(3))
        assert all(meeting.settlements[i].member.pledge.settled is None for i in range(3))
        assert not any(meeting.settlements[i].leads for i in range(3))

    run_simulated(main())


@pytest.mark.parametrize(
    ("signers", "why"),
    [((1,), "sends a certificate with 1 signatures, too few of those that certify"), ((), "sends a certificate")],
)
def test_what_is_not_certified_costs_nobody_but_who_says_it(signers: tuple[int, ...], why: str) -> None:
    async def main() -> None:
        meeting = Round(3)
        await meeting.run()
        channel = await meeting.say(1, 0, told(meeting, signers))
        with pytest.raises(Exception, match="closed the stream"):
            await channel.receive(Other, No, timeout_s=10.0)
        (complaint,) = meeting.complaints(0)
        assert complaint[0] == 1
        assert complaint[1].startswith(why)
        assert barred_by(meeting, 0) == set()
        assert meeting.settlements[0].meeting.signatures.void == ""

    run_simulated(main())


def test_a_forged_signature_bars_nobody() -> None:
    async def main() -> None:
        meeting = Round(3)
        await meeting.run()
        sound = told(meeting, (0, 1))
        forged = sound.model_copy(update={"signatures": [sound.signatures[1]] * 2})
        (await meeting.say(1, 2, forged)).close()
        await meeting.all_streams_end()
        assert [who for who, _ in meeting.complaints(2)] == [1]
        assert barred_by(meeting, 2) == set()

    run_simulated(main())


def test_members_that_cannot_be_reached_are_not_waited_for_long() -> None:
    async def main() -> None:
        meeting = Round(4)
        await meeting.run()
        calm_s = max(meeting.took_s.values())
        again = Round(4)
        again.network.cut(again.ids[1], again.ids[2], "silent")
        await again.run()
        assert all(isinstance(again.outcomes[i], Settled) for i in again.outcomes)
        assert max(again.took_s.values()) > calm_s

    run_simulated(main())


def test_whoever_answers_late_or_never_is_late_by_what_was_waited() -> None:
    assert late([0, 2, 3, 4], {0: 0.1, 2: 5.0, 3: 5.1}, 10.0) == {3: 5.1, 4: 10.0}
    assert late([0, 2], {0: 0.0, 2: 0.0}, 10.0) == {}


@pytest.mark.parametrize("waits_s", [1000.0, 3.0, 1.0])
def test_a_member_remembers_which_reducer_kept_it_waiting(waits_s: float) -> None:
    """Member 1 says nothing for ``waits_s``, and then that it knows of no other update."""

    async def main() -> None:
        meeting = Round(4)
        limit_s = meeting.settlements[0].meeting.timeouts.heartbeat_s

        async def slow(channel: Channel, message: AskOther) -> None:
            await asyncio.sleep(waits_s)
            await channel.send(No(reason="no other one"))

        override(meeting.settlements[1].once, "on_ask_other", lambda real: slow)
        await meeting.run()
        assert meeting.committed() == [0, 1, 2, 3]
        for i in (0, 2, 3):
            late_s = meeting.settlements[i].once.late_s
            assert set(late_s) == ({1} if waits_s > limit_s / 2 else set())
            assert all(waited_s == pytest.approx(min(waits_s, limit_s), abs=0.2) for waited_s in late_s.values())
        assert meeting.settlements[1].once.late_s == {}

    run_simulated(main())


def test_no_more_signatures_are_told_than_it_takes() -> None:
    async def main() -> None:
        meeting = Round(5)
        await meeting.run()
        outcome = meeting.outcomes[0]
        assert isinstance(outcome, Settled)
        taken = Taken(round_id=meeting.round_id, link=ELSEWHERE, full=b"", state=b"")
        all_signed = tuple((i, taken.sign(who)) for i, who in enumerate(meeting.members))
        certificate = outcome.certificate.__class__(**{**vars(outcome.certificate), "signatures": all_signed})
        members, signatures = enough(meeting.group, certificate, OWNER.peer_id)
        assert (members, signatures) == ([0, 1, 2], [signature for _, signature in all_signed[:3]])
        assert enough(meeting.group, certificate, meeting.ids[4])[0] == [0, 1, 4]

    run_simulated(main())
