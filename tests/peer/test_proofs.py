"""Proofs in a swarm in memory: they reach all, outlive a restart, and cost only who has lied."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from p2p_diloco.core.equivocation import pack_proof
from p2p_diloco.core.event import of_kind
from p2p_diloco.core.events import EVENTS_FILE, read_events
from p2p_diloco.core.records import MAX_BARRED, seal_record
from p2p_diloco.core.roster import Readiness, seal_readiness
from p2p_diloco.core.trust_event import PeerBarred
from p2p_diloco.core.waiting import now_s
from p2p_diloco.wire.channel import Channel, run_protocol
from p2p_diloco.wire.messages import No
from p2p_diloco.wire.proof_messages import AskBarred, AskProof, BarredPeers
from p2p_diloco.wire.round_messages import Ready
from p2p_diloco.wire.state_messages import Push
from tests.core.test_barred import proof_of
from tests.peer.test_peer import Simulated
from tests.support.builders import identity, record_of
from tests.support.fakes import FakeTransport, SimPeer, run_simulated

LIAR = identity(3)
HEARS_S = 20.0


def ready_of(sim: SimPeer, readiness: Readiness) -> Ready:
    sealed = seal_readiness(readiness, sim.peer.identity)
    return Ready(readiness=sealed, record=sim.peer.seat.sealed_record)


def barred_by(sim: SimPeer) -> list[str]:
    return list(sim.peer.directory.barred)


def told_by(swarm: Simulated, index: int) -> list[tuple[str, str]]:
    events = read_events(swarm.tmp_path / str(index) / EVENTS_FILE)
    return [(event.peer, event.why) for event in of_kind(events, PeerBarred)]


def test_a_proof_reaches_all_and_the_run_goes_on_without_the_liar(tmp_path: Path) -> None:
    async def main() -> None:
        swarm = Simulated(tmp_path, 4, n=1000, outer_steps=8)
        sims = await swarm.start(4)
        await swarm.until(sims, 2)
        liar, honest = sims[2], [swarm.peers[0], *sims[:2], sims[3]]
        assert liar.peer.identity.peer_id == LIAR.peer_id
        sims[0].peer.directory.barred.add(proof_of(LIAR))
        await asyncio.sleep(HEARS_S)
        assert [barred_by(sim) for sim in honest] == [[LIAR.peer_id]] * 4
        assert all(told_by(swarm, i) == [(LIAR.peer_id, "links")] for i in (0, 1, 2, 4))
        assert barred_by(liar) == []
        step = sims[0].peer.step
        await swarm.until([sims[0], sims[1], sims[3]], step + 2)
        header = sims[0].peer.replica.ledger.header(step + 1)
        assert header is not None
        assert LIAR.peer_id not in dict(header.contributors)
        assert len(header.contributors) == 3
        assert sims[0].peer.events.totals.equivocations == {"links": 1}
        record = sims[1].peer.directory.get(identity(1).peer_id)
        assert record is not None
        assert (record.barred, record.barred_digest) == (1, sims[1].peer.directory.barred.digest())

    run_simulated(main())


def test_who_is_started_again_remembers_and_a_newcomer_hears_of_it(tmp_path: Path) -> None:
    async def main() -> None:
        swarm = Simulated(tmp_path, 4, n=1000, outer_steps=50)
        sims = await swarm.start(2)
        await swarm.until(sims, 1)
        sims[0].peer.directory.barred.add(proof_of(LIAR))
        await asyncio.sleep(HEARS_S)
        assert barred_by(sims[1]) == [LIAR.peer_id]
        for sim in swarm.peers:
            swarm.network.kill(sim.peer.identity.peer_id)
        await asyncio.sleep(40)
        again = swarm.add(2)
        await asyncio.sleep(5)
        assert barred_by(again) == [LIAR.peer_id]
        assert told_by(swarm, 2) == [(LIAR.peer_id, "links")]  # and not once more
        swarm.add(0, seed=True)
        newcomer = swarm.add(4)
        await asyncio.sleep(HEARS_S)
        assert barred_by(newcomer) == [LIAR.peer_id]

    run_simulated(main())


async def claims_to_have_barred(
    swarm: Simulated, victim: SimPeer, peer_ids: list[str], answer: Callable[[Channel, AskProof], Awaitable[None]]
) -> None:
    """A stranger, whose record the victim has, says that it has barred these peers; ``answer``: whoever asks why."""
    claimant = FakeTransport(swarm.network, identity(7).peer_id, victim.transport.timeouts)

    async def serve(channel: Channel) -> None:
        await channel.receive(AskBarred, timeout_s=10.0)
        await channel.send(BarredPeers(peer_ids=peer_ids))
        for _ in peer_ids:
            await answer(channel, await channel.receive(AskProof, timeout_s=10.0))

    await claimant.serve(run_protocol(swarm.manifest.run_id), serve)
    record = record_of(
        identity(7), run_id=swarm.manifest.run_id, issued_s=now_s(), barred=len(peer_ids), barred_digest=b"12345678"
    )
    victim.peer.directory.learn(seal_record(record, identity(7)), victim.peer.here.wall_s())


@pytest.mark.parametrize(
    "data",
    [b"x", pack_proof(proof_of(identity(1), (1, 1))), pack_proof(proof_of(identity(2)))],
    ids=["no proof", "of one commit", "about another peer"],
)
def test_a_proof_that_proves_nothing_is_held_against_who_sends_it(tmp_path: Path, data: bytes) -> None:
    """A peer that claims to have barred somebody, and serves ``data`` for it."""

    async def main() -> None:
        swarm = Simulated(tmp_path, 3, n=1000, outer_steps=8)
        sims = await swarm.start(2)
        await swarm.until(sims, 1)
        served: list[str] = []

        async def answer(channel: Channel, ask: AskProof) -> None:
            served.append(ask.peer_id)
            await channel.send_blob(data)

        await claims_to_have_barred(swarm, sims[1], [identity(1).peer_id], answer)
        await sims[1].peer.proofs.hear()
        assert served == [identity(1).peer_id]
        assert barred_by(sims[1]) == []
        assert sims[1].peer.here.transport.traffic.rejected["misbehaved"] == 1

    run_simulated(main())


def test_who_has_barred_as_many_others_is_asked_and_passes_all_of_them_on(tmp_path: Path) -> None:
    async def main() -> None:
        swarm = Simulated(tmp_path, 3, n=1000, outer_steps=8)
        sims = await swarm.start(2)
        await swarm.until(sims, 1)
        mine, theirs = identity(100), identity(101)

        async def answer(channel: Channel, ask: AskProof) -> None:
            await channel.send_blob(pack_proof(proof_of(theirs)))

        await claims_to_have_barred(swarm, sims[1], [theirs.peer_id], answer)
        sims[1].peer.directory.barred.add(proof_of(mine))
        await asyncio.sleep(HEARS_S)
        assert barred_by(sims[1]) == [mine.peer_id, theirs.peer_id]
        assert barred_by(sims[0]) == [mine.peer_id, theirs.peer_id]

    run_simulated(main())


def test_who_sends_its_proofs_slowly_is_not_heard_for_longer_than_a_request(tmp_path: Path) -> None:
    """What has come until then is taken."""

    async def main() -> None:
        swarm = Simulated(tmp_path, 3, n=1000, outer_steps=8)
        sims = await swarm.start(2)
        await swarm.until(sims, 1)
        liars = {identity(i).peer_id: identity(i) for i in range(100, 100 + MAX_BARRED)}
        timeouts = sims[1].peer.here.timeouts

        async def answer(channel: Channel, ask: AskProof) -> None:
            await asyncio.sleep(0.4 * timeouts.request_s)
            await channel.send_blob(pack_proof(proof_of(liars[ask.peer_id])))

        await claims_to_have_barred(swarm, sims[1], list(liars), answer)
        began_s = now_s()
        await sims[1].peer.proofs.hear()
        assert now_s() - began_s == pytest.approx(timeouts.request_s)
        assert barred_by(sims[1]) == list(liars)[:2]
        assert sims[1].peer.here.transport.traffic.rejected["misbehaved"] == 0

    run_simulated(main())


def test_who_is_barred_is_told_so_when_it_wants_to_meet(tmp_path: Path) -> None:
    async def main() -> None:
        swarm = Simulated(tmp_path, 4, n=1000, outer_steps=8)
        sims = await swarm.start(3)
        await swarm.until(sims, 1)
        sims[0].peer.directory.barred.add(proof_of(LIAR))
        await asyncio.sleep(HEARS_S)
        channel = await sims[2].peer.here.open(identity(1).peer_id)
        ready = sims[2].peer.matchmaker._readiness(1, False, 0.0, identity(1).peer_id)
        assert ready.peer_id == LIAR.peer_id
        answer = await channel.request(ready_of(sims[2], ready), No)
        assert answer.reason.startswith("barred from this run")
        pushed = await (await sims[2].peer.here.open(identity(1).peer_id)).request(
            Push(record=sims[2].peer.seat.sealed_record), Push
        )
        assert pushed.record
        assert sims[0].peer.directory.get(LIAR.peer_id) is None

    run_simulated(main())
