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

from p2p_diloco.core.errors import DataError, LocalError, UsageError
from p2p_diloco.core.runfile import DataSpec
from p2p_diloco.learn.hub import END_FILES, find_tokenizer
from p2p_diloco.learn.text import Document, first_line

Tokens = npt.NDArray[np.unsignedinteger[Any]]

END_TOKENS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]", "<|im_end|>", "[SEP]")
"""The usual names of the token that ends a document, of which a tokenizer.json does not say which one it is. The first
one that it has is taken, where nothing else tells; a manifest that has another one's name says so (``with_end``)."""


class Tokenizer(Protocol):
    """Text to token ids and back."""

    vocab_size: int
    end: int | None
    """The token after a document."""
    dtype: type[np.unsignedinteger[Any]]

    def encode(self, text: str) -> Tokens: ...

    def encode_documents(self, documents: Sequence[Document]) -> Tokens:
        """Returns the tokens of all documents in one array, with ``end`` after each that is complete."""

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
    """A tokenizer.json of the tokenizers library, as a manifest carries it. UsageError when the library is not
    installed or cannot read it.

    Text is text: what stands in a document like a special token is encoded character by character, and never as the
    token itself. Else a document could end in its middle, where its author only writes about ``</s>``.
    """

    def __init__(self, tokenizer_json: str, source: str = "the run's tokenizer") -> None:
        named, self.library_json = split_end(tokenizer_json, source)
        self._tokenizer = library_tokenizer(self.library_json, source)
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values(), default=-1) + 1
        if not self.vocab_size:
            raise UsageError(f"{source}: its vocabulary is empty")
        if named is not None and named not in ids:
            raise UsageError(f"{source}: it has no token {named!r}, which is to end a document")
        self.end_token = named or next((name for name in END_TOKENS if name in ids), None)
        self.end: int | None = None if self.end_token is None else ids[self.end_token]
        if self.end_token is not None and self._is_made_of(self.end_token):
            self._tokenizer = library_tokenizer(without_text(self.library_json, self.end_token), source)
        self.dtype: type[np.unsignedinteger[Any]] = np.uint16 if self.vocab_size <= 2**16 else np.uint32

    def encode(self, text: str) -> Tokens:
        with tokenizing():
            encoding = self._tokenizer.encode(well_formed(text), add_special_tokens=False)
        return np.array(self._ids(encoding), self.dtype)

    def encode_documents(self, documents: Sequence[Document]) -> Tokens:
        texts = [well_formed(document.text) for document in documents]
        with tokenizing():
            encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        ids: list[int] = []
        for document, encoding in zip(documents, encodings):
            ids += self._ids(encoding)
            if document.complete and self.end is not None:
                ids.append(self.end)
        return np.array(ids, self.dtype)

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode([token for token in ids if token != self.end])
        return text

    def id_of(self, token: str) -> int | None:
        found: int | None = self._tokenizer.token_to_id(token)
        return self.end if token == self.end_token else found

    def special_token(self, token_id: int) -> str | None:
        """Returns the name of a special token; None for the id of any other token, or of none."""
        added = self._tokenizer.get_added_tokens_decoder().get(token_id)
        special = added is not None and added.special
        return None if not special else self.end_token if token_id == self.end else str(added.content)

    def _is_made_of(self, token: str) -> bool:
        """Returns whether text that holds the name of ``token`` is encoded as that token, at least in some places."""
        texts = [f"{before}{token}{after}" for before in ("", " ", "a", "\n") for after in ("", " ", "a", ".")]
        try:
            with tokenizing():
                encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        except DataError:  # it has no token for some of this
            return True
        return any(self.end in encoding.ids for encoding in encodings)

    def _ids(self, encoding: Any) -> list[int]:
        ids: list[int] = encoding.ids
        if self.end in ids:
            raise DataError(
                f"the run's tokenizer makes {self.end_token!r}, which ends a document, of what it does not know; it "
                f"needs another end token (key data.end_token)"
            )
        return ids


