"""Swarms in memory whose owner anchors their history: who hears of it, what a restart keeps, whom one believes."""

from __future__ import annotations

import asyncio
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from p2p_diloco.core.anchor import Anchors
from p2p_diloco.core.event import of_kind
from p2p_diloco.core.events import EVENTS_FILE, read_events
from p2p_diloco.core.trust_event import AnchorContradicted, AnchorTaken
from p2p_diloco.ledger.anchors import keep_anchors, read_anchors
from tests.peer.test_peer import Simulated
from tests.support.builders import identity
from tests.support.fakes import SimPeer, make_manifest, run_simulated
from tests.support.lying import override

OWNER = identity(0)
"""It runs the seed."""


class Anchored(Simulated):
    """A run of which every second outer step is anchored."""

    def __init__(self, tmp_path: Path, k: int = 3, *, outer_steps: int = 12) -> None:
        super().__init__(tmp_path, k, n=1000, outer_steps=outer_steps)
        self.manifest = make_manifest(1000, self.genesis, OWNER, outer_steps=outer_steps, snapshot_every=2)

    def come(self, index: int) -> SimPeer:
        """A peer begins, or begins again: the seed, if it has index 0."""
        sim = SimPeer.create(
            self.network,
            self.manifest,
            OWNER,
            self.tmp_path,
            index,
            target=None if index == 0 else self.targets[index - 1],
            genesis=self.genesis if index == 0 else None,
        )
        sim.start()
        self.peers.append(sim)
        return sim

    async def begin(self, trainers: int = 3) -> list[SimPeer]:
        self.come(0)
        await asyncio.sleep(1.0)
        return [self.come(index + 1) for index in range(trainers)]

    async def until_anchored(self, sims: list[SimPeer], step: int) -> None:
        for _ in range(1200):
            if min(self.anchored_step(sim) for sim in sims) >= step:
                return
            await asyncio.sleep(0.5)
        raise AssertionError([self.anchored_step(sim) for sim in sims])

    @staticmethod
    def anchored_step(sim: SimPeer) -> int:
        newest = sim.peer.seat.anchors.newest
        return newest.step if newest else 0

    def on_disk(self, index: int) -> Anchors:
        anchors, problem = read_anchors(self.tmp_path / str(index), self.manifest)
        assert problem == ""
        return anchors

    def taken(self, index: int) -> list[AnchorTaken]:
        return of_kind(read_events(self.tmp_path / str(index) / EVENTS_FILE), AnchorTaken)


def test_the_owners_seed_anchors_what_is_old_enough_and_all_hear_of_it(tmp_path: Path) -> None:
    async def main() -> None:
        swarm = Anchored(tmp_path)
        sims = await swarm.begin()
        await swarm.until_anchored(sims, 4)
        seed = swarm.peers[0]
        chain = seed.peer.seat.anchors.chain
        assert [anchor.number for anchor in chain] == list(range(1, len(chain) + 1))
        assert all(earlier.step < later.step for earlier, later in pairwise(chain)), "no state twice"
        for anchor in chain:
            assert anchor.step % 2 == 0
            assert anchor.step + 4 <= seed.peer.step
            assert seed.peer.replica.ledger.chain.head_at(anchor.step) == anchor.head
            assert seed.peer.replica.history.certified_digest(anchor.step) in (b"", anchor.state)
        for index in range(4):
            on_disk = swarm.on_disk(index).chain
            assert on_disk[: len(chain)] == chain[: len(on_disk)]
            assert {event.made for event in swarm.taken(index)} == {index == 0}
        record = sims[0].peer.directory.get(seed.peer.identity.peer_id)
        assert record is not None
        assert (record.anchored_step, record.anchor) == (chain[-1].step, chain[-1].digest)

    run_simulated(main())


def test_a_newcomer_has_all_of_them_and_a_restart_goes_on(tmp_path: Path) -> None:
    """Also where the seed is gone, from whoever has them."""

    async def main() -> None:
        swarm = Anchored(tmp_path, outer_steps=20)
        sims = await swarm.begin()
        await swarm.until_anchored(sims, 2)
        first = swarm.on_disk(0).chain[0]
        swarm.network.kill(swarm.peers[0].peer.identity.peer_id)
        late = swarm.come(4) if len(swarm.targets) > 3 else sims[0]
        await swarm.until_anchored([late], 2)
        assert late.peer.seat.anchors.chain[0] == first
        seed = swarm.come(0)
        await swarm.until_anchored([seed, *sims], 6)
        assert seed.peer.seat.anchors.chain[0] == first

    run_simulated(main())


def test_an_old_copy_of_the_owners_folder_contradicts_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        swarm = Anchored(tmp_path, outer_steps=20)
        sims = await swarm.begin()
        await swarm.until_anchored(sims, 2)
        shutil.copytree(tmp_path / "0", tmp_path / "copy")
        await swarm.until_anchored(sims, 6)
        swarm.network.kill(swarm.peers[0].peer.identity.peer_id)
        shutil.rmtree(tmp_path / "0")
        shutil.move(tmp_path / "copy", tmp_path / "0")
        seed = swarm.come(0)
        await swarm.until_anchored([seed, *sims], 8)
        assert seed.peer.seat.anchors.chain[: len(sims[0].peer.seat.anchors.chain)] == sims[0].peer.seat.anchors.chain
        assert all(sim.peer.seat.anchors.contrary is None for sim in [seed, *sims])

    run_simulated(main())


