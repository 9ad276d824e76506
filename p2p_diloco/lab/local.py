"""N peers on this machine, to look and to test: the processes that N people would start, and faults on request.

    FOLDER/seed/, FOLDER/peer-1/ ...    what each of them writes: ``children``
    FOLDER/summary.json                 what became of it: ``outcome``
    FOLDER/export/                      the trained model

Nothing here talks to a peer: what is shown comes from the event logs, so a guest, who joins from another terminal, is
known only from the groups that it was in.

Ctrl+C in a terminal reaches this process alone, which asks the others to leave. If it is killed instead, Linux kills
them.
"""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live

from p2p_diloco.core.config import cache_folder, keep_cache_near
from p2p_diloco.core.errors import LocalError, Stopped, UsageError, disk_failure
from p2p_diloco.core.interruption import Stop, stop_signals
from p2p_diloco.core.manifest import RunManifest, open_manifest
from p2p_diloco.core.runfile import RunSpec
from p2p_diloco.lab.child import Child
from p2p_diloco.lab.children import SEED, TRAINER, Children, text_on_disk
from p2p_diloco.lab.faults import Done, FaultPlan, plights
from p2p_diloco.lab.injector import Injector
from p2p_diloco.lab.namespaces import Network
from p2p_diloco.lab.outcome import LocalRun, Log, SwarmOutcome, held_out, outcome_of, summary_json, trainer_now
from p2p_diloco.lab.screen import RunClock, last_words, screen, step_line
from p2p_diloco.learn.data import open_corpus
from p2p_diloco.ledger.disk import write_whole
from p2p_diloco.look.display import is_live, plain
from p2p_diloco.look.ways_in import join_line

if TYPE_CHECKING:
    from p2p_diloco.learn.tokenizer import Tokenizer

POLL_S = 0.25
GUESTS = 8
"""Places for those who join from another terminal, in a run by invitation."""
SAMPLE_TOKENS = 300
SAMPLE_TEMPERATURE = 0.8
SAMPLE_TOP_K = 20
"""Words need likely tokens, but with the likeliest alone a small model that has begun to indent goes on for ever: at
0.7 a seventh of what the demo's model writes are gaps of more than 16 spaces, here a ninth."""


