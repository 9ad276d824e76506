"""A trial of this machine: ``python -m p2p_diloco.look.machine_trial DEVICE THREADS [MANIFEST]``, in a process of its
own, so that a device that hangs, or memory that runs out, ends nothing else.

Prints one JSON object a line, each with some fields of ``machine_findings.MachineTrial``, as soon as they are known:
whoever started it reads as far as it came.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from p2p_diloco.core.errors import LocalError
from p2p_diloco.core.interpreter import python_command
from p2p_diloco.core.manifest import RunManifest, open_manifest
from p2p_diloco.core.waiting import deadline
from p2p_diloco.learn.hub import library_is_missing
from p2p_diloco.look.machine_findings import MachineTrial, memory_needs
from p2p_diloco.wire.guard import die_with_parent

STEPS = 4
"""Timed, the first one included, which is slower."""
STEPS_S = 25.0
"""No further step is begun after that."""
MATRIX = 1024
RANDOM_TOKENS = 100_000
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


async def try_machine(device: str, threads: int | None, signed: bytes, *, limit_s: float) -> MachineTrial:
    """Returns what the trial finds out within ``limit_s``. ``signed``: the run's manifest, or empty: then without its
    model."""
    facts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="p2p-diloco-") as folder:
        arguments = [device, str(threads or 0)]
        if signed:
            path = Path(folder) / "manifest.json"
            path.write_bytes(signed)
            arguments.append(str(path))
        starting = asyncio.create_task(
            asyncio.create_subprocess_exec(
                *python_command("-m", "p2p_diloco.look.machine_trial", *arguments),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
            )
        )
        try:
            process = await asyncio.shield(starting)
        except asyncio.CancelledError:
            await end(await starting)  # asyncio, cancelled in the midst of it, loses the process's pipe
            raise
        assert process.stdout is not None
        try:
            async with deadline(limit_s):
                while line := await process.stdout.readline():
                    facts |= json.loads(line)
                if await process.wait():
                    facts.setdefault("trouble", f"the trial broke off ({exit_reason(process.returncode)})")
        except asyncio.TimeoutError:
            pass
        finally:
            await end(process)
    return MachineTrial(**facts | {"step_s": tuple(facts.get("step_s", ()))})


async def end(process: asyncio.subprocess.Process) -> None:
    """Kills a process; returns when both it and its pipe have ended: a loop that closes before complains."""
    if process.returncode is None:
        process.kill()
    await process.communicate()


def exit_reason(code: int | None) -> str:
    """Returns why a process ended, in words."""
    return "killed, most likely because memory ran out" if code == -signal.SIGKILL else f"exit code {code}"


def main(device_name: str, threads: int, manifest: RunManifest | None) -> None:
    """Makes the trial in this process, and tells of it. ``threads``: 0 for what a peer takes by itself. Raises
    LocalError."""
    import torch

    from p2p_diloco.learn.model import pick_device
    from p2p_diloco.learn.train import good_threads

    if threads:
        torch.set_num_threads(threads)
    elif manifest is not None:
        torch.set_num_threads(good_threads(manifest.n_params))
    device = pick_device(device_name)
    on_cpu = device.type == "cpu"
    tell(device=name_of(device), on_cpu=on_cpu, torch=torch.__version__, flops=matrix_flops(device))
    free, device_free = free_memory_bytes(), free_device_bytes(device)
    tell(free_bytes=free, device_free_bytes=device_free)
    if manifest is None:
        return
    if manifest.data_fingerprint:
        from p2p_diloco.learn.source import builtin_fingerprint

        tell(fingerprint=builtin_fingerprint())
    if manifest.spec.data.source == "hub":
        tell(has_datasets=not library_is_missing())
    needs = memory_needs(manifest.n_params, on_cpu=on_cpu)
    if any(have is not None and have < need for have, need in zip((free, device_free), needs)):
        return  # what is free has been told
    time_steps(manifest, device)


def tell(**fields: Any) -> None:
    """Prints one line of what is known."""
    print(json.dumps(fields), flush=True)


def name_of(device: Any) -> str:
    """Returns what a device is called."""
    import torch

    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu, {torch.get_num_threads()} of {os.cpu_count()} threads" if device.type == "cpu" else str(device)


def matrix_flops(device: Any) -> float:
    """Returns the operations per second of a product of two square matrices of float32, the second one of two.
    RuntimeError where the device is unfit."""
    import torch

    a = torch.ones(MATRIX, MATRIX, device=device)
    for _ in range(2):
        started_s = time.perf_counter()
        total = (a @ a).sum().item()  # waits for the device
        seconds = time.perf_counter() - started_s
    if total != MATRIX**3:
        raise RuntimeError(f"{device} computes wrongly: {total:g} instead of {MATRIX**3:g}")
    return 2 * MATRIX**3 / seconds


def free_memory_bytes() -> int | None:
    """Returns what programs can still take: of the machine, or of the container that this runs in."""
    try:
        facts = dict(line.split(":", 1) for line in MEMINFO.read_text(encoding="utf-8").splitlines())
        free = int(facts["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        limit, used = ((CGROUP / name).read_text(encoding="utf-8").strip() for name in ("memory.max", "memory.current"))
        return free if limit == "max" else min(free, max(int(limit) - int(used), 0))
    except (OSError, ValueError):
        return free


def free_device_bytes(device: Any) -> int | None:
    """Returns the free memory of an accelerator; None for a CPU."""
    import torch

    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def time_steps(manifest: RunManifest, device: Any) -> None:
    """Tells how long some inner steps of the run's model take, from random parameters, on random tokens."""
    import numpy as np

    from p2p_diloco.learn.data import Corpus
    from p2p_diloco.learn.inner import InnerOptimizer, Place
    from p2p_diloco.learn.model import model_of

    spec = manifest.spec
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, manifest.vocab_size, RANDOM_TOKENS + spec.data.seq_len, dtype=np.uint32)
    corpus = Corpus(train=tokens, held_out=tokens, vocab_size=manifest.vocab_size, fingerprint="")
    inner = InnerOptimizer(model_of(manifest).to(device), spec, device)
    began_s, step_s = time.perf_counter(), list[float]()
    while len(step_s) < STEPS and time.perf_counter() - began_s < STEPS_S:
        started_s = time.perf_counter()
        inner.step(corpus, peer_id="", at=Place(batch_step=len(step_s), schedule_step=0))
        step_s.append(time.perf_counter() - started_s)
        tell(step_s=step_s)


if __name__ == "__main__":
    for ending in (signal.SIGINT, signal.SIGHUP):  # whoever started us ends us
        signal.signal(ending, signal.SIG_IGN)
    die_with_parent(signal.SIGKILL)
    try:
        read = open_manifest(Path(sys.argv[3]).read_bytes(), "the run") if len(sys.argv) > 3 else None
        main(sys.argv[1], int(sys.argv[2]), read)
    except LocalError as error:
        tell(trouble=str(error))
    except Exception as error:  # torch raises what it likes; the last line says what it is about
        tell(trouble=f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}")
