"""``p2p-diloco doctor``, top to bottom: measure, say what it means, go on. Nothing is left behind, however it ends.

addresses    resolved, dialled, and asked for the manifest, without any DHT
clock        before the DHT, from which a clock that is wrong shuts one out
run          announced in the DHT; the records of its peers, read as an observer
connection   bandwidth with a peer that is willing; peers are asked to dial us
machine      ``machine_trial`` in a process of its own
"""

from __future__ import annotations

import asyncio
import os
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from p2p_diloco.core.addresses import can_be_dialled
from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.errors import DataError, LocalError, UsageError
from p2p_diloco.core.listening import parse_host_maddr
from p2p_diloco.core.manifest import RunManifest, open_manifest
from p2p_diloco.core.records import Record, peers_key
from p2p_diloco.core.waiting import deadline
from p2p_diloco.learn.textfiles import text_files
from p2p_diloco.ledger.folder import folder_bytes, run_folder
from p2p_diloco.look.findings import Checklist, error_finding, late_finding
from p2p_diloco.look.machine_findings import (
    MachineTrial,
    device_finding,
    disk_finding,
    memory_finding,
    outer_step_finding,
    text_finding,
)
from p2p_diloco.look.machine_trial import try_machine
from p2p_diloco.look.network_findings import (
    AddressTrial,
    Bandwidth,
    Home,
    address_finding,
    bandwidth_finding,
    client_mode_finding,
    clock_finding,
    reachable_finding,
    run_finding,
    untried_family,
)
from p2p_diloco.look.network_trial import (
    Candidate,
    by_family,
    clock_offsets,
    dial_backs,
    listening,
    measure_bandwidth,
    try_address,
    would_relay,
)
from p2p_diloco.look.request import Request
from p2p_diloco.look.status import directory_of, observer
from p2p_diloco.look.ways_in import USUAL_PORT
from p2p_diloco.wire.channel import Transport, run_protocol
from p2p_diloco.wire.discovery import find_manifest

NETWORK_S = 50.0
TRIAL_S = 50.0
"""Both together, and the time to tidy up, stay below two minutes."""
DISCOVER_S = 6.0
"""How long a run is looked for: a peer has more patience, a person has less."""
CLOCKS = 3
"""Peers whose time is asked for."""


