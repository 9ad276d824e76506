from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from p2p_diloco.core.digest import digest
from p2p_diloco.core.errors import DataError, UsageError
from p2p_diloco.core.runfile import DataSpec
from p2p_diloco.learn import data, source
from p2p_diloco.learn.data import Corpus, open_corpus
from p2p_diloco.learn.text import PIECE_CHARS, builtin_files, is_held_out
from p2p_diloco.learn.textreport import HIDDEN, NO_TEXT, NULL, ZERO, Skipped, TextReport
from tests.support.builders import identity

SPEC = DataSpec(source="path", path="texts", seq_len=16, held_out=0.3)
TEXTS = {f"{i:02d}.txt": f"document {i:02d} says {'abc' * (i % 5)} and ends\n" for i in range(40)}


def corpus_of(*, train: bytes = bytes(range(200)), held_out: bytes = bytes(range(100))) -> Corpus:
    arrays = (np.frombuffer(train, np.uint8), np.frombuffer(held_out, np.uint8))
    return Corpus(train=arrays[0], held_out=arrays[1], vocab_size=256, fingerprint="")


def write_texts(folder: Path, texts: dict[str, str] = TEXTS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text)
    return folder


def documents(tokens: np.ndarray) -> set[str]:
    return {piece.decode() for piece in tokens.tobytes().split(b"\0") if piece}


def test_a_batch_is_a_function_of_its_arguments() -> None:
    corpus = corpus_of()

    def batch(**changed: object) -> bytes:
        key = {"run_seed": 7, "peer_id": "anna", "step": 3, "micro_step": 0} | changed
        return corpus.batch(batch_size=8, seq_len=16, **key).tobytes()  # type: ignore[arg-type]

    assert batch() == batch()
    others = [batch(run_seed=8), batch(peer_id="bert"), batch(step=4), batch(micro_step=1)]
    assert len({batch(), *others}) == 5


def test_no_two_peers_draw_the_same_batches() -> None:
    """Real ids begin with the same eight characters, and may differ in any one of the others."""
    ids = [identity(i).peer_id for i in range(1, 41)]
    one, alphabet = ids[0], "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
    ids += [one[:i] + next(c for c in alphabet if c != one[i]) + one[i + 1 :] for i in range(8, len(one))]
    corpus = corpus_of()
    drawn = {corpus.batch(run_seed=7, peer_id=who, step=3, batch_size=8, seq_len=16).tobytes() for who in ids}
    assert len(drawn) == len(ids) == 40 + 44


def test_a_batch_holds_windows_of_the_training_text_up_to_both_ends() -> None:
    corpus = corpus_of()
    rows = corpus.batch(run_seed=0, peer_id="anna", step=0, batch_size=4000, seq_len=16)
    assert rows.shape == (4000, 17)
    assert rows.dtype == np.int64
    assert (np.diff(rows, axis=1) == 1).all()
    assert (rows.min(), rows.max()) == (0, 199)
    assert len(np.unique(rows[:, 0])) == 200 - 16


def test_the_stream_of_batches_is_the_same_in_every_version() -> None:
    rows = corpus_of().batch(run_seed=1, peer_id="anna", step=2, batch_size=4, seq_len=16, micro_step=3)
    assert rows[:, 0].tolist() == [179, 93, 34, 75]


def test_held_out_batches_are_consecutive_windows_from_the_start() -> None:
    corpus = corpus_of()
    batches = list(corpus.held_out_batches(batch_size=4, seq_len=16, max_tokens=16 * 5 + 15))
    assert [batch.shape for batch in batches] == [(4, 17), (1, 17)]
    rows = np.concatenate(batches)
    assert rows[:, 1:].flatten().tolist() == list(range(1, 81))
    assert rows[:, 0].tolist() == [0, 16, 32, 48, 64]
    assert len(list(corpus.held_out_batches(batch_size=4, seq_len=16, max_tokens=10**9))) == 2
    assert [b.shape for b in corpus.held_out_batches(batch_size=4, seq_len=16, max_tokens=1)] == [(1, 17)]


