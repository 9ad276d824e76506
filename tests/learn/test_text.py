from __future__ import annotations

import bz2
import gzip
import json
import lzma
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p_diloco.core.errors import DataError
from p2p_diloco.learn import text
from p2p_diloco.learn.text import json_values, next_piece, user_documents
from p2p_diloco.learn.textfiles import CHUNK_BYTES, TextFile, first_foreign_byte, text_files
from p2p_diloco.learn.textreport import NO_TEXT, NULL, ZERO, TextTally

UMLAUTS = [f"Die Brücke beim Café hat Fähre Nummer {i}\n" for i in range(200)]
JAPANESE = "テキストは日本語です。\n" * 50


def zst(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    compressed: bytes = sink.getvalue().to_pybytes()
    return compressed


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zst,
}


def read(path: Path, text_key: str = "text") -> tuple[list[str], TextTally]:
    tally = TextTally()
    return [document.text for document in user_documents(text_files(path).files, text_key, tally)], tally


def refused(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message.removeprefix(str(path))


def rows(texts: list[str]) -> str:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


# -- what is read ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".NDJSON", ".json"])
def test_text_is_the_same_however_it_is_packed(tmp_path: Path, kind: str, compression: str) -> None:
    """Also in two members one after another, as some programs write large files, and behind a byte order mark."""
    content = "".join(UMLAUTS) if kind == ".txt" else rows(UMLAUTS)
    path, pack = tmp_path / f"a{kind}{compression.upper()}", COMPRESS[compression]
    half = len(content.encode()) // 2
    path.write_bytes(pack(b"\xef\xbb\xbf" + content.encode()[:half]) + pack(content.encode()[half:]))
    found, tally = read(path)
    assert "".join(found) == "".join(UMLAUTS)
    assert (tally.files, tally.n_bytes, tally.skipped) == (1, path.stat().st_size, {})


@pytest.mark.parametrize(
    "form",
    [
        lambda values: json.dumps(values),
        lambda values: json.dumps(values, indent=4),
        lambda values: "\n".join(map(json.dumps, values)),
        lambda values: "".join(json.dumps(value, indent=2) for value in values),
        lambda values: "[" + " ,\n".join(map(json.dumps, values)) + ",]\n\n",
    ],
)
@pytest.mark.parametrize("chunk_chars", [1, 7, 64 * 1024])
def test_json_is_a_list_of_rows_or_rows_one_after_another(
    monkeypatch: pytest.MonkeyPatch, form: Callable[[list[Any]], str], chunk_chars: int
) -> None:
    values = [{"text": 'ä \\ " ] [ , }'}, {"text": None, "more": [1, [2]]}, {"text": "x" * 100}, {}]
    monkeypatch.setattr(text, "CHUNK_CHARS", chunk_chars)
    assert list(json_values(StringIO(form(values)), TextFile(path=Path("a.json"), kind=".json"))) == values


@given(
    st.lists(st.dictionaries(st.text(max_size=3), st.text() | st.none() | st.integers()), max_size=5), st.integers(0, 4)
)
def test_json_that_is_cut_off_is_no_shorter_list(values: list[Any], cut: int) -> None:
    whole, file = json.dumps(values), TextFile(path=Path("a.json"), kind=".json")
    assert list(json_values(StringIO(whole), file)) == values
    if 0 < cut < len(whole):
        with pytest.raises(DataError, match=r"a\.json, .*: not JSON"):
            list(json_values(StringIO(whole[:-cut]), file))


def test_other_json_beside_text_is_skipped_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(rows(UMLAUTS))
    (tmp_path / "info.json").write_text('{"version": "1.0"}')
    (tmp_path / "numbers.json").write_text("[1, 2]")
    (tmp_path / "rows.json").write_text('[{"text": null}, {"text": "found"}]')
    found, tally = read(tmp_path)
    assert found == [*UMLAUTS, "found"]
    assert tally.files == 2
    assert tally.skipped[NO_TEXT].examples == ("info.json", "numbers.json")
    assert refused(tmp_path / "info.json").startswith(", row 1: no text under 'text'; data.text_key can be: version")


def test_rows_without_text_and_with_a_nul_are_counted(tmp_path: Path) -> None:
    texts = ["one", None, "t\0wo", "three", None]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "b.json").write_text(json.dumps([{"text": text} for text in texts]))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "c.parquet")
    found, tally = read(tmp_path)
    assert found == ["one", "three"] * 3
    assert {reason: kind.count for reason, kind in tally.skipped.items()} == {NULL: 6, ZERO: 3}


