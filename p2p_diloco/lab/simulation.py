"""K replicas in one process, without a network: what a swarm of K peers does, bit for bit, and what studies vary.

    Simulation.open    the run and its S_0; or where an interrupted simulation of the same folder was
    outer_step         inner steps of one replica after another, then the round: contributions, parts, update, apply
    checkpoint         everything that is not computed anew from the run file, in one file, whole or not at all

The inner step, batches, codec, weights, reduction, update and outer step are the peer's own functions. The same file
and names give the same heads, also after an interruption, and also as a swarm of processes (``recount``).
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from p2p_diloco.core.aggregate import reduce_part
from p2p_diloco.core.codec import Vector
from p2p_diloco.core.config import cache_folder
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.manifest import RunManifest
from p2p_diloco.core.outer import OuterState, genesis_state
from p2p_diloco.core.roster import counted_weights, rank
from p2p_diloco.core.update import Part, Update, UpdateHeader
from p2p_diloco.lab.checkpoint import open_checkpoint, write_checkpoint
from p2p_diloco.lab.own_texts import shards_of, tokens_digest
from p2p_diloco.lab.recount import Past
from p2p_diloco.lab.simulated_run import SimulatedRun, members_at, replica_names
from p2p_diloco.lab.trainers import SimulatedTrainer, new_trainer, warm_start
from p2p_diloco.lab.variants import BITS, OuterRule, prune, quantize, quantized_bytes
from p2p_diloco.learn.data import Corpus, open_corpus
from p2p_diloco.learn.genesis import make_manifest
from p2p_diloco.learn.inner import draws_drop
from p2p_diloco.learn.model import build_model, evaluate, pick_device
from p2p_diloco.learn.parameters import layout_of, tie
from p2p_diloco.learn.textreport import log_report
from p2p_diloco.learn.tokenizer import open_tokenizer
from p2p_diloco.learn.train import good_threads
from p2p_diloco.ledger.disk import disk_errors, write_whole
from p2p_diloco.ledger.folder import MANIFEST_FILE, open_ledger

SUMMARY_FILE = "summary.json"
IDENTITY_FILE = "identity.key"
CHECKPOINT_SHARE = 0.05
"""Of the time, for checkpoints: a small simulation has one every second, a large one not all the time."""
EVALUATED_ROWS = 32
"""In one forward pass: small batches would take longer to evaluate on than to learn from."""


log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Point:
    """Of the curve: after ``step`` outer steps."""

    step: int
    head: str
    held_out_loss: float | None
    """Nats per token; None where theta was not evaluated, or is not finite."""
    loss: float | None
    """Mean of all replicas' inner steps; None before the first."""
    tokens: int
    """Trained on by all, since S_0."""
    sent_bytes: int
    """A contribution per outer step since S_0, as long as its encoding makes it: pruned or dropped or not."""

    def line(self) -> str:
        """For a person."""
        held_out = "not finite" if self.held_out_loss is None else f"{self.held_out_loss:.4f}"
        loss = "" if self.loss is None else f", loss {self.loss:.4f}"
        return f"outer step {self.step}: held-out loss {held_out}{loss}, {self.tokens / 1e6:.2f} M tokens"