def kept_apart(text: str, share: float = SPEC.held_out) -> bool:
    return is_held_out(digest(text.encode()).hex(), share)


def test_documents_are_held_out_by_a_hash_of_their_text(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts")
    corpus = open_corpus(SPEC, base=tmp_path, cache=tmp_path / "cache")
    expected = set(filter(kept_apart, TEXTS.values()))
    assert documents(corpus.held_out) == expected
    assert documents(corpus.train) == set(TEXTS.values()) - expected
    assert 4 <= len(expected) <= 20

    more = {f"z{i}.txt": f"another {i}" for i in range(30)}
    other = write_texts(tmp_path / "other", TEXTS | more)
    larger = open_corpus(SPEC, base=tmp_path, cache=tmp_path / "cache", override_path=other)
    assert documents(larger.held_out) >= expected
    assert not documents(larger.held_out) & documents(corpus.train)
    assert all(kept_apart(text, 0.4) for text in TEXTS.values() if kept_apart(text, 0.3))


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_the_same_text_is_held_out_whatever_its_file_is_called(tmp_path: Path, kind: str) -> None:
    write_texts(tmp_path / "texts")
    expected = documents(open_corpus(SPEC, base=tmp_path, cache=tmp_path / "cache").held_out)
    other = tmp_path / "other"
    texts = ["one more, in front", *TEXTS.values()]
    if kind == "txt":
        write_texts(other, {f"x{i}.txt": text for i, text in enumerate(texts)})
    elif kind == "jsonl":
        write_texts(other, {"rows.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in texts)})
    else:
        other.mkdir()
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), other / "rows.parquet")
    found = open_corpus(SPEC, base=tmp_path, cache=tmp_path / "cache", override_path=other)
    assert expected <= documents(found.held_out) <= {*expected, texts[0]}
    assert not expected & documents(found.train)


def test_the_same_file_is_cut_and_divided_alike_alone_and_in_company(tmp_path: Path) -> None:
    book = "".join(f"line {i} of a book\n" for i in range(20_000))
    write_texts(tmp_path / "alone", {"book.txt": book})
    write_texts(tmp_path / "texts", TEXTS | {"copy.txt": book + "and a last line of the copy\n"})
    alone = open_corpus(SPEC, base=tmp_path, cache=tmp_path / "cache", override_path=tmp_path / "alone" / "book.txt")
    among = open_corpus(SPEC, base=tmp_path, cache=tmp_path / "cache")
    mine = set(alone.held_out.tobytes().splitlines())
    trained = set(among.train.tobytes().splitlines())
    last = {line for line in mine & trained if line in book.encode()[-2 * PIECE_CHARS :]}
    assert mine & trained <= last, "only what the copy ends with is another document"
    assert 1000 < len(mine) < 10_000


def test_a_stranger_names_no_text_on_this_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_texts(tmp_path / "texts")
    monkeypatch.chdir(tmp_path)
    for path in ("texts", str(folder), "../texts"):
        for kind in ("path", "hub"):
            spec = SPEC.model_copy(update={"path": path, "source": kind})
            with pytest.raises(UsageError, match=r"brings no text of its own; add --data FILE-OR-FOLDER"):
                open_corpus(spec, base=None, cache=tmp_path / "cache")
    own = open_corpus(SPEC, base=None, cache=tmp_path / "cache", override_path=folder)
    assert own.train.tobytes() == open_corpus(SPEC, base=tmp_path, cache=tmp_path / "cache").train.tobytes()


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "texts")
    expected = open_corpus(SPEC, base=tmp_path, cache=tmp_path / "cache").train.tobytes()
    os.mkfifo(folder / "pipe.txt")
    assert open_corpus(SPEC, base=tmp_path, cache=tmp_path / "cache").train.tobytes() == expected
    with pytest.raises(DataError, match=r"pipe\.txt: no regular file"):
        open_corpus(SPEC, base=None, cache=tmp_path / "cache", override_path=folder / "pipe.txt")


