"""Text -> documents -> tokens on disk -> batches.

    open_corpus   documents of the built-in text, of a user's files or of a hub data set, tokenized once into
                  memory-mapped files
    Corpus        batch(...) is a pure function of (run seed, peer id, step, micro step): no loader state, no rank, no
                  world size, so a peer that comes back draws what it would have drawn
    Tokenizer     raw bytes, or the tokenizers library with the JSON that the manifest carries

Tokens are kept in a cache: whole or not at all, checked when opened, written by one process while others wait.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from p2p_diloco.errors import DataError, LocalError, UsageError
from p2p_diloco.hub import DATA_SET_NAME, find_tokenizer, hub_documents
from p2p_diloco.manifest import DataSpec, canonical_json
from p2p_diloco.outer import digest
from p2p_diloco.text import (
    Document,
    builtin_documents,
    builtin_files,
    first_line,
    is_held_out,
    reading,
    user_documents,
    user_files,
    walk,
)

log = logging.getLogger(__name__)

Tokens = npt.NDArray[np.unsignedinteger[Any]]

CACHE_FORMAT = 2
"""Raised when documents, separators or the layout of cached files change."""
ENCODE_CHARS = 1024 * 1024
"""Text that is held in memory and tokenized at once."""
KEPT_FREE_BYTES = 10**9
"""Of the disk, by the tokens of a data set: how long it is, is another's choice."""
NO_TEXT = "this run brings no text of its own; add --data FILE-OR-FOLDER"
END_TOKENS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]", "<|im_end|>", "[SEP]")
"""Under these names a tokenizer.json may have a token that ends a document; it does not say which one it is."""


class Tokenizer(Protocol):
    vocab_size: int
    end: int | None
    """The token after a document."""
    dtype: type[np.unsignedinteger[Any]]

    def encode(self, text: str) -> Tokens: ...

    def encode_documents(self, documents: Sequence[Document]) -> Tokens:
        """All of them in one array, with ``end`` after each that is complete."""

    def decode(self, ids: Sequence[int]) -> str: ...


class ByteTokenizer:
    """UTF-8 as it is. A 0 byte ends a document."""

    vocab_size = 256
    end: int | None = 0
    dtype: type[np.unsignedinteger[Any]] = np.uint8

    def encode(self, text: str) -> Tokens:
        return np.frombuffer(text.encode("utf-8", "replace"), np.uint8)

    def encode_documents(self, documents: Sequence[Document]) -> Tokens:
        pieces = (d.text.encode("utf-8", "replace") + (b"\0" if d.complete else b"") for d in documents)
        return np.frombuffer(b"".join(pieces), np.uint8)

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")


class LibraryTokenizer:
    """A tokenizer.json of the tokenizers library. UsageError when it is not installed or cannot read the JSON."""

    def __init__(self, tokenizer_json: str, source: str = "the run's tokenizer") -> None:
        try:
            import tokenizers
        except ImportError:
            raise UsageError(
                f"{source}: needs the tokenizers library; install it with: pip install 'p2p-diloco[tokenizers]'"
            ) from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # the library raises bare Exception
            raise UsageError(f"{source}: the tokenizers library cannot read it ({first_line(error)})") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values(), default=-1) + 1
        if not self.vocab_size:
            raise UsageError(f"{source}: its vocabulary is empty")
        self.end: int | None = next((ids[name] for name in END_TOKENS if name in ids), None)
        self.dtype: type[np.unsignedinteger[Any]] = np.uint16 if self.vocab_size <= 2**16 else np.uint32

    def encode(self, text: str) -> Tokens:
        with tokenizing():
            encoding = self._tokenizer.encode(well_formed(text), add_special_tokens=False)
        return np.array(encoding.ids, self.dtype)

    def encode_documents(self, documents: Sequence[Document]) -> Tokens:
        texts = [well_formed(document.text) for document in documents]
        with tokenizing():
            encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        ids: list[int] = []
        for document, encoding in zip(documents, encodings):
            ids += encoding.ids
            if document.complete and self.end is not None:
                ids.append(self.end)
        return np.array(ids, self.dtype)

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids))
        return text

    def token(self, token_id: int) -> str:
        """As it stands in the vocabulary."""
        return str(self._tokenizer.id_to_token(token_id))


