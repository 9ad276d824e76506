"""Where a simulation stood when it was interrupted: all that is not computed anew from its run file, in one file, whole
or not at all.

Of a simulation its tensors are theta and what the outer optimizer keeps, and each replica's parameters and moments;
beside them, as JSON, what was simulated, what else its figures depend on (``Origin``), the curve, and how far each
replica was. ``simulate`` puts them in and takes them out; one process at a time writes it (``alone_in``). What a warm
start keeps (``trainers``) is less: one worker's.
"""

from __future__ import annotations

import fcntl
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from p2p_diloco.core.errors import UsageError
from p2p_diloco.lab.simulated_run import SimulatedRun
from p2p_diloco.ledger.disk import disk_errors, write_whole

log = logging.getLogger(__name__)

CHECKPOINT_FILE = "checkpoint.safetensors"
LOCK_FILE = "lock"
ORIGIN_WORDS = {
    "genesis": "model, or other weights to start from",
    "text": "text",
    "names": "swarm to recount, or without one",
    "shards": "division of the text",
    "device": "kind of device",
    "torch": "version of torch",
}
"""What a person may have changed when one of these is another than before."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Says what the figures of a simulation depend on, beside its run file: another start of it must have the same."""

    genesis: str
    """Digest of S_0, in hex."""
    text: str
    names: Sequence[str]
    """Of the replicas."""
    shards: str
    """Digest of everybody's own text; empty where all share one."""
    device: str
    """Its kind."""
    torch: str
    """Its version."""


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint."""

    folder: Path
    file: Any
    """As ``safe_open`` gives it: tensors are read when they are asked for."""
    facts: dict[str, Any]

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        """Returns the tensors whose names begin with ``prefix``."""
        return {name: self.file.get_tensor(name) for name in self.file.keys() if name.startswith(prefix)}  # noqa: SIM118

    def check_what(self, what: SimulatedRun) -> None:
        """Raises UsageError when it is of another simulation than ``what``."""
        begun = self.facts["what"]
        begun["run"]["outer"].setdefault("aggregate", "mean")  # as it was before there was another rule
        if SimulatedRun.model_validate_json(json.dumps(begun)) != what:
            raise UsageError(
                f"{self.folder}: holds another simulation, or this one before its file changed; choose another"
            )

    def check_origin(self, origin: Origin) -> None:
        """Raises UsageError when its figures depend on something else than ``origin``."""
        for name, value in self.facts["origin"].items():
            if value != getattr(origin, name):
                raise UsageError(f"{self.folder}: was begun with another {ORIGIN_WORDS[name]}; choose another")


@contextmanager
def open_checkpoint(folder: Path) -> Iterator[Checkpoint | None]:
    """Yields the checkpoint in ``folder``, or None where there is none. UsageError when it is damaged: what cannot be
    read inside the block counts, too."""
    path = folder / CHECKPOINT_FILE
    if not path.exists():
        yield None
        return
    try:
        with safe_open(path, "pt") as file:
            yield Checkpoint(folder, file, json.loads(file.metadata()["simulation"]))
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise UsageError(f"{path}: damaged ({type(error).__name__}); delete it to start anew") from error


def write_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], facts: str) -> None:
    """Writes the checkpoint in ``folder`` anew, whole or not at all. ``facts``: JSON, which is ``Checkpoint.facts``
    afterwards. LedgerError on a full disk."""
    data = save(tensors, {"simulation": facts})
    write_whole(folder / CHECKPOINT_FILE, [data], len(data))


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keeps other processes from simulating in ``folder`` during the block. UsageError while another process simulates
    in ``folder``. A file system without locks lets both. A folder that is made here, and into which nothing is written,
    is gone afterwards."""
    fresh = not folder.exists()
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK_FILE).open("wb")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{folder}: another process simulates here; wait for it, or choose another") from None
        except OSError as error:
            log.debug("%s: no locks here: %s", folder, error)
        try:
            yield
        finally:
            if fresh and [path.name for path in folder.iterdir()] == [LOCK_FILE]:
                (folder / LOCK_FILE).unlink()
                folder.rmdir()
