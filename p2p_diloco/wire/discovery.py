"""From one address to a run: which runs are announced in this DHT, and the manifest of the one to join."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.errors import NetworkError, RemoteError, UsageError
from p2p_diloco.core.manifest import MAX_MANIFEST_BYTES, open_manifest
from p2p_diloco.core.records import RUNS_KEY, Record, is_current, open_record
from p2p_diloco.core.waiting import now_s
from p2p_diloco.wire.channel import MANIFEST_PROTOCOL, Transport
from p2p_diloco.wire.messages import AskManifest

RETRY_S = 1.0


async def find_manifest(
    transport: Transport,
    *,
    run_id: str | None,
    initial_peers: Sequence[tuple[str, str]],
    timeouts: Timeouts,
    wall_s: Callable[[], float],
) -> bytes:
    """Returns the signed manifest of the only run in the DHT, or of ``run_id``, verified.

    ``initial_peers``: (peer id, multiaddr) of the peers that were named on the command line. They are asked directly
    while nobody has announced a run, since records of another version of p2p-diloco do not even parse. Raises
    UsageError when there are several runs and no ``run_id``, not this one, or no manifest is sound; NetworkError when
    no run shows up within ``discover_s``. Both say what to do."""
    deadline_s = now_s() + timeouts.discover_s
    trouble = "no peer of a run has announced itself there"
    while True:
        runs = await announced_runs(transport, wall_s())
        if run_id is None and len(runs) > 1:
            listed = "; ".join(
                f"--run-id {rid} ({peers[0].run_name}, {len(peers)} peers)" for rid, peers in runs.items()
            )
            raise UsageError(f"there are {len(runs)} runs at this address; choose one: {listed}")
        announcers = runs.get(run_id, []) if run_id else next(iter(runs.values()), [])
        sources = [(record.peer_id, record.maddrs) for record in announcers]
        unsound: UsageError | None = None
        for peer_id, maddrs in sources or [(peer_id, [maddr]) for peer_id, maddr in initial_peers]:
            try:
                data = await ask_manifest(transport, peer_id, maddrs)
                manifest = open_manifest(data, f"peer {peer_id[-8:]}")
                if manifest.run_id == (run_id or (announcers[0].run_id if announcers else manifest.run_id)):
                    return data
                trouble = f"peer {peer_id[-8:]} serves run {manifest.run_id}"
            except RemoteError as error:
                trouble = str(error)
            except UsageError as error:
                unsound = error
        if unsound is not None:
            raise unsound
        if now_s() >= deadline_s:
            if run_id is not None and runs:
                raise UsageError(f"no run {run_id} at this address; there is {', '.join(runs)}; check --run-id")
            raise NetworkError(
                f"found no run within {timeouts.discover_s:.0f} s ({trouble}); ask for the address of a peer that is "
                f"in the run now, or start a run with 'p2p-diloco seed RUN.toml'"
            )
        await asyncio.sleep(RETRY_S)


async def announced_runs(transport: Transport, wall_s: float) -> dict[str, list[Record]]:
    """Returns run id -> the live peers that announce it in the DHT."""
    runs: dict[str, list[Record]] = {}
    for sealed in await transport.look_up(RUNS_KEY):
        try:
            record = open_record(sealed)
        except ValueError:
            continue
        if is_current(record, wall_s) and record.phase != "left" and record.peer_id != transport.peer_id:
            runs.setdefault(record.run_id, []).append(record)
    return runs


async def ask_manifest(transport: Transport, peer_id: str, maddrs: list[str]) -> bytes:
    """Returns what a peer sends as its run's signed manifest, unverified. Raises RemoteError."""
    channel = await transport.open(peer_id, maddrs, MANIFEST_PROTOCOL)
    try:
        await channel.send(AskManifest())
        return await channel.receive_blob(MAX_MANIFEST_BYTES, channel.timeouts.request_s)
    finally:
        channel.close()
