from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from p2p_diloco.core.digest import digest
from p2p_diloco.core.errors import OtherProtocol, UsageError
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.manifest import MAX_MANIFEST_BYTES, SIGNATURE_CONTEXT, RunManifest, canonical_json, open_manifest
from p2p_diloco.core.runfile import RunSpec
from tests.core.test_runfile import SPEC

OWNER = Identity.from_seed(bytes(32))


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


def test_the_run_id_of_a_manifest_is_pinned() -> None:
    """Changes only together with PROTOCOL, or with a default that changes what peers agree on."""
    assert manifest().run_id == "21122d85674a987b80541bdbbfc7cb2069c69936"


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


def test_what_is_signed_is_what_came_not_what_this_version_would_write() -> None:
    """An older manifest lacks keys that this version knows, a newer writer may write numbers otherwise; each has the
    run id, and the bytes that are served on, that its owner gave it."""
    body = manifest().model_dump(mode="json")
    del body["spec"]["outer"]["aggregate"], body["spec"]["round"]
    opened = open_manifest(sealed(body), "here")
    assert opened == manifest()
    assert opened.canonical_bytes == canonical_json(body)
    assert opened.run_id == digest(b"run", canonical_json(body))[:20].hex() != manifest().run_id
    assert opened.signed(OWNER) == sealed(body)

    written = json.dumps(body, indent=1).encode()
    signature = OWNER.sign(SIGNATURE_CONTEXT + written).hex().encode()
    opened = open_manifest(b'{"manifest":' + written + b',"signature":"' + signature + b'"}', "here")
    assert opened.canonical_bytes == written
    with pytest.raises(UsageError, match="signature is not its owner's"):
        open_manifest(b'{"manifest":' + canonical_json(body) + b',"signature":"' + signature + b'"}', "here")


def test_a_copy_with_other_values_is_another_manifest() -> None:
    opened = open_manifest(manifest().signed(OWNER), "here")
    assert opened.run_id == opened.model_copy().run_id == manifest().run_id
    changed = opened.model_copy(update={"n_params": 1001})
    assert open_manifest(changed.signed(OWNER), "here").run_id == changed.run_id == manifest(n_params=1001).run_id


@pytest.mark.parametrize("spoil", [lambda data: data + b" ", lambda data: b" " + data, lambda data: data[:-3] + b'"}'])
def test_nothing_stands_before_between_or_after(spoil: Callable[[bytes], bytes]) -> None:
    with pytest.raises(UsageError, match="here: not a signed manifest"):
        open_manifest(spoil(manifest().signed(OWNER)), "here")


def test_every_field_counts_for_the_run_id() -> None:
    ids = {manifest().run_id, manifest(genesis="3" * 64).run_id, manifest(n_params=1001).run_id}
    other_spec = RunSpec.model_validate(SPEC | {"outer": {"lr": 0.8}})
    ids.add(manifest(spec=other_spec).run_id)
    assert len(ids) == 4


def test_a_changed_manifest_is_not_its_owners() -> None:
    envelope = json.loads(manifest().signed(OWNER))
    envelope["manifest"]["genesis"] = "3" * 64
    with pytest.raises(UsageError, match="here: the manifest's signature is not its owner's"):
        open_manifest(canonical_json(envelope), "here")
    stranger = Identity.from_seed(bytes([1] * 32))
    with pytest.raises(UsageError, match="signature"):
        open_manifest(manifest().signed(stranger), "here")


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 5, 10**30])
def test_another_protocol_is_named_before_anything_else(protocol: int) -> None:
    with pytest.raises(
        OtherProtocol, match=f"here: the run speaks protocol {protocol}, this is p2p-diloco with protocol 4"
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