def test_rows_of_json_without_text_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text("".join(f'{{"text": "row {i}"}}\n{{"text": null}}\n' for i in range(40)))
    corpus = open_corpus(SPEC, base=None, cache=tmp_path / "cache", override_path=tmp_path / "texts.jsonl")
    assert documents(corpus.train) | documents(corpus.held_out) == {f"row {i}" for i in range(40)}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_are_documents(tmp_path: Path, kind: str) -> None:
    texts = [f"row {i} with ümlaut\nand a second line" for i in range(300)]
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("\n\n".join(json.dumps({"body": text, "n": 1}) for text in texts), encoding="utf-8")
    else:
        table = pyarrow.table({"n": range(301), "body": [*texts, None]})
        pyarrow.parquet.write_table(table, path, row_group_size=100)
    spec = SPEC.model_copy(update={"path": str(path), "text_key": "body"})
    corpus = open_corpus(spec, base=tmp_path, cache=tmp_path / "cache")
    assert documents(corpus.train) | documents(corpus.held_out) == set(texts)
    assert not documents(corpus.train) & documents(corpus.held_out)
    assert 30 < len(documents(corpus.held_out)) < 150
    assert (corpus.vocab_size, corpus.train.dtype.name, corpus.fingerprint) == (256, "uint8", "")


def test_one_long_text_is_cut_at_newlines_and_split(tmp_path: Path) -> None:
    lines = [f"line {i} of the only file, ünd more\n" for i in range(2000)]
    (tmp_path / "book.txt").write_bytes("".join(lines).replace("\n", "\r\n").encode())
    spec = SPEC.model_copy(update={"path": "book.txt"})
    corpus = open_corpus(spec, base=tmp_path, cache=tmp_path / "cache")
    train, held_out = corpus.train.tobytes(), corpus.held_out.tobytes()
    assert (train + held_out).count(b"\0") == 1
    split = [part.replace(b"\0", b"").decode().splitlines(keepends=True) for part in (train, held_out)]
    assert sorted(split[0] + split[1]) == sorted(lines)
    assert 0.1 < len(split[1]) / len(lines) < 0.5


def test_the_report_of_a_text_is_kept_with_its_tokens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, cache = write_texts(tmp_path / "texts"), tmp_path / "cache"
    rows = ('"a row"', "null", '"with a \\u0000"', "null")
    (folder / "rows.jsonl").write_text("".join(f'{{"text": {row}}}\n' for row in rows))
    first = open_corpus(SPEC, base=tmp_path, cache=cache)
    n_bytes = sum(map(len, TEXTS.values())) + len(TEXTS) + len("a row") + 1
    assert first.report == TextReport(
        files=41,
        documents=41,
        train_tokens=len(first.train),
        held_out_tokens=len(first.held_out),
        separator="a 0 byte",
        skipped=(Skipped(reason=NULL, count=2), Skipped(reason=ZERO, count=1)),
    )
    assert len(first.train) + len(first.held_out) == n_bytes
    caplog.set_level("INFO")
    assert open_corpus(SPEC, base=tmp_path, cache=cache).report == first.report
    (folder / ".hidden").write_text("")
    added = open_corpus(SPEC, base=tmp_path, cache=cache).report
    assert added.skipped == (Skipped(reason=HIDDEN, count=1, examples=(".hidden",)), *first.report.skipped)
    assert not caplog.records, "tokens are made once"
    kept = next(cache.glob("*/corpus.json"))
    kept.write_text(kept.read_text().replace('"documents":41', '"documents":null'))
    assert open_corpus(SPEC, base=tmp_path, cache=cache).report == added
    assert len(caplog.records) == 1


