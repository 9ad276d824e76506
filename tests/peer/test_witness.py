"""The owner's witness: what it signs in the first outer steps, and what it does not."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from p2p_diloco.core.certificate import Certificate, Taken, certificate_of
from p2p_diloco.core.electors import NoHistory
from p2p_diloco.core.event import of_kind
from p2p_diloco.core.events import read_events
from p2p_diloco.core.group import Group
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.known import Known
from p2p_diloco.core.records import seal_record
from p2p_diloco.core.roster_rules import RosterRules
from p2p_diloco.core.swarm_head import Standing
from p2p_diloco.core.trust_event import WitnessAsked
from p2p_diloco.wire.messages import No
from p2p_diloco.wire.round_messages import AskWitness, Eta, Witnessed
from tests.support.builders import identity, record_of
from tests.support.certificates import group_at
from tests.support.fakes import FakeNetwork, FakeTransport, SimPeer, make_manifest, run_simulated

N = 100
GENESIS = np.random.default_rng(0).standard_normal(N).astype(np.float32)
OWNER, MEMBERS = identity(0), [identity(i) for i in (1, 2, 3)]
OTHERS = [identity(i) for i in (4, 5, 6, 7, 8)]
ELSEWHERE = "the run's owner stands on another head"
ANOTHER = "the run's owner has just witnessed another update of this head"
ENOUGH = "enough known members are here to do without a witness"
LEFT_OUT = "too few of those that the run's owner sees here are in it"


class Contributed(NoHistory):
    """Of these alone."""

    def __init__(self, electors: Sequence[Identity]) -> None:
        self.who = frozenset(who.peer_id for who in electors)

    def electors(self, step: int) -> frozenset[str]:
        return self.who


class Table:
    """The owner's seed at the genesis, and some others, whose streams are opened by hand."""

    def __init__(self, folder: Path, owner: Identity = OWNER) -> None:
        self.manifest = make_manifest(N, GENESIS, owner)
        self.network = FakeNetwork()
        self.seed = SimPeer.create(self.network, self.manifest, owner, folder, 0, target=None, genesis=GENESIS)
        self.rules = RosterRules.of(self.manifest)
        self.transports = {who.peer_id: self._transport(who) for who in MEMBERS}

    def _transport(self, who: Identity) -> FakeTransport:
        return FakeTransport(self.network, who.peer_id, self.seed.peer.here.timeouts)

    async def start(self) -> None:
        self.seed.start()
        await asyncio.sleep(1)
        self.head = self.seed.peer.seat.standing.head

    def group(self, members: Sequence[Identity] = MEMBERS, nonce: int = 0) -> Group:
        known = Known(step=self.seed.peer.seat.standing.step, peers=frozenset())
        return group_at(members, self.rules, known, self.head, nonce=nonce)

    def go_on(self, *electors: Identity) -> None:
        """The owner stands one outer step further, where these have contributed."""
        seat = self.seed.peer.seat
        before, self.head = self.head, bytes([seat.standing.step + 1]) * 32
        seat.standing = Standing(step=seat.standing.step + 1, head=self.head, heads=(before,))
        seat.history = Contributed(electors)

    def trains_here(self, *who: Identity, head: bytes | None = None) -> None:
        """The owner knows them, and has heard them."""
        peer, now_s = self.seed.peer, asyncio.get_running_loop().time()
        head = self.head if head is None else head
        for one in who:
            record = record_of(one, run_id=self.manifest.run_id, issued_s=now_s, head=head, life_s=900.0)
            peer.directory.learn(seal_record(record, one), now_s)
            peer.directory.proven.answered(one.peer_id)

    async def ask(self, group: Group, link: bytes = bytes(32), signers: Sequence[Identity] | None = None) -> bool | str:
        """True where the owner's signature comes; else why it does not."""
        taken = Taken(round_id=group.round_id, link=link, full=b"\x01", state=b"")
        who = {member.peer_id: i for i, member in enumerate(group.members)}
        signing = [one for one in MEMBERS if one.peer_id in who] if signers is None else signers
        signatures = {who[one.peer_id]: taken.sign(one) for one in signing}
        return await self.send(certificate_of(group, taken, signatures), link, taken)

    async def send(self, certificate: Certificate, link: bytes, taken: Taken | None = None) -> bool | str:
        peer = self.seed.peer
        channel = await self.transports[MEMBERS[0].peer_id].open(peer.identity.peer_id, [], peer.here.protocol)
        await channel.send(AskWitness(link=link, certificate=certificate.to_bytes()))
        answer: Eta | Witnessed | No = await channel.receive(Eta, Witnessed, No, timeout_s=30.0)
        while isinstance(answer, Eta):
            answer = await channel.receive(Eta, Witnessed, No, timeout_s=30.0)
        channel.close()
        if isinstance(answer, No):
            return answer.reason
        return taken is not None and taken.is_signed(OWNER.peer_id, answer.signature)


def test_an_update_of_most_of_the_members_is_witnessed_again_and_again(tmp_path: Path) -> None:
    async def main() -> None:
        table = Table(tmp_path)
        await table.start()
        group = table.group()
        assert await table.ask(group) is True
        assert await table.ask(group) is True

    run_simulated(main())


def test_another_one_on_the_same_head_has_to_wait(tmp_path: Path) -> None:
    """The first one may be on its way to somebody."""

    async def main() -> None:
        table = Table(tmp_path)
        await table.start()
        life_s = table.seed.peer.here.timeouts.record_life_s
        assert await table.ask(table.group()) is True
        assert await table.ask(table.group(nonce=1), link=b"2" * 32) == ANOTHER
        told = of_kind(read_events(table.seed.peer.events.path), WitnessAsked)
        assert [(event.step, event.signed, event.reason) for event in told] == [(0, True, ""), (0, False, ANOTHER)]
        assert table.seed.peer.follower.target() == (1, table.seed.peer.follower.witness.leads_to(table.head))
        await asyncio.sleep(life_s)
        assert table.seed.peer.follower.witness.leads_to(table.head) is None
        assert await table.ask(table.group(nonce=1), link=b"2" * 32) is True
        assert await table.ask(table.group(nonce=2), link=b"3" * 32) == ANOTHER, "that one has its own time"

    run_simulated(main())


