"""Files of text -> documents: the built-in text, and a user's files.

A document is held out from training by a hash of its name. Of the built-in text that is the path of the file; of all
other text it is a hash of the document itself. So peers that hold the same row, or the same .txt file, hold out the
same of it, whatever their files are called and whatever else they hold; a character more makes another document.
Everything streams: no more than one document, one row or one batch of rows is in memory.

A user's text is in UTF-8, or it is refused: characters that are replaced without a word are trained on. A document has
no NUL, which ends a document where bytes are tokens: a .txt file with one is in another encoding, or no text, and a row
with one is left out and counted.
"""

from __future__ import annotations

import json
import lzma
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from p2p_diloco.core.digest import digest
from p2p_diloco.core.errors import DataError
from p2p_diloco.learn.textfiles import TextFile, is_foreign, pyarrow_for
from p2p_diloco.learn.textreport import NO_TEXT, NULL, ZERO, TextTally

PIECE_CHARS = 4096
"""A .txt file is cut into documents of about this size, at a newline, so that some of a single one can be held out. Two
files that begin alike are cut alike."""
MAX_ROW_CHARS = 64 * 1024 * 1024
"""Of a row of JSON, which is in memory as a whole."""
CHUNK_CHARS = 64 * 1024
SPACES = " \t\r\n"
"""Of JSON."""


@dataclass(frozen=True)
class Document:
    """A text that is held out as a whole, or not at all."""

    name: str
    text: str
    complete: bool = True
    """False for a piece of a long text that goes on: no separator follows."""
    held_out: bool | None = None
    """Whether nobody trains on it; None where a hash of its name says so."""


def named_by_text(text: str, *, complete: bool = True) -> Document:
    """Returns a document whose name is a hash of its text."""
    return Document(digest(text.encode("utf-8", "replace")).hex(), text, complete)


