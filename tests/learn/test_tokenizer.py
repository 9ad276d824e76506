from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from p2p_diloco.core.errors import DataError, Stopped, UsageError
from p2p_diloco.core.runfile import DataSpec
from p2p_diloco.learn.data import open_corpus
from p2p_diloco.learn.text import Document
from p2p_diloco.learn.tokenizer import (
    ByteTokenizer,
    LibraryTokenizer,
    load_tokenizer_json,
    open_tokenizer,
    separator,
    tokenizing,
)

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


def test_a_tokenizer_that_was_saved_to_cut_and_pad_does_neither() -> None:
    """As many are: a text would lose all but its beginning without a word, or be trained on with what fills it up."""
    words = tokenizers.Tokenizer.from_str(word_tokenizer())
    words.enable_truncation(2)
    words.enable_padding(pad_id=3, pad_token="and", length=5)
    assert words.encode("document says ends").ids == [1, 2, 3, 3, 3], "else there is nothing to see here"
    tokenizer = LibraryTokenizer(words.to_str())
    assert tokenizer.encode("document says ends").tolist() == [1, 2, 4]
    documents = [Document("long", "document says ends ends"), Document("short", "says")]
    assert tokenizer.encode_documents(documents).tolist() == [1, 2, 4, 4, 5, 2, 5]


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
        with pytest.raises(UsageError, match=f"^key 'data.tokenizer': .*{name}: {message}"):
            load_tokenizer_json(SPEC.model_copy(update={"tokenizer": name}), tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UsageError, match=r"pip install 'p2p-diloco\[tokenizers\]'"):
        load_tokenizer_json(SPEC.model_copy(update={"tokenizer": "other.json"}), tmp_path)


# -- the end of a document ---------------------------------------------------------------------------------------------

SENTENCES = [f"The bridge keeps ferry number {i} and follows lantern {i % 7}." for i in range(60)]
UNUSUAL = "<|close|>"


def bpe_tokenizer(*special: str, vocab_size: int = 320) -> str:
    """Of bytes, as GPT-2's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    text: str = tokenizer.to_str()
    return text


def write_tokenizer(folder: Path, tokenizer_json: str, **beside: Any) -> DataSpec:
    """``beside``: what stands in the files next to it, by their names without .json."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json)
    for name, table in beside.items():
        (folder / f"{name}.json").write_text(json.dumps(table))
    return SPEC.model_copy(update={"tokenizer": folder.name})


def end_of(folder: Path, tokenizer_json: str, end_token: str | None = None, **beside: Any) -> str | None:
    """As a peer finds it, from what the manifest carries alone."""
    spec = write_tokenizer(folder, tokenizer_json, **beside).model_copy(update={"end_token": end_token})
    return LibraryTokenizer(load_tokenizer_json(spec, folder.parent)).end_token


@pytest.mark.parametrize(
    "beside",
    [
        {"tokenizer_config": {"eos_token": UNUSUAL}},
        {"tokenizer_config": {"eos_token": {"content": UNUSUAL, "lstrip": False}}},
        {"tokenizer_config": {"eos_token": None}, "special_tokens_map": {"eos_token": UNUSUAL}},
        {"tokenizer_config": {}, "special_tokens_map": {"eos_token": {"content": UNUSUAL}}},
        {"generation_config": {"eos_token_id": 1}},
        {"generation_config": {"eos_token_id": [1, 0]}},
        {"generation_config": {"eos_token_id": [9999, 5, 1]}, "config": {"eos_token_id": 0}},
        {"config": {"eos_token_id": 1}},
        {"tokenizer_config": {"eos_token": UNUSUAL}, "config": {"eos_token_id": 0}},
        {"tokenizer_config": ["no table"], "config": {"eos_token_id": 1}},
    ],
)
def test_the_end_token_is_what_stands_beside_the_tokenizer(tmp_path: Path, beside: dict[str, Any]) -> None:
    assert end_of(tmp_path / "own", bpe_tokenizer("<|pad|>", UNUSUAL), **beside) == UNUSUAL


