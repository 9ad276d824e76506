"""Matchmakers of our own at one table, with guests written by hand that break one rule each."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.credit import CREDIT_SHARE
from p2p_diloco.core.digest import digest
from p2p_diloco.core.directory import Directory
from p2p_diloco.core.errors import Silent
from p2p_diloco.core.group import Group, seal_roster
from p2p_diloco.core.manifest import RunManifest
from p2p_diloco.core.pace import Progress
from p2p_diloco.core.recent import Recent
from p2p_diloco.core.records import open_record, seal_record
from p2p_diloco.core.roster import on_head, seal_readiness
from p2p_diloco.core.swarm_head import Standing
from p2p_diloco.core.uplinks import tag_of, unpack_uplinks
from p2p_diloco.core.waiting import now_s
from p2p_diloco.round import callers
from p2p_diloco.round.calls import ask, reach
from p2p_diloco.round.company import CHANCES, CLOSING_MARGIN_S, MAX_GATHER_EXTENSION_S
from p2p_diloco.round.gathering import Gathering
from p2p_diloco.round.here import Here
from p2p_diloco.round.matchmaking import NO_WITNESS, Matchmaker
from p2p_diloco.round.outcome import Missed
from p2p_diloco.round.seat import Seat
from p2p_diloco.wire.channel import Channel, run_protocol
from p2p_diloco.wire.message import Message
from p2p_diloco.wire.messages import No
from p2p_diloco.wire.round_messages import Behind, Closing, Eta, Ready, Redirect, Roster, TooFew
from tests.support.builders import NOW_S, head, identity, known, ranked, readiness_of, record_of
from tests.support.fakes import FakeNetwork, FakeTransport, make_manifest, run_simulated
from tests.support.meetings import calm_rounds

HISTORY = "abc"
AT = head(HISTORY)
OWNER = identity(1000)
TIMEOUTS = Timeouts()
MANIFEST = make_manifest(1000, np.zeros(1000, np.float32), OWNER)
GATHER_S = MANIFEST.spec.round.gather_s
ANSWERS = (Eta, Roster, TooFew, Redirect, Behind, No)

Hand = Callable[["Table", Channel, Message], Awaitable[None]]


def manifest_with(**limits: Any) -> RunManifest:
    limits_ = MANIFEST.spec.round.model_copy(update=limits)
    return MANIFEST.model_copy(update={"spec": MANIFEST.spec.model_copy(update={"round": limits_})})


def standing(history: str) -> Standing:
    heads = tuple(head(history[:back]) for back in range(len(history) - 1, max(len(history) - 5, -1), -1))
    return Standing(step=len(history), head=head(history), heads=heads)


@dataclass(eq=False)
class Table:
    """Members in the order of rank on ``abc``: 0 leads. Those in ``by_hand`` are written by hand."""

    count: int
    by_hand: tuple[int, ...] = ()
    clients: tuple[int, ...] = ()
    strangers: tuple[int, ...] = ()
    """Members of whom nobody knows more than the record; the others have met before."""
    newcomers: tuple[int, ...] = ()
    """Members that are not known; the others are."""
    manifest: RunManifest = MANIFEST
    histories: dict[int, str] = field(default_factory=dict)
    """Where a member stands, if not at ``abc``; the others do not know yet."""
    network: FakeNetwork = field(default_factory=FakeNetwork)

    def __post_init__(self) -> None:
        self.members = ranked(AT, self.count)
        self.ids = [who.peer_id for who in self.members]
        self.transports = [FakeTransport(self.network, peer_id, TIMEOUTS) for peer_id in self.ids]
        self.protocol = run_protocol(self.manifest.run_id)
        self.honest = [i for i in range(self.count) if i not in self.by_hand]
        self.matchmakers = {i: self._matchmaker(i) for i in self.honest}
        self.asked: list[int] = []
        """Whom the honest members opened streams to."""

    def _matchmaker(self, i: int) -> Matchmaker:
        seat = Seat(
            standing=standing(self.histories.get(i, HISTORY)),
            known=known(*(who for j, who in enumerate(self.members) if j not in self.newcomers)),
            role_trainer=True,
            client_mode=i in self.clients,
            phase="gather",
            sealed_record=self.record(i, self.histories.get(i, HISTORY), issued_s=NOW_S + 0.5),
        )
        directory = Directory(self.ids[i], self.manifest.run_id)
        for j in range(self.count):
            directory.learn(self.record(j), NOW_S)
            if j not in self.strangers:
                directory.proven.answered(self.ids[j])
        here = Here(
            transport=self.transports[i],
            identity=self.members[i],
            directory=directory,
            seat=seat,
            timeouts=TIMEOUTS,
            wall_s=lambda: NOW_S + 1,
        )
        matchmaker = Matchmaker(here, self.manifest)

        async def serve(channel: Channel) -> None:
            message: Message = await channel.receive(Ready, Closing, timeout_s=TIMEOUTS.first_message_s)
            directory.proven.answered(channel.peer_id)
            if isinstance(message, Ready):
                await matchmaker.on_ready(channel, message)
            elif isinstance(message, Closing):
                await matchmaker.on_closing(channel, message)

        self.transports[i].handlers[self.protocol] = serve
        return matchmaker

    def directory(self, i: int) -> Directory:
        return self.matchmakers[i].company.here.directory

    def record(self, i: int, history: str = HISTORY, **changes: Any) -> bytes:
        fields = {"run_id": self.manifest.run_id, "life_s": 900.0, "client_mode": i in self.clients}
        return seal_record(record_of(self.members[i], history, **fields | changes), self.members[i])

    def ready_record(self, i: int) -> bytes:
        """What a member says of itself from when it is ready on."""
        return self.record(i, self.histories.get(i, HISTORY), issued_s=NOW_S + 0.75, phase="gather")

    def ready(self, i: int, to: int = 0, **changes: Any) -> Ready:
        fields = {"run_id": self.manifest.run_id, "client_mode": i in self.clients, "leader": self.ids[to]}
        readiness = readiness_of(self.members[i], HISTORY, **fields | changes)
        return Ready(readiness=seal_readiness(readiness, self.members[i]), record=self.ready_record(i))

    async def say(self, me: int, to: int, message: Message) -> Channel:
        channel = await self.transports[me].open(self.ids[to], [], self.protocol)
        await channel.send(message)
        return channel

    async def answer(self, me: int, to: int, message: Message) -> Message:
        """The last word on a message: what comes after any Eta."""
        channel = await self.say(me, to, message)
        while True:
            answer: Message = await channel.receive(*ANSWERS, timeout_s=100.0)
            if not isinstance(answer, Eta):
                return answer

    async def answer_eta(self, me: int, to: int, message: Message) -> float:
        channel = await self.say(me, to, message)
        return (await channel.receive(Eta, timeout_s=100.0)).eta_s

    def serve(self, me: int, hand: Hand) -> None:
        async def handler(channel: Channel) -> None:
            message: Message = await channel.receive(Ready, Closing, timeout_s=100.0)
            await hand(self, channel, message)

        self.transports[me].handlers[self.protocol] = handler

    async def meet(self, *who: int, weight: int = 100) -> dict[int, Group | Missed]:
        """All honest members, or ``who``, are ready now. Whoever finds a group is in that round from then on."""
        found: dict[int, Group | Missed] = {}

        async def one(i: int) -> None:
            found[i] = await self.offer(i, weight)
            self.matchmakers[i].seat.in_round = isinstance(found[i], Group)

        await asyncio.gather(*(one(i) for i in who or self.honest))
        return found

    async def offer(self, i: int, weight: int = 100, trained_s: float = 0.0) -> Group | Missed:
        """What comes of it that a member is ready now."""
        seat = self.matchmakers[i].seat
        seat.phase, seat.sealed_record = "gather", self.ready_record(i)
        return await self.matchmakers[i].find_group(weight, trained_s=trained_s)

    def groups(self, found: dict[int, Group | Missed], *who: int) -> Group:
        """The one group that ``who`` have found, and nobody else has."""
        groups = {i: group for i, group in found.items() if isinstance(group, Group)}
        assert sorted(groups) == sorted(who), found
        assert len({(group.round_id, group.members, group.weights) for group in groups.values()}) == 1
        for i, group in groups.items():
            assert self.ids[i] in [member.peer_id for member in group.members]
        return groups[who[0]]

    def members_of(self, group: Group) -> list[int]:
        return [self.ids.index(member.peer_id) for member in group.members]

    def suspects(self, of: int) -> set[int]:
        live = {record.peer_id for record in self.directory(of).live(NOW_S + 1)}
        return {i for i, peer_id in enumerate(self.ids) if i != of and peer_id not in live}

    def complaints(self, of: int) -> list[tuple[int, str]]:
        return [(self.ids.index(error.peer_id), error.reason) for error in self.transports[of].complaints]


async def stay_silent(table: Table, channel: Channel, message: Message) -> None:
    await asyncio.sleep(500)


async def refuse(table: Table, channel: Channel, message: Message) -> None:
    await channel.send(No(reason="cannot lead"))


async def end(table: Table, channel: Channel, message: Message) -> None:
    pass


# -- everybody is honest -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 6])
def test_all_that_are_ready_meet_at_once(count: int) -> None:
    async def main() -> None:
        table = Table(count)
        began_s = now_s()
        group = table.groups(await table.meet(), *range(count))
        assert table.members_of(group) == list(range(count))
        assert now_s() - began_s < 1.0
        assert not any(matchmaker.gatherings.by_head for matchmaker in table.matchmakers.values())
        assert not any(table.suspects(i) or table.complaints(i) for i in range(count))

    run_simulated(main())


@pytest.mark.parametrize(("busy", "longest_s"), [(False, 10.0 + 30.0), (True, 10.0 + 30.0 + 60.0 + 8 * 1000 / 32768)])
def test_no_gathering_takes_longer_than(busy: bool, longest_s: float) -> None:
    table = Table(1, manifest=manifest_with(gather_s=10.0))
    assert table.matchmakers[0].company.longest_s(busy=busy) == longest_s


def test_a_lone_peer_meets_nobody() -> None:
    async def main() -> None:
        table = Table(1)
        assert await table.meet() == {0: Missed(reason="alone", detail="1 ready, 2 needed")}
        client = Table(1, clients=(0,))
        assert await client.meet() == {0: Missed(reason="alone", detail="nobody to meet")}

    run_simulated(main())


def test_clients_meet_at_one_that_can_be_dialled() -> None:
    async def main() -> None:
        table = Table(4, clients=(0, 1, 3))
        group = table.groups(await table.meet(), 0, 1, 2, 3)
        assert group.leader == 2

    run_simulated(main())


def test_a_weight_is_what_was_trained_and_at_most_the_runs_limit() -> None:
    async def main() -> None:
        table = Table(2)
        most = table.manifest.spec.max_weight_tokens
        assert table.groups(await table.meet(weight=most + 1), 0, 1).weights == (most, most)

    run_simulated(main())


def test_a_readiness_says_what_its_peer_has_measured_and_a_helpers_nothing() -> None:
    async def main() -> None:
        table = Table(3)
        table.matchmakers[1].company.measured.note(len(HISTORY), {table.ids[0]: 1000, table.ids[2]: 3000})
        group = table.groups(await table.meet(), 0, 1, 2)
        said = {tag_of(head(HISTORY), table.ids[0]): 960, tag_of(head(HISTORY), table.ids[2]): 2816}
        assert [unpack_uplinks(member.uplinks) for member in group.members] == [{}, said, {}]
        assert group.uplinks == (960, 960, 2816)
        assert table.matchmakers[0].company.helper.readiness_beside(group.members[1]).uplinks == b""

    run_simulated(main())


@pytest.mark.parametrize("training", [(0,), (2,), (0, 2)])
def test_who_still_trains_is_told_and_waited_for(training: tuple[int, ...]) -> None:
    """The leader's own trainer, or another one, needs a few steps more: it says so, and nobody waits longer."""

    async def main() -> None:
        table = Table(4)
        for i in training:
            table.matchmakers[i].seat.phase = "inner"
            table.matchmakers[i].seat.progress = Progress(inner_step=7, planned=10, step_s=0.5, reported_s=now_s())
        began_s = now_s()

        async def late(i: int) -> Group | Missed:
            await table.matchmakers[i].seat.changed.event.wait()
            assert table.matchmakers[i].seat.closes_s == pytest.approx(began_s + GATHER_S, abs=0.2)
            await asyncio.sleep(1.5)
            return await table.offer(i)

        in_time = [i for i in range(4) if i not in training]
        meeting = asyncio.ensure_future(table.meet(*in_time))
        came = dict(zip(training, await asyncio.gather(*(late(i) for i in training))))
        table.groups(came | await meeting, 0, 1, 2, 3)
        assert 1.5 <= now_s() - began_s < GATHER_S

    run_simulated(main())


