"""One peer, top to bottom. Start reading here.

    join       the network process finds the run, downloads its state, and keeps this peer's place among the others
    learn      inner steps of AdamW on this peer's own batches, alone
    offer      at the end of H of them, or when the round closes: the outer step, the only time that peers exchange
    evaluate   one peer at a time evaluates theta on held-out text

A round that fails is no exception: training goes on from where it is. Ctrl+C, and the end of the run, leave politely:
others stop waiting for this peer, and its ledger and inner state are on the disk for the next start.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from p2p_diloco.core.config import cache_folder
from p2p_diloco.core.errors import DataError, Stopped, UsageError
from p2p_diloco.core.interruption import Stop
from p2p_diloco.core.manifest import RunManifest
from p2p_diloco.learn.data import Corpus, open_corpus
from p2p_diloco.learn.inner import INNER_FILE, InnerOptimizer, draws_drop, place_in_run
from p2p_diloco.learn.keeper import Keeper
from p2p_diloco.learn.model import evaluate, model_of, pick_device
from p2p_diloco.learn.source import source_of
from p2p_diloco.learn.swarm import Swarm
from p2p_diloco.learn.textreport import log_report
from p2p_diloco.peer.control import OuterResult

log = logging.getLogger(__name__)

SMALL_MODEL = 5_000_000
"""Parameters."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Is what a volunteer chooses about the training itself."""

    device: str = "auto"
    threads: int | None = None
    """Of the CPU; None chooses by the size of the model."""
    data: Path | None = None
    """This peer's own text, for runs without built-in text."""
    drop: float = 0.0
    """Probability that a contribution is dropped, as in the paper's ablation (arXiv 2311.08105, section 3)."""


def train(swarm: Swarm, choices: TrainConfig, stop: Stop) -> None:
    """Trains until the run is over or the user stops it, from inside ``stop_signals``. Raises LocalError."""
    manifest, spec = swarm.manifest, swarm.manifest.spec
    torch.set_num_threads(choices.threads or good_threads(manifest.n_params))
    device = pick_device(choices.device)
    corpus = open_run_corpus(manifest, choices.data, swarm.peer_id)
    log_report(corpus.report)
    model = model_of(manifest).to(device)
    swarm.load_into(model)
    inner = InnerOptimizer(model, spec, device)
    keeper = Keeper(inner, swarm.folder / INNER_FILE)
    resume(swarm, model, inner)
    log.info(
        "joined run %s at outer step %d of %d as %s; data: %s; device: %s",
        spec.name, swarm.step, spec.outer.steps, swarm.peer_id[-8:], corpus_name(manifest, choices.data), device,
    )  # fmt: skip
    evaluate_theta(swarm, model, corpus)

    with suppress(Stopped), stop.after_inner_step():
        while not swarm.done and not stop.requested:
            keeper.check()

            # Learn alone.
            batch_step = swarm.tokens_this_step // spec.tokens_per_inner_step
            loss = inner.step(
                corpus, peer_id=swarm.peer_id, at=place_in_run(spec, swarm.step, batch_step, swarm.inner_step)
            )
            swarm.report(loss, spec.tokens_per_inner_step)
            if not swarm.outer_step_due():
                continue

            # Offer what I learned, take what the group learned; tell how good it is, if it is my turn.
            with stop.at_once():
                result = swarm.outer_step(model, dropped=draws_drop(spec.seed, swarm.peer_id, swarm.step, choices.drop))
                log_result(swarm, result)
                if result.reason == "diverged":
                    inner.forget()
                evaluate_theta(swarm, model, corpus)
            if swarm.step % spec.round.snapshot_every == 0:
                keeper.begin(swarm.local, head=swarm.head, inner_step=swarm.inner_step, tokens=swarm.tokens_since_theta)
    keeper.finish()
    keep(swarm, inner)
    if swarm.done:
        log.info("the run is over: %d outer steps, head %s", swarm.step, swarm.head[:16])


def good_threads(n_params: int) -> int:
    """Returns how many threads to use for a model on the CPU. In a small one they mostly wait for each other: on a busy
    machine with two cores, an inner step of ``tiny`` took 0.2 s with one thread and 2 to 12 s with two."""
    return 1 if n_params < SMALL_MODEL else torch.get_num_threads()


def require_text(manifest: RunManifest, own_data: Path | None) -> None:
    """Raises UsageError where the run needs text that this peer does not bring; DataError where its files are not
    there. Looks for files and reads no text: to be asked before the state is downloaded."""
    spec = manifest.spec
    source_of(spec.data, base=None, cache=cache_folder(), override_path=own_data, run_seed=spec.seed, peer_id="")


