"""Whole swarms in memory: real peers, a clock that jumps, links that die. See ``fakes``."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from p2p_diloco.core.aggregate import AggregateName
from p2p_diloco.core.buckets import Rate
from p2p_diloco.core.codec import Vector
from p2p_diloco.core.codecs import CodecName
from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.errors import Gone, Misbehaved, NetworkError, Refused, RemoteError
from p2p_diloco.core.event import E, LoggedPhase, PeerCaughtUp, PeerJoined, PeerLeft, PhaseBegan, RoundEnded, of_kind
from p2p_diloco.core.events import EVENTS_FILE, read_events
from p2p_diloco.core.grid import PART_VALUES
from p2p_diloco.core.identity import SIGNATURE_BYTES, Identity
from p2p_diloco.core.manifest import RunManifest
from p2p_diloco.core.records import HEADS_SHOWN, open_record, seal_record
from p2p_diloco.core.runfile import OnMissed, SeedsReduce
from p2p_diloco.core.swarm_head import Standing
from p2p_diloco.core.trust_event import PartAudited
from p2p_diloco.core.update import UpdateHeader, parts_with
from p2p_diloco.round import measured
from p2p_diloco.round.tries import MAX_TRIES
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.message import Message
from p2p_diloco.wire.messages import No
from p2p_diloco.wire.probe_messages import MAX_TRANSFER_BYTES, AskDialBack, AskTransfer, DialedBack, Transferred
from p2p_diloco.wire.round_messages import (
    AskCommit,
    AskPart,
    Behind,
    Closing,
    Commit,
    Contribute,
    Eta,
    Ready,
    Receipt,
    Redirect,
)
from p2p_diloco.wire.state_messages import AskChain, AskHeads, AskIndex, AskUpdate, Push
from tests.support.builders import identity, record_of
from tests.support.fakes import FakeNetwork, FakeTransport, SimPeer, make_manifest, run_simulated
from tests.support.lies_beside import extends
from tests.support.lying import Liar
from tests.support.narrow import narrow
from tests.support.reference import diloco
from tests.support.simloop import THREAD_S

RUN_OWNER = identity(0)
"""The seed: it witnesses the first updates."""
STRANGER = Identity.from_seed(b"o" * 32)
N = 300_000  # two parts


def vectors(count: int, n: int = N) -> list[Vector]:
    generator = np.random.default_rng(0)
    return [generator.standard_normal(n).astype(np.float32) for _ in range(count)]


class Simulated:
    """K peers and a seed that holds the genesis."""

    def __init__(
        self,
        tmp_path: Path,
        k: int,
        *,
        n: int = N,
        codec: CodecName = "fp32",
        outer_steps: int = 5,
        inner_steps: int = 10,
        on_missed: OnMissed = "adopt",
        aggregate: AggregateName = "mean",
        seeds_reduce: SeedsReduce = "auto",
    ) -> None:
        self.tmp_path = tmp_path
        self.genesis, *self.targets = vectors(k + 1, n)
        self.manifest: RunManifest = make_manifest(
            n,
            self.genesis,
            RUN_OWNER,
            codec=codec,
            outer_steps=outer_steps,
            inner_steps=inner_steps,
            on_missed=on_missed,
            aggregate=aggregate,
            seeds_reduce=seeds_reduce,
        )
        self.network = FakeNetwork()
        self.peers: list[SimPeer] = []

    def add(self, index: int, *, seed: bool = False, client_mode: bool = False, step_s: float = 1.0) -> SimPeer:
        sim = SimPeer.create(
            self.network,
            self.manifest,
            RUN_OWNER,
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

    async def start(self, trainers: int, *, client_mode: bool = False) -> list[SimPeer]:
        """A seed, and those who train as soon as it is there."""
        self.add(0, seed=True)
        await asyncio.sleep(1)
        return [self.add(i + 1, client_mode=client_mode) for i in range(trainers)]

    async def newcomer_in_download(self, index: int) -> SimPeer:
        newcomer = self.add(index)
        for _ in range(1000):
            await asyncio.sleep(0.01)
            if self.steps_of(index, "download"):
                break
        return newcomer

    async def until(self, sims: list[SimPeer], step: int, limit_s: float = 2000.0) -> None:
        deadline_s = asyncio.get_running_loop().time() + limit_s
        while any(sim.peer.step < step for sim in sims):
            assert asyncio.get_running_loop().time() < deadline_s, [(s.peer.step, s.peer.seat.phase) for s in sims]
            await asyncio.sleep(0.5)

    def events(self, index: int, kind: type[E]) -> list[E]:
        return of_kind(read_events(self.tmp_path / str(index) / EVENTS_FILE), kind)

    def steps_of(self, index: int, phase: LoggedPhase) -> list[int]:
        """At which outer steps it was in this phase."""
        return [event.step for event in self.events(index, PhaseBegan) if event.phase == phase]

    def headers(self, sim: SimPeer, first: int, last: int) -> list[UpdateHeader]:
        headers = [sim.peer.replica.ledger.header(step) for step in range(first, last)]
        return [header for header in headers if header is not None]

    def contributed(self, sim: SimPeer, step: int) -> bool:
        """Whether ``sim`` is in the update that leads on from outer step ``step``."""
        contributors = (name for header in self.headers(sim, step, step + 1) for name, _ in header.contributors)
        return sim.peer.identity.peer_id in contributors

    def check_identical(self, sims: list[SimPeer]) -> None:
        """At every outer step that two peers saw, they saw the same head and the same bytes."""
        seen: dict[int, tuple[bytes, bytes]] = {}
        for sim in sims:
            for step, state in sim.history.items():
                assert seen.setdefault(step, state) == state, f"replicas differ at outer step {step}"


@pytest.mark.parametrize("homes", [False, True])
def test_k_peers_in_memory_are_textbook_diloco(tmp_path: Path, homes: bool) -> None:
    """``homes``: none of them can be dialled, and the owner's seed averages."""
    k, outer_steps = 4, 5

    async def main() -> tuple[Simulated, Vector]:
        swarm = Simulated(tmp_path, k, outer_steps=outer_steps)
        sims = await swarm.start(k, client_mode=homes)
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
        sims = await swarm.start(8)
        await swarm.until(sims, 50)
        swarm.check_identical(sims)
        assert all(result.committed and result.group == 8 for sim in sims for result in sim.results)
        complaints = [complaint for sim in sims for complaint in sim.transport.complaints]
        assert not [complaint for complaint in complaints if not isinstance(complaint, Gone)], "or it had its answer"

    run_simulated(main())