def test_two_that_contradict_each_other_are_settled_by_the_next_one(tmp_path: Path) -> None:
    """A trainer has one of another history. It stays with that, and trains with nobody, until the owner names both."""

    async def main() -> None:
        swarm = Anchored(tmp_path, outer_steps=40)
        sims = await swarm.begin()
        await swarm.until_anchored(sims, 2)
        swarm.network.kill(sims[2].peer.identity.peer_id)
        elsewhere = Anchors().next(swarm.manifest.run_id, step=2, head=bytes([9]) * 32, state=bytes(32), owner=OWNER)
        keep_anchors(tmp_path / "3", Anchors(chain=(elsewhere,)))
        seed, sims[2] = swarm.peers[0], swarm.come(3)
        await swarm.until_anchored([seed, *sims], 6)
        settles = next(anchor for anchor in seed.peer.seat.anchors.chain if len(anchor.follows) == 2)
        assert elsewhere.digest in settles.follows
        assert sims[2].peer.seat.anchors.chain[:2] == (elsewhere, settles)
        warned = [of_kind(read_events(tmp_path / str(i) / EVENTS_FILE), AnchorContradicted) for i in range(4)]
        assert warned[0]
        await swarm.until(sims, settles.step + 6, limit_s=400.0)
        assert all(sim.peer.seat.anchors.contrary is None for sim in [seed, *sims])

    run_simulated(main())


def test_an_owner_that_is_cut_off_with_a_few_anchors_nothing_that_the_others_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It stands with two of six that are known, who go on, and so do the other four. When all hear each other again,
    they follow the four: no anchor binds anybody to the history of the two."""
    for module in ("core.known", "core.lineage", "ledger.chain"):
        monkeypatch.setattr(f"p2p_diloco.{module}.WINDOW_STEPS", 4)
    monkeypatch.setattr("p2p_diloco.core.known.LEAST_STEPS", 2)

    async def main() -> None:
        swarm = Anchored(tmp_path, k=6, outer_steps=100)
        sims = await swarm.begin(6)
        await swarm.until_anchored(sims, 6)
        few, most = [swarm.peers[0], *sims[:2]], sims[2:]
        ends = [(one.peer.identity.peer_id, other.peer.identity.peer_id) for one in few for other in most]
        for one, other in ends:
            swarm.network.cut(one, other, "reset")
        parted = max(sim.peer.step for sim in swarm.peers)
        await swarm.until(most, parted + 9, limit_s=600.0)
        assert few[0].peer.step > parted + 6, "they have gone on for longer than peers are known"
        assert max(map(swarm.anchored_step, few)) <= parted
        assert "until most of those known there have gone on from it" in caplog.text
        theirs = most[0].peer.replica.ledger.chain
        kept = [theirs.head_at(step) for step in range(parted + 9)]
        for one, other in ends:
            swarm.network.restore(one, other)
        await swarm.until_anchored(swarm.peers, parted + 9)
        for sim in swarm.peers:
            assert [sim.peer.replica.ledger.chain.head_at(step) for step in range(parted + 9)] == kept

    run_simulated(main())


def test_an_anchor_that_the_owner_has_not_signed_is_taken_from_nobody(tmp_path: Path) -> None:
    async def main() -> None:
        swarm = Anchored(tmp_path, outer_steps=8)
        sims = await swarm.begin()
        liar = sims[2]
        await swarm.until(sims, 1, limit_s=200.0)
        forged = Anchors().next(swarm.manifest.run_id, step=50, head=bytes(32), state=bytes(32), owner=identity(3))
        liar.peer.seat.anchors = Anchors(chain=(forged,))
        await swarm.until(sims[:2], 4, limit_s=200.0)
        assert forged not in [anchor for sim in sims[:2] for anchor in sim.peer.seat.anchors.chain]
        assert swarm.peers[0].transport.traffic.rejected["misbehaved"]

    run_simulated(main())


def test_a_state_that_a_certificate_contradicts_is_not_anchored(tmp_path: Path) -> None:
    """The owner's own memory may be at fault."""

    async def main() -> None:
        swarm = Anchored(tmp_path, outer_steps=8)
        sims = await swarm.begin()
        override(swarm.peers[0].peer.replica.history, "certified_digest", lambda real: lambda step: bytes(32))
        await swarm.until(sims, 7, limit_s=200.0)
        assert swarm.peers[0].peer.anchoring._computed
        assert swarm.peers[0].peer.seat.anchors == Anchors()

    run_simulated(main())


def test_a_state_that_was_left_is_not_anchored(tmp_path: Path) -> None:
    async def main() -> None:
        swarm = Anchored(tmp_path, outer_steps=8)
        sims = await swarm.begin()
        await swarm.until(sims, 3, limit_s=200.0)
        anchoring, chain = swarm.peers[0].peer.anchoring, swarm.peers[0].peer.replica.ledger.chain
        anchoring._computed = {2: (chain.head_at(2) or b"", bytes(32)), 4: (bytes(32), bytes(32))}
        assert anchoring._due(4) == (2, anchoring._computed[2])

    run_simulated(main())