def test_who_trains_on_is_waited_for_until_it_said_and_no_longer() -> None:
    async def main() -> None:
        table = Table(3)
        seat = table.matchmakers[2].seat
        seat.phase = "inner"
        seat.progress = Progress(inner_step=1, planned=100, step_s=5.0, reported_s=now_s())
        began_s = now_s()
        table.groups(await table.meet(0, 1), 0, 1)
        assert now_s() - began_s == pytest.approx(5.0 + CLOSING_MARGIN_S, abs=0.5)
        assert not table.suspects(0)

    run_simulated(main())


def test_nobody_is_waited_for_longer_than_the_longest_extension() -> None:
    async def main() -> None:
        table = Table(3, by_hand=(2,))
        table.serve(2, promise)
        began_s = now_s()
        table.groups(await table.meet(), 0, 1)
        assert now_s() - began_s == pytest.approx(GATHER_S + MAX_GATHER_EXTENSION_S, abs=0.5)

    run_simulated(main())


def test_too_few() -> None:
    async def main() -> None:
        table = Table(3, by_hand=(2,), manifest=manifest_with(min_group=3))
        missed = Missed(reason="alone", detail="2 ready, 3 needed")
        assert await table.meet() == {0: missed, 1: missed}

    run_simulated(main())


def test_too_many() -> None:
    """The best ranked meet. The others find the group full; nobody has done anything wrong."""

    async def main() -> None:
        table = Table(4, manifest=manifest_with(max_group=2))

        async def over_soon() -> None:
            await asyncio.sleep(3)
            for i in (0, 1):
                seat = table.matchmakers[i].seat
                seat.standing, seat.in_round = standing(HISTORY + "d"), False
                seat.sealed_record = table.record(i, HISTORY + "d", issued_s=NOW_S + 0.7)
                seat.changed.ring()

        found, _ = await asyncio.gather(table.meet(), over_soon())
        assert table.members_of(table.groups(found, 0, 1)) == [0, 1]
        behind = Missed(reason="behind", detail=f"peer {table.ids[1][-8:]} is past this head")
        assert (found[2], found[3]) == (behind, behind)
        assert [table.suspects(i) for i in range(4)] == [set()] * 4

    run_simulated(main())


def test_who_is_behind_learns_it() -> None:
    async def main() -> None:
        table = Table(2, histories={0: HISTORY + "d"})
        found = await table.meet(1)
        assert found == {1: Missed(reason="behind", detail=f"peer {table.ids[0][-8:]} is past this head")}
        record = table.directory(1).get(table.ids[0])
        assert record is not None
        assert (record.step, record.head) == (4, head(HISTORY + "d"))

    run_simulated(main())


def test_a_member_ahead_ends_the_gathering() -> None:
    """The leader asks it to come, and hears that this round is over."""

    async def main() -> None:
        table = Table(3, histories={2: HISTORY + "d"})
        found = await table.meet(0, 1)
        behind = Missed(reason="behind", detail=f"peer {table.ids[0][-8:]} is past this head")
        assert found == {0: behind, 1: behind}
        assert table.directory(0).get(table.ids[2]).step == 4  # type: ignore[union-attr]

    run_simulated(main())


def test_who_knows_that_the_swarm_went_on_forms_no_group_on_the_old_head() -> None:
    """Its own trainer has not heard yet; who asks it to lead has not either, and would go on alone."""

    async def main() -> None:
        table = Table(4, by_hand=(2, 3), manifest=manifest_with(min_group=1))
        for i in (2, 3):
            table.directory(0).learn(table.record(i, HISTORY + "d", issued_s=NOW_S + 0.5), NOW_S)
        found = await table.meet(1)
        assert found == {1: Missed(reason="behind", detail=f"peer {table.ids[0][-8:]} is past this head")}
        assert max(record.step for record in table.directory(1).live(NOW_S)) == 4

    run_simulated(main())


def test_a_leader_that_moves_on_forms_no_group_on_the_old_head() -> None:
    async def main() -> None:
        table = Table(3, by_hand=(2,), manifest=manifest_with(min_group=1))
        table.serve(2, stay_silent)
        ready = asyncio.create_task(table.answer(1, 0, table.ready(1)))
        await asyncio.sleep(1.0)
        seat = table.matchmakers[0].seat
        seat.standing, seat.sealed_record = standing(HISTORY + "d"), table.record(0, HISTORY + "d")
        assert await ready == Behind(record=seat.sealed_record)

    run_simulated(main())


def test_on_another_head_nobody_is_met() -> None:
    async def main() -> None:
        table = Table(2, histories={0: "xyz"})
        assert await table.meet(1) == {1: Missed(reason="alone", detail="1 ready, 2 needed")}
        assert not table.suspects(1)

    run_simulated(main())


@pytest.mark.parametrize("phase", ["joining", "inner"])
def test_seeds_and_newcomers_are_not_waited_for(phase: Any) -> None:
    async def main() -> None:
        table = Table(3)
        seat = table.matchmakers[2].seat
        seat.phase, seat.role_trainer = phase, phase == "joining"
        began_s = now_s()
        table.groups(await table.meet(0, 1), 0, 1)
        assert now_s() - began_s < 1.0
        assert not table.suspects(0)

    run_simulated(main())


def test_who_is_in_a_round_answers_when_it_is_over() -> None:
    async def main() -> None:
        table = Table(2)
        seat = table.matchmakers[0].seat
        seat.in_round = True
        asking = asyncio.ensure_future(table.meet(1))
        await asyncio.sleep(5)
        assert not asking.done()
        seat.standing, seat.in_round = standing(HISTORY + "d"), False
        seat.sealed_record = table.record(0, HISTORY + "d", issued_s=NOW_S + 0.7)
        seat.changed.ring()
        assert (await asking)[1] == Missed(reason="behind", detail=f"peer {table.ids[0][-8:]} is past this head")

    run_simulated(main())


def test_a_redirect_leads_to_who_ranks_better() -> None:
    async def main() -> None:
        table = Table(3)
        table.directory(2).suspect(table.ids[0])  # so it asks 1, who knows better
        answer = await table.answer(2, 1, table.ready(2, to=1))
        assert answer == Redirect(record=table.record(0))
        table.network.kill(table.ids[0])
        group = table.groups(await table.meet(1, 2), 1, 2)
        assert table.members_of(group) == [1, 2]
        assert table.suspects(1) == {0}

    run_simulated(main())


def test_who_waits_for_a_roster_names_its_leader_at_once() -> None:
    """2 takes 1 for the leader, which waits at 0 for 3, which still trains."""

    async def main() -> None:
        table = Table(4)
        seat = table.matchmakers[3].seat
        seat.phase, seat.progress = "inner", Progress(inner_step=1, planned=2, step_s=5.0, reported_s=now_s())
        waiting = asyncio.ensure_future(table.meet(0, 1))
        await asyncio.sleep(1.0)
        channel = await table.say(2, 1, table.ready(2, to=1))
        word: Message = await channel.receive(*ANSWERS, timeout_s=1.0)
        assert isinstance(word, Redirect)
        assert open_record(word.record).peer_id == table.ids[0]
        table.groups(await waiting, 0, 1)

    run_simulated(main())