# -- what is not UTF-8 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoding", "content", "message"),
    [
        (
            "latin-1",
            "".join(UMLAUTS),
            "byte 0xfc at offset 6; convert it, for example from Latin-1: iconv -f ISO-8859-1",
        ),
        ("cp1252", "a “quoted” word\n", "byte 0x93 at offset 2"),
        ("shift_jis", JAPANESE, "byte 0x83 at offset 0"),
        ("euc_jp", JAPANESE, "byte 0xa5 at offset 0"),
        ("iso2022_jp", JAPANESE, "byte 0x1b at offset 0; it begins a sequence of ISO-2022: for Japanese, iconv"),
        ("gb18030", "plain, then 中文\n", "byte 0xd6 at offset 12"),
        ("koi8_r", "Привет\n", "byte 0xf0 at offset 0"),
        ("cp037", "EBCDIC\n", "byte 0xc5 at offset 0"),
        ("utf-16", "plain\n", "byte 0xff at offset 0; it begins as UTF-16 does: iconv -f UTF-16 -t UTF-8 OLD > NEW"),
        ("utf-16-le", "plain\n", "byte 0x00 at offset 1; text has no such byte: perhaps this is UTF-16: iconv"),
        ("utf-16-be", "plain\n", "byte 0x00 at offset 0; text has no such byte"),
        ("utf-32", "plain\n", "byte 0xff at offset 0; it begins as UTF-32 does"),
        ("utf-32-le", "plain\n", "byte 0x00 at offset 1"),
    ],
)
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".json"])
def test_every_other_encoding_is_refused_with_the_place(
    tmp_path: Path, kind: str, encoding: str, content: str, message: str
) -> None:
    path = tmp_path / f"a{kind}"
    if kind == ".txt":
        path.write_bytes(content.encode(encoding))
        assert refused(path).startswith(f": not UTF-8: {message}")
    else:
        path.write_bytes(rows(content.splitlines()).encode(encoding))
        assert refused(path).startswith(": not UTF-8: byte 0x")


@pytest.mark.parametrize("compression", COMPRESS)
def test_the_place_counts_in_what_is_decompressed(tmp_path: Path, compression: str) -> None:
    before = "ü" * CHUNK_BYTES + "a"  # so that the next character lies across two chunks
    path = tmp_path / f"a.txt{compression}"
    path.write_bytes(COMPRESS[compression](before.encode() + "\N{EURO SIGN}".encode()[:2] + b"bcd"))
    where = f" of what it decompresses to, with {compression}" if compression else ""
    assert refused(path).startswith(f": not UTF-8: byte 0xe2 at offset {2 * CHUNK_BYTES + 1}{where}; ")


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".json"])
def test_a_character_that_the_end_cuts_off_is_refused(tmp_path: Path, kind: str) -> None:
    content = ("text" if kind == ".txt" else rows(["text"])).encode()
    path = tmp_path / f"a{kind}"
    path.write_bytes(content + "ü".encode()[:1])
    assert refused(path).startswith(f": not UTF-8: byte 0xc3 at offset {len(content)}; the last character is cut off; ")


@given(st.binary(max_size=40), st.integers(1, 5))
def test_the_first_foreign_byte_is_found_whatever_the_chunks(content: bytes, chunk_bytes: int) -> None:
    class Dripping:
        def __init__(self) -> None:
            self.left = content

        def read(self, _: int) -> bytes:
            chunk, self.left = self.left[:chunk_bytes], self.left[chunk_bytes:]
            return chunk

    expected = {place for sought in (b"\0", b"\x1b$") if (place := content.find(sought)) >= 0}
    try:
        content.decode()
    except UnicodeDecodeError as error:
        expected.add(error.start)
    found = first_foreign_byte(Dripping())  # type: ignore[arg-type]
    assert (None if found is None else found[0][0]) == min(expected, default=None)


