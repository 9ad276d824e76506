"""Whole swarms in memory: real peers, a clock that jumps, links that die. See ``fakes``."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import record_of
from fakes import FakeNetwork, FakeTransport, SimPeer, make_manifest, run_simulated
from reference import diloco

from p2p_diloco.codec import Codec, Vector
from p2p_diloco.config import Timeouts
from p2p_diloco.errors import Refused
from p2p_diloco.identity import Identity
from p2p_diloco.manifest import RunManifest
from p2p_diloco.records import open_record, seal_record
from p2p_diloco.wire import AskPart, Commit, Contribute, Message, Push, Receipt

OWNER = Identity.from_seed(b"o" * 32)
N = 300_000  # two parts


def vectors(count: int, n: int = N) -> list[Vector]:
    generator = np.random.default_rng(0)
    return [generator.standard_normal(n).astype(np.float32) for _ in range(count)]


class Simulated:
    """K peers and a seed that holds the genesis."""

    def __init__(self, tmp_path: Path, k: int, *, n: int = N, codec: Codec = "fp32", outer_steps: int = 5) -> None:
        self.tmp_path = tmp_path
        self.genesis, *self.targets = vectors(k + 1, n)
        self.manifest: RunManifest = make_manifest(n, self.genesis, OWNER, codec=codec, outer_steps=outer_steps)
        self.network = FakeNetwork()
        self.peers: list[SimPeer] = []

    def add(self, index: int, *, seed: bool = False, client_mode: bool = False, step_s: float = 1.0) -> SimPeer:
        sim = SimPeer.create(
            self.network,
            self.manifest,
            OWNER,
            self.tmp_path,
            index,
            target=None if seed else self.targets[(index - 1) % len(self.targets)],
            genesis=self.genesis if seed else None,
            client_mode=client_mode,
            step_s=step_s,
        )
        sim.start()
        self.peers.append(sim)
        return sim

    async def until(self, sims: list[SimPeer], step: int, limit_s: float = 2000.0) -> None:
        deadline_s = asyncio.get_running_loop().time() + limit_s
        while any(sim.peer.step < step for sim in sims):
            assert asyncio.get_running_loop().time() < deadline_s, [(s.peer.step, s.peer.seat.phase) for s in sims]
            await asyncio.sleep(0.5)

    def check_identical(self, sims: list[SimPeer]) -> None:
        """At every outer step that two peers saw, they saw the same head and the same bytes."""
        seen: dict[int, tuple[bytes, bytes]] = {}
        for sim in sims:
            for step, state in sim.history.items():
                assert seen.setdefault(step, state) == state, f"replicas differ at outer step {step}"


def test_k_peers_in_memory_are_textbook_diloco(tmp_path: Path) -> None:
    k, outer_steps = 4, 5

    async def main() -> tuple[Simulated, Vector]:
        swarm = Simulated(tmp_path, k, outer_steps=outer_steps)
        swarm.add(0, seed=True)
        await asyncio.sleep(1)
        sims = [swarm.add(i + 1) for i in range(k)]
        await swarm.until(sims, outer_steps)
        swarm.check_identical(sims)
        for sim in sims:
            assert [result.group for result in sim.results] == [k] * outer_steps
        return swarm, sims[0].peer.replica.theta

    swarm, theta = run_simulated(main())
    model = torch.nn.ParameterList([torch.from_numpy(swarm.genesis.copy())])
    targets = [torch.from_numpy(target) for target in swarm.targets]
    outer = swarm.manifest.spec.outer
    diloco(
        model,
        lambda replica, i, _: 0.5 * ((next(replica.parameters()) - targets[i]) ** 2).sum(),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        weights=[1.0] * k,
        inner_steps=swarm.manifest.spec.inner.steps,
        outer_steps=outer_steps,
        outer_lr=outer.lr,
        outer_momentum=outer.momentum,
    )
    assert np.abs(theta - model[0].detach().numpy()).max() < 1e-5


def test_eight_peers_for_fifty_outer_steps(tmp_path: Path) -> None:
    async def main() -> None:
        swarm = Simulated(tmp_path, 8, n=2000, codec="int8", outer_steps=50)
        swarm.add(0, seed=True)
        await asyncio.sleep(1)
        sims = [swarm.add(i + 1) for i in range(8)]
        await swarm.until(sims, 50)
        swarm.check_identical(sims)
        assert all(result.committed and result.group == 8 for sim in sims for result in sim.results)
        assert not [complaint for sim in sims for complaint in sim.transport.complaints]

    run_simulated(main())


@pytest.mark.parametrize("victim_phase", ["inner", "gather", "reduce", "apply"])
def test_a_peer_that_dies_does_not_stop_the_others(tmp_path: Path, victim_phase: str) -> None:
    async def main() -> None:
        swarm = Simulated(tmp_path, 4, outer_steps=6)
        swarm.add(0, seed=True)
        await asyncio.sleep(1)
        sims = [swarm.add(i + 1) for i in range(4)]
        await swarm.until(sims, 2)
        victim, *survivors = sims
        seat = victim.peer.seat
        while True:
            changed = seat.changed.event
            if seat.phase == victim_phase:
                break
            await changed.wait()
        swarm.network.kill(victim.peer.identity.peer_id)
        await swarm.until(survivors, 6, limit_s=400)
        swarm.check_identical(sims)
        assert survivors[0].results[-1].group == 3

    run_simulated(main())


def test_a_newcomer_downloads_the_state_and_meets_the_others_at_the_next_outer_step(tmp_path: Path) -> None:
    async def main() -> None:
        swarm = Simulated(tmp_path, 4, outer_steps=12)
        swarm.add(0, seed=True)
        await asyncio.sleep(1)
        sims = [swarm.add(i + 1) for i in range(3)]
        await swarm.until(sims, 7)
        newcomer = swarm.add(4)
        await swarm.until([*sims, newcomer], 12)
        swarm.check_identical([*sims, newcomer])
        assert min(newcomer.history) in (7, 8)
        assert newcomer.results[0].committed
        assert newcomer.results[0].group == 4

    run_simulated(main())


def test_a_restarted_peer_goes_on_from_its_own_ledger(tmp_path: Path) -> None:
    async def main() -> None:
        swarm = Simulated(tmp_path, 3, outer_steps=12)
        swarm.add(0, seed=True)
        await asyncio.sleep(1)
        sims = [swarm.add(i + 1) for i in range(3)]
        await swarm.until(sims, 4)
        victim, *others = sims
        swarm.network.kill(victim.peer.identity.peer_id)
        await swarm.until(others, 7)
        swarm.network.dead.clear()
        back = swarm.add(1)
        await swarm.until([back, *others], 12)
        swarm.check_identical([*sims, back])
        events = (tmp_path / "1" / "events.jsonl").read_text()
        assert '"snapshot": true' not in events.split('"joined"')[2]

    run_simulated(main())


def test_a_slow_peer_contributes_what_it_has_and_weighs_less(tmp_path: Path) -> None:
    async def main() -> None:
        swarm = Simulated(tmp_path, 3, outer_steps=5)
        swarm.add(0, seed=True)
        await asyncio.sleep(1)
        fast, slow = [swarm.add(1), swarm.add(2)], swarm.add(3, step_s=3.0)
        await swarm.until([*fast, slow], 5)
        swarm.check_identical([*fast, slow])
        header = slow.peer.replica.ledger.header(4)
        assert header is not None
        weights = dict(header.contributors)
        assert weights[slow.peer.identity.peer_id] < weights[fast[0].peer.identity.peer_id]
        assert len(weights) == 3

    run_simulated(main())


def test_client_mode_peers_contribute_but_reduce_and_lead_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        swarm = Simulated(tmp_path, 3, outer_steps=5)
        swarm.add(0, seed=True)
        await asyncio.sleep(1)
        sims = [swarm.add(1, client_mode=True), swarm.add(2, client_mode=True), swarm.add(3)]
        await swarm.until(sims, 5)
        swarm.check_identical(sims)
        for butterfly in sims[2].peer.rounds:
            reducers = {butterfly.group.members[i].peer_id for i in butterfly.group.reducers}
            assert reducers == {sims[2].peer.identity.peer_id}
        assert sims[0].results[-1].group == 3

    run_simulated(main())


def test_a_lone_peer_trains_on_and_commits_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        swarm = Simulated(tmp_path, 1)
        swarm.add(0, seed=True)
        await asyncio.sleep(1)
        lone = swarm.add(1)
        await asyncio.sleep(100)
        assert lone.peer.step == 0
        assert {result.reason for result in lone.results} == {"alone"}
        assert not lone.results[-1].moved

    run_simulated(main())


def test_a_diverged_trainer_goes_back_to_theta(tmp_path: Path) -> None:
    async def main() -> None:
        swarm = Simulated(tmp_path, 3, outer_steps=4)
        swarm.add(0, seed=True)
        await asyncio.sleep(1)
        sims = [swarm.add(i + 1) for i in range(3)]
        await swarm.until(sims, 1)
        assert sims[0].peer.local is not None
        sims[0].peer.local[7] = np.nan
        await swarm.until(sims, 4)
        swarm.check_identical(sims)
        assert "diverged" in {result.reason for result in sims[0].results}
        assert np.isfinite(sims[1].peer.replica.theta).all()

    run_simulated(main())


def test_who_joins_answers_a_push_with_a_sound_record(tmp_path: Path) -> None:
    """Else whoever pushes to it would take it for a liar."""

    async def main() -> None:
        swarm = Simulated(tmp_path, 2)
        newcomer = swarm.add(1)
        await asyncio.sleep(5)
        assert newcomer.peer.replica.state is None
        other = FakeTransport(swarm.network, OWNER.peer_id, Timeouts())
        now_s, run_id = asyncio.get_running_loop().time(), swarm.manifest.run_id
        channel = await other.open(newcomer.peer.identity.peer_id, [], newcomer.peer.protocol)
        record = seal_record(record_of(OWNER, run_id=run_id, issued_s=now_s), OWNER)
        answer = await channel.request(Push(record=record), Push)
        opened = open_record(answer.record)
        assert (opened.peer_id, opened.phase) == (newcomer.peer.identity.peer_id, "joining")

    run_simulated(main())


def test_messages_for_a_round_that_nobody_knows_are_refused(tmp_path: Path) -> None:
    async def main() -> None:
        swarm = Simulated(tmp_path, 2)
        swarm.add(0, seed=True)
        await asyncio.sleep(1)
        sims = [swarm.add(1), swarm.add(2)]
        await swarm.until(sims, 1)
        stranger = FakeTransport(swarm.network, OWNER.peer_id, Timeouts())

        async def ask(message: Message) -> float:
            began_s = asyncio.get_running_loop().time()
            channel = await stranger.open(sims[0].peer.identity.peer_id, [], sims[0].peer.protocol)
            with pytest.raises(Refused, match="no such round"):
                await channel.request(message, Commit, timeout_s=60.0)
            return asyncio.get_running_loop().time() - began_s

        waits_s = await asyncio.gather(
            ask(Contribute(round_id=bytes(32))),
            ask(Receipt(round_id=bytes(32), part_hashes=[b""] * 2)),
            ask(AskPart(round_id=bytes(32), part=0, hash=bytes(32))),
        )
        assert max(waits_s) < Timeouts().request_s + 1
        await swarm.until(sims, 3)
        swarm.check_identical(sims)

    run_simulated(main())
