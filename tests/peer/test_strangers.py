"""Strangers that take all there is: every stream, every upload. The others go on, and newcomers get in."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest

from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.errors import RemoteError
from p2p_diloco.wire.channel import run_protocol
from tests.peer.test_peer import RUN_OWNER, Simulated
from tests.support import fakes
from tests.support.builders import identity
from tests.support.fakes import FakeTransport, run_simulated
from tests.support.limited import LimitedTransport


async def hold_a_stream(stranger: FakeTransport, victim: str, protocol: str) -> None:
    """Opens a stream and says nothing, and another one whenever that has ended."""
    while True:
        with contextlib.suppress(RemoteError):
            channel = await stranger.open(victim, [], protocol)
            await channel.receive_frame(1000, 1000.0)
        await asyncio.sleep(2.0)


def test_sixteen_identities_with_eight_silent_streams_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every peer. Rounds go on, and a newcomer joins and contributes."""
    monkeypatch.setattr(fakes, "FakeTransport", LimitedTransport)

    async def main() -> None:
        swarm = Simulated(tmp_path, 4, n=1000, outer_steps=6)
        sims = await swarm.start(3)
        protocol = run_protocol(swarm.manifest.run_id)
        held: list[asyncio.Task[None]] = []

        def attack(victim: str) -> None:
            for stranger in strangers:
                held.extend(asyncio.ensure_future(hold_a_stream(stranger, victim, protocol)) for _ in range(8))

        strangers = [FakeTransport(swarm.network, identity(500 + i).peer_id, Timeouts()) for i in range(16)]
        for sim in swarm.peers:
            attack(sim.peer.identity.peer_id)
        await swarm.until(sims, 2, limit_s=60.0)
        newcomer = swarm.add(4)
        attack(newcomer.peer.identity.peer_id)
        await swarm.until([*sims, newcomer], 6, limit_s=150.0)
        assert swarm.contributed(newcomer, 5)
        assert all(result.committed for sim in sims for result in sim.results)
        swarm.check_identical([*sims, newcomer])
        trainers = {sim.peer.identity.peer_id for sim in (*sims, newcomer)}
        assert all(sim.transport.favoured == trainers | {RUN_OWNER.peer_id} for sim in swarm.peers)
        for task in held:
            task.cancel()

    run_simulated(main())
