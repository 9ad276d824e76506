from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from p2p_diloco.core.errors import DataError
from p2p_diloco.learn.textfiles import COMPRESSIONS, KINDS, TextFiles, format_of, text_files
from p2p_diloco.learn.textreport import DANGLING, EMPTY, HIDDEN, IRREGULAR, OTHER, TWICE, UNKNOWN


def write(folder: Path, *names: str, text: str = "some text") -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def names(found: TextFiles) -> list[str]:
    return [file.path.relative_to(found.root).as_posix() for file in found.files]


def skipped(found: TextFiles) -> dict[str, tuple[int, tuple[str, ...]]]:
    return {kind.reason: (kind.count, kind.examples) for kind in found.skipped}


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("a.txt", (".txt", "")),
        ("A.TXT", (".txt", "")),
        ("a.b.JSONL", (".jsonl", "")),
        ("a.NdJson.Gz", (".ndjson", ".gz")),
        ("a.json.bz2", (".json", ".bz2")),
        ("a.jsonl.xz", (".jsonl", ".xz")),
        ("a.txt.ZST", (".txt", ".zst")),
        ("a.parquet", (".parquet", "")),
        ("a.parquet.gz", None),
        ("a.tar.gz", None),
        ("a.gz", None),
        ("a.md", None),
        ("txt", None),
    ],
)
def test_a_name_says_how_a_file_is_read(name: str, how: tuple[str, str] | None) -> None:
    assert format_of(Path("nowhere", name)) == how


def test_every_kind_is_found_in_the_order_of_paths(tmp_path: Path) -> None:
    write(tmp_path, *(f"b/{i}{kind.upper()}" for i, kind in enumerate(KINDS)), "a.txt", "c.jsonl.gz", "b/deep/er/a.txt")
    found = text_files(tmp_path)
    assert names(found) == sorted(names(found))
    assert len(found.files) == len(KINDS) + 3
    assert found.skipped == ()
    assert [row[:2] for row in found.listing()] == [[name, 9] for name in names(found)]


def test_what_is_skipped_has_its_reason(tmp_path: Path) -> None:
    folder = write(tmp_path / "texts", "a.txt", ".hidden.txt", ".git/objects.txt", "b.md", "logo.png")
    write(folder, "none.txt", text="")
    write(folder, "film.MP4", text="longer than the text" * 9)
    os.mkfifo(folder / "pipe.txt")
    (folder / "gone.txt").symlink_to("nowhere.txt")
    (folder / "round.txt").symlink_to("round.txt")
    found = text_files(folder)
    assert names(found) == ["a.txt"]
    assert skipped(found) == {
        HIDDEN: (2, (".git", ".hidden.txt")),
        UNKNOWN: (1, ("b.md",)),
        OTHER: (2, ("film.MP4", "logo.png")),
        EMPTY: (1, ("none.txt",)),
        IRREGULAR: (1, ("pipe.txt",)),
        DANGLING: (2, ("gone.txt", "round.txt")),
    }


def test_a_socket_is_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a.txt")
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("s.txt")
        assert skipped(text_files(tmp_path)) == {IRREGULAR: (1, ("s.txt",))}


def test_links_are_followed_and_everything_is_read_once(tmp_path: Path) -> None:
    outside = write(tmp_path / "outside", "o.txt", "more/p.jsonl")
    folder = write(tmp_path / "texts", "sub/a.txt")
    (folder / "0-first").symlink_to("sub")  # by its name before the folder itself
    (folder / "linked").symlink_to(outside)
    (folder / "again").symlink_to(outside / "more")
    (folder / "sub/up").symlink_to("..")
    (outside / "back").symlink_to(folder)
    (folder / "b.txt").symlink_to("sub/a.txt")
    (folder / "book").symlink_to(outside / "o.txt")  # read as what it leads to
    found = text_files(folder)
    assert names(found) == ["again/p.jsonl", "linked/o.txt", "sub/a.txt"]
    count, examples = skipped(found)[TWICE]
    assert count == 6
    assert set(skipped(found)) == {TWICE}
    assert set(examples) <= {"0-first", "linked/more", "sub/up", "linked/back", "b.txt", "book"}


def test_what_two_links_lead_to_is_read_once(tmp_path: Path) -> None:
    """It lies elsewhere, so that neither of them is its own name."""
    outside = write(tmp_path / "outside", "o.txt")
    folder = write(tmp_path / "texts", "a.txt")
    for name in ("b.txt", "c.txt"):
        (folder / name).symlink_to(outside / "o.txt")
    found = text_files(folder)
    assert names(found) == ["a.txt", "b.txt"]
    assert skipped(found) == {TWICE: (1, ("c.txt",))}


def test_a_compressed_file_beside_one_of_its_name_is_another_file(tmp_path: Path) -> None:
    """Only its text could tell whether it is a copy, and nothing is left out without a word."""
    beside = [f"a.txt{compression}" for compression in COMPRESSIONS]
    found = text_files(write(tmp_path, "a.txt", *beside))
    assert names(found) == sorted(["a.txt", *beside])
    assert found.skipped == ()


def test_a_link_alone_is_what_it_leads_to(tmp_path: Path) -> None:
    write(tmp_path, "blobs/data.JSONL")
    (tmp_path / "named.txt").symlink_to("blobs/data.JSONL")
    (tmp_path / "bare").symlink_to("blobs/data.JSONL")
    assert [text_files(tmp_path / name).files[0].kind for name in ("named.txt", "bare")] == [".txt", ".jsonl"]
    (tmp_path / "folder").symlink_to("blobs")
    assert names(text_files(tmp_path / "folder")) == ["data.JSONL"]


def test_text_behind_a_link_that_is_written_anew_is_other_text(tmp_path: Path) -> None:
    """What is cached of it goes by the size and the time of what the link leads to, not by the link's own."""
    data = write(tmp_path, "blobs/data.txt") / "blobs" / "data.txt"
    (tmp_path / "named.txt").symlink_to(data)
    before = text_files(tmp_path / "named.txt").listing()
    assert before == [["named.txt", len("some text"), data.stat().st_mtime_ns]]
    os.utime(data, ns=(1, 1))
    assert text_files(tmp_path / "named.txt").listing() == [["named.txt", len("some text"), 1]]


@pytest.mark.parametrize("name", ["a.md", "a.csv", "a.tar.gz", "a.zip", "noname"])
def test_text_that_is_mostly_in_other_files_is_an_error(tmp_path: Path, name: str) -> None:
    write(tmp_path / "texts", "b.txt", text="a little")
    write(tmp_path / "texts", name, text="much more than that")
    with pytest.raises(DataError, match=rf"texts: 19 bytes would be left out and 8 bytes read; .* \({name}\); convert"):
        text_files(tmp_path / "texts")
    write(tmp_path / "texts", "c.txt", text="now it is less than half")
    assert names(text_files(tmp_path / "texts")) == ["b.txt", "c.txt"]


def test_a_folder_without_text_is_an_error_that_says_what_is_there(tmp_path: Path) -> None:
    write(tmp_path, "a.md", "b.md", ".c.txt")
    with pytest.raises(DataError, match=r"files in this folder; skipped hidden.*; skipped .* 2, 18 bytes \(a\.md"):
        text_files(tmp_path)


def test_a_file_of_another_kind_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, "a.md", "b.txt")
    with pytest.raises(DataError, match=r"a\.md: cannot read \.md files; give \.txt, "):
        text_files(tmp_path / "a.md")
    with pytest.raises(DataError, match=r"nowhere: no such file or folder"):
        text_files(tmp_path / "nowhere")
