"""A run as it lies in a peer's folder, read without disturbing the peer, which may be running."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from p2p_diloco.core.errors import OtherProtocol, UsageError
from p2p_diloco.core.manifest import RunManifest, open_manifest
from p2p_diloco.core.outer import OuterState
from p2p_diloco.ledger.disk import disk_errors
from p2p_diloco.ledger.ledger import Ledger
from p2p_diloco.ledger.replay import load

MANIFEST_FILE = "manifest.json"


def run_folder(folder: Path, manifest: RunManifest) -> Path:
    """Returns the folder in which a peer keeps what belongs to one run: manifest, ledger, inner state, event log."""
    return folder / f"{manifest.spec.name}-{manifest.run_id[:12]}"


def folder_bytes(folder: Path) -> int:
    """Returns the size of all files below a folder. Its owner may write at this moment: what vanishes meanwhile does
    not count."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def open_ledger(folder: Path, manifest: RunManifest) -> Ledger:
    """Returns the ledger in a run folder. Opening it tidies it up, which its own peer alone may do."""
    outer = manifest.spec.outer
    return Ledger(
        folder / "ledger",
        grid=manifest.grid,
        lr=outer.lr,
        momentum=outer.momentum,
        snapshot_every=manifest.spec.round.snapshot_every,
        run_id=manifest.run_id,
    )


def find_run(folder: Path, run_id: str | None = None) -> Path:
    """Returns the folder of the run: ``folder`` itself, or the one in it. UsageError when there is none, or more than
    one; runs of another protocol do not count beside one of this."""
    candidates = [folder] if (folder / MANIFEST_FILE).is_file() else sorted(folder.glob(f"*/{MANIFEST_FILE}"))
    found = {path if path.is_dir() else path.parent: None for path in candidates}
    runs: dict[Path, str] = {}
    others: list[OtherProtocol] = []
    for run in found:
        try:
            runs[run] = read_manifest(run).run_id
        except OtherProtocol as error:
            others.append(error)
    if run_id is not None:
        runs = {run: found_id for run, found_id in runs.items() if found_id == run_id}
    if not runs and others:
        raise others[0]
    if not runs:
        which = "run" if run_id is None else f"run {run_id}"
        raise UsageError(
            f"{folder}: no {which} here; name the --folder of a peer or seed, or the folder of a run in it"
        )
    if len(runs) > 1:
        listed = "; ".join(f"--run-id {found_id} ({run.name})" for run, found_id in runs.items())
        raise UsageError(f"{folder}: there are {len(runs)} runs here; choose one: {listed}")
    return next(iter(runs))


def read_manifest(run: Path) -> RunManifest:
    """Returns the manifest of ``run``, a run folder or the file itself. Raises UsageError unless it is a sound one."""
    path = run / MANIFEST_FILE if run.is_dir() else run
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    return open_manifest(data, str(path))


def load_run(path: Path, run_id: str | None = None) -> RunManifest:
    """Returns the manifest of a run that lies on this disk, its owner's signature checked.

    ``path``: the folder of a seed or a peer, which may be running; the folder of one run in it; or a manifest file.
    ``run_id`` chooses among several runs in a folder. UsageError when there is none, more than one, or no sound one.
    A run file, which a person writes, is read by ``RunSpec.load``.
    """
    return read_manifest(find_run(path, run_id) if path.is_dir() else path)


def load_state(run: Path, step: int | None = None) -> tuple[RunManifest, OuterState]:
    """Returns the manifest and the newest state that the run folder's ledger leads to, or that of outer step
    ``step``."""
    manifest = read_manifest(run)
    theta, momentum = np.empty(manifest.n_params, np.float32), np.empty(manifest.n_params, np.float32)
    with same_files(run) as view:
        ledger = open_ledger(view, manifest)
        steps = sorted(ledger.heads())
        state = load(ledger, theta, momentum, at_most=step)
    if not steps or (state is None and step is None):
        raise UsageError(f"{run}: its ledger holds no sound state yet")
    if state is None or (step is not None and state.step != step):
        raise UsageError(f"--step {step}: the ledger in {run} leads to outer steps {steps[0]} to {steps[-1]}")
    return manifest, state


@contextmanager
def same_files(run: Path) -> Iterator[Path]:
    """Yields a folder with the same ledger: opening a ledger tidies it up, which its own peer alone may do. Hard links
    where the file system has them, copies elsewhere; always a copy of the chain, which its peer writes on in place."""
    try:
        temporary = tempfile.TemporaryDirectory(prefix=".view-", dir=run)
    except OSError:
        temporary = tempfile.TemporaryDirectory(prefix="p2p-diloco-")
    with temporary as folder:
        for pattern in ("snapshots/*.safetensors", "updates/*.update"):
            for path in (run / "ledger").glob(pattern):
                target = Path(folder) / path.relative_to(run)
                with disk_errors(target), contextlib.suppress(FileNotFoundError):  # the peer removes old ones
                    target.parent.mkdir(parents=True, exist_ok=True)
                    link_or_copy(path, target)
        for name in ("anchors", "chain"):  # the chain last, for it has all updates that are there
            target = Path(folder) / "ledger" / name
            with disk_errors(target), contextlib.suppress(FileNotFoundError):
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(run / "ledger" / name, target)
        yield Path(folder)


def link_or_copy(path: Path, target: Path) -> None:
    """Makes ``target`` a hard link to the file, or a copy of it where the file system has no links."""
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)