def test_who_waits_elsewhere_says_so_until_it_is_over_and_no_longer() -> None:
    """2 calls 1, which waits at 0 for a roster; when 0 refuses, 1 leads, and says so."""

    async def main() -> None:
        table = Table(3, by_hand=(0, 2))
        refused_s: list[float] = []

        async def promises_and_refuses(table: Table, channel: Channel, message: Message) -> None:
            await channel.send(Eta(eta_s=2.0))
            await asyncio.sleep(2.0)
            refused_s.append(now_s())
            await channel.send(No(reason="leaving"))

        table.serve(0, promises_and_refuses)
        table.serve(2, stay_silent)
        meeting = asyncio.ensure_future(table.meet(1))
        await asyncio.sleep(0.5)
        answer = await table.answer(2, 1, Closing(head=AT, gather_s=GATHER_S, record=table.record(2)))
        assert isinstance(answer, Redirect)
        assert open_record(answer.record).peer_id == table.ids[1]
        assert now_s() - refused_s[0] < 0.5
        await meeting

    run_simulated(main())


def test_a_gathering_is_left_to_nobody_who_does_not_come_to_this_head() -> None:
    """0 calls 1, which gathers and waits for 3, and says in its record that it still joins."""

    async def main() -> None:
        table = Table(4, by_hand=(0,))
        table.serve(0, refuse)
        seat = table.matchmakers[3].seat
        seat.phase, seat.progress = "inner", Progress(inner_step=1, planned=2, step_s=3.0, reported_s=now_s())
        meeting = asyncio.ensure_future(table.meet(1, 2))
        await asyncio.sleep(1.0)
        joining = table.record(0, phase="joining", issued_s=NOW_S + 0.7)
        assert await table.answer_eta(0, 1, Closing(head=AT, gather_s=GATHER_S, record=joining)) == 0.0
        table.groups(await meeting, 1, 2)

    run_simulated(main())


@pytest.mark.parametrize("step_s", [15.0, 25.0])
def test_a_member_that_waits_for_long_hears_from_its_leader(step_s: float) -> None:
    """Somebody is in the middle of an inner step that takes longer than any time-out of a message."""

    async def main() -> None:
        table = Table(3)
        seat = table.matchmakers[2].seat
        seat.phase, seat.progress = "inner", Progress(inner_step=1, planned=2, step_s=step_s, reported_s=now_s())

        async def late() -> Group | Missed:
            await asyncio.sleep(step_s)
            return await table.offer(2)

        third, found = await asyncio.gather(late(), table.meet(0, 1))
        table.groups({2: third} | found, 0, 1, 2)
        assert not any(table.suspects(i) for i in range(3))

    run_simulated(main())


def test_a_member_waits_for_the_roster_of_the_longest_gathering() -> None:
    """It was ready before its leader heard of it, so it has waited for longer than that."""

    async def main() -> None:
        table = Table(2, by_hand=(0,))
        longest_s = table.matchmakers[1].company.longest_s(busy=False)
        roster = sends_roster(lambda table, asker: [of(table, 0), asker])

        async def gathers_as_long_as_it_may(table: Table, channel: Channel, message: Message) -> None:
            for tenths in range(10):
                await channel.send(Eta(eta_s=longest_s * (1 - tenths / 10)))
                await asyncio.sleep(longest_s / 10)
            await channel.send(Eta(eta_s=0.0))
            await roster(table, channel, message)

        table.serve(0, gathers_as_long_as_it_may)
        assert table.members_of(table.groups(await table.meet(), 1)) == [0, 1]

    run_simulated(main())


def test_who_looks_for_a_better_leader_says_that_it_is_there() -> None:
    """The two best ranked machines are off, which takes a time-out each to find out. The third still trains, and looks
    for them because the fourth, which knows, asks it to lead."""

    async def main() -> None:
        table = Table(4, by_hand=(0, 1))
        seat = table.matchmakers[2].seat
        seat.phase, seat.progress = "inner", Progress(inner_step=1, planned=2, step_s=0.5, reported_s=now_s())
        transport, off = table.transports[2], table.ids[:2]
        opens = transport.open
        asked: list[str] = []

        async def open_(peer_id: str, maddrs: list[str], protocol: str) -> Channel:
            if peer_id not in off:
                return await opens(peer_id, maddrs, protocol)
            asked.append(peer_id)
            await asyncio.sleep(TIMEOUTS.connect_s)
            raise Silent(peer_id, "cannot be reached")

        transport.open = open_  # type: ignore[method-assign]
        for peer_id in off:
            table.directory(3).suspect(peer_id)

        async def called() -> Group | Missed:
            await asyncio.sleep(2 * TIMEOUTS.connect_s + 1.0)
            return await table.offer(2)

        third, found = await asyncio.gather(called(), table.meet(3))
        assert asked == off
        assert table.members_of(table.groups({2: third} | found, 2, 3)) == [2, 3]
        assert table.suspects(3) == {0, 1}

    run_simulated(main())


def test_those_who_do_not_come_are_on_the_roster_where_missed_rounds_are_kept() -> None:
    """One is silent, one cannot be reached; both have said that they train on this head."""

    async def main() -> None:
        table = Table(5, by_hand=(2, 3), manifest=manifest_with(on_missed="keep"))
        table.serve(2, stay_silent)
        table.directory(0).learn(table.record(4, phase="left", issued_s=NOW_S + 0.7), NOW_S + 1)
        table.matchmakers[4].seat.phase = "left"
        group = table.groups(await table.meet(0, 1), 0, 1)
        assert group.total_weight == 300, "who is silent counts; who cannot be reached is suspected, and does not"
        plain = Table(5, by_hand=(2, 3))
        plain.serve(2, stay_silent)
        assert plain.groups(await plain.meet(0, 1), 0, 1).total_weight is None

    run_simulated(main())


# -- leaders: 0 is written by hand ----------------------------------------------------------------------------------


def says(answer: Callable[[Table, bytes], Message]) -> Hand:
    """``answer``: (table, the asker's sealed readiness) -> what the leader sends."""

    async def hand(table: Table, channel: Channel, message: Message) -> None:
        await channel.send(answer(table, message.readiness) if isinstance(message, Ready) else No(reason="no"))

    return hand


def sends_roster(members: Callable[[Table, bytes], Sequence[bytes]], signer: int = 0) -> Hand:
    def roster(table: Table, asker: bytes) -> Roster:
        sealed = seal_roster(members(table, asker), [], table.members[signer])
        return Roster(members=list(sealed.members), signature=sealed.signature)

    return says(roster)


async def promises_and_stops(table: Table, channel: Channel, message: Message) -> None:
    """As a process that is stopped between its first word and the roster."""
    await channel.send(Eta(eta_s=2.0))
    await asyncio.sleep(500)


async def promises_for_ever(table: Table, channel: Channel, message: Message) -> None:
    while True:
        await channel.send(Eta(eta_s=86400.0))
        await asyncio.sleep(1.0)


def of(table: Table, i: int, **changes: Any) -> bytes:
    return table.ready(i, **changes).readiness


def forged(table: Table, i: int) -> bytes:
    readiness = readiness_of(table.members[i], HISTORY, run_id=table.manifest.run_id)
    return seal_readiness(readiness, table.members[0])


LEADERS: dict[str, tuple[Hand, str | None]] = {
    "silent": (stay_silent, "has sent nothing for 10 s"),
    "stopped": (promises_and_stops, "has sent nothing for 10 s"),
    "gone": (end, "closed the stream"),
    "promises for ever": (promises_for_ever, "gathers for more than"),
    "roster without the asker": (sends_roster(lambda t, a: [of(t, 0), of(t, 1), of(t, 2)]), "a roster without me"),
    "roster with a duplicate": (sends_roster(lambda t, a: [of(t, 0), a, a]), "names a peer twice"),
    "roster of two readinesses of one": (
        sends_roster(lambda t, a: [of(t, 0), of(t, 0, nonce=b"another."), a]),
        "names a peer twice",
    ),
    "roster with a ghost": (sends_roster(lambda t, a: [of(t, 0), a, forged(t, 3)]), "not signed by its peer"),
    "roster with garbage": (sends_roster(lambda t, a: [a, b"garbage"]), "sends"),
    "roster of another head": (sends_roster(lambda t, a: [of(t, 0, head=head("x")), a]), "member on another head"),
    "roster of another run": (sends_roster(lambda t, a: [of(t, 0, run_id="cd" * 20), a]), "member on another head"),
    "roster with a weight": (sends_roster(lambda t, a: [of(t, 0, weight=10**9), a]), "with a weight of 1000000000"),
    "roster in disorder": (sends_roster(lambda t, a: [of(t, 3), a, of(t, 0)]), "not in the order of rank"),
    "roster that another one signed": (sends_roster(lambda t, a: [of(t, 0), a], signer=3), "leader did not sign"),
    "roster of readiness for another": (
        sends_roster(lambda t, a: [of(t, 0), a, of(t, 3, leader=t.ids[1])]),
        "that is ready for another leader",
    ),
    "roster of one": (sends_roster(lambda t, a: [a]), "a roster of 1"),
    "roster of nobody": (sends_roster(lambda t, a: []), "a roster of 0"),
    "roster of too many": (
        sends_roster(lambda t, a: [of(t, 0), of(t, 1), of(t, 2), of(t, 3), a]),
        "a roster of 5",
    ),
    "refuses": (says(lambda t, a: No(reason="leaving")), None),
    "redirects to a worse one": (says(lambda t, a: Redirect(record=t.record(3))), "does not rank before it"),
    "redirects to itself": (says(lambda t, a: Redirect(record=t.record(0))), "does not rank before it"),
    "redirects to the asker": (says(lambda t, a: Redirect(record=t.record(2))), "does not rank before it"),
    "behind where it is not": (says(lambda t, a: Behind(record=t.record(0))), None),
    "behind on a head from nowhere": (says(lambda t, a: Behind(record=t.record(0, "xyz", issued_s=NOW_S + 1))), None),
    "redirects to nobody": (says(lambda t, a: Redirect(record=b"")), "sends"),
    "redirects to a ghost": (
        says(lambda t, a: Redirect(record=seal_record(record_of(t.members[3], HISTORY), t.members[0]))),
        "not signed by its peer",
    ),
    "behind a ghost": (says(lambda t, a: Behind(record=b"garbage")), "sends"),
    "out of turn": (says(lambda t, a: Closing(head=AT, gather_s=1.0, record=b"")), "sends closing out of turn"),
}


