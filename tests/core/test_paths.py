from __future__ import annotations

from pathlib import Path

import pytest

from p2p_diloco.core.errors import UsageError
from p2p_diloco.core.paths import at_home, beside
from p2p_diloco.core.runfile import DataSpec
from p2p_diloco.learn.source import source_of
from p2p_diloco.learn.textreport import TextTally


def test_a_tilde_is_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert at_home("~", "--folder") == tmp_path
    assert at_home("~/x", "--folder") == tmp_path / "x"
    assert at_home("x/~", "--folder") == Path("x/~")
    assert at_home("./~x", "--folder") == Path("~x")
    assert beside(Path("runs"), "~/text", "data.path") == tmp_path / "text"
    assert beside(Path("runs"), "text", "data.path") == Path("runs/text")
    with pytest.raises(UsageError, match=r"^--folder: ~no-such-user/x: no home folder of that name; .* \./~no-such"):
        at_home("~no-such-user/x", "--folder")
    with pytest.raises(UsageError, match=r"^key 'base': ~no-such-user: no home"):
        beside(tmp_path, "~no-such-user", "base")


def test_text_in_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("All happy families are alike.")
    spec = DataSpec(source="path", path="~/text")
    source = source_of(spec, base=tmp_path / "runs", cache=tmp_path, override_path=None, run_seed=0, peer_id="")
    assert [document.text for document in source.documents(TextTally())] == ["All happy families are alike."]
