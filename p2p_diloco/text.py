"""Files of text -> documents: the built-in text, and a user's .txt, .jsonl and .parquet files.

A document is held out from training by a hash of its name. Of the built-in text that is the path of the file; of all
other text it is a hash of the document itself. So peers that hold the same row, or the same .txt file, hold out the
same of it, whatever their files are called and whatever else they hold; a character more makes another document.
Everything streams: no more than one document, one row or one batch of rows is in memory.
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
from p2p_diloco.outer import digest

SUFFIXES = (".txt", ".jsonl", ".parquet")
PIECE_CHARS = 4096
"""A .txt file is cut into documents of about this size, at a newline, so that some of a single one can be held out. Two
files that begin alike are cut alike."""


@dataclass(frozen=True)
class Document:
    name: str
    text: str
    complete: bool = True
    """False for a piece of a long text that goes on: no separator follows."""
    held_out: bool | None = None
    """Whether nobody trains on it; None where a hash of its name says so."""


def named_by_text(text: str, *, complete: bool = True) -> Document:
    return Document(digest(text.encode("utf-8", "replace")).hex(), text, complete)


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
        if not path.is_file():
            raise DataError(f"{path}: no regular file; its text is read more than once, so write it to one")
        return path.parent, [path]
    files = [file for file in walk(path) if file.suffix in SUFFIXES]
    if not files:
        raise DataError(f"{path}: no .txt, .jsonl or .parquet files in this folder")
    return path, files


def walk(root: Path) -> list[Path]:
    """All regular files below ``root``, by their relative path, without hidden ones. A pipe has no end."""

    def fail(error: OSError) -> None:
        raise error

    files = []
    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [path for name in names if not name.startswith(".") and (path := Path(folder, name)).is_file()]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def builtin_documents(root: Path, files: Iterable[Path]) -> Iterator[Document]:
    for path in files:
        with reading(str(path)):
            text = path.read_bytes().decode("utf-8", "replace").replace("\r\n", "\n")
        yield Document(path.relative_to(root).as_posix(), text)


def user_documents(files: Sequence[Path], text_key: str) -> Iterator[Document]:
    """Streams: no more than one document, one row or one batch of rows is in memory."""
    for path in files:
        with reading(str(path)):
            if path.suffix == ".txt":
                yield from text_documents(path)
            elif path.suffix == ".jsonl":
                yield from json_documents(path, text_key)
            else:
                yield from parquet_documents(path, text_key)


def text_documents(path: Path) -> Iterator[Document]:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        text = next_piece(file)
        while text:
            following = next_piece(file)
            yield named_by_text(text, complete=not following)
            text = following


def next_piece(file: IO[str]) -> str:
    """PIECE_CHARS characters and the rest of their line, which is cut where it is longer than that again."""
    return file.read(PIECE_CHARS) + file.readline(PIECE_CHARS)


def json_documents(path: Path, text_key: str) -> Iterator[Document]:
    """Rows whose text is null are left out, as in other files."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {number}: not JSON ({first_line(error)})") from error
            if isinstance(row, dict) and row.get(text_key, "") is None:
                continue
            if not isinstance(row, dict) or not isinstance(row.get(text_key), str):
                keys = [key for key, value in row.items() if isinstance(value, str)] if isinstance(row, dict) else []
                known = f"; data.text_key can be: {', '.join(keys)[:200]}" if keys else ""
                raise DataError(f"{path}, line {number}: no text under {text_key!r}{known}")
            yield named_by_text(row[text_key])


def parquet_documents(path: Path, text_key: str) -> Iterator[Document]:
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
            for batch in file.iter_batches(batch_size=256, columns=[text_key]):
                for text in batch.column(0).to_pylist():
                    if isinstance(text, str):
                        yield named_by_text(text)
                    elif text is not None:
                        raise DataError(f"{path}: column {text_key!r} holds {type(text).__name__}, not text")
    except (pyarrow.ArrowInvalid, UnicodeDecodeError) as error:
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


def nobody_trains_on(document: Document, share: float) -> bool:
    """As the document says itself, else as a hash of its name does."""
    return is_held_out(document.name, share) if document.held_out is None else document.held_out


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
