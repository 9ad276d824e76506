from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from p2p_diloco.core.errors import UsageError
from p2p_diloco.lab.checkpoint import CHECKPOINT_FILE, ORIGIN_WORDS, Origin, alone_in, open_checkpoint, write_checkpoint

ORIGIN = Origin(genesis="this", text="this", names=["this"], shards="this", device="this", torch="this")
FACTS = {"what": {}, "origin": asdict(ORIGIN)}


def test_what_was_written_is_read(tmp_path: Path) -> None:
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint is None
    write_checkpoint(
        tmp_path, {"theta": torch.arange(3.0), "0.local": torch.ones(2), "10.local": torch.ones(2)}, json.dumps(FACTS)
    )
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint is not None
        assert checkpoint.facts == FACTS
        assert checkpoint.file.get_tensor("theta").tolist() == [0.0, 1.0, 2.0]
        assert list(checkpoint.tensors("0.")) == ["0.local"]


def first_tensor(folder: Path) -> torch.Tensor:
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint is not None
        tensor: torch.Tensor = checkpoint.file.get_tensor("theta")
        return tensor


@pytest.mark.parametrize("name", ORIGIN_WORDS)
def test_another_origin_is_named(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path, {}, json.dumps(FACTS))
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint is not None
        checkpoint.check_origin(ORIGIN)
        with pytest.raises(UsageError, match=f"was begun with another {ORIGIN_WORDS[name]}; choose another"):
            checkpoint.check_origin(replace(ORIGIN, **{name: "other"}))


def test_what_cannot_be_read_is_damaged(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, json.dumps(FACTS))
    damaged = r"checkpoint.safetensors: damaged .* delete it to start anew"
    with pytest.raises(UsageError, match=damaged):
        first_tensor(tmp_path)
    path = tmp_path / CHECKPOINT_FILE
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UsageError, match=damaged), open_checkpoint(tmp_path):
        raise AssertionError


def test_one_process_at_a_time_simulates_in_a_folder(tmp_path: Path) -> None:
    with alone_in(tmp_path / "out"):
        with pytest.raises(UsageError, match="out: another process simulates here"), alone_in(tmp_path / "out"):
            raise AssertionError
        with alone_in(tmp_path / "other"):
            pass
    with alone_in(tmp_path / "out"):
        pass
