"""What ``p2p-diloco manifest`` says of a run, or of a run file: a text for each of some names, in the order shown."""

from __future__ import annotations

from pathlib import Path

from p2p_diloco.core.config import cache_folder
from p2p_diloco.core.errors import UsageError, naming
from p2p_diloco.core.interruption import importing
from p2p_diloco.core.manifest import RunManifest
from p2p_diloco.core.paths import beside
from p2p_diloco.core.runfile import DataSpec, RunSpec
from p2p_diloco.learn.data import open_corpus
from p2p_diloco.learn.hub import PREFIX, check_data_set
from p2p_diloco.learn.tokenizer import load_tokenizer_json, open_tokenizer


def describe_run(manifest: RunManifest) -> dict[str, str]:
    """Returns the description of a run whose manifest has a valid signature."""
    of_spec = describe_spec(manifest.spec, manifest.n_params, str(manifest.transformers_config["model_type"]))
    tokenizer = "of the run, in the manifest" if manifest.tokenizer_json else "bytes"
    return {
        "run": manifest.spec.name,
        "run id": manifest.run_id,
        "owner": manifest.owner,
        "signature": "valid: the owner's",
        "protocol": str(manifest.protocol),
        **of_spec,
        "tokenizer": f"{tokenizer}, {manifest.vocab_size} tokens",
        "layout": manifest.layout_digest,
        "genesis": manifest.genesis,
    }


def describe_run_file(path: Path) -> dict[str, str]:
    """Returns the description of what a run file would start, after trying it. Raises LocalError that names what is
    wrong."""
    spec, base = RunSpec.load(path), path.parent
    with naming(str(path)):
        tokenizer_json = load_tokenizer_json(spec.data, base)
    tokenizer = open_tokenizer(tokenizer_json)
    if spec.data.source == "path" and spec.data.path is not None:
        text = beside(base, spec.data.path, "data.path")
        if not text.exists():
            raise UsageError(f"{path}: key 'data.path': no such file or folder: {text}")

    with importing("manifest"):
        from p2p_diloco.learn.genesis import make_config, make_start
        from p2p_diloco.learn.model import require_weights

    if spec.model.path is not None and not spec.model.path.startswith(PREFIX):
        require_weights(beside(base, spec.model.path, "model.path"))
    config = make_config(spec, base, str(path), tokenizer.vocab_size)
    start = make_start(spec, config, base, str(path), tokenizer.vocab_size)
    return {
        "run file": f"{path}: sound",
        "run": spec.name,
        **describe_spec(spec, start.layout.n, str(start.config["model_type"])),
        "tried": start.rehearsal.line(),
        **describe_text(spec.data, base, tokenizer_json),
    }


def describe_text(data: DataSpec, base: Path, tokenizer_json: str) -> dict[str, str]:
    """Returns what there is of text. It is all read for that, and its tokens are kept where a seed then finds them; of
    a data set of the hub, the first document of each split is read."""
    if data.source == "hub":
        check_data_set(data, base)
        return {"text": f"a part of {data.path} for each peer, at most {data.max_documents} documents; not read here"}
    report = open_corpus(data, base=base, cache=cache_folder(), tokenizer_json=tokenizer_json).report
    skipped = "; ".join(kind.line for kind in report.skipped)
    return {"text": report.read, "skipped": skipped} if skipped else {"text": report.read}


def describe_spec(spec: RunSpec, n_params: int, model_type: str) -> dict[str, str]:
    """Returns what a run file and the size of its model say."""
    inner, outer, data = spec.inner, spec.outer, spec.data
    tokens = outer.steps * inner.steps * spec.tokens_per_inner_step
    invited = {"membership": "by invitation of the run's owner"} if spec.membership == "invite" else {}
    return {
        **invited,
        "model": f"{model_type}, {n_params} parameters" + (f", from {spec.model.path}" if spec.model.path else ""),
        "data": f"{data.path or 'built-in text'}, {data.seq_len} tokens in a sequence",
        "inner steps": f"{inner.steps} of {spec.tokens_per_inner_step} tokens, learning rate {inner.lr:g}",
        "outer steps": f"{outer.steps}, learning rate {outer.lr:g}, momentum {outer.momentum:g}, codec {outer.codec}",
        "group": f"{spec.round.min_group} to {spec.round.max_group} peers, gathered for {spec.round.gather_s:g} s",
        "tokens": f"{tokens} for every peer that trains from start to end",
    }
