"""The run files in peers/runs: they load, and their comments say what they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from p2p_diloco.architecture import resolve_config
from p2p_diloco.codec import encoded_bytes
from p2p_diloco.manifest import RunSpec

RUNS = sorted((Path(__file__).parent.parent / "peers" / "runs").glob("*.toml"))
UNIT = {"million": 1e6, "billion": 1e9, "MB": 1e6, "GB": 1e9}


def opening_comment(path: Path) -> str:
    lines = path.read_text().splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return " ".join(line.removeprefix("#").strip() for line in lines[:end])


def n_params(path: Path) -> int:
    """Counted on the meta device: no memory is taken."""
    config = resolve_config(RunSpec.load(path).model, base=path.parent, vocab_size=256)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    return sum(parameter.numel() for parameter in model.parameters())


def test_there_are_run_files() -> None:
    assert {path.stem for path in RUNS} >= {"tiny", "small-150m", "1b"}


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_loads_under_its_own_name(path: Path) -> None:
    assert RunSpec.load(path).name == path.stem


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_comment_says_how_large(path: Path) -> None:
    comment = opening_comment(path)
    size = re.search(r"([\d.]+) (million|billion) parameters", comment)
    assert size is not None, "the comment does not say how many parameters"
    params = n_params(path)
    assert params == pytest.approx(float(size[1]) * UNIT[size[2]], rel=0.02)


@pytest.mark.parametrize("name", ["small-150m", "1b"])
def test_comment_says_what_an_update_weighs(name: str) -> None:
    (path,) = (path for path in RUNS if path.stem == name)
    spec, comment = RunSpec.load(path), opening_comment(path)
    size = re.search(rf"{spec.outer.codec}\D*?(?: in blocks of \d+ makes|,) ([\d.]+) (MB|GB)", comment)
    assert size is not None, "the comment does not say how large an update is"
    assert encoded_bytes(n_params(path), spec.outer.codec) == pytest.approx(float(size[1]) * UNIT[size[2]], rel=0.02)


@pytest.mark.parametrize("name", ["small-150m", "1b"])
def test_published_runs_keep_their_published_lengths(name: str) -> None:
    (path,) = (path for path in RUNS if path.stem == name)
    spec = RunSpec.load(path)
    assert spec.inner.steps * spec.outer.steps == 88_000
    assert spec.tokens_per_inner_step == 512 * 1024
