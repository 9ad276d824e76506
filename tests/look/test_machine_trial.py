from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from p2p_diloco.core.errors import UsageError
from p2p_diloco.core.manifest import RunManifest
from p2p_diloco.core.runfile import ModelSpec
from p2p_diloco.learn.architecture import resolve_config
from p2p_diloco.learn.model import build_model
from p2p_diloco.learn.parameters import layout_of
from p2p_diloco.learn.source import builtin_fingerprint
from p2p_diloco.look import machine_trial
from p2p_diloco.look.machine_findings import MachineTrial
from p2p_diloco.look.machine_trial import STEPS, free_memory_bytes, main, try_machine

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture
def manifest() -> RunManifest:
    from tests.look.test_network_findings import manifest_of

    config = resolve_config(ModelSpec(config=CONFIG), base=Path(), vocab_size=256)
    spec = manifest_of().spec
    spec = spec.model_copy(update={"data": spec.data.model_copy(update={"seq_len": 32})})
    layout = layout_of(build_model(config, seed=None))
    return manifest_of(
        spec=spec,
        model_config_json=json.dumps(config),
        n_params=layout.n,
        layout_digest=layout.digest,
        data_fingerprint="f" * 64,
    )


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for line in capsys.readouterr().out.splitlines():
        facts |= json.loads(line)
    return facts


def test_a_trial_tells_all_about_the_machine(
    manifest: RunManifest, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p2p_diloco.learn.source.builtin_fingerprint", lambda: "e" * 64)
    threads = torch.get_num_threads()
    main("cpu", 1, manifest)
    torch.set_num_threads(threads)
    found = MachineTrial(**told(capsys))
    assert found.device.startswith("cpu, 1 of ")
    assert (found.on_cpu, found.fingerprint, found.trouble) == (True, "e" * 64, "")
    assert found.torch == torch.__version__
    assert found.flops > 1e6
    assert found.free_bytes is None or found.free_bytes > 1e6
    assert len(found.step_s) == STEPS
    assert min(found.step_s) > 0


def test_without_memory_nothing_is_tried(
    manifest: RunManifest, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_trial, "free_memory_bytes", lambda: 1000)
    manifest = manifest.model_copy(update={"data_fingerprint": ""})
    main("cpu", 1, manifest)
    facts = told(capsys)
    assert facts["free_bytes"] == 1000
    assert not {"step_s", "trouble"} & set(facts)


def test_a_model_larger_than_the_manifest_says_is_not_built(manifest: RunManifest) -> None:
    config = {**manifest.transformers_config, "vocab_size": 10**12}
    with pytest.raises(UsageError, match="with other parameters than the run's"):
        machine_trial.time_steps(
            manifest.model_copy(update={"model_config_json": json.dumps(config)}), torch.device("cpu")
        )


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(UsageError, match="'cuda:9' is not available"):
        main("cuda:9", 0, None)


def test_a_device_that_computes_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: a + b)
    with pytest.raises(RuntimeError, match="computes wrongly"):
        machine_trial.matrix_flops(torch.device("cpu"))


def test_the_fingerprint_is_the_corpus_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from p2p_diloco.core.runfile import DataSpec
    from p2p_diloco.learn import data, source

    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i}.py").write_text(f"# file {i}\n" * 50)
    files = tmp_path / "text", sorted((tmp_path / "text").iterdir())
    monkeypatch.setattr(source, "builtin_files", lambda: files)
    corpus = data.open_corpus(DataSpec(seq_len=8, held_out=0.2), base=tmp_path, cache=tmp_path / "cache")
    assert builtin_fingerprint() == corpus.fingerprint != ""


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [("max", "5000", 8_192_000), ("3000", "1000", 2000), ("1000", "3000", 0), ("x", "y", 8_192_000)],
)
def test_a_containers_limit_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, used: str, expected: int
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 16000 kB\nMemAvailable:    8000 kB\n")
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{used}\n")
    monkeypatch.setattr(machine_trial, "CGROUP", tmp_path)
    monkeypatch.setattr(machine_trial, "MEMINFO", tmp_path / "meminfo")
    assert free_memory_bytes() == expected
    monkeypatch.setattr(machine_trial, "MEMINFO", tmp_path / "nothing")
    assert free_memory_bytes() is None


# -- in a process of its own -------------------------------------------------------------------------------------------


def test_a_trial_that_fails_says_why() -> None:
    found = asyncio.run(try_machine("cuda:9", None, b"", limit_s=120.0))
    assert "device 'cuda:9' is not available on this machine" in found.trouble
    unsound = asyncio.run(try_machine("cpu", None, b"{}", limit_s=120.0))
    assert unsound.trouble == "the run: not a signed manifest"


def instead_of_python(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    program = folder / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


def test_a_trial_ends_in_time_and_is_not_left_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told = json.dumps({"device": "cpu", "step_s": [30.0]})
    instead_of_python(monkeypatch, tmp_path, f"echo $$ > {tmp_path}/pid; echo '{told}'; exec sleep 600")

    async def main() -> None:
        started_s = time.monotonic()
        found = await try_machine("cpu", None, b"", limit_s=2.0)
        assert found == MachineTrial(device="cpu", step_s=(30.0,))
        assert time.monotonic() - started_s < 60
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "pid").read_text()), 0)

    asyncio.run(main())


def test_a_trial_that_is_killed_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    instead_of_python(monkeypatch, tmp_path, """echo '{"device": "cpu"}'; kill -9 $$""")
    found = asyncio.run(try_machine("cpu", None, b"", limit_s=60.0))
    assert found.device == "cpu"
    assert found.trouble == "the trial broke off (killed, most likely because memory ran out)"
