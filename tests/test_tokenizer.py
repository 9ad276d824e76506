from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import tokenizers

from p2p_diloco.data import open_corpus
from p2p_diloco.errors import DataError, Stopped, UsageError
from p2p_diloco.manifest import DataSpec
from p2p_diloco.tokenizer import ByteTokenizer, LibraryTokenizer, load_tokenizer_json, open_tokenizer, tokenizing

SPEC = DataSpec(source="path", path="texts", seq_len=16, held_out=0.3)
N_TEXTS = 40


def write_texts(folder: Path) -> None:
    folder.mkdir()
    for i in range(N_TEXTS):
        (folder / f"{i:02d}.txt").write_text(f"document {i:02d} says {'abc' * (i % 5)} and ends\n")


def word_tokenizer(end: str | None = "</s>") -> str:
    words = ["[UNK]", *("document", "says", "and", "ends"), *([end] if end else [])]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    text: str = tokenizer.to_str()
    return text


def test_bytes_round_trip() -> None:
    tokenizer = open_tokenizer("")
    assert isinstance(tokenizer, ByteTokenizer)
    assert tokenizer.decode(tokenizer.encode("grüße").tolist()) == "grüße"
    assert tokenizer.decode([0xC3]) == "\ufffd"


def test_a_library_tokenizer_is_read_checked_and_used(tmp_path: Path) -> None:
    (tmp_path / "words.json").write_text(json.dumps(json.loads(word_tokenizer()), indent=2))
    spec = SPEC.model_copy(update={"tokenizer": "words.json", "seq_len": 8})
    tokenizer_json = load_tokenizer_json(spec, tmp_path)
    assert len(tokenizer_json) < (tmp_path / "words.json").stat().st_size
    assert load_tokenizer_json(SPEC, tmp_path) == ""
    tokenizer = open_tokenizer(tokenizer_json)
    assert tokenizer.encode("document says ends").tolist() == [1, 2, 4]
    assert tokenizer.decode([1, 2, 4]) == "document says ends"

    write_texts(tmp_path / "texts")
    corpus = open_corpus(spec, base=tmp_path, cache=tmp_path / "cache", tokenizer_json=tokenizer_json)
    assert (corpus.vocab_size, corpus.train.dtype.name) == (6, "uint16")
    assert (corpus.train == 5).sum() + (corpus.held_out == 5).sum() == N_TEXTS
    assert corpus.train[:3].tolist() == [1, 0, 2]

    assert LibraryTokenizer(word_tokenizer(end=None)).end is None


def test_text_that_a_tokenizer_has_no_tokens_for_is_a_data_error(tmp_path: Path) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"document": 0}, unk_token="[UNK]"))
    write_texts(tmp_path / "texts")
    with pytest.raises(
        DataError, match=r"cannot tokenize this text \(.*\); it needs a token for what it does not know"
    ):
        open_corpus(SPEC, base=tmp_path, cache=tmp_path / "cache", tokenizer_json=words.to_str())
    with pytest.raises(DataError, match="cannot tokenize this text"):
        LibraryTokenizer(words.to_str()).encode("another")


def test_a_panic_of_the_tokenizer_is_a_data_error_and_nothing_else_is_held_up() -> None:
    panic = type("PanicException", (BaseException,), {})
    with pytest.raises(DataError, match=r"cannot tokenize this text \(first line\)"), tokenizing():
        raise panic("first line\nsecond")
    for leaving in (KeyboardInterrupt(), Stopped("stopped")):
        with pytest.raises(type(leaving)), tokenizing():
            raise leaving


def test_a_bad_tokenizer_is_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.json").write_text("{nonsense")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "other.json").write_text('{"version": "1.0"}')
    for name, message in (
        ("missing.json", "no such tokenizer"),
        ("broken.json", "not a tokenizer.json"),
        ("deep.json", "not a tokenizer.json"),
        ("other.json", "the tokenizers library cannot read it"),
    ):
        with pytest.raises(UsageError, match=f"{name}: {message}"):
            load_tokenizer_json(SPEC.model_copy(update={"tokenizer": name}), tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UsageError, match=r"pip install 'p2p-diloco\[tokenizers\]'"):
        load_tokenizer_json(SPEC.model_copy(update={"tokenizer": "other.json"}), tmp_path)
