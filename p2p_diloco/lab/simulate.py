"""Simulations from a run file to their end, and what they leave in a folder.

    open_simulation    the run and its S_0; or where an interrupted simulation of the same folder was
    run                one outer step after another, with checkpoints; at the end ``summary.json``, and theta as a run

A checkpoint has everything that is not computed anew from the run file, in one file, whole or not at all.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from p2p_diloco.core.codec import Vector
from p2p_diloco.core.config import cache_folder
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.manifest import RunManifest
from p2p_diloco.core.outer import genesis_state
from p2p_diloco.lab.checkpoint import Origin, open_checkpoint, write_checkpoint
from p2p_diloco.lab.own_texts import own_texts_of, tokens_digest
from p2p_diloco.lab.recount import Past
from p2p_diloco.lab.simulated_run import SimulatedRun, replica_names
from p2p_diloco.lab.simulation import Simulation
from p2p_diloco.lab.simulation_result import SUMMARY_FILE, Point, Summary
from p2p_diloco.lab.trainers import new_trainer, warm_start
from p2p_diloco.lab.variants import OuterRule
from p2p_diloco.learn.data import Corpus, open_corpus
from p2p_diloco.learn.genesis import make_manifest
from p2p_diloco.learn.model import build_model, pick_device
from p2p_diloco.learn.parameters import tie
from p2p_diloco.learn.textreport import log_report
from p2p_diloco.learn.tokenizer import open_tokenizer
from p2p_diloco.learn.train import good_threads
from p2p_diloco.ledger.disk import disk_errors, write_whole
from p2p_diloco.ledger.folder import MANIFEST_FILE, open_ledger, read_manifest

log = logging.getLogger(__name__)

IDENTITY_FILE = "identity.key"
CHECKPOINT_SHARE = 0.05
"""Of the time, for checkpoints: a small simulation has one every second, a large one not all the time."""


# -- to begin, or to go on ---------------------------------------------------------------------------------------------


def open_simulation(
    what: SimulatedRun,
    folder: Path,
    *,
    base: Path,
    device: str = "auto",
    threads: int | None = None,
    warm_folder: Path | None = None,
    past: Past | None = None,
) -> Simulation:
    """Returns the simulation of ``folder``: a new one, or where an interrupted one was. ``base``: what the paths of the
    run are relative to. ``warm_folder``: where starts are kept that others have, too. ``past``: what a swarm did, to be
    done again. Raises LocalError; UsageError when the folder holds another simulation."""
    spec, options, on = what.run, what.simulate, pick_device(device)
    check_folder(folder, what)
    manifest, theta = begin(what, folder, base)
    torch.set_num_threads(threads or good_threads(manifest.n_params))
    names = list(past.names) if past else replica_names(options.most_replicas)
    corpora = texts_of(what, manifest, names[:1] if options.shards == "non-iid" else names, base)
    held_out = corpora[0]
    if options.warm_steps:
        theta = warm_start(what, manifest, theta, held_out, on, warm_folder or folder)
        manifest = manifest.with_genesis(genesis_state(theta).digest())
    model, state = build_model(manifest.transformers_config, seed=None).to(on), genesis_state(theta)
    tie(model, state.theta)
    if options.shards == "non-iid":
        corpora = divided(held_out, what, manifest, names, base, model)
    origin = Origin(
        genesis=state.digest().hex(),
        text=held_out.identity,
        names=names,
        shards=tokens_digest(corpora).hex() if options.shards == "non-iid" else "",
        device=on.type,
        torch=torch.__version__,
    )
    simulation = Simulation(
        what=what,
        manifest=manifest,
        folder=folder,
        device=on,
        state=state,
        replicas=[new_trainer(manifest, name, own, theta, on) for name, own in zip(names, corpora)],
        rule=OuterRule(
            spec=options,
            grid=manifest.grid,
            lr=spec.outer.lr,
            momentum=spec.outer.momentum,
            second=np.zeros_like(theta),
        ),
        held_out=held_out,
        model=model,
        origin=origin,
        past=past,
    )
    if not restore(simulation):
        simulation.add_point(None, 0, 0)
    return simulation


def check_folder(folder: Path, what: SimulatedRun) -> None:
    """Raises LocalError where the folder holds what must stay as it is: another simulation, or one of another
    protocol."""
    with open_checkpoint(folder) as checkpoint:
        if checkpoint is not None:
            checkpoint.check_what(what)
    if (folder / MANIFEST_FILE).exists():
        read_manifest(folder)


def begin(what: SimulatedRun, folder: Path, base: Path) -> tuple[RunManifest, Vector]:
    """Returns the manifest and theta of S_0, and makes ``folder`` with the owner's key, if it is not there. What is
    refused leaves nothing behind."""
    owner = Identity.load(folder / IDENTITY_FILE) or Identity.generate()
    manifest, theta = make_manifest(what.run, base, owner, "the run file")
    if not (folder / IDENTITY_FILE).exists():
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        owner.save(folder / IDENTITY_FILE)
    return manifest, theta


def texts_of(what: SimulatedRun, manifest: RunManifest, names: Sequence[str], base: Path) -> list[Corpus]:
    """Returns what each of ``names`` reads, as a peer of that name would. Logs what that is where ``make_manifest`` has
    not: of a data set of the hub."""
    data = what.run.data
    corpora = [
        open_corpus(
            data,
            base=base,
            cache=cache_folder(),
            tokenizer_json=manifest.tokenizer_json,
            run_seed=what.run.seed,
            peer_id=name,
        )
        for name in names
    ]
    if data.source == "hub":
        for name, corpus in zip(names, corpora):
            log.info("what %s reads:", name)
            log_report(corpus.report)
    return corpora


def divided(
    corpus: Corpus,
    what: SimulatedRun,
    manifest: RunManifest,
    names: Sequence[str],
    base: Path,
    model: torch.nn.Module,
) -> list[Corpus]:
    """Returns what each of ``names`` reads where everybody has text of its own: a part of what the first one would
    read, which is ``corpus``. ``model``: as of S_0."""
    return own_texts_of(
        corpus,
        what.run.data,
        len(names),
        reader=names[0],
        base=base,
        cache=cache_folder(),
        tokenizer=open_tokenizer(manifest.tokenizer_json),
        model=model,
        seed=what.run.seed,
    )


# -- to its end --------------------------------------------------------------------------------------------------------


def run(simulation: Simulation) -> Iterator[Point]:
    """Makes all outer steps that are left, and yields the point of each. The disk has the last checkpoint whenever it
    is stopped in between, and what ``write_summary`` writes at the end."""
    began_s = kept_s = time.monotonic()
    before_s, cost_s = simulation.wall_s, 0.0
    while not simulation.done:
        point = simulation.outer_step()
        now_s = time.monotonic()
        simulation.wall_s = before_s + now_s - began_s
        if simulation.done or cost_s <= CHECKPOINT_SHARE * (now_s - kept_s):
            save_checkpoint(simulation)
            kept_s = time.monotonic()
            cost_s = kept_s - now_s
        yield point
    write_summary(simulation)


def write_summary(simulation: Simulation) -> None:
    """Writes what became of it; and theta as a run that ``export`` and ``sample`` read."""
    folder, state, curve = simulation.folder, simulation.state, tuple(simulation.curve)
    signed = simulation.manifest.signed(Identity.load_or_create(folder / IDENTITY_FILE))
    with disk_errors(folder, len(signed)):
        write_whole(folder / MANIFEST_FILE, [signed], len(signed))
    open_ledger(folder, simulation.manifest).write_snapshot(state)
    summary = Summary(
        what=simulation.what,
        run_id=simulation.manifest.run_id,
        digest=state.digest().hex(),
        heads={point.step: point.head for point in curve},
        held_out=tuple((point.step, point.held_out_loss) for point in curve if point.held_out_loss is not None),
        curve=curve,
        wall_s=simulation.wall_s,
        torch=torch.__version__,
        device=str(simulation.device),
    )
    data = summary.to_json()
    write_whole(folder / SUMMARY_FILE, [data], len(data))


# -- in between --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Says how far one replica is."""

    steps: dict[str, float]
    """Of AdamW, as ``InnerOptimizer.moments`` has them."""
    tokens: int
    late: bool


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Holds what a checkpoint says beside its tensors; its fields are keys in the file."""

    what: SimulatedRun
    step: int
    head: str
    replicas: tuple[Counts, ...]
    curve: tuple[Point, ...]
    wall_s: float
    origin: Origin

    def to_json(self) -> str:
        """Returns the JSON that ``restore`` reads."""
        return json.dumps(
            {
                **vars(self),
                "what": json.loads(self.what.model_dump_json()),
                "replicas": [asdict(counts) for counts in self.replicas],
                "curve": [asdict(point) for point in self.curve],
                "origin": asdict(self.origin),
            }
        )


def save_checkpoint(simulation: Simulation) -> None:
    """Writes a checkpoint, whole or not at all. LedgerError on a full disk."""
    tensors = {name: torch.from_numpy(vector) for name, vector in vectors_of(simulation).items()}
    replicas = []
    for k, replica in enumerate(simulation.replicas):
        moments, steps = replica.inner.moments()
        tensors |= {f"{k}.{name}": tensor for name, tensor in moments.items()}
        replicas.append(Counts(steps=steps, tokens=replica.tokens, late=replica.late))
    facts = Facts(
        what=simulation.what,
        step=simulation.state.step,
        head=simulation.state.head.hex(),
        replicas=tuple(replicas),
        curve=tuple(simulation.curve),
        wall_s=simulation.wall_s,
        origin=simulation.origin,
    )
    write_checkpoint(simulation.folder, tensors, facts.to_json())


def vectors_of(simulation: Simulation) -> dict[str, Vector]:
    """Returns all vectors that a checkpoint has, by their names in it."""
    state = simulation.state
    vectors = {"theta": state.theta, "momentum": state.momentum, "second": simulation.rule.second}
    return vectors | {f"{k}.local": replica.local for k, replica in enumerate(simulation.replicas)}


def restore(simulation: Simulation) -> bool:
    """Takes it to where the checkpoint of its folder was made; returns False when there is none."""
    with open_checkpoint(simulation.folder) as checkpoint:
        if checkpoint is None:
            return False
        checkpoint.check_origin(simulation.origin)
        facts = checkpoint.facts
        for name, vector in vectors_of(simulation).items():
            vector[:] = checkpoint.file.get_tensor(name).numpy()
        for k, (replica, counts) in enumerate(zip(simulation.replicas, facts["replicas"])):
            moments = checkpoint.tensors(f"{k}.exp_avg")
            replica.inner.restore({name.partition(".")[2]: moment for name, moment in moments.items()}, counts["steps"])
            replica.tokens, replica.late = counts["tokens"], counts["late"]
            replica.write_local()
        simulation.state.step, simulation.state.head = facts["step"], bytes.fromhex(facts["head"])
        simulation.curve = [Point(**point) for point in facts["curve"]]
        simulation.wall_s = facts["wall_s"]
    return True