def run_local(
    run_file: Path,
    *,
    peers: int,
    folder: Path | None = None,
    drop: float = 0.0,
    patience: float = 1.0,
    plan: FaultPlan | None = None,
) -> int:
    """Runs a swarm to its end, and returns the exit code: 1 if a trainer failed, other than by a fault of the plan.
    LocalError when the swarm cannot start. Call it before threads are started."""
    spec, plan = RunSpec.load(run_file), plan or FaultPlan()
    folder = (folder or Path("runs") / f"{spec.name}-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
    fresh = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        full = disk_failure(error, folder)
        raise full or UsageError(f"{folder}: cannot be made ({error.strerror}); choose another --folder") from error
    for path in folder.glob(f"{SEED}/*/manifest.json"):
        if open_manifest(path.read_bytes(), str(path)).spec != spec:
            raise UsageError(f"{folder}: holds another run, or this one before its run file changed; choose another")
    keep_cache_near(folder)
    with stop_signals() as stop, stop.when_checked(), ExitStack() as stack:
        network = stack.enter_context(Network()) if plan.cuts else None
        trainer = (*TRAINER, "--drop", str(drop))
        children = Children(run_file.absolute(), spec, folder, trainer=trainer, patience=patience, places=network)
        swarm = LocalSwarm(stack.enter_context(children), plan, stop)
        try:
            swarm.start(peers)
            swarm.watch()
        except Stopped:
            pass
        except LocalError:
            if fresh and not children.trainers:  # the seed has refused the run: its last line is in the error
                children.close()
                shutil.rmtree(folder, ignore_errors=True)
            raise
        children.close()
        outcome = swarm.write_summary()
        if outcome.outer_steps and not stop.requested:
            export_and_sample(swarm, run_file.parent)
        elif outcome.outer_steps:
            folder = newest(children).folder
            command = shlex.join(
                ["p2p-diloco", "export", "--folder", str(folder), "--to", str(children.folder / "export")]
            )
            swarm.console.print(f"{'model':<14}  {command}", markup=False, soft_wrap=True)
    failed = any(child.failed for child in children.trainers)
    return int(failed and not stop.requested)


class LocalSwarm:
    """A swarm of children, which is watched and shown."""

    def __init__(self, children: Children, plan: FaultPlan, stop: Stop) -> None:
        self.children, self.stop = children, stop
        self.injector = Injector(plan, children)
        self.spec = children.spec
        self.started_s = time.monotonic()
        self.console = Console(soft_wrap=not sys.stdout.isatty(), highlight=False)
        self.failures: set[str] = set()
        """Of those who have failed, and have been told of."""
        self.told_step = 0
        """Of those without a terminal: the last outer step that has had its line."""

    @property
    def logs(self) -> Mapping[str, Log]:
        """Returns the trainers' events, by name."""
        return {child.name: child.tail.log for child in self.children.trainers}

    def start(self, peers: int) -> None:
        """Starts the seed, and when it can be reached, all trainers at once. LocalError if it cannot be."""
        children = self.children
        self.console.print(f"{self.spec.name}: {peers} peers in {children.folder}; starting the seed")
        children.start_seed()
        while (address := children.seed_address()) is None:
            self.stop.check()
            time.sleep(POLL_S)
        self.join_line = join_line([address])
        if children.manifest.spec.membership == "invite":
            guests = children.invitation("guests", places=GUESTS)
            self.join_line += f" --invite {shlex.quote(str(guests))}"
        if isinstance(children.places, Network):
            self.join_line = f"{shlex.join(children.places.switch.enter)} {self.join_line}"
        self.tell_text()
        self.console.print(f"to join from another terminal: {self.join_line}", soft_wrap=True)
        children.start_trainers(peers)
        self.injector.start()

    def tell_text(self) -> None:
        """Prints what the seed has read, from its tokens; of a hub data set, each trainer's log tells its part."""
        if self.spec.data.source != "hub":
            base, tokenizer_json = self.children.run_file.parent, self.children.manifest.tokenizer_json
            corpus = open_corpus(self.spec.data, base=base, cache=cache_folder(), tokenizer_json=tokenizer_json)
            for line in corpus.report.lines:
                self.console.print(f"text: {plain(line)}", markup=False, soft_wrap=True)

    def watch(self) -> None:
        """Shows the swarm, and carries out the plan's faults, until all trainers have ended for good."""
        with Live(console=self.console, auto_refresh=False, transient=False) as live:
            ended, shown_s = False, 0.0
            while not (ended or self.stop.requested):
                for done in self.injector.poll():
                    self.console.print(told(done), style="yellow")
                if time.monotonic() >= shown_s + POLL_S:
                    shown_s = time.monotonic()
                    ended = not any(child.running for child in self.children.trainers)
                    ended = ended and not self.injector.restarts_to_come
                    self.tell_failures()
                    self.show(live, ended)
                time.sleep(self.injector.poll_s)

    def tell_failures(self) -> None:
        """Prints, once for each child that has failed, why."""
        for child in self.children.all:
            if child.failed and child.name not in self.failures:
                self.failures.add(child.name)
                code = child.process.returncode
                self.console.print(f"{child.name} failed with exit code {code}: {child.last_line()}", style="red")

    # -- what is shown -------------------------------------------------------------------------------------------------

    def show(self, live: Live, ended: bool) -> None:
        """Shows the table; without a terminal, a line for each outer step, once theta has been evaluated or the swarm
        has gone on without."""
        down = plights(self.injector.done)
        trainers = {
            child.name: trainer_now(child.log, down.get(child.name) or child.fate) for child in self.children.trainers
        }
        clock = RunClock(self.spec.outer.steps, time.monotonic() - self.started_s)
        if is_live(self.console):
            run = f"{self.spec.name} {self.children.manifest.run_id[:12]}"
            width = self.console.width
            live.update(screen(run, trainers, self.logs, clock, self.join_line, width=width), refresh=True)
            return
        made, losses = max(trainer.step for trainer in trainers.values()), dict(held_out(self.logs))
        while self.told_step < made and (ended or self.told_step + 1 < made or made in losses):
            self.told_step += 1
            self.console.print(step_line(trainers, self.told_step, losses.get(self.told_step), clock))

    def write_summary(self) -> SwarmOutcome:
        """Writes ``summary.json``, prints the last words, and returns what became of the swarm."""
        children, path = self.children, self.children.folder / "summary.json"
        for child in children.all:
            child.tail.read()
        run = LocalRun(
            run_id=children.manifest.run_id if children.trainers else None,
            run_name=self.spec.name,
            command=shlex.join(sys.argv),
            wall_s=time.monotonic() - self.started_s,
            exit_codes={child.name: child.process.returncode for child in children.all},
            faults=[done.told for done in self.injector.done],
        )
        outcome = outcome_of(self.logs)
        data = summary_json(run, outcome)
        write_whole(path, [data], len(data))
        for what, figure in last_words(outcome, byte_level=self.spec.data.tokenizer == "bytes"):
            self.console.print(f"{what:<14}  {figure}")
        self.console.print(f"{'summary':<14}  {path}")
        return outcome


def told(done: Done) -> str:
    """Returns a fault in a line."""
    act, pids = done.act, ", ".join(map(str, done.pids))
    process = f" {act.process}" if act.action in ("kill", "stop", "resume") else ""
    where = f", {done.phase} of outer step {done.step}" if done.phase else ""
    return f"{done.at_s:.2f} s: {act.action} {act.peer}{process} ({pids or 'nothing there'}){where}"


def newest(children: Children) -> Child:
    """Returns who has come furthest."""
    return max(children.all, key=lambda child: trainer_now(child.log).step)


def export_and_sample(swarm: LocalSwarm, base: Path) -> None:
    """Writes the newest theta on the disk as a folder that transformers loads, and prints some text by it. ``base``:
    folder of the run file."""
    from p2p_diloco.learn.export import export_model
    from p2p_diloco.learn.sample import generate, load_export, presented
    from p2p_diloco.ledger.folder import find_run, load_state

    console, children, target = swarm.console, swarm.children, swarm.children.folder / "export"
    manifest, state = load_state(find_run(newest(children).folder, children.manifest.run_id))
    export_model(manifest, state.theta, target, step=state.step, head=state.head)
    console.print(f"{'export':<14}  {target}, outer step {state.step}")
    model, tokenizer, info = load_export(target)
    prompt = info.prompt
    if not prompt:
        there = [now.peer_id for now in map(trainer_now, (child.log for child in children.trainers)) if now.peer_id]
        try:
            prompt = own_prompt(manifest, tokenizer, base, there[0] if there else "")
        except LocalError as error:  # the run is over and exported: text that is gone by now takes nothing from that
            console.print(f"no sample: {error}", markup=False, soft_wrap=True)
            return
    pieces = generate(
        model, tokenizer, prompt, max_tokens=SAMPLE_TOKENS, temperature=SAMPLE_TEMPERATURE, top_k=SAMPLE_TOP_K, seed=0
    )
    shown = (plain(piece, keep="\n\t") for piece in pieces)
    console.rule("a sample")
    for piece in presented(plain(prompt, keep="\n\t"), shown, manifest.n_params):
        if swarm.stop.requested:
            break
        console.print(piece, end="", markup=False, soft_wrap=True)
    again = shlex.join(["p2p-diloco", "sample", "--export", str(target), "--top-k", str(SAMPLE_TOP_K), "--seed", "1"])
    console.print(f"\nanother one: {again}", soft_wrap=True)


def own_prompt(manifest: RunManifest, tokenizer: Tokenizer, base: Path, peer_id: str) -> str:
    """Returns held-out text of a run without the built-in one, from the tokens that the trainer ``peer_id`` has
    kept."""
    from p2p_diloco.learn.prompt import prompt_of_tokens
    from p2p_diloco.learn.train import open_run_corpus

    data = manifest.spec.data
    held_out = open_run_corpus(manifest, text_on_disk(data, base), peer_id).held_out
    return prompt_of_tokens(data, held_out, tokenizer) or "The "
