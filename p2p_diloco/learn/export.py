"""Theta -> a folder that transformers loads, with a note of which run and outer step it is.

    config.json, generation_config.json, model.safetensors     as AutoModelForCausalLM.from_pretrained wants them
    tokenizer.json, tokenizer_config.json                      where the run has a tokenizer of the tokenizers library
    p2p_diloco.json                                            what ``sample`` and a reader need to know: ExportInfo

The folder appears whole or not at all: it is written beside its place, synced and renamed. An earlier export is
replaced; any other folder with something in it is left alone.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from p2p_diloco.core.codec import Vector
from p2p_diloco.core.errors import UsageError, disk_failure
from p2p_diloco.core.manifest import RunManifest
from p2p_diloco.learn.model import model_of, no_progress_bars
from p2p_diloco.learn.parameters import write_parameters
from p2p_diloco.learn.prompt import builtin_prompt
from p2p_diloco.learn.tokenizer import LibraryTokenizer, open_tokenizer
from p2p_diloco.ledger.disk import sync

INFO_FILE = "p2p_diloco.json"


class ExportInfo(BaseModel):
    """The note beside an exported model: which run and outer step it is, and how it reads text."""

    model_config = ConfigDict(frozen=True)

    run: str
    """The run's name."""
    run_id: str
    step: int
    """Outer steps that led to these weights."""
    head: str
    """Hex digest of the run's history up to ``step``; equal heads, equal weights."""
    tokenizer: Literal["bytes", "tokenizer.json"]
    """``bytes``: a token is a byte of UTF-8, and 0 ends a document."""
    vocab_size: int
    seq_len: int
    """Tokens the model saw at once in training."""
    prompt: str = ""
    """Held-out text to go on from; empty where the run's text is not the built-in one."""


def export_model(manifest: RunManifest, theta: Vector, folder: Path, *, step: int, head: bytes) -> None:
    """Writes ``theta``, float32 [n] of outer step ``step``, to a folder that transformers loads. UsageError when
    ``folder`` is taken or cannot be written."""
    from safetensors import SafetensorError

    folder = Path(os.path.abspath(folder))
    refuse_taken(folder)
    model: Any = model_of(manifest)
    write_parameters(model, theta)
    info = ExportInfo(
        run=manifest.spec.name,
        run_id=manifest.run_id,
        step=step,
        head=head.hex(),
        tokenizer="tokenizer.json" if manifest.tokenizer_json else "bytes",
        vocab_size=manifest.vocab_size,
        seq_len=manifest.spec.data.seq_len,
        prompt=builtin_prompt(manifest.spec.data),
    )
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        if manifest.tokenizer_json:
            write_tokenizer(manifest.tokenizer_json, temporary)
        end = open_tokenizer(manifest.tokenizer_json).end
        if end is not None:
            set_end_token(model, end)
        with no_progress_bars():
            model.eval().save_pretrained(temporary)
        (temporary / INFO_FILE).write_text(info.model_dump_json(indent=2) + "\n", encoding="utf-8")
        for path in temporary.iterdir():
            sync(path)
        put_in_place(temporary, folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        full = disk_failure(error, folder, 4 * len(theta)) if isinstance(error, OSError) else None
        if full is None and "os error 28" in str(error):  # as Rust's safetensors says it
            full = disk_failure(OSError(errno.ENOSPC, reason), folder, 4 * len(theta))
        raise full or UsageError(f"{folder}: cannot be written ({reason})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_taken(folder: Path) -> None:
    """Raises UsageError where there is something else than an earlier export, or an empty folder."""
    try:
        taken = folder.exists() and not (folder / INFO_FILE).is_file() and (folder.is_file() or any(folder.iterdir()))
    except OSError as error:
        raise UsageError(f"{folder}: cannot be read ({error.strerror})") from error
    if taken:
        raise UsageError(f"{folder}: exists and is no earlier export; name a new folder")


def put_in_place(temporary: Path, folder: Path) -> None:
    """Renames the folder, with an earlier export out of the way until the new one is there."""
    earlier = temporary.with_suffix(".old")
    if folder.is_dir():
        folder.rename(earlier)
    try:
        temporary.rename(folder)
    except OSError:
        if earlier.is_dir():
            earlier.rename(folder)
        raise
    shutil.rmtree(earlier, ignore_errors=True)


def set_end_token(model: Any, end: int) -> None:
    """Makes ``generate`` of transformers end at ``end``, too: a model type's default is the id of some other token."""
    for config in (model.config, model.generation_config):
        known = getattr(config, "eos_token_id", None)
        if config is not None and end not in (known if isinstance(known, list) else [known]):
            config.eos_token_id = end


def write_tokenizer(tokenizer_json: str, folder: Path) -> None:
    """Writes the run's tokenizer so that AutoTokenizer loads it. Its end of text is the token that stood between the
    run's documents."""
    tokenizer = LibraryTokenizer(tokenizer_json)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    end = {} if tokenizer.end_token is None else {"eos_token": tokenizer.end_token}
    (folder / "tokenizer.json").write_text(tokenizer.library_json, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config | end, indent=2) + "\n", encoding="utf-8")


def read_info(folder: Path) -> ExportInfo:
    """Returns the note of an exported model. Raises UsageError unless ``folder`` is an export."""
    path = folder / INFO_FILE
    try:
        return ExportInfo.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(
            f"{folder}: no exported model here ({INFO_FILE} is missing); p2p-diloco export makes one"
        ) from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    except ValidationError as error:
        raise UsageError(f"{path}: damaged; export the model again") from error
