from __future__ import annotations

from pathlib import Path
from typing import Literal

import datasets
import numpy as np
import pytest
import torch

from p2p_diloco.core.errors import DataError
from p2p_diloco.core.runfile import DataSpec
from p2p_diloco.lab.own_texts import by_source, clusters, features, own_texts_of, package_of
from p2p_diloco.learn import source
from p2p_diloco.learn.architecture import resolve_config
from p2p_diloco.learn.data import Corpus, open_corpus
from p2p_diloco.learn.model import build_model
from p2p_diloco.learn.text import Document, is_held_out
from p2p_diloco.learn.tokenizer import ByteTokenizer
from tests.support.small_runs import small_run


def documents_of(sizes: dict[str, int]) -> list[Document]:
    return [Document(f"{source}/{k}.py", "x" * 100) for source, count in sizes.items() for k in range(count)]


def test_sources_are_not_divided_and_shards_are_about_equal() -> None:
    documents = documents_of({"a": 5, "b": 4, "c": 3, "d": 3, "e": 1})
    labels = by_source(documents, 2)
    of_source = {package_of(document): label for document, label in zip(documents, labels)}
    assert [of_source[package_of(document)] for document in documents] == labels
    assert [labels.count(label) for label in range(2)] == [8, 8]
    assert package_of(Document("top.py", "")) == ""


def test_clusters_find_what_lies_together() -> None:
    rng = np.random.default_rng(0)
    table = np.concatenate([rng.normal(center, 0.1, (20, 3)) for center in (-5.0, 0.0, 5.0)])
    labels = clusters(table, 3, seed=1)
    assert labels == clusters(table, 3, seed=1)
    groups = [set(labels[first : first + 20]) for first in (0, 20, 40)]
    assert all(len(group) == 1 for group in groups)
    assert len(set.union(*groups)) == 3


def test_more_clusters_than_documents() -> None:
    with pytest.raises(DataError, match="does not fall into 5 clusters"):
        clusters(np.zeros((3, 2)), 5, seed=0)


@pytest.mark.parametrize("kind", ["path", "hub"])
def test_other_text_is_divided_by_what_a_model_makes_of_it(tmp_path: Path, kind: Literal["path", "hub"]) -> None:
    """Documents of digits, and of letters: one kind each, together all that is trained on, and the same held out."""
    texts = [("0123456789" if k % 2 else "etaoin shr") * (30 + k) for k in range(40)]
    if kind == "hub":
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "text")
    else:
        (tmp_path / "text").mkdir()
        for k, text in enumerate(texts):
            (tmp_path / "text" / f"{k}.txt").write_text(text)
    spec = DataSpec(source=kind, path="text", seq_len=16, held_out=0.2)
    corpus = open_corpus(spec, base=tmp_path, cache=tmp_path / "cache", run_seed=0, peer_id="a")
    config = resolve_config(small_run(tmp_path / "other").run.model, base=tmp_path, vocab_size=256)
    model = build_model(config, seed=0)
    divided = own_texts_of(
        corpus, spec, 2, reader="a", base=tmp_path, cache=tmp_path, tokenizer=ByteTokenizer(), model=model, seed=0
    )
    kinds = [{chr(token) for token in set(shard.train.tolist()) - {0}} for shard in divided]
    assert sorted(map(sorted, kinds)) == sorted([sorted("0123456789"), sorted("etaoin shr")])
    assert sum(len(shard.train) for shard in divided) == len(corpus.train)
    assert all(shard.held_out is corpus.held_out for shard in divided)
    assert model.training


def test_built_in_text_is_divided_by_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = documents_of({"nn": 6, "optim": 6})
    monkeypatch.setattr(source, "builtin_documents", lambda *_: iter(documents))
    corpus = open_corpus(
        DataSpec(source="path", path="text", seq_len=16, held_out=0.2),
        base=write_one(tmp_path),
        cache=tmp_path / "cache",
    )
    spec = DataSpec(seq_len=16, held_out=0.1)
    model = build_model({"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 256}, seed=0)
    divided = own_texts_of(
        corpus, spec, 2, reader="a", base=tmp_path, cache=tmp_path, tokenizer=ByteTokenizer(), model=model, seed=0
    )
    kept = [document for document in documents if not is_held_out(document.name, 0.1)]
    assert sum(len(shard.train) for shard in divided) == 101 * len(kept)


def test_a_shard_that_is_too_small_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "builtin_documents", lambda *_: iter(documents_of({"nn": 3})))
    what = small_run(tmp_path)
    corpus = open_corpus(what.run.data, base=tmp_path, cache=tmp_path / "cache")
    model = build_model({"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 256}, seed=0)
    with pytest.raises(DataError, match="shard 2 of 2 has 0 documents and 0 tokens, one sequence needs 17"):
        own_texts_of(
            corpus,
            DataSpec(seq_len=16),
            2,
            reader="a",
            base=tmp_path,
            cache=tmp_path,
            tokenizer=ByteTokenizer(),
            model=model,
            seed=0,
        )


def test_features_of_an_empty_document_are_finite(tmp_path: Path) -> None:
    config = resolve_config(small_run(tmp_path).run.model, base=tmp_path, vocab_size=256)
    table = features([Document("a", ""), Document("b", "text")], ByteTokenizer(), build_model(config, seed=0), 16)
    assert table.shape == (2, 16)
    assert np.isfinite(table).all()


def write_one(folder: Path) -> Path:
    small_run(folder)
    return folder


def divide(folder: Path, corpus: Corpus, spec: DataSpec, model: torch.nn.Module) -> list[Corpus]:
    """Between two."""
    tokenizer = ByteTokenizer()
    return own_texts_of(
        corpus, spec, 2, reader="a", base=folder, cache=folder, tokenizer=tokenizer, model=model, seed=0
    )