def test_built_in_text_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(20):
        (tmp_path / f"{i}.py").write_text(f"print('hello, {i}')\n" * 9)
    monkeypatch.setattr(source, "builtin_files", lambda: (tmp_path, sorted(tmp_path.glob("*.py"))))
    report = open_corpus(DataSpec(seq_len=16, held_out=0.3), base=None, cache=tmp_path / "cache").report
    assert (report.files, report.documents, report.skipped) == (20, 20, ())


def test_a_text_whose_rows_are_mostly_without_text_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    rows = [f'{{"text": "row {i}, of which a person has written every word"}}\n' for i in range(40)]
    (folder / "a.jsonl").write_text("".join(rows) + '{"text": null}\n' * 41)
    with pytest.raises(DataError, match=r"texts: 41 rows would be left out and 40 documents read; rows whose text is"):
        open_corpus(SPEC, base=tmp_path, cache=tmp_path / "cache")
    (folder / "a.jsonl").write_text("".join(rows) + '{"text": null}\n' * 40)
    assert open_corpus(SPEC, base=tmp_path, cache=tmp_path / "cache").report.documents == 40


def test_files_that_turn_out_to_hold_no_text_count_as_skipped(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "texts")
    (folder / "settings.json").write_text('{"version": 1}')
    (folder / "nulls.jsonl").write_text('{"text": null}\n' * 5)
    report = open_corpus(SPEC, base=tmp_path, cache=tmp_path / "cache").report
    assert {kind.reason: (kind.count, kind.examples) for kind in report.skipped} == {
        NO_TEXT: (2, ("nulls.jsonl", "settings.json")),
        NULL: (5, ()),
    }
    (folder / "nulls.jsonl").write_text('{"text": null}\n' * 5000)
    with pytest.raises(DataError, match=r"texts: 75 kB would be left out and .* kB read; files without text"):
        open_corpus(SPEC, base=tmp_path, cache=tmp_path / "cache")
    assert len(list(tmp_path.glob("cache/*/"))) == 1


def test_files_and_rows_that_are_left_out_are_weighed_together(tmp_path: Path) -> None:
    """Neither is more than what is read."""
    write_texts(tmp_path / "texts", {"a.jsonl": json.dumps({"text": "x" * 600}), "b.md": "y" * 400})
    (tmp_path / "texts/c.jsonl").write_text('{"text": null}\n' * 20)
    with pytest.raises(DataError, match=r"texts: 700 bytes would be left out and 612 bytes read; .*b\.md.*c\.jsonl"):
        open_corpus(SPEC, base=tmp_path, cache=tmp_path / "cache")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "texts: no such file or folder"),
        ({}, "texts: no .txt, .jsonl, .ndjson, .json (each also with .gz, .bz2, "),
        (
            {"a.csv": "x"},
            "or .parquet files in this folder; skipped files with a suffix that is not read: 1, 1 byte (a.csv)",
        ),
        ({"a.txt": ""}, "files in this folder; skipped empty files: 1 (a.txt)"),
        ({"a.txt": "short"}, "tokens of training text, one sequence needs 17; add text"),
        (
            {"a.txt": "short", "a.md": "# longer\n"},
            "texts: 9 bytes would be left out and 5 bytes read; files with",
        ),
        ({"a.json": '{"n": 1}', "b.json": "[]"}, "texts: 10 bytes would be left out and 0 bytes read; files without"),
        ({"a.json": '[{"text": "fine"}, {"text": fine}]'}, "a.json, row 2: not JSON"),
        ({"a.json": '[{"body": "x", "n": 3}]'}, "a.json, row 1: no text under 'text'; data.text_key can be: body"),
        ({"a.jsonl": '{"text": "fine"}\n{"text": fine}\n'}, "a.jsonl, line 2: not JSON"),
        ({"a.jsonl": '{"body": "x", "n": 3}\n'}, "a.jsonl, line 1: no text under 'text'; data.text_key can be: body"),
        ({"a.jsonl": "[1]\n"}, "a.jsonl, line 1: no text under 'text'"),
        ({"a.parquet": "not parquet at all"}, "a.parquet: not a sound parquet file"),
    ],
)
def test_bad_text_is_one_clear_line(tmp_path: Path, files: dict[str, str] | None, message: str) -> None:
    if files is not None:
        write_texts(tmp_path / "texts", files)
    with pytest.raises(DataError) as caught:
        open_corpus(SPEC, base=tmp_path, cache=tmp_path / "cache")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("cache/*.tmp"))


