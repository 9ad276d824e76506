"""A run from what a person has on the disk: a pretrained folder, a folder of the datasets library, a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tokenizers

from p2p_diloco.core.errors import DataError, UsageError
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.manifest import open_manifest
from p2p_diloco.core.runfile import DataSpec, ModelSpec, RunSpec
from p2p_diloco.learn import genesis, train
from p2p_diloco.learn.genesis import make_config, make_start, start_run
from p2p_diloco.learn.model import build_model
from p2p_diloco.learn.parameters import layout_of, read_parameters
from p2p_diloco.ledger.folder import MANIFEST_FILE, load_state

OWNER = Identity.from_seed(bytes(32))
LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
CONFIG = LLAMA | {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64, "eos_token_id": None}
LLAMA_ALONE = '{"model_type":"llama"}'
INLINE = (
    "{ "
    + ", ".join(f"{key} = {json.dumps(value)}" for key, value in (LLAMA | {"num_attention_heads": 2}).items())
    + " }"
)
WORDS = [f"w{i}" for i in range(50)]
RUN_FILE = """
name = "test"
[model]
path = "start"
[data]
source = "hub"
path = "set"
text_key = "body"
tokenizer = "start"
seq_len = 16
held_out = 0.3
"""


def write_start(folder: Path) -> Any:
    """A folder as save_pretrained leaves it, with its tokenizer."""
    model: Any = build_model(CONFIG, seed=5)
    model.save_pretrained(folder)
    words = {word: i for i, word in enumerate(("[UNK]", "</s>", "row", "says", *WORDS))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return model


def test_a_run_on_a_saved_data_set_starts_from_pretrained_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets.disable_progress_bars()
    model = write_start(tmp_path / "start")
    rows = datasets.Dataset.from_dict({"body": [f"row says {WORDS[i % 50]}" for i in range(200)]})
    rows.save_to_disk(tmp_path / "set")
    (tmp_path / "run.toml").write_text(RUN_FILE)
    path = start_run(tmp_path / "run.toml", tmp_path / "owner", OWNER)
    manifest, state = load_state(path.parent)
    weights = np.empty(layout_of(model).n, np.float32)
    read_parameters(model, weights)
    assert np.array_equal(state.theta, weights)
    assert json.loads(manifest.tokenizer_json)["model"]["vocab"]["says"] == 3
    assert (manifest.vocab_size, manifest.data_fingerprint) == (54, "")
    assert start_run(tmp_path / "run.toml", tmp_path / "owner", OWNER) == path

    monkeypatch.setattr(train, "cache_folder", lambda: tmp_path / "cache")
    received = open_manifest(path.read_bytes(), "test")
    found = [
        train.open_run_corpus(received, own_data=tmp_path / "set", peer_id=name) for name in ("anna", "bert", "anna")
    ]
    batches = [corpus.batch(run_seed=0, peer_id="anna", step=3, batch_size=4, seq_len=16).tobytes() for corpus in found]
    assert batches[0] == batches[2] != batches[1]
    assert np.array_equal(found[0].held_out, found[1].held_out)
    assert train.corpus_name(received, None) == "set"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"brings no text of its own; add --data FILE-OR-FOLDER"):
        train.open_run_corpus(received, own_data=None, peer_id="anna")
    opened = len(list((tmp_path / "cache").iterdir()))
    with pytest.raises(UsageError, match=r"brings no text of its own; add --data FILE-OR-FOLDER"):
        train.require_text(received, None)
    with pytest.raises(DataError, match="no such file"):
        train.require_text(received, tmp_path / "nowhere")
    train.require_text(received, tmp_path / "set")
    assert len(list((tmp_path / "cache").iterdir())) == opened
    smaller = json.dumps({**received.transformers_config, "vocab_size": 53})
    for unsound in ({"vocab_size": 55}, {"model_config_json": smaller}, {"model_config_json": LLAMA_ALONE}):
        with pytest.raises(UsageError, match="this run's manifest is not sound: its tokenizer has 54 tokens"):
            train.open_run_corpus(received.model_copy(update=unsound), own_data=tmp_path / "set", peer_id="anna")

    (tmp_path / "run.toml").write_text(RUN_FILE.replace('"body"', '"text"'))
    with pytest.raises(DataError, match=r"no text under 'text'; data\.text_key can be: body"):
        start_run(tmp_path / "run.toml", tmp_path / "owner", OWNER)


def test_a_folder_that_is_no_decoder_starts_no_run(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model: Any = build_model({"model_type": "bert", "vocab_size": 256, "pad_token_id": 0} | sizes, seed=1)
    model.save_pretrained(tmp_path / "start")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "rows.jsonl").write_text("".join(f'{{"text": "this is row {i}"}}\n' for i in range(200)))
    text = RUN_FILE.replace('"hub"', '"path"').replace('"set"', '"text"').replace('"body"', '"text"')
    (tmp_path / "run.toml").write_text(text.replace('tokenizer = "start"', 'tokenizer = "bytes"'))
    with pytest.raises(UsageError, match=r"would see the tokens that it is to predict; give a decoder"):
        start_run(tmp_path / "run.toml", tmp_path / "owner", OWNER)


def test_weights_that_peers_cannot_get_start_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise UsageError("asked")

    write_start(tmp_path / "start")
    datasets.Dataset.from_dict({"body": ["row says"] * 20}).save_to_disk(tmp_path / "set")
    (tmp_path / "run.toml").write_text(RUN_FILE)
    monkeypatch.setattr(genesis, "check_untrained", refuse)
    with pytest.raises(UsageError, match="asked"):
        start_run(tmp_path / "run.toml", tmp_path / "owner", OWNER)


def test_what_the_first_use_of_a_model_changes_is_no_start_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Theta is what was built: a model that makes it another one when it is first used, and never again, is seen."""
    model: Any = build_model(CONFIG, seed=5)

    def normalize(used: Any, *_: object) -> None:
        used.lm_head.weight.data.clamp_(-0.01, 0.01)

    model.register_forward_pre_hook(normalize)
    monkeypatch.setattr(genesis, "build_model", lambda *_, **__: model)
    spec = RunSpec(name="test", model=ModelSpec(config=CONFIG), data=DataSpec(seq_len=8))
    with pytest.raises(UsageError, match=r"^run\.toml: (lm_head|model\.embed_tokens)\.weight: .* changes it"):
        make_start(spec, make_config(spec, tmp_path, "run.toml", 64), tmp_path, "run.toml", 64)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('"llama"', '"lama"', "key 'model.config.model_type': transformers has no language model 'lama'; did you mean"),
        ("hidden_size", "hiden_size", "unknown key 'model.config.hiden_size'; did you mean 'hidden_size'?"),
        ("num_attention_heads = 2", "num_attention_heads = 3", "model.config: "),
        (
            'tokenizer = "start"',
            'tokenizer = "nowhere"',
            "key 'data.tokenizer': {base}/nowhere: no such tokenizer;",
        ),
    ],
)
def test_a_mistake_in_a_run_file_is_told_with_its_name_before_the_text_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, after: str, message: str
) -> None:
    def read(*_: object, **__: object) -> None:
        raise AssertionError("the text is read")

    monkeypatch.setattr(genesis, "open_corpus", read)
    write_start(tmp_path / "start")
    text = RUN_FILE.replace('"hub"', '"path"').replace('path = "start"', f"config = {INLINE}")
    assert before in text
    path = tmp_path / "run.toml"
    path.write_text(text.replace(before, after, 1))
    with pytest.raises(UsageError) as raised:
        start_run(path, tmp_path / "owner", OWNER)
    assert str(raised.value).startswith(f"{path}: {message.format(base=tmp_path)}")
    assert str(raised.value).count(str(path)) == 1