@contextmanager
def tokenizing() -> Iterator[None]:
    """DataError for what the tokenizers library raises on text that it has no tokens for: bare Exception, or, where its
    Rust code panics, a BaseException of a class that cannot be imported."""
    try:
        yield
    except LocalError:
        raise
    except BaseException as error:
        if not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        raise DataError(
            f"the run's tokenizer cannot tokenize this text ({first_line(error)}); it needs a token for what it does "
            f"not know"
        ) from error


def open_tokenizer(tokenizer_json: str) -> Tokenizer:
    """From ``RunManifest.tokenizer_json``; empty means raw bytes."""
    return LibraryTokenizer(tokenizer_json) if tokenizer_json else ByteTokenizer()


def load_tokenizer_json(spec: DataSpec, base: Path) -> str:
    """The text of the tokenizer.json that the run file names, without insignificant spaces; "" for raw bytes."""
    if spec.tokenizer == "bytes":
        return ""
    path = find_tokenizer(spec.tokenizer, base)
    try:
        text = json.dumps(json.loads(path.read_bytes()), separators=(",", ":"), ensure_ascii=False)
    except FileNotFoundError:
        raise UsageError(
            f'{path}: no such tokenizer; data.tokenizer is "bytes", the path of one, or hub:OWNER/NAME'
        ) from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not a tokenizer.json ({first_line(error)})") from error
    LibraryTokenizer(text, str(path))
    return text


