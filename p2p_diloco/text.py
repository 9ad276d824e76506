"""Files of text -> documents: the built-in text, and a user's .txt, .jsonl and .parquet files.

A document is held out from training by a hash of its name, so all peers that hold the same text hold out the same
documents, whatever else they hold. Everything streams: no more than one document, one row or one batch of rows is in
memory.
"""

from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from p2p_diloco.errors import DataError

SUFFIXES = (".txt", ".jsonl", ".parquet")
PIECE_CHARS = 64 * 1024
"""A long .txt file is cut into documents of about this size, at a newline."""
WHOLE_TEXT_BYTES = 1024 * 1024
"""A .txt file up to this size is one document when it lies in a folder with others."""


@dataclass(frozen=True)
class Document:
    name: str
    text: str
    complete: bool = True
    """False for a piece of a long text that goes on: no separator follows."""
    held_out: bool | None = None
    """Whether nobody trains on it; None where a hash of its name says so."""


def builtin_files() -> tuple[Path, list[Path]]:
    """Torch's own Python files: byte-identical on all platforms for one version of torch, but for version.py.

    The standard library's where torch is missing. Torch is found without importing it.
    """
    spec = find_spec("torch")
    if spec is not None and spec.submodule_search_locations:
        root, left_out = Path(next(iter(spec.submodule_search_locations))), {"__pycache__"}
    else:
        root = Path(sysconfig.get_path("stdlib"))
        left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
    files = [path for path in walk(root) if path.suffix == ".py" and path != root / "version.py"]
    return root, [path for path in files if not left_out & set(path.relative_to(root).parts)]


def user_files(path: Path) -> tuple[Path, list[Path]]:
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; data.path or --data names .txt, .jsonl or .parquet files")
    if not path.is_dir():
        if path.suffix not in SUFFIXES:
            raise DataError(f"{path}: cannot read {path.suffix or 'this'} files; give .txt, .jsonl or .parquet")
        return path.parent, [path]
    files = [file for file in walk(path) if file.suffix in SUFFIXES]
    if not files:
        raise DataError(f"{path}: no .txt, .jsonl or .parquet files in this folder")
    return path, files


def walk(root: Path) -> list[Path]:
    """All files below ``root``, by their relative path, without hidden ones."""

    def fail(error: OSError) -> None:
        raise error

    files = []
    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def builtin_documents(root: Path, files: Iterable[Path]) -> Iterator[Document]:
    for path in files:
        with reading(str(path)):
            text = path.read_bytes().decode("utf-8", "replace").replace("\r\n", "\n")
        yield Document(path.relative_to(root).as_posix(), text)


def user_documents(root: Path, files: Sequence[Path], text_key: str) -> Iterator[Document]:
    """Streams: no more than one document, one row or one batch of rows is in memory."""
    for path in files:
        name = path.relative_to(root).as_posix()
        with reading(str(path)):
            if path.suffix == ".txt":
                yield from text_documents(path, name, alone=len(files) == 1)
            elif path.suffix == ".jsonl":
                yield from json_documents(path, name, text_key)
            else:
                yield from parquet_documents(path, name, text_key)


def text_documents(path: Path, name: str, alone: bool) -> Iterator[Document]:
    """One document, or pieces where the file is long or the only one, so that some of it can be held out."""
    size = path.stat().st_size
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        if size <= WHOLE_TEXT_BYTES and not alone:
            yield Document(name, file.read())
            return
        piece_chars = min(max(size // 1024, 512), PIECE_CHARS)
        text, i = next_piece(file, piece_chars), 0
        while text:
            following = next_piece(file, piece_chars)
            yield Document(f"{name}:{i}", text, complete=not following)
            text, i = following, i + 1


def next_piece(file: IO[str], chars: int) -> str:
    """``chars`` characters and the rest of their line, which is cut where it is longer than that again."""
    return file.read(chars) + file.readline(chars)


def json_documents(path: Path, name: str, text_key: str) -> Iterator[Document]:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {number}: not JSON ({first_line(error)})") from error
            if not isinstance(row, dict) or not isinstance(row.get(text_key), str):
                keys = [key for key, value in row.items() if isinstance(value, str)] if isinstance(row, dict) else []
                known = f"; data.text_key can be: {', '.join(keys)[:200]}" if keys else ""
                raise DataError(f"{path}, line {number}: no text under {text_key!r}{known}")
            yield Document(f"{name}:{number}", row[text_key])


def parquet_documents(path: Path, name: str, text_key: str) -> Iterator[Document]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{path}: needs pyarrow; install it with: pip install 'p2p-diloco[parquet]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            if text_key not in file.schema_arrow.names:
                columns = ", ".join(file.schema_arrow.names)
                raise DataError(f"{path}: no column {text_key!r}; data.text_key can be: {columns}")
            row = 0
            for batch in file.iter_batches(batch_size=256, columns=[text_key]):
                for text in batch.column(0).to_pylist():
                    if isinstance(text, str):
                        yield Document(f"{name}:{row}", text)
                    elif text is not None:
                        raise DataError(f"{path}: column {text_key!r} holds {type(text).__name__}, not text")
                    row += 1
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a sound parquet file ({first_line(error)})") from error


@contextmanager
def reading(source: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise DataError(f"{error.filename or source}: cannot be read ({reason})") from error


def is_held_out(name: str, share: float) -> bool:
    """``share`` of all names, always the same ones; a larger share holds out these and more."""
    h = blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8)
    return int.from_bytes(h.digest(), "big") < share * 2**64


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
