"""Text of one's own for every replica: what the paper calls non-i.i.d. data (arXiv 2311.08105, section 3).

The built-in text is divided by its source, the package of torch that a file belongs to; other text by clustering what a
model makes of its documents, as in the paper: k-means on the mean of the last hidden states. Of a data set of the hub
one reader's documents, ``max_documents`` in all, are divided so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from p2p_diloco.core.digest import digest
from p2p_diloco.core.errors import DataError
from p2p_diloco.core.runfile import DataSpec
from p2p_diloco.learn.data import Corpus
from p2p_diloco.learn.source import source_of
from p2p_diloco.learn.text import Document, nobody_trains_on
from p2p_diloco.learn.textreport import TextTally
from p2p_diloco.learn.tokenizer import Tokenizer, Tokens

ENCODED_DOCUMENTS = 256
KMEANS_STEPS = 100
KMEANS_STARTS = 10


def own_texts_of(
    corpus: Corpus,
    spec: DataSpec,
    count: int,
    *,
    reader: str,
    base: Path,
    cache: Path,
    tokenizer: Tokenizer,
    model: torch.nn.Module,
    seed: int,
) -> list[Corpus]:
    """Returns ``count`` corpora that have no training document in common, and all held-out text of ``corpus``, which is
    that of ``reader``. In memory: all training text, and its tokens. A data set of the hub is read anew each time.
    ``model``: for text that has no sources. DataError when a shard is too small."""
    text = source_of(spec, base=base, cache=cache, override_path=None, run_seed=seed, peer_id=reader)
    documents = training_documents(text.documents(TextTally()), spec)
    if spec.source == "builtin":
        labels = by_source(documents, count)
    else:
        labels = clusters(features(documents, tokenizer, model, spec.seq_len), count, seed)
    corpora = []
    for label in range(count):
        mine = [document for document, theirs in zip(documents, labels) if theirs == label]
        tokens = encoded(mine, tokenizer)
        if len(tokens) < spec.seq_len + 1:
            raise DataError(
                f"shard {label + 1} of {count} has {len(mine)} documents and {len(tokens)} tokens, one sequence needs "
                f'{spec.seq_len + 1}; take fewer replicas, more text, or shards = "iid"'
            )
        corpora.append(replace(corpus, train=tokens))
    return corpora


def encoded(documents: Sequence[Document], tokenizer: Tokenizer) -> Tokens:
    """Returns the tokens of all, made of some at a time: on its way to an array, a token takes many times as much
    memory."""
    starts = range(0, max(len(documents), 1), ENCODED_DOCUMENTS)
    return np.concatenate(
        [tokenizer.encode_documents(documents[start : start + ENCODED_DOCUMENTS]) for start in starts]
    )


def tokens_digest(corpora: Sequence[Corpus]) -> bytes:
    """Returns a digest of what they train on."""
    return digest(b"shards", *(corpus.train.tobytes() for corpus in corpora))


def training_documents(documents: Iterable[Document], spec: DataSpec) -> list[Document]:
    """Returns the documents that are not held out."""
    return [document for document in documents if not nobody_trains_on(document, spec.held_out)]


def by_source(documents: Sequence[Document], count: int) -> list[int]:
    """Returns a number for every document, that of the corpus it goes to: whole packages, the largest first, each to
    the corpus that is smallest then."""
    chars: dict[str, int] = {}
    for document in documents:
        chars[package_of(document)] = chars.get(package_of(document), 0) + len(document.text)
    sizes, taker = [0] * count, dict[str, int]()
    for source in sorted(chars, key=lambda source: (-chars[source], source)):
        taker[source] = sizes.index(min(sizes))
        sizes[taker[source]] += chars[source]
    return [taker[package_of(document)] for document in documents]


def package_of(document: Document) -> str:
    """Returns the first folder of its name; files that are in none are one source."""
    folder, slash, _ = document.name.partition("/")
    return folder if slash else ""


@torch.inference_mode()
def features(
    documents: Sequence[Document], tokenizer: Tokenizer, model: torch.nn.Module, seq_len: int
) -> npt.NDArray[np.float64]:
    """Returns float64 [documents, hidden]: the mean of the last hidden states over the first ``seq_len`` tokens of
    each, each direction scaled to unit variance."""
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    rows = []
    for document in documents:
        tokens = tokenizer.encode(document.text[: 16 * seq_len])[:seq_len].astype(np.int64)
        batch = torch.from_numpy(tokens if len(tokens) else np.zeros(1, np.int64)).to(device)[None]  # [1, tokens]
        hidden = model(input_ids=batch, use_cache=False, output_hidden_states=True).hidden_states[-1]
        rows.append(hidden[0].float().mean(dim=0).cpu().numpy().astype(np.float64))  # [hidden]
    model.train(was_training)
    table = np.stack(rows)
    spread = table.std(axis=0)
    scaled: npt.NDArray[np.float64] = (table - table.mean(axis=0)) / np.where(spread > 0, spread, 1)
    return scaled


def clusters(table: npt.NDArray[np.float64], count: int, seed: int) -> list[int]:
    """Returns the number of a cluster for every row of ``table``, [rows, features], found by k-means; the same for the
    same seed. DataError when one is empty, wherever the means start."""
    from scipy.cluster.vq import ClusterError, kmeans2

    if len(np.unique(table, axis=0)) >= count:
        for start in range(KMEANS_STARTS):
            rng = np.random.default_rng([seed, start])
            with suppress(ClusterError):  # a cluster is empty
                _, labels = kmeans2(table, count, iter=KMEANS_STEPS, minit="++", rng=rng, missing="raise")
                return [int(label) for label in labels]
    raise DataError(f"the text does not fall into {count} clusters; take fewer replicas, or more text")
