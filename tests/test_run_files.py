"""The run files in peers/runs: they load, and their comments say what they are."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from p2p_diloco.core.codecs import encoded_bytes
from p2p_diloco.core.grid import Grid
from p2p_diloco.core.manifest import RunManifest
from p2p_diloco.core.runfile import RunSpec
from p2p_diloco.core.update import max_update_bytes
from p2p_diloco.learn.architecture import resolve_config
from p2p_diloco.learn.data import open_corpus
from p2p_diloco.learn.hub import DATA_SET_NAME, PREFIX, check_data_set
from p2p_diloco.look.machine_findings import disk_needs, exchange_bytes, memory_needs

HUB_RUNS = ("stories-30m", "small-150m", "1b")
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
    assert {path.stem for path in RUNS} >= {"tiny", "stories-30m", "small-150m", "1b"}


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


def run_named(name: str) -> Path:
    (path,) = (path for path in RUNS if path.stem == name)
    return path


def test_comment_says_what_the_run_for_homes_costs() -> None:
    """By the formulas that peers and their doctor use."""
    path = run_named("stories-30m")
    n, spec, comment = n_params(path), RunSpec.load(path), opening_comment(path)
    n_bytes = encoded_bytes(n, spec.outer.codec)
    eight, sixteen = (exchange_bytes(n_bytes, group, client_mode=False) for group in (8, 16))
    manifest = RunManifest.model_construct(spec=spec, n_params=n)
    step_flops = 6 * n * spec.tokens_per_inner_step
    on_gpu, on_cpu = (spec.inner.steps * step_flops / flops for flops in (5e12, 1e11))
    figures = {
        r"Memory: ([\d.]+) GB to train on a CPU": memory_needs(n, on_cpu=True)[0] / 1e9,
        r"on a GPU ([\d.]+) GB of its own": memory_needs(n, on_cpu=False)[1] / 1e9,
        r"and ([\d.]+) GB of ordinary memory": memory_needs(n, on_cpu=False)[0] / 1e9,
        rf"an update has at most ([\d.]+) MB in {spec.outer.codec}": max_update_bytes(Grid(n=n, codec=spec.outer.codec))
        / 1e6,
        r"In a group of 8, an outer step sends ([\d.]+) MB": eight / 1e6,
        r"([\d.]+) s at 20 Mbit/s up": eight / (20e6 / 8),
        r"([\d.]+) s at 10 Mbit/s": eight / (10e6 / 8),
        rf"Groups of {spec.round.max_group} take hardly longer, ([\d.]+) MB": sixteen / 1e6,
        r"Disk: ([\d.]+) GB at most": disk_needs(manifest) / 1e9,
        r"an inner step is ([\d,]+) tokens": spec.tokens_per_inner_step,
        r"about ([\de]+) floating-point operations": step_flops,
        r"([\d.]+) s on a small GPU": step_flops / 5e12,
        r"([\d.]+) s on a laptop's CPU": step_flops / 1e11,
        r"so ([\d.]+) s between two outer steps": on_gpu,
        r"so ([\d.]+) minutes, and three days": on_cpu / 60,
    }
    for said, figure in figures.items():
        found = re.search(said, comment)
        assert found is not None, said
        assert float(found[1].replace(",", "")) == pytest.approx(figure, rel=0.06), said
    assert spec.outer.steps * (on_gpu + eight / 2.5e6) == pytest.approx(2 * 3600, rel=0.25)
    assert spec.outer.steps * on_cpu == pytest.approx(3 * 24 * 3600, rel=0.25)
    assert eight / 2.5e6 / (on_gpu + eight / 2.5e6) == pytest.approx(0.2, abs=0.03), "a fifth of the time"


@pytest.mark.parametrize("name", HUB_RUNS)
def test_names_of_the_hub_are_whole_and_never_change(name: str) -> None:
    """Nothing but the hub is needed, and what is read there is of one commit each."""
    data = RunSpec.load(run_named(name)).data
    assert data.source == "hub"
    assert data.tokenizer.startswith(PREFIX)
    for what in (str(data.path), data.tokenizer.removeprefix(PREFIX)):
        assert DATA_SET_NAME.fullmatch(what)
        assert re.fullmatch(r"[0-9a-f]{40}", what.partition("@")[2])
    comment = opening_comment(run_named(name))
    for said in ("pip install 'p2p-diloco[hf]'", "The hub itself was not reached", "peer --data FOLDER"):
        assert said in comment


def local_copy(folder: Path, config: str | None) -> None:
    """Files as the data set has them on the hub: C4 in folders that its README.md names, stories in data/."""
    texts = {
        split: [f"{split} {i}: once there was a dog " + "who ran and ran " * 30 for i in range(64)]
        for split in ("train", "validation")
    }
    if config is None:
        (folder / "data").mkdir(parents=True)
        (folder / "README.md").write_text("---\nlicense: cdla-sharing-1.0\n---\n")
        for split, of_split in texts.items():
            datasets.Dataset.from_dict({"text": of_split}).to_parquet(
                folder / f"data/{split}-00000-of-00001-2d5a.parquet"
            )
        return
    (folder / config).mkdir(parents=True)
    files = [f"  - split: {split}\n    path: {config}/c4-{split}.*.json.gz\n" for split in texts]
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{''.join(files)}---\n")
    for split, of_split in texts.items():
        with gzip.open(folder / config / f"c4-{split}.00000-of-00001.json.gz", "wt") as file:
            file.writelines(json.dumps({"text": text, "url": "u", "timestamp": "t"}) + "\n" for text in of_split)


@pytest.mark.parametrize("name", HUB_RUNS)
def test_a_local_folder_of_the_same_form_takes_the_hubs_place(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the comment says: with ``--data``, and as the path."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    given = RunSpec.load(run_named(name)).data
    local_copy(tmp_path / "copy", given.config)
    data = given.model_copy(update={"tokenizer": "bytes", "seq_len": 128, "eval_tokens": 1024})
    with_flag = open_corpus(data, base=None, cache=tmp_path / "one", override_path=tmp_path / "copy")
    as_path = data.model_copy(update={"path": "copy"})
    check_data_set(as_path, tmp_path)
    by_path = open_corpus(as_path, base=tmp_path, cache=tmp_path / "other")
    for corpus in (with_flag, by_path):
        assert bytes(corpus.held_out[:13]) == b"validation 0:"
        assert bytes(corpus.train).count(b"train") == 64
        assert b"validation" not in bytes(corpus.train)
