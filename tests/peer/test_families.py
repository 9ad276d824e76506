"""Whole swarms in memory whose peers have IPv4, IPv6, or both: who has another family than most contributes where it
can, and costs the others nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from p2p_diloco.core.event import RoundEnded, of_kind
from p2p_diloco.core.events import EVENTS_FILE, read_events
from p2p_diloco.core.reach import BOTH, IPV4_ALONE, IPV6, Ways
from p2p_diloco.core.runfile import SeedsReduce
from p2p_diloco.core.update import bits_of
from p2p_diloco.peer.families import missing_note
from tests.support.builders import identity
from tests.support.fakes import FakeNetwork, SimPeer, make_manifest, run_simulated

OWNER = identity(0)
N = 8 * 64
IPV6_ALONE = Ways(reached_over=IPV6, reaches_over=IPV6)
DUAL = Ways(reached_over=BOTH, reaches_over=BOTH)
LONE = 4
"""The trainer that has IPv6 alone."""
LONGEST_GATHER_S = 3.5
"""The run's ``gather_s``, an inner step, and some messages."""


class Families:
    """A seed and trainers, each with its own families."""

    def __init__(self, folder: Path, *, seeds_reduce: SeedsReduce = "auto") -> None:
        generator = np.random.default_rng(0)
        self.genesis, *self.targets = (generator.standard_normal(N).astype(np.float32) for _ in range(6))
        self.manifest = make_manifest(
            N, self.genesis, OWNER, outer_steps=200, inner_steps=4, snapshot_every=1000, seeds_reduce=seeds_reduce
        )
        self.folder = folder
        self.network = FakeNetwork()
        self.peers: dict[int, SimPeer] = {}

    def add(self, index: int, ways: Ways) -> SimPeer:
        seed = index == 0
        sim = self.peers[index] = SimPeer.create(
            self.network,
            self.manifest,
            OWNER,
            self.folder,
            index,
            target=None if seed else self.targets[index],
            genesis=self.genesis if seed else None,
            ways=ways,
        )
        sim.start()
        return sim

    async def start(self, seed: Ways, trainers: Sequence[Ways]) -> list[SimPeer]:
        self.add(0, seed)
        await asyncio.sleep(1)
        return [self.add(i + 1, ways) for i, ways in enumerate(trainers)]

    async def until(self, sims: Sequence[SimPeer], step: int) -> None:
        deadline_s = asyncio.get_running_loop().time() + 2000.0
        while any(sim.peer.step < step for sim in sims):
            assert asyncio.get_running_loop().time() < deadline_s, [(s.peer.step, s.peer.seat.phase) for s in sims]
            await asyncio.sleep(0.5)

    def shares(self, first: int, last: int) -> dict[int, float]:
        """Trainer -> the share of the parts of these updates that its contribution is in."""
        ledger, counts, parts = self.peers[0].peer.replica.ledger, dict.fromkeys(self.peers, 0), 0
        index_of = {sim.peer.identity.peer_id: index for index, sim in self.peers.items()}
        for update in map(ledger.update, range(first, last)):
            assert update is not None
            parts += len(update.parts)
            names = [index_of[name] for name, _ in update.header.contributors]
            for part in update.parts:
                for i in bits_of(part.mask):
                    counts[names[i]] += 1
        return {index: count / parts for index, count in counts.items() if index}

    def ended(self, index: int) -> list[RoundEnded]:
        return of_kind(read_events(self.folder / str(index) / EVENTS_FILE), RoundEnded)

    def reducers(self, index: int) -> set[int]:
        """Of the last round of this peer."""
        group = self.peers[index].peer.reception.rounds[-1].group
        ids = {sim.peer.identity.peer_id: one for one, sim in self.peers.items()}
        return {ids[group.members[i].peer_id] for i in group.reducers}

    def leader(self, index: int) -> int:
        group = self.peers[index].peer.reception.rounds[-1].group
        return next(i for i in self.peers if identity(i).peer_id == group.members[group.leader].peer_id)

    def missed(self, *indices: int) -> list[tuple[int, int, str]]:
        """(trainer, outer step, why) of their rounds that did not commit."""
        ended = [(index, event) for index in indices for event in self.ended(index)]
        return [(index, event.step, event.detail) for index, event in ended if not event.committed]


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2p_diloco.core.grid.PART_VALUES", 64)


