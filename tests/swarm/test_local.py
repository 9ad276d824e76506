"""Whole swarms of real processes on this machine, started with the command that a user types."""

from __future__ import annotations

import getpass
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from p2p_diloco.data import open_corpus
from p2p_diloco.errors import UsageError
from p2p_diloco.local import run_local
from p2p_diloco.manifest import RunSpec
from p2p_diloco.model import evaluate
from p2p_diloco.sample import load_export
from p2p_diloco.stored import find_run, load_state

RUN = """
name = "test"
[model.config]
model_type = "llama"
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 1
num_attention_heads = 2
max_position_embeddings = 32
[data]
source = "path"
path = "text"
seq_len = 32
held_out = 0.2
eval_tokens = 2048
[inner]
steps = 10
batch_size = 4
lr = 3e-3
warmup_steps = 2
[outer]
steps = {outer_steps}
lr = 1.0
momentum = 0.0
[round]
min_group = {min_group}
gather_s = 20.0
snapshot_every = 2
"""
START_S = 150.0
"""For seed and peers to start, on a machine that does other things, too; by itself, one of two cores does it in 15."""
TORCHS = f"torchinductor_{getpass.getuser()}"
"""The folder that torch makes in the temporary folder for whatever it compiles, and leaves there, empty."""


@pytest.fixture
def scratch() -> Iterator[Path]:
    """TMPDIR of the swarm and of nobody else, with a short name: sockets live below."""
    path = Path(tempfile.mkdtemp(prefix="swarm-"))
    yield path
    shutil.rmtree(path)


class Command:
    """``p2p-diloco swarm``, and everything that comes from it: its descendants have TMPDIR in their environment."""

    def __init__(self, scratch: Path, *, peers: int, outer_steps: int, min_group: int) -> None:
        (scratch / "tmp").mkdir()
        (scratch / "text").mkdir()
        words, generator = [f"word{i} " for i in range(50)], random.Random(0)
        for i in range(20):
            (scratch / "text" / f"{i}.txt").write_text("".join(generator.choices(words, k=500)))
        self.run_file = scratch / "run.toml"
        self.run_file.write_text(RUN.format(outer_steps=outer_steps, min_group=min_group))
        self.folder, self.temporary = scratch / "out", scratch / "tmp"
        environment = os.environ | {"TMPDIR": str(self.temporary), "XDG_CACHE_HOME": str(scratch / "cache")}
        arguments = ["swarm", str(self.run_file), "--peers", str(peers), "--folder", str(self.folder)]
        self.output = (scratch / "output").open("w+b")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "p2p_diloco", *arguments],
            stdin=subprocess.DEVNULL, stdout=self.output, stderr=subprocess.STDOUT, env=environment,
        )  # fmt: skip

    @property
    def text(self) -> str:
        return Path(self.output.name).read_text()

    @property
    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
        return summary

    def alive(self) -> list[int]:
        """Every process of this swarm, except zombies, which have no environment."""
        mark, found = f"TMPDIR={self.temporary}\0".encode(), []
        for entry in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in entry.read_bytes():
                    found.append(int(entry.parent.name))
            except OSError:
                continue
        return found

    def main_process_of(self, name: str) -> int | None:
        for pid in self.alive():
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"-m" in arguments and str(self.folder / name).encode() in arguments:
                return pid
        return None

    def wait_until(self, condition: Callable[[], Any]) -> Any:
        """While it runs."""
        deadline_s = time.monotonic() + START_S
        while not (value := condition()):
            assert self.process.poll() is None, self.text
            assert time.monotonic() < deadline_s, self.text
            time.sleep(0.05)
        return value

    def assert_nothing_left(self) -> None:
        assert self.alive() == []
        assert [path for path in self.temporary.iterdir() if path.name != TORCHS] == []
        assert [path for path in self.folder.rglob("*") if path.is_socket()] == []


@pytest.fixture
def start(scratch: Path) -> Iterator[Callable[..., Command]]:
    started: list[Command] = []

    def start_one(*, peers: int, outer_steps: int, min_group: int = 2) -> Command:
        started.append(Command(scratch, peers=peers, outer_steps=outer_steps, min_group=min_group))
        return started[-1]

    yield start_one
    for command in started:
        for pid in command.alive():
            os.kill(pid, signal.SIGKILL)
        command.process.wait()
        command.output.close()


