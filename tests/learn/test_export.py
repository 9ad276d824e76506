from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from p2p_diloco.core.errors import LedgerError, LocalError, UsageError
from p2p_diloco.core.manifest import RunManifest, canonical_json
from p2p_diloco.core.runfile import ModelSpec, RunSpec
from p2p_diloco.learn.architecture import resolve_config
from p2p_diloco.learn.export import INFO_FILE, export_model, read_info, set_end_token
from p2p_diloco.learn.model import build_model, loss_of
from p2p_diloco.learn.parameters import layout_of, read_parameters
from p2p_diloco.learn.prompt import builtin_prompt
from p2p_diloco.learn.sample import load_export
from p2p_diloco.learn.tokenizer import with_end
from tests.support.small_models import LLAMA

TINY = LLAMA | {"tie_word_embeddings": True}


def manifest_of(model: ModelSpec, tokenizer_json: str = "", vocab_size: int = 256) -> RunManifest:
    config = resolve_config(model, base=Path(), vocab_size=vocab_size)
    layout = layout_of(build_model(config, seed=None))
    return RunManifest(
        spec=RunSpec(name="tiny", model=model),
        model_config_json=canonical_json(config).decode(),
        n_params=layout.n,
        layout_digest=layout.digest,
        vocab_size=vocab_size,
        data_fingerprint="",
        tokenizer_json=tokenizer_json,
        genesis="0" * 64,
        owner="owner",
    )


MANIFEST = manifest_of(ModelSpec(config=TINY))


def theta_of(seed: int = 4) -> np.ndarray:
    theta = np.empty(MANIFEST.n_params, np.float32)
    read_parameters(build_model(MANIFEST.transformers_config, seed=seed), theta)
    theta.flags.writeable = False
    return theta


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_an_export_loads_in_transformers_with_the_same_loss(tmp_path: Path, model_type: str) -> None:
    gpt2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    manifest = manifest_of(ModelSpec(config=TINY if model_type == "llama" else gpt2))
    model = build_model(manifest.transformers_config, seed=4)
    theta = np.empty(manifest.n_params, np.float32)
    read_parameters(model, theta)
    export_model(manifest, theta, tmp_path / "out/model", step=12, head=b"\1" * 32)

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model", local_files_only=True)
    batch = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 33)))
    with torch.no_grad():
        ours, theirs = loss_of(model.eval(), batch).item(), loss_of(loaded, batch).item()
    assert math.isclose(ours, theirs, abs_tol=1e-6)
    assert loaded.dtype == torch.float32

    info = read_info(tmp_path / "out/model")
    assert (info.run, info.run_id, info.step, info.head) == ("tiny", manifest.run_id, 12, "01" * 32)
    assert (info.tokenizer, info.vocab_size, info.seq_len) == ("bytes", 256, 256)
    assert info.prompt == builtin_prompt(manifest.spec.data) != ""
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model"]


def test_the_tokenizer_goes_along(tmp_path: Path) -> None:
    words = {"[UNK]": 0, "hello": 1, "world": 2, "</s>": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    manifest = manifest_of(ModelSpec(config=TINY), tokenizer.to_str(), vocab_size=4)
    theta = np.zeros(manifest.n_params, np.float32)
    export_model(manifest, theta, tmp_path / "model", step=0, head=b"")
    loaded: Any = AutoTokenizer.from_pretrained(tmp_path / "model", local_files_only=True)
    assert loaded("world hello")["input_ids"] == [2, 1]
    assert loaded.eos_token_id == 3
    assert read_info(tmp_path / "model").tokenizer == "tokenizer.json"


def test_the_end_of_text_goes_along_whatever_its_name(tmp_path: Path) -> None:
    """To transformers, in all three places where it looks, and to ``sample``."""
    words = {"[UNK]": 0, "hello": 1, "</s>": 2, "<|close|>": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<|close|>"])
    manifest = manifest_of(ModelSpec(config=TINY), with_end(tokenizer.to_str(), "<|close|>"), vocab_size=4)
    export_model(manifest, np.zeros(manifest.n_params, np.float32), tmp_path / "model", step=0, head=b"")
    loaded: Any = AutoTokenizer.from_pretrained(tmp_path / "model", local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model", local_files_only=True)
    assert (loaded.eos_token, loaded.eos_token_id) == ("<|close|>", 3)
    assert (model.config.eos_token_id, model.generation_config.eos_token_id) == (3, 3)
    assert load_export(tmp_path / "model")[1].end == 3
    assert loaded.decode(loaded("hello hello")["input_ids"]) == "hello hello"


def test_where_bytes_are_tokens_generation_ends_at_the_0_byte(tmp_path: Path) -> None:
    export_model(MANIFEST, theta_of(), tmp_path / "model", step=0, head=b"")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model", local_files_only=True)
    assert (model.config.eos_token_id, model.generation_config.eos_token_id) == (0, 0)


def test_several_ends_are_kept_where_they_hold_the_runs() -> None:
    for known, kept in (([2, 0], [2, 0]), ([2, 3], 0), (2, 0), (0, 0), (None, 0)):
        config = SimpleNamespace(eos_token_id=known)
        set_end_token(SimpleNamespace(config=config, generation_config=None), 0)
        assert config.eos_token_id == kept


def test_an_earlier_export_is_replaced_and_nothing_else_is(tmp_path: Path) -> None:
    folder, theta = tmp_path / "model", theta_of()
    folder.mkdir()
    export_model(MANIFEST, theta, folder, step=1, head=b"")
    export_model(MANIFEST, theta, folder, step=2, head=b"")
    assert read_info(folder).step == 2
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/thesis.txt").write_text("ten years of work")
    for taken in (tmp_path / "notes", tmp_path / "notes/thesis.txt"):
        with pytest.raises(UsageError, match=f"{taken.name}: exists and is no earlier export; name a new folder"):
            export_model(MANIFEST, theta, taken, step=1, head=b"")
    assert (tmp_path / "notes/thesis.txt").read_text() == "ten years of work"


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (OSError(28, "No space left on device"), LedgerError, "model: disk full, free 1 MB or move the folder"),
        (OSError(5, "Input/output error"), UsageError, r"model: cannot be written \(Input/output error\)"),
    ],
)
def test_a_failed_export_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, kind: type[LocalError], message: str
) -> None:
    folder, theta = tmp_path / "model", theta_of()
    export_model(MANIFEST, theta, folder, step=1, head=b"")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(kind, match=message):
        export_model(MANIFEST, theta, folder, step=2, head=b"")
    assert read_info(folder).step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_place_that_cannot_be_written_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file/model: cannot be"):
        export_model(MANIFEST, theta_of(), tmp_path / "file/model", step=1, head=b"")


def test_another_layout_is_refused(tmp_path: Path) -> None:
    other = MANIFEST.model_copy(update={"layout_digest": "1" * 64})
    with pytest.raises(UsageError, match="builds this model with other parameters"):
        export_model(other, theta_of(), tmp_path / "model", step=1, head=b"")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_export_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no exported model here"):
        read_info(tmp_path / "nowhere")
    (tmp_path / INFO_FILE).write_text(json.dumps({"run": "x"}))
    with pytest.raises(UsageError, match=r"p2p_diloco\.json: damaged"):
        read_info(tmp_path)
