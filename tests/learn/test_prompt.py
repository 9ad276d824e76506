from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p_diloco.core.runfile import DataSpec
from p2p_diloco.learn.prompt import builtin_prompt, choose_prompt, pieces, prompt_chars, prompt_of_tokens
from p2p_diloco.learn.text import builtin_documents, builtin_files, is_held_out
from p2p_diloco.learn.textreport import TextTally
from p2p_diloco.learn.tokenizer import ByteTokenizer

HEADING = "# Copyright\n# All rights reserved\n\nimport one\nimport two\n\n"
CODE = "def first(number: int) -> int:\n    return number\n\n\ndef second(number: int) -> int:\n    return -number\n"
GAPS = "x" + " " * 30 + "y\n"
STORY = "Once upon a time there was a small house in a large wood, and a child who lived in it all alone. " * 4


def test_a_prompt_begins_a_paragraph_of_the_second_half_and_ends_with_a_line() -> None:
    assert choose_prompt([HEADING + CODE], 60) == "def second(number: int) -> int:\n    return -number\n"
    assert choose_prompt([HEADING + CODE], 40) == "def second(number: int) -> int:\n"


def test_text_without_lines_is_cut_between_words() -> None:
    assert choose_prompt([STORY], 40) == "Once upon a time there was a small"
    assert choose_prompt(["word " * 4], 38) == "word word word word"


def test_what_shows_nothing_is_passed_over() -> None:
    deep = "\n".join(" " * 12 + "x = y" for _ in range(9))
    numbers = "1234 5678 90.1\n" * 9
    for poor in (GAPS * 9, deep, numbers, "", "\n \n", "short"):
        assert choose_prompt([poor], 60) == ""
        assert choose_prompt([poor, HEADING + CODE], 60).startswith("def second")
    assert choose_prompt([GAPS * 9 + "\n\n" + CODE], 60).startswith("def ")
    assert choose_prompt(["" for _ in range(1000)] + [CODE], 60) == "", "it does not look for ever"


def test_a_prompt_leaves_room_in_the_models_context() -> None:
    assert prompt_chars(DataSpec(seq_len=100)) == 70
    assert prompt_chars(DataSpec(seq_len=100, tokenizer="hub:a/b")) == 280
    assert prompt_chars(DataSpec(seq_len=4096)) == 320


def test_the_built_in_prompt_is_of_text_that_nobody_trains_on() -> None:
    spec = DataSpec(seq_len=128)
    prompt = builtin_prompt(spec)
    assert prompt == builtin_prompt(spec)
    assert 44 <= len(prompt) <= 89
    root, files = builtin_files()
    (first, *_) = (d for d in builtin_documents(root, files, TextTally()) if prompt in d.text)
    assert is_held_out(first.name, spec.held_out)
    assert builtin_prompt(DataSpec(source="path", path="x")) == ""


def test_of_tokens_as_of_their_text() -> None:
    tokenizer, spec = ByteTokenizer(), DataSpec(seq_len=86)
    held_out = tokenizer.encode(f"short\0{GAPS * 9}\0{HEADING + CODE}\0{STORY}")
    assert prompt_of_tokens(spec, held_out, tokenizer) == choose_prompt([HEADING + CODE], 60)
    assert prompt_of_tokens(spec, tokenizer.encode(STORY), tokenizer) == choose_prompt([STORY], 60)
    assert prompt_of_tokens(spec, np.empty(0, np.uint8), tokenizer) == ""
    tokenizer.end = None
    assert prompt_of_tokens(spec, tokenizer.encode(STORY), tokenizer) == choose_prompt([STORY], 60)


@given(st.text(alphabet="ab \n\t", max_size=200), st.integers(1, 50))
def test_every_piece_is_of_the_text_and_not_too_long(text: str, max_chars: int) -> None:
    for piece in pieces(text, max_chars):
        assert piece.rstrip() in text
        assert 0 < len(piece) <= max_chars


@pytest.mark.parametrize("end", ["\n", "\n\n", "  \n"])
def test_a_whole_text_ends_where_it_ends(end: str) -> None:
    assert next(pieces("one two" + end, 60)) in ("one two\n", "one two")
