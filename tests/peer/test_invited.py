"""Swarms in memory, in runs by invitation: who is in their rounds, and who is not."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from p2p_diloco.core.admission import one_vote_each
from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.directory import Directory
from p2p_diloco.core.errors import UsageError
from p2p_diloco.core.invitation import Token
from p2p_diloco.core.known import WINDOW_STEPS
from p2p_diloco.core.runfile import OnMissed
from p2p_diloco.ledger.seats import keep_revocations, read_revocations
from p2p_diloco.peer.revocations import NewestList
from tests.peer.test_peer import Simulated
from tests.support.builders import identity, record_of
from tests.support.fakes import FakeTransport, SimPeer, make_manifest, run_simulated
from tests.support.invited import Shameless, revocations_of, token_of
from tests.support.lying import override
from tests.support.simloop import START_S

OWNER = identity(0)
"""It runs the seed."""
FOR_EVER_S = int(START_S) + 10**6


class Invited(Simulated):
    """A run by invitation, with its owner's seed."""

    def __init__(self, tmp_path: Path, *, outer_steps: int = 8, on_missed: OnMissed = "adopt") -> None:
        super().__init__(tmp_path, 6, n=1000, outer_steps=outer_steps)
        self.manifest = make_manifest(
            1000, self.genesis, OWNER, outer_steps=outer_steps, on_missed=on_missed, membership="invite"
        )

    def token(self, name: str, key: int, *, places: int = 1, expires_s: int = FOR_EVER_S) -> Token:
        run_id = self.manifest.run_id
        return token_of(name, places=places, expires_s=expires_s, run_id=run_id, owner=OWNER, key=2000 + key)

    def come(self, index: int, token: Token | None = None, *, shameless: bool = False) -> SimPeer:
        """A peer begins; without a token the seed, if it has index 0, or an uninvited one."""
        who = identity(index)
        sim = SimPeer.create(
            self.network,
            self.manifest,
            OWNER,
            self.tmp_path,
            index,
            target=None if index == 0 else self.targets[index - 1],
            genesis=self.genesis if index == 0 else None,
            seat=b"" if token is None else token.seat(who.peer_id),
        )
        if shameless:
            manifest = self.manifest
            sim.peer.directory.admission = Shameless(run_id=manifest.run_id, owner=manifest.owner, by_invitation=True)
        sim.start()
        self.peers.append(sim)
        return sim

    async def begin(self, *tokens: Token) -> list[SimPeer]:
        """The seed, and peers 1, 2 and so on, each under one of the tokens."""
        self.come(0)
        await asyncio.sleep(1)
        return [self.come(i + 1, token) for i, token in enumerate(tokens)]

    def steps_with(self, sim: SimPeer, witness: SimPeer) -> list[int]:
        """Outer steps whose update has ``sim`` among its contributors, as far as the ledger of ``witness`` goes back:
        here all."""
        return [step for step in range(witness.peer.step) if self.took_part(sim, witness, step)]

    def took_part(self, sim: SimPeer, witness: SimPeer, step: int) -> bool:
        header = witness.peer.replica.ledger.header(step)
        return header is not None and sim.peer.identity.peer_id in dict(header.contributors)


def test_peers_with_seats_meet_and_those_without_only_look_on(tmp_path: Path) -> None:
    """A stranger that speaks the protocol, is on the head and calls everybody is in no round, and delays none."""

    async def main() -> None:
        swarm = Invited(tmp_path, outer_steps=6)
        sims = await swarm.begin(swarm.token("a", 1), swarm.token("b", 2), swarm.token("c", 3))
        stranger = swarm.come(4, shameless=True)
        await swarm.until(sims, 6, limit_s=90.0)
        assert all(result.committed for sim in sims for result in sim.results)
        assert swarm.steps_with(stranger, sims[0]) == []
        assert swarm.steps_with(sims[1], sims[0])
        who = stranger.peer.identity.peer_id
        assert all(sim.peer.directory.get(who) is None for sim in (*sims, swarm.peers[0]))
        assert stranger.peer.step >= 4
        swarm.check_identical([*sims, stranger])

    run_simulated(main())


def test_an_honest_peer_without_a_seat_does_not_publish_itself(tmp_path: Path) -> None:
    async def main() -> None:
        swarm = Invited(tmp_path)
        sims = await swarm.begin(swarm.token("a", 1), swarm.token("b", 2))
        other_run = token_of("x", run_id="cd" * 20, owner=OWNER, expires_s=FOR_EVER_S)
        stranger = swarm.come(4, other_run, shameless=True)
        await swarm.until(sims, 3, limit_s=60.0)
        assert swarm.steps_with(stranger, sims[0]) == []
        assert all(sim.peer.directory.get(stranger.peer.identity.peer_id) is None for sim in sims)

    run_simulated(main())