@pytest.mark.parametrize(("hand", "why"), LEADERS.values(), ids=LEADERS)
def test_a_leader_that_does_not_lead(hand: Hand, why: str | None, caplog: pytest.LogCaptureFixture) -> None:
    """It costs one question; the next in rank leads, and only the offender is suspected."""

    async def main() -> None:
        table = Table(4, by_hand=(0, 3), manifest=manifest_with(max_group=4))
        asked: list[int] = []

        async def counted(table: Table, channel: Channel, message: Message) -> None:
            if isinstance(message, Ready):
                asked.append(table.ids.index(channel.peer_id))
            await hand(table, channel, message)

        table.serve(0, counted)
        table.network.kill(table.ids[3])
        for i in (1, 2):
            table.directory(i).suspect(table.ids[3])
        began_s = now_s()
        with caplog.at_level("INFO"):
            found = await table.meet()
        assert table.members_of(table.groups(found, 1, 2)) == [1, 2]
        assert sorted(asked) == [1, 2], "each asks it once"
        assert table.suspects(1) == table.suspects(2) == ({0, 3} if why else {3})
        assert why is None or f"cannot meet at {table.ids[0][-8:]}" in caplog.text
        assert why is None or why in caplog.text
        longest_s = GATHER_S + MAX_GATHER_EXTENSION_S + TIMEOUTS.round_limit_s(8 * MANIFEST.n_params)
        assert now_s() - began_s < (longest_s + TIMEOUTS.request_s + 1 if hand is promises_for_ever else 11)

    run_simulated(main())


@pytest.mark.parametrize("instant_s", [0.03 * i for i in range(10)])
def test_a_leader_that_dies_while_it_gathers(instant_s: float) -> None:
    """The others meet without it; where it died after the roster, that is for the round to find out."""

    async def main() -> None:
        table = Table(4, by_hand=(3,))
        table.transports[3].handlers[table.protocol] = lambda channel: asyncio.sleep(0.1)

        async def kill() -> None:
            await asyncio.sleep(instant_s)
            table.network.kill(table.ids[0])

        table.transports[0]._spawn(table.offer(0))
        found, _ = await asyncio.gather(table.meet(1, 2), kill())
        group = found[1]
        assert isinstance(group, Group)
        assert table.members_of(table.groups(found, 1, 2)) in ([0, 1, 2], [1, 2])
        if instant_s == 0:
            assert len(group.members) == 2
            assert table.suspects(1) == {0, 3}
        if instant_s > 0.25:
            assert len(group.members) == 3

    run_simulated(main())


# -- members: 2 is written by hand ----------------------------------------------------------------------------------


MEMBERS: dict[str, tuple[Callable[[Table], Ready], str]] = {
    "of somebody else": (lambda t: Ready(readiness=of(t, 1), record=t.record(2)), "sends somebody else's readiness"),
    "forged": (
        lambda t: Ready(
            readiness=seal_readiness(readiness_of(t.members[2], HISTORY), identity(99)), record=t.record(2)
        ),
        "not signed by its peer",
    ),
    "garbage": (lambda t: Ready(readiness=b"garbage", record=t.record(2)), "sends"),
    "of another run": (lambda t: t.ready(2, run_id="cd" * 20), "sends somebody else's readiness"),
    "too heavy": (lambda t: t.ready(2, weight=10**9), "claims a weight of 1000000000 tokens"),
    "for another leader": (lambda t: t.ready(2, to=1), "sends a readiness for another leader"),
    "at another step": (lambda t: t.ready(2, step=7), "says that this head is outer step 7"),
    "no record": (lambda t: Ready(readiness=of(t, 2), record=b""), "sends"),
    "a ghost's record": (
        lambda t: Ready(readiness=of(t, 2), record=seal_record(record_of(t.members[1]), t.members[2])),
        "not signed by its peer",
    ),
}


@pytest.mark.parametrize(("message", "complaint"), MEMBERS.values(), ids=MEMBERS)
def test_unsound_readiness_keeps_nobody_else_from_meeting(message: Callable[[Table], Ready], complaint: str) -> None:
    async def main() -> None:
        table = Table(3, by_hand=(2,))
        channel = await table.say(2, 0, message(table))
        found = await table.meet()
        assert table.members_of(table.groups(found, 0, 1)) == [0, 1]
        assert len(table.complaints(0)) == 1
        offender, reason = table.complaints(0)[0]
        assert offender == 2
        assert complaint in reason
        assert await channel.reader.read() == b""
        assert table.suspects(1) == set()

    run_simulated(main())


async def leaves(channel: Channel) -> None:
    channel.close()


async def talks(channel: Channel) -> None:
    await channel.send_frame(b"x")


@pytest.mark.parametrize("then", [leaves, talks])
def test_who_leaves_before_the_roster_is_not_on_it(then: Callable[[Channel], Awaitable[None]]) -> None:
    async def main() -> None:
        table = Table(3, by_hand=(2,))
        table.serve(2, stay_silent)
        began_s = now_s()

        async def come_and_go() -> None:
            channel = await table.say(2, 0, table.ready(2))
            await asyncio.sleep(1.0)
            await then(channel)

        async def later() -> dict[int, Group | Missed]:
            await asyncio.sleep(0.5)
            table.matchmakers[1].seat.phase = "inner"
            found = asyncio.ensure_future(table.meet(0))
            await asyncio.sleep(1.5)
            return await found | await table.meet(1)

        table.matchmakers[1].seat.progress = Progress(inner_step=0, planned=3, step_s=0.5, reported_s=began_s)
        _, found = await asyncio.gather(come_and_go(), later())
        assert 2 not in [table.ids.index(m.peer_id) for g in found.values() if isinstance(g, Group) for m in g.members]

    run_simulated(main())


def test_a_new_stream_of_a_member_outlives_its_old_one() -> None:
    """It gave up, and came again with new readiness, before the leader saw its first stream end."""

    async def main() -> None:
        table = Table(3, by_hand=(1, 2))
        table.serve(1, stay_silent)
        table.serve(2, stay_silent)
        first = await table.say(2, 0, table.ready(2))
        await asyncio.sleep(0.5)
        again = asyncio.ensure_future(table.answer(2, 0, table.ready(2, nonce=b"another.")))
        await asyncio.sleep(0.5)
        first.close()
        found = await table.meet()
        assert table.members_of(table.groups(found, 0)) == [0, 2]
        members, group, answer = roster_of(found[0], table, b"another."), found[0], await again
        assert isinstance(group, Group)
        assert isinstance(answer, Roster)
        assert answer.members == members
        assert group.sealed == seal_roster(members, [], table.members[0])

    run_simulated(main())


def roster_of(group: Group | Missed, table: Table, nonce: bytes) -> list[bytes]:
    assert isinstance(group, Group)
    assert group.members[1].nonce == nonce
    return [seal_readiness(member, table.members[table.ids.index(member.peer_id)]) for member in group.members]


@pytest.mark.parametrize(
    ("hand", "suspected", "costs_s"),
    [
        (stay_silent, False, GATHER_S + CLOSING_MARGIN_S),
        (end, True, 0.0),
        (None, True, 0.0),
    ],
)
def test_who_does_not_say_when_it_comes_is_not_waited_for(hand: Hand | None, suspected: bool, costs_s: float) -> None:
    async def main() -> None:
        table = Table(3, by_hand=(2,))

        async def nonsense(table: Table, channel: Channel, message: Message) -> None:
            await channel.send(TooFew(ready=1))

        table.serve(2, hand or nonsense)
        began_s = now_s()
        table.groups(await table.meet(), 0, 1)
        assert now_s() - began_s == pytest.approx(costs_s, abs=0.5)
        assert (2 in table.suspects(0)) == suspected

    run_simulated(main())


NOTICES: dict[str, tuple[Callable[[Table], Message], bool]] = {
    "claims the lead": (lambda t: Redirect(record=t.record(2)), True),
    "names the leader itself": (lambda t: Redirect(record=t.record(0)), True),
    "names another member": (lambda t: Redirect(record=t.record(1)), True),
    "behind where it is not": (lambda t: Behind(record=t.record(2)), False),
    "behind on a head from nowhere": (lambda t: Behind(record=t.record(2, "xyz", issued_s=NOW_S + 1)), False),
    "behind a ghost": (lambda t: Behind(record=b"garbage"), True),
}


@pytest.mark.parametrize(("answer", "suspected"), NOTICES.values(), ids=NOTICES)
def test_who_is_called_and_lies_ends_no_gathering(answer: Callable[[Table], Message], suspected: bool) -> None:
    async def main() -> None:
        table = Table(3, by_hand=(2,))

        async def lie(table: Table, channel: Channel, message: Message) -> None:
            await channel.send(answer(table))

        table.serve(2, lie)
        began_s = now_s()
        assert table.members_of(table.groups(await table.meet(), 0, 1)) == [0, 1]
        assert now_s() - began_s < 1
        assert (2 in table.suspects(0)) == suspected

    run_simulated(main())


@pytest.mark.parametrize(("leads", "costs_s", "failures"), [(stay_silent, TIMEOUTS.request_s, 1), (refuse, 0.0, 2)])
def test_who_claims_the_lead_and_does_not_lead_has_two_chances(leads: Hand, costs_s: float, failures: int) -> None:
    """Silence makes it suspect until it signs a newer record, so nobody even calls it."""

    async def main() -> None:
        table = Table(3, by_hand=(0,))
        asked: list[int] = []

        async def hand(table: Table, channel: Channel, message: Message) -> None:
            if isinstance(message, Closing):
                await channel.send(Redirect(record=table.record(0, issued_s=NOW_S + 1 + now_s() / 1000)))
            else:
                asked.append(table.ids.index(channel.peer_id))
                await leads(table, channel, message)

        table.serve(0, hand)
        began_s = now_s()
        assert table.members_of(table.groups(await table.meet(), 1, 2)) == [1, 2]
        assert costs_s <= now_s() - began_s < costs_s + TIMEOUTS.request_s
        assert max(asked.count(1), asked.count(2)) <= 3
        assert len(table.matchmakers[1].company.failures[table.ids[0]]) == failures <= CHANCES

    run_simulated(main())