@dataclass(kw_only=True)
class Checkup:
    """Goes through all that can be checked, and adds a finding to the checklist for each."""

    request: Request
    checklist: Checklist
    timeouts: Timeouts
    signed: bytes = b""
    """The run's manifest as it travels; empty until the run is found."""
    manifest: RunManifest | None = None
    records: Sequence[Record] = ()
    """Of the run's live peers."""
    behind_s: float | None = None
    """By which this clock is behind the peers'; None until one has told its time."""
    bandwidth: Bandwidth | None = None

    async def go(self) -> None:
        """Checks the network, for at most ``NETWORK_S``, then this machine. Whatever fails is a finding."""
        try:
            async with deadline(NETWORK_S):
                await self._network()
        except asyncio.TimeoutError:
            self.checklist.add(late_finding(self.checklist.measuring, NETWORK_S))
        except LocalError as error:
            self.checklist.add(error_finding("network", error))
        await self._machine()

    # -- the network ---------------------------------------------------------------------------------------------------

    async def _network(self) -> None:
        checklist = self.checklist
        checklist.measure("starting a node")
        async with observer((), self.timeouts) as node:
            checklist.measure("dialling the addresses")
            trials = await asyncio.gather(*(try_address(node, maddr) for maddr in self.request.initial_peers))
            answering = [trial for trial in trials if not trial.trouble]
            for trial in answering:
                checklist.add(address_finding(trial, others_answer=True, records=()))
            served = served_runs(answering)
            for run_id, peers in served.items():
                await self._clock(node, run_id, peers)
            if answering:
                await self._find_run(answering)
            for trial in trials:
                if trial.trouble:  # those who answer may have told what is wrong with it
                    checklist.add(address_finding(trial, others_answer=bool(answering), records=self.records))
            if self.manifest is not None:
                run_id = self.manifest.run_id
                await self._connection(node, run_id, candidates_of(served.get(run_id, []), self.records))

    async def _find_run(self, answering: Sequence[AddressTrial]) -> None:
        """Looks for the run as a peer does; with a clock that shuts one out of the DHT, at the addresses alone."""
        self.checklist.measure("looking for the run")
        behind_s, trouble = self.behind_s or 0.0, ""
        if abs(behind_s) > self.timeouts.record_life_s / 2:
            trouble = "this clock hides it; mend the clock first"
        try:
            async with observer([] if trouble else [trial.maddr for trial in answering], self.timeouts) as dht:
                signed = await find_manifest(
                    dht,
                    run_id=self.request.run_id,
                    initial_peers=[(trial.peer_id, trial.maddr) for trial in answering],
                    timeouts=replace(self.timeouts, discover_s=DISCOVER_S),
                    wall_s=lambda: time.time() + behind_s,
                )
                manifest = open_manifest(signed, "the run")
                sealed = await dht.look_up(peers_key(manifest.run_id))
        except LocalError as error:
            self.checklist.add(error_finding("run", error))
            return
        self.signed, self.manifest = signed, manifest
        swarm_s = time.time() + behind_s
        self.records = directory_of(manifest, sealed, "", swarm_s).live(swarm_s)
        client_mode = self.request.client_mode
        self.checklist.add(run_finding(manifest, self.records, client_mode=client_mode, trouble=trouble))

    async def _clock(self, node: Transport, run_id: str, peers: Sequence[Candidate]) -> None:
        """Compares this clock with those of the first peers that tell their time."""
        if self.behind_s is not None:
            return
        self.checklist.measure("comparing clocks")
        offsets_s = await clock_offsets(node, peers[:CLOCKS], run_protocol(run_id), time.time)
        if offsets_s:
            self.behind_s = statistics.median(offsets_s)
            self.checklist.add(clock_finding(offsets_s, self.timeouts))

    async def _connection(self, node: Transport, run_id: str, candidates: Sequence[Candidate]) -> None:
        """Finds out the bandwidth, and whether others reach us."""
        protocol, request = run_protocol(run_id), self.request
        await self._clock(node, run_id, candidates)
        if self.behind_s is None:
            self.checklist.add(clock_finding([], self.timeouts))
        self.checklist.measure("measuring bandwidth")
        self.bandwidth, reason = await measure_bandwidth(node, candidates, protocol)
        self.checklist.add(bandwidth_finding(self.bandwidth, reason))
        if request.client_mode:
            self.checklist.add(client_mode_finding())
            return
        self.checklist.measure("asking a peer to dial back")
        try:
            async with listening(request.host_maddrs, request.announce_maddrs, self.timeouts) as listener:
                dialled, ports, reason = await dial_backs(node, listener, candidates, protocol)
                own = await listener.maddrs()
                if (family := untried_family(dialled, own)) is not None:
                    async with observer((), self.timeouts) as other:
                        of_family = by_family(candidates, family)
                        more, ports, reason = await dial_backs(other, listener, of_family, protocol)
                    dialled += more
        except LocalError as error:
            self.checklist.add(error_finding("reachable", error))
            return
        home = Home(
            own=tuple(own),
            ports=tuple(ports),
            fixed_port=fixed_port(request.host_maddrs),
            counts=can_be_dialled(own, request.initial_peers),
            relayed=not any(one.reached for one in dialled) and await would_relay(node, candidates),
            public_swarm=any(candidate.publicness == 0 for candidate in candidates),
        )
        self.checklist.add(reachable_finding(dialled, home, reason=reason))

    # -- the machine ---------------------------------------------------------------------------------------------------

    async def _machine(self) -> None:
        request, add, manifest = self.request, self.checklist.add, self.manifest
        self.checklist.measure("trying the device" if manifest is None else "timing inner steps of the run's model")
        trial = await try_machine(request.device, request.threads, self.signed, limit_s=TRIAL_S)
        add(device_finding(trial))
        if manifest is None:
            return
        self._disk(manifest)
        if not trial.device:
            return
        add(memory_finding(trial, manifest.n_params))
        self._text(manifest, trial)
        finding = outer_step_finding(
            manifest,
            trial,
            self.records,
            self.bandwidth,
            client_mode=request.client_mode,
            timeouts=self.timeouts,
        )
        add(finding)

    def _text(self, manifest: RunManifest, trial: MachineTrial) -> None:
        data = self.request.data
        try:
            if data is None or (manifest.spec.data.source == "hub" and data.is_dir()):
                own = str(data or "")
            else:
                own = f"{data}, {len(text_files(data).files)} files"
        except (DataError, OSError) as error:
            problem = error if isinstance(error, DataError) else DataError(f"{data}: cannot be read ({error.strerror})")
            self.checklist.add(error_finding("text", problem))
        else:
            self.checklist.add(text_finding(manifest, trial, own))

    def _disk(self, manifest: RunManifest) -> None:
        folder = self.request.folder
        held = folder_bytes(run_folder(folder, manifest))
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        writable = there.is_dir() and os.access(there, os.W_OK)
        free = shutil.disk_usage(there).free
        self.checklist.add(disk_finding(manifest, folder, free=free, held=held, writable=writable))


# -- small things ------------------------------------------------------------------------------------------------------


def served_runs(trials: Sequence[AddressTrial]) -> dict[str, list[Candidate]]:
    """Returns run id -> who serves its manifest, of the sound ones: what is wrong with others is said when the run is
    found."""
    runs: dict[str, list[Candidate]] = {}
    for trial in trials:
        peer = Candidate(peer_id=trial.peer_id, maddrs=(trial.maddr,))
        try:
            run_id = open_manifest(trial.signed, peer.label).run_id
        except UsageError:
            continue
        runs.setdefault(run_id, []).append(peer)
    return runs


def candidates_of(peers: Sequence[Candidate], records: Sequence[Record]) -> list[Candidate]:
    """Returns whom to ask: seeds first, for they are in no round; then those whose address the user gave; nobody whom
    one cannot dial. Addresses that the user gave come before those of the peer's record."""
    known: dict[str, dict[str, None]] = {}
    for peer in peers:
        known.setdefault(peer.peer_id, {}).update(dict.fromkeys(peer.maddrs))
    dialled = [record for record in records if record.maddrs and not record.client_mode]
    for record in dialled:
        known.setdefault(record.peer_id, {}).update(dict.fromkeys(record.maddrs))
    seeds = {record.peer_id for record in dialled if record.role == "seed"}
    candidates = (Candidate(peer_id=peer_id, maddrs=tuple(maddrs)) for peer_id, maddrs in known.items())
    return sorted(candidates, key=lambda candidate: candidate.peer_id not in seeds)


def fixed_port(host_maddrs: Sequence[str]) -> int:
    """Returns the port that the user has chosen, or ours to propose: one that the system chose is another one next
    time."""
    chosen = (int(parse_host_maddr(maddr)[3]) for maddr in host_maddrs)
    return next((port for port in chosen if port), USUAL_PORT)
