"""Starting a run: from a run file to a signed manifest and S_0 in the owner's ledger.

Made once, by the owner. Everybody else downloads S_0 like any snapshot: a peer never invents it, since a fresh peer
whose random state becomes everybody's is a known way to ruin a run.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from p2p_diloco.core.codec import Vector
from p2p_diloco.core.config import cache_folder
from p2p_diloco.core.errors import LedgerError, OtherProtocol, UsageError, naming
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.manifest import MAX_MANIFEST_BYTES, RunManifest, TransformersConfig, canonical_json, open_manifest
from p2p_diloco.core.outer import genesis_state
from p2p_diloco.core.runfile import RunSpec
from p2p_diloco.learn.architecture import resolve_config
from p2p_diloco.learn.data import open_corpus
from p2p_diloco.learn.hub import check_data_set, find_model
from p2p_diloco.learn.model import build_model, check_causal, check_untrained, context_tokens, load_pretrained
from p2p_diloco.learn.parameters import Layout, layout_of, read_parameters
from p2p_diloco.learn.rehearsal import Rehearsal, rehearse
from p2p_diloco.learn.textreport import log_report
from p2p_diloco.learn.tokenizer import load_tokenizer_json, open_tokenizer
from p2p_diloco.ledger.disk import disk_errors, write_whole
from p2p_diloco.ledger.folder import MANIFEST_FILE, open_ledger, run_folder

log = logging.getLogger(__name__)


def start_run(run_file: Path, folder: Path, owner: Identity, identity_path: Path | None = None) -> Path:
    """Returns the path of the signed manifest in the run's folder below ``folder``. A run that the owner has already
    started from the same run file is taken up again. Raises LocalError that names file and key, before anything is
    written.

    ``identity_path``: where the owner's identity is kept once there is something to own."""
    spec, base = RunSpec.load(run_file), run_file.parent
    for path in sorted(folder.glob(f"{spec.name}-*/{MANIFEST_FILE}")):
        try:
            manifest = open_manifest(path.read_bytes(), str(path))
        except OtherProtocol:
            log.info("%s: a run of another protocol; it stays as it is, and a new one is started beside it", path)
            continue
        if manifest.spec == spec and manifest.owner == owner.peer_id:
            return path
    manifest, theta = make_manifest(spec, base, owner, str(run_file))
    if identity_path is not None and not identity_path.exists():
        owner.save(identity_path)
    target = run_folder(folder, manifest)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LedgerError(f"folder {target}: cannot be made ({error.strerror}); choose another --folder") from error
    state = genesis_state(theta)
    open_ledger(target, manifest).write_snapshot(state)
    signed = manifest.signed(owner)
    with disk_errors(target, len(signed)):
        write_whole(target / MANIFEST_FILE, [signed], len(signed))
    return target / MANIFEST_FILE


@dataclass(frozen=True, kw_only=True)
class Start:
    """A model that a run can start from."""

    config: TransformersConfig
    """The full transformers config."""
    layout: Layout
    theta: Vector
    """float32 [n], as built or loaded."""
    rehearsal: Rehearsal


def make_config(spec: RunSpec, base: Path, source: str, vocab_size: int) -> TransformersConfig:
    """Returns the full transformers config of a run. UsageError names ``source`` and the key. ``base``: what the paths
    in the spec are relative to. ``vocab_size``: of the tokenizer."""
    with naming(source):
        return resolve_config(spec.model, base=base, vocab_size=vocab_size)


def make_start(spec: RunSpec, config: TransformersConfig, base: Path, source: str, vocab_size: int) -> Start:
    """Returns the model of a run, built or loaded and tried as a peer will use it. ``config``: what
    ``make_config`` returns for the same other arguments. UsageError, which names ``source`` and the key or the tensor,
    for one that peers could not train."""
    with naming(source):
        if spec.model.path is None:
            model = build_model(config, seed=spec.seed)
        else:
            model = load_pretrained(find_model(spec.model.path, base, with_weights=True))
            check_untrained(model, config)
        layout = layout_of(model)
        theta = np.empty(layout.n, np.float32)
        read_parameters(model, theta)  # before anything is run: some types change their weights when they are
        longest = context_tokens(model)
        if longest is not None and spec.data.seq_len > longest:
            raise UsageError(f"key 'data.seq_len': {spec.data.seq_len}, but the model sees at most {longest} tokens")
        with torch.random.fork_rng(devices=[]):  # some types make layers anew for short sequences
            check_causal(model, vocab_size=vocab_size, seq_len=spec.data.seq_len)
            rehearsal = rehearse(model, theta, vocab_size=vocab_size, seq_len=spec.data.seq_len)
        return Start(config=config, layout=layout, theta=theta, rehearsal=rehearsal)


def make_manifest(spec: RunSpec, base: Path, owner: Identity, source: str) -> tuple[RunManifest, Vector]:
    """Returns the manifest and theta_0, float32 [n]. ``base``: what the paths in the spec are relative to."""
    with naming(source):
        tokenizer_json = load_tokenizer_json(spec.data, base)
    tokenizer = open_tokenizer(tokenizer_json)
    config = make_config(spec, base, source, tokenizer.vocab_size)  # before the text is read, which may take long
    fingerprint = ""
    if spec.data.source == "hub":
        check_data_set(spec.data, base)  # the owner may be a seed, which needs no text
    else:
        corpus = open_corpus(spec.data, base=base, cache=cache_folder(), tokenizer_json=tokenizer_json)
        log_report(corpus.report)
        fingerprint = corpus.fingerprint
    log.info("trying the model as a peer will use it, on %d tokens", spec.data.seq_len)
    start = make_start(spec, config, base, source, tokenizer.vocab_size)
    log.info("the model %s", start.rehearsal.line())
    manifest = RunManifest(
        spec=spec,
        model_config_json=canonical_json(start.config).decode(),
        n_params=start.layout.n,
        layout_digest=start.layout.digest,
        vocab_size=tokenizer.vocab_size,
        data_fingerprint=fingerprint,
        tokenizer_json=tokenizer_json,
        genesis=genesis_state(start.theta).digest().hex(),
        owner=owner.peer_id,
    )
    if len(manifest.signed(owner)) > MAX_MANIFEST_BYTES:
        raise UsageError(f"{source}: the tokenizer is too large to travel in a manifest of {MAX_MANIFEST_BYTES} bytes")
    return manifest, start.theta
