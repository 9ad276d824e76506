"""Run files: what a person may write, and what is said of mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2p_diloco.core.errors import UsageError
from p2p_diloco.core.runfile import RunSpec

SPEC = {"name": "test", "model": {"config": {"model_type": "llama", "rope_theta": 1e4}}}
RUN_FILE = """
name = "test"
seed = 7
[model]
config = { model_type = "llama", hidden_size = 64 }
[inner]
lr = 1
steps = 50
[outer]
codec = "int4"
"""


def run_file(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


def test_a_run_file_is_its_sections_over_the_defaults(tmp_path: Path) -> None:
    spec = RunSpec.load(run_file(tmp_path, RUN_FILE))
    assert (spec.seed, spec.inner.steps, spec.outer.codec) == (7, 50, "int4")
    assert spec.inner.lr == 1.0
    assert isinstance(spec.inner.lr, float)
    assert (spec.outer.lr, spec.outer.momentum) == (0.7, 0.9)
    assert spec.tokens_per_inner_step == 16 * 256
    assert spec.max_weight_tokens == 4 * 50 * 16 * 256


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[inner]\nstepps = 5", "unknown key 'inner.stepps'; did you mean 'steps'?"),
        ("[round]\nxyz = 5", "unknown key 'round.xyz'; known keys: min_group, max_group, gather_s, snapshot_every"),
        ("sede = 5", "unknown key 'sede'; did you mean 'seed'?"),
        ('[inner]\nsteps = "five"', "key 'inner.steps': input should be a valid integer (got 'five')"),
        ("[inner]\nsteps = 5.0", "key 'inner.steps': input should be a valid integer (got '5.0')"),
        ("[inner]\nlr = true", "key 'inner.lr': input should be a valid number (got 'True')"),
        ("[inner]\nlr = -1e-4", "key 'inner.lr': input should be greater than 0 (got '-0.0001')"),
        ("[inner]\nlr = nan", "key 'inner.lr': input should be a finite number (got 'nan')"),
        ("[inner]\nweight_decay = inf", "key 'inner.weight_decay': input should be a finite number (got 'inf')"),
        ("[outer]\nmomentum = nan", "key 'outer.momentum': input should be"),
        ("[outer]\nmomentum = 1.0", "key 'outer.momentum': input should be less than 1 (got '1.0')"),
        ("[round]\ngather_s = nan", "key 'round.gather_s': input should be"),
        ('[outer]\ncodec = "int2"', "key 'outer.codec': input should be 'fp32', 'fp16', 'int8' or 'int4' (got 'int2')"),
        ("[round]\nmin_group = 9\nmax_group = 8", "key 'round': min_group is larger than max_group"),
        ('[data]\nsource = "path"', "key 'data': path goes with source = \"path\""),
        ('[data]\npath = "texts"', "key 'data': path goes with source = \"path\""),
        ('[data]\nsource = "hub"', 'key \'data\': path goes with source = "path" or source = "hub"'),
        ('[data]\nconfig = "en"', "key 'data': config goes with source = \"hub\""),
        ("[data]\nmax_documents = 7", "key 'data': max_documents goes with source = \"hub\""),
        ('[data]\nsource = "hub"\npath = "a/b"\nheld_out_split = "train"', "key 'data': held_out_split is split"),
    ],
)
def test_a_mistake_is_named_with_its_file_and_key(tmp_path: Path, line: str, message: str) -> None:
    front = "" if line.startswith("[") else line
    section = line if line.startswith("[") else ""
    text = f'name = "test"\n{front}\n[model]\nconfig = {{ model_type = "llama" }}\n{section}\n'
    with pytest.raises(UsageError) as raised:
        RunSpec.load(run_file(tmp_path, text))
    assert str(raised.value).startswith(f"{tmp_path / 'run.toml'}: {message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "key 'name' is missing"),
        ('name = "test"', "key 'model' is missing"),
        ('name = "test"\n[model]', "key 'model': give either config or path"),
        ('name = "test"\n[model]\nconfig = {}', "key 'model': config needs a model_type"),
        (
            'name = "test"\n[model.config]\nmodel_type = "llama"\nrope = { factors = [1.0, nan] }',
            "key 'model': config has a nan",
        ),
        ('name = "../x"\n[model]\npath = "m"', "key 'name': string should match pattern"),
        ('name = "x\\n"\n[model]\npath = "m"', "key 'name': string should match pattern"),
        ("name = ", "not valid TOML"),
    ],
)
def test_an_unfinished_run_file_says_what_is_missing(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        RunSpec.load(run_file(tmp_path, text))
    assert message in str(raised.value)


def test_a_run_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such run file"):
        RunSpec.load(tmp_path / "run.toml")
    with pytest.raises(UsageError, match="cannot be read"):
        RunSpec.load(tmp_path)
    (tmp_path / "latin").write_bytes(b'name = "\xe9"')
    with pytest.raises(UsageError, match="UTF-8"):
        RunSpec.load(tmp_path / "latin")


def test_weights_come_with_a_tokenizer_that_is_named(tmp_path: Path) -> None:
    text = 'name = "test"\n[model]\npath = "start"\n'
    for data in ("", "[data]\nseq_len = 64\n"):
        with pytest.raises(UsageError, match=r"run\.toml: key 'data\.tokenizer': .*name its tokenizer"):
            RunSpec.load(run_file(tmp_path, text + data))
    for tokenizer in ("bytes", "start"):
        spec = RunSpec.load(run_file(tmp_path, text + f'[data]\ntokenizer = "{tokenizer}"\n'))
        assert RunSpec.model_validate_json(spec.model_dump_json()) == spec
