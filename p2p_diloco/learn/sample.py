"""An exported model -> text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from p2p_diloco.core.errors import UsageError
from p2p_diloco.learn.export import ExportInfo, read_info
from p2p_diloco.learn.model import context_tokens, load_pretrained
from p2p_diloco.learn.tokenizer import LibraryTokenizer, Tokenizer, end_token_beside, open_tokenizer, with_end

LONGEST_GAP = 24
"""Spaces in a row that are shown as they are. A small model that has begun to indent often does not find back."""
MEMORIES = ("past_key_values", "cache_params", "state")
"""What models call what they keep of earlier tokens: keys and values, or a state of their own (Mamba, RWKV)."""
EXPECTATIONS = (
    (5e6, "learns the look of its text, such as words, brackets and indentation, but no sense"),
    (60e6, "learns sentences and simple stories, and soon loses the thread"),
    (600e6, "learns to write fluent paragraphs, and makes up what they say"),
    (float("inf"), "learns to write pages that hold together; what they claim is not to be relied on"),
)
"""Of models smaller than so many parameters."""


def load_export(folder: Path) -> tuple[torch.nn.Module, Tokenizer, ExportInfo]:
    """Returns what is in a folder that ``export_model`` wrote; the model is on the CPU, in evaluation mode. Raises
    UsageError for any other folder."""
    info = read_info(folder)
    tokenizer_json = ""
    if info.tokenizer == "tokenizer.json":
        path = folder / "tokenizer.json"
        try:
            tokenizer_json = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path}: cannot be read; export the model again") from error
        end_token = end_token_beside(path, LibraryTokenizer(tokenizer_json, str(path)))
        if end_token is not None:
            tokenizer_json = with_end(tokenizer_json, end_token)
    return load_pretrained(folder).eval(), open_tokenizer(tokenizer_json), info


def generate(
    model: torch.nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int,
) -> Iterator[str]:
    """Yields what follows ``prompt``, in pieces as soon as their characters are complete; the same for the same
    ``seed``.

    It ends after ``max_tokens``, or where the model ends the document. ``temperature`` 0 takes the likeliest token;
    ``top_k`` leaves only that many to choose from. Of a longer text than the model's context, the last tokens count.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    context = context_tokens(model)
    tokens = tokenizer.encode(prompt).tolist() or ([] if tokenizer.end is None else [tokenizer.end])
    if not tokens:
        raise UsageError("give a prompt: this model's tokenizer has no token to begin a document with")
    new: list[int] = []
    shown = ""
    kept: dict[str, Any] = {}
    cached = 0  # of so many tokens up to the last but one the model has a memory in ``kept``
    while len(new) < max_tokens:
        if not kept or cached == context:
            # A full cache is rebuilt from half of it, so that this happens once in half a context.
            keep = len(tokens) if context is None or len(tokens) <= context else max(context // 2, 1)
            fed, kept, cached = tokens[-keep:], {}, 0
        else:
            fed = tokens[-1:]
        with torch.inference_mode():
            output = model(input_ids=torch.tensor([fed], device=device), use_cache=True, **kept)
        kept = {name: memory for name in MEMORIES if (memory := getattr(output, name, None)) is not None}
        cached += len(fed)
        token = choose(output.logits[0, -1, : tokenizer.vocab_size].float().cpu(), temperature, top_k, generator)
        if token == tokenizer.end:
            break
        tokens.append(token)
        new.append(token)
        text = tokenizer.decode(new)
        if not text.endswith("\ufffd"):  # else perhaps the first bytes of a character
            yield text[len(shown) :]
            shown = text
    yield tokenizer.decode(new)[len(shown) :]


def choose(logits: torch.Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    """Returns the id of the next token. ``logits``: float32 [vocab]; UsageError when they are not finite."""
    highest = logits.max()
    if not highest.isfinite():  # which is so as soon as one of them is NaN, or positive infinity
        raise UsageError("the model's output is no numbers: its training has diverged; take an earlier outer step")
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None:
        smallest = logits.topk(min(top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    # In double precision, and with the largest at 0, the smallest temperature that there is divides all the same.
    scaled = (logits - highest).double() / temperature
    return int(torch.multinomial(torch.softmax(scaled, dim=0), 1, generator=generator))


# -- for people --------------------------------------------------------------------------------------------------------


def presented(prompt: str, continuation: Iterable[str], n_params: int) -> Iterator[str]:
    """Yields ``prompt``, a piece of held-out text, and what the model makes of it, each marked in the margin, in pieces
    as they come; then what is to be expected of a model of this size."""
    yield "held-out text, which no peer has trained on:\n\n"
    yield from in_margin([prompt], "  | ")
    yield "\n\nhow the model goes on:\n\n"
    yield from in_margin(continuation, "  > ")
    yield f"\n\n{expectation(n_params)}\n"


def in_margin(pieces: Iterable[str], margin: str) -> Iterator[str]:
    """Yields the text with ``margin`` before each line. White space that shows nothing is shortened: long gaps within a
    line to a note, several empty lines to one, and what ends the text to nothing."""
    yield margin
    waiting = ""
    for piece in pieces:
        text = waiting + piece
        ended = text.rstrip()
        waiting = text[len(ended) :]
        shown = re.sub(r"\n(?:[ \t]*\n)+", "\n\n", ended)
        shown = re.sub(rf"[ \t]{{{LONGEST_GAP + 1},}}", lambda gap: f"[{len(gap[0])} spaces]", shown)
        yield shown.replace("\n", f"\n{margin}")


def expectation(n_params: int) -> str:
    """Returns a sentence on what a model of this size can learn to write."""
    learns = next(learns for smaller_than, learns in EXPECTATIONS if n_params < smaller_than)
    size = f"{n_params / 1e9:.3g} billion" if n_params >= 1e9 else f"{n_params / 1e6:.3g} million"
    return f"What to expect: a model of {size} parameters {learns}. Early in a run it is worse."
