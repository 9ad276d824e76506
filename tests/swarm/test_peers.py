"""One seed and some peers as real processes, each started with the command that a user types; then things happen."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from p2p_diloco.events import EVENTS_FILE, read_events
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
steps = 40
batch_size = 4
lr = 3e-3
warmup_steps = 2
[outer]
steps = 100000
lr = 1.0
momentum = 0.0
[round]
min_group = 2
gather_s = 2.0
snapshot_every = 500
"""
START_S = 60.0
LEAVE_S = 10.0


class Place:
    """A folder for a swarm; its processes, and nobody else's, have its TMPDIR in their environment."""

    def __init__(self, root: Path) -> None:
        self.root, self.temporary = root, root / "tmp"
        self.programs: list[Program] = []
        self.temporary.mkdir()
        (root / "text").mkdir()
        words, generator = [f"word{i} " for i in range(50)], random.Random(0)
        for i in range(20):
            (root / "text" / f"{i}.txt").write_text("".join(generator.choices(words, k=500)))
        self.run_file = root / "run.toml"
        self.run_file.write_text(RUN)
        self.environment = os.environ | {"TMPDIR": str(self.temporary), "XDG_CACHE_HOME": str(root / "cache")}

    def start(self, name: str, *arguments: str) -> Program:
        self.programs.append(Program(self, name, arguments))
        return self.programs[-1]

    def seed(self, name: str = "seed", run_file: Path | None = None, **flags: str) -> Program:
        flags = {"host-maddrs": "/ip4/127.0.0.1/tcp/0", **flags}
        return self.start(
            name, "seed", str(run_file or self.run_file), "--folder", str(self.root / name), *as_flags(flags)
        )

    def peer(self, name: str, address: str, **flags: str) -> Program:
        flags = {"folder": str(self.root / name), "host-maddrs": "/ip4/127.0.0.1/tcp/0", "name": name, **flags}
        own = {"data": str(self.root / "text"), "threads": "1", "device": "cpu"}
        return self.start(name, "peer", "--initial-peers", address, *as_flags(flags | own))

    def alive(self) -> dict[int, str]:
        """Pid -> command line of every process started from here, except zombies, which have no environment."""
        mark, found = f"TMPDIR={self.temporary}\0".encode(), {}
        for entry in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in entry.read_bytes():
                    found[int(entry.parent.name)] = (
                        (entry.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    )
            except OSError:
                continue
        return found

    def events(self, name: str, kind: str) -> list[dict[str, Any]]:
        paths = list((self.root / name).glob(f"*/{EVENTS_FILE}"))
        return [event for path in paths for event in read_events(path) if event["event"] == kind]

    def step_of(self, name: str) -> int:
        committed = [event["step"] for event in self.events(name, "round") if event["committed"]]
        return max(committed, default=0)


class Program:
    def __init__(self, place: Place, name: str, arguments: tuple[str, ...]) -> None:
        self.place, self.name = place, name
        self.output = place.root / f"{name}.out"
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "p2p_diloco", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=place.environment,
                start_new_session=True,
            )

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")

    @property
    def address(self) -> str:
        """Of the last start."""
        return str(wait_until(lambda: re.findall(r"--initial-peers (\S+)", self.text), self)[-1])

    def of_mine(self, part: str) -> int:
        """Pid of my process whose command line has ``part`` in it."""
        for pid in descendants(self.process.pid):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
            if part in command and "guard.py" not in command:
                return pid
        raise AssertionError(f"no {part} below {self.process.pid}")

    def gone(self, pids: list[int]) -> bool:
        return not any(pid in self.place.alive() for pid in pids)


def as_flags(options: dict[str, str]) -> list[str]:
    return [piece for key, value in options.items() for piece in (f"--{key}", value)]


def descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children] + [deeper for child in children for deeper in descendants(int(child))]


def wait_until(condition: Callable[[], Any], *programs: Program, limit_s: float = START_S) -> Any:
    deadline_s = time.monotonic() + limit_s
    while not (value := condition()):
        assert time.monotonic() < deadline_s, "\n".join(program.text for program in programs)
        time.sleep(0.05)
    return value


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    place = Place(Path(tempfile.mkdtemp(prefix="peers-")))
    yield place
    for pid in place.alive():
        os.kill(pid, signal.SIGKILL)
    for program in place.programs:
        program.process.wait()
    shutil.rmtree(place.root)


@pytest.fixture(scope="module")
def running(place: Place) -> Iterator[dict[str, Program]]:
    """A seed and two peers that train until the module's tests are over; then nothing may be left of them."""
    seed = place.seed()
    programs = {"seed": seed, "a": place.peer("a", seed.address), "b": place.peer("b", seed.address)}
    wait_until(lambda: place.step_of("a") >= 1, *programs.values())
    yield programs
    for program in programs.values():
        program.process.send_signal(signal.SIGINT)
    for program in programs.values():
        assert program.process.wait(LEAVE_S) == 0, program.text
        assert "Traceback" not in program.text
    assert place.alive() == {}
    assert list(place.temporary.iterdir()) == []
    assert [path for path in place.root.rglob("*") if path.is_socket()] == []


def all_stepped(place: Place, names: list[str]) -> bool:
    return all(place.step_of(name) >= 1 for name in names)


def check_heads(place: Place, *names: str) -> None:
    """Whoever committed an outer step has the same head there."""
    heads: dict[int, str] = {}
    for name in names:
        for event in place.events(name, "round"):
            if event["committed"]:
                assert heads.setdefault(event["step"], event["head"]) == event["head"]


