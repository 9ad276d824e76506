"""From one address to a run: the one that the initial peers are in, or else one that is announced in this DHT; and its
manifest.

Whoever gives a newcomer an address vouches for the peer there, whose id is in it: the run that it serves is the run.
Records in the DHT are anybody's, and invented for nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.errors import NetworkError, RemoteError, Silent, UsageError
from p2p_diloco.core.manifest import MAX_MANIFEST_BYTES, RunManifest, open_manifest
from p2p_diloco.core.records import RUNS_KEY, Record, is_current, open_record
from p2p_diloco.core.waiting import deadline, now_s
from p2p_diloco.wire.channel import MANIFEST_PROTOCOL, Transport
from p2p_diloco.wire.state_messages import AskManifest

RETRY_S = 1.0
INITIAL_ASKED = 3
"""So often the initial peers are asked before others' records are believed without them: they may be busy."""


@dataclass(kw_only=True)
class Answers:
    """Collects what peers answer that are asked for their run's manifest."""

    sound: dict[str, tuple[RunManifest, bytes]] = field(default_factory=dict)
    """Run id -> its manifest, and the same as it was signed."""
    peers: dict[str, int] = field(default_factory=dict)
    """Run id -> how many peers have sent it."""
    unsound: UsageError | None = None
    """What is wrong with a manifest that is not sound; of another version, above all."""
    trouble: str = ""
    """Why a peer is of no use."""

    async def ask(self, transport: Transport, peer_id: str, maddrs: list[str]) -> None:
        """Asks one peer, and notes its answer."""
        try:
            data = await ask_manifest(transport, peer_id, maddrs)
            manifest = open_manifest(data, f"peer {peer_id[-8:]}")
        except RemoteError as error:
            self.trouble = str(error)
        except UsageError as error:
            self.unsound = error
        else:
            self.trouble = f"peer {peer_id[-8:]} serves run {manifest.run_id}"
            self.sound[manifest.run_id] = manifest, data
            self.peers[manifest.run_id] = self.peers.get(manifest.run_id, 0) + 1

    def of_run(self, run_id: str) -> bytes | None:
        """Returns the signed manifest of a run; None where nobody has sent it."""
        return self.sound[run_id][1] if run_id in self.sound else None


async def find_manifest(
    transport: Transport,
    *,
    run_id: str | None,
    initial_peers: Sequence[tuple[str, str]],
    timeouts: Timeouts,
    wall_s: Callable[[], float],
) -> bytes:
    """Returns the signed manifest of the run that the initial peers are in, or of ``run_id``, verified.

    ``initial_peers``: (peer id, multiaddr) of the peers that were named on the command line. When none of them is in a
    run, as nodes that do nothing but the DHT, the only run that is announced there is taken. Raises UsageError when
    there are several runs and no ``run_id``, not this one, or no manifest is sound; NetworkError when no run shows up
    within ``discover_s``. Both say what to do."""
    began_s, tries = now_s(), 0
    trouble = "no peer of a run has announced itself there"
    while True:
        direct = await _ask_initial(transport, initial_peers)
        signed = direct.of_run(run_id or _the_only(direct))
        if signed is not None:
            return signed
        tries += 1
        late = now_s() - began_s >= timeouts.discover_s / 2
        runs: dict[str, list[Record]] = {}
        if run_id is not None or late or tries >= INITIAL_ASKED or not initial_peers:
            runs = await announced_runs(transport, wall_s())
        wanted = run_id or _choose((rid, peers[0].run_name, len(peers)) for rid, peers in runs.items())
        found = Answers()
        for record in runs.get(wanted, ()):
            await found.ask(transport, record.peer_id, record.maddrs)
            if (signed := found.of_run(wanted)) is not None:
                return signed
        if (unsound := found.unsound or direct.unsound) is not None:
            raise unsound
        trouble = found.trouble or direct.trouble or trouble
        if now_s() - began_s >= timeouts.discover_s:
            if run_id is not None and runs:
                raise UsageError(f"no run {run_id} at this address; there is {', '.join(runs)}; check --run-id")
            raise NetworkError(
                f"found no run within {timeouts.discover_s:.0f} s ({trouble}); ask for the address of a peer that is "
                f"in the run now, or start a run with 'p2p-diloco seed RUN.toml'"
            )
        await asyncio.sleep(RETRY_S)


async def _ask_initial(transport: Transport, initial_peers: Sequence[tuple[str, str]]) -> Answers:
    """Returns what the initial peers answer, all asked at once. When one has sent a manifest, the others have RETRY_S
    to do so."""
    answers = Answers()
    asking = {asyncio.create_task(answers.ask(transport, peer_id, [maddr])) for peer_id, maddr in initial_peers}
    try:
        waiting = set(asking)
        while waiting:
            timeout_s = RETRY_S if answers.sound else None
            done, waiting = await asyncio.wait(waiting, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                break
            for task in done:
                task.result()
    finally:
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
    return answers


def _the_only(answers: Answers) -> str:
    """Returns the id of the run that the initial peers are in; empty where they are in none. Raises UsageError when
    they are in several, or in one that cannot be joined."""
    if not answers.sound and answers.unsound is not None:
        raise answers.unsound
    return _choose((rid, manifest.spec.name, answers.peers[rid]) for rid, (manifest, _) in answers.sound.items())


def _choose(runs: Iterable[tuple[str, str, int]]) -> str:
    """Returns the id of the only one of ``runs`` (id, name, peers); empty where there is none. Raises UsageError where
    there are several."""
    found = list(runs)
    if len(found) > 1:
        listed = "; ".join(f"--run-id {run_id} ({name}, {peers} peers)" for run_id, name, peers in found)
        raise UsageError(f"there are {len(found)} runs at this address; choose one: {listed}")
    return found[0][0] if found else ""


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
    """Returns what a peer sends as its run's signed manifest, unverified, within ``discover_s``. Raises RemoteError."""
    channel = await transport.open(peer_id, maddrs, MANIFEST_PROTOCOL)
    try:
        async with deadline(channel.timeouts.discover_s):
            await channel.send(AskManifest())
            return await channel.receive_blob(MAX_MANIFEST_BYTES, channel.timeouts.request_s)
    except asyncio.TimeoutError:
        raise Silent(peer_id, "takes too long to send its manifest") from None
    finally:
        channel.close()
