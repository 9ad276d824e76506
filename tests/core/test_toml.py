from __future__ import annotations

import codecs
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from p2p_diloco.core.errors import UsageError
from p2p_diloco.core.runfile import RunSpec
from p2p_diloco.core.toml import read_toml
from p2p_diloco.lab.faults import FaultPlan
from p2p_diloco.lab.simulated_run import SimulatedRun
from p2p_diloco.lab.study import Study

RUN = 'name = "one"\n[model.config]\nmodel_type = "llama"\n'
STUDY = 'title = "T"\npaper = "p"\nbase = "run.toml"\nreference = "a"\n[[arm]]\nname = "a"\n'
FAULTS = '[[fault]]\naction = "stop"\nat_s = 1.0\npeer = "peer-1"\n'


@pytest.mark.parametrize(
    ("text", "read"),
    [
        (RUN, lambda path: RunSpec.load(path).name),
        (RUN, lambda path: SimulatedRun.load(path).run.name),
        (STUDY, lambda path: Study.load(path, "full").spec.title),
        (FAULTS, lambda path: FaultPlan.load(path, ["seed", "peer-1"]).fault[0].action),
    ],
)
def test_a_byte_order_mark_and_windows_line_ends_change_nothing(
    tmp_path: Path, text: str, read: Callable[[Path], Any]
) -> None:
    (tmp_path / "run.toml").write_bytes(codecs.BOM_UTF8 + RUN.encode())
    path = tmp_path / "x.toml"
    path.write_bytes(text.encode())
    plain = read(path)
    path.write_bytes(codecs.BOM_UTF8 + text.replace("\n", "\r\n").encode())
    assert read(path) == plain


@pytest.mark.parametrize(
    ("data", "offset"),
    [
        ('name = "Br\xfccke"'.encode("latin-1"), 10),
        (codecs.BOM_UTF8 + 'name = "Br\xfccke"'.encode("latin-1"), 13),
        ('name = "x"'.encode("utf-16"), 0),
    ],
)
def test_another_encoding_is_refused_with_the_place(tmp_path: Path, data: bytes, offset: int) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(data)
    with pytest.raises(UsageError) as error:
        read_toml(path, "run file")
    assert str(error.value) == f"{path}: not a text file in UTF-8 (at byte {offset}); save it as UTF-8"