def test_failures_of_leaders_are_forgotten_after_a_records_life() -> None:
    """A peer may train for months: what it knows of leaders long ago is of no use."""

    async def main() -> None:
        table = Table(1)
        matchmaker, others = table.matchmakers[0], [identity(100 + i).peer_id for i in range(3)]
        company = matchmaker.company
        for step in range(1, 101):
            at = digest(step.to_bytes(4, "big"))
            matchmaker.seat.standing = Standing(step=step, head=at, heads=())
            for attempt in range(2):
                found = await matchmaker.find_group(100)
                assert isinstance(found, Missed)
                assert found.reason == "alone"
                assert len(company.failures) == attempt * len(others), "those of a moment ago are there"
                for leader in others:
                    company.failed(at, leader, cost_s=0.0)
            assert [len(failures) for failures in company.failures.values()] == [2] * len(others)
            await asyncio.sleep(TIMEOUTS.record_life_s)

    run_simulated(main())


def test_a_leader_that_failed_on_one_head_is_asked_last_on_the_next() -> None:
    async def main() -> None:
        table = Table(3)
        company = table.matchmakers[2].company
        assert company.leaders(AT) == table.ids
        company.failed(head("ab"), table.ids[0], cost_s=10.0)
        assert company.leaders(AT) == [table.ids[1], table.ids[2], table.ids[0]]
        assert company.leaders(AT, {table.ids[0]}) == table.ids, "others say that they wait there"
        await asyncio.sleep(TIMEOUTS.record_life_s)
        assert company.leaders(AT) == table.ids

    run_simulated(main())


def test_who_has_been_waited_for_in_vain_is_asked_to_lead_last() -> None:
    """Until half of its credit is back, whatever a record's life is: it would cost one phase after another."""

    async def main() -> None:
        table = Table(3)
        company = table.matchmakers[2].company
        life_s = TIMEOUTS.record_life_s
        company.waits.charge(table.ids[0], life_s / 2 - 1, now_s())
        assert company.leaders(AT) == table.ids, "one that was late once"
        company.waits.charge(table.ids[0], 2.0, now_s())
        assert company.leaders(AT) == [table.ids[1], table.ids[2], table.ids[0]]
        await asyncio.sleep(1.0 / CREDIT_SHARE + 1)
        assert company.leaders(AT) == table.ids

    run_simulated(main())


def test_a_leader_that_only_promises_is_not_waited_for_as_a_member() -> None:
    """It has cost its credit once, and shall not cost it again in the next gathering; one that is silent costs none."""

    async def main() -> None:
        table = Table(3, by_hand=(0,))

        async def promise(table: Table, channel: Channel, message: Message) -> None:
            while True:
                await channel.send(Eta(eta_s=86_400.0))
                await asyncio.sleep(1.0)

        table.serve(0, promise)
        company, leader = table.matchmakers[2].company, table.ids[0]
        company.failed(head("ab"), leader, cost_s=GATHER_S + TIMEOUTS.record_life_s)
        assert company.waits_until_s(leader, now_s(), busy=False) > now_s() + TIMEOUTS.record_life_s
        await asyncio.sleep(TIMEOUTS.record_life_s)
        await table.meet(1, 2)
        for busy in (False, True):
            waits_s = company.waits_until_s(leader, now_s(), busy=busy) - now_s()
            assert waits_s <= GATHER_S + 2 * CLOSING_MARGIN_S

    run_simulated(main())


@pytest.mark.parametrize(("newcomers", "as_long_as_a_round"), [((2,), False), ((1,), True), ((1, 2), False)])
def test_a_newcomer_that_is_busy_is_waited_for_like_one_that_is_free(
    newcomers: tuple[int, ...], as_long_as_a_round: bool
) -> None:
    """Of the four members two or more are known: a round without them certifies nothing, so it makes no history."""

    async def main() -> None:
        table = Table(4, newcomers=newcomers)
        company = table.matchmakers[0].company
        waits_s = company.waits_until_s(table.ids[2], now_s(), busy=True) - now_s()
        assert waits_s == pytest.approx(company.longest_s(busy=as_long_as_a_round))

    run_simulated(main())


def test_before_anybody_is_known_a_busy_peer_is_waited_for_like_one_that_is_free() -> None:
    """The run's owner witnesses one update of a head, so its round makes no second history; nor is it waited for longer
    as a leader."""

    async def main() -> None:
        table = Table(3, newcomers=(0, 1, 2))
        company, other = table.matchmakers[0].company, table.ids[2]
        assert company.waits_until_s(other, now_s(), busy=True) - now_s() == company.longest_s(busy=False)
        assert company.patience_s(other, busy=True) == company.patience_s(other, busy=False)

    run_simulated(main())


def test_who_is_busy_is_waited_for_out_of_the_account_that_has_less_left() -> None:
    """Whether rounds or waits have cost it: it would else cost the same twice. Who is free is waited for all the same,
    for it may have been stopped in a round once."""

    async def main() -> None:
        table, life_s = Table(4), TIMEOUTS.record_life_s
        company, member, leader = table.matchmakers[0].company, table.ids[2], table.ids[3]
        company.rounds.charge(member, life_s, now_s())
        assert company.waits_until_s(member, now_s(), busy=True) - now_s() == GATHER_S + CLOSING_MARGIN_S
        assert company.waits_until_s(member, now_s(), busy=False) - now_s() == company.longest_s(busy=False)
        assert company.patience_s(leader, busy=True) == company.patience_s(leader, busy=False) + life_s
        company.waits.charge(leader, life_s, now_s())
        assert company.patience_s(leader, busy=True) == company.patience_s(leader, busy=False)

    run_simulated(main())


def test_who_is_known_by_its_record_alone_is_asked_to_lead_last() -> None:
    async def main() -> None:
        table = Table(3, strangers=(0,))
        company = table.matchmakers[2].company
        assert company.leaders(AT) == [table.ids[1], table.ids[2], table.ids[0]]
        table.directory(2).proven.answered(table.ids[0])
        assert company.leaders(AT) == table.ids

    run_simulated(main())


def test_strangers_all_of_them_meet() -> None:
    """As when a whole swarm was started again: each takes itself for the leader, and hears of the better ones."""

    async def main() -> None:
        table = Table(4, strangers=(0, 1, 2, 3))
        began_s = now_s()
        assert table.members_of(table.groups(await table.meet(), 0, 1, 2, 3)) == [0, 1, 2, 3]
        assert now_s() - began_s < CLOSING_MARGIN_S, "who ranks behind another says at once that it gathers"

    run_simulated(main())


def test_a_silent_stranger_is_not_waited_for_and_costs_nothing() -> None:
    async def main() -> None:
        table = Table(4, by_hand=(0, 3), strangers=(0, 3))
        for i in (0, 3):
            table.serve(i, stay_silent)
        began_s = now_s()
        assert table.members_of(table.groups(await table.meet(), 1, 2)) == [1, 2]
        assert now_s() - began_s < 1.0

    run_simulated(main())


def test_a_stranger_that_answers_is_waited_for() -> None:
    async def main() -> None:
        table = Table(3, strangers=(2,))
        seat = table.matchmakers[2].seat
        seat.phase, seat.progress = "inner", Progress(inner_step=9, planned=10, step_s=2.5, reported_s=now_s())

        async def late() -> Group | Missed:
            await asyncio.sleep(2.5)
            return await table.offer(2)

        table.matchmakers[1].seat.phase = "inner"
        table.matchmakers[1].seat.progress = Progress(inner_step=9, planned=10, step_s=2.0, reported_s=now_s())

        async def second() -> Group | Missed:
            await asyncio.sleep(2.0)
            return await table.offer(1)

        found = await asyncio.gather(table.offer(0), second(), late())
        assert table.members_of(table.groups(dict(enumerate(found)), 0, 1, 2)) == [0, 1, 2]

    run_simulated(main())


def test_a_lone_peer_waits_for_strangers_as_long_as_a_round_gathers() -> None:
    """Fewer than the run's smallest group have nothing to lose."""

    async def main() -> None:
        table = Table(2, by_hand=(1,), strangers=(1,))
        table.serve(1, stay_silent)
        began_s = now_s()
        assert await table.meet() == {0: Missed(reason="alone", detail="1 ready, 2 needed")}
        assert now_s() - began_s == pytest.approx(GATHER_S + CLOSING_MARGIN_S, abs=0.1)

    run_simulated(main())


async def promise(table: Table, channel: Channel, message: Message) -> None:
    await channel.send(Eta(eta_s=86400.0))
    await asyncio.sleep(500)


def trains_for(table: Table, i: int, steps_s: float, steps: int = 10) -> Seat:
    """A member that has so many inner steps before it."""
    seat = table.matchmakers[i].seat
    seat.phase, seat.progress = "inner", Progress(inner_step=0, planned=steps, step_s=steps_s, reported_s=now_s())
    return seat


def test_one_that_is_ready_calls_nobody_and_trains_on_after_a_while() -> None:
    async def main() -> None:
        table = Table(4)
        others = [trains_for(table, i, 60.0) for i in (0, 2, 3)]
        began_s = now_s()
        assert await table.meet(1) == {1: Missed(reason="alone", detail="1 ready, 2 needed")}
        assert 0 <= now_s() - began_s - GATHER_S - MAX_GATHER_EXTENSION_S <= TIMEOUTS.heartbeat_s
        assert [seat.closes_s for seat in others] == [None] * 3
        await asyncio.sleep(1)
        assert not any(matchmaker.gatherings.by_head for matchmaker in table.matchmakers.values())
        assert not table.suspects(1)

    run_simulated(main())


def test_a_leader_that_is_ready_alone_calls_nobody_and_trains_on_after_a_while() -> None:
    async def main() -> None:
        table = Table(4)
        others = [trains_for(table, i, 60.0) for i in (1, 2, 3)]
        began_s = now_s()
        assert await table.meet(0) == {0: Missed(reason="alone", detail="1 ready, 2 needed")}
        assert now_s() - began_s == pytest.approx(GATHER_S + MAX_GATHER_EXTENSION_S, abs=0.2)
        assert [seat.closes_s for seat in others] == [None] * 3
        assert not table.matchmakers[0].gatherings.by_head

    run_simulated(main())