def test_peers_of_uneven_speed_take_each_others_robust_means(tmp_path: Path) -> None:
    """From the first outer step on, when nobody knows a last update; after a restart, by the ledger."""

    async def main() -> None:
        swarm = Simulated(tmp_path, 5, n=2000, codec="int4", outer_steps=9, inner_steps=20, aggregate="robust")
        swarm.add(0, seed=True)
        await asyncio.sleep(1)
        sims = [swarm.add(i + 1, step_s=step_s) for i, step_s in enumerate((1.0, 1.0, 2.0, 5.0, 20.0))]
        await swarm.until(sims, 4)
        swarm.network.kill(sims[1].peer.identity.peer_id)
        await asyncio.sleep(5)
        again = swarm.add(2)
        sims = [sims[0], again, *sims[2:]]
        await swarm.until(sims, 9)
        swarm.check_identical(sims)
        killed = identity(2).peer_id
        for i in range(1, 6):
            assert {lost for event in swarm.events(i, RoundEnded) for lost in event.lost} <= {killed}
        complaints = [complaint for sim in sims for complaint in sim.transport.complaints]
        assert not [complaint for complaint in complaints if isinstance(complaint, Misbehaved)]

    run_simulated(main())


@pytest.mark.parametrize("honest", [1, 2, 4])
def test_a_peer_whose_numbers_are_huge_moves_theta_no_further_than_the_others_do(tmp_path: Path, honest: int) -> None:
    """Beside a single honest one it has its sign, and four times the length."""

    async def main() -> None:
        swarm = Simulated(tmp_path, honest + 1, outer_steps=4, aggregate="robust")
        swarm.targets[honest][:] = 1e30
        sims = await swarm.start(honest + 1)
        await swarm.until(sims[:honest], 4)
        furthest = max(np.linalg.norm(target - swarm.genesis) for target in swarm.targets[:honest])
        for sim in sims[:honest]:
            gone = np.linalg.norm(sim.peer.replica.theta - swarm.genesis)
            assert gone < (60 if honest == 1 else 5) * furthest

    run_simulated(main())


@pytest.mark.parametrize("victim_phase", ["inner", "gather", "reduce", "apply"])
def test_a_peer_that_dies_does_not_stop_the_others(tmp_path: Path, victim_phase: str) -> None:
    async def main() -> None:
        swarm = Simulated(tmp_path, 4, outer_steps=6)
        sims = await swarm.start(4)
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


def test_most_stand_still_and_find_the_others_far_ahead(tmp_path: Path) -> None:
    """A record shows four heads: too few to see that the two have only gone on from where the three still are."""

    async def main() -> None:
        swarm = Simulated(tmp_path, 5, n=1000, outer_steps=27)
        sims = await swarm.start(5)
        await swarm.until(sims, 17)  # they are known by now, and need no witness
        swarm.network.kill(swarm.peers[0].peer.identity.peer_id)
        ahead, behind = sims[:2], sims[2:]
        for sim in behind:
            swarm.network.stop(sim.peer.identity.peer_id, whole=True)
        await swarm.until(ahead, 23)
        assert max(sim.peer.step for sim in behind) <= 18
        for sim in behind:
            swarm.network.resume(sim.peer.identity.peer_id)
        await swarm.until(sims, 27, limit_s=400)
        swarm.check_identical(sims)
        for index in range(1, 6):
            assert not any(event.rolled_back for event in swarm.events(index, PeerCaughtUp))
        assert all(len(open_record(sim.peer.seat.sealed_record).heads) == HEADS_SHOWN for sim in sims)

    run_simulated(main())


def test_a_newcomer_downloads_the_state_and_meets_the_others_at_the_next_outer_step(tmp_path: Path) -> None:
    async def main() -> None:
        swarm = Simulated(tmp_path, 4, outer_steps=12)
        sims = await swarm.start(3)
        await swarm.until(sims, 7)
        newcomer = swarm.add(4)
        await swarm.until([*sims, newcomer], 12)
        swarm.check_identical([*sims, newcomer])
        assert min(newcomer.history) in (7, 8)
        assert newcomer.results[0].committed
        assert newcomer.results[0].group == 4

    run_simulated(main())


def test_a_joiner_that_is_cut_off_while_it_downloads_goes_on_when_it_is_connected_again(tmp_path: Path) -> None:
    """Even if that takes longer than it looked for somebody in the first place."""

    async def main() -> None:
        swarm = Simulated(tmp_path, 3, outer_steps=12)
        sims = await swarm.start(2)
        await swarm.until(sims, 2)
        newcomer = await swarm.newcomer_in_download(3)
        assert newcomer.peer.replica.state is None
        here, others = newcomer.peer.identity.peer_id, [sim.peer.identity.peer_id for sim in swarm.peers[:-1]]
        for other in others:
            swarm.network.cut(here, other, "silent")
        timeouts = newcomer.peer.here.timeouts
        await asyncio.sleep(timeouts.reduced_part_s + timeouts.discover_s + timeouts.record_life_s / 2)
        assert newcomer.peer.replica.state is None
        for other in others:
            swarm.network.restore(here, other)
        await swarm.until([*sims, newcomer], 12)
        swarm.check_identical([*sims, newcomer])

    run_simulated(main())


