"""A folder for a swarm of real processes, started with the commands that a user types, and what can be seen of them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.processes import started_below
from benchmarks.stage import write_texts
from p2p_diloco.core.event import E, RoundEnded, of_kind
from p2p_diloco.core.events import EVENTS_FILE, read_events
from p2p_diloco.lab.child import children_of, read_proc

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
steps = {inner_steps}
batch_size = 4
lr = 3e-3
warmup_steps = 2
[outer]
steps = {outer_steps}
lr = 1.0
momentum = 0.0
[round]
min_group = {min_group}
gather_s = {gather_s}
snapshot_every = {snapshot_every}
"""
START_S = 150.0
"""For seed and peers to start, on a machine that does other things, too; by itself, one of two cores does it in 15."""
LEAVE_S = 12.0
"""For a polite end: within 10 s, as promised, and what this machine takes to notice."""


class Place:
    """Its processes, and nobody else's, have its TMPDIR in their environment. The name is short: sockets live below."""

    def __init__(
        self,
        *,
        outer_steps: int = 100_000,
        inner_steps: int = 40,
        min_group: int = 2,
        gather_s: float = 2.0,
        snapshot_every: int = 500,
        membership: str = "open",
    ) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="swarm-"))
        self.temporary = self.root / "tmp"
        self.temporary.mkdir()
        self.programs: list[Program] = []
        write_texts(self.root / "text")
        self.run_file = self.root / "run.toml"
        self.run_file.write_text(
            f'membership = "{membership}"\n'
            + RUN.format(
                outer_steps=outer_steps,
                inner_steps=inner_steps,
                min_group=min_group,
                gather_s=gather_s,
                snapshot_every=snapshot_every,
            )
        )
        self.command: tuple[str, ...] = (sys.executable, "-m", "p2p_diloco")
        self.working_folder = Path.cwd()
        self.environment = os.environ | {"TMPDIR": str(self.temporary), "XDG_CACHE_HOME": str(self.root / "cache")}

    # -- commands ----------------------------------------------------------------------------------------------------

    def start(self, name: str, *arguments: str) -> Program:
        return self._launch(name, *self.command, *arguments)

    def run(self, name: str, *arguments: str) -> Program:
        """``arguments``: Python's."""
        return self._launch(name, sys.executable, *arguments)

    def _launch(self, name: str, *command: str) -> Program:
        self.programs.append(Program(self, name, command))
        return self.programs[-1]

    def seed(self, name: str = "seed", **flags: str) -> Program:
        flags = {"folder": str(self.root / name), "host-maddrs": "/ip4/127.0.0.1/tcp/0", **flags}
        return self.start(name, "seed", str(self.run_file), *as_flags(flags))

    def peer(self, name: str, address: str, **flags: str) -> Program:
        flags = {"folder": str(self.root / name), "host-maddrs": "/ip4/127.0.0.1/tcp/0", "name": name, **flags}
        own = {"data": str(self.root / "text"), "threads": "1", "device": "cpu"}
        return self.start(name, "peer", "--initial-peers", address, *as_flags(flags | own))

    def swarm(self, **flags: str) -> Program:
        """Its peers' folders are in ours, as if each had been started by itself."""
        return self.start("swarm", "swarm", str(self.run_file), "--folder", str(self.root), *as_flags(flags))

    # -- what can be seen --------------------------------------------------------------------------------------------

    def alive(self) -> dict[int, str]:
        return started_below(self.temporary)

    def main_process_of(self, name: str) -> int | None:
        """Of a peer that ``swarm`` has started."""
        mark = f" --folder {self.root / name} "
        return next((pid for pid, command in self.alive().items() if " -m " in command and mark in command), None)

    def events(self, name: str, kind: type[E]) -> list[E]:
        paths = list((self.root / name).glob(f"*/{EVENTS_FILE}"))
        return [event for path in paths for event in of_kind(read_events(path), kind)]

    def committed(self, name: str) -> dict[int, str]:
        """Outer step -> head, of the rounds that this peer was in."""
        return {event.step: event.head for event in self.events(name, RoundEnded) if event.committed}

    def step_of(self, name: str) -> int:
        return max(self.committed(name), default=0)

    @property
    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((self.root / "summary.json").read_text())
        return summary

    def check_heads(self, *names: str) -> None:
        """Whoever committed an outer step has the same head there."""
        heads: dict[int, str] = {}
        for name in names:
            for step, head in self.committed(name).items():
                assert heads.setdefault(step, head) == head, f"{name} has another head at outer step {step}"

    # -- the end -----------------------------------------------------------------------------------------------------

    def assert_nothing_left(self) -> None:
        assert self.alive() == {}
        assert list(self.temporary.iterdir()) == []
        assert [path for path in self.root.rglob("*") if path.is_socket()] == []

    def clear(self) -> None:
        for pid in self.alive():
            with contextlib.suppress(ProcessLookupError):  # the end of one ends others
                os.kill(pid, signal.SIGKILL)
        for program in self.programs:
            program.process.wait()
        shutil.rmtree(self.root)


class Program:
    def __init__(self, place: Place, name: str, command: tuple[str, ...]) -> None:
        self.place, self.name = place, name
        self.output = place.root / f"{name}.out"
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                cwd=place.working_folder,
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
            command = read_proc(pid, "cmdline").decode()
            if part in command and "guard.py" not in command:
                return pid
        raise AssertionError(f"no {part} below {self.process.pid}")

    def gone(self, pids: list[int]) -> bool:
        return not any(pid in self.place.alive() for pid in pids)

    def interrupt(self) -> int:
        """The exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(LEAVE_S)


def as_flags(options: dict[str, str]) -> list[str]:
    return [piece for key, value in options.items() for piece in (f"--{key}", value)]


def descendants(pid: int) -> list[int]:
    children = children_of(pid)
    return children + [deeper for child in children for deeper in descendants(child)]


def wait_until(condition: Callable[[], Any], *programs: Program, limit_s: float = START_S) -> Any:
    """``programs``: those whose output tells why it takes too long."""
    deadline_s = time.monotonic() + limit_s
    while not (value := condition()):
        assert time.monotonic() < deadline_s, "\n".join(program.text for program in programs)
        time.sleep(0.05)
    return value


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


def url_of(monitor: Program) -> str:
    """Of its page, once that is served."""
    return str(
        wait_until(lambda: re.findall(r"^run \S+ [0-9a-f]{40}: (http\S+)$", monitor.text, re.MULTILINE), monitor)[-1]
    )