@pytest.mark.parametrize("first", [0, 1])
def test_the_second_one_calls_the_others(first: int) -> None:
    """What the first one has waited until then is charged to nobody, also where somebody is waited for in vain."""

    async def main() -> None:
        table = Table(5, by_hand=(4,))
        table.serve(4, promise)
        seat = trains_for(table, 3, 1.5)
        began_s = now_s()

        async def second() -> Group | Missed:
            await asyncio.sleep(20.0)
            assert seat.closes_s is None
            return await table.offer(2)

        async def called() -> Group | Missed:
            while seat.closes_s is None:
                await seat.changed.event.wait()
            assert now_s() - began_s == pytest.approx(20.0, abs=0.5)
            await asyncio.sleep(1.5)
            return await table.offer(3)

        trains_for(table, 1 - first, 60.0)
        found = await asyncio.gather(table.offer(first), second(), called())
        table.groups(dict(zip((first, 2, 3), found)), first, 2, 3)
        gathered_s = now_s() - began_s - 20.0
        assert gathered_s == pytest.approx(GATHER_S + MAX_GATHER_EXTENSION_S, abs=1.0)
        for i in (first, 2, 3):
            waits = table.matchmakers[i].company.waits
            assert waits.full_s - waits.left_s(table.ids[4], now_s()) <= gathered_s + 1.0
            others = {0, 1, 2, 3} - {i, 1 - first}
            assert all(waits.left_s(table.ids[j], now_s()) == waits.full_s for j in others)

    run_simulated(main())


def test_one_that_is_not_known_does_not_count_where_others_are() -> None:
    async def main() -> None:
        table = Table(5, newcomers=(4,))
        seats = [trains_for(table, i, 60.0) for i in (0, 2, 3)]
        found = await table.meet(1, 4)
        assert {i: one.reason for i, one in found.items() if isinstance(one, Missed)} == {1: "alone", 4: "alone"}
        assert [seat.closes_s for seat in seats] == [None] * 3

    run_simulated(main())


def test_a_leader_that_shows_no_second_one_that_is_ready_calls_nobody() -> None:
    """It is told how long all the steps take. So a leader that hurries calls nobody either."""

    async def main() -> None:
        table = Table(3, by_hand=(1, 2))
        seat = trains_for(table, 0, 4.0)
        alone = Closing(head=AT, gather_s=2.0, record=table.ready_record(1))
        trains = Closing(head=AT, gather_s=2.0, record=table.ready_record(1), callers=[table.record(2)])
        for closing in (alone, trains):
            assert await table.answer_eta(1, 0, closing) == pytest.approx(40.0, abs=0.5)
            assert seat.closes_s is None
        two = Closing(head=AT, gather_s=2.0, record=table.ready_record(1), callers=[table.ready_record(2)])
        assert await table.answer_eta(1, 0, two) == pytest.approx(4.0, abs=0.5)
        assert seat.closes_s == pytest.approx(now_s() + GATHER_S, abs=0.5)

    run_simulated(main())


def test_a_leader_that_invents_one_that_is_ready_calls_nobody() -> None:
    async def main() -> None:
        table = Table(3, by_hand=(1, 2))
        seat = trains_for(table, 0, 4.0)
        forged = seal_record(record_of(table.members[2], HISTORY, phase="gather"), table.members[1])
        await table.say(1, 0, Closing(head=AT, gather_s=2.0, record=table.ready_record(1), callers=[forged]))
        await asyncio.sleep(1)
        ((offender, reason),) = table.complaints(0)
        assert (offender, "not signed by its peer" in reason) == (1, True)
        assert seat.closes_s is None

    run_simulated(main())


async def calls_nobody(table: Table, channel: Channel, message: Message) -> None:
    while True:
        await channel.send(Eta(eta_s=0.0, uncalled=True))
        await asyncio.sleep(1.0)


def test_a_leader_that_calls_nobody_is_believed_until_enough_are_known_to_be_ready() -> None:
    """From then on it has as long as any leader. What it has cost is charged."""
    heard_s = 10.0

    async def main() -> None:
        table = Table(3, by_hand=(0,))
        table.serve(0, calls_nobody)
        began_s = now_s()

        async def hear() -> None:
            await asyncio.sleep(heard_s)
            for me, other in ((1, 2), (2, 1)):
                table.directory(me).learn(table.ready_record(other), NOW_S + 1)

        found, _ = await asyncio.gather(table.meet(1, 2), hear())
        table.groups(found, 1, 2)
        most_s = heard_s + GATHER_S + MAX_GATHER_EXTENSION_S + CLOSING_MARGIN_S
        assert now_s() - began_s == pytest.approx(most_s, abs=1.5)
        for i in (1, 2):
            company = table.matchmakers[i].company
            assert company.waits.left_s(table.ids[0], now_s()) < 1.0
            assert company.rounds.left_s(table.ids[0], now_s()) < 1.0
            assert not company.is_trusted(table.ids[0])

    run_simulated(main())


@pytest.mark.parametrize("phases_s", [(100, 160, 230, 310), (1000, 1060, 1120, 1180), (3600, 3700, 3800, 3900)])
def test_however_long_inner_phases_are_the_second_one_meets_the_first(phases_s: tuple[int, ...]) -> None:
    """A peer that gave up sooner, and began another phase, would be away whenever another one is ready."""

    async def main() -> None:
        table = Table(4)
        began_s = now_s()

        async def one(i: int) -> Group | Missed:
            trains_for(table, i, phases_s[i] / 100, 100)
            seat = table.matchmakers[i].seat
            until_s = now_s() + phases_s[i]
            while seat.closes_s is None and now_s() < until_s:
                event = seat.changed.event
                await asyncio.wait([asyncio.ensure_future(event.wait())], timeout=until_s - now_s())
            if seat.closes_s is not None:
                await asyncio.sleep(GATHER_S / 2)
            return await table.offer(i, trained_s=now_s() - began_s)

        found = await asyncio.gather(*map(one, range(4)))
        assert all(isinstance(group, Group) for group in found[:2])
        assert now_s() - began_s <= phases_s[1] + GATHER_S + MAX_GATHER_EXTENSION_S

    run_simulated(main())


def test_who_is_not_called_is_neither_waited_for_nor_charged() -> None:
    """It has not heard of the second one that is ready, nor is shown it; but calls when it is ready itself."""

    async def main() -> None:
        table = Table(4, by_hand=(3,))

        async def declines(table: Table, channel: Channel, message: Message) -> None:
            await channel.send(Eta(eta_s=3000.0, uncalled=True))

        table.serve(3, declines)
        began_s = now_s()
        table.groups(await table.meet(0, 1, 2), 0, 1, 2)
        assert now_s() - began_s < 1.0
        waits = table.matchmakers[0].company.waits
        assert waits.left_s(table.ids[3], now_s()) == waits.full_s

    run_simulated(main())


def test_nobody_gets_a_place_in_the_directory_by_being_shown() -> None:
    async def main() -> None:
        table = Table(2, by_hand=(1,))
        seat = trains_for(table, 0, 4.0)
        strangers = [identity(100 + i) for i in range(2)]
        records = [
            seal_record(record_of(who, HISTORY, run_id=table.manifest.run_id, phase="gather"), who) for who in strangers
        ]
        await table.answer_eta(1, 0, Closing(head=AT, gather_s=2.0, record=table.record(1), callers=records))
        assert seat.closes_s is None
        assert all(table.directory(0).get(who.peer_id) is None for who in strangers)

    run_simulated(main())


def test_who_was_led_here_by_a_round_is_not_ready_by_that() -> None:
    """Its record still says that it settles, one outer step back; by now it trains."""
    table = Table(3)
    directory, company = table.directory(0), table.matchmakers[0].company
    for i in (1, 2):
        directory.learn(table.record(i, HISTORY[:-1], issued_s=NOW_S + 0.5, phase="settle"), NOW_S + 1)
    directory.met(table.ids[1:], len(HISTORY), AT)
    assert len(on_head(directory.expected(NOW_S + 1), AT)) == 2
    assert not callers.calls(company, AT)
    directory.learn(table.ready_record(1), NOW_S + 1)
    assert callers.calls(company, AT)


def test_the_known_ones_are_shown() -> None:
    table = Table(6, newcomers=(1, 2))
    for i in (1, 2, 4, 5):
        table.directory(0).learn(table.ready_record(i), NOW_S + 1)
    shown = callers.records_of(table.matchmakers[0].company, AT)
    assert {open_record(one).peer_id for one in shown} == {table.ids[4], table.ids[5]}


def test_nobody_is_hailed_any_more_when_a_peer_leaves() -> None:
    async def main() -> None:
        table = Table(3, by_hand=(1, 2))
        for i in (1, 2):
            table.serve(i, stay_silent)
        leading = asyncio.ensure_future(table.offer(0))
        await asyncio.sleep(CLOSING_MARGIN_S + 0.5)
        gatherings = table.matchmakers[0].gatherings
        hails = tuple(gatherings.notices._hails)
        assert len(hails) == 2
        leading.cancel()
        await gatherings.close()
        assert all(hail.cancelled() for hail in hails)

    run_simulated(main())


def test_who_leads_elsewhere_is_told_once_that_a_round_gathers_here() -> None:
    """A peer that names itself as the leader that it waits for is not called again and again."""

    async def main() -> None:
        table = Table(4, by_hand=(3,))
        told = 0

        async def names_itself(table: Table, channel: Channel, message: Message) -> None:
            nonlocal told
            told += 1
            await channel.send(Eta(eta_s=10.0, busy=True, leader=table.record(3)))

        table.serve(3, names_itself)
        for i in (1, 2):
            trains_for(table, i, 60.0)
        await table.meet(0)
        assert told == 1

    run_simulated(main())


async def is_busy(table: Table, channel: Channel, message: Message) -> None:
    while True:
        await channel.send(Eta(eta_s=10.0, busy=True))
        await asyncio.sleep(3)


@pytest.mark.parametrize("hand", [promise, is_busy])
def test_a_promise_that_is_not_kept_is_not_waited_for_again(hand: Hand) -> None:
    async def main() -> None:
        table = Table(3, by_hand=(2,))
        table.serve(2, hand)
        costs_s = []
        for _ in range(4):
            began_s = now_s()
            table.groups(await table.meet(), 0, 1)
            costs_s.append(now_s() - began_s)
            for i in table.honest:
                table.matchmakers[i].seat.in_round = False
        assert costs_s[0] == pytest.approx(GATHER_S + MAX_GATHER_EXTENSION_S, abs=0.5)
        assert sum(costs_s[1:]) < GATHER_S + CLOSING_MARGIN_S + 1.0

    run_simulated(main())


