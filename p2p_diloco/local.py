"""N peers on this machine, to look and to test: the processes that N people would start, each with its own folder.

    FOLDER/seed/, FOLDER/peer-1/ ...    identity, ledger, event log; what the process prints is in output.log
    FOLDER/summary.json                 what became of it: ``summary``
    FOLDER/export/                      the trained model

Nothing here talks to a peer: what is shown comes from the event logs, so a guest, who joins from another terminal, is
known only from the groups that it was in.

Children have sessions of their own, so that Ctrl+C in a terminal reaches this process alone, which asks them to leave.
If it is killed instead, Linux kills them.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.live import Live

from p2p_diloco.display import join_line, plain
from p2p_diloco.errors import NetworkError, Stopped, UsageError
from p2p_diloco.events import EVENTS_FILE
from p2p_diloco.guard import die_with_parent
from p2p_diloco.manifest import RunManifest, RunSpec, open_manifest
from p2p_diloco.summary import Event, Progress, findings, held_out, row_of, screen, step_line, summarize

POLL_S = 0.25
SEED_START_S = 180.0
"""Until the seed has made the run. The first time on a machine it tokenizes the text."""
LEAVE_S = 10.0
"""For all children together; after that they are killed."""
SAMPLE_TOKENS = 200
SEED = "seed"
"""Both the command and the name of its folder."""


def run_local(run_file: Path, *, peers: int, folder: Path | None = None) -> int:
    """Exit code: 1 if a trainer failed. LocalError when the swarm cannot start. Call it before threads are started."""
    spec = RunSpec.load(run_file)
    folder = (folder or Path("runs") / f"{spec.name}-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder}: cannot be made ({error.strerror}); choose another --folder") from error
    for path in folder.glob(f"{SEED}/*/manifest.json"):
        if open_manifest(path.read_bytes(), str(path)).spec != spec:
            raise UsageError(f"{folder}: holds another run, or this one before its run file changed; choose another")
    with stop_signals() as stop, LocalSwarm(run_file.absolute(), spec, folder, stop) as swarm:
        try:
            swarm.start(peers)
            swarm.watch()
        except Stopped:
            pass
        swarm.close()
        summary = swarm.write_summary()
        if summary["outer_steps"] and not stop.requested:
            export_and_sample(swarm)
    failed = any(code != 0 for name, code in summary["exit_codes"].items() if name != SEED)
    return int(failed and not stop.requested)


class Stop:
    """Ctrl+C and SIGTERM: the first one is looked for between polls, the second one ends this process at once, and with
    it, on Linux, all others."""

    requested = False

    def on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.requested:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.requested = True

    def check(self) -> None:
        if self.requested:
            raise Stopped("stopped")


@contextmanager
def stop_signals() -> Iterator[Stop]:
    stop = Stop()
    before = {number: signal.signal(number, stop.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Child:
    """One peer's main process, its output, and its event log as far as it has been read."""

    name: str
    folder: Path
    process: subprocess.Popen[bytes]
    log: list[Event] = field(default_factory=list)
    read_bytes: int = 0
    end_noted: bool = False

    @classmethod
    def start(cls, name: str, folder: Path, *arguments: str) -> Child:
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "p2p_diloco", *arguments, "--folder", str(folder)]
        command += ["--host-maddrs", "/ip4/127.0.0.1/tcp/0", "--name", name]
        with (folder / "output.log").open("ab") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=partial(die_with_parent, signal.SIGKILL),
            )
        return cls(name, folder, process)

    def read(self) -> None:
        """What has been written to the event log since the last call, in whole lines."""
        path = next(self.folder.glob(f"*/{EVENTS_FILE}"), None)
        if path is None:
            return
        with path.open("rb") as file:
            file.seek(self.read_bytes)
            whole, newline, _ = file.read().rpartition(b"\n")
        self.read_bytes += len(whole) + len(newline)
        for line in whole.split(b"\n"):
            try:
                self.log.append(json.loads(line))
            except ValueError:
                continue  # cut by a crash

    def last_line(self) -> str:
        """Of its output: where it failed, the reason."""
        lines = (self.folder / "output.log").read_text(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


class LocalSwarm:
    """A context manager: however it is left, no child is."""

    manifest: RunManifest
    join_line: str

    def __init__(self, run_file: Path, spec: RunSpec, folder: Path, stop: Stop) -> None:
        self.run_file, self.spec, self.folder, self.stop = run_file, spec, folder, stop
        self.started_s = time.monotonic()
        self.seed: Child | None = None
        self.trainers: list[Child] = []
        self.console = Console(soft_wrap=not sys.stdout.isatty(), highlight=False)
        self.told_step = 0
        """Of those without a terminal: the last outer step that has had its line."""

    def __enter__(self) -> LocalSwarm:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def children(self) -> list[Child]:
        return [child for child in (self.seed, *self.trainers) if child is not None]

    @property
    def logs(self) -> dict[str, list[Event]]:
        return {child.name: child.log for child in self.trainers}

    # -- life --------------------------------------------------------------------------------------------------------

    def start(self, peers: int) -> None:
        """The seed, and when it can be reached, all trainers at once. NetworkError if the seed cannot be."""
        self.seed = Child.start(SEED, self.folder / SEED, SEED, str(self.run_file))
        self.console.print(f"{self.spec.name}: {peers} peers in {self.folder}; starting the seed")
        address = self._wait_for_seed(self.seed)
        path = next((self.folder / SEED).glob("*/manifest.json"))
        self.manifest = open_manifest(path.read_bytes(), str(path))
        self.join_line = join_line([address])
        self.console.print(f"to join from another terminal: {self.join_line}", soft_wrap=True)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        arguments = ["peer", "--initial-peers", address, "--device", "cpu", "--threads", str(max(1, cores // peers))]
        if self.spec.data.path is not None:
            arguments += ["--data", str(self.run_file.parent / self.spec.data.path)]
        names = [f"peer-{k}" for k in range(1, peers + 1)]
        self.trainers = [Child.start(name, self.folder / name, *arguments) for name in names]

    def _wait_for_seed(self, seed: Child) -> str:
        """Its address."""
        while time.monotonic() < self.started_s + SEED_START_S:
            self.stop.check()
            seed.read()
            for event in seed.log:
                if event["event"] == "started" and event["mono_s"] >= self.started_s:
                    return str(event["maddrs"][0])
            if seed.process.poll() is not None:
                message = seed.last_line().removeprefix("error: ")
                error = UsageError if seed.process.returncode == UsageError.exit_code else NetworkError
                raise error(f"the seed ended while starting: {message}")
            time.sleep(POLL_S)
        raise NetworkError(f"the seed did not start within {SEED_START_S:.0f} s; its last line: {seed.last_line()}")

    def watch(self) -> None:
        """Until all trainers have ended."""
        with Live(console=self.console, auto_refresh=False, transient=False) as live:
            while not self.stop.requested:
                ended = all(child.process.poll() is not None for child in self.trainers)
                self.look()
                self.show(live, ended)
                if ended:
                    return
                time.sleep(POLL_S)

    def look(self) -> None:
        """Read the event logs, and say who failed."""
        for child in self.children:
            child.read()
            code = child.process.poll()
            if code and not child.end_noted:
                child.end_noted = True
                self.console.print(f"{child.name} failed with exit code {code}: {child.last_line()}", style="red")

    def close(self) -> None:
        """Ask all who are left to leave, and kill those who do not."""
        left = [child.process for child in self.children if child.process.poll() is None]
        for process in left:
            process.send_signal(signal.SIGINT)
        deadline_s = time.monotonic() + LEAVE_S
        for process in left:
            try:
                process.wait(max(deadline_s - time.monotonic(), 0.0))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    # -- what is shown -----------------------------------------------------------------------------------------------

    def show(self, live: Live, ended: bool) -> None:
        """The table; without a terminal, a line for each outer step, once theta has been evaluated or the swarm has
        gone on without."""
        rows = {child.name: row_of(child.log, child.process.poll()) for child in self.trainers}
        progress = Progress(self.spec.outer.steps, time.monotonic() - self.started_s)
        if self.console.is_terminal:
            run = f"{self.spec.name} {self.manifest.run_id[:12]}"
            live.update(screen(run, rows, self.logs, progress, self.join_line), refresh=True)
            return
        made, losses = max(row.step for row in rows.values()), dict(held_out(self.logs))
        while self.told_step < made and (ended or self.told_step + 1 < made or made in losses):
            self.told_step += 1
            self.console.print(step_line(rows, self.told_step, losses.get(self.told_step), progress))

    def write_summary(self) -> dict[str, Any]:
        for child in self.children:
            child.read()
        summary = {
            "run_id": self.manifest.run_id if self.trainers else None,
            "run_name": self.spec.name,
            "command": shlex.join(sys.argv),
            "wall_s": time.monotonic() - self.started_s,
            "exit_codes": {child.name: child.process.returncode for child in self.children},
            **summarize(self.logs),
        }
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        for what, figure in findings(summary, byte_level=self.spec.data.tokenizer == "bytes"):
            self.console.print(f"{what:<14}  {figure}")
        self.console.print(f"{'summary':<14}  {self.folder / 'summary.json'}")
        return summary


def export_and_sample(swarm: LocalSwarm) -> None:
    """The newest theta on the disk, as a folder that transformers loads, and some text by it."""
    from p2p_diloco.export import export_model
    from p2p_diloco.sample import generate, load_export
    from p2p_diloco.stored import find_run, load_state

    console, target = swarm.console, swarm.folder / "export"
    newest = max(swarm.children, key=lambda child: row_of(child.log).step)
    manifest, state = load_state(find_run(newest.folder, swarm.manifest.run_id))
    export_model(manifest, state.theta, target, step=state.step, head=state.head)
    console.print(f"{'export':<14}  {target}, outer step {state.step}")
    model, tokenizer, _ = load_export(target)
    prompt = "def " if swarm.spec.data.source == "builtin" else "The "
    console.rule("a sample")
    console.print(prompt, end="")
    for piece in generate(model, tokenizer, prompt, max_tokens=SAMPLE_TOKENS, temperature=0.7, top_k=None, seed=0):
        if swarm.stop.requested:
            break
        console.print(plain(piece, keep="\n\t"), end="", markup=False, soft_wrap=True)
    console.print()