@dataclass(frozen=True, kw_only=True)
class Corpus:
    train: Tokens
    """uint8, uint16 or uint32 [tokens], memory-mapped, read-only."""
    held_out: Tokens
    vocab_size: int
    fingerprint: str
    """blake2b of the built-in text's names and contents, in hex; empty for a peer's own files."""
    cached_as: str = ""
    """Another name for other files, another tokenizer or another split."""

    @property
    def identity(self) -> str:
        """Of the text: a change of it is a change of this."""
        return self.fingerprint or self.cached_as

    def batch(
        self, *, run_seed: int, peer_id: str, step: int, batch_size: int, seq_len: int, micro_step: int = 0
    ) -> npt.NDArray[np.int64]:
        """int64 [batch_size, seq_len + 1]: windows at random offsets, the same ones for the same arguments.

        Offsets are taken from the raw Philox stream: numpy guarantees it between versions, unlike ``integers``.
        """
        key = digest(b"batch", run_seed.to_bytes(8, "big"), peer_id.encode())[:16]
        philox = np.random.Philox(key=int.from_bytes(key, "big"), counter=[0, 0, micro_step, step])
        windows = sliding_window_view(self.train, seq_len + 1)  # [tokens - seq_len, seq_len + 1], not a copy
        offsets = philox.random_raw(batch_size) % np.uint64(len(windows))  # uint64 [batch_size]
        rows: npt.NDArray[np.int64] = windows[offsets.astype(np.int64)].astype(np.int64)
        return rows

    def held_out_batches(self, *, batch_size: int, seq_len: int, max_tokens: int) -> Iterator[npt.NDArray[np.int64]]:
        """int64 [<= batch_size, seq_len + 1] each: consecutive windows from the start, every token a target once.

        At most ``max_tokens`` targets, rounded down to whole windows, and at least one window.
        """
        windows = sliding_window_view(self.held_out, seq_len + 1)[::seq_len]
        windows = windows[: max(max_tokens // seq_len, 1)]
        for first in range(0, len(windows), batch_size):
            yield windows[first : first + batch_size].astype(np.int64)


@dataclass(frozen=True)
class Source:
    """Where documents come from."""

    name: str
    """For messages."""
    facts: list[Any]
    """All that the documents depend on, beside the spec's ``text_key`` and ``held_out``."""
    documents: Callable[[], Iterator[Document]]
    fingerprinted: bool = False


def source_of(
    spec: DataSpec, *, base: Path | None, cache: Path, override_path: Path | None, run_seed: int, peer_id: str
) -> Source:
    if spec.source == "hub" and (override_path is None or override_path.is_dir()):
        if override_path is not None:
            base = override_path.absolute()
            spec = spec.model_copy(update={"path": str(base)})
        elif base is None and not DATA_SET_NAME.fullmatch(str(spec.path)):
            raise UsageError(NO_TEXT)
        return hub_source(spec, base=base, cache=cache, run_seed=run_seed, peer_id=peer_id)
    if override_path is not None:
        own: Path | None = override_path
    elif spec.path is None:
        own = None
    elif base is None:
        raise UsageError(NO_TEXT)
    else:
        own = base / spec.path
    name = "the built-in text" if own is None else str(own)
    with reading(name):
        root, files = builtin_files() if own is None else user_files(own)
        facts = [own is None, str(root.resolve()), listing(root, files)]
    if own is None:
        return Source(name, facts, lambda: builtin_documents(root, files), fingerprinted=True)
    return Source(name, facts, lambda: user_documents(files, spec.text_key))


def hub_source(spec: DataSpec, *, base: Path | None, cache: Path, run_seed: int, peer_id: str) -> Source:
    """Another one for every peer. What lies on the hub under a name is not looked up again once there are tokens."""
    local: list[Any] = []
    if base is not None and (folder := base / str(spec.path)).is_dir():
        with reading(str(folder)):
            local = [str(folder.resolve()), listing(folder, walk(folder))]
    facts = ["hub", spec.path, local, spec.config, spec.split, spec.held_out_split, spec.max_documents]
    facts += [spec.eval_tokens, spec.seq_len, run_seed, peer_id]
    return Source(
        f"the data set {spec.path}",
        facts,
        lambda: while_disk_lasts(hub_documents(spec, base=base, run_seed=run_seed, peer_id=peer_id), cache),
    )


def while_disk_lasts(documents: Iterable[Document], cache: Path) -> Iterator[Document]:
    """DataError before their tokens, which are written to ``cache``, leave less free than KEPT_FREE_BYTES."""
    chars = ENCODE_CHARS
    for document in documents:
        chars += len(document.text)
        if chars >= ENCODE_CHARS:
            chars, free = 0, shutil.disk_usage(cache).free
            if free < KEPT_FREE_BYTES:
                raise DataError(
                    f"{cache}: {free / 1e9:.2f} GB are free, and a data set's tokens must leave "
                    f"{KEPT_FREE_BYTES / 1e9:.0f} GB; make room, or start peer with --data FILE-OR-FOLDER"
                )
        yield document


def listing(root: Path, files: Iterable[Path]) -> list[list[Any]]:
    return [[path.relative_to(root).as_posix(), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def open_corpus(
    spec: DataSpec,
    *,
    base: Path | None,
    cache: Path,
    tokenizer_json: str = "",
    override_path: Path | None = None,
    run_seed: int = 0,
    peer_id: str = "",
) -> Corpus:
    """Tokenizes the text unless ``cache`` holds its tokens. Processes that open the same text wait for one to do it.

    ``base`` is the folder that paths in the spec are relative to; None where a stranger wrote the spec: then they name
    nothing on this disk. ``override_path`` are a volunteer's own files, or a folder in the place of a hub data set.
    ``run_seed`` and ``peer_id`` choose a peer's part of a hub data set; all other text is the same for everybody.
    LocalError names the file or key, and what to do.
    """
    tokenizer = open_tokenizer(tokenizer_json)
    source = source_of(spec, base=base, cache=cache, override_path=override_path, run_seed=run_seed, peer_id=peer_id)
    identity = [CACHE_FORMAT, spec.text_key, spec.held_out, tokenizer_json, source.facts]
    folder = cache / digest(b"corpus", canonical_json(identity))[:16].hex()
    try:
        corpus = cached(folder, tokenizer)
        if corpus is None:
            cache.mkdir(parents=True, exist_ok=True)
            with locked(folder.with_suffix(".lock")) as alone:
                corpus = cached(folder, tokenizer)
                if corpus is None:
                    if alone:
                        for stale in (folder, *cache.glob(f"{folder.name}.*.tmp")):
                            shutil.rmtree(stale, ignore_errors=True)
                    log.info("tokenizing %s", source.name)
                    # Without the lock another process may have been first, with the same tokens.
                    with nullcontext() if alone else suppress(OSError):
                        build(folder, source.documents(), tokenizer, spec.held_out, fingerprinted=source.fingerprinted)
                    corpus = cached(folder, tokenizer)
    except OSError as error:
        raise DataError(
            f"{cache}: cannot keep tokens here ({error.strerror}); they take about as much space as the text"
        ) from error
    if corpus is None:
        raise DataError(f"{folder}: the tokens kept here are damaged; delete this folder")
    for tokens, what, mend in (
        (corpus.train, "training text", "add text, or lower data.seq_len"),
        (corpus.held_out, "held-out text", "add text, raise data.held_out, or lower data.seq_len"),
    ):
        if len(tokens) < spec.seq_len + 1:
            raise DataError(
                f"{source.name}: {len(tokens)} tokens of {what}, one sequence needs {spec.seq_len + 1}; {mend}"
            )
    return corpus


def builtin_fingerprint() -> str:
    """As in ``Corpus``, without tokenizing anything: reads 46 MB. Raises DataError."""
    h = blake2b(digest_size=32)
    for document in builtin_documents(*builtin_files()):
        h.update(document_digest(document))
    return h.hexdigest()


def document_digest(document: Document) -> bytes:
    return digest(document.name.encode(), document.text.encode("utf-8", "replace"))


class TokenFile:
    """Tokens of one side of the split, tokenized about a million characters at a time."""

    def __init__(self, path: Path, tokenizer: Tokenizer) -> None:
        self.n_tokens = 0
        self._tokenizer = tokenizer
        self._file = path.open("wb")
        self._waiting: list[Document] = []
        self._waiting_chars = 0

    def add(self, document: Document) -> None:
        self._waiting.append(document)
        self._waiting_chars += len(document.text)
        if self._waiting_chars >= ENCODE_CHARS:
            self._encode()

    def finish(self) -> int:
        """Bytes are on the disk when it returns, with the number of tokens."""
        self._encode()
        self._file.flush()
        os.fsync(self._file.fileno())
        return self.n_tokens

    def close(self) -> None:
        self._file.close()

    def _encode(self) -> None:
        tokens = self._tokenizer.encode_documents(self._waiting)
        self._file.write(tokens.data)
        self.n_tokens += len(tokens)
        self._waiting, self._waiting_chars = [], 0


def build(
    folder: Path, documents: Iterable[Document], tokenizer: Tokenizer, held_out: float, *, fingerprinted: bool
) -> None:
    """Writes ``folder`` whole or not at all: under a temporary name, synced, then renamed."""
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    h = blake2b(digest_size=32)
    try:
        with (
            closing(TokenFile(temporary / "train.bin", tokenizer)) as train,
            closing(TokenFile(temporary / "held_out.bin", tokenizer)) as other,
        ):
            for document in documents:
                if fingerprinted:
                    h.update(document_digest(document))
                apart = is_held_out(document.name, held_out) if document.held_out is None else document.held_out
                (other if apart else train).add(document)
            fingerprint = h.hexdigest() if fingerprinted else ""
            facts = {"train": train.finish(), "held_out": other.finish(), "fingerprint": fingerprint}
        (temporary / "corpus.json").write_bytes(canonical_json(facts))
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def cached(folder: Path, tokenizer: Tokenizer) -> Corpus | None:
    """None when there are no tokens, or their files do not have the recorded sizes."""
    arrays: dict[str, Tokens] = {}
    try:
        facts = json.loads((folder / "corpus.json").read_bytes())
        for split in ("train", "held_out"):
            path = folder / f"{split}.bin"
            if path.stat().st_size != facts[split] * np.dtype(tokenizer.dtype).itemsize:
                return None
            arrays[split] = np.empty(0, tokenizer.dtype)
            if facts[split]:  # numpy cannot map an empty file
                arrays[split] = np.asarray(np.memmap(path, tokenizer.dtype, "r"))
        fingerprint = str(facts["fingerprint"])
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None
    return Corpus(**arrays, vocab_size=tokenizer.vocab_size, fingerprint=fingerprint, cached_as=folder.name)


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Holds the lock and yields True; or False where the file system has none: then two may do the same work."""
    with path.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            log.warning("%s: cannot be locked; going on without", path)
            yield False
        else:
            yield True


def well_formed(text: str) -> str:
    """Without lone surrogates, which JSON can hold and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()
