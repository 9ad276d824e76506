from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from p2p_diloco.core.codecs import encoded_bytes
from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.manifest import RunManifest
from p2p_diloco.core.records import Record
from p2p_diloco.core.runfile import DataSpec, RunSpec
from p2p_diloco.look.findings import Kind
from p2p_diloco.look.machine_findings import (
    MachineTrial,
    device_finding,
    disk_finding,
    disk_needs,
    exchange_bytes,
    memory_finding,
    outer_step_finding,
    text_finding,
)
from p2p_diloco.look.network_findings import Bandwidth
from tests.look.test_findings import check
from tests.look.test_network_findings import manifest_of
from tests.support.builders import identity, record_of

N = 100_000_000
GB = 10**9
CPU = MachineTrial(
    device="cpu, 8 of 8 threads", torch="2.13.0", flops=1e11, free_bytes=16 * GB, step_s=(9.0, 2.0, 1.0, 3.0)
)
CUDA = replace(CPU, device="cuda:0 (H200)", on_cpu=False, device_free_bytes=100 * GB)
FAST = Bandwidth(peer="x", round_trip_s=0.01, up_bytes_per_s=1e7, down_bytes_per_s=2e7)


def run(**outer: Any) -> RunManifest:
    spec = {
        "name": "big",
        "model": {"config": {"model_type": "llama"}},
        "inner": {"steps": 100, "batch_size": 1},
        "outer": {"steps": 10, "codec": "int8", **outer},
    }
    return manifest_of(spec=RunSpec.model_validate(spec), n_params=N)


# -- device, memory, text, disk ----------------------------------------------------------------------------------------


def test_device() -> None:
    check(device_finding(CPU), "ok", "cpu, 8 of 8 threads, torch 2.13.0: 100 GFLOP/s in a small matrix product", "")
    missing = MachineTrial(trouble="device 'cuda' is not available on this machine; it has: cpu")
    check(
        device_finding(missing),
        "problem",
        "device 'cuda' is not available on this machine",
        "it has: cpu",
    )
    check(device_finding(MachineTrial()), "problem", "torch does not start", "install torch again")


@pytest.mark.parametrize(
    ("trial", "kind", "measured", "remedy"),
    [
        (CPU, "ok", "16 GB of memory free, 3.2 GB needed", ""),
        (replace(CPU, free_bytes=4 * GB), "warning", "4 GB of memory free", "1.2 GB more are used while"),
        (
            replace(CPU, free_bytes=3 * GB),
            "problem",
            "3 GB of memory free, 3.2 GB needed",
            "with 3.2 GB of memory free",
        ),
        (replace(CPU, free_bytes=None), "ok", "this system does not say", ""),
        (CUDA, "ok", "16 GB of memory free, 2 GB needed, 100 GB of device memory free, 1.6 GB needed", ""),
        (replace(CUDA, device_free_bytes=GB), "problem", "1 GB of device memory free, 1.6 GB", "of device memory free"),
        (replace(CUDA, free_bytes=GB), "problem", "1 GB of memory free, 2 GB needed", "close other programs"),
    ],
)
def test_memory(trial: MachineTrial, kind: Kind, measured: str, remedy: str) -> None:
    check(memory_finding(trial, N), kind, measured, remedy)


def test_text() -> None:
    builtin, own = manifest_of(data_fingerprint="f" * 64), manifest_of()
    same, other = replace(CPU, fingerprint="f" * 64), replace(CPU, fingerprint="0" * 64)
    check(text_finding(builtin, same, ""), "ok", "that of torch 2.13.0, as the run's", "")
    check(text_finding(builtin, other, ""), "problem", "not the one that this run uses", "install the version of torch")
    check(text_finding(builtin, CPU, ""), "warning", "not known", "see device")
    check(text_finding(own, CPU, ""), "warning", "every peer of this run brings its own", "--data FILE-OR-FOLDER")
    check(text_finding(own, CPU, "/books, 7 files"), "ok", "your own, /books, 7 files", "")
    hub = manifest_of(spec=own.spec.model_copy(update={"data": DataSpec(source="hub", path="some/set")}))
    folder = manifest_of(spec=own.spec.model_copy(update={"data": DataSpec(source="hub", path="set")}))
    check(text_finding(folder, CPU, ""), "warning", "every peer of this run brings its own", "--data FILE-OR-FOLDER")
    missing = replace(CPU, has_datasets=False)
    check(text_finding(hub, replace(CPU, has_datasets=True), ""), "ok", "a part of the data set some/set", "")
    check(text_finding(hub, missing, ""), "problem", "by the datasets library", "pip install 'p2p-diloco[hf]'")
    check(text_finding(hub, missing, "/books"), "ok", "your own, /books", "")


