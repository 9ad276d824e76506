"""A path -> the files below it that hold text, and what is skipped, with the reason.

A file's name says how it is read: .txt, .jsonl, .ndjson, .json or .parquet, in upper or lower case; all but parquet
also compressed: .gz, .bz2, .xz and .zst, of which the last needs pyarrow, as parquet does. Symbolic links are
followed, to files and to folders; what can be reached in two ways is read once, under its own name if that is below the
path, too. What is hidden is skipped. Reading streams: neither a file nor what it decompresses to is in memory as a
whole.
"""

from __future__ import annotations

import bz2
import codecs
import errno
import gzip
import io
import lzma
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn, cast

from p2p_diloco.core.errors import DataError
from p2p_diloco.learn.textreport import (
    DANGLING,
    EMPTY,
    HIDDEN,
    IRREGULAR,
    OTHER,
    TWICE,
    UNKNOWN,
    Skipped,
    TextTally,
    refuse_mostly_skipped,
)

KINDS = (".txt", ".jsonl", ".ndjson", ".json", ".parquet")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
READ = f"{', '.join(KINDS[:-1])} (each also with {', '.join(COMPRESSIONS)} after it) or {KINDS[-1]}"
"""For messages."""
NO_TEXT_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".svg", ".ico"),
    *(".mp3", ".wav", ".flac", ".ogg", ".opus", ".m4a", ".mp4", ".m4v", ".webm", ".mkv", ".mov", ".avi"),
    *(".ttf", ".otf", ".woff", ".woff2", ".safetensors", ".gguf", ".pt", ".pth", ".ckpt"),
)
"""What lies beside text and is none, however large it is."""
CHUNK_BYTES = 1024 * 1024
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),  # which begins as that of UTF-16 does
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


@dataclass(frozen=True, kw_only=True)
class TextFile:
    path: Path
    kind: str
    """One of KINDS."""
    compression: str = ""
    """One of COMPRESSIONS, or none."""
    n_bytes: int = 0
    """On the disk."""
    mtime_ns: int = 0

    def open_bytes(self) -> IO[bytes]:
        """Opens the file, decompressed. Whoever reads gets OSError, EOFError, zlib.error or LZMAError from a damaged
        file."""
        if self.compression == ".gz":
            return cast(IO[bytes], gzip.open(self.path))
        if self.compression == ".bz2":
            return cast(IO[bytes], bz2.open(self.path))
        if self.compression == ".xz":
            return cast(IO[bytes], lzma.open(self.path))
        if self.compression == ".zst":
            pyarrow = pyarrow_for(self.path)
            stream: IO[bytes] = pyarrow.CompressedInputStream(self.path.open("rb"), "zstd")
            return stream
        return self.path.open("rb")

    def open(self) -> IO[str]:
        """Opens the file as text in UTF-8, without its byte order mark. To read what is no UTF-8 raises
        UnicodeDecodeError."""
        return io.TextIOWrapper(self.open_bytes(), encoding="utf-8-sig", errors="strict")

    def refuse_encoding(self) -> NoReturn:
        """Raises DataError with the place of the first byte that is no text in UTF-8: reads the file again up to it."""
        where = f" of what it decompresses to, with {self.compression}" if self.compression else ""
        with self.open_bytes() as file:
            found = first_foreign_byte(file)
        if found is None:
            raise DataError(f"{self.path}: changed while it was read; start again")
        (at, byte, cut_off), head = found
        mark = next((name for bom, name in BYTE_ORDER_MARKS if head.startswith(bom)), None)
        if mark is not None:
            hint = f"it begins as {mark} does: iconv -f {mark} -t UTF-8 OLD > NEW"
        elif byte == 0:
            hint = "text has no such byte: perhaps this is UTF-16: iconv -f UTF-16LE -t UTF-8 OLD > NEW"
        elif byte == ESCAPE[0]:
            hint = "it begins a sequence of ISO-2022: for Japanese, iconv -f ISO-2022-JP -t UTF-8 OLD > NEW"
        else:
            hint = "convert it, for example from Latin-1: iconv -f ISO-8859-1 -t UTF-8 OLD > NEW"
            hint = f"the last character is cut off; get the file anew, or {hint}" if cut_off else hint
        raise DataError(f"{self.path}: not UTF-8: byte 0x{byte:02x} at offset {at}{where}; {hint}")


ESCAPE = b"\x1b$"
"""Begins characters of two bytes in ISO-2022-JP and its like, which are ASCII otherwise, and so seem to be UTF-8."""


def is_foreign(text: str) -> bool:
    """Returns whether text that was read as UTF-8 is in another encoding after all: in UTF-16 and UTF-32, ASCII is
    valid UTF-8 with a NUL beside every character."""
    return "\0" in text or ESCAPE.decode() in text


def first_foreign_byte(file: IO[bytes]) -> tuple[tuple[int, int, bool], bytes] | None:
    """Returns its offset, the byte itself, and whether it begins a character that the end of the file cuts off; and the
    first bytes of the file. None where all is text in UTF-8."""
    decoder, head, offset, last = codecs.getincrementaldecoder("utf-8")(), b"", 0, b""
    while True:
        chunk = file.read(CHUNK_BYTES)
        head = head or chunk[:4]
        joined = last + chunk  # a sequence may lie across two chunks
        places = [place for sought in (b"\0", ESCAPE) if (place := joined.find(sought)) >= 0]
        found = [(offset - len(last) + place, joined[place], False) for place in places]
        pending = decoder.getstate()[0]
        try:
            decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            place = offset - len(pending) + error.start
            found.append((place, error.object[error.start], not chunk))
        if found:
            return min(found), head
        if not chunk:
            return None
        offset, last = offset + len(chunk), chunk[-1:]