@dataclass(kw_only=True)
class Simulation:
    what: SimulatedRun
    manifest: RunManifest
    folder: Path
    device: torch.device
    state: OuterState
    replicas: list[SimulatedTrainer]
    rule: OuterRule
    held_out: Corpus
    model: torch.nn.Module
    """Theta, for evaluation."""
    origin: dict[str, Any]
    """What its figures depend on, beside the run file: another start of it must have the same."""
    past: Past | None = None
    curve: list[Point] = field(default_factory=list)
    wall_s: float = 0.0
    """Of the starts before this one."""

    # -- life --------------------------------------------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        what: SimulatedRun,
        folder: Path,
        *,
        base: Path,
        device: str = "auto",
        threads: int | None = None,
        warm_folder: Path | None = None,
        past: Past | None = None,
    ) -> Simulation:
        """``base``: what the paths of the run are relative to. ``warm_folder``: where starts are kept that others have,
        too. Raises LocalError; UsageError when the folder holds another simulation."""
        spec, options, on = what.run, what.simulate, pick_device(device)
        with open_checkpoint(folder) as checkpoint:
            if checkpoint is not None:
                checkpoint.check_what(what)
        owner = Identity.load(folder / IDENTITY_FILE) or Identity.generate()
        manifest, theta = make_manifest(spec, base, owner, "the run file")
        if not (folder / IDENTITY_FILE).exists():  # only now: what is refused leaves nothing behind
            with disk_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
            owner.save(folder / IDENTITY_FILE)
        torch.set_num_threads(threads or good_threads(manifest.n_params))
        tokenizer_json = manifest.tokenizer_json
        names = list(past.names) if past else replica_names(options.most_replicas)
        corpora = [
            open_corpus(
                spec.data,
                base=base,
                cache=cache_folder(),
                tokenizer_json=tokenizer_json,
                run_seed=spec.seed,
                peer_id=name,
            )
            for name in (names[:1] if options.shards == "non-iid" else names)
        ]
        corpus = corpora[0]
        if spec.data.source == "hub":  # all else has told of its text in make_manifest
            for name, theirs in zip(names, corpora):
                log.info("what %s reads:", name)
                log_report(theirs.report)
        if options.warm_steps:
            theta = warm_start(what, manifest, theta, corpus, on, warm_folder or folder)
            manifest = manifest.with_genesis(genesis_state(theta).digest())
        model = build_model(manifest.transformers_config, seed=None).to(on)
        state = genesis_state(theta)
        tie(model, state.theta)
        if options.shards == "non-iid":
            tokenizer = open_tokenizer(tokenizer_json)
            corpora = shards_of(
                corpus,
                spec.data,
                len(names),
                reader=names[0],
                base=base,
                cache=cache_folder(),
                tokenizer=tokenizer,
                model=model,
                seed=spec.seed,
            )
        simulation = cls(
            what=what,
            manifest=manifest,
            folder=folder,
            device=on,
            state=state,
            replicas=[new_trainer(manifest, name, corpora[k], theta, on) for k, name in enumerate(names)],
            rule=OuterRule(
                spec=options,
                grid=manifest.grid,
                lr=spec.outer.lr,
                momentum=spec.outer.momentum,
                second=np.zeros_like(theta),
            ),
            held_out=corpus,
            model=model,
            origin={
                "genesis": state.digest().hex(),
                "text": corpus.identity,
                "names": names,
                "shards": tokens_digest(corpora).hex() if options.shards == "non-iid" else "",
                "device": on.type,
                "torch": torch.__version__,
            },
            past=past,
        )
        if not simulation._restore():
            simulation.curve.append(simulation._point(None, 0, 0))
        return simulation

    def run(self) -> Iterator[Point]:
        """To the end; yields every further point of the curve. The disk has the last checkpoint whenever it is stopped
        in between, and ``summary.json`` at the end."""
        began_s = kept_s = time.monotonic()
        before_s, cost_s = self.wall_s, 0.0
        while not self.done:
            point = self.outer_step()
            now_s = time.monotonic()
            self.wall_s = before_s + now_s - began_s
            if self.done or cost_s <= CHECKPOINT_SHARE * (now_s - kept_s):
                self.checkpoint()
                kept_s = time.monotonic()
                cost_s = kept_s - now_s
            yield point
        self.write_summary()

    @property
    def done(self) -> bool:
        last = self.what.run.outer.steps if self.past is None else len(self.past.inner_steps)
        return self.state.step >= last or self.diverged

    @property
    def diverged(self) -> bool:
        """Theta is not finite: nothing will come of it."""
        return not np.isfinite(self.state.theta).all()

    def differing_heads(self) -> list[int]:
        """Outer steps at which it has another head than the swarm that it recounts."""
        heads = {} if self.past is None else self.past.heads
        return [point.step for point in self.curve if point.step in heads and point.head != heads[point.step]]

    # -- one outer step ----------------------------------------------------------------------------------------------

    def outer_step(self) -> Point:
        """Learn alone, one replica after another; offer, reduce, apply; take."""
        spec, options, step = self.what.run, self.what.simulate, self.state.step
        members = [self.replicas[k] for k in self._members(step)]
        losses, trained = [], 0
        for k, replica in zip(self._members(step), members):
            inner_steps = self._inner_steps(step, k)
            losses += replica.learn(self.what, self.state, inner_steps)
            trained += sum(inner_steps) * spec.tokens_per_inner_step
        members.sort(key=lambda replica: rank(self.state.head, replica.name))
        diverged = {replica.name for replica in members if not np.isfinite(replica.local).all()}
        dropped = diverged | {replica.name for replica in members if self._is_dropped(step, replica)}
        update, sent_bytes = self._reduce(members, dropped)
        self.rule.step(self.state, update)
        late = {replica.name for replica in members} - dropped if options.delay and not self.done else set()
        for replica in self.replicas:
            if replica.name in diverged:  # as a peer does: it takes theta, and begins with new moments
                replica.inner.forget()
            elif replica.name in dropped and spec.round.on_missed == "keep":
                continue
            replica.tokens = 0
            replica.late = replica.name in late
            if not replica.late:
                replica.local[:] = self.state.theta
                replica.write_local()
        mean_loss = sum(losses) / len(losses)
        self.curve.append(self._point(mean_loss if np.isfinite(mean_loss) else None, trained, sent_bytes))
        return self.curve[-1]

    def _members(self, step: int) -> list[int]:
        if self.past is not None:
            there = self.past.inner_steps[step]
            return [k for k, replica in enumerate(self.replicas) if replica.name in there]
        names = [replica.name for replica in self.replicas]
        return members_at(self.what.simulate, names, step, self.what.run.outer.steps)

    def _inner_steps(self, step: int, k: int) -> tuple[int, ...]:
        if self.past is not None:
            return self.past.inner_steps[step][self.replicas[k].name]
        return (self.what.simulate.inner_steps_of(k, self.what.run.inner.steps),)

    def _is_dropped(self, step: int, replica: SimulatedTrainer) -> bool:
        if self.past is not None:
            return replica.name in self.past.dropped[step]
        return draws_drop(self.what.run.seed, replica.name, step, self.what.simulate.drop)

    def _reduce(self, members: Sequence[SimulatedTrainer], dropped: set[str]) -> tuple[Update, int]:
        """The update of a round of ``members``, in the order of rank; and the bytes of one contribution."""
        spec, options, state = self.what.run, self.what.simulate, self.state
        grid, lossy = self.manifest.grid, options.quantize
        policy = options.divided_by(spec.round.on_missed)
        claimed = [min(replica.tokens, spec.max_weight_tokens) for replica in members]
        weights, total_weight = counted_weights(claimed, policy, absent=0)
        offered = {i: self._outer_gradient(replica) for i, replica in enumerate(members) if replica.name not in dropped}
        parts = []
        for i, where in enumerate(grid.slices):
            came = {who: grid.decode(i, grid.encode(gradient[where])) for who, gradient in offered.items()}
            part = reduce_part(came, weights, i, grid, total_weight)
            if lossy != "none":
                part = Part(mask=part.mask, data=grid.encode(quantize(grid.decode(i, part.data), lossy)))
            parts.append(part)
        contributors = tuple((replica.name, weight) for replica, weight in zip(members, weights))
        header = UpdateHeader(
            step=state.step,
            parent=state.head,
            contributors=contributors,
            part_hashes=tuple(part.hash for part in parts),
        )
        return Update(header=header, parts=tuple(parts)), self._contribution_bytes()

    def _outer_gradient(self, replica: SimulatedTrainer) -> Vector:
        """float32 [n]: theta - local, and what is left of it."""
        gradient: Vector = np.subtract(self.state.theta, replica.local)
        options = self.what.simulate
        if options.prune:
            prune(gradient, layout_of(replica.inner.model), options.prune)
        return gradient if options.quantize == "none" else quantize(gradient, options.quantize)

    def _contribution_bytes(self) -> int:
        grid, lossy = self.manifest.grid, self.what.simulate.quantize
        return quantized_bytes(grid.n, lossy) if lossy in BITS else grid.vector_bytes

    def _point(self, loss: float | None, tokens: int, sent_bytes: int) -> Point:
        """The next point of the curve; theta is evaluated if it is time to."""
        spec, step = self.what.run, self.state.step
        last = self.curve[-1] if self.curve else None
        held_out: float | None = None
        if (step % self.what.simulate.evaluate_every == 0 or self.done) and not self.diverged:
            batches = self.held_out.held_out_batches(
                batch_size=EVALUATED_ROWS, seq_len=spec.data.seq_len, max_tokens=spec.data.eval_tokens
            )
            tie(self.model, self.state.theta)
            held_out = evaluate(self.model, batches)
        return Point(
            step=step,
            head=self.state.head.hex(),
            held_out_loss=held_out if held_out is not None and np.isfinite(held_out) else None,
            loss=loss,
            tokens=tokens + (last.tokens if last else 0),
            sent_bytes=sent_bytes + (last.sent_bytes if last else 0),
        )

    # -- on disk -----------------------------------------------------------------------------------------------------

    def checkpoint(self) -> None:
        """Whole or not at all. LedgerError on a full disk."""
        tensors = {name: torch.from_numpy(vector) for name, vector in self._vectors().items()}
        counts = []
        for k, replica in enumerate(self.replicas):
            moments, steps = replica.inner.moments()
            tensors |= {f"{k}.{name}": tensor for name, tensor in moments.items()}
            counts.append({"steps": steps, "tokens": replica.tokens, "late": replica.late})
        facts = {
            "what": json.loads(self.what.model_dump_json()),
            "step": self.state.step,
            "head": self.state.head.hex(),
            "replicas": counts,
            "curve": [vars(point) for point in self.curve],
            "wall_s": self.wall_s,
            "origin": self.origin,
        }
        write_checkpoint(self.folder, tensors, facts)

    def _vectors(self) -> dict[str, Vector]:
        vectors = {"theta": self.state.theta, "momentum": self.state.momentum, "second": self.rule.second}
        return vectors | {f"{k}.local": replica.local for k, replica in enumerate(self.replicas)}

    def _restore(self) -> bool:
        """False when there is nothing to go on from."""
        with open_checkpoint(self.folder) as checkpoint:
            if checkpoint is None:
                return False
            checkpoint.check_origin(self.origin)
            facts = checkpoint.facts
            for name, vector in self._vectors().items():
                vector[:] = checkpoint.file.get_tensor(name).numpy()
            for k, (replica, counts) in enumerate(zip(self.replicas, facts["replicas"])):
                moments = checkpoint.tensors(f"{k}.exp_avg")
                replica.inner.restore(
                    {name.partition(".")[2]: moment for name, moment in moments.items()}, counts["steps"]
                )
                replica.tokens, replica.late = counts["tokens"], counts["late"]
                replica.write_local()
            self.state.step, self.state.head = facts["step"], bytes.fromhex(facts["head"])
            self.curve = [Point(**point) for point in facts["curve"]]
            self.wall_s = facts["wall_s"]
        return True

    def write_summary(self) -> dict[str, Any]:
        """What became of it; and theta as a run that ``export`` and ``sample`` read."""
        signed = self.manifest.signed(Identity.load_or_create(self.folder / IDENTITY_FILE))
        with disk_errors(self.folder, len(signed)):
            write_whole(self.folder / MANIFEST_FILE, [signed], len(signed))
        open_ledger(self.folder, self.manifest).write_snapshot(self.state)
        summary = {
            "what": json.loads(self.what.model_dump_json()),
            "run_id": self.manifest.run_id,
            "digest": self.state.digest().hex(),
            "heads": {point.step: point.head for point in self.curve},
            "held_out": [(point.step, point.held_out_loss) for point in self.curve if point.held_out_loss is not None],
            "curve": [vars(point) for point in self.curve],
            "wall_s": self.wall_s,
            "torch": torch.__version__,
            "device": str(self.device),
        }
        data = json.dumps(summary, indent=1).encode() + b"\n"
        write_whole(self.folder / SUMMARY_FILE, [data], len(data))
        return summary