@pytest.mark.parametrize("shameless", [False, True])
def test_an_invitation_that_expires_admits_nobody_any_more(tmp_path: Path, shameless: bool) -> None:
    """An honest peer ends, and says why; a shameless one is in no round. What it has contributed stays, and a newcomer
    takes it over."""

    async def main() -> None:
        swarm = Invited(tmp_path, outer_steps=9)
        tokens = swarm.token("a", 1), swarm.token("b", 2)
        sims = await swarm.begin(*tokens)
        short = swarm.come(3, swarm.token("short", 3, expires_s=int(START_S) + 40), shameless=shameless)
        await swarm.until(sims, 8, limit_s=200.0)
        steps = swarm.steps_with(short, sims[0])
        assert steps
        assert max(steps) <= 3
        if shameless:
            assert short.ended_by is None
        else:
            assert isinstance(short.ended_by, UsageError)
            assert "has expired, or was revoked; ask the run's owner" in str(short.ended_by)
        newcomer = swarm.come(4, swarm.token("new", 4))
        await swarm.until([*sims, newcomer], 9, limit_s=100.0)
        swarm.check_identical([*sims, newcomer])

    run_simulated(main())


@pytest.mark.parametrize("shameless", [False, True])
def test_a_revocation_is_heard_by_all_and_holds_from_its_step_on(tmp_path: Path, shameless: bool) -> None:
    async def main() -> None:
        swarm = Invited(tmp_path, outer_steps=WINDOW_STEPS + 6)
        sims = await swarm.begin(swarm.token("a", 1), swarm.token("b", 2))
        token = swarm.token("c", 3)
        revoked = swarm.come(3, token, shameless=shameless)
        seed = swarm.peers[0]
        await swarm.until([seed], 3, limit_s=100.0)
        step = seed.peer.step + 1
        sealed = revocations_of({token.invitation.token: step}, run_id=swarm.manifest.run_id, owner=OWNER)
        keep_revocations(tmp_path / "0", sealed)  # as the command writes it, while the seed runs
        await asyncio.sleep(8.0)
        assert [sim.peer.directory.admission.number for sim in (seed, *sims)] == [1, 1, 1]
        await swarm.until(sims, 8, limit_s=200.0)
        steps = swarm.steps_with(revoked, sims[0])
        assert steps
        assert max(steps) < step
        assert isinstance(revoked.ended_by, UsageError) is not shameless
        assert all(read_revocations(tmp_path / str(i), swarm.manifest) == sealed for i in (0, 1, 2))

        await swarm.until(sims, WINDOW_STEPS + 2, limit_s=400.0)  # they are known, and need no witness any more
        swarm.network.kill(seed.peer.identity.peer_id)
        newcomer = swarm.come(5, swarm.token("d", 5))  # hears of it from those who are left
        again = swarm.come(4, token, shameless=True)
        await swarm.until([*sims, newcomer], WINDOW_STEPS + 6, limit_s=300.0)
        assert newcomer.peer.directory.admission.number == 1
        assert swarm.steps_with(again, sims[0]) == []
        swarm.check_identical([*sims, newcomer])

    run_simulated(main())


def test_an_older_list_does_not_come_back(tmp_path: Path) -> None:
    """Neither from a peer nor from the owner's own disk."""

    async def main() -> None:
        swarm = Invited(tmp_path)
        run_id = swarm.manifest.run_id
        token = swarm.token("c", 3)
        older = revocations_of({"x": 1}, number=3, run_id=run_id, owner=OWNER)
        newer = revocations_of({"x": 1, token.invitation.token: 0}, number=4, run_id=run_id, owner=OWNER)
        sims = await swarm.begin(swarm.token("a", 1), swarm.token("b", 2))
        keep_revocations(tmp_path / "0", newer)
        await asyncio.sleep(10.0)
        keep_revocations(tmp_path / "0", older)
        for _ in range(50):
            await asyncio.sleep(0.2)
            assert [sim.peer.directory.admission.number for sim in (swarm.peers[0], *sims)] == [4, 4, 4]
        late = swarm.come(3, token)
        await asyncio.sleep(20.0)
        assert isinstance(late.ended_by, UsageError)

    run_simulated(main())


