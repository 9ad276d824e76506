"""Data sets, tokenizers and models by name: on local folders, on a folder in the form of the hub's cache, and on names
that cannot be reached. Nothing here asks the hub itself."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import httpx2
import huggingface_hub
import numpy as np
import pytest
import tokenizers
from huggingface_hub import constants
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError

from p2p_diloco.core.digest import digest
from p2p_diloco.core.errors import DataError, LocalError, Stopped, UsageError
from p2p_diloco.core.runfile import DataSpec
from p2p_diloco.learn import hub, source
from p2p_diloco.learn.data import open_corpus
from p2p_diloco.learn.hub import PIECES, check_data_set, find_model, find_tokenizer, hub_documents, places
from p2p_diloco.learn.text import Document, is_held_out
from p2p_diloco.learn.textreport import NULL, ZERO, TextTally
from p2p_diloco.learn.tokenizer import LibraryTokenizer, load_tokenizer_json

TEXTS = [f"document {i:04d} says {'abc' * (i % 5)} and ends" for i in range(600)]
SPEC = DataSpec(source="hub", path="set", seq_len=16, held_out=0.2, eval_tokens=64, max_documents=150)


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The libraries' caches are here, and there is no network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))

    def nobody(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    datasets.disable_progress_bars()


def rows(texts: list[str] = TEXTS) -> Any:
    return datasets.Dataset.from_dict({"n": list(range(len(texts))), "text": texts})


def write_files(folder: Path, n_files: int, kind: str = "json", texts: list[str] = TEXTS) -> Path:
    """The same texts in the same order, in so many files."""
    folder.mkdir(parents=True)
    for i in range(n_files):
        part = rows(texts).shard(num_shards=n_files, index=i, contiguous=True)
        getattr(part, f"to_{kind}")(folder / f"train-{i:03d}.{kind}")
    return folder


def write_saved(folder: Path) -> Path:
    rows().save_to_disk(folder)
    return folder


def write_split(folder: Path) -> Path:
    datasets.DatasetDict({"train": rows(), "validation": rows(TEXTS[:90])}).save_to_disk(folder)
    return folder


FORMS: dict[str, Callable[[Path], Path]] = {
    "saved": write_saved,
    "saved with splits": write_split,
    "parquet": lambda folder: write_files(folder, 2, "parquet"),
    "json": lambda folder: write_files(folder, 20),
    "one file": lambda folder: write_files(folder, 1),
}


def read(base: Path, peer_id: str = "anna", run_seed: int = 1, spec: DataSpec = SPEC) -> tuple[list[str], list[str]]:
    """What it trains on, and what is held out, in order."""
    found: list[Document] = list(hub_documents(spec, base=base, run_seed=run_seed, peer_id=peer_id, tally=TextTally()))
    return tuple([d.text for d in found if d.held_out is apart] for apart in (False, True))  # type: ignore[return-value]


@pytest.mark.parametrize("form", FORMS)
def test_a_peer_reads_a_part_of_its_own_and_always_the_same(tmp_path: Path, form: str) -> None:
    FORMS[form](tmp_path / "set")
    train, held_out = read(tmp_path)
    assert 90 <= len(train) <= 150
    assert len(set(train)) == len(train)
    assert set(train) <= set(TEXTS)
    assert (train, held_out) == read(tmp_path)
    others = [read(tmp_path, f"peer {i}") for i in range(4)]
    assert {tuple(other[1]) for other in others} == {tuple(held_out)}
    assert len({tuple(other[0]) for other in others}) >= 3
    assert not set(held_out) & set().union(*(other[0] for other in others), train)
    assert read(tmp_path, run_seed=2)[0] != train


def test_held_out_are_the_first_by_hash_whatever_the_form(tmp_path: Path) -> None:
    for form, write in FORMS.items():
        write(tmp_path / form / "set")
    found = {form: read(tmp_path / form)[1] for form in FORMS}
    first = found["saved"]
    assert all(held_out == first for held_out in found.values())
    assert sum(map(len, first)) >= 8 * (64 + 16) > sum(map(len, first[:-1]))
    expected = [text for text in TEXTS if is_held_out(digest(text.encode()).hex(), 0.2)]
    assert first == expected[: len(first)]


def test_a_split_of_its_own_is_held_out_and_nothing_else(tmp_path: Path) -> None:
    write_split(tmp_path / "set")
    spec = SPEC.model_copy(update={"held_out_split": "validation", "max_documents": 10_000})
    train, held_out = read(tmp_path, spec=spec)
    assert sorted(train) == TEXTS
    assert held_out == TEXTS[: len(held_out)]
    assert len(held_out) > 10


@pytest.mark.parametrize("form", FORMS)
def test_a_small_data_set_is_everybodys_but_in_another_order(tmp_path: Path, form: str) -> None:
    FORMS[form](tmp_path / "set")
    spec = SPEC.model_copy(update={"max_documents": 10_000})
    found = [read(tmp_path, f"peer {i}", spec=spec)[0] for i in range(2)]
    expected = sorted(text for text in TEXTS if not is_held_out(digest(text.encode()).hex(), 0.2))
    assert all(sorted(train) == expected for train in found)
    assert found[0] != found[1]


def test_places_are_a_function_of_seed_and_peer() -> None:
    order, skipped = places(1024, 100, 7, "anna")
    assert (sorted(order), skipped) == (list(range(1024)), 0)
    assert order[:4] == [140, 625, 234, 884]
    assert places(1024, 100, 8, "anna")[0][:4] != order[:4] != places(1024, 100, 7, "bert")[0][:4]
    few = [places(2, 100, 7, f"peer {i}")[1] for i in range(200)]
    assert 0 <= min(few) < 20 < 680 < max(few) <= 100 * (PIECES // 2 - 1)
    assert len(set(few)) > 150


@pytest.mark.parametrize(("start", "first"), [(0, 0), (4, 4), (9, 9), (10, 0), (13, 3), (1000, 0)])
def test_reading_starts_anywhere_and_goes_round(start: int, first: int) -> None:
    numbered = [Document(str(i), "") for i in range(10)]
    found = [int(document.name) for document in hub.from_document(start, lambda: iter(numbered), TextTally())]
    assert found == [*range(first, 10), *range(first)]
    assert list(hub.from_document(start, lambda: iter(()), TextTally())) == []


def test_tokens_are_kept_for_each_peer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    write_saved(tmp_path / "set")

    def opened(peer_id: str, base: Path = tmp_path, own: Path | None = None) -> tuple[bytes, bytes, int]:
        caplog.clear()
        corpus = open_corpus(SPEC, base=base, cache=tmp_path / "cache", override_path=own, run_seed=1, peer_id=peer_id)
        assert corpus.fingerprint == ""
        return corpus.train.tobytes(), corpus.held_out.tobytes(), len(caplog.records)

    train, held_out, built = opened("anna")
    assert built == 1
    assert train.decode().split("\0")[:-1] == read(tmp_path)[0]
    assert opened("anna") == (train, held_out, 0)
    other = opened("bert")
    assert other[0] != train
    assert other[1:] == (held_out, 1)
    assert opened("anna", tmp_path / "elsewhere", own=tmp_path / "set")[:2] == (train, held_out)
    with pytest.raises(UsageError, match="no name on the hub"):
        opened("anna", tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        (
            {"path": "nowhere"},
            UsageError,
            "nowhere is no folder, and 'nowhere' no name on the hub, which is OWNER/NAME",
        ),
        ({"path": "json"}, UsageError, "'json' no name on the hub"),
        ({"path": "../a/b"}, UsageError, "'../a/b' no name on the hub"),
        ({"path": "empty"}, DataError, "empty, data.config = None (The directory at "),
        ({"path": "broken"}, DataError, "broken, data.split = 'train' (Parquet magic bytes"),
        ({"config": "en"}, DataError, "set, data.config = 'en' (BuilderConfig 'en' not found"),
        ({"split": "test"}, DataError, "set, data.split = 'test' (Bad split: test. Available splits: ['train'])"),
        ({"held_out_split": "test"}, DataError, "set, data.held_out_split = 'test' (Bad split: test."),
        ({"text_key": "body"}, DataError, "set: no text under 'body'; data.text_key can be: text"),
        ({"text_key": "n"}, DataError, "set: no text under 'n'; data.text_key can be: text"),
        ({"path": "saved", "config": "en"}, UsageError, "saved: a saved data set has no configurations"),
        ({"path": "saved", "split": "test"}, UsageError, "saved: no split 'test'; data.split can be: train"),
        ({"path": "saved", "held_out_split": "x"}, UsageError, "no split 'x'; data.held_out_split can be: train"),
        ({"path": "none"}, DataError, "none: no documents in split 'train'; choose another under data.split"),
        ({"path": "damaged"}, DataError, "damaged ("),
        ({"path": "cut"}, DataError, "cut ("),
    ],
)
def test_a_mistake_is_one_clear_line(
    tmp_path: Path, changed: dict[str, str], kind: type[LocalError], message: str
) -> None:
    write_files(tmp_path / "set", 1)
    write_saved(tmp_path / "saved")
    (tmp_path / "none").mkdir()
    rows().select([]).to_parquet(tmp_path / "none" / "train.parquet")
    for name, file, text in (
        ("empty", "", ""),
        ("broken", "train.parquet", "nonsense"),
        ("damaged", "state.json", "nonsense"),
        ("cut", "train.jsonl", '{"text": "a"}\n{"text": a}\n'),
    ):
        (tmp_path / name).mkdir()
        if file:
            (tmp_path / name / file).write_text(text)
    spec = SPEC.model_copy(update=changed)
    with pytest.raises(kind) as caught:
        check_data_set(spec, tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(LocalError):
        open_corpus(spec, base=tmp_path, cache=tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*.tmp"))


def describe(folder: Path, data_file: str) -> None:
    text = f"configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {data_file}\n"
    (folder / "README.md").write_text(f"---\n{text}---\n")


def test_a_data_set_that_names_the_readers_own_files_is_refused(tmp_path: Path) -> None:
    inside, outside = write_files(tmp_path / "set", 1), write_files(tmp_path / "private", 1)
    (inside / "link.json").symlink_to(outside / "train-000.json")
    describe(inside, "train-000.json")
    assert read(tmp_path)[0]
    for stray in (str(outside / "train-000.json"), "../private/*.json", "link.json"):
        describe(inside, stray)
        with pytest.raises(DataError, match=r"set: this data set names a file that is not in it, .*; do not use it"):
            read(tmp_path)


def test_files_on_the_hub_are_of_the_data_set_itself() -> None:
    own = "hf://datasets/some/set@0123/data/a.parquet"
    hub.refuse_strays("some/set", ("hf://datasets/some/set@",), {"train": [own]})
    hub.refuse_strays("some/set", ("hf://datasets/some/set@",), None)
    for stray in ("/home/anna/a.txt", "http://192.0.2.1/a", "hf://datasets/some/set2@0/a", "zip://a::/home/a.zip"):
        with pytest.raises(DataError, match=r"some/set: this data set names a file that is not in it"):
            hub.refuse_strays("some/set", ("hf://datasets/some/set@",), {"train": [own, stray]})


def test_a_folder_of_the_hubs_cache_is_a_data_set(tmp_path: Path) -> None:
    """Its files are links to what lies beside it."""
    files = write_files(tmp_path / "cache" / "blobs", 1)
    snapshot = tmp_path / "cache" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "train.json").symlink_to(files / "train-000.json")
    assert read(tmp_path, spec=SPEC.model_copy(update={"path": "cache/snapshots/0123"}))[0]


@pytest.mark.parametrize("base", [None, Path("elsewhere")])
def test_a_name_on_the_hub_is_no_folder_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: Path | None
) -> None:
    write_files(tmp_path / "some" / "set", 1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "look_up", lambda name, *_: (name, "0123456789" * 4))
    spec = SPEC.model_copy(update={"path": "some/set"})
    with pytest.raises(DataError, match=r"some/set, data\.config = None"):
        list(hub_documents(spec, base=base, run_seed=1, peer_id="anna", tally=TextTally()))
    assert list(hub_documents(spec, base=tmp_path, run_seed=1, peer_id="anna", tally=TextTally()))


@pytest.mark.parametrize(
    "name", ["set", "./some/set", "../set", "/some/set", "a/b/c", "a/b@../c", "a/b@/c", "a/b@c/../d"]
)
def test_a_strangers_name_is_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no name on the hub"):
        list(
            hub_documents(
                SPEC.model_copy(update={"path": name}), base=None, run_seed=1, peer_id="anna", tally=TextTally()
            )
        )


def test_tokens_leave_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path / "set", 1)
    free = iter([2 * 10**9, 10**9, 10**9 - 1])
    monkeypatch.setattr("p2p_diloco.learn.source.shutil.disk_usage", lambda _: SimpleNamespace(free=next(free)))
    monkeypatch.setattr(source, "LOOK_EVERY_CHARS", 1000)
    with pytest.raises(
        DataError, match=r"cache: 1\.00 GB are free, and a data set's tokens must leave 1 GB; make room"
    ):
        open_corpus(SPEC, base=tmp_path, cache=tmp_path / "cache")
    assert next(free, None) is None
    assert not list(tmp_path.glob("cache/*/"))


def test_rows_without_text_are_left_out(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["one", None, "two"]}).save_to_disk(tmp_path / "set")
    spec = SPEC.model_copy(update={"held_out": 1e-9})
    assert sorted(read(tmp_path, spec=spec)[0]) == ["one", "two"]


def test_a_data_set_is_reported_as_this_peer_reads_it(tmp_path: Path) -> None:
    """Rows that it only passes by, on its way to where it starts, are not counted."""
    texts = [text for pair in zip(TEXTS, [None] * len(TEXTS)) for text in pair]
    datasets.Dataset.from_dict({"text": [*texts, "with a \0"]}).to_parquet(tmp_path / "set/train.parquet")
    tally, spec = TextTally(), SPEC.model_copy(update={"max_documents": 10_000})
    found = list(hub_documents(spec, base=tmp_path, run_seed=1, peer_id="anna", tally=tally))
    assert len([document for document in found if not document.held_out]) > 400
    assert {reason: kind.count for reason, kind in tally.skipped.items()} == {NULL: len(TEXTS), ZERO: 1}
    corpus = open_corpus(spec, base=tmp_path, cache=tmp_path / "cache", run_seed=1, peer_id="anna")
    assert (corpus.report.files, corpus.report.documents) == (0, len(found))
    assert {kind.reason: kind.count for kind in corpus.report.skipped} == {NULL: len(TEXTS), ZERO: 1}


def test_the_library_is_asked_for_by_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"set: needs the datasets library; .* pip install 'p2p-diloco\[hf\]'"):
        check_data_set(SPEC, tmp_path)


def test_leaving_is_not_mistaken_for_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Stopped), hub.asking("anything"):
        raise Stopped("stopped")


# -- names on the hub --------------------------------------------------------------------------------------------------

NAMES: list[tuple[str, Callable[[Path], object]]] = [
    ("data.path", lambda base: check_data_set(SPEC.model_copy(update={"path": "allenai/c4", "config": "en"}), base)),
    ("data.tokenizer", lambda base: find_tokenizer("hub:openai-community/gpt2", base)),
    ("model.path", lambda base: find_model("hub:openai-community/gpt2", base, with_weights=True)),
]


@pytest.mark.parametrize(("key", "find"), NAMES)
def test_a_hub_out_of_reach_shows_at_once(tmp_path: Path, key: str, find: Callable[[Path], object]) -> None:
    started_s = time.monotonic()
    with pytest.raises(DataError, match=rf"key '{key}': the hub cannot be asked for .*Name or service not known"):
        find(tmp_path)
    assert time.monotonic() - started_s < 5


@pytest.mark.parametrize(("key", "find"), NAMES)
def test_what_the_hub_answers_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, find: Callable[[Path], object]
) -> None:
    response = httpx2.Response(404, request=httpx2.Request("GET", "http://localhost"))
    for answer, message in (
        (RepositoryNotFoundError("many\nlines", response=response), "the hub has no .*hf auth login"),
        (RevisionNotFoundError("many\nlines", response=response), "has no revision None on the hub"),
    ):

        def repo_info(self: object, *_: object, answer: Exception = answer, **__: object) -> None:
            raise answer

        monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
        with pytest.raises(UsageError, match=f"key '{key}': {message}" if "has no" not in message else message):
            find(tmp_path)


def test_names_that_the_hub_cannot_have(tmp_path: Path) -> None:
    for name in ("hub:", "hub:a b", "hub:a/b/c"):
        with pytest.raises(UsageError, match=r"key 'data\.tokenizer': .* is no name on the hub"):
            find_tokenizer(name, tmp_path)


def word_tokenizer() -> str:
    text: str = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[UNK]": 0, "says": 1, "</s>": 2}, unk_token="[UNK]")
    ).to_str()
    return text


def test_what_the_hubs_cache_holds_is_found_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit = "0123456789" * 4
    repository = tmp_path / "hub-cache" / "models--some--one"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (snapshot / "tokenizer.json").write_text(word_tokenizer())
    (snapshot / "config.json").write_text("{}")
    for name in ("hub:some/one", f"hub:some/one@{commit}"):
        assert find_tokenizer(name, tmp_path) == snapshot / "tokenizer.json"
        assert find_model(name, tmp_path, with_weights=False) == snapshot
    assert "end_token" not in load_tokenizer_json(DataSpec(tokenizer="hub:some/one"), tmp_path)
    (snapshot / "tokenizer_config.json").write_text('{"eos_token": "says"}')
    assert LibraryTokenizer(load_tokenizer_json(DataSpec(tokenizer="hub:some/one"), tmp_path)).end_token == "says"
    for name in ("hub:some/other", "hub:some/one@main2"):
        with pytest.raises(DataError, match=r"key 'data\.tokenizer': no tokenizer\.json can be had from"):
            find_tokenizer(name, tmp_path)
        with pytest.raises(DataError, match=r"key 'model\.path': .* cannot be had"):
            find_model(name, tmp_path, with_weights=True)
    with pytest.raises(OfflineModeIsEnabled):
        huggingface_hub.HfApi().repo_info("some/one")


def test_a_tokenizer_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(UsageError, match=r"model/tokenizer\.json: no such tokenizer"):
        load_tokenizer_json(DataSpec(tokenizer="model"), tmp_path)
    (tmp_path / "model" / "tokenizer.json").write_text(word_tokenizer())
    from_folder = load_tokenizer_json(DataSpec(tokenizer="model"), tmp_path)
    assert from_folder == load_tokenizer_json(DataSpec(tokenizer="model/tokenizer.json"), tmp_path)


def test_a_data_set_is_read_without_torch_in_a_fresh_process(tmp_path: Path) -> None:
    """No warning, nothing on stderr, and an end without a crash of the library's threads."""
    write_files(tmp_path / "set", 3, "parquet")
    program = f"""
import sys
from pathlib import Path
from p2p_diloco.learn.data import open_corpus
from p2p_diloco.core.runfile import DataSpec
spec = DataSpec.model_validate_json({SPEC.model_dump_json()!r})
base = Path({str(tmp_path)!r})
print(len(open_corpus(spec, base=base, cache=base / "cache", run_seed=1, peer_id="anna").train))
assert "torch" not in sys.modules
"""
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={"PATH": "", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    corpus = open_corpus(SPEC, base=tmp_path, cache=tmp_path / "cache", run_seed=1, peer_id="anna")
    assert int(ended.stdout) == len(corpus.train)
    assert np.unique(corpus.batch(run_seed=1, peer_id="anna", step=0, batch_size=8, seq_len=16)).size > 8
