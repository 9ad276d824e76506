"""A swarm of real peers that trains, to try faults on: the processes of ``p2p-diloco swarm``, and what their logs say.

Its model has 4 million parameters, so that the phases of a round last long enough to be hit; what would be computed in
inner steps is slept. Every time-out is a fifth of the usual, unless a benchmark says otherwise.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from benchmarks.histories import calm_stall, rounds
from benchmarks.loopback import Log, write_run_file
from benchmarks.processes import started_below
from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.runfile import DataSpec, InnerSpec, ModelSpec, OuterSpec, RoundSpec, RunSpec
from p2p_diloco.lab.child import Child
from p2p_diloco.lab.children import SEED, Children, Places
from p2p_diloco.lab.faults import Done, Fault, FaultPlan
from p2p_diloco.lab.injector import Injector

T = TypeVar("T")
ASLEEP = ("-m", "benchmarks.asleep", "peer")
PATIENCE = 0.2
START_S = 600.0
"""For the peers to start, up to 16 at once, on a machine that does other things, too."""
WAIT_S = 240.0
"""For anything else."""
POLL_S = 0.05
GONE_S = 5.0
"""From the end of a peer's trainer to that of its last process."""

SPEC = RunSpec(
    name="stage",
    model=ModelSpec(
        config={
            "model_type": "llama",
            "hidden_size": 256,
            "intermediate_size": 704,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "max_position_embeddings": 8,
            "tie_word_embeddings": True,
        }
    ),  # 4.08 million parameters
    data=DataSpec(source="path", path="text", seq_len=8, held_out=0.2, eval_tokens=8),
    inner=InnerSpec(steps=60),  # 3 s
    outer=OuterSpec(steps=100_000, lr=1.0, momentum=0.0),
    round=RoundSpec(min_group=2, gather_s=1.0, snapshot_every=4),
)


class Stage:
    """A context manager, in which all have been started. RuntimeError for whatever must not be: then all that was
    written stays, to be looked at."""

    def __init__(
        self,
        trainers: int,
        *,
        spec: RunSpec = SPEC,
        patience: float = PATIENCE,
        places: AbstractContextManager[Places] | None = None,
        seed: Path | None = None,
    ) -> None:
        """``places``: where each peer runs, which is left when all have ended; None for loopback. ``seed``: the folder
        of one that has made this run already, of which ours gets a copy."""
        self.spec, self._count, self._patience, self._places, self._seed = spec, trainers, patience, places, seed
        self._stack = ExitStack()
        self._faults: Injector | None = None
        self._failed = False

    def __enter__(self) -> Stage:
        self.folder = Path(tempfile.mkdtemp(prefix="stage-"))
        self.temporary = self.folder / "tmp"
        self.temporary.mkdir()
        write_texts(self.folder / "text")
        run_file = write_run_file(self.spec, self.folder)
        if self._seed is not None:
            shutil.copytree(self._seed, self.folder / SEED)
        self._stack.enter_context(environment("TMPDIR", str(self.temporary)))
        try:
            places = None if self._places is None else self._stack.enter_context(self._places)
            children = Children(
                run_file, self.spec, self.folder, trainer=ASLEEP, patience=self._patience, places=places
            )
            self.children = self._stack.enter_context(children)
            children.start_seed()
            self.wait_until(children.seed_address, "the seed started")
            children.start_trainers(self._count)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stack.close()
        if kind is None:
            self.check_nothing_left()
        if not self._failed:
            shutil.rmtree(self.folder)

    def failure(self, why: str) -> RuntimeError:
        """To be raised."""
        self._failed = True
        return RuntimeError(f"{why}; see {self.folder}")

    @property
    def patience_s(self) -> float:
        """The longest that a dead or silent peer may hold the others up: one time-out of each kind that a round has."""
        waits = Timeouts().scaled(self._patience)
        return self.spec.round.gather_s + waits.request_s + waits.reduced_part_s + 2 * waits.settle_s

    @property
    def logs(self) -> dict[str, Log]:
        """Of the trainers."""
        return {child.name: child.tail.log for child in self.children.trainers}

    # -- act ---------------------------------------------------------------------------------------------------------

    def plan(self, *faults: Fault) -> None:
        """These are carried out from now on, whenever we wait; others no more."""
        self._faults = Injector(FaultPlan(fault=list(faults)), self.children)
        self._faults.start()

    @property
    def done(self) -> list[Done]:
        """Of the present plan."""
        return [] if self._faults is None else self._faults.done

    def join(self, name: str) -> Child:
        return self.children.add_trainer(name)

    def leave(self, child: Child) -> None:
        """Politely, and for good."""
        child.process.send_signal(signal.SIGINT)
        self.wait_until(lambda: child.ended, f"{child.name} left", limit_s=30.0)
        self.children.trainers.remove(child)

    # -- wait --------------------------------------------------------------------------------------------------------

    def wait_until(self, condition: Callable[[], T | None], what: str, *, limit_s: float = WAIT_S) -> T:
        """Its first value that is true. ``what``: what is so then."""
        deadline_s = time.monotonic() + limit_s
        while True:
            pause_s = POLL_S
            if self._faults is not None:
                self._faults.poll()
                pause_s = min(pause_s, self._faults.poll_s)
            for child in self.children.all:
                child.tail.read()
                if child.failed:
                    raise self.failure(f"{child.name} failed: {child.last_line()}")
            if value := condition():
                return value
            if time.monotonic() > deadline_s:
                raise self.failure(f"not within {limit_s:.0f} s: {what}")
            time.sleep(pause_s)

    def wait_until_calm(self, since_s: float = 0.0) -> float:
        """Until all who live, or start, have made an outer step together. The median stall that it took."""
        logs = [child.tail.log for child in self.children.trainers if not child.felled]
        return self.wait_until(lambda: calm_stall(logs, since_s), "all make an outer step together", limit_s=START_S)

    # -- check -------------------------------------------------------------------------------------------------------

    def check_nothing_left(self) -> None:
        """Of any peer, a while after all have ended."""
        deadline_s = time.monotonic() + GONE_S
        while left := [*started_below(self.temporary).values(), *map(str, self.temporary.iterdir())]:
            if time.monotonic() > deadline_s:
                raise self.failure(f"left behind: {left}")
            time.sleep(POLL_S)

    def check_heads(self, since_s: float = 0.0) -> None:
        """Of one outer step there is one head. ``since_s``: a moment on the clock of the logs."""
        heads: dict[int, str] = {}
        for name, log in self.logs.items():
            for event in (event for event in rounds(log) if event.mono_s >= since_s):
                if heads.setdefault(event.step, event.head) != event.head:
                    raise self.failure(f"{name} has another head at outer step {event.step}")


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Of processes that are started meanwhile."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def write_texts(folder: Path) -> None:
    """What is learned does not matter here."""
    folder.mkdir()
    words, generator = [f"word{i} " for i in range(50)], random.Random(0)
    for i in range(20):
        (folder / f"{i}.txt").write_text("".join(generator.choices(words, k=500)))