def test_too_little_held_out_text_says_what_to_do(tmp_path: Path) -> None:
    few = next(text for i in range(100) if not kept_apart(text := f"{i:2} forty characters are not enough.", 0.02))
    (tmp_path / "few.txt").write_text(few)
    spec = DataSpec(source="path", path="few.txt", seq_len=16)
    with pytest.raises(DataError, match=r"0 tokens of held-out text.*raise data\.held_out"):
        open_corpus(spec, base=tmp_path, cache=tmp_path / "cache")


def test_parquet_errors_name_the_mending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "n": [1]}), path)
    for key, message in (("text", "no column 'text'; data.text_key can be: body, n"), ("n", "holds int, not text")):
        spec = SPEC.model_copy(update={"path": "rows.parquet", "text_key": key})
        with pytest.raises(DataError, match=message):
            open_corpus(spec, base=tmp_path, cache=tmp_path / "cache")
    latin = pyarrow.array([b"tea", b"caf\xe9"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": latin}), path)
    with pytest.raises(DataError, match=r"rows\.parquet: not UTF-8: byte 0xe9 at offset 3 of column 'text' in row 2"):
        open_corpus(SPEC.model_copy(update={"path": path.name}), base=tmp_path, cache=tmp_path / "cache")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'p2p-diloco\[parquet\]'"):
        open_corpus(spec, base=tmp_path, cache=tmp_path / "cache")


def test_tokens_are_kept_checked_and_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    folder, cache = write_texts(tmp_path / "texts"), tmp_path / "cache"

    def opened() -> tuple[bytes, int]:
        caplog.clear()
        return open_corpus(SPEC, base=tmp_path, cache=cache).train.tobytes(), len(caplog.records)

    first, built = opened()
    assert built == 1
    assert opened() == (first, 0)
    kept = next(cache.glob("*/train.bin"))
    kept.write_bytes(kept.read_bytes()[:-1])
    assert opened() == (first, 1)
    kept.with_name("corpus.json").write_text("{}")
    assert opened() == (first, 1)
    new = next(text for i in range(100) if not kept_apart(text := f"a new text, longer than before {i}"))
    (folder / "00.txt").write_text(new)
    changed, built = opened()
    assert built == 1
    assert b"a new text" in changed
    assert len(list(cache.glob("*/"))) == 2


def test_a_file_of_another_time_is_read_again_though_it_is_as_long(tmp_path: Path) -> None:
    folder, cache = write_texts(tmp_path / "texts"), tmp_path / "cache"
    path = folder / "rows.jsonl"
    texts = [text for i in range(100, 200) if not kept_apart(text := f"row {i}")]
    for row in texts[:2]:
        path.write_text(json.dumps({"text": row}))
        os.utime(path, ns=(0, texts.index(row)))
        assert row in documents(open_corpus(SPEC, base=tmp_path, cache=cache).train)


def test_tokens_of_another_key_or_another_tokenizer_are_not_taken(tmp_path: Path) -> None:
    """Ids of one tokenizer are ids of others, too: a model would learn nonsense without a word."""
    rows = [{"text": f"the text {i}", "body": f"a body {i}"} for i in range(100)]
    write_texts(tmp_path / "texts", {"rows.jsonl": "".join(json.dumps(row) + "\n" for row in rows)})
    one, other = (Tokenizer(WordLevel({"[UNK]": i, "</s>": i + 1}, unk_token="[UNK]")).to_str() for i in (0, 2))
    found = [
        open_corpus(spec, base=tmp_path, cache=tmp_path / "cache", tokenizer_json=tokenizer_json)
        for spec, tokenizer_json in (
            (SPEC, ""),
            (SPEC.model_copy(update={"text_key": "body"}), ""),
            (SPEC, one),
            (SPEC, other),
        )
    ]
    assert [documents(corpus.train).pop()[:3] for corpus in found[:2]] == ["the", "a b"]
    assert [set(corpus.train.tolist()) for corpus in found[2:]] == [{0, 1}, {2, 3}]


def test_full_disk_and_unwritable_cache_are_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_texts(tmp_path / "texts")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file: cannot keep tokens here"):
        open_corpus(SPEC, base=tmp_path, cache=tmp_path / "file")

    def full(self: data.TokenFile) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(data.TokenFile, "finish", full)
    with pytest.raises(DataError, match=r"keep tokens here \(No space left on device\); they take about"):
        open_corpus(SPEC, base=tmp_path, cache=tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*/"))


def test_a_file_system_without_locks_is_good_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(fd: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    write_texts(tmp_path / "texts")
    with data.locked(tmp_path / "lock") as alone:
        assert not alone
    assert len(open_corpus(SPEC, base=tmp_path, cache=tmp_path / "cache").train)


def test_tokens_may_be_kept_in_folders_that_are_not_there_yet(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts")
    assert len(open_corpus(SPEC, base=tmp_path, cache=tmp_path / "not" / "there" / "yet").train)


def test_a_text_is_known_by_its_fingerprint_or_by_what_it_is_kept_as() -> None:
    theirs = corpus_of()
    assert replace(theirs, cached_as="c").identity == "c"
    assert replace(theirs, cached_as="c", fingerprint="f").identity == "f"


def test_of_two_processes_one_tokenizes_and_the_other_waits(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts", {f"{i}.txt": f"text {i} " * 50 for i in range(200)})
    program = f"""
import logging, sys, time
from pathlib import Path
from p2p_diloco.learn import data
logging.basicConfig(level="INFO", stream=sys.stdout, format="%(message)s")
slow = data.build
def build(*args, **more):
    time.sleep(0.5)
    slow(*args, **more)
data.build = build
print("ready", flush=True)
sys.stdin.readline()
corpus = data.open_corpus(
    data.DataSpec(source="path", path="texts", seq_len=16, held_out=0.3), base=Path({str(tmp_path)!r}),
    cache=Path({str(tmp_path / "cache")!r}))
print(len(corpus.train), len(corpus.held_out))
assert "torch" not in sys.modules
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum(output.count("tokenizing") for output in outputs) == 1
    assert len({output.splitlines()[-1] for output in outputs}) == 1


def test_the_fingerprint_is_over_names_and_normalized_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fingerprint(name: str, texts: dict[str, bytes]) -> str:
        root = tmp_path / name
        root.mkdir()
        for file, text in texts.items():
            (root / file).write_bytes(text)
        files = sorted(root.iterdir())
        monkeypatch.setattr(source, "builtin_files", lambda: (root, files))
        spec = DataSpec(seq_len=16, held_out=0.3)
        return open_corpus(spec, base=tmp_path, cache=tmp_path / f"cache-{name}").fingerprint

    texts = {f"{i}.py": b"print('hello')\n" * (20 + i) for i in range(20)}
    unix = fingerprint("unix", texts)
    assert len(unix) == 64
    assert fingerprint("windows", {name: text.replace(b"\n", b"\r\n") for name, text in texts.items()}) == unix
    assert fingerprint("other", texts | {"3.py": b"print('hullo')\n" * 23}) != unix
    assert fingerprint("renamed", {f"x{name}": text for name, text in texts.items()}) != unix


def test_the_builtin_text_is_torchs_sources_in_order() -> None:
    root, files = builtin_files()
    names = [path.relative_to(root).as_posix() for path in files]
    assert root.name == "torch"
    assert names == sorted(names)
    assert "nn/functional.py" in names
    assert "version.py" not in names
    assert all(name.endswith(".py") for name in names)