def test_the_run_file_names_the_end_token_before_all_else(tmp_path: Path) -> None:
    tokenizer_json = bpe_tokenizer("</s>", UNUSUAL, "<|turn|>")
    config = {"eos_token": UNUSUAL}
    assert end_of(tmp_path / "own", tokenizer_json, "<|turn|>", tokenizer_config=config) == "<|turn|>"
    assert end_of(tmp_path / "own", tokenizer_json, tokenizer_config=config) == UNUSUAL
    assert end_of(tmp_path / "other", tokenizer_json) == "</s>"
    with pytest.raises(UsageError, match=r"key 'data\.end_token': .*tokenizer\.json has no token '<\|none\|>'"):
        end_of(tmp_path / "own", tokenizer_json, "<|none|>")


def test_an_end_token_that_the_tokenizer_does_not_have_is_refused(tmp_path: Path) -> None:
    """Whatever another file says, or the usual names: somebody has mixed two tokenizers."""
    beside: dict[str, Any] = {
        "tokenizer_config": {"eos_token": "<of-another>"},
        "special_tokens_map": {"eos_token": UNUSUAL},
    }
    message = (
        r"tokenizer_config\.json: eos_token is '<of-another>', which tokenizer\.json does not have; correct it, or"
    )
    with pytest.raises(UsageError, match=message):
        end_of(tmp_path / "own", bpe_tokenizer("</s>", UNUSUAL), **beside)
    assert end_of(tmp_path / "own", bpe_tokenizer("</s>", UNUSUAL), UNUSUAL, **beside) == UNUSUAL


@pytest.mark.parametrize("beside", [{}, {"config": {"eos_token_id": 7}}, {"tokenizer_config": {"eos_token": None}}])
def test_a_tokenizer_without_an_end_token_is_refused(tmp_path: Path, beside: dict[str, Any]) -> None:
    """Id 7 is a letter's: a default of the model's type, and no end."""
    with pytest.raises(UsageError, match=r"key 'data\.end_token': nothing says which token of .* ends a document"):
        end_of(tmp_path / "own", bpe_tokenizer("<|a|>", UNUSUAL), **beside)


def test_a_broken_file_beside_the_tokenizer_is_a_usage_error(tmp_path: Path) -> None:
    spec = write_tokenizer(tmp_path / "own", bpe_tokenizer(UNUSUAL))
    (tmp_path / "own/tokenizer_config.json").write_text("{")
    with pytest.raises(UsageError, match=r"tokenizer_config\.json: not JSON"):
        load_tokenizer_json(spec, tmp_path)


def test_only_an_unusual_end_token_changes_what_travels(tmp_path: Path) -> None:
    """So that runs keep their ids."""
    usual = bpe_tokenizer("</s>", "<|im_end|>")
    compact = json.dumps(json.loads(usual), separators=(",", ":"), ensure_ascii=False)
    for beside in ({}, {"tokenizer_config": {"eos_token": "</s>"}}, {"config": {"eos_token_id": 0}}):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        assert load_tokenizer_json(write_tokenizer(folder, usual, **beside), tmp_path) == compact
    named = write_tokenizer(tmp_path / "last", usual, tokenizer_config={"eos_token": "<|im_end|>"})
    travelling = load_tokenizer_json(named, tmp_path)
    assert travelling == '{"end_token":"<|im_end|>",' + compact[1:]
    opened = LibraryTokenizer(travelling)
    assert (opened.end, opened.library_json) == (1, compact)
    with pytest.raises(Exception, match="expected"):  # what a version that knows nothing of it does
        tokenizers.Tokenizer.from_str(travelling)


@pytest.mark.parametrize("front", ['"<|none|>",', "7,", '"open', '"</s>"]', '"</s>"'])
def test_an_unsound_end_token_of_a_manifest_is_a_usage_error(front: str) -> None:
    with pytest.raises(UsageError, match="the run's tokenizer: "):
        LibraryTokenizer('{"end_token":' + front + bpe_tokenizer("</s>")[1:])