def test_who_starts_a_run_is_told_of_its_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(genesis, "cache_folder", lambda: tmp_path / "cache")
    caplog.set_level("INFO")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/rows.jsonl").write_text("".join(f'{{"body": "row says {word}"}}\n' for word in WORDS * 9))
    (tmp_path / "set/notes.md").write_text("notes")
    text = RUN_FILE.replace('"hub"', '"path"').replace('path = "start"', f"config = {INLINE}")
    (tmp_path / "run.toml").write_text(text)
    write_start(tmp_path / "start")
    start_run(tmp_path / "run.toml", tmp_path / "owner", OWNER)
    read, skipped = (record.getMessage() for record in caplog.records if record.getMessage().startswith("text: "))
    assert read.startswith("text: 1 file, 450 documents, each followed by </s> (token 1); 1800 tokens, ")
    assert skipped == "text: skipped files with a suffix that is not read: 1, 5 bytes (notes.md)"


def test_a_run_of_another_protocol_stays_as_it_is_and_another_starts_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(genesis, "cache_folder", lambda: tmp_path / "cache")
    caplog.set_level("INFO")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/rows.jsonl").write_text("".join(f'{{"body": "row says {word}"}}\n' for word in WORDS * 9))
    text = RUN_FILE.replace('"hub"', '"path"').replace('path = "start"', f"config = {INLINE}")
    (tmp_path / "run.toml").write_text(text)
    write_start(tmp_path / "start")
    first = start_run(tmp_path / "run.toml", tmp_path / "owner", OWNER)
    older = first.parent.with_name("test-of-before")
    first.parent.rename(older)
    manifest = open_manifest((older / MANIFEST_FILE).read_bytes(), "test")
    (older / MANIFEST_FILE).write_bytes(manifest.model_copy(update={"protocol": 2}).signed(OWNER))
    before = {path: path.read_bytes() for path in older.rglob("*") if path.is_file()}
    assert start_run(tmp_path / "run.toml", tmp_path / "owner", OWNER) == first
    assert start_run(tmp_path / "run.toml", tmp_path / "owner", OWNER) == first
    lines = [record.getMessage() for record in caplog.records if "another protocol" in record.getMessage()]
    said = f"{older / MANIFEST_FILE}: a run of another protocol; it stays as it is, and a new one is started beside it"
    assert lines == [said]
    assert {path: path.read_bytes() for path in older.rglob("*") if path.is_file()} == before