def test_a_list_is_news_once_and_only_who_has_a_newer_one_is_asked(tmp_path: Path) -> None:
    async def main() -> None:
        swarm = Invited(tmp_path)
        run_id, asked = swarm.manifest.run_id, list[str]()
        directory = Directory(identity(9).peer_id, run_id, admission=swarm.manifest.admission())
        transport = FakeTransport(swarm.network, identity(9).peer_id, Timeouts())
        newest = NewestList(transport=transport, directory=directory, owner=OWNER.peer_id)
        third, second = (revocations_of({"x": number}, number=number, run_id=run_id, owner=OWNER) for number in (3, 2))
        assert newest.take(third)
        assert not newest.take(third)
        assert not newest.take(second)
        assert (directory.admission.number, directory.admission.revoked) == (3, {"x": 3})

        async def ask(peer_id: str) -> bytes:
            asked.append(peer_id)
            return b""

        override(newest, "_ask", lambda real: ask)
        await newest.hear(record_of(identity(i), run_id=run_id, revocations=3) for i in range(8))
        assert asked == []
        await newest.hear(record_of(identity(i), run_id=run_id, revocations=4 + i) for i in range(8))
        assert asked == [identity(i).peer_id for i in (0, 7, 6, 5)], "the owner first"

    run_simulated(main())


def test_a_forged_list_is_taken_from_nobody(tmp_path: Path) -> None:
    """Its sender's record names a newer one, and what comes is signed by another."""

    async def main() -> None:
        swarm = Invited(tmp_path)
        sims = await swarm.begin(swarm.token("a", 1), swarm.token("b", 2), swarm.token("liar", 3))
        liar = sims[2]
        forged = revocations_of({swarm.token("a", 1).invitation.token: 0}, run_id=swarm.manifest.run_id, owner=OWNER)
        body = forged[:-64] + bytes(64)
        liar.peer.revoked.newest.sealed = body
        fake = replace(liar.peer.directory.admission)
        vars(fake)["revocations"] = type("Fake", (), {"number": 9, "tokens": [], "steps": []})()
        liar.peer.directory.admission = fake
        await swarm.until(sims[:2], 4, limit_s=120.0)
        assert [sim.peer.directory.admission.number for sim in (swarm.peers[0], *sims[:2])] == [0, 0, 0]
        assert swarm.peers[0].transport.traffic.rejected["misbehaved"]

    run_simulated(main())


@pytest.mark.parametrize(("places", "on_missed"), [(1, "adopt"), (2, "adopt"), (1, "keep")])
def test_ids_under_one_token_share_its_places(tmp_path: Path, places: int, on_missed: OnMissed) -> None:
    """With one place for two peers, one of them is in each round, and the other one follows. It does not count as
    absent either, where that makes a difference."""

    async def main() -> None:
        swarm = Invited(tmp_path, outer_steps=8, on_missed=on_missed)
        two = swarm.token("two", 1, places=places)
        sims = await swarm.begin(two, two, swarm.token("b", 2), swarm.token("c", 3))
        await swarm.until(sims, 8, limit_s=400.0)
        first, second = (set(swarm.steps_with(sim, sims[3])) for sim in sims[:2])
        if places == 1:
            assert not first & second
            assert first | second >= set(range(1, 7))
            assert first
            assert second
        else:
            assert first & second >= set(range(1, 7))
        swarm.check_identical(sims)

    run_simulated(main())


def test_one_token_with_many_ids_is_no_majority(tmp_path: Path) -> None:
    """Of its ids only some are known, and they have one vote."""

    async def main() -> None:
        swarm = Invited(tmp_path, outer_steps=4)
        sims = await swarm.begin(swarm.token("a", 1), swarm.token("b", 2))
        crowd = swarm.token("crowd", 3)
        for index in range(3, 7):
            swarm.come(index, crowd)
        await swarm.until(sims, 3, limit_s=200.0)
        believed = sims[0].peer.directory.believed(asyncio.get_running_loop().time())
        voters, _ = sims[0].peer.here.voters()
        assert len(voters) <= len(one_vote_each(believed)) <= 3
        swarm.check_identical(sims)

    run_simulated(main())


def test_known_members_of_one_token_make_nothing_without_the_owner(tmp_path: Path) -> None:
    """They are one volunteer: its owner's seed goes on witnessing what they make."""

    async def main() -> None:
        swarm = Invited(tmp_path, outer_steps=WINDOW_STEPS + 6)
        two = swarm.token("two", 1, places=2)
        sims = await swarm.begin(two, two)
        await swarm.until(sims, WINDOW_STEPS + 2, limit_s=400.0)
        assert sims[0].peer.seat.known.peers == {sim.peer.identity.peer_id for sim in sims}
        swarm.network.kill(swarm.peers[0].peer.identity.peer_id)
        stood = max(sim.peer.step for sim in sims)
        await asyncio.sleep(60.0)
        assert max(sim.peer.step for sim in sims) <= stood + 1
        swarm.check_identical(sims)

    run_simulated(main())
