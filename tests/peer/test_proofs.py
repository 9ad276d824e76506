"""Proofs in a swarm in memory: they reach all, outlive a restart, and cost only who has lied."""

from __future__ import annotations

import asyncio
from pathlib import Path

from p2p_diloco.core.equivocation import pack_proof
from p2p_diloco.core.event import of_kind
from p2p_diloco.core.events import EVENTS_FILE, read_events
from p2p_diloco.core.records import seal_record
from p2p_diloco.core.roster import Readiness, seal_readiness
from p2p_diloco.core.trust_event import PeerBarred
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


def test_a_proof_that_proves_nothing_is_held_against_who_sends_it(tmp_path: Path) -> None:
    """A peer that claims to have barred somebody, and serves ``data`` for it."""
    served: list[str] = []

    async def main(data: bytes) -> None:
        swarm = Simulated(tmp_path / data.hex()[:8], 3, n=1000, outer_steps=8)
        sims = await swarm.start(2)
        await swarm.until(sims, 1)
        false = FakeTransport(swarm.network, identity(7).peer_id, sims[0].transport.timeouts)

        async def serve(channel: Channel) -> None:
            await channel.receive(AskBarred, timeout_s=10.0)
            ask: AskProof = await channel.request(BarredPeers(peer_ids=[identity(1).peer_id]), AskProof)
            served.append(ask.peer_id)
            await channel.send_blob(data)

        await false.serve(run_protocol(swarm.manifest.run_id), serve)
        record = record_of(
            identity(7),
            run_id=swarm.manifest.run_id,
            issued_s=asyncio.get_running_loop().time(),
            barred=1,
            barred_digest=b"12345678",
        )
        victim = sims[1].peer
        victim.directory.learn(seal_record(record, identity(7)), victim.here.wall_s())
        await victim.proofs.hear()
        assert barred_by(sims[1]) == []
        assert victim.here.transport.traffic.rejected["misbehaved"] == 1

    for data in (b"x", pack_proof(proof_of(identity(1), (1, 1)))):
        served.clear()
        run_simulated(main(data))
        assert served == [identity(1).peer_id]


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