def test_a_joiner_contributes_within_one_outer_step_after_its_download(tmp_path: Path) -> None:
    """Although the swarm has gone on while it was downloading from slow donors."""

    async def main() -> None:
        swarm = Simulated(tmp_path, 4, n=50_000, codec="int4", outer_steps=14)
        sims = await swarm.start(3)
        await swarm.until(sims, 6)
        for sim in swarm.peers:
            sim.peer.uploads.rate = Rate(bytes_per_s=10_000.0)
        newcomer = swarm.add(4)
        await swarm.until([*sims, newcomer], 14)
        swarm.check_identical([*sims, newcomer])
        downloads = swarm.steps_of(4, "download")
        donors = [event.donors for event in swarm.events(4, PeerCaughtUp)]
        there = swarm.steps_of(4, "inner")[0]
        assert downloads == [5]
        assert donors[0] >= 2
        assert there > 7  # the swarm has made an outer step meanwhile, and another one
        contributed = [step for step in range(5, 14) if swarm.contributed(newcomer, step)]
        assert there <= contributed[0] <= there + 1
        assert contributed == list(range(contributed[0], 14))
        for sim in sims:
            assert all(result.committed for result in sim.results)

    run_simulated(main())


def test_a_seed_keeps_the_run_alive_when_every_trainer_leaves(tmp_path: Path) -> None:
    """One politely, the others as by SIGKILL. Who comes later finds the run, its state and its history there."""

    async def main() -> None:
        swarm = Simulated(tmp_path, 3, outer_steps=12)
        seed = swarm.add(0, seed=True)
        await asyncio.sleep(1)
        first = [swarm.add(i + 1) for i in range(3)]
        await swarm.until(first, 6)
        await first[0].peer.leave("enough")
        await swarm.until([seed], 6)
        for sim in first:
            swarm.network.kill(sim.peer.identity.peer_id)
        left_at = seed.peer.step
        await asyncio.sleep(600)
        assert seed.peer.step == left_at >= 6

        late = [swarm.add(i) for i in (4, 5)]
        await swarm.until(late, 12)
        swarm.check_identical([*first, *late])
        for sim, index in zip(late, (4, 5)):
            assert min(sim.history) == left_at
            joined = swarm.events(index, PeerJoined)[0]
            assert (joined.step, joined.from_step, joined.snapshot) == (left_at, None, True)
        assert swarm.steps_of(0, "serve")
        everybody = {sim.peer.identity.peer_id for sim in first}
        members = {peer_id for result in swarm.headers(late[0], left_at, 12) for peer_id, _ in result.contributors}
        assert not members & everybody

    run_simulated(main())


def test_a_restarted_peer_goes_on_from_its_own_ledger(tmp_path: Path) -> None:
    async def main() -> None:
        swarm = Simulated(tmp_path, 3, outer_steps=12)
        sims = await swarm.start(3)
        await swarm.until(sims, 4)
        victim, *others = sims
        swarm.network.kill(victim.peer.identity.peer_id)
        await swarm.until(others, 7)
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


