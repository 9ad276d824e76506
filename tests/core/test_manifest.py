from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from p2p_diloco.core.errors import UsageError
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.manifest import (
    MAX_MANIFEST_BYTES,
    SIGNATURE_CONTEXT,
    RunManifest,
    RunSpec,
    canonical_json,
    open_manifest,
)

OWNER = Identity.from_seed(bytes(32))
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


def manifest(**changes: Any) -> RunManifest:
    fields = {
        "spec": RunSpec.model_validate(SPEC),
        "model_config_json": '{"model_type":"llama"}',
        "n_params": 1000,
        "layout_digest": "1" * 64,
        "vocab_size": 256,
        "data_fingerprint": "",
        "genesis": "2" * 64,
        "owner": OWNER.peer_id,
    }
    return RunManifest.model_validate(fields | changes)


def sealed(body: dict[str, Any], signer: Identity = OWNER) -> bytes:
    """A well-signed envelope around any body."""
    signature = signer.sign(SIGNATURE_CONTEXT + canonical_json(body)).hex()
    return canonical_json({"manifest": body, "signature": signature})


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


def test_the_run_id_of_a_manifest_is_pinned() -> None:
    """Changes only together with PROTOCOL, or with a default that changes what peers agree on."""
    assert manifest().run_id == "91f7c57bcf95b8a5db0951c49b71e0702b8034c7"


def test_an_end_token_that_is_not_given_leaves_no_trace() -> None:
    """The key is younger than runs that must keep their ids."""
    assert "end_token" not in RunSpec.model_validate(SPEC).model_dump()["data"]
    data = {"tokenizer": "own", "end_token": "<|close|>"}
    with_end = RunSpec.model_validate(SPEC | {"data": data})
    assert with_end.model_dump()["data"]["end_token"] == "<|close|>"
    assert (
        manifest(spec=with_end).run_id
        != manifest(spec=RunSpec.model_validate(SPEC | {"data": data | {"end_token": None}})).run_id
    )
    assert RunSpec.model_validate_json(with_end.model_dump_json()) == with_end


def test_a_manifest_comes_back_from_its_bytes() -> None:
    original = manifest()
    opened = open_manifest(original.signed(OWNER), "here")
    assert opened == original
    assert opened.run_id == original.run_id
    assert opened.signed(OWNER) == original.signed(OWNER)
    assert opened.transformers_config == {"model_type": "llama"}


def test_every_field_counts_for_the_run_id() -> None:
    ids = {manifest().run_id, manifest(genesis="3" * 64).run_id, manifest(n_params=1001).run_id}
    other_spec = RunSpec.model_validate(SPEC | {"outer": {"lr": 0.8}})
    ids.add(manifest(spec=other_spec).run_id)
    assert len(ids) == 4


def test_a_changed_manifest_is_not_its_owners() -> None:
    envelope = json.loads(manifest().signed(OWNER))
    envelope["manifest"]["genesis"] = "3" * 64
    with pytest.raises(UsageError, match="here: the manifest's signature is not its owner's"):
        open_manifest(json.dumps(envelope).encode(), "here")
    stranger = Identity.from_seed(bytes([1] * 32))
    with pytest.raises(UsageError, match="signature"):
        open_manifest(manifest().signed(stranger), "here")


@pytest.mark.parametrize("protocol", [0, 1, 3, 10**30])
def test_another_protocol_is_named_before_anything_else(protocol: int) -> None:
    with pytest.raises(
        UsageError, match=f"here: the run speaks protocol {protocol}, this is p2p-diloco with protocol 2"
    ):
        open_manifest(sealed({"protocol": protocol, "field of the future": 1}), "here")


def test_a_well_signed_manifest_with_a_bad_field_is_refused() -> None:
    body = manifest().model_dump(mode="json")
    with pytest.raises(UsageError, match="unknown key 'owners'; did you mean 'owner'"):
        open_manifest(sealed(body | {"owners": []}), "here")
    with pytest.raises(UsageError, match="key 'n_params'"):
        open_manifest(sealed(body | {"n_params": -1}), "here")
    with pytest.raises(UsageError, match="key 'genesis'"):
        open_manifest(sealed(body | {"genesis": "x"}), "here")


@pytest.mark.parametrize("config", ["", "[]", "{}", '{"model_type":5}', "[" * 100_000])
def test_a_model_config_is_a_table_with_a_model_type(config: str) -> None:
    with pytest.raises(UsageError, match="here: key 'model_config_json': not a transformers config"):
        open_manifest(manifest(model_config_json=config).signed(OWNER), "here")


def test_a_strangers_numbers_are_bounded() -> None:
    body = manifest().model_dump(mode="json")
    for key, value in (("max_documents", 10**7 + 1), ("eval_tokens", 2**26 + 1)):
        data = body["spec"]["data"] | {"source": "hub", "path": "some/set", key: value}
        with pytest.raises(UsageError, match=rf"here: key 'spec\.data\.{key}': input should be less than or equal to"):
            open_manifest(sealed(body | {"spec": body["spec"] | {"data": data}}), "here")


def test_weights_come_with_a_tokenizer_that_is_named(tmp_path: Path) -> None:
    text = 'name = "test"\n[model]\npath = "start"\n'
    for data in ("", "[data]\nseq_len = 64\n"):
        with pytest.raises(UsageError, match=r"run\.toml: key 'data': .*name its tokenizer under data\.tokenizer"):
            RunSpec.load(run_file(tmp_path, text + data))
    for tokenizer in ("bytes", "start"):
        spec = RunSpec.load(run_file(tmp_path, text + f'[data]\ntokenizer = "{tokenizer}"\n'))
        assert RunSpec.model_validate_json(spec.model_dump_json()) == spec


def test_what_only_python_calls_json_is_refused() -> None:
    body = manifest().model_dump(mode="json")
    for literal in ("NaN", "Infinity", "[" * 100_000):
        config = json.dumps(body).replace("10000.0", literal)
        with pytest.raises(UsageError, match="here: "):
            open_manifest(f'{{"manifest":{config},"signature":"{"0" * 128}"}}'.encode(), "here")


def test_an_oversized_manifest_is_refused_unread() -> None:
    with pytest.raises(UsageError, match="bytes, more than"):
        open_manifest(bytes(MAX_MANIFEST_BYTES + 1), "here")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4),
    max_leaves=8,
)


@given(st.binary(max_size=300))
@example(b'{"manifest": {"protocol": Infinity}, "signature": ""}')
@example(b'{"manifest": {"protocol": "one"}, "signature": ""}')
@example(b'{"manifest": [], "signature": ""}')
@example(b'{"manifest": {"protocol": 1}, "signature": "zz"}')
@example(b'{"manifest": {"protocol": 1, "\\ud800": 1}, "signature": ""}')
@example(b"[" * 100_000)
def test_any_bytes_are_refused_with_a_usage_error(data: bytes) -> None:
    with pytest.raises(UsageError, match="here: "):
        open_manifest(data, "here")


@given(st.sampled_from(sorted(RunManifest.model_fields)), JSON_VALUES, st.text(max_size=10))
def test_any_field_value_is_refused_or_not_signed(field: str, value: object, signature: str) -> None:
    body = manifest().model_dump(mode="json") | {field: value}
    with pytest.raises(UsageError, match="here: "):
        open_manifest(json.dumps({"manifest": body, "signature": signature}).encode(), "here")
