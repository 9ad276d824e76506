"""Documents -> tokens on disk -> batches.

    open_corpus   tokenizes what a source has, once, into memory-mapped files
    Corpus        batch(...) is a pure function of (run seed, peer id, step, micro step): no loader state, no rank, no
                  world size, so a peer that comes back draws what it would have drawn

Tokens are kept in a cache: whole or not at all, checked when opened, written by one process while others wait.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from p2p_diloco.core.digest import digest
from p2p_diloco.core.errors import DataError
from p2p_diloco.core.manifest import canonical_json
from p2p_diloco.core.runfile import DataSpec
from p2p_diloco.learn.source import Source, document_digest, source_of
from p2p_diloco.learn.text import Document, nobody_trains_on
from p2p_diloco.learn.textreport import Skipped, TextReport, TextTally, refuse_mostly_empty_rows, refuse_mostly_skipped
from p2p_diloco.learn.tokenizer import Tokenizer, Tokens, open_tokenizer, separator

log = logging.getLogger(__name__)

CACHE_FORMAT = 3
"""Raised when documents, separators or the layout of cached files change."""
ENCODE_CHARS = 1024 * 1024
"""Text that is held in memory and tokenized at once."""


NOT_READ = TextReport()


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A run's text as this peer has it: tokens to train on, and tokens that nobody trains on."""

    train: Tokens
    """uint8, uint16 or uint32 [tokens], memory-mapped, read-only."""
    held_out: Tokens
    vocab_size: int
    fingerprint: str
    """blake2b of the built-in text's names and contents, in hex; empty for a peer's own files."""
    cached_as: str = ""
    """Another name for other files, another tokenizer or another split."""
    report: TextReport = NOT_READ
    """What was read to make it, today or when its tokens were made."""

    @property
    def identity(self) -> str:
        """Returns a name for the text: where the text changes, the name does."""
        return self.fingerprint or self.cached_as

    def batch(
        self, *, run_seed: int, peer_id: str, step: int, batch_size: int, seq_len: int, micro_step: int = 0
    ) -> npt.NDArray[np.int64]:
        """Returns int64 [batch_size, seq_len + 1]: windows at random offsets, the same ones for the same arguments.

        Offsets are taken from the raw Philox stream: numpy guarantees it between versions, unlike ``integers``.
        """
        key = digest(b"batch", run_seed.to_bytes(8, "big"), peer_id.encode())[:16]
        philox = np.random.Philox(key=int.from_bytes(key, "big"), counter=[0, 0, micro_step, step])
        windows = sliding_window_view(self.train, seq_len + 1)  # [tokens - seq_len, seq_len + 1], not a copy
        offsets = philox.random_raw(batch_size) % np.uint64(len(windows))  # uint64 [batch_size]
        rows: npt.NDArray[np.int64] = windows[offsets.astype(np.int64)].astype(np.int64)
        return rows

    def held_out_batches(self, *, batch_size: int, seq_len: int, max_tokens: int) -> Iterator[npt.NDArray[np.int64]]:
        """Yields int64 [<= batch_size, seq_len + 1]: consecutive windows from the start, every token a target once.

        At most ``max_tokens`` targets, rounded down to whole windows, and at least one window.
        """
        windows = sliding_window_view(self.held_out, seq_len + 1)[::seq_len]
        windows = windows[: max(max_tokens // seq_len, 1)]
        for first in range(0, len(windows), batch_size):
            yield windows[first : first + batch_size].astype(np.int64)


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
    """Returns the text of a run as tokens. It is tokenized unless ``cache`` holds its tokens. Processes that open the
    same text wait for one to do it.

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
        corpus = cached(folder, tokenizer, source.skipped)
        if corpus is None:
            cache.mkdir(parents=True, exist_ok=True)
            with locked(folder.with_suffix(".lock")) as alone:
                corpus = cached(folder, tokenizer, source.skipped)
                if corpus is None:
                    if alone:
                        for stale in (folder, *cache.glob(f"{folder.name}.*.tmp")):
                            shutil.rmtree(stale, ignore_errors=True)
                    log.info("tokenizing %s", source.name)
                    # Without the lock another process may have been first, with the same tokens.
                    with nullcontext() if alone else suppress(OSError):
                        build(folder, source, tokenizer, spec.held_out)
                    corpus = cached(folder, tokenizer, source.skipped)
    except OSError as error:
        raise DataError(
            f"{cache}: cannot keep tokens here ({error.strerror}); they take about as much space as the text; "
            f"set XDG_CACHE_HOME to another folder"
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


class TokenFile:
    """The file of the tokens of one side of the split, tokenized about a million characters at a time."""

    def __init__(self, path: Path, tokenizer: Tokenizer) -> None:
        self.n_tokens = 0
        self._tokenizer = tokenizer
        self._file = path.open("wb")
        self._waiting: list[Document] = []
        self._waiting_chars = 0

    def add(self, document: Document) -> None:
        """Takes in a document, which is written with the next ones."""
        self._waiting.append(document)
        self._waiting_chars += len(document.text)
        if self._waiting_chars >= ENCODE_CHARS:
            self._encode()

    def finish(self) -> int:
        """Writes what is left, and returns the number of tokens; all of them are on the disk then."""
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


def build(folder: Path, source: Source, tokenizer: Tokenizer, held_out: float) -> None:
    """Writes ``folder`` whole or not at all: under a temporary name, synced, then renamed. DataError where too little
    of the source is text."""
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    h, tally = blake2b(digest_size=32), TextTally()
    try:
        with (
            closing(TokenFile(temporary / "train.bin", tokenizer)) as train,
            closing(TokenFile(temporary / "held_out.bin", tokenizer)) as other,
        ):
            for document in source.documents(tally):
                if source.fingerprinted:
                    h.update(document_digest(document))
                (other if nobody_trains_on(document, held_out) else train).add(document)
                tally.documents += document.complete
            refuse_mostly_skipped(source.name, tally.n_bytes, [*source.skipped, *tally.skipped.values()])
            if tally.files:  # a data set of the hub is another's, who may have rows without text for other uses
                refuse_mostly_empty_rows(source.name, tally)
            facts = {
                "train": train.finish(),
                "held_out": other.finish(),
                "fingerprint": h.hexdigest() if source.fingerprinted else "",
                "files": tally.files,
                "documents": tally.documents,
                "skipped": [kind.model_dump() for kind in tally.skipped.values()],
            }
        (temporary / "corpus.json").write_bytes(canonical_json(facts))
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def cached(folder: Path, tokenizer: Tokenizer, skipped: Sequence[Skipped]) -> Corpus | None:
    """Returns what is kept in ``folder``; None when there are no tokens, or their files do not have the recorded sizes.
    ``skipped``: files that are not read, which may be others today than when the tokens were made."""
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
        report = TextReport(
            files=facts["files"],
            documents=facts["documents"],
            train_tokens=facts["train"],
            held_out_tokens=facts["held_out"],
            separator=separator(tokenizer),
            skipped=(*skipped, *map(Skipped.model_validate, facts["skipped"])),
        )
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None
    return Corpus(
        **arrays, vocab_size=tokenizer.vocab_size, fingerprint=fingerprint, cached_as=folder.name, report=report
    )


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
