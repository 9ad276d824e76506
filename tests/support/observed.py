"""A DHT of one run for a monitor to look at: a list of records, no network."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.manifest import RunManifest
from p2p_diloco.core.records import Fault, peers_key, seal_record
from p2p_diloco.core.waiting import now_s
from p2p_diloco.look.monitor import Monitor
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.traffic import Traffic
from tests.support.builders import identity, record_of
from tests.support.fakes import FakeNetwork, FakeTransport, make_manifest

MANIFEST = make_manifest(1000, np.zeros(1000, np.float32), identity(99))
INITIAL = f"/ip4/127.0.0.1/tcp/4001/p2p/{identity(1).peer_id}"


@dataclass
class FakeDHT:
    """A DHT of one key. Peers renew their records whenever somebody looks, until they are gone."""

    peer_id: str = identity(0).peer_id
    timeouts: Timeouts = field(default_factory=Timeouts)
    rejected: Counter[Fault] = field(default_factory=Counter)
    peers: dict[int, dict[str, Any]] = field(default_factory=dict)
    garbage: list[bytes] = field(default_factory=list)
    sought: list[dict[str, list[str]]] = field(default_factory=list)
    manifest: RunManifest = MANIFEST
    network: FakeNetwork = field(default_factory=FakeNetwork)
    """For streams to peers that serve some."""
    traffic: Traffic = field(default_factory=Traffic)

    async def look_up(self, key: str) -> list[bytes]:
        assert key == peers_key(self.manifest.run_id)
        return [*self.garbage, *(self.sealed(index) for index in self.peers)]

    async def open(self, peer_id: str, maddrs: list[str], protocol: str) -> Channel:
        return await FakeTransport(self.network, self.peer_id, self.timeouts).open(peer_id, maddrs, protocol)

    async def meet(self, peers: dict[str, list[str]]) -> None:
        self.sought.append(peers)

    def sealed(self, index: int) -> bytes:
        who = identity(index)
        maddrs = [f"/ip4/127.0.0.1/tcp/{index}/p2p/{who.peer_id}"]
        fields = {"run_id": self.manifest.run_id, "issued_s": now_s(), "maddrs": maddrs, **self.peers[index]}
        return seal_record(record_of(who, "ab", **fields), who)


def monitor_of(dht: FakeDHT, folder: Path, *, private_targets: bool = False) -> Monitor:
    return Monitor(
        transport=dht,
        manifest=dht.manifest,
        initial_peers=[INITIAL],
        private_targets=private_targets,
        folder=folder,
        wall_s=now_s,
    )