def open_run_corpus(manifest: RunManifest, own_data: Path | None, peer_id: str) -> Corpus:
    """Returns the run's text for this machine, tokenized: built in, on the hub, or ``own_data``, a file or folder; a
    manifest is another's, and names no file here. Raises DataError when the built-in text is not the one that the run
    uses; UsageError where own text is needed, or the model does not know all tokens."""
    corpus = open_corpus(
        manifest.spec.data,
        base=None,
        cache=cache_folder(),
        tokenizer_json=manifest.tokenizer_json,
        override_path=own_data,
        run_seed=manifest.spec.seed,
        peer_id=peer_id,
    )
    if manifest.data_fingerprint and corpus.fingerprint != manifest.data_fingerprint:
        raise DataError(
            f"the built-in text of torch {torch.__version__} is not the one that this run uses; install the version of "
            f"torch that the run's owner has (any build of it), or ask for a run with other data"
        )
    known = manifest.transformers_config.get("vocab_size")
    if corpus.vocab_size != manifest.vocab_size or not isinstance(known, int) or known < corpus.vocab_size:
        raise UsageError(
            f"this run's manifest is not sound: its tokenizer has {corpus.vocab_size} tokens, its manifest says "
            f"{manifest.vocab_size}, and its model knows {known}; ask for another run"
        )
    return corpus


def corpus_name(manifest: RunManifest, own_data: Path | None) -> str:
    """Returns what a person calls the text that this peer trains on."""
    if own_data is None and manifest.spec.data.source == "hub":
        return str(manifest.spec.data.path)
    return "built-in text" if manifest.data_fingerprint else "own files"


def evaluate_theta(swarm: Swarm, model: torch.nn.Module, corpus: Corpus) -> None:
    """Evaluates theta on held-out text and tells the swarm its loss, if it is this peer's turn; else it does nothing.
    The model has its own parameters again afterwards."""
    if not swarm.evaluate_now:
        return
    started_s, spec = time.monotonic(), swarm.manifest.spec
    batches = corpus.held_out_batches(
        batch_size=spec.inner.batch_size, seq_len=spec.data.seq_len, max_tokens=spec.data.eval_tokens
    )
    with swarm.theta_in(model):
        loss = evaluate(model, batches)
    swarm.evaluated(loss, spec.data.eval_tokens, time.monotonic() - started_s)
    log.info("outer step %d: held-out loss %.4f nats per token", swarm.step, loss)


def log_result(swarm: Swarm, result: OuterResult) -> None:
    """Logs one line about an outer step: what it was, or why it was none."""
    if result.committed:
        log.info(
            "outer step %d: group of %d, loss %.4f, %.0f tokens/s, stalled %.2f s, sent %.2f MB, received %.2f MB",
            swarm.step, result.group, swarm.loss or float("nan"), swarm.tokens_per_s, result.stall_s,
            result.bytes_sent / 1e6, result.bytes_received / 1e6,
        )  # fmt: skip
    elif result.reason in ("diverged", "repaired"):
        log.info("outer step %d: back to theta (%s); what was learned since then is lost", swarm.step, result.reason)
    elif result.adopted:
        log.info("outer step %d: taken over from the swarm (%s)", swarm.step, result.reason)
    elif result.reason == "alone":
        log.info("outer step %d: training alone, waiting for peers", swarm.step)
    else:
        log.info("outer step %d: the round did not commit (%s); training on", swarm.step, result.reason)


def keep(swarm: Swarm, inner: InnerOptimizer) -> None:
    """Saves the inner state as it is now."""
    swarm.read_local(inner.model)
    inner.save(
        swarm.folder / INNER_FILE,
        swarm.local,
        head=swarm.head,
        inner_step=swarm.inner_step,
        tokens=swarm.tokens_since_theta,
    )


def resume(swarm: Swarm, model: torch.nn.Module, inner: InnerOptimizer) -> None:
    """Takes up the moments of an earlier start of this peer, and its local parameters, too, if the swarm has not moved
    on."""
    kept = inner.load(swarm.folder / INNER_FILE)
    if kept is None:
        return
    local, head, inner_step, tokens = kept
    if head == swarm.head and len(local) == len(swarm.local) and tokens > 0:
        swarm.restore_local(local, model, inner_step=inner_step, tokens=tokens)
        log.info("resumed at inner step %d", inner_step)