def test_half_of_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    for name, content in (
        ("a.jsonl", '{"text": "fine"}\n\n{"text": "lone \\ud800"}\n'),
        ("b.json", '[{"text": "\\udfff"}]'),
    ):
        (tmp_path / name).write_text(content)
    message = r": not UTF-8: half of a surrogate pair, '\ud800', in the text at character 5; mend or delete this row"
    assert refused(tmp_path / "a.jsonl") == f", line 3{message}"
    assert refused(tmp_path / "b.json").startswith(", row 1: not UTF-8: half of a surrogate pair")
    (tmp_path / "a.jsonl").write_text('{"text": "whole \\ud83d\\ude00"}')
    assert read(tmp_path / "a.jsonl")[0] == ["whole 😀"]


@pytest.mark.parametrize("kind", ["string", "large_string"])
def test_parquet_that_is_not_utf8_is_refused_with_row_and_byte(tmp_path: Path, kind: str) -> None:
    texts = [b"fine"] * 300 + ["für".encode("latin-1"), b"fine"]
    raw = pyarrow.array(texts, getattr(pyarrow, kind.replace("string", "binary"))())
    latin = raw.view(getattr(pyarrow, kind)())
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": latin}), path)
    assert refused(path).startswith(": not UTF-8: byte 0xfc at offset 1 of column 'text' in row 301; ")


# -- damage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".json"])
def test_damaged_files_are_one_clear_line(tmp_path: Path, kind: str, compression: str) -> None:
    path = tmp_path / f"a{kind}{compression}"
    content = "".join(UMLAUTS) if kind == ".txt" else rows(UMLAUTS)
    packed = COMPRESS[compression](content.encode())
    for damaged in (packed[:-9], packed[: len(packed) // 2], b"plain text, which only its name says is compressed"):
        path.write_bytes(damaged)
        assert refused(path).startswith((": damaged, or cut off (", ": cannot be read ("))
    flipped = bytearray(packed)
    flipped[len(packed) // 2] ^= 0xFF
    path.write_bytes(bytes(flipped))
    refused(path)


def test_what_is_compressed_with_zst_needs_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt.zst").write_bytes(zst(b"text"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert refused(tmp_path / "a.txt.zst") == ": needs pyarrow; install it with: pip install 'p2p-diloco[parquet]'"


def test_a_row_has_a_largest_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "MAX_ROW_CHARS", 1000)
    monkeypatch.setattr(text, "CHUNK_CHARS", 100)
    for kind, where in ((".jsonl", "line 2"), (".json", "row 2")):
        path = tmp_path / f"a{kind}"
        path.write_text(rows(["short", "long" * 1000]))
        assert refused(path) == f", {where}: longer than 1000 characters; a row holds one document"


def test_what_decompresses_to_much_more_is_not_held_in_memory(tmp_path: Path) -> None:
    """30 MB of text, and as many spaces before a row."""
    line = b"a line of text that is there again and again\n"
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(line * (30_000_000 // len(line)), 1))
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(b" " * 30_000_000 + b'{"text": "x"}', 1))
    program = f"""
import resource
from pathlib import Path
from p2p_diloco.learn.text import user_documents
from p2p_diloco.learn.textfiles import text_files
from p2p_diloco.learn.textreport import TextTally
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
files = text_files(Path({str(tmp_path)!r})).files
print(sum(len(document.text) for document in user_documents(files, "text", TextTally())))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    n_chars, grown = map(int, output.split())
    assert n_chars == 30_000_000 // len(line) * len(line) + 1
    unit = 1 if sys.platform == "darwin" else 1024
    assert grown * unit < 15_000_000


def test_pieces_of_a_text_are_those_of_earlier_versions() -> None:
    content = "".join(f"line {i} of a text\n" for i in range(1000))
    stream = StringIO(content)
    pieces = list(iter(lambda: next_piece(stream), ""))
    assert "".join(pieces) == content
    assert [len(piece) for piece in pieces[:3]] == [4108, 4104, 4104]