def library_tokenizer(library_json: str, source: str) -> Any:
    """Returns a tokenizers.Tokenizer that neither cuts nor pads, and takes the names of special tokens in a text for
    text."""
    try:
        import tokenizers
    except ImportError:
        raise UsageError(
            f"{source}: needs the tokenizers library; install it with: pip install 'p2p-diloco[tokenizers]'"
        ) from None
    try:
        tokenizer = tokenizers.Tokenizer.from_str(library_json)
    except Exception as error:  # the library raises bare Exception
        raise UsageError(f"{source}: the tokenizers library cannot read it ({first_line(error)})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def without_text(library_json: str, token: str) -> str:
    """Returns the same tokenizer with another name for ``token``, one that no text holds: it has a NUL. For tokenizers
    that find the old one in a text although they take special tokens for text: their model itself knows it as a word or
    a piece, or it is not marked as special."""
    new, table = f"{token}\0", json.loads(library_json)
    for added in table.get("added_tokens") or ():
        if added["content"] == token:
            added.update(content=new, special=True)
    model = table["model"]
    if isinstance(model["vocab"], list):  # of pieces with their scores
        model["vocab"] = [[new if piece == token else piece, score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {new if name == token else name: number for name, number in model["vocab"].items()}
    if model.get("merges"):
        pairs = [(merge.split(" ", 1) if isinstance(merge, str) else merge, merge) for merge in model["merges"]]
        model["merges"] = [merge for (a, b), merge in pairs if token not in (a, b, a + b)]
    return compact_json(table)


@contextmanager
def tokenizing() -> Iterator[None]:
    """Raises DataError for what the tokenizers library raises on text that it has no tokens for: bare Exception, or,
    where its Rust code panics, a BaseException of a class that cannot be imported."""
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
    """Returns the tokenizer of ``RunManifest.tokenizer_json``; where that is empty, tokens are raw bytes."""
    return LibraryTokenizer(tokenizer_json) if tokenizer_json else ByteTokenizer()


def load_tokenizer_json(spec: DataSpec, base: Path) -> str:
    """Returns the text of the tokenizer.json that the run file names, without insignificant spaces, and with its end
    token where that has no usual name; "" for raw bytes. UsageError where nothing says which token ends a document."""
    if spec.tokenizer == "bytes":
        return ""
    path = find_tokenizer(spec.tokenizer, base)
    given = f"key 'data.tokenizer': {path}"
    try:
        text = compact_json(json.loads(path.read_bytes()))
    except FileNotFoundError:
        raise UsageError(f'{given}: no such tokenizer; give "bytes", the path of one, or hub:OWNER/NAME') from None
    except OSError as error:
        raise UsageError(f"{given}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{given}: not a tokenizer.json ({first_line(error)})") from error
    tokenizer = LibraryTokenizer(text, given)
    if spec.end_token is not None and tokenizer.id_of(spec.end_token) is None:
        raise UsageError(f"key 'data.end_token': {path} has no token {spec.end_token!r}")
    end = spec.end_token or end_token_beside(path, tokenizer) or tokenizer.end_token
    if end is None:
        raise UsageError(
            f"key 'data.end_token': nothing says which token of {path} ends a document: name it here, or as eos_token "
            f"in a tokenizer_config.json beside it"
        )
    return text if end == tokenizer.end_token else with_end(text, end)


def end_token_beside(path: Path, tokenizer: LibraryTokenizer) -> str | None:
    """Returns what the first of END_FILES beside ``path`` says that names an end token of this tokenizer. An id must be
    that of a special token: transformers writes default ids into the config of any model. Of several ids the first one
    counts; what follows are ends of a turn in a conversation. UsageError for a file that is not JSON."""
    for file in (path.with_name(name) for name in END_FILES):
        try:
            table = json.loads(file.read_bytes())
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UsageError(f"{file}: cannot be read ({error.strerror})") from error
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{file}: not JSON ({first_line(error)})") from error
        if isinstance(table, dict):
            token = table.get("eos_token")
            named = token.get("content") if isinstance(token, dict) else token
            if isinstance(named, str):
                if tokenizer.id_of(named) is None:
                    raise UsageError(
                        f"{file}: eos_token is {named!r}, which {path.name} does not have; correct it, or name another "
                        f"token under data.end_token"
                    )
                return named
            numbers = table.get("eos_token_id")
            for number in numbers if isinstance(numbers, list) else [numbers]:
                if isinstance(number, int) and (found := tokenizer.special_token(number)) is not None:
                    return found
    return None


END_BEGINS = '{"end_token":'


def with_end(library_json: str, end_token: str) -> str:
    """Returns the tokenizer with its end token in front of the keys that the library reads: so it travels where that
    token has none of the usual names. Versions that do not know this cannot read such a tokenizer, and say so."""
    return f"{END_BEGINS}{compact_json(end_token)},{library_json[1:]}"


def split_end(tokenizer_json: str, source: str) -> tuple[str | None, str]:
    """Returns the end token, if ``with_end`` has put one in front, and what the library reads. UsageError for
    neither."""
    if not tokenizer_json.startswith(END_BEGINS):
        return None, tokenizer_json
    try:
        name, after = json.JSONDecoder().raw_decode(tokenizer_json, len(END_BEGINS))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{source}: not a tokenizer.json ({first_line(error)})") from error
    if not isinstance(name, str) or tokenizer_json[after : after + 1] != ",":
        raise UsageError(f"{source}: not a tokenizer.json (its end_token is no text)")
    return name, "{" + tokenizer_json[after + 1 :]


def separator(tokenizer: Tokenizer) -> str:
    """Returns the token after each document, for a person; empty where there is none."""
    if tokenizer.end is None:
        return ""
    if isinstance(tokenizer, LibraryTokenizer):
        return f"{tokenizer.end_token} (token {tokenizer.end})"
    return f"a {tokenizer.end} byte"


def compact_json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def well_formed(text: str) -> str:
    """Returns the text without lone surrogates, which JSON can hold and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()
