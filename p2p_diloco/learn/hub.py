"""What the Hugging Face hub has under a name -> documents, a tokenizer, a model's folder.

    hub_documents   a data set, streamed: C4, FineWeb-Edu; or a local folder of the datasets library
    find_tokenizer  a tokenizer.json
    find_model      a folder with config and weights

Streams of the datasets library can be resumed exactly, but not once they are shuffled, and a position in a stream is a
state that a peer could lose. So a peer reads once, a bounded number of documents, into its own token cache, and draws
batches from there: a function of run seed, peer id and step alone, as with any other text.

    which documents   shards (files, or row groups of parquet files) in an order of the peer's own, by a hash of run
                      seed and peer id. Two peers may draw the same shard; nobody coordinates
    held out          by a hash of the text, so that nobody trains on it, whatever shard it is in and how often. All
                      evaluate on the first of these in the data set's order; or on the first of a split of their own

What it costs: a peer downloads its documents before its first inner step, and those before the held-out ones, which are
a small share of them; a peer that is new downloads anew, also beside another one on the same machine; a download that
breaks off starts over. On the disk lie tokens alone, 1, 2 or 4 bytes each. After that no network is needed, but for
simulations that divide the data set (``own_texts``): these read it again at each start.

Unless a name has @REVISION at its end, a peer that comes later reads what the hub has by then.

Nothing here has ever talked to the hub itself. What the tests run is the same code on local folders, on a folder in the
form of the hub's cache, and on names that cannot be reached.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from p2p_diloco.core.digest import digest
from p2p_diloco.core.errors import DataError, LocalError, UsageError
from p2p_diloco.core.paths import beside
from p2p_diloco.core.runfile import DataSpec
from p2p_diloco.learn.text import Document, is_held_out, kept, named_by_text
from p2p_diloco.learn.textreport import TextTally

log = logging.getLogger(__name__)

PREFIX = "hub:"
"""Before a name where a path may stand, too."""
DATA_SET_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@\w[\w.-]*(/\w[\w.-]*)*)?", re.ASCII)
"""Always with an owner: a single word such as ``json`` is a reader of the datasets library, which would take the files
of the current folder. A revision is no way up to another folder either."""
ON_THE_HUB = "hf://datasets/"
"""Before a name, it is looked up there alone; without, the library takes a folder of that name, if there is one."""
ANSWER_S = 10
"""How long the hub has to answer at all. The libraries would try again for half a minute."""
PIECES = 16
"""A data set of fewer shards is cut further, so that peers read different parts of it."""
SAVED_SHARDS = 64
"""Of a saved data set, which can be cut anywhere; each takes the library some milliseconds to make."""
CHARS_PER_TOKEN = 8
"""More than a tokenizer makes of a token; held-out text is read for so many."""
HELD_OUT_KEY = "data.held_out_split"
LOG_DOCUMENTS = 10_000
"""Between two lines of the log."""
END_FILES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json")
"""What may say, beside a tokenizer.json, which of its tokens ends a document; the first one that does is believed."""
TOKENIZER_FILES = ("tokenizer.json", *END_FILES)
MODEL_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")


def library_is_missing() -> bool:
    """Returns whether the datasets library is not installed, without importing it, which takes seconds."""
    return find_spec("datasets") is None


def hub_documents(
    spec: DataSpec, *, base: Path | None, run_seed: int, peer_id: str, tally: TextTally
) -> Iterator[Document]:
    """Yields the held-out documents, the same ones for every peer, then those that this peer trains on: at most
    ``spec.max_documents`` are read for each.

    ``base``: what the path of a local folder is relative to; None where a stranger wrote the spec, who is to name what
    is on the hub, and nothing on this disk. ``tally`` counts the rows without text among those that this peer trains
    on. LocalError names the key and what to do.
    """
    stream = open_stream(spec, base, spec.split, "data.split")
    other = stream if spec.held_out_split is None else open_stream(spec, base, spec.held_out_split, HELD_OUT_KEY)
    yield from held_out_documents(spec, other)

    order, start = places(stream.num_shards, spec.max_documents, run_seed, peer_id)
    everything = from_document(start, lambda: documents(spec, stream, order, tally), tally)
    for number, document in enumerate(islice(everything, spec.max_documents), 1):
        if number % LOG_DOCUMENTS == 0:
            log.info("read %d documents of %s, at most %d", number, spec.path, spec.max_documents)
        if spec.held_out_split is not None or not is_held_out(document.name, spec.held_out):
            yield replace(document, held_out=False)


def held_out_documents(spec: DataSpec, stream: Any) -> Iterator[Document]:
    """Yields the held-out documents from the start of ``stream``, about as many as evaluation needs."""
    chars, enough = 0, CHARS_PER_TOKEN * (spec.eval_tokens + spec.seq_len)
    for document in islice(documents(spec, stream, range(stream.num_shards), TextTally()), spec.max_documents):
        if spec.held_out_split is not None or is_held_out(document.name, spec.held_out):
            yield replace(document, held_out=True)
            chars += len(document.text)
            if chars >= enough:
                return


def from_document(start: int, read: Callable[[], Iterator[Document]], tally: TextTally) -> Iterator[Document]:
    """Yields all that ``read`` gives, each once, from the one numbered ``start`` on; ``start`` is counted round and
    round. What ``tally`` has counted of those that are passed by before the start is forgotten."""
    stream = read()
    n_passed = sum(1 for _ in islice(stream, start))
    if 0 < n_passed < start:  # these are all that there are
        start %= n_passed
        stream = read()
        sum(1 for _ in islice(stream, start))
    tally.skipped.clear()
    yield from stream
    yield from islice(read(), start)


def places(n_shards: int, max_documents: int, run_seed: int, peer_id: str) -> tuple[list[int], int]:
    """Returns the order in which a peer reads the shards, and the number of the document that it starts at: 0, unless
    there are few shards. Then it reads, and throws away, up to ``PIECES`` / ``n_shards`` times what it needs."""
    key = digest(b"shards", run_seed.to_bytes(8, "big"), peer_id.encode())
    order = sorted(range(n_shards), key=lambda shard: digest(key, shard.to_bytes(8, "big")))
    pieces = -(-PIECES // n_shards)
    return order, int.from_bytes(key[:8], "big") % ((pieces - 1) * max_documents + 1)


def check_data_set(spec: DataSpec, base: Path) -> None:
    """Reads the first document of each split. Raises LocalError that names the key and what to do."""
    splits = [(spec.split, "data.split"), (spec.held_out_split, HELD_OUT_KEY)]
    for split, key in ((split, key) for split, key in splits if split is not None):
        stream = open_stream(spec, base, split, key)
        if next(documents(spec, stream, range(stream.num_shards), TextTally()), None) is None:
            raise DataError(f"{spec.path}: no documents in split {split!r}; choose another under {key}")


def open_stream(spec: DataSpec, base: Path | None, split: str, key: str) -> Any:
    """Returns an IterableDataset, of which nothing is read yet. ``key``: where the run file names the split."""
    datasets, name = load_library(spec), str(spec.path)
    folder = None if base is None else beside(base, name, "data.path")
    if folder is not None and any((folder / file).is_file() for file in ("state.json", "dataset_dict.json")):
        return open_saved(datasets, spec, folder, split, key)
    if folder is not None and folder.is_dir():
        where, revision = str(folder.resolve()), None
        inside = places_of(folder.resolve())
    elif DATA_SET_NAME.fullmatch(name):
        repository, revision = look_up(name, "dataset", "data.path")
        where = ON_THE_HUB + repository
        inside = (f"{where}@",)
    else:
        place = "" if folder is None else f"{folder} is no folder, and "
        raise UsageError(f"key 'data.path': {place}{name!r} no name on the hub, which is OWNER/NAME")
    with asking(f"{name}, data.config = {spec.config!r}"):
        builder = datasets.load_dataset_builder(where, spec.config, revision=revision)
    refuse_strays(name, inside, builder.config.data_files)
    with asking(f"{name}, {key} = {split!r}"):
        stream = builder.as_streaming_dataset(split=split)
    with asking(name):
        return stream.reshard() if stream.num_shards < PIECES else stream


def places_of(folder: Path) -> tuple[str, ...]:
    """Returns how the resolved paths of the folder's files begin. In the hub's own cache they are links."""
    files = [folder, folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [folder]
    return tuple(f"{place}{os.sep}" for place in files)


def refuse_strays(name: str, inside: tuple[str, ...], data_files: Mapping[str, Sequence[str]] | None) -> None:
    """Raises DataError when the data set's description names files that are not its own, but the reader's, say.
    ``inside``: how the names of its own begin."""
    for file in (file for files in (data_files or {}).values() for file in map(str, files)):
        if not (file if "://" in file else os.path.realpath(file)).startswith(inside):
            raise DataError(f"{name}: this data set names a file that is not in it, {file}; do not use it")


def open_saved(datasets: Any, spec: DataSpec, folder: Path, split: str, key: str) -> Any:
    """Returns a stream of a folder that ``save_to_disk`` of a Dataset or of a DatasetDict has written."""
    if spec.config is not None:
        raise UsageError(f"{folder}: a saved data set has no configurations; leave out data.config")
    with asking(str(folder)):
        saved = datasets.load_from_disk(str(folder.resolve()))
    splits = saved if isinstance(saved, dict) else {"train": saved}
    if split not in splits:
        raise UsageError(f"{folder}: no split {split!r}; {key} can be: {', '.join(splits)}")
    rows = splits[split]
    with asking(str(folder)):
        return rows.to_iterable_dataset(num_shards=min(max(len(rows), 1), SAVED_SHARDS))


def documents(spec: DataSpec, stream: Any, shards: Iterable[int], tally: TextTally) -> Iterator[Document]:
    """Yields the documents of these shards, in this order. Rows without text are left out. A document's name is a hash
    of its text."""
    return (named_by_text(text) for text in kept(texts(spec, stream, shards), tally))


def texts(spec: DataSpec, stream: Any, shards: Iterable[int]) -> Iterator[str | None]:
    """Yields the text of each row of these shards, or None where it is null. Raises DataError for a row without a
    text."""
    for row in rows_of(stream, shards, str(spec.path)):
        text = row.get(spec.text_key)
        if not isinstance(text, (str, type(None))) or spec.text_key not in row:
            known = ", ".join(name for name, value in row.items() if isinstance(value, str))[:200]
            raise DataError(f"{spec.path}: no text under {spec.text_key!r}; data.text_key can be: {known or 'nothing'}")
        yield text


def rows_of(stream: Any, shards: Iterable[int], source: str) -> Iterator[Mapping[str, object]]:
    """Yields the rows of these shards, in this order."""
    for shard in shards:
        with asking(source):
            yield from stream.shard(num_shards=stream.num_shards, index=shard)


def find_tokenizer(name: str, base: Path) -> Path:
    """Returns the path of the tokenizer.json; beside it lies what says which of its tokens ends a document. ``name``:
    of a file, of a folder with a tokenizer.json, or, after ``hub:``, on the hub."""
    if not name.startswith(PREFIX):
        path = beside(base, name, "data.tokenizer")
        return path / "tokenizer.json" if path.is_dir() else path
    from huggingface_hub import snapshot_download

    repository, revision = look_up(name.removeprefix(PREFIX), "model", "data.tokenizer")
    with asking(f"key 'data.tokenizer': no tokenizer.json can be had from {name}; name another, or a file"):
        path = Path(snapshot_download(repository, revision=revision, allow_patterns=list(TOKENIZER_FILES)))
        if not (path / "tokenizer.json").is_file():
            raise FileNotFoundError("there is none")
        return path / "tokenizer.json"


def find_model(name: str, base: Path, *, with_weights: bool) -> Path:
    """Returns the folder of a model. ``name`` is that of a folder, or, after ``hub:``, on the hub, from where only
    safetensors are fetched."""
    if not name.startswith(PREFIX):
        return beside(base, name, "model.path")
    from huggingface_hub import snapshot_download

    repository, revision = look_up(name.removeprefix(PREFIX), "model", "model.path")
    log.info("fetching %s", name)
    with asking(f"key 'model.path': {name} cannot be had; name another, or a local folder"):
        wanted = MODEL_FILES if with_weights else MODEL_FILES[:1]
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(wanted)))


def look_up(name: str, kind: str, key: str) -> tuple[str, str | None]:
    """Returns the name without its revision, and the commit that is to be read; with HF_HUB_OFFLINE=1 the revision as
    it is, and the libraries take what their caches hold. ``kind``: ``model`` or ``dataset``.

    One question, asked once: a hub that cannot be reached shows at once, and all files are of one commit.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository, _, after = name.partition("@")
    revision = after or None
    try:
        with asking(f"key '{key}': the hub cannot be asked for {name!r}; see to the network, or name a local folder"):
            commit: str = HfApi().repo_info(repository, repo_type=kind, revision=revision, timeout=ANSWER_S).sha
    except DataError as error:
        cause = error.__cause__
        if isinstance(cause, OfflineModeIsEnabled):
            return repository, revision
        if isinstance(cause, RevisionNotFoundError):
            raise UsageError(f"key '{key}': {repository!r} has no revision {revision!r} on the hub") from error
        if isinstance(cause, HFValidationError):
            raise UsageError(f"key '{key}': {name!r} is no name on the hub: {one_line(cause)}") from error
        if isinstance(cause, RepositoryNotFoundError):
            raise UsageError(
                f"key '{key}': the hub has no {kind} {repository!r}, or shows it to its members only; "
                f"correct the name, or log in with: hf auth login"
            ) from error
        raise
    return repository, commit


def load_library(spec: DataSpec) -> Any:
    """Returns the datasets library, made to be quiet. Raises DataError, which says how to install it, where it is
    missing."""
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{spec.path}: needs the datasets library; install it with: pip install 'p2p-diloco[hf]'"
        ) from None
    logging.getLogger("datasets").handlers.clear()  # what it logs is shown like the rest, and once
    datasets.disable_progress_bars()
    datasets.config.TORCH_AVAILABLE = False  # it would share its counters with other processes, by a daemon of torch's
    return datasets


@contextmanager
def asking(what: str) -> Iterator[None]:
    """Raises DataError for whatever goes wrong in these libraries: they pass on what the readers and network clients
    below them raise, which has no root in common."""
    try:
        yield
    except LocalError:
        raise
    except Exception as error:
        raise DataError(f"{what} ({one_line(error)})") from error


def one_line(error: BaseException) -> str:
    """Returns the error's message without line breaks, or its class where it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__
