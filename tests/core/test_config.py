from __future__ import annotations

import os
from pathlib import Path

import platformdirs
import pytest

from p2p_diloco.core.config import cache_folder, check_name, compiled_folder, default_folder, keep_cache_near
from p2p_diloco.core.errors import UsageError

VARIABLES = ("XDG_CACHE_HOME", "XDG_DATA_HOME", "HOME", "TORCHINDUCTOR_CACHE_DIR")


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.setenv(variable, "set so that it is restored")
        monkeypatch.delenv(variable)


def test_a_cache_that_can_be_written_stays_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    keep_cache_near(tmp_path / "peer")
    assert cache_folder() == tmp_path / "cache" / "p2p-diloco"


def test_what_torch_compiles_lies_where_it_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert compiled_folder() == tmp_path / "cache" / "p2p-diloco" / "torchinductor"
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert compiled_folder() == tmp_path / f"p2p-diloco-{os.getuid()}" / "torchinductor"


@pytest.mark.parametrize("home", ["/proc/none", "/dev/null"])
def test_without_a_home_the_cache_lies_in_the_peers_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    monkeypatch.setenv("HOME", home)
    monkeypatch.chdir(tmp_path)
    keep_cache_near(Path("peer"))
    assert cache_folder() == tmp_path / "peer" / "cache" / "p2p-diloco"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"].startswith(str(tmp_path / "peer" / "cache"))


def test_a_user_whom_the_system_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is made in a folder named ~."""
    monkeypatch.setattr(platformdirs, "user_data_path", lambda name: Path("~/.local/share") / name)
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: Path("~/.cache") / name)
    assert cache_folder().is_absolute()
    with pytest.raises(UsageError, match="no home folder; give --folder"):
        default_folder()


def test_a_name_is_text() -> None:
    assert check_name("J\xfcrgen") == "J\xfcrgen"
    with pytest.raises(ValueError, match="not text in UTF-8"):
        check_name(os.fsdecode(b"J\xfcrgen"))
