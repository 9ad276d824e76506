"""The seed and the trainers of a swarm on this machine: start them, hit them, end them.

    FOLDER/seed/, FOLDER/peer-1/ ...    identity, ledger, event log; what the process prints is in output.log
    FOLDER/peer-1.invitation ...        in a run by invitation, which the swarm's own peers are given; one for guests

They listen on loopback; or, given ``Places``, each where its name is: in a network namespace of its own, whose cable
can be pulled where the places are a ``Network``. Nothing here waits, but ``close``.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from p2p_diloco.core.errors import NetworkError, UsageError
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.manifest import RunManifest, open_manifest
from p2p_diloco.core.paths import beside
from p2p_diloco.core.runfile import DataSpec, RunSpec
from p2p_diloco.lab.child import Child, send_signal
from p2p_diloco.lab.faults import Act, Action
from p2p_diloco.lab.namespaces import LISTEN, Network
from p2p_diloco.ledger.folder import run_folder
from p2p_diloco.ledger.seats import OwnedRun, write_own

SEED = "seed"
"""Both the command and the name of its folder."""
SEED_START_S = 180.0
"""Until the seed has made the run. The first time on a machine it tokenizes the text."""
INVITED_DAYS = 3650
LEAVE_S = 10.0
"""For all together; after that they are killed."""
TRAINER = ("-m", "p2p_diloco", "peer")
LOOPBACK = "/ip4/127.0.0.1/tcp/0"
SIGNALS: dict[Action, signal.Signals] = {
    "kill": signal.SIGKILL, "stop": signal.SIGSTOP, "resume": signal.SIGCONT
}  # fmt: skip


def names_of(trainers: int) -> list[str]:
    """Returns the names of a swarm with so many trainers, the seed's first."""
    return [SEED, *(f"peer-{k}" for k in range(1, trainers + 1))]


def text_on_disk(data: DataSpec, base: Path) -> Path | None:
    """Returns the file or folder that ``data.path`` names, which trainers get as their own text; None where there is
    none, as with a name on the hub. ``base``: the folder of the run file. UsageError for a home that does not exist."""
    path = None if data.path is None else beside(base, data.path, "data.path")
    return path if path is not None and path.exists() else None


class Place(Protocol):
    """Says where the processes of one peer run."""

    @property
    def enter(self) -> Sequence[str]:
        """Returns what a command begins with to run there."""

    @property
    def options(self) -> Sequence[str]:
        """Returns the options of a peer there: where it listens, and what else is so because of the place."""


class Places(Protocol):
    """Say where the peers of a swarm run."""

    def add(self, name: str) -> Place:
        """Returns the place of the peer of this name. It is asked for once."""