def test_peers_of_unequal_speed_finish_together(tmp_path: Path) -> None:
    """Once they have made one, each plans as many inner steps as it makes while the two fastest make all."""

    async def main() -> None:
        swarm = Simulated(tmp_path, 4, n=2000, outer_steps=6, inner_steps=40)
        swarm.add(0, seed=True)
        await asyncio.sleep(1)
        sims = [swarm.add(i + 1, step_s=step_s) for i, step_s in enumerate((1.0, 1.0, 2.0, 4.0))]
        await swarm.until(sims, 6)
        await asyncio.sleep(1)
        swarm.check_identical(sims)
        assert [[result.planned for result in sim.results[1:]] for sim in sims] == [
            [40] * 5,
            [40] * 5,
            [20] * 5,
            [10] * 5,
        ]
        assert all(result.group == 4 for sim in sims for result in sim.results)
        late = [max(result.gather_s for result in sim.results[2:]) for sim in sims]
        assert max(late) < 4.0, "at most the slowest one's inner step"
        for step in (2, 3, 4, 5):
            header = sims[0].peer.replica.ledger.header(step)
            assert header is not None
            weights = dict(header.contributors)
            tokens = [weights[sim.peer.identity.peer_id] // swarm.manifest.spec.tokens_per_inner_step for sim in sims]
            assert tokens == [40, 40, 20, 10]

    run_simulated(main())


# -- contributions that are lost ------------------------------------------------------------------------------------


class Script(random.Random):
    """Says which outer steps a peer drops, the first one first; none after those."""

    def __init__(self, drops: str) -> None:
        super().__init__(0)
        self.left = iter(drops)

    def random(self) -> float:
        return 0.0 if next(self.left, ".") == "x" else 1.0


@pytest.mark.parametrize("on_missed", ["adopt", "keep"])
def test_a_dropped_contribution_is_lost_or_arrives_with_the_next_one(tmp_path: Path, on_missed: OnMissed) -> None:
    """Against the same run without a network: member 0 drops its first and its third contribution, of four."""
    drops, outer_steps, inner_steps = {0: "x.x.", 1: "...."}, 4, 10

    async def main() -> Simulated:
        swarm = Simulated(tmp_path, 2, n=2000, outer_steps=outer_steps, on_missed=on_missed)
        sims = await swarm.start(2)
        for i, sim in enumerate(sims):
            sim.drop, sim.drops = 0.5, Script(drops[i])
        await swarm.until(sims, outer_steps)
        await asyncio.sleep(1)  # all have the result of the last one
        swarm.check_identical(sims)
        assert all(result.committed for sim in sims for result in sim.results), "who drops takes part"
        kept = [drop == "x" and on_missed == "keep" for drop in drops[0]]
        assert [[result.kept for result in sim.results] for sim in sims] == [kept, [False] * outer_steps]
        return swarm

    swarm = run_simulated(main())
    sims, outer = swarm.peers[1:], swarm.manifest.spec.outer
    theta, momentum = swarm.genesis.astype(np.float64), np.zeros(2000)
    local, weights = [theta.copy(), theta.copy()], [0, 0]
    for t in range(outer_steps):
        for i in (0, 1):
            local[i] = swarm.targets[i] + (local[i] - swarm.targets[i]) * 0.9**inner_steps
            weights[i] += 1
        came = [i for i in (0, 1) if drops[i][t] == "."]
        total = sum(weights) if on_missed == "keep" else sum(weights[i] for i in came)
        gradient = sum((weights[i] / total * (theta - local[i]) for i in came), np.zeros(2000))
        momentum = outer.momentum * momentum + gradient
        theta = theta - outer.lr * (gradient + outer.momentum * momentum)
        for i in (0, 1):
            if on_missed == "adopt" or i in came:
                local[i], weights[i] = theta.copy(), 0
        state = np.frombuffer(sims[0].history[t + 1][1], np.float32)
        np.testing.assert_allclose(state, theta, atol=1e-4, err_msg=f"outer step {t}")


def test_nobody_waits_for_one_that_drops(tmp_path: Path) -> None:
    """It gets the update like everybody, and reduces its share."""

    async def main() -> None:
        swarm = Simulated(tmp_path, 4, outer_steps=4)
        sims = await swarm.start(4)
        sims[2].drop = 1.0
        await swarm.until(sims, 4)
        swarm.check_identical(sims)
        for sim in sims:
            assert all(result.committed and result.group == 4 for result in sim.results)
            assert max(result.reduce_s + result.settle_s for result in sim.results) < 1.0
            assert not [one for one in sim.transport.complaints if not isinstance(one, Gone)], "or it had its answer"
        update = sims[0].peer.replica.ledger.update(3)
        assert update is not None
        assert [len(parts_with(update, sim.peer.identity.peer_id)) for sim in sims] == [2, 2, 0, 2]

    run_simulated(main())


def test_a_contribution_that_came_to_one_reducer_only_counts_there_once(tmp_path: Path) -> None:
    """The part that has it is taken from theta; only the other one goes on from where training led."""

    async def main() -> None:
        swarm = Simulated(tmp_path, 3, outer_steps=3, on_missed="keep")
        swarm.add(0, seed=True)
        await asyncio.sleep(1)
        sims = [swarm.add(1), swarm.add(2), swarm.add(3, client_mode=True)]
        client = sims[2]
        await swarm.until(sims, 1)
        local = client.peer.local
        assert local is not None
        opens, deaf = client.transport.open, sims[0].peer.identity.peer_id
        refused: list[str] = []
        trained: list[Vector] = []

        async def open_(peer_id: str, maddrs: list[str], protocol: str) -> Channel:
            """Contributions to one of the reducers are lost, the second time, too; all else goes through."""
            channel = await opens(peer_id, maddrs, protocol)
            if peer_id == deaf and client.peer.seat.phase == "reduce" and len(refused) < MAX_TRIES:
                refused.append(peer_id)
                trained.append(local.copy())
                channel.close()
            return channel

        client.transport.open = open_  # type: ignore[method-assign]
        await swarm.until([client], 2)
        update = client.peer.replica.ledger.update(1)
        assert update is not None
        counted = parts_with(update, client.peer.identity.peer_id)
        assert refused
        assert len(counted) == 1
        result = next(result for result in client.results if result.step == 2)
        assert result.kept
        theta = client.peer.replica.theta
        for part, where in enumerate((slice(0, PART_VALUES), slice(PART_VALUES, N))):
            np.testing.assert_array_equal(local[where], theta[where] if part in counted else trained[0][where])
        await swarm.until(sims, 3)
        swarm.check_identical(sims)

    run_simulated(main())


def test_nothing_is_kept_where_the_ledger_does_not_show_the_way(tmp_path: Path) -> None:
    """After a roll-back, or a snapshot, nobody knows what of this peer is in the new theta."""

    async def main() -> None:
        swarm = Simulated(tmp_path, 3, n=2000, outer_steps=4, on_missed="keep")
        swarm.add(0, seed=True)
        await asyncio.sleep(1)
        sims = [swarm.add(1), swarm.add(2), swarm.add(3)]
        await swarm.until(sims[:2], 1)
        peer, local = sims[2].peer, np.ones(2000, np.float32)
        outer_steps = peer.outer_steps
        assert outer_steps is not None
        sims[2].drop = 1.0  # from now on it is in no update
        await swarm.until(sims, 4)
        ledger = peer.replica.ledger
        heads = [header.parent for step in range(4) if (header := ledger.header(step)) is not None]

        def kept(step: int, head: bytes) -> bool:
            return outer_steps._keep(Standing(step=step, head=head, heads=()), local)

        assert [kept(step, heads[step]) for step in (1, 2, 3)] == [True] * 3
        assert not kept(0, heads[0]), "it was in that one"
        assert [kept(step, bytes(32)) for step in (1, 2, 3, 4)] == [False] * 4
        assert [kept(2, heads[1]), kept(4, peer.seat.standing.head), kept(5, heads[3])] == [False] * 3
        assert (local[:] == 1).all()

    run_simulated(main())


def test_client_mode_peers_contribute_but_reduce_and_lead_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        swarm = Simulated(tmp_path, 3, outer_steps=5)
        swarm.add(0, seed=True)
        await asyncio.sleep(1)
        sims = [swarm.add(1, client_mode=True), swarm.add(2, client_mode=True), swarm.add(3)]
        await swarm.until(sims, 5)
        swarm.check_identical(sims)
        for butterfly in sims[2].peer.reception.rounds:
            reducers = {butterfly.group.members[i].peer_id for i in butterfly.group.reducers}
            assert reducers == {sims[2].peer.identity.peer_id}
        assert sims[0].results[-1].group == 3

    run_simulated(main())


def reducers_of(sim: SimPeer) -> set[str]:
    """Of its last rounds."""
    groups = [settlement.group for settlement in sim.peer.reception.rounds]
    return {group.members[i].peer_id for group in groups for i in group.reducers}


def test_the_owners_seed_helps_where_no_trainer_can_be_dialled(tmp_path: Path) -> None:
    """Also when they are known, long after it witnesses nothing any more; it contributes nothing, counts nowhere, and
    all others audit it."""

    async def main() -> None:
        swarm = Simulated(tmp_path, 3, outer_steps=20, inner_steps=4)
        homes = await swarm.start(3, client_mode=True)
        await swarm.until([*swarm.peers], 20)
        swarm.check_identical(swarm.peers)
        assert reducers_of(homes[0]) == {RUN_OWNER.peer_id}
        assert {len(header.contributors) for header in swarm.headers(homes[0], 0, 20)} == {3}
        assert not any(swarm.contributed(swarm.peers[0], step) for step in range(20))
        for home in homes:
            assert RUN_OWNER.peer_id not in home.peer.seat.known.peers
            assert [result.group for result in home.results] == [3] * 20
        for index in range(4):
            ended = swarm.events(index, RoundEnded)
            assert {(event.helper, len(event.group), event.dropped) for event in ended} == {(RUN_OWNER.peer_id, 3, ())}
            assert [event.witnessed for event in ended] == [True] * 16 + [False] * 4
        assert {audit.result for index in (1, 2, 3) for audit in swarm.events(index, PartAudited)} == {"sound"}

    run_simulated(main())


def test_a_trainer_that_can_be_dialled_takes_over_from_the_seed(tmp_path: Path) -> None:
    async def main() -> None:
        swarm = Simulated(tmp_path, 3, outer_steps=40, inner_steps=4)
        homes = await swarm.start(2, client_mode=True)
        await swarm.until(homes, 3)
        trainer = swarm.add(3)
        await swarm.until([trainer], 10)
        assert reducers_of(homes[0]) == {trainer.peer.identity.peer_id}
        swarm.network.kill(trainer.peer.identity.peer_id)
        await swarm.until(homes, 14)
        assert reducers_of(homes[0]) == {RUN_OWNER.peer_id}
        swarm.check_identical(swarm.peers)

    run_simulated(main())


def test_who_cannot_be_dialled_any_more_leads_and_reduces_no_more(tmp_path: Path) -> None:
    """A router's new address, say: others average, until the port is open again."""

    async def main() -> None:
        swarm = Simulated(tmp_path, 2, outer_steps=40, inner_steps=4)
        sims = await swarm.start(2)
        await swarm.until(sims, 2)
        moved, other = sims
        both = {sim.peer.identity.peer_id for sim in sims}
        assert reducers_of(other) == both
        moved.transport.dialable = False
        await swarm.until(sims, 12)
        assert reducers_of(other) == both - {moved.peer.identity.peer_id}
        moved.transport.dialable = True
        await swarm.until(sims, 22)
        assert reducers_of(other) == both

    run_simulated(main())


def test_a_seed_may_help_always_or_never(tmp_path: Path) -> None:
    async def main(seeds_reduce: SeedsReduce) -> None:
        swarm = Simulated(tmp_path / seeds_reduce, 3, outer_steps=3, seeds_reduce=seeds_reduce)
        homes = await swarm.start(2, client_mode=True)
        if seeds_reduce == "never":
            await asyncio.sleep(100)
            assert {result.reason for home in homes for result in home.results} == {"alone"}
            assert homes[0].peer.step == 0
        else:
            trainer = swarm.add(3)
            await swarm.until([*homes, trainer], 3)
            assert reducers_of(homes[0]) == {trainer.peer.identity.peer_id, RUN_OWNER.peer_id}
            swarm.check_identical(swarm.peers)

    run_simulated(main("never"))
    run_simulated(main("always"))


def test_who_has_a_narrow_uplink_reduces_nothing_as_soon_as_others_have_seen_it(
    tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It contributes whole, and from the second such round on its line carries that alone."""
    monkeypatch.setattr(measured, "LEAST_MEASURED_BYTES", 300)
    rate_bytes_per_s = 20_000.0

    async def main() -> None:
        swarm = Simulated(tmp_path, 4, n=30_000, codec="int8", outer_steps=10, inner_steps=4)
        sims = await swarm.start(4)
        slow = sims[3]
        await swarm.until(sims, 1)
        narrow(slow.transport, rate_bytes_per_s)
        await swarm.until(sims, 9)
        swarm.check_identical(swarm.peers)
        rounds = [event for event in swarm.events(1, RoundEnded) if event.committed]
        assert {event.parts for event in rounds[:2]} == {None}
        for event in rounds[2:]:
            parts = dict(zip(event.group, event.parts or (), strict=True))
            assert parts.pop(slow.peer.identity.peer_id) == 0
            assert set(parts.values()) == {100}
        assert {event.share_percent for event in rounds} == {None, 133}
        assert [swarm.events(4, RoundEnded)[-1].share_percent, slow.peer.presence.record().share_percent] == [0, 0]
        assert sims[0].peer.presence.record().share_percent == 133
        assert all(swarm.contributed(slow, step) for step in range(1, 9))
        assert not any(event.lost for event in rounds)
        contribution_s = 300 * (4 + 104 + SIGNATURE_BYTES) / rate_bytes_per_s
        assert rounds[1].reduce_s > 1.5 * contribution_s
        assert max(event.reduce_s for event in rounds[2:]) < 1.1 * contribution_s

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


@pytest.mark.parametrize("answers", ["nothing", "refusals"])
def test_a_liar_that_nobody_can_follow_does_not_stop_the_swarm(tmp_path: Path, answers: str) -> None:
    """Whatever is newest it claims to be past, and nobody ever gets an update of it."""
    asked: list[Message] = []

    async def main() -> None:
        swarm = Simulated(tmp_path, 3, outer_steps=4)
        await swarm.start(3)
        sims = swarm.peers

        def claim() -> bytes:
            newest = max((sim.peer.seat.standing for sim in sims), key=lambda standing: standing.step)
            record = record_of(
                STRANGER,
                run_id=swarm.manifest.run_id,
                issued_s=asyncio.get_running_loop().time(),
                step=newest.step + 1,
                head=bytes([newest.step]) * 32,
                heads=[newest.head],
                committed=True,
            )
            return seal_record(record, STRANGER)

        async def answer(channel: Channel) -> None:
            message: Message = await channel.receive(Push, AskHeads, Ready, Closing, AskIndex, timeout_s=10.0)
            asked.append(message)
            await channel.send(Push(record=claim()) if isinstance(message, Push) else No(reason="too many downloads"))

        liar = FakeTransport(swarm.network, STRANGER.peer_id, Timeouts())
        if answers == "refusals":
            await liar.serve(sims[0].peer.here.protocol, answer)

        async def lie() -> None:
            while True:
                for sim in sims[1:]:
                    sim.peer.directory.learn(claim(), asyncio.get_running_loop().time())
                    sim.peer.presence.heard.ring()
                await asyncio.sleep(2.0)

        lying = asyncio.create_task(lie())
        await swarm.until(sims, 4, limit_s=600.0)
        lying.cancel()
        swarm.check_identical(sims[1:])
        for sim in sims[1:]:
            assert STRANGER.peer_id not in [record.peer_id for record in sim.peer.here.voters()[0]]
        assert answers == "nothing" or any(isinstance(message, AskHeads) for message in asked)

    run_simulated(main())


def test_whoever_extends_the_head_without_a_certificate_costs_others_one_round_and_no_more(tmp_path: Path) -> None:
    """It was one of them until then, so its word is a vote; others look at what leads there before they believe it."""

    async def main() -> None:
        swarm = Simulated(tmp_path, 4, n=500, outer_steps=1000)
        *honest, liar = await swarm.start(4)
        await swarm.until(honest, 2)
        from_s = asyncio.get_running_loop().time()
        extends(Liar(peer=liar.peer, lying=lambda: True, accomplices=(liar.peer.identity.peer_id,)))
        await swarm.until(honest, 12)
        assert asyncio.get_running_loop().time() - from_s < 12 * 10.0
        for index in (1, 2, 3):
            rounds = [one for one in swarm.events(index, RoundEnded) if one.step >= 2]
            assert {one.step for one in rounds if not one.committed} <= {2}, "when it is found out"
        swarm.check_identical(honest)

    run_simulated(main())


async def leads_and_is_silent(channel: Channel, message: Message, record: bytes) -> None:
    await (channel.send(Redirect(record=record)) if isinstance(message, Closing) else asyncio.sleep(500))


async def leads_and_refuses(channel: Channel, message: Message, record: bytes) -> None:
    await channel.send(Redirect(record=record) if isinstance(message, Closing) else No(reason="cannot lead"))


async def sends_everybody_to_itself(channel: Channel, message: Message, record: bytes) -> None:
    await channel.send(Redirect(record=record))


async def calls_the_round_over(channel: Channel, message: Message, record: bytes) -> None:
    await channel.send(Behind(record=record))


async def is_busy_for_ever(channel: Channel, message: Message, record: bytes) -> None:
    while True:
        await channel.send(Eta(eta_s=1.0, busy=isinstance(message, Closing)))
        await asyncio.sleep(1.0)


@pytest.mark.parametrize(
    ("lie", "least"),
    [
        (sends_everybody_to_itself, 50),
        (calls_the_round_over, 50),
        (leads_and_refuses, 50),
        (leads_and_is_silent, 20),
        (is_busy_for_ever, 8),
    ],
)
def test_a_bystander_that_lies_does_not_stop_the_others(
    tmp_path: Path, lie: Callable[[Channel, Message, bytes], Awaitable[None]], least: int
) -> None:
    """Its record is like everybody's, newer ones come all the time, and on some heads it ranks first. In ten minutes
    the others make ``least`` outer steps of the sixty that they make without it."""
    asked: list[Message] = []

    async def main() -> None:
        swarm = Simulated(tmp_path, 3, n=500, outer_steps=1000)
        await swarm.start(3)
        sims = swarm.peers
        await swarm.until(sims, 1)
        began_s, last_s = asyncio.get_running_loop().time(), 0.0

        def record() -> bytes:
            nonlocal last_s
            newest = max((sim.peer.seat.standing for sim in sims), key=lambda standing: standing.step)
            last_s = max(asyncio.get_running_loop().time(), last_s + 1e-3)
            mine = record_of(
                STRANGER,
                run_id=swarm.manifest.run_id,
                issued_s=last_s,
                step=newest.step,
                head=newest.head,
                heads=list(newest.heads[:4]),
                committed=True,
            )
            return seal_record(mine, STRANGER)

        async def answer(channel: Channel) -> None:
            message: Message = await channel.receive(Push, Ready, Closing, timeout_s=10.0)
            if isinstance(message, Push):
                await channel.send(Push(record=record()))
            else:
                asked.append(message)
                await lie(channel, message, record())

        liar = FakeTransport(swarm.network, STRANGER.peer_id, Timeouts())
        await liar.serve(sims[0].peer.here.protocol, answer)
        while (now_s := asyncio.get_running_loop().time()) < began_s + 600:
            for sim in sims:
                sim.peer.directory.learn(record(), now_s)
                sim.peer.presence.heard.ring()
            await asyncio.sleep(2.0)
        assert min(sim.peer.step for sim in sims[1:]) >= least
        swarm.check_identical(sims)
        assert {type(message) for message in asked} == {Ready, Closing}

    run_simulated(main())


def test_a_joiner_whose_donors_are_gone_for_good_gives_up(tmp_path: Path) -> None:
    async def main() -> None:
        swarm = Simulated(tmp_path, 3, outer_steps=12)
        sims = await swarm.start(2)
        await swarm.until(sims, 2)
        newcomer = await swarm.newcomer_in_download(3)
        for sim in swarm.peers[:-1]:
            swarm.network.kill(sim.peer.identity.peer_id)
        began_s, timeouts = asyncio.get_running_loop().time(), newcomer.peer.here.timeouts
        await asyncio.wait((newcomer.life,))
        assert isinstance(newcomer.ended_by, NetworkError)
        assert "try again when a seed or another peer is up" in str(newcomer.ended_by)
        longest_s = timeouts.reduced_part_s + timeouts.record_life_s + 2 * timeouts.discover_s
        assert asyncio.get_running_loop().time() - began_s < longest_s

    run_simulated(main())


def test_a_stranger_brings_its_own_record_only(tmp_path: Path) -> None:
    """Else one could fill the directory with peers that there are not."""

    async def main() -> None:
        swarm = Simulated(tmp_path, 2)
        sim = swarm.add(0, seed=True)
        await asyncio.sleep(5)
        stranger, now_s = FakeTransport(swarm.network, STRANGER.peer_id, Timeouts()), asyncio.get_running_loop().time()
        for who, taken in ((identity(77), False), (STRANGER, True)):
            record = seal_record(record_of(who, run_id=swarm.manifest.run_id, issued_s=now_s), who)
            channel = await stranger.open(sim.peer.identity.peer_id, [], sim.peer.here.protocol)
            await channel.send(Push(record=record))
            with contextlib.nullcontext() if taken else pytest.raises(Gone):
                await channel.receive(Push, timeout_s=10.0)
            assert (sim.peer.directory.get(who.peer_id) is not None) == taken

    run_simulated(main())


def test_a_diverged_trainer_goes_back_to_theta(tmp_path: Path) -> None:
    async def main() -> None:
        swarm = Simulated(tmp_path, 3, outer_steps=4)
        sims = await swarm.start(3)
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
        other = FakeTransport(swarm.network, STRANGER.peer_id, Timeouts())
        now_s, run_id = asyncio.get_running_loop().time(), swarm.manifest.run_id
        channel = await other.open(newcomer.peer.identity.peer_id, [], newcomer.peer.here.protocol)
        record = seal_record(record_of(STRANGER, run_id=run_id, issued_s=now_s), STRANGER)
        answer = await channel.request(Push(record=record), Push)
        opened = open_record(answer.record)
        assert (opened.peer_id, opened.phase) == (newcomer.peer.identity.peer_id, "joining")

    run_simulated(main())


def test_who_leaves_while_an_update_is_being_kept_says_that_it_stands_behind_it(tmp_path: Path) -> None:
    async def main() -> None:
        swarm = Simulated(tmp_path, 2, outer_steps=9)
        sims = await swarm.start(2)
        await swarm.until(sims, 2)
        leaver = sims[0]
        for _ in range(100_000):
            await asyncio.sleep(0.001)
            if leaver.peer.seat.phase == "apply":
                break
        await asyncio.sleep(1.5 * THREAD_S)  # the comparison with my own contribution is over, the commit is not
        await leaver.leave()
        state = leaver.peer.replica.loaded
        left = swarm.events(1, PeerLeft)[-1]
        assert (left.step, left.head) == (state.step, state.head.hex())
        assert state.step == leaver.results[-1].step + 1, "it left before or after the commit"

    run_simulated(main())


def test_the_log_has_every_phase_of_a_first_join(tmp_path: Path) -> None:
    """A fault of ``swarm --faults`` waits for them there."""

    async def main() -> None:
        swarm = Simulated(tmp_path, 2, outer_steps=3)
        sims = await swarm.start(2)
        await swarm.until(sims, 1)
        newcomer = await swarm.newcomer_in_download(3)
        await swarm.until([newcomer], 3)
        await newcomer.leave()
        phases = [(event.phase, event.step) for event in swarm.events(3, PhaseBegan)]
        there = newcomer.results[0].step - 1
        assert phases[:4] == [("joining", 0), ("download", 0), ("inner", there), ("gather", there)]
        assert phases[-1] == ("left", 3)
        assert [event.phase for event in swarm.events(0, PhaseBegan)][:2] == ["joining", "inner"]

    run_simulated(main())


def test_whoever_asks_may_measure_with_a_peer_that_has_a_state(tmp_path: Path) -> None:
    async def main() -> None:
        swarm = Simulated(tmp_path, 2)
        newcomer = swarm.add(1)
        stranger = FakeTransport(swarm.network, STRANGER.peer_id, Timeouts())

        async def transfer(sim: SimPeer) -> Transferred:
            channel = await stranger.open(sim.peer.identity.peer_id, [], sim.peer.here.protocol)
            await channel.send(AskTransfer(up_bytes=0, down_bytes=10))
            await channel.send_frame()
            answer = await channel.receive(Transferred, timeout_s=1.0)
            assert len(await channel.receive_frame(10, 1.0)) == 10
            channel.close()
            return answer

        await asyncio.sleep(1)
        with pytest.raises(Refused, match="joining"):
            await transfer(newcomer)
        seed = swarm.add(0, seed=True)
        await asyncio.sleep(1)
        assert (await transfer(seed)).wall_s == pytest.approx(asyncio.get_running_loop().time(), abs=0.1)
        channel = await stranger.open(seed.peer.identity.peer_id, [], seed.peer.here.protocol)
        with pytest.raises(Gone):
            await channel.request(AskDialBack(consent=b""), DialedBack)
        assert [str(complaint)[:60] for complaint in seed.transport.complaints] == [
            f"peer {STRANGER.peer_id[-8:]}: asks for a dial with not plain msgpack"[:60]
        ]

    run_simulated(main())


def test_who_comes_through_a_relay_gets_small_answers_only(tmp_path: Path) -> None:
    """Also who does not know, or care, that a relay would cut what it asks for."""

    async def main() -> None:
        swarm = Simulated(tmp_path, 2)
        seed = swarm.add(0, seed=True)
        await asyncio.sleep(1)
        stranger = FakeTransport(swarm.network, STRANGER.peer_id, Timeouts(), relayed=True)
        record = seal_record(record_of(STRANGER, run_id=swarm.manifest.run_id, issued_s=1.0), STRANGER)
        bulk = [AskTransfer(up_bytes=0, down_bytes=10), AskUpdate(step=1, head=bytes(32)), AskChain(since=0)]
        for message in (*bulk, Push(record=record)):
            channel = await stranger.open(seed.peer.identity.peer_id, [], seed.peer.here.protocol)
            assert channel.relayed
            channel.relayed = False
            if message.bulk:
                with pytest.raises(Refused, match="through a relay, which carries small messages only"):
                    await channel.request(message, Transferred)
            else:
                await channel.request(message, Push)

    run_simulated(main())


def test_strangers_who_measure_without_end_hold_up_no_round(tmp_path: Path) -> None:
    async def main() -> None:
        swarm = Simulated(tmp_path, 2, outer_steps=4)
        sims = await swarm.start(2)
        answers: Counter[str] = Counter()

        async def measure_with(sim: SimPeer, number: int) -> None:
            stranger = FakeTransport(swarm.network, Identity.from_seed(bytes([200 + number]) * 32).peer_id, Timeouts())
            while True:
                await asyncio.sleep(0.1)
                try:
                    channel = await stranger.open(sim.peer.identity.peer_id, [], sim.peer.here.protocol)
                    await channel.send(AskTransfer(up_bytes=0, down_bytes=MAX_TRANSFER_BYTES))
                    await channel.send_frame()
                    await channel.receive(Transferred, timeout_s=1.0)
                    await asyncio.sleep(1)  # the slot is taken meanwhile
                    answers["served"] += 1
                except Refused as error:
                    answers[error.reason] += 1
                except RemoteError:
                    continue

        strangers = [asyncio.create_task(measure_with(sim, i)) for i, sim in enumerate(sims * 4)]
        await swarm.until(sims, 4)
        assert [[result.group for result in sim.results] for sim in sims] == [[2] * 4] * 2
        assert answers["busy with others"] > 100
        assert 4 < answers["served"] < 40, "some are served all the same"
        for stranger in strangers:
            stranger.cancel()

    run_simulated(main())


def test_messages_for_a_round_that_nobody_knows_are_refused(tmp_path: Path) -> None:
    async def main() -> None:
        swarm = Simulated(tmp_path, 2)
        sims = await swarm.start(2)
        await swarm.until(sims, 1)
        stranger = FakeTransport(swarm.network, STRANGER.peer_id, Timeouts())

        async def ask(message: Message, refusal: type[RemoteError]) -> float:
            began_s = asyncio.get_running_loop().time()
            channel = await stranger.open(sims[0].peer.identity.peer_id, [], sims[0].peer.here.protocol)
            with pytest.raises(refusal, match=r"no such round|closed the stream"):
                await channel.request(message, Commit, timeout_s=60.0)
            return asyncio.get_running_loop().time() - began_s

        waits_s = await asyncio.gather(
            ask(Contribute(round_id=bytes(32)), Refused),
            ask(Receipt(round_id=bytes(32), part_hashes=[b""] * 2), Gone),  # then the next in rank leads
            ask(AskPart(round_id=bytes(32), part=0, hash=bytes(32)), Refused),
            ask(AskCommit(round_id=bytes(32)), Refused),
        )
        assert max(waits_s) < Timeouts().request_s + 1
        await swarm.until(sims, 3)
        swarm.check_identical(sims)

    run_simulated(main())
