"""A real swarm on loopback, for a benchmark: a seed and N peers as processes, and what their event logs say."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.workers import Workers
from p2p_diloco.core.config import PeerConfig
from p2p_diloco.core.event import Event
from p2p_diloco.core.events import EVENTS_FILE, read_events
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.runfile import RunSpec
from p2p_diloco.learn.swarm import Swarm

Log: TypeAlias = list[Event]
"""One peer's events, oldest first."""
HOST_MADDRS = ("/ip4/127.0.0.1/tcp/0",)


@dataclass(frozen=True, kw_only=True)
class Run:
    spec: RunSpec
    values: int
    """Of theta."""
    logs: list[Log]
    """One per peer; the seed's is not among them."""


def run_swarm(spec: RunSpec, loop: Callable[[Swarm], None], *, peers: int, limit_s: float) -> Run:
    """Every peer runs ``loop``, a function of a module, once all have joined. TimeoutError, RuntimeError."""
    with tempfile.TemporaryDirectory(prefix="p2p-diloco-bench-") as name:
        folder = Path(name)
        with Workers(limit_s) as workers:
            run_file = write_run_file(spec, folder)
            workers.start(run_seed, run_file, folder / "seed")
            address, values = workers.receive(0)
            for i in range(peers):
                workers.start(run_peer, folder / f"peer{i}", address, loop)
            for message in ("joined", "done"):
                for rank in range(1, peers + 1):
                    assert workers.receive(rank) == message
                if message == "joined":
                    workers.send_all("go")
        logs = [read_events(next((folder / f"peer{i}").glob(f"*/{EVENTS_FILE}"))) for i in range(peers)]
        return Run(spec=spec, values=values, logs=logs)


def run_seed(pipe: Connection, run_file: Path, folder: Path) -> None:
    from p2p_diloco.learn.genesis import start_run

    config = PeerConfig(folder=folder, host_maddrs=HOST_MADDRS)
    manifest_path = start_run(run_file, folder, Identity.load_or_create(config.identity_path))
    with Swarm.join(config, role="seed", manifest_path=manifest_path) as swarm:
        pipe.send((swarm.maddrs[0], swarm.manifest.n_params))
        while True:
            pipe.recv()


def run_peer(pipe: Connection, folder: Path, address: str, loop: Callable[[Swarm], None]) -> None:
    with Swarm.join(PeerConfig(folder=folder, initial_peers=(address,), host_maddrs=HOST_MADDRS)) as swarm:
        pipe.send("joined")
        pipe.recv()
        loop(swarm)
        pipe.send("done")


def write_run_file(spec: RunSpec, folder: Path) -> Path:
    path = folder / f"{spec.name}.toml"
    path.write_text("\n".join(toml_lines(spec.model_dump(mode="json", exclude_none=True))))
    return path


def toml_lines(table: Mapping[str, Any], *path: str) -> list[str]:
    """Plain values of JSON are values of TOML, too."""
    sections = {key: value for key, value in table.items() if isinstance(value, Mapping)}
    lines = [f"{key} = {json.dumps(value)}" for key, value in table.items() if key not in sections]
    for key, section in sections.items():
        lines += [f"[{'.'.join([*path, key])}]", *toml_lines(section, *path, key)]
    return lines