class Children:
    """The seed and the trainers of one swarm. As a context manager: however it is left, no child is. ``run_file`` and
    ``folder`` are absolute paths."""

    manifest: RunManifest
    """Once the seed has started."""

    def __init__(
        self,
        run_file: Path,
        spec: RunSpec,
        folder: Path,
        *,
        trainer: Sequence[str] = TRAINER,
        patience: float = 1.0,
        places: Places | None = None,
    ) -> None:
        """Starts nothing yet. ``trainer``: a program with the options of ``p2p-diloco peer``, and some of these.
        ``places``: None for loopback."""
        self.run_file, self.spec, self.folder, self.places = run_file, spec, folder, places
        self.seed: Child | None = None
        self.trainers: list[Child] = []
        self._options = ["--patience", f"{patience:g}"]
        self._trainer = [*trainer, "--device", "cpu"]
        text = text_on_disk(spec.data, run_file.parent)
        self._trainer += [] if text is None else ["--data", str(text)]
        self._threads = 1
        self._seed_addresses: tuple[str, ...] = ()

    def __enter__(self) -> Children:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def all(self) -> list[Child]:
        """Returns all that have been started, the seed first."""
        return [child for child in (self.seed, *self.trainers) if child is not None]

    def named(self, name: str) -> Child:
        """Returns the child of this name."""
        return next(child for child in self.all if child.name == name)

    # -- start ---------------------------------------------------------------------------------------------------------

    def start_seed(self) -> None:
        """Starts the seed, which makes the run; ``seed_address`` tells when it has."""
        self.seed = self._child(SEED)
        self._start(self.seed)

    def seed_address(self) -> str | None:
        """Returns where the seed is reached; None until it has made the run. NetworkError or UsageError when it ended
        instead, or takes too long."""
        seed = self.named(SEED)
        seed.tail.read()
        if seed.address is not None:
            path = next(seed.folder.glob("*/manifest.json"))
            self.manifest = open_manifest(path.read_bytes(), str(path))
            self._seed_addresses = seed.addresses
            if self.places is None:  # others will look for it at its port when it starts again
                seed.options = [LISTEN, seed.address.rpartition("/p2p/")[0]]
        elif not seed.running:
            error = UsageError if seed.process.returncode == UsageError.exit_code else NetworkError
            raise error(f"the seed ended while starting: {seed.last_line().removeprefix('error: ')}")
        elif time.monotonic() > seed.started_s + SEED_START_S:
            raise NetworkError(f"the seed did not start within {SEED_START_S:.0f} s; its last line: {seed.last_line()}")
        return seed.address

    def invitation(self, name: str, *, places: int) -> Path:
        """Returns the file of an invitation to the seed's run, which is made the first time."""
        path = self.folder / f"{name}.invitation"
        if not path.exists():
            folder, run = self.named(SEED).folder, run_folder(self.named(SEED).folder, self.manifest)
            owned = OwnedRun.open(run, Identity.load(folder / "identity.key"), folder / "identity.key")
            token = owned.invite(name, days=INVITED_DAYS, places=places, now_s=time.time())
            write_own(path, token.text().encode())
        return path

    def start_trainers(self, count: int) -> None:
        """Starts so many trainers, which share the machine's cores."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._threads = max(1, cores // count)
        for name in names_of(count)[1:]:
            self.add_trainer(name)

    def add_trainer(self, name: str) -> Child:
        """Starts one more trainer."""
        child = self._child(name)
        self.trainers.append(child)
        self._start(child)
        return child

    def _child(self, name: str) -> Child:
        if self.places is None:
            return Child(name, self.folder / name, options=(LISTEN, LOOPBACK))
        place = self.places.add(name)
        return Child(name, self.folder / name, options=place.options, enter=place.enter)

    def _start(self, child: Child) -> None:
        known = dict.fromkeys(address for other in self.all if other is not child for address in other.addresses)
        if child is self.seed:
            kind = ["-m", "p2p_diloco", SEED, str(self.run_file)]
        else:
            kind = [*self._trainer, "--threads", str(self._threads)]
            known |= dict.fromkeys(self._seed_addresses)
            if self.spec.membership == "invite":
                kind += ["--invite", str(self.invitation(child.name, places=1))]
        if known:
            kind += ["--initial-peers", *known]
        child.start(*kind, *self._options)

    # -- faults --------------------------------------------------------------------------------------------------------

    def can_start(self, name: str) -> bool:
        """Returns whether a peer can be started again: nothing is left of it, and somebody is there to be joined, or
        nobody is even starting."""
        child, others = self.named(name), [child for child in self.all if child.name != name and child.living]
        reachable = any(other.address for other in others) or not others
        return child.ended and (reachable or child is self.seed)

    def carry_out(self, act: Act) -> tuple[int, ...]:
        """Does it, and returns the pids of the processes that it met."""
        child = self.named(act.peer)
        if act.action == "restart":
            self._start(child)
            return (child.process.pid,)
        if act.action in SIGNALS:
            return child.send(SIGNALS[act.action], act.process)
        if not isinstance(self.places, Network):
            raise UsageError(f"{act.action}: these peers have no cables of their own")
        if act.action == "restore":
            self.places.restore(act.peer)
        elif act.island:
            self.places.cut_together(act.peer, act.island)
        else:
            self.places.cut(act.peer)
        return tuple(child.processes().values())

    # -- the end -------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Asks all who are left to leave, and kills those who do not."""
        left = [child for child in self.all if child.running]
        for child in left:
            child.send(signal.SIGCONT, "all")
            send_signal(child.process.pid, signal.SIGINT)
        deadline_s = time.monotonic() + LEAVE_S
        for child in left:
            try:
                child.process.wait(max(deadline_s - time.monotonic(), 0.0))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