def test_one_that_has_ipv6_alone_contributes_to_what_the_seed_averages(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The three others reduce for each other as before, and lose nothing, also when all are known."""

    async def main() -> None:
        swarm = Families(tmp_path)
        sims = await swarm.start(DUAL, [*[IPV4_ALONE] * 3, IPV6_ALONE])
        await swarm.until(sims, 20)
        assert swarm.shares(0, 20) == {1: 1.0, 2: 1.0, 3: 1.0, LONE: 0.25}
        assert not swarm.missed(*range(1, 5))
        for index in (1, LONE):
            assert swarm.reducers(index) == {0, 1, 2, 3}
            assert swarm.leader(index) == 0

    with caplog.at_level(logging.INFO):
        run_simulated(main())
    told = [record.message for record in caplog.records if record.message.startswith("this machine has")]
    assert told == [
        "this machine has IPv6 alone, and 3 of 3 that average have IPv4 alone: it contributes to what the owner's seed "
        "averages; give it IPv4 for the rest"
    ]


@pytest.mark.parametrize(("seed", "seeds_reduce"), [(IPV4_ALONE, "auto"), (DUAL, "never")])
def test_one_that_nobody_helps_costs_the_others_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, seed: Ways, seeds_reduce: SeedsReduce
) -> None:
    """And is told so."""

    async def main() -> None:
        swarm = Families(tmp_path, seeds_reduce=seeds_reduce)
        sims = await swarm.start(seed, [*[IPV4_ALONE] * 3, IPV6_ALONE])
        await swarm.until(sims[:3], 8)
        assert swarm.shares(0, 8) == {1: 1.0, 2: 1.0, 3: 1.0, LONE: 0.0}
        assert not swarm.missed(1, 2, 3)
        assert swarm.reducers(1) == {1, 2, 3}

    with caplog.at_level(logging.INFO):
        run_simulated(main())
    told = {record.message for record in caplog.records if record.message.startswith("this machine has")}
    assert {text.partition(": ")[2] for text in told} == {
        "it contributes nothing; give it IPv4, or ask the run's owner to give the seed IPv6"
    }


def test_with_both_families_among_those_that_average_most_of_it_counts(tmp_path: Path) -> None:
    async def main() -> None:
        swarm = Families(tmp_path)
        sims = await swarm.start(DUAL, [DUAL, DUAL, IPV4_ALONE, IPV6_ALONE])
        await swarm.until(sims, 12)
        assert swarm.shares(0, 12) == {1: 1.0, 2: 1.0, 3: 1.0, LONE: 0.75}
        assert not swarm.missed(*range(1, 5))
        assert swarm.reducers(LONE) == {0, 1, 2, 3}

    run_simulated(main())


def test_the_seed_leads_as_long_as_it_is_needed(tmp_path: Path) -> None:
    async def main() -> None:
        swarm = Families(tmp_path)
        sims = await swarm.start(DUAL, [IPV4_ALONE] * 3)
        await swarm.until(sims, 3)
        assert swarm.reducers(1) == {1, 2, 3}
        for turn in range(2):
            await asyncio.sleep(1.7 * turn)
            lone = swarm.add(LONE, IPV6_ALONE)
            await swarm.until([*sims, lone], sims[0].peer.step + 4)
            assert swarm.reducers(1) == {0, 1, 2, 3}
            if turn % 2:
                await lone.leave()
            else:
                swarm.network.kill(identity(LONE).peer_id)
            await asyncio.sleep(40)
            assert swarm.reducers(1) == {1, 2, 3}
        assert not swarm.missed(1, 2, 3)
        assert max(event.gather_s for i in (1, 2, 3) for event in swarm.ended(i)) < LONGEST_GATHER_S

    run_simulated(main())


ALONE = "this machine has IPv6 alone, and {} that average have IPv4 alone: it contributes "


@pytest.mark.parametrize(
    ("mine", "trainers", "helper", "told"),
    [
        (IPV4_ALONE, [IPV4_ALONE], DUAL, ""),
        (DUAL, [IPV4_ALONE] * 2, None, ""),
        (IPV6_ALONE, [DUAL, DUAL], None, ""),
        (IPV6_ALONE, [], None, ""),
        (IPV6_ALONE, [Ways(client_mode=True)], None, ""),
        (IPV6_ALONE, [IPV4_ALONE, DUAL], None, "1 of 2 to what the others average; give it IPv4 for the rest"),
        (IPV6_ALONE, [IPV4_ALONE] * 2, DUAL, "2 of 2 to what the owner's seed averages; give it IPv4 for the rest"),
        (
            IPV6_ALONE,
            [IPV4_ALONE] * 2,
            replace(DUAL, client_mode=True),
            "2 of 2 nothing; give it IPv4, or ask the run's owner to give the seed IPv6",
        ),
    ],
)
def test_a_trainer_is_told_what_it_misses(mine: Ways, trainers: list[Ways], helper: Ways | None, told: str) -> None:
    of, rest = told[:6], told[7:]
    assert missing_note(mine, trainers, helper) == (ALONE.format(of) + rest if told else "")


def test_the_remedy_names_the_family_that_a_trainer_lacks() -> None:
    assert missing_note(IPV4_ALONE, [IPV6_ALONE] * 2, None) == (
        "this machine has IPv4 alone, and 2 of 2 that average have IPv6 alone: it contributes nothing; give it IPv6, "
        "or ask the run's owner to give the seed IPv4"
    )
