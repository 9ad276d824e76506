"""Newcomers that download the same snapshot at the same time, and take chunks from each other; partners that lie."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from p2p_diloco.core import grid
from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.waiting import now_s
from p2p_diloco.ledger.snapshot import chunk_slices, snapshot_bytes
from p2p_diloco.peer.partners import HAVE_EVERY_S, USELESS_S
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.message import Message
from p2p_diloco.wire.messages import No, Size
from p2p_diloco.wire.state_messages import AskChunk, AskHave, Have
from tests.support import library
from tests.support.builders import identity
from tests.support.fakes import FakeNetwork, SimPeer, make_manifest, run_simulated
from tests.support.library import Donor, Library, Lie, new_replica, on, replica_at, says, silent, small_parts

# -- whole newcomers ---------------------------------------------------------------------------------------------------

PART = 500
CHUNKS = 192
"""As of a model of 25 million parameters."""
N = PART * CHUNKS // 2
LINE_BYTES_PER_S = snapshot_bytes(N) / 16.0
"""As 100 Mbit/s are to that model."""
SCALE = 4 * PART / 2**20
TIMEOUTS = Timeouts(
    min_rate_bytes_per_s=SCALE * Timeouts().min_rate_bytes_per_s,
    slow_rate_bytes_per_s=SCALE * Timeouts().slow_rate_bytes_per_s,
)
OWNER = identity(1000)
GENESIS = np.linspace(-1, 1, N, dtype=np.float32)


@pytest.fixture
def parts_of_500() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "PART_VALUES", PART)
        yield


@dataclass(eq=False)
class Mirrors:
    """A seed, and newcomers that mirror it, each behind a line of its own."""

    folder: Path
    network: FakeNetwork = field(default_factory=FakeNetwork)
    sims: list[SimPeer] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.manifest = make_manifest(N, GENESIS, OWNER)

    def add(self, *, dialable: bool = True) -> SimPeer:
        index = len(self.sims)
        genesis = None if self.sims else GENESIS
        sim = SimPeer.create(
            self.network,
            self.manifest,
            OWNER,
            self.folder,
            index,
            target=None,
            genesis=genesis,
            client_mode=not dialable,
            timeouts=TIMEOUTS,
        )
        self.network.uplinks[sim.peer.identity.peer_id] = LINE_BYTES_PER_S
        self.sims.append(sim)
        sim.start()
        return sim

    async def until_joined(self, *sims: SimPeer) -> None:
        deadline_s = asyncio.get_running_loop().time() + 600
        while not all(sim.peer.seat.phase == "inner" for sim in sims):
            assert asyncio.get_running_loop().time() < deadline_s
            await asyncio.sleep(0.01)
        for sim in sims:
            assert sim.peer.replica.newest_snapshot().digest == self.sims[0].peer.replica.newest_snapshot().digest

    def given_bytes(self, sim: SimPeer) -> int:
        """That others have downloaded from it."""
        return sim.transport.traffic.sent["catchup"]

    async def join_s(self, newcomers: int) -> float:
        """Seconds from their start until all of them have joined."""
        began_s = now_s()
        await self.until_joined(*[self.add() for _ in range(newcomers)])
        return now_s() - began_s


@pytest.mark.usefixtures("parts_of_500")
def test_four_newcomers_at_once_take_little_more_from_a_seed_than_one(tmp_path: Path) -> None:
    async def alone() -> tuple[float, int]:
        swarm = Mirrors(tmp_path / "alone")
        seed = swarm.add()
        await asyncio.sleep(1)
        return await swarm.join_s(1), swarm.given_bytes(seed)

    async def together() -> tuple[float, int]:
        swarm = Mirrors(tmp_path / "together")
        seed = swarm.add()
        await asyncio.sleep(1)
        seconds = await swarm.join_s(4)
        assert all(swarm.given_bytes(sim) > snapshot_bytes(N) / 2 for sim in swarm.sims[1:])
        return seconds, swarm.given_bytes(seed)

    one, four = run_simulated(alone()), run_simulated(together())
    assert snapshot_bytes(N) < one[1] < 1.1 * snapshot_bytes(N)
    assert four[1] < 1.25 * one[1]
    assert four[0] < 1.25 * one[0]


@pytest.mark.usefixtures("parts_of_500")
def test_who_comes_while_others_download_takes_what_they_have(tmp_path: Path) -> None:
    async def main() -> None:
        swarm = Mirrors(tmp_path)
        seed = swarm.add()
        await asyncio.sleep(1)
        swarm.add()
        swarm.add(dialable=False)
        swarm.add()
        await asyncio.sleep(10)
        assert await swarm.join_s(1) < 18.0
        await swarm.until_joined(*swarm.sims)
        hidden = swarm.sims[2]
        assert hidden.transport.traffic.received["catchup"] > snapshot_bytes(N)
        assert swarm.given_bytes(hidden) < 0.2 * snapshot_bytes(N), "nobody can dial it"
        assert swarm.given_bytes(seed) < 2.0 * snapshot_bytes(N), "four at 1.0 each took 4.0"

    run_simulated(main())


# -- partners that lie -------------------------------------------------------------------------------------------------


@pytest.fixture
def small() -> Iterator[None]:
    with small_parts():
        yield


async def wrong_chunk(donor: Donor, channel: Channel, message: AskChunk) -> None:
    incoming = donor.replica.ledger.incoming
    assert incoming is not None
    await channel.send_blob((incoming.read(message.chunk) or bytes(library.CHUNK_BYTES))[:-1] + b"x")


def shows(*answers: bytes) -> Callable[[Donor, Channel, Any], Awaitable[None]]:
    return says(*(Have(chunks=answer) for answer in answers))


ALL = b"\xff\x0f"
LIES: dict[str, tuple[Lie, bool]] = {
    "wrong chunk": (on(AskChunk, wrong_chunk), True),
    "closes": (on(AskChunk, says()), True),
    "silent about a chunk": (on(AskChunk, silent), False),
    "refuses": (on(AskChunk, says(No(reason="busy serving others"))), False),
    "silent about what it has": (on(AskHave, silent), True),
    "closes when asked what it has": (on(AskHave, says()), True),
    "out of turn": (on(AskHave, says(Size(size_bytes=3))), True),
    "too few chunks": (on(AskHave, shows(b"\xff")), True),
    "too many chunks": (on(AskHave, shows(b"\xff\x1f")), True),
    "very many chunks": (on(AskHave, shows(bytes(16384))), True),
    "has none": (on(AskHave, says(No(reason="not in my ledger"))), False),
}
"""Name -> the lie, and whether it is found out before all is there; then its peer is asked no more."""


def slowly(seconds: float) -> Lie:
    """A donor that takes so long for each chunk."""

    async def answer(donor: Donor, channel: Channel, message: Message) -> bool:
        if isinstance(message, AskChunk):
            await asyncio.sleep(seconds)
        return False

    return answer


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", LIES)
def test_a_partner_that_lies_costs_little_and_nobody_else_is_blamed(tmp_path: Path, name: str) -> None:
    lie, suspected = LIES[name]

    async def main() -> None:
        joiner = Library(tmp_path, new_replica(tmp_path / "me"))
        swarm = replica_at(tmp_path / "swarm", 6)
        info = swarm.newest_snapshot()
        joiner.add(swarm, slowly(1.0))
        liar = joiner.add_partner(info, range(library.CHUNKS), lie)
        honest = joiner.add_partner(info, [0, 7])
        began_s = now_s()
        assert await joiner.to(swarm) is not None
        assert now_s() - began_s < 12 * 1.0 + joiner.timeouts.request_s
        assert joiner.suspects() == ([1] if suspected else [])
        assert liar.count(AskHave) > 0
        assert {*honest.chunks()} <= {0, 7}
        joiner.check_same(swarm)

    run_simulated(main())


@pytest.mark.usefixtures("small")
def test_partners_have_what_donors_are_too_busy_for(tmp_path: Path) -> None:
    async def main() -> None:
        joiner = Library(tmp_path, new_replica(tmp_path / "me"))
        swarm = replica_at(tmp_path / "swarm", 6)
        info = swarm.newest_snapshot()
        joiner.add(swarm, on(AskChunk, says(No(reason="busy serving others"))))
        partners = [joiner.add_partner(info, range(start, library.CHUNKS, 2)) for start in (0, 1)]
        caught_up = await joiner.to(swarm)
        assert caught_up is not None
        assert [sorted(partner.chunks()) for partner in partners] == [[*range(0, 12, 2)], [*range(1, 12, 2)]]
        assert joiner.suspects() == []
        joiner.check_same(swarm)

    run_simulated(main())


@pytest.mark.usefixtures("small")
def test_a_donor_that_is_silent_holds_up_nobody_who_has_partners(tmp_path: Path) -> None:
    async def main() -> None:
        joiner = Library(tmp_path, new_replica(tmp_path / "me"))
        swarm = replica_at(tmp_path / "swarm", 6)
        joiner.add(swarm, on(AskChunk, silent))
        joiner.add_partner(swarm.newest_snapshot(), range(library.CHUNKS))
        began_s = now_s()
        assert await joiner.to(swarm) is not None
        assert now_s() - began_s < joiner.timeouts.reduced_part_s / 2
        assert joiner.suspects() == []

    run_simulated(main())


@pytest.mark.usefixtures("small")
def test_a_partner_is_asked_for_what_it_gets_meanwhile(tmp_path: Path) -> None:
    async def main() -> None:
        joiner = Library(tmp_path, new_replica(tmp_path / "me"))
        swarm = replica_at(tmp_path / "swarm", 6)
        info = swarm.newest_snapshot()
        joiner.add(swarm, on(AskChunk, says(No(reason="busy serving others"))))
        partner = joiner.add_partner(info, [])
        incoming = partner.replica.ledger.incoming
        assert incoming is not None
        arriving = asyncio.ensure_future(joiner.to(swarm))
        for chunk in range(library.CHUNKS):
            await asyncio.sleep(USELESS_S - 2)
            incoming.write(chunk, info.path.read_bytes()[chunk_slices(library.N)[chunk]])
        await asyncio.sleep(2)
        assert arriving.done()
        assert await arriving is not None
        assert partner.chunks() == [*range(library.CHUNKS)]
        assert partner.count(AskHave) == pytest.approx(12 * (USELESS_S - 2) / HAVE_EVERY_S, rel=0.2)

    run_simulated(main())


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("record", [{}, {"client_mode": True}, {"snapshot_digest": bytes(32)}, {"phase": "left"}])
def test_who_has_nothing_is_left_soon_and_who_cannot_have_anything_is_not_asked(
    tmp_path: Path, record: dict[str, Any]
) -> None:
    async def main() -> None:
        joiner = Library(tmp_path, new_replica(tmp_path / "me"))
        swarm = replica_at(tmp_path / "swarm", 6)
        joiner.add(swarm, on(AskChunk, says(No(reason="busy serving others"))))
        partner = joiner.add_partner(swarm.newest_snapshot(), [], **record)
        began_s = now_s()
        assert await joiner.to(swarm) is None
        asked_s = now_s() - began_s
        assert (asked_s < 1.0) if record else (USELESS_S <= asked_s < USELESS_S + 2)
        assert (partner.count(AskHave) > 0) == (not record)
        assert joiner.suspects() == ([1] if "phase" in record else [])

    run_simulated(main())