def test_all_who_have_waited_remember_for_whom() -> None:
    """What one peer costs all shall not be charged by one leader after another."""

    async def main() -> None:
        table = Table(3, by_hand=(2,))
        table.serve(2, promise)
        table.groups(await table.meet(), 0, 1)
        for i in table.honest:
            waits = table.matchmakers[i].company.waits
            assert waits.left_s(table.ids[2], now_s()) == pytest.approx(0.0, abs=0.1)
            assert waits.left_s(table.ids[1 - i], now_s()) == waits.full_s

    run_simulated(main())


WAITED_S = 2.0 + CLOSING_MARGIN_S


@pytest.mark.parametrize("moves_on", [False, True])
def test_a_member_charges_however_short_it_has_waited_and_wherever_that_peer_stands_by_then(moves_on: bool) -> None:
    """Who leaves for a history of its own, and comes back, cost each leader its credit anew."""

    async def main() -> None:
        table = Table(4, by_hand=(3,))

        async def goes_its_own_way(table: Table, channel: Channel, message: Message) -> None:
            await channel.send(Eta(eta_s=2.0))
            if moves_on:
                for i in table.honest:
                    table.directory(i).learn(table.record(3, HISTORY[:-1] + "z", issued_s=NOW_S + 0.5), NOW_S + 1)
            await asyncio.sleep(500)

        table.serve(3, goes_its_own_way)
        table.groups(await table.meet(), 0, 1, 2)
        for i in table.honest:
            waits = table.matchmakers[i].company.waits
            assert waits.left_s(table.ids[3], now_s()) == pytest.approx(waits.full_s - WAITED_S, abs=0.5)
            assert all(waits.left_s(table.ids[j], now_s()) == waits.full_s for j in table.honest)

    run_simulated(main())


@pytest.mark.parametrize("why", ["no place", "no place for one more newcomer", "it was lost in a round"])
def test_who_is_left_out_although_it_came_is_not_charged(why: str) -> None:
    """By members, which cannot know for whom their leader has waited."""

    async def main() -> None:
        full = manifest_with(max_group=4) if why == "no place" else MANIFEST
        newcomers = (3, 4) if why == "no place for one more newcomer" else ()
        table = Table(6, by_hand=(5,), manifest=full, newcomers=newcomers)
        if why == "it was lost in a round":
            for i in table.honest:
                table.matchmakers[i].company.judge_round([table.ids[4]], 3, 0.0, ())

        async def comes_late(table: Table, channel: Channel, message: Message) -> None:
            await channel.send(Eta(eta_s=2.0))
            await asyncio.sleep(500)

        table.serve(5, comes_late)
        meeting = asyncio.ensure_future(table.meet())
        await asyncio.sleep(WAITED_S + 1.0)
        meeting.cancel()
        for i in (1, 2):
            waits = table.matchmakers[i].company.waits
            assert waits.left_s(table.ids[4], now_s()) == waits.full_s
            absent = waits.full_s if why == "no place" else pytest.approx(waits.full_s - WAITED_S, abs=0.5)
            assert waits.left_s(table.ids[5], now_s()) == absent

    run_simulated(main())


def test_who_was_lost_in_a_round_sits_out_the_next_and_is_told_when_it_is_over() -> None:
    async def main() -> None:
        table = Table(4)
        company = table.matchmakers[0].company
        company.judge_round([table.ids[3]], 3, 30.0, ())
        assert company.is_idle(table.ids[3])

        async def over_soon() -> None:
            await asyncio.sleep(5)
            for i in (0, 1, 2):
                seat = table.matchmakers[i].seat
                seat.standing, seat.in_round = standing(HISTORY + "d"), False
                seat.sealed_record = table.record(i, HISTORY + "d", issued_s=NOW_S + 0.8)
                seat.changed.ring()

        found, _ = await asyncio.gather(table.meet(), over_soon())
        assert table.members_of(table.groups(found, 0, 1, 2)) == [0, 1, 2]
        assert found[3] == Missed(reason="behind", detail=f"peer {table.ids[0][-8:]} is past this head")
        await asyncio.sleep(TIMEOUTS.record_life_s)
        assert not company.is_idle(table.ids[3])

    run_simulated(main())


def test_who_was_lost_is_taken_where_there_are_too_few_without_it() -> None:
    async def main() -> None:
        table = Table(2)
        table.matchmakers[0].company.judge_round([table.ids[1]], 3, 30.0, ())
        assert table.members_of(table.groups(await table.meet(), 0, 1)) == [0, 1]

    run_simulated(main())


def test_who_loses_everybody_blames_nobody() -> None:
    async def main() -> None:
        table = Table(3)
        company = table.matchmakers[0].company
        company.judge_round(table.ids[1:], 2, 1000.0, ())
        assert all(company.rounds.left_s(peer_id, now_s()) == company.rounds.full_s for peer_id in table.ids)

    run_simulated(main())


def test_who_was_lost_has_less_patience_until_it_has_contributed_in_full() -> None:
    async def main() -> None:
        table = Table(3)
        company = table.matchmakers[0].company
        company.judge_round([table.ids[1]], 2, 30.0, [table.ids[2]])
        company.judge_round([], 2, 1.0, [table.ids[2]])
        assert set(company.lapsed) == {table.ids[1]}
        company.judge_round([], 2, 1.0, [table.ids[1]])
        assert not company.lapsed

    run_simulated(main())


def test_a_leader_in_debt_is_followed_only_where_others_wait() -> None:
    async def main() -> None:
        table = Table(3, by_hand=(0,))

        async def hand(table: Table, channel: Channel, message: Message) -> None:
            await channel.send(Redirect(record=table.record(0)))
            await asyncio.sleep(500)

        table.serve(0, hand)
        for i in (1, 2):
            for _ in range(2):
                table.matchmakers[i].company.rounds.charge(table.ids[0], 40.0, now_s())
        began_s = now_s()
        assert table.members_of(table.groups(await table.meet(), 1, 2)) == [1, 2]
        assert now_s() - began_s < 1.0
        gatherings = table.matchmakers[1].gatherings
        gathering = Gathering(head=AT, opened_s=now_s())
        gatherings.notices.claim(gathering, table.ids[0], Redirect(record=table.record(0)))
        assert gathering.answer is None
        gathering.awaited.add(table.ids[0])
        gatherings.notices.claim(gathering, table.ids[0], Redirect(record=table.record(0)))
        assert gathering.answer is not None

    run_simulated(main())


def test_a_leader_that_fails_has_a_second_chance_and_one_that_lies_has_none() -> None:
    async def main() -> None:
        table = Table(3)
        company = table.matchmakers[0].company
        company.failed(AT, table.ids[1], cost_s=0.0)
        assert company.is_fit(AT, table.ids[1])
        company.failed(AT, table.ids[1], cost_s=0.0)
        company.failed(AT, table.ids[2], cost_s=0.0, lied=True)
        assert not company.is_fit(AT, table.ids[1])
        assert not company.is_fit(AT, table.ids[2])

    run_simulated(main())


def test_who_has_failed_as_a_leader_leads_again_later() -> None:
    """Two sides of a network that was cut have failed each other: they must not go without each other for ever."""

    async def main() -> None:
        table = Table(2)
        for me, other in ((0, 1), (1, 0)):
            table.matchmakers[me].company.failed(AT, table.ids[other], cost_s=0.0, lied=True)
        assert {found.reason for found in (await table.meet()).values() if isinstance(found, Missed)} == {"alone"}
        await asyncio.sleep(TIMEOUTS.record_life_s)
        assert table.members_of(table.groups(await table.meet(), 0, 1)) == [0, 1]

    run_simulated(main())


def test_a_round_of_members_whom_the_leader_cannot_call_is_waited_for() -> None:
    """1 is in a round with 3, a client that nobody can call: two groups on one head would make two histories."""

    async def main() -> None:
        table = Table(4, by_hand=(3,), clients=(3,))
        table.network.kill(table.ids[3])
        seat = table.matchmakers[1].seat
        seat.in_round = True

        async def commit() -> None:
            await asyncio.sleep(GATHER_S + MAX_GATHER_EXTENSION_S + 20)
            seat.standing, seat.in_round = standing(HISTORY + "d"), False
            seat.sealed_record = table.record(1, HISTORY + "d", issued_s=NOW_S + 0.6)
            seat.changed.ring()

        round_ = asyncio.ensure_future(commit())
        found = await table.meet(0, 2)
        await round_
        assert {missed.reason for missed in found.values() if isinstance(missed, Missed)} == {"behind"}
        assert len(found) == 2

    run_simulated(main())


@pytest.mark.parametrize("count", [3, 4])
def test_who_alone_says_that_it_is_busy_is_not_waited_for_as_long_as_a_round_may_take(count: int) -> None:
    """Nor where another one is in the middle of a long inner step: it has said that it meets nobody meanwhile."""

    async def main() -> None:
        table = Table(count, by_hand=(2,))
        for i in range(3, count):
            seat = table.matchmakers[i].seat
            seat.phase, seat.progress = "inner", Progress(inner_step=0, planned=2, step_s=300.0, reported_s=now_s())

        async def busy(table: Table, channel: Channel, message: Message) -> None:
            while True:
                await channel.send(Eta(eta_s=1.0, busy=True))
                await asyncio.sleep(1.0)

        table.serve(2, busy)
        began_s = now_s()
        assert table.members_of(table.groups(await table.meet(0, 1), 0, 1)) == [0, 1]
        assert now_s() - began_s <= GATHER_S + MAX_GATHER_EXTENSION_S + 1

    run_simulated(main())


def test_the_leaders_own_trainer_is_waited_for_no_longer_than_one_that_says_what_it_needs() -> None:
    """Although two others may be in a round, as far as is known: it is known that the trainer is in none."""

    async def main() -> None:
        table = Table(5, by_hand=(2, 3))
        for i in (2, 3):
            table.serve(i, stay_silent)
        seat = table.matchmakers[0].seat
        seat.phase, seat.progress = "inner", Progress(inner_step=0, planned=2, step_s=300.0, reported_s=now_s())
        began_s = now_s()
        table.groups(await table.meet(1, 4), 1, 4)
        assert now_s() - began_s == pytest.approx(GATHER_S + MAX_GATHER_EXTENSION_S, abs=1.5)

    run_simulated(main())


