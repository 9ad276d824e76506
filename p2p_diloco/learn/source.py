"""Where a run's documents come from: the built-in text, a user's files, or a data set of the hub.

A source says what its documents depend on, so that their tokens can be found again, and reads them only when these are
missing. What a stranger's run file names is never looked up on this disk.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from p2p_diloco.core.digest import digest
from p2p_diloco.core.errors import DataError, UsageError
from p2p_diloco.core.paths import beside
from p2p_diloco.core.runfile import DataSpec
from p2p_diloco.learn.hub import DATA_SET_NAME, hub_documents
from p2p_diloco.learn.text import Document, builtin_documents, builtin_files, reading, user_documents, walk
from p2p_diloco.learn.textfiles import text_files
from p2p_diloco.learn.textreport import Skipped, TextTally

KEPT_FREE_BYTES = 10**9
"""Of the disk, by the tokens of a data set: how long it is, is another's choice."""
LOOK_EVERY_CHARS = 1024 * 1024
"""At how much of the disk is free: so many characters of a data set are read in between."""
NO_OWN_TEXT = "this run brings no text of its own; add --data FILE-OR-FOLDER"


@dataclass(frozen=True)
class Source:
    """Says where documents come from."""

    name: str
    """For messages."""
    facts: list[Any]
    """All that the documents depend on, beside the spec's ``text_key`` and ``held_out``."""
    documents: Callable[[TextTally], Iterator[Document]]
    """Counts what it reads."""
    skipped: tuple[Skipped, ...] = ()
    """Files that are not read at all."""
    fingerprinted: bool = False


def source_of(
    spec: DataSpec, *, base: Path | None, cache: Path, override_path: Path | None, run_seed: int, peer_id: str
) -> Source:
    """Returns where the documents of this spec come from on this machine; nothing of them is read yet. ``base`` is the
    folder that paths in the spec are relative to, None where a stranger wrote it. Raises UsageError where a peer must
    bring text of its own."""
    if spec.source == "hub" and (override_path is None or override_path.is_dir()):
        if override_path is not None:
            base = override_path.absolute()
            spec = spec.model_copy(update={"path": str(base)})
        elif base is None and not DATA_SET_NAME.fullmatch(str(spec.path)):
            raise UsageError(NO_OWN_TEXT)
        return hub_source(spec, base=base, cache=cache, run_seed=run_seed, peer_id=peer_id)
    if override_path is not None:
        own: Path | None = override_path
    elif spec.path is None:
        own = None
    elif base is None:
        raise UsageError(NO_OWN_TEXT)
    else:
        own = beside(base, spec.path, "data.path")
    name = "the built-in text" if own is None else str(own)
    if own is None:
        with reading(name):
            root, paths = builtin_files()
            facts = [True, str(root.resolve()), listing(root, paths)]
        return Source(name, facts, lambda tally: builtin_documents(root, paths, tally), fingerprinted=True)
    with reading(name):
        found = text_files(own)
        facts = [False, str(found.root.resolve()), found.listing()]
    return Source(name, facts, lambda tally: user_documents(found.files, spec.text_key, tally), skipped=found.skipped)


def hub_source(spec: DataSpec, *, base: Path | None, cache: Path, run_seed: int, peer_id: str) -> Source:
    """Returns a data set's source, which is another one for every peer. What lies on the hub under a name is not looked
    up again once there are tokens."""
    local: list[Any] = []
    if base is not None and (folder := beside(base, str(spec.path), "data.path")).is_dir():
        with reading(str(folder)):
            local = [str(folder.resolve()), listing(folder, walk(folder))]
    facts = ["hub", spec.path, local, spec.config, spec.split, spec.held_out_split, spec.max_documents]
    facts += [spec.eval_tokens, spec.seq_len, run_seed, peer_id]
    return Source(
        f"the data set {spec.path}",
        facts,
        lambda tally: while_disk_lasts(
            hub_documents(spec, base=base, run_seed=run_seed, peer_id=peer_id, tally=tally), cache
        ),
    )


def while_disk_lasts(documents: Iterable[Document], cache: Path) -> Iterator[Document]:
    """Yields the documents. Raises DataError before their tokens, which are written to ``cache``, leave less free than
    KEPT_FREE_BYTES."""
    chars = LOOK_EVERY_CHARS
    for document in documents:
        chars += len(document.text)
        if chars >= LOOK_EVERY_CHARS:
            chars, free = 0, shutil.disk_usage(cache).free
            if free < KEPT_FREE_BYTES:
                raise DataError(
                    f"{cache}: {free / 1e9:.2f} GB are free, and a data set's tokens must leave "
                    f"{KEPT_FREE_BYTES / 1e9:.0f} GB; make room, or start peer with --data FILE-OR-FOLDER"
                )
        yield document


def listing(root: Path, files: Iterable[Path]) -> list[list[Any]]:
    """Returns name, size and time of change of each file: where a text changes, one of these does."""
    return [[path.relative_to(root).as_posix(), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def builtin_fingerprint() -> str:
    """Returns the fingerprint that a corpus of the built-in text has. It tokenizes nothing, and reads 46 MB. Raises
    DataError."""
    h = blake2b(digest_size=32)
    for document in builtin_documents(*builtin_files(), TextTally()):
        h.update(document_digest(document))
    return h.hexdigest()


def document_digest(document: Document) -> bytes:
    """Returns a hash of the document's name and text."""
    return digest(document.name.encode(), document.text.encode("utf-8", "replace"))