def test_a_peer_joins_a_running_swarm_with_the_address_of_any_peer(place: Place, running: dict[str, Program]) -> None:
    newcomer = place.peer("newcomer", running["b"].address)
    wait_until(lambda: place.step_of("newcomer") > 2, newcomer)
    peer_id = place.events("newcomer", "started")[0]["peer_id"]
    joined = place.events("newcomer", "joined")[0]
    assert joined["snapshot"]
    first = place.events("newcomer", "round")[0]
    assert first["committed"]
    before = [event for event in place.events("newcomer", "caught_up") if event["mono_s"] < first["mono_s"]]
    assert first["step"] == before[-1]["to_step"] + 1
    assert len(first["group"]) == 3

    status = subprocess.run(
        [sys.executable, "-m", "p2p_diloco", "status", "--json", "--initial-peers", newcomer.address],
        env=place.environment,
        capture_output=True,
        check=True,
    )
    assert peer_id in {peer["peer_id"] for peer in json.loads(status.stdout)["peers"]}

    newcomer.process.send_signal(signal.SIGTERM)
    assert newcomer.process.wait(LEAVE_S) == 0, newcomer.text
    check_heads(place, "a", "b", "newcomer")
    left = place.events("newcomer", "left")[-1]
    manifest, state = load_state(find_run(place.root / "newcomer"))
    assert (state.step, state.head.hex()) == (left["step"], left["head"])
    _, other = load_state(find_run(place.root / "a"), state.step)
    assert (other.head, other.theta.tobytes()) == (state.head, state.theta.tobytes())
    assert manifest.n_params == len(state.theta)


@pytest.mark.parametrize("victim", ["trainer", "p2p_diloco.network", "p2pd"])
def test_killed_with_9_the_others_go_on_and_a_restart_resumes(
    place: Place, running: dict[str, Program], victim: str
) -> None:
    name = f"victim-{victim}"
    program = place.peer(name, running["seed"].address)
    wait_until(lambda: place.step_of(name) >= 2, program)
    pids = [program.process.pid, *descendants(program.process.pid)]
    os.kill(program.process.pid if victim == "trainer" else program.of_mine(victim), signal.SIGKILL)
    if victim == "p2pd":
        # Started again, and training has gone on meanwhile.
        wait_until(lambda: "starting it again" in program.text, program)
        step = place.step_of("a")
        wait_until(lambda: place.step_of(name) >= step + 2, program)
        program.process.send_signal(signal.SIGINT)
    assert program.process.wait(LEAVE_S) == {"trainer": -9, "p2p_diloco.network": 1, "p2pd": 0}[victim], program.text
    wait_until(lambda: program.gone(pids), program, limit_s=5.0)

    step = place.step_of("a")
    wait_until(lambda: place.step_of("a") >= step + 2, running["a"])
    back = place.peer(name, running["seed"].address)
    wait_until(lambda: place.step_of(name) > step + 2, back)
    joined = place.events(name, "joined")[-1]
    assert joined["from_step"] is not None
    assert not joined["snapshot"]
    back.process.send_signal(signal.SIGINT)
    assert back.process.wait(LEAVE_S) == 0, back.text
    check_heads(place, "a", "b", name)


@pytest.mark.parametrize("after_s", [0.1, 1.0, 3.0])
def test_interrupted_while_starting(place: Place, running: dict[str, Program], after_s: float) -> None:
    program = place.peer(f"early-{after_s}", running["seed"].address)
    time.sleep(after_s)
    program.process.send_signal(signal.SIGINT)
    code = program.process.wait(LEAVE_S)
    # Before Python itself has come to our first line, the signal does what it does to any program.
    assert code == 0 or (code == -signal.SIGINT and not program.text), program.text
    assert "Traceback" not in program.text
    wait_until(lambda: not any(program.name in command for command in place.alive().values()), limit_s=2.0)


def test_interrupted_at_some_moments_of_training(place: Place, running: dict[str, Program]) -> None:
    """With outer steps of about a second, these moments fall anywhere."""
    generator = random.Random(1)
    for i in range(2):
        programs = [place.peer(f"moment-{i}-{k}", running["seed"].address) for k in range(2)]
        names = [program.name for program in programs]
        wait_until(partial(all_stepped, place, names), *programs)
        for program in programs:
            time.sleep(generator.uniform(0.0, 1.5))
            program.process.send_signal(signal.SIGINT)
        for program in programs:
            assert program.process.wait(LEAVE_S) == 0, program.text
            assert "Traceback" not in program.text


def test_a_damaged_ledger_file_is_named_put_aside_and_fetched_again(place: Place, running: dict[str, Program]) -> None:
    program = place.peer("damaged", running["seed"].address)
    wait_until(lambda: place.step_of("damaged") >= 3, program)
    program.process.send_signal(signal.SIGINT)
    assert program.process.wait(LEAVE_S) == 0
    ledger = next((place.root / "damaged").glob("*/ledger"))
    update = max((ledger / "updates").glob("*.update"))
    update.write_bytes(update.read_bytes()[:-1] + b"\xff")
    back = place.peer("damaged", running["seed"].address)
    step = place.step_of("a")
    wait_until(lambda: place.step_of("damaged") > step, back)
    assert update.name in back.text
    assert list((ledger / "quarantine").glob(f"{update.name}*"))
    back.process.send_signal(signal.SIGINT)
    assert back.process.wait(LEAVE_S) == 0
    check_heads(place, "a", "b", "damaged")