def test_who_is_first_with_few_has_to_wait_for_those_who_are_there(tmp_path: Path) -> None:
    async def main() -> None:
        table = Table(tmp_path)
        await table.start()
        table.trains_here(*MEMBERS, *OTHERS)
        assert await table.ask(table.group(MEMBERS[:2])) == LEFT_OUT
        assert await table.ask(table.group()) is True

        late = Table(tmp_path / "late")
        await late.start()
        late.trains_here(*MEMBERS, *OTHERS)
        assert await late.ask(late.group(MEMBERS[:2])) == LEFT_OUT
        await asyncio.sleep(late.seed.peer.here.timeouts.record_life_s)
        assert await late.ask(late.group(MEMBERS[:2])) is True, "the others have had the time to meet"

    run_simulated(main())


@pytest.mark.parametrize("owner_trains", [False, True])
def test_an_owner_that_trains_is_one_of_those_who_are_there(tmp_path: Path, owner_trains: bool) -> None:
    """Else one of three others, with a name that it has made up, is three in ten, and makes all outer steps alone."""

    async def main() -> None:
        table = Table(tmp_path)
        await table.start()
        table.trains_here(*MEMBERS)
        table.seed.peer.seat.role_trainer = owner_trains
        two = [MEMBERS[0], identity(99)]
        assert await table.ask(table.group(two), signers=two) == (LEFT_OUT if owner_trains else True)

    run_simulated(main())


def test_after_the_first_update_those_who_have_contributed_so_far_are_waited_for(tmp_path: Path) -> None:
    """The others are names, and each head has its own time."""

    async def main() -> None:
        table = Table(tmp_path)
        await table.start()
        table.trains_here(*MEMBERS, *OTHERS)
        assert await table.ask(table.group(MEMBERS[:2])) == LEFT_OUT
        await asyncio.sleep(table.seed.peer.here.timeouts.record_life_s)
        table.go_on(*MEMBERS[2:], *OTHERS)
        table.trains_here(*MEMBERS, *OTHERS)
        assert await table.ask(table.group(MEMBERS[:2])) == LEFT_OUT
        table.go_on(*MEMBERS)
        table.trains_here(*MEMBERS, *OTHERS)
        assert await table.ask(table.group(MEMBERS[:2])) is True

    run_simulated(main())


def test_who_stands_elsewhere_is_not_left_out(tmp_path: Path) -> None:
    async def main() -> None:
        table = Table(tmp_path)
        await table.start()
        table.trains_here(*MEMBERS)
        table.trains_here(*OTHERS, head=b"x" * 32)
        assert await table.ask(table.group(MEMBERS[:2])) is True

    run_simulated(main())


def test_names_that_never_answered_leave_nobody_out(tmp_path: Path) -> None:
    async def main() -> None:
        table = Table(tmp_path)
        await table.start()
        table.trains_here(*MEMBERS[:2])
        now_s = asyncio.get_running_loop().time()
        for i in range(50, 80):
            record = record_of(identity(i), run_id=table.manifest.run_id, issued_s=now_s, head=table.head)
            table.seed.peer.directory.learn(seal_record(record, identity(i)), now_s)
        assert await table.ask(table.group(MEMBERS[:2])) is True

    run_simulated(main())


@pytest.mark.parametrize("owner_trains", [False, True])
def test_where_enough_known_members_are_there_nothing_is_witnessed(tmp_path: Path, owner_trains: bool) -> None:
    """Strangers could else go round them."""

    async def main() -> None:
        table = Table(tmp_path)
        await table.start()
        table.trains_here(*OTHERS[: 1 if owner_trains else 2])
        table.seed.peer.seat.role_trainer = owner_trains
        familiar = frozenset(who.peer_id for who in (OWNER, *OTHERS[:2]))
        table.seed.peer.seat.known = Known(step=0, peers=familiar)
        assert await table.ask(table.group()) == ENOUGH

    run_simulated(main())


def test_on_another_head_nothing_is_witnessed(tmp_path: Path) -> None:
    async def main() -> None:
        table = Table(tmp_path)
        await table.start()
        table.head = b"x" * 32
        began_s = asyncio.get_running_loop().time()
        assert await table.ask(table.group()) == ELSEWHERE
        waited_s = asyncio.get_running_loop().time() - began_s
        assert waited_s == pytest.approx(table.seed.peer.here.timeouts.request_s, abs=1), "it might catch up"

    run_simulated(main())


@pytest.mark.parametrize("signers", [MEMBERS[:1], []])
def test_who_asks_with_too_few_signatures_is_a_liar(tmp_path: Path, signers: list[Identity]) -> None:
    async def main() -> None:
        table = Table(tmp_path)
        await table.start()
        with pytest.raises(Exception, match="closed the stream"):
            await table.ask(table.group(), signers=signers)
        [complaint] = table.seed.transport.complaints
        assert "asks to witness a certificate with" in complaint.reason
        assert complaint.peer_id == MEMBERS[0].peer_id

    run_simulated(main())


def test_nobody_but_the_owner_witnesses(tmp_path: Path) -> None:
    async def main() -> None:
        table = Table(tmp_path, owner=identity(9))
        await table.start()
        assert await table.ask(table.group()) == "not the run's owner"

    run_simulated(main())
