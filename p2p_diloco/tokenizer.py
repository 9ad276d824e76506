"""Text <-> token ids: raw bytes, or the tokenizers library with the JSON that the manifest carries.

The library is an extra and is imported when a run needs it. What it raises on a user's text or JSON is bare Exception,
or worse: here it becomes one line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from p2p_diloco.errors import DataError, LocalError, UsageError
from p2p_diloco.hub import find_tokenizer
from p2p_diloco.manifest import DataSpec
from p2p_diloco.text import Document, first_line

Tokens = npt.NDArray[np.unsignedinteger[Any]]

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


def well_formed(text: str) -> str:
    """Without lone surrogates, which JSON can hold and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()