def test_three_peers_end_with_one_model(start: Callable[..., Command]) -> None:
    command = start(peers=3, outer_steps=3, min_group=3)
    assert command.process.wait(2 * START_S) == 0, command.text
    command.assert_nothing_left()

    names = ["peer-1", "peer-2", "peer-3"]
    summary = command.summary
    assert summary["exit_codes"] == dict.fromkeys(["seed", *names], 0)
    assert (summary["run_name"], summary["outer_steps"], summary["identical"]) == ("test", 3, True)
    assert len(set(summary["peers"].values())) == 3
    assert [list(summary["heads"][name]) for name in names] == 3 * [["0", "1", "2", "3"]]
    assert summary["group"] == {"1": 3, "2": 3, "3": 3}
    assert summary["guests"] == {}
    assert [step for step, _ in summary["held_out"]] == [0, 1, 2, 3]
    first, last = summary["held_out"][0][1], summary["held_out"][-1][1]
    assert last < first - 0.5
    assert summary["tokens_per_s"]["total"] == pytest.approx(sum(summary["tokens_per_s"]["peers"].values()))
    for name in names:
        assert set(summary["stalled_s"]["peers"][name]) >= {"1", "2", "3"}
        assert all(summary[way][name][step] > 0 for way in ("bytes_sent", "bytes_received") for step in "123")

    states = [load_state(find_run(command.folder / name)) for name in ["seed", *names]]
    assert {manifest.run_id for manifest, _ in states} == {summary["run_id"]}
    assert {(state.step, state.head.hex()) for _, state in states} == {(3, summary["heads"]["peer-1"]["3"])}
    assert len({state.theta.tobytes() for _, state in states}) == 1

    model, _, info = load_export(command.folder / "export")
    assert (info.step, info.run_id) == (3, summary["run_id"])
    spec = RunSpec.load(command.run_file)
    corpus = open_corpus(spec.data, base=command.run_file.parent, cache=command.folder.parent / "cache" / "p2p-diloco")
    batches = corpus.held_out_batches(batch_size=4, seq_len=spec.data.seq_len, max_tokens=spec.data.eval_tokens)
    assert evaluate(model, batches) == pytest.approx(last, abs=1e-4)

    text = command.text
    assert "to join from another terminal: p2p-diloco peer --initial-peers /ip4/127.0.0.1/tcp/" in text
    for step in (1, 2, 3):
        assert f"outer step {step} of 3: held-out loss {summary['held_out'][step][1]:.4f}, group of 3, " in text
    assert f"{first:.4f} -> {last:.4f} nats per token" in text
    assert str(command.folder / "export") in text
    assert "Traceback" not in text


def test_failed_trainer_is_told_and_the_others_go_on(start: Callable[..., Command]) -> None:
    command = start(peers=2, outer_steps=2, min_group=1)
    os.kill(command.wait_until(lambda: command.main_process_of("peer-2")), signal.SIGKILL)
    assert command.process.wait(START_S) == 1, command.text
    assert "peer-2 failed with exit code -9: " in command.text
    assert command.summary["exit_codes"] == {"seed": 0, "peer-1": 0, "peer-2": -9}
    assert command.summary["outer_steps"] == 2
    command.assert_nothing_left()


def test_stopped_while_training(start: Callable[..., Command]) -> None:
    command = start(peers=2, outer_steps=10_000)
    command.wait_until(lambda: "outer step 2 of 10000" in command.text)
    command.process.send_signal(signal.SIGINT)
    assert command.process.wait(12.0) == 0, command.text
    command.assert_nothing_left()
    assert command.summary["exit_codes"] == {"seed": 0, "peer-1": 0, "peer-2": 0}
    assert command.summary["identical"]
    assert not (command.folder / "export").exists()
    assert "Traceback" not in command.text


@pytest.mark.skipif(sys.platform != "linux", reason="children learn of their parent's death on Linux only")
def test_killed_with_its_children(start: Callable[..., Command]) -> None:
    command = start(peers=2, outer_steps=10_000)
    command.wait_until(lambda: command.main_process_of("peer-2"))
    command.process.kill()
    command.process.wait()
    deadline_s = time.monotonic() + 5.0
    while command.alive() and time.monotonic() < deadline_s:
        time.sleep(0.05)
    command.assert_nothing_left()


def test_seed_that_cannot_start_is_told(start: Callable[..., Command]) -> None:
    command = start(peers=2, outer_steps=2)
    shutil.rmtree(command.run_file.parent / "text")
    assert command.process.wait(START_S) == 1
    assert command.text.splitlines()[-1].startswith("error: the seed ended while starting: ")
    assert str(command.run_file.parent / "text") in command.text
    command.assert_nothing_left()


def test_folder_of_another_run_is_left_alone(start: Callable[..., Command]) -> None:
    command = start(peers=2, outer_steps=10_000)
    command.wait_until(lambda: command.main_process_of("peer-1"))
    command.process.send_signal(signal.SIGINT)
    assert command.process.wait(12.0) == 0, command.text
    assert "Traceback" not in command.text
    changed = command.run_file.with_name("changed.toml")
    changed.write_text(command.run_file.read_text().replace("lr = 3e-3", "lr = 2e-3"))
    with pytest.raises(UsageError, match="holds another run"):
        run_local(changed, peers=2, folder=command.folder)
