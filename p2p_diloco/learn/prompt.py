"""Held-out text for a model to go on from, so that one sees what it has learned: the same text, the same prompt."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from p2p_diloco.core.runfile import DataSpec
from p2p_diloco.learn.text import builtin_documents, builtin_files, is_held_out
from p2p_diloco.learn.textreport import TextTally
from p2p_diloco.learn.tokenizer import Tokenizer, Tokens

MOST_CHARS = 320
CHARS_PER_TOKEN = 4
"""Of English, in tokens of most vocabularies."""
SHARE_OF_CONTEXT = 0.7
"""Of what a model sees at once; the rest is for its own first words."""
MOST_SPACE = 0.22
"""Share of white space in a prompt; English has 0.18, indented code 0.3."""
LEAST_LETTERS = 0.55
TEXTS_LOOKED_THROUGH = 1000
TOKENS_LOOKED_THROUGH = 2**18
PARAGRAPH = re.compile(r"\n(?:[ \t]*\n)+")


def prompt_chars(spec: DataSpec) -> int:
    """Returns how many characters a prompt may have, to leave room for the model's own words."""
    chars_per_token = 1 if spec.tokenizer == "bytes" else CHARS_PER_TOKEN
    return min(int(SHARE_OF_CONTEXT * spec.seq_len * chars_per_token), MOST_CHARS)


def builtin_prompt(spec: DataSpec) -> str:
    """Returns a prompt from the built-in text that no peer has trained on; "" where a run has other text. Raises
    DataError when that text cannot be read."""
    if spec.source != "builtin":
        return ""
    root, files = builtin_files()
    held_out = [path for path in files if is_held_out(path.relative_to(root).as_posix(), spec.held_out)]
    return choose_prompt(
        (document.text for document in builtin_documents(root, held_out, TextTally())), prompt_chars(spec)
    )


def prompt_of_tokens(spec: DataSpec, held_out: Tokens, tokenizer: Tokenizer) -> str:
    """Returns a prompt from a corpus's held-out tokens, of any text; "" where nothing in the first of them suits."""
    tokens = held_out[:TOKENS_LOOKED_THROUGH]
    ends = [] if tokenizer.end is None else np.flatnonzero(tokens == tokenizer.end).tolist()
    starts = [0, *(end + 1 for end in ends)]
    texts = (tokenizer.decode(tokens[start:end].tolist()) for start, end in zip(starts, [*ends, len(tokens)]))
    return choose_prompt(texts, prompt_chars(spec))


def choose_prompt(texts: Iterable[str], max_chars: int) -> str:
    """Returns the first piece that a model can show something with: long enough, with few spaces and many letters. ""
    where the first thousand texts have none."""
    for text in islice(texts, TEXTS_LOOKED_THROUGH):
        for piece in pieces(text, max_chars):
            spaces, letters = sum(map(str.isspace, piece)), sum(map(str.isalpha, piece))
            enough = 2 * len(piece) >= max_chars and letters >= LEAST_LETTERS * len(piece)
            if enough and spaces <= MOST_SPACE * len(piece):
                return piece
    return ""


def pieces(text: str, max_chars: int) -> Iterator[str]:
    """Yields beginnings of paragraphs: whole lines, else whole words, of at most ``max_chars`` together. Those of the
    second half come first: most texts begin with a heading, a licence or imports."""
    starts = [0, *(match.end() for match in PARAGRAPH.finditer(text))]
    half = len(text) // 2
    for start in sorted(starts, key=lambda start: (start < half, start)):
        piece = text[start : start + max_chars]
        if start + max_chars < len(text):
            piece = piece[: piece.rfind("\n") + 1 or max(piece.rfind(" "), 0)]
        words = piece.rstrip()
        if words:
            yield words + ("\n" if "\n" in piece[len(words) :] else "")