@dataclass(frozen=True, kw_only=True)
class TextFiles:
    """Is what is below a path."""

    root: Path
    files: tuple[TextFile, ...]
    """Sorted by their paths below ``root``."""
    skipped: tuple[Skipped, ...] = ()

    def listing(self) -> list[list[Any]]:
        """Returns name, size and time of each: two listings of the same files are equal unless one has changed."""
        return [[file.path.relative_to(self.root).as_posix(), file.n_bytes, file.mtime_ns] for file in self.files]


def text_files(path: Path) -> TextFiles:
    """Returns what is to be read of a file, or below a folder. Raises DataError where that is nothing, or less than may
    be text and would be skipped."""
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; data.path or --data names a folder, or {READ}")
    if not path.is_dir():
        how = format_of(path)
        if how is None:
            raise DataError(f"{path}: cannot read {path.suffix or 'this'} files; give {READ}")
        if not path.is_file():
            raise DataError(f"{path}: no regular file; its text is read more than once, so write it to one")
        return TextFiles(root=path.parent, files=(text_file(path, how, path.stat()),))
    found, tally = [], TextTally()
    for file in walk_links(path, tally):
        found.append(file)
        tally.n_bytes += file.n_bytes
    skipped = tuple(tally.skipped.values())
    if not found:
        told = "".join(f"; skipped {kind.line}" for kind in skipped)
        raise DataError(f"{path}: no {READ} files in this folder{told}")
    refuse_mostly_skipped(str(path), tally.n_bytes, skipped)
    found.sort(key=lambda file: file.path.relative_to(path).as_posix())
    return TextFiles(root=path, files=tuple(found), skipped=skipped)


def walk_links(root: Path, tally: TextTally) -> Iterator[TextFile]:
    """Yields all files below ``root`` that can be read, in no order to count on, each once; counts what is skipped."""
    seen_files: set[str] = set()
    seen_folders: set[str] = set()
    folders, linked_folders, linked_files = [root], list[Path](), list[Path]()
    while folders or linked_folders:
        # What is here under its own name comes before what is linked to.
        folder = folders.pop() if folders else linked_folders.pop(0)
        real = os.path.realpath(folder)
        if real in seen_folders:
            tally.skip(TWICE, shown(folder, root))
            continue
        seen_folders.add(real)
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            path = Path(entry.path)
            if entry.name.startswith("."):
                tally.skip(HIDDEN, shown(path, root))
            elif (status := status_of(path)) is None:
                tally.skip(DANGLING, shown(path, root))
            elif stat.S_ISDIR(status.st_mode):
                (linked_folders if entry.is_symlink() else folders).append(path)
            elif entry.is_symlink():
                linked_files.append(path)
            elif (file := readable(path, status, shown(path, root), tally)) is not None:
                seen_files.add(os.path.join(real, entry.name))
                yield file
    for path in sorted(linked_files):
        status = status_of(path)
        file = None if status is None else readable(path, status, shown(path, root), tally)
        if file is not None and (real := os.path.realpath(path)) not in seen_files:
            seen_files.add(real)
            yield file
        elif file is not None:
            tally.skip(TWICE, shown(path, root))


def shown(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def status_of(path: Path) -> os.stat_result | None:
    """Returns the status of what a link leads to; None where it leads nowhere, or in a circle."""
    try:
        return path.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise


def readable(path: Path, status: os.stat_result, name: str, tally: TextTally) -> TextFile | None:
    """Returns the file if it is to be read; None for one that is skipped, which is counted. ``name``: for messages."""
    how = format_of(path)
    if not stat.S_ISREG(status.st_mode):
        tally.skip(IRREGULAR, name)
    elif not status.st_size:
        tally.skip(EMPTY, name)
    elif how is not None:
        return text_file(path, how, status)
    elif path.suffix.lower() in NO_TEXT_SUFFIXES:
        tally.skip(OTHER, name, status.st_size)
    else:
        tally.skip(UNKNOWN, name, status.st_size)
    return None


def text_file(path: Path, how: tuple[str, str], status: os.stat_result) -> TextFile:
    kind, compression = how
    return TextFile(path=path, kind=kind, compression=compression, n_bytes=status.st_size, mtime_ns=status.st_mtime_ns)


def format_of(path: Path) -> tuple[str, str] | None:
    """Returns kind and compression by the name, or by that of the file that it is a link to; None for any other
    file."""
    for name in (path.name, Path(os.path.realpath(path)).name):
        stem, last = os.path.splitext(name.lower())
        if last in KINDS:
            return last, ""
        kind = os.path.splitext(stem)[1]
        if last in COMPRESSIONS and kind in KINDS and kind != ".parquet":
            return kind, last
    return None


def pyarrow_for(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise DataError(f"{path}: needs pyarrow; install it with: pip install 'p2p-diloco[parquet]'") from None
    return pyarrow