def test_the_leaders_own_trainer_makes_no_round_with_one_that_is_busy() -> None:
    async def main() -> None:
        table = Table(3, by_hand=(2,))
        table.serve(2, is_busy)
        seat = table.matchmakers[0].seat
        seat.phase, seat.progress = "inner", Progress(inner_step=0, planned=2, step_s=300.0, reported_s=now_s())
        began_s = now_s()
        assert await table.meet(1) == {1: Missed(reason="alone", detail="1 ready, 2 needed")}
        assert now_s() - began_s <= GATHER_S + MAX_GATHER_EXTENSION_S + TIMEOUTS.heartbeat_s

    run_simulated(main())


async def stands_elsewhere(table: Table, channel: Channel, message: Message) -> None:
    await channel.send(Behind(record=table.record(3)))


@pytest.mark.parametrize("hand", [stands_elsewhere, refuse])
def test_who_says_that_it_meets_nobody_here_makes_no_round_with_one_that_is_busy(hand: Hand) -> None:
    async def main() -> None:
        table = Table(4, by_hand=(2, 3))
        table.serve(2, is_busy)
        table.serve(3, hand)
        began_s = now_s()
        assert table.members_of(table.groups(await table.meet(0, 1), 0, 1)) == [0, 1]
        assert now_s() - began_s <= GATHER_S + MAX_GATHER_EXTENSION_S + 1

    run_simulated(main())


def test_who_was_ready_and_has_left_is_not_waited_for() -> None:
    async def main() -> None:
        table = Table(3, by_hand=(2,))
        channel = await table.say(2, 0, table.ready(2))
        await channel.receive(Eta, timeout_s=1.0)
        channel.close()
        began_s = now_s()
        assert table.members_of(table.groups(await table.meet(0, 1), 0, 1)) == [0, 1]
        assert now_s() - began_s < 0.5 < GATHER_S

    run_simulated(main())


def test_closing_calls_the_trainer_once() -> None:
    async def main() -> None:
        table = Table(2, by_hand=(1,))
        seat = table.matchmakers[0].seat
        seat.phase, seat.progress = "inner", Progress(inner_step=1, planned=9, step_s=4.0, reported_s=now_s())
        calls = []

        async def watch() -> None:
            while True:
                await seat.changed.event.wait()
                calls.append(seat.closes_s)

        watching = asyncio.ensure_future(watch())
        first_s = now_s()
        answers = [
            await table.answer_eta(1, 0, Closing(head=AT, gather_s=2.0, record=table.ready_record(1))) for _ in range(3)
        ]
        watching.cancel()
        assert len(calls) == 1
        assert calls[0] == pytest.approx(first_s + GATHER_S, abs=0.1)
        assert answers[0] == pytest.approx(4.0, abs=0.1)
        assert answers[0] > answers[1] > answers[2]

    run_simulated(main())


def test_two_leaders_on_one_head_make_one_group() -> None:
    """1 and 2 gather at 1, and wait for 4, before they know that 0, who ranks best, is on their head; 3 goes to 0."""

    async def main() -> None:
        table = Table(5, by_hand=(4,))

        async def slow(table: Table, channel: Channel, message: Message) -> None:
            await channel.send(Eta(eta_s=1.0))

        table.serve(4, slow)
        for i in (1, 2):
            table.directory(i).learn(table.record(0, "elsewhere", issued_s=NOW_S + 0.1), NOW_S + 1)
        table.directory(1).suspect(table.ids[3])
        table.matchmakers[0].seat.sealed_record = table.record(0, issued_s=NOW_S + 0.2)

        async def later(delay_s: float, *who: int) -> dict[int, Group | Missed]:
            await asyncio.sleep(delay_s)
            return await table.meet(*who)

        found = await asyncio.gather(later(0.0, 1, 2), later(0.3, 0, 3))
        table.groups(found[0] | found[1], 0, 1, 2, 3)

    run_simulated(main())


def test_who_is_sent_to_a_leader_that_it_has_lost_gathers_anew() -> None:
    """It does not hear the same answer again and again until it has asked all that it may."""

    async def main() -> None:
        table = Table(3, by_hand=(0,))
        for i in table.honest:
            table.directory(i).suspect(table.ids[0])
        meeting = asyncio.ensure_future(table.meet(1))
        await asyncio.sleep(0.5)
        await table.say(0, 1, Closing(head=AT, gather_s=GATHER_S, record=table.record(0)))
        await asyncio.sleep(0.5)
        assert not meeting.done()
        found = await table.meet(2) | await meeting
        assert table.members_of(table.groups(found, 1, 2)) == [1, 2]

    run_simulated(main())


def test_close_ends_the_gatherings() -> None:
    async def main() -> None:
        table = Table(3, by_hand=(1, 2))
        table.serve(1, stay_silent)
        table.serve(2, stay_silent)
        await table.say(2, 0, table.ready(2))
        await asyncio.sleep(0.5)
        gathering = table.matchmakers[0].gatherings.by_head[AT]
        assert gathering.task is not None
        await table.matchmakers[0].gatherings.close()
        assert gathering.task.done()

    run_simulated(main())


# -- who is known, and who is not -----------------------------------------------------------------------------------


def test_who_is_not_known_leads_nobody_and_few_of_them_take_part() -> None:
    """0 and 1 rank first, and are not known; of them and 5 one has its place beside three known members."""

    async def main() -> None:
        table = Table(6, newcomers=(0, 1, 5))
        found = await table.meet()
        group = table.groups(found, *(i for i, one in found.items() if isinstance(one, Group)))
        assert table.members_of(group) == [0, 2, 3, 4]
        assert group.sealed.leader == table.ids[2]
        assert [table.members_of(group)[i] for i in group.reducers] == [2, 3, 4]
        assert {one.reason for one in found.values() if isinstance(one, Missed)} == {"alone"}

    run_simulated(main())


def test_two_known_members_take_one_newcomer_in() -> None:
    """Or two would stay two for ever."""

    async def main() -> None:
        table = Table(4, newcomers=(2, 3))
        found = await table.meet()
        assert table.members_of(table.groups(found, 0, 1, 2)) == [0, 1, 2]

    run_simulated(main())


def test_a_roster_that_a_newcomer_gathered_is_believed_by_nobody(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        table = Table(4, by_hand=(0,), newcomers=(0,))
        asked: list[int] = []

        async def gathers(table: Table, channel: Channel, message: Message) -> None:
            if isinstance(message, Closing):
                await channel.send(Redirect(record=table.record(0)))
                return
            asked.append(table.ids.index(channel.peer_id))

        table.serve(0, gathers)
        assert table.members_of(table.groups(await table.meet(), 1, 2, 3)) == [1, 2, 3]
        assert asked == []
        assert "claims to lead where I do" in caplog.text

    with caplog.at_level("INFO"):
        run_simulated(main())


@pytest.mark.parametrize(("newcomers", "owner"), [((0, 1, 2), True), ((0, 1, 2), False), ((1, 2), False)])
def test_where_too_few_are_known_the_owner_has_to_be_there(newcomers: tuple[int, ...], owner: bool) -> None:
    """Else the round would end in an update that nobody may apply."""

    async def main() -> None:
        table = Table(3, newcomers=newcomers)
        if owner:
            record = record_of(OWNER, HISTORY, run_id=table.manifest.run_id, life_s=900.0, role="seed")
            for i in range(3):
                table.directory(i).learn(seal_record(record, OWNER), NOW_S)
        found = await table.meet()
        if owner:
            group = table.groups(found, 0, 1, 2)
            assert group.needs_witness
            assert group.reducers == (0, 1, 2)
        else:
            assert set(found.values()) == {Missed(reason="alone", detail=NO_WITNESS, uncertified="witness")}

    run_simulated(main())


# -- answers in time -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leads", [True, False])
@pytest.mark.parametrize("calm", [True, False])
def test_a_peer_that_does_not_answer_is_waited_for_as_long_as_answers_took(leads: bool, calm: bool) -> None:
    """It is there, and says nothing: as the leader that the others ask, or as a member that the leader calls."""

    async def main() -> None:
        silent_one = 0 if leads else 2
        table = Table(3, by_hand=(silent_one,))
        for matchmaker in table.matchmakers.values():
            matchmaker.company.recent = calm_rounds() if calm else Recent()
        table.serve(silent_one, stay_silent)
        began_s = now_s()
        others = {0, 1, 2} - {silent_one}
        assert table.members_of(table.groups(await table.meet(), *sorted(others))) == sorted(others)
        costs_s = TIMEOUTS.least_wait_s if calm else TIMEOUTS.request_s if leads else GATHER_S + CLOSING_MARGIN_S
        assert costs_s <= now_s() - began_s < costs_s + 0.5
        if calm:
            waited = [table.matchmakers[i].company.recent.answers[-1] for i in (others if leads else {0})]
            assert all(TIMEOUTS.request_s in times_s for times_s in waited)

    run_simulated(main())


def test_whom_nobody_waits_for_has_as_long_as_ever_for_its_answer() -> None:
    """It may have to be dialled first. It answers after three times what answers took, and is in the round."""

    async def main() -> None:
        table = Table(3, by_hand=(2,), strangers=(2,))
        for matchmaker in table.matchmakers.values():
            matchmaker.company.recent = calm_rounds()
        answered: list[float] = []

        async def hand(table: Table, channel: Channel, message: Message) -> None:
            began_s = now_s()
            await asyncio.sleep(3 * TIMEOUTS.least_wait_s)
            await channel.send(Eta(eta_s=0.0))
            answered.append(now_s() - began_s)

        table.serve(2, hand)
        company = table.matchmakers[0].company
        channel = await reach(company, table.ids[2])
        answer: Eta = await ask(company, channel, Closing(head=AT, gather_s=GATHER_S, record=table.record(0)), Eta)
        assert answer.eta_s == 0.0
        assert answered == [3 * TIMEOUTS.least_wait_s]

    run_simulated(main())