def builtin_files() -> tuple[Path, list[Path]]:
    """Returns a folder and files in it, torch's own Python files: byte-identical on all platforms for one version of
    torch, but for version.py.

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


def walk(root: Path) -> list[Path]:
    """Returns all regular files below ``root``, by their relative path, without hidden ones. A pipe has no end."""

    def fail(error: OSError) -> None:
        raise error

    files = []
    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [path for name in names if not name.startswith(".") and (path := Path(folder, name)).is_file()]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def builtin_documents(root: Path, files: Iterable[Path], tally: TextTally) -> Iterator[Document]:
    """Yields a document for each of these files below ``root``. Python's own rule is UTF-8, and what differs is
    replaced: the fingerprint of this text is that of earlier versions."""
    for path in files:
        with reading(str(path)):
            text = path.read_bytes().decode("utf-8", "replace").replace("\r\n", "\n")
        tally.files += 1
        yield Document(path.relative_to(root).as_posix(), text)


def user_documents(files: Sequence[TextFile], text_key: str, tally: TextTally) -> Iterator[Document]:
    """Raises DataError that names file and place: for bytes that are not UTF-8, damaged files, and rows without text.

    A .json file among others may be anything; when its first row has no text, it is skipped.
    """
    for file in files:
        with reading(str(file.path)), in_utf8(file):
            documents = 0
            if file.kind != ".json" or len(files) == 1 or begins_with_text(file, text_key):
                for document in documents_of(file, text_key, tally):
                    documents += 1
                    yield document
            if documents:
                tally.files += 1
                tally.n_bytes += file.n_bytes
            else:
                tally.skip(NO_TEXT, file.path.name, file.n_bytes)


def documents_of(file: TextFile, text_key: str, tally: TextTally) -> Iterator[Document]:
    """Yields the documents of one file, as its kind is read."""
    if file.kind == ".txt":
        return text_documents(file)
    rows = parquet_rows if file.kind == ".parquet" else json_rows if file.kind == ".json" else json_lines
    return (named_by_text(text) for text in kept(rows(file, text_key), tally))


def text_documents(file: TextFile) -> Iterator[Document]:
    """Yields the pieces of a .txt file."""
    with file.open() as stream:
        text = next_piece(stream)
        while text:
            if is_foreign(text):
                file.refuse_encoding()
            following = next_piece(stream)
            yield named_by_text(text, complete=not following)
            text = following


def next_piece(file: IO[str]) -> str:
    """Returns PIECE_CHARS characters and the rest of their line, which is cut where it is longer than that again."""
    return file.read(PIECE_CHARS) + file.readline(PIECE_CHARS)


def kept(texts: Iterable[str | None], tally: TextTally) -> Iterator[str]:
    """Yields the texts, without rows that have none, or one with a NUL in it, which are counted."""
    for text in texts:
        if text is None:
            tally.skip(NULL)
        elif "\0" in text:
            tally.skip(ZERO)
        else:
            yield text


def json_lines(file: TextFile, text_key: str) -> Iterator[str | None]:
    """Yields the text of each line, or None where it is null."""
    with file.open() as stream:
        number = 0
        while line := stream.readline(MAX_ROW_CHARS):
            number += 1
            where = f"{file.path}, line {number}"
            if is_foreign(line):
                file.refuse_encoding()
            if len(line) == MAX_ROW_CHARS and not line.endswith("\n"):
                raise too_long(where)
            if not line.isspace():
                with parsing(where):
                    row = json.loads(line)
                yield text_in(row, text_key, where)


def json_rows(file: TextFile, text_key: str) -> Iterator[str | None]:
    """Yields as ``json_lines`` does, of a file that is a list of rows, or one row after another, each on one line or
    several."""
    with file.open() as stream:
        for number, row in enumerate(json_values(stream, file), 1):
            yield text_in(row, text_key, f"{file.path}, row {number}")


def json_values(stream: IO[str], file: TextFile) -> Iterator[Any]:
    """Yields one value at a time. One that goes on behind what was read is tried again with twice as much."""
    decoder, number, ahead, in_list = json.JSONDecoder(), 0, "", False

    def more(n_chars: int = CHUNK_CHARS) -> str:
        text = stream.read(n_chars)
        if is_foreign(text):
            file.refuse_encoding()
        return text

    def after_spaces(text: str) -> str:
        while not (text := text.lstrip(SPACES)) and (text := more()):
            pass
        return text

    ahead = after_spaces("")
    if ahead.startswith("["):
        in_list, ahead = True, after_spaces(ahead[1:])
    while ahead and not (in_list and ahead[0] == "]"):
        number += 1
        where = f"{file.path}, row {number}"
        while True:
            try:
                value, end = decoder.raw_decode(ahead)
                break
            except RecursionError as error:
                raise not_json(where, error) from error
            except ValueError as error:
                following = more(len(ahead))
                if not following:
                    raise not_json(where, error) from error
                ahead += following
                if len(ahead) > MAX_ROW_CHARS:
                    raise too_long(where) from error
        yield value
        ahead = after_spaces(ahead[end:])
        if in_list and ahead.startswith(","):
            ahead = after_spaces(ahead[1:])
        elif in_list and not ahead.startswith("]"):
            raise not_json(where, ValueError("the list does not end"))
    if in_list and not ahead:
        raise not_json(f"{file.path}, after row {number}", ValueError("the list does not end"))
    if in_list and after_spaces(ahead[1:]):
        raise not_json(f"{file.path}, after row {number}", ValueError("the list has ended"))


def begins_with_text(file: TextFile, text_key: str) -> bool:
    """Returns whether the first row that is not null has text."""
    with file.open() as stream:
        for row in json_values(stream, file):
            if not isinstance(row, dict) or row.get(text_key, "") is not None:
                return isinstance(row, dict) and isinstance(row.get(text_key), str)
    return False


def text_in(row: Any, text_key: str, where: str) -> str | None:
    """Returns the text of a row; None where it is null. DataError, naming ``where``, for no text, or one that UTF-8
    does not have."""
    if not isinstance(row, dict) or not isinstance(row.get(text_key, 0), (str, type(None))):
        keys = [key for key, value in row.items() if isinstance(value, str)] if isinstance(row, dict) else []
        known = f"; data.text_key can be: {', '.join(keys)[:200]}" if keys else ""
        raise DataError(f"{where}: no text under {text_key!r}{known}")
    text: str | None = row[text_key]
    if text is not None and not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: not UTF-8: half of a surrogate pair, {text[error.start]!r}, in the text at character "
                f"{error.start}; mend or delete this row"
            ) from error
    return text


def parquet_rows(file: TextFile, text_key: str) -> Iterator[str | None]:
    """Yields the text of each row, or None where it is null."""
    pyarrow, path = pyarrow_for(file.path), file.path
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as table:
            if text_key not in table.schema_arrow.names:
                columns = ", ".join(table.schema_arrow.names)
                raise DataError(f"{path}: no column {text_key!r}; data.text_key can be: {columns}")
            for batch in table.iter_batches(batch_size=256, columns=[text_key]):
                for scalar in batch.column(0):
                    number += 1
                    text = scalar.as_py()
                    if text is not None and not isinstance(text, str):
                        raise DataError(f"{path}: column {text_key!r} holds {type(text).__name__}, not text")
                    yield text
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(
            f"{path}: not UTF-8: byte 0x{byte:02x} at offset {error.start} of column {text_key!r} in row {number}; "
            f"write the file from text in UTF-8"
        ) from error
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a sound parquet file ({first_line(error)})") from error


@contextmanager
def parsing(where: str) -> Iterator[None]:
    """Raises DataError, naming ``where``, for what is no JSON in the block."""
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise not_json(where, error) from error


def not_json(where: str, error: Exception) -> DataError:
    return DataError(f"{where}: not JSON ({first_line(error)})")


def too_long(where: str) -> DataError:
    return DataError(f"{where}: longer than {MAX_ROW_CHARS} characters; a row holds one document")


@contextmanager
def in_utf8(file: TextFile) -> Iterator[None]:
    """Raises DataError, naming the place in the file, for bytes in the block that are not UTF-8."""
    try:
        yield
    except UnicodeDecodeError:
        file.refuse_encoding()


@contextmanager
def reading(source: str) -> Iterator[None]:
    """Raises DataError for what cannot be read in the block, or not be decompressed."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise DataError(f"{error.filename or source}: cannot be read ({reason})") from error
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{source}: damaged, or cut off ({first_line(error)}); get it anew") from error


def is_held_out(name: str, share: float) -> bool:
    """Returns whether nobody trains on the document of this name. That is so for ``share`` of all names, always the
    same ones; a larger share holds out these and more."""
    h = blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8)
    return int.from_bytes(h.digest(), "big") < share * 2**64


def nobody_trains_on(document: Document, share: float) -> bool:
    """Returns what the document itself says of that, or else ``is_held_out``."""
    return is_held_out(document.name, share) if document.held_out is None else document.held_out


def first_line(error: BaseException) -> str:
    """Returns the first line of the error's message, or its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