def unigram_tokenizer() -> str:
    """As those of SentencePiece: the end of text is a piece like any other, and the cheapest."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = [(letter, -4.0) for letter in "▁</s>abc"]
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), *letters], 0, False))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens(["</s>"])
    text: str = tokenizer.to_str()
    return text


def merging_tokenizer() -> str:
    """Of a text with HTML in it: two merges make the end of text."""
    from tokenizers import Tokenizer, decoders, models

    words = {token: i for i, token in enumerate(["<", "/", "s", ">", "a", " ", "</", "s>", "</s>", "</s>a"])}
    merges = [("<", "/"), ("s", ">"), ("</", "s>"), ("</s>", "a")]
    tokenizer = Tokenizer(models.BPE(words, merges))
    tokenizer.decoder = decoders.Fuse()
    text: str = tokenizer.to_str()
    return text


def inner_merging_tokenizer() -> str:
    """It makes the end of text within a word, and not at the beginning of one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = {token: i for i, token in enumerate(["▁", "<", "/", "s", ">", "a", "▁<", "</", "s>", "</s>"])}
    tokenizer = Tokenizer(models.BPE(words, [("▁", "<"), ("<", "/"), ("s", ">"), ("</", "s>")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    text: str = tokenizer.to_str()
    return text


def plain_tokenizer() -> str:
    """Its end of text is an added token, and not marked as special."""
    table = json.loads(bpe_tokenizer("</s>"))
    table["added_tokens"][0]["special"] = False
    return json.dumps(table)


@pytest.mark.parametrize(
    ("tokenizer_json", "text"),
    [
        (bpe_tokenizer("</s>"), "about </s> and what it means</s></s>"),
        (plain_tokenizer(), "about </s> and what it means</s></s>"),
        (merging_tokenizer(), "a </s>a </s></s>"),
        (inner_merging_tokenizer(), "a</s> a</s>a"),
        (unigram_tokenizer(), "a </s> b c</s>a"),
    ],
)
def test_an_end_token_in_a_text_is_text(tokenizer_json: str, text: str) -> None:
    tokenizer = LibraryTokenizer(tokenizer_json)
    before = tokenizers.Tokenizer.from_str(tokenizer_json)
    assert tokenizer.end_token == "</s>"
    assert tokenizer.end in before.encode(text).ids, "else there is nothing to see here"
    assert tokenizer.end not in tokenizer.encode(text).tolist()
    assert tokenizer.decode(tokenizer.encode(text).tolist()) == text
    document = Document("name", text)
    assert tokenizer.encode_documents([document, document]).tolist().count(tokenizer.end) == 2
    ordinary = text.replace("</s>", " ")
    assert tokenizer.encode(ordinary).tolist() == before.encode(ordinary).ids
    assert tokenizer.vocab_size == before.get_vocab_size()
    assert tokenizer.decode([*tokenizer.encode(ordinary).tolist(), tokenizer.end or 0]) == ordinary


def test_a_word_that_is_the_end_token_is_no_end() -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "a": 1, "</s>": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    assert words.encode("a </s> a").ids == [1, 2, 1]
    assert LibraryTokenizer(words.to_str()).encode("a </s> a").tolist() == [1, 0, 1]


def test_an_end_token_for_what_is_unknown_is_an_error() -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "a": 1}, unk_token="</s>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = LibraryTokenizer(words.to_str())
    assert tokenizer.encode("a a").tolist() == [1, 1]
    with pytest.raises(DataError, match="the run's tokenizer "):
        tokenizer.encode("a b")


def test_a_piece_for_what_is_unknown_that_is_the_end_token_is_an_error() -> None:
    """Whatever its name: it is known by its number."""
    pieces = tokenizers.Tokenizer(tokenizers.models.Unigram([("</s>", 0.0), ("a", -1.0)], 0, False))
    tokenizer = LibraryTokenizer(pieces.to_str())
    assert tokenizer.encode_documents([Document("name", "aa")]).tolist() == [1, 1, 0]
    with pytest.raises(DataError, match="makes '</s>', which ends a document, of what it does not know"):
        tokenizer.encode("aba")
    with pytest.raises(DataError, match="makes '</s>', which ends a document, of what it does not know"):
        tokenizer.encode_documents([Document("first", "aa"), Document("second", "aba")])


def test_other_special_tokens_in_a_text_are_text_too() -> None:
    tokenizer = LibraryTokenizer(bpe_tokenizer("</s>", "<|start|>"))
    assert 1 not in tokenizer.encode("say <|start|>").tolist()
    assert tokenizer.decode(tokenizer.encode("say <|start|>").tolist()) == "say <|start|>"


def test_the_separator_is_named_for_a_person() -> None:
    assert separator(open_tokenizer("")) == "a 0 byte"
    assert separator(LibraryTokenizer(bpe_tokenizer("<|a|>", "</s>"))) == "</s> (token 1)"
    assert separator(LibraryTokenizer(bpe_tokenizer("<|a|>"))) == ""
