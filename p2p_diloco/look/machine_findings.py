"""What a machine is good for in a run: findings about device, memory, text, disk, and how long an outer step will take.
Pure; ``machine_trial`` measures.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.manifest import RunManifest
from p2p_diloco.core.pace import claimed_steps
from p2p_diloco.core.records import Record
from p2p_diloco.core.update import max_update_bytes
from p2p_diloco.learn.hub import DATA_SET_NAME
from p2p_diloco.ledger.snapshot import snapshot_bytes
from p2p_diloco.look.findings import Finding, Kind, amount, span
from p2p_diloco.look.network_findings import Bandwidth

PROGRAM_BYTES = 800_000_000
"""Of a peer without a model: 420 MB trainer, 300 MB network process, 75 MB p2pd."""
BYTES_PER_PARAMETER = 24
"""In training: theta, momentum, local, gradients, AdamW's two moments, 4 bytes each."""
BYTES_ON_A_DEVICE = 16
"""Per parameter, where training is on an accelerator: local, gradients, moments; 12 stay in the system's memory."""
BYTES_TO_SAVE = 12
"""More, per parameter and at most, while the inner state is being saved beside training: a copy of local, and of one
tensor's two moments at a time, which in a model that is a single tensor are all of them."""


@dataclass(frozen=True, kw_only=True)
class MachineTrial:
    """Says what ``machine_trial`` found out, as far as it came."""

    device: str = ""
    """And what it is called; empty where torch did not come so far."""
    on_cpu: bool = True
    torch: str = ""
    flops: float = 0.0
    """Per second, of a small matrix product in float32."""
    free_bytes: int | None = None
    """Of memory; None where the system does not say."""
    device_free_bytes: int | None = None
    fingerprint: str | None = None
    """Of the built-in text here, where the run uses it."""
    has_datasets: bool | None = None
    """Whether that library is installed here, where the run needs it."""
    step_s: tuple[float, ...] = ()
    """Inner steps of the run's model; the first one is slower."""
    trouble: str = ""
    """What ended the trial early."""

    @property
    def inner_step_s(self) -> float | None:
        """Returns the seconds of an inner step; None where none was timed."""
        return statistics.median(self.step_s[1:] or self.step_s) if self.step_s else None


def device_finding(trial: MachineTrial) -> Finding:
    """Returns the finding about the device."""
    if not trial.device:
        measured, _, remedy = (trial.trouble or "torch does not start").partition("; ")
        return Finding(kind="problem", what="device", measured=measured, remedy=remedy or "install torch again")
    measured = f"{trial.device}, torch {trial.torch}: {amount(trial.flops, 'FLOP')}/s in a small matrix product"
    return Finding(kind="ok", what="device", measured=measured)


def memory_needs(n: int, *, on_cpu: bool) -> tuple[int, int]:
    """Returns the bytes that training ``n`` parameters takes at least: (of the system's memory, of the device's)."""
    if on_cpu:
        return PROGRAM_BYTES + BYTES_PER_PARAMETER * n, 0
    return PROGRAM_BYTES + 12 * n, BYTES_ON_A_DEVICE * n


def memory_finding(trial: MachineTrial, n: int) -> Finding:
    """Returns the finding about memory, for a model of ``n`` parameters."""
    need, device_need = memory_needs(n, on_cpu=trial.on_cpu)
    pools = [("memory", trial.free_bytes, need, BYTES_TO_SAVE * n)]
    if not trial.on_cpu:
        pools.append(("device memory", trial.device_free_bytes, device_need, 0))
    parts = []
    for name, free, least, to_save in pools:
        if free is None:
            continue
        parts.append(f"{amount(free)} of {name} free, {amount(least)} needed")
        if free < least:
            remedy = f"close other programs, or take a machine with {amount(least)} of {name} free"
            return Finding(kind="problem", what="memory", measured=parts[-1], remedy=remedy)
        if free < least + to_save:
            remedy = f"{amount(to_save)} more are used while the state is saved: close other programs"
            return Finding(kind="warning", what="memory", measured=parts[-1], remedy=remedy)
    return Finding(kind="ok", what="memory", measured=", ".join(parts) or "this system does not say what is free")