def test_disk() -> None:
    needed = disk_needs(run())
    # Three snapshots, 20 updates, AdamW's state twice.
    assert needed == pytest.approx(3 * 8 * N + 20 * encoded_bytes(N, "int8") + 2 * 12 * N, rel=1e-3)
    folder = Path("/data")

    def finding(free: int, held: int = 0, writable: bool = True) -> Any:
        return disk_finding(run(), folder, free=free, held=held, writable=writable)

    check(finding(needed), "ok", "free in /data, the ledger takes up to 6.", "")
    check(finding(needed - 1), "problem", "free in /data", "free 1 B, or choose another --folder")
    check(finding(needed - GB, GB), "ok", "1 GB of it already", "")
    check(finding(10 * needed, writable=False), "problem", "/data: cannot be written", "choose another --folder")


# -- how long an outer step takes --------------------------------------------------------------------------------------


def others(count: int, tokens_per_s: float = 0.0) -> list[Record]:
    return [record_of(identity(i + 1), "", tokens_per_s=tokens_per_s) for i in range(count)]


def expect(trial: MachineTrial, records: list[Record], bandwidth: Bandwidth | None, **how: Any) -> Any:
    options: dict[str, Any] = {"client_mode": False, "timeouts": Timeouts()}
    return outer_step_finding(run(), trial, records, bandwidth, **options | how)


def test_an_outer_step_is_inner_steps_and_the_exchange() -> None:
    """The first inner step does not count, the slower direction does: 2 s 100 times, then 152 MB at 10 MB/s."""
    finding = expect(CPU, others(3), FAST)
    check(finding, "ok", "about 4 min: 100 inner steps of 2.0 s, then 15.2 s for 152 MB each way in a group of 4", "")
    n_bytes = encoded_bytes(N, "int8")
    assert exchange_bytes(n_bytes, 4, client_mode=False) == 1.5 * n_bytes
    assert exchange_bytes(n_bytes, 2, client_mode=False) == n_bytes


def test_in_client_mode_a_peer_sends_all_and_receives_all() -> None:
    check(expect(CPU, others(3), FAST, client_mode=True), "ok", "10.2 s for 102 MB each way in a group of 4", "")


def test_a_slow_machine_plans_fewer_inner_steps() -> None:
    mine = 256 / 2.0  # tokens per second
    finding = expect(CPU, others(3, tokens_per_s=2 * mine), FAST)
    check(finding, "ok", "50 inner steps of 2.0 s (100 at the fastest peer)", "")


@pytest.mark.parametrize(
    ("bytes_per_s", "kind", "remedy"),
    [(1e6, "ok", ""), (5e5, "warning", "most of it is the exchange"), (1e4, "problem", "this connection is too slow")],
)
def test_a_slow_connection(bytes_per_s: float, kind: Kind, remedy: str) -> None:
    slow = replace(FAST, up_bytes_per_s=bytes_per_s)
    check(expect(CPU, others(3), slow), kind, "for 152 MB each way", remedy)


def test_without_bandwidth_or_inner_steps_it_says_so() -> None:
    check(expect(CPU, others(1), None), "ok", "about 3 min, and the exchange: 100 inner steps of 2.0 s", "")
    untimed = replace(CPU, step_s=())
    check(expect(untimed, others(1), FAST), "warning", "no inner step was timed", "see device and memory")
    broken = replace(CPU, trouble="the trial broke off (exit code 1)")
    check(expect(broken, others(1), FAST), "problem", "the trial broke off (exit code 1)", "see device and memory")


def test_the_only_inner_step_that_ended_counts() -> None:
    check(expect(replace(CPU, step_s=(4.0,)), others(1), None), "ok", "100 inner steps of 4.0 s", "")
