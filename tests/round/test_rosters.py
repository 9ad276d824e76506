"""Two rosters of one leader: how members beside each other find out, and what honest retries look like."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from p2p_diloco.core.errors import Misbehaved
from p2p_diloco.core.group import SealedRoster, seal_roster
from p2p_diloco.core.roster import seal_readiness
from p2p_diloco.round.outcome import Settled
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.messages import No
from p2p_diloco.wire.proof_messages import AskRoster
from p2p_diloco.wire.round_messages import Roster
from tests.support.builders import NOW_S, identity, pipe, readiness_of, record_of
from tests.support.fakes import run_simulated
from tests.support.meetings import HISTORY, PROTOCOL, Round, Transport

pytestmark = pytest.mark.usefixtures("small_parts")

BESIDE = identity(77)
"""On the head of the round, and no member of it."""


def other_of(meeting: Round, *, retried: bool = False) -> SealedRoster:
    """Of the same leader, with BESIDE in it. ``retried``: with a new readiness of the leader's, as an honest one."""
    leader = meeting.members[0]
    mine = meeting.group.sealed.members[0]
    if retried:
        again = readiness_of(leader, HISTORY, nonce=b"otherone")
        mine = seal_readiness(again, leader)
    beside = seal_readiness(readiness_of(BESIDE, HISTORY, leader=leader.peer_id), BESIDE)
    return seal_roster((mine, beside), (), leader)


def message_of(sealed: SealedRoster) -> Roster:
    return Roster(members=list(sealed.members), absent=[], signature=sealed.signature)


def beside(meeting: Round, hand: Callable[[Channel, AskRoster], Awaitable[None]]) -> None:
    """Member 0 asks a peer beside the round, which answers by ``hand``."""
    transport = Transport(meeting.network, BESIDE.peer_id, meeting.timeouts, trouble=meeting.trouble)

    async def handler(channel: Channel) -> None:
        await hand(channel, await channel.receive(AskRoster, timeout_s=10.0))

    transport.handlers[PROTOCOL] = handler
    meeting.settlements[0].meeting.around = (BESIDE.peer_id,)


@pytest.mark.parametrize("retried", [False, True])
def test_a_member_asks_beside_its_round_and_gives_it_up_where_its_leader_lies(retried: bool) -> None:
    heard: list[Roster | No] = []

    async def main() -> None:
        meeting = Round(4)
        other = other_of(meeting, retried=retried)

        async def hand(channel: Channel, ask: AskRoster) -> None:
            assert (ask.leader, ask.round_id) == (meeting.ids[0], meeting.round_id)
            answer: Roster | No = await channel.request(message_of(other), Roster, No)
            heard.append(answer)

        beside(meeting, hand)
        meeting.settlements[1].meeting.around = (BESIDE.peer_id,)
        await meeting.run()
        barred = meeting.settlements[1].meeting.directory.barred
        if retried:
            assert heard == [No(reason="no proof")] * 2
            assert list(barred) == []
            assert isinstance(meeting.outcomes[1], Settled)
        else:
            assert heard == [message_of(meeting.group.sealed)] * 2
            assert list(barred) == [meeting.ids[0]]
            assert meeting.missed([1]) == {
                ("failed", f"the round is void: peer {meeting.ids[0][-8:]} signed two rosters with one readiness")
            }

    run_simulated(main())


@pytest.mark.parametrize("known", [True, False])
def test_who_says_nothing_is_waited_for_no_longer_than_a_heartbeat(known: bool) -> None:
    """And not at all, where it is a stranger."""

    async def main() -> None:
        meeting = Round(3)

        async def hand(channel: Channel, ask: AskRoster) -> None:
            await asyncio.sleep(500)

        beside(meeting, hand)
        directory = meeting.settlements[0].meeting.directory
        directory.proven.answered(BESIDE.peer_id)
        if known:
            meeting.settlements[0].meeting.known = frozenset([BESIDE.peer_id])
        await meeting.run()
        assert meeting.committed() == [0, 1, 2]
        waited_s = meeting.timeouts.heartbeat_s if known else 0.0
        assert waited_s <= meeting.took_s[0] < waited_s + 1
        assert (BESIDE.peer_id in directory.proven) == (not known)
        late_s = {BESIDE.peer_id: waited_s} if known else {}
        assert meeting.settlements[0].rosters.late_s == late_s
        await meeting.all_streams_end(500.0)

    run_simulated(main())


# -- who is asked ------------------------------------------------------------------------------------------------------


async def shown(meeting: Round, answer: Roster | No) -> Roster:
    mine, theirs = pipe(meeting.timeouts)
    showing = asyncio.create_task(meeting.settlements[1].rosters.show(theirs))
    try:
        roster: Roster = await mine.request(answer, Roster)
        await showing
    finally:
        showing.cancel()
    return roster


def test_who_is_asked_shows_its_roster_and_believes_a_proof() -> None:
    async def main() -> None:
        meeting = Round(3)
        assert await shown(meeting, message_of(other_of(meeting))) == message_of(meeting.group.sealed)
        assert list(meeting.settlements[1].meeting.directory.barred) == [meeting.ids[0]]
        await meeting.run()
        assert {reason for reason, _ in meeting.missed([1])} == {"failed"}

    run_simulated(main())


def test_a_roster_that_proves_nothing_is_held_against_who_sends_it() -> None:
    async def main() -> None:
        meeting = Round(3)
        assert await shown(meeting, No(reason="no proof")) == message_of(meeting.group.sealed)
        for lie in (meeting.group.sealed, other_of(meeting, retried=True)):
            with pytest.raises(Misbehaved, match="proves nothing"):
                await shown(meeting, message_of(lie))
        assert list(meeting.settlements[1].meeting.directory.barred) == []
        assert meeting.settlements[1].meeting.signatures.void == ""

    run_simulated(main())


def test_a_record_of_who_is_barred_is_not_taken() -> None:
    async def main() -> None:
        meeting = Round(3)
        directory, leader = meeting.settlements[1].meeting.directory, meeting.members[0]
        assert leader.peer_id in {record.peer_id for record in directory.live(NOW_S)}
        await shown(meeting, message_of(other_of(meeting)))
        assert leader.peer_id not in {record.peer_id for record in directory.live(NOW_S)}
        assert record_of(leader, HISTORY).peer_id == leader.peer_id
        assert directory.get(leader.peer_id) is None

    run_simulated(main())