def text_finding(manifest: RunManifest, trial: MachineTrial, own_data: str) -> Finding:
    """Returns the finding about what there is to train on. ``own_data``: what ``--data`` names; empty without."""
    if own_data:
        return Finding(kind="ok", what="text", measured=f"your own, {own_data}")
    data = manifest.spec.data
    if data.source == "hub" and DATA_SET_NAME.fullmatch(str(data.path)):
        measured = f"a part of the data set {data.path}, which peer downloads"
        if trial.has_datasets is not False:
            return Finding(kind="ok", what="text", measured=measured)
        remedy = "install the datasets library, pip install 'p2p-diloco[hf]', or start peer with --data FOLDER"
        return Finding(kind="problem", what="text", measured=f"{measured} by the datasets library", remedy=remedy)
    if not manifest.data_fingerprint:
        remedy = "start peer with --data FILE-OR-FOLDER"
        return Finding(kind="warning", what="text", measured="every peer of this run brings its own", remedy=remedy)
    if trial.fingerprint == manifest.data_fingerprint:
        return Finding(kind="ok", what="text", measured=f"that of torch {trial.torch}, as the run's")
    if trial.fingerprint is None:
        measured, remedy = "not known, the trial has not come so far", "see device"
        return Finding(kind="warning", what="text", measured=measured, remedy=remedy)
    return Finding(
        kind="problem",
        what="text",
        measured=f"the built-in text of torch {trial.torch} is not the one that this run uses",
        remedy="install the version of torch that the run's owner has (any build of it)",
    )


def disk_needs(manifest: RunManifest) -> int:
    """Returns the bytes that a peer's folder takes at most: the two snapshots kept and one being written, all updates
    since the older one, and AdamW's state twice, while a new one replaces it."""
    n, spec = manifest.n_params, manifest.spec
    updates = 2 * min(spec.round.snapshot_every, spec.outer.steps) * max_update_bytes(manifest.grid)
    return 3 * snapshot_bytes(n) + updates + 2 * 12 * n


def disk_finding(manifest: RunManifest, folder: Path, *, free: int, held: int, writable: bool) -> Finding:
    """Returns the finding about the peer's folder. ``held``: what this run takes there already."""
    needed = disk_needs(manifest)
    if not writable:
        return Finding(
            kind="problem", what="disk", measured=f"{folder}: cannot be written", remedy="choose another --folder"
        )
    measured = f"{amount(free)} free in {folder}, the ledger takes up to {amount(needed)}"
    if held:
        measured += f", {amount(held)} of it already"
    if free >= needed - held:
        return Finding(kind="ok", what="disk", measured=measured)
    remedy = f"free {amount(needed - held - free)}, or choose another --folder"
    return Finding(kind="problem", what="disk", measured=measured, remedy=remedy)


def exchange_bytes(n_bytes: int, group: int, *, client_mode: bool) -> float:
    """Returns the bytes that one member of ``group`` sends in a round, and receives as many. ``n_bytes``: of an encoded
    outer gradient. The others' parts of mine and mine of theirs; in client mode all of mine, and all of the mean."""
    return float(n_bytes) if client_mode else 2 * n_bytes * (group - 1) / group


def outer_step_finding(
    manifest: RunManifest,
    trial: MachineTrial,
    records: Collection[Record],
    bandwidth: Bandwidth | None,
    *,
    client_mode: bool,
    timeouts: Timeouts,
) -> Finding:
    """Returns the finding about the time of an outer step here: the inner steps that this peer will plan, and the
    exchange."""
    spec, step_s = manifest.spec, trial.inner_step_s
    if step_s is None or trial.trouble:
        measured, _, remedy = (trial.trouble or "not known, no inner step was timed").partition("; ")
        kind: Kind = "problem" if trial.trouble else "warning"
        return Finding(kind=kind, what="outer step", measured=measured, remedy=remedy or "see device and memory")
    speeds = [record.tokens_per_s for record in records if record.role == "trainer"]
    steps = claimed_steps(spec.inner.steps, spec.tokens_per_inner_step / step_s, speeds)
    inner_s = steps * step_s
    measured = f"{steps} inner steps of {span(step_s)}"
    if steps < spec.inner.steps:
        measured += f" ({spec.inner.steps} at the fastest peer)"
    if bandwidth is None:
        measured = f"about {span(inner_s)}, and the exchange: {measured}"
        return Finding(kind="ok", what="outer step", measured=measured)
    n_bytes = manifest.grid.vector_bytes
    group = min(max(len(speeds) + 1, spec.round.min_group, 2), spec.round.max_group)
    each_way = exchange_bytes(n_bytes, group, client_mode=client_mode)
    exchange_s = each_way / min(bandwidth.up_bytes_per_s, bandwidth.down_bytes_per_s)
    measured = (
        f"about {span(inner_s + exchange_s)}: {measured}, then {span(exchange_s)} for {amount(each_way)} each way "
        f"in a group of {group}"
    )
    limit_s = timeouts.round_limit_s(2 * n_bytes)
    if exchange_s > limit_s:
        remedy = f"rounds end after {span(limit_s)}: this connection is too slow for this run"
        return Finding(kind="problem", what="outer step", measured=measured, remedy=remedy)
    if exchange_s > inner_s:
        remedy = "most of it is the exchange: a faster connection, or a run with more inner steps, suits better"
        return Finding(kind="warning", what="outer step", measured=measured, remedy=remedy)
    return Finding(kind="ok", what="outer step", measured=measured)
