"""What all peers of a run must agree on: the manifest, which its owner signs.

    RunManifest  the run file (``runfile.RunSpec``), and what follows from it and from the genesis: the model's full
                 config and layout, the fingerprint of the data, the digest of S_0, the owner's peer id
    run id       hash of the manifest's bytes, as its owner wrote them

A manifest travels as JSON with the owner's signature. Any peer may serve it; none can change it. What is signed is
never written anew: a key that a later version knows would come into an older manifest with its default.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any

from pydantic import (
    Field,
    ValidationError,
)

from p2p_diloco.core.admission import Admission
from p2p_diloco.core.aggregate import AGGREGATIONS, Aggregation
from p2p_diloco.core.digest import digest
from p2p_diloco.core.errors import OtherProtocol, UsageError
from p2p_diloco.core.grid import Grid
from p2p_diloco.core.identity import SIGNATURE_BYTES, Identity, verify
from p2p_diloco.core.invitation import Revocations
from p2p_diloco.core.runfile import Count, RunSpec, Section, explain

PROTOCOL = 4
"""Raised with every change after which old and new peers cannot train together."""
MAX_MANIFEST_BYTES = 32 * 1024 * 1024
"""A tokenizer of 256 Ki tokens, which travels inside, fits."""

TransformersConfig = dict[str, object]
"""A config of the transformers library as JSON: other keys for every type of models, which only that library knows."""
HexDigest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class RunManifest(Section):
    """Holds all that the peers of a run agree on: what its run file says, and what follows from that and from the
    genesis."""

    protocol: int = PROTOCOL
    spec: RunSpec
    model_config_json: str
    """The full transformers config as canonical JSON: defaults of another library version cannot change the model.
    ``open_manifest`` makes sure that it is a table with a model_type."""
    n_params: Count
    layout_digest: HexDigest
    """Over the names and shapes of all parameters, in the order in which theta holds them."""
    vocab_size: Count
    data_fingerprint: str
    """Of the built-in text; empty where every peer brings its own data."""
    tokenizer_json: str = ""
    """The tokenizer itself, for a tokenizer of the tokenizers library, with its end token where that has no usual name
    (``tokenizer.with_end``); empty for raw bytes."""
    genesis: HexDigest
    """Digest of S_0."""
    owner: str
    """Peer id of who started the run, and signed this."""

    @cached_property
    def canonical_bytes(self) -> bytes:
        """Returns the bytes that the owner signs: JSON with sorted keys, no spaces, ASCII. For a manifest that
        ``open_manifest`` has read, these are the bytes that came."""
        return canonical_json(self.model_dump(mode="json"))

    @cached_property
    def run_id(self) -> str:
        return digest(b"run", self.canonical_bytes)[:20].hex()

    @property
    def grid(self) -> Grid:
        """Returns the parts of the model, and the codec that they go through."""
        return Grid(n=self.n_params, codec=self.spec.outer.codec)

    @property
    def aggregation(self) -> Aggregation:
        """Returns the rule by which contributions become the mean of a part."""
        return AGGREGATIONS[self.spec.outer.aggregate]

    def admission(self, revocations: Revocations | None = None) -> Admission:
        """Returns who may take part, as far as these revocations say."""
        by_invitation = self.spec.membership == "invite"
        return Admission(run_id=self.run_id, owner=self.owner, by_invitation=by_invitation, revocations=revocations)

    @property
    def transformers_config(self) -> TransformersConfig:
        config: TransformersConfig = json.loads(self.model_config_json)
        return config

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> RunManifest:
        """Returns a copy. One with other values is another manifest, with bytes of its own."""
        copied = super().model_copy(update=update, deep=deep)
        if update:
            vars(copied).pop("canonical_bytes", None)
            vars(copied).pop("run_id", None)
        return copied

    def with_genesis(self, state_digest: bytes) -> RunManifest:
        """Returns the manifest of the same run from another S_0."""
        return self.model_validate({**self.model_dump(), "genesis": state_digest.hex()})

    def signed(self, owner: Identity) -> bytes:
        """Returns the manifest as it travels and lies on disk."""
        signature = owner.sign(SIGNATURE_CONTEXT + self.canonical_bytes).hex()
        return b"".join((BEFORE_MANIFEST, self.canonical_bytes, BEFORE_SIGNATURE, signature.encode(), AFTER_SIGNATURE))


SIGNATURE_CONTEXT = b"p2p-diloco manifest\0"
BEFORE_MANIFEST, BEFORE_SIGNATURE, AFTER_SIGNATURE = b'{"manifest":', b',"signature":"', b'"}'


def open_manifest(data: bytes, source: str) -> RunManifest:
    """Parses and verifies a signed manifest, and returns it. Raises a UsageError that names ``source`` for anything but
    a sound one.

    The protocol version is looked at first: a newer peer's manifest is not called malformed.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise UsageError(f"{source}: the manifest has {len(data)} bytes, more than {MAX_MANIFEST_BYTES}")
    protocol = protocol_of(data)
    if protocol is None:
        raise UsageError(f"{source}: not a signed manifest")
    if protocol != PROTOCOL:
        raise OtherProtocol(
            f"{source}: the run speaks protocol {protocol}, this is p2p-diloco with protocol {PROTOCOL}; "
            f"install the version of p2p-diloco that the run's owner uses"
        )
    try:
        body, signature = split_signed(data)
        manifest = RunManifest.model_validate_json(body)
    except ValidationError as error:
        raise UsageError(f"{source}: {explain(error, RunManifest)}") from error
    except ValueError as error:
        raise UsageError(f"{source}: not a signed manifest") from error
    if not verify(manifest.owner, SIGNATURE_CONTEXT + body, signature):
        raise UsageError(f"{source}: the manifest's signature is not its owner's; somebody changed it, do not join")
    if not names_a_model_type(manifest.model_config_json):
        raise UsageError(f"{source}: key 'model_config_json': not a transformers config with a model_type")
    vars(manifest)["canonical_bytes"] = body  # where the property keeps it
    return manifest


def protocol_of(data: bytes) -> int | None:
    """Returns the protocol that a signed manifest names, of whatever version; None where it is none."""
    try:
        protocol = json.loads(data, parse_constant=refuse_constant)["manifest"]["protocol"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return protocol if type(protocol) is int else None


def refuse_constant(name: str) -> None:
    """Raises ValueError: NaN and Infinity are no JSON."""
    raise ValueError(f"{name} is no JSON")


def split_signed(data: bytes) -> tuple[bytes, bytes]:
    """Returns what is signed, and the signature, of a manifest as it travels. ValueError for any other bytes."""
    start, stop = len(BEFORE_MANIFEST), -len(AFTER_SIGNATURE) - 2 * SIGNATURE_BYTES
    body, between = data[start : stop - len(BEFORE_SIGNATURE)], data[stop - len(BEFORE_SIGNATURE) : stop]
    if not (data.startswith(BEFORE_MANIFEST) and between == BEFORE_SIGNATURE and data.endswith(AFTER_SIGNATURE)):
        raise ValueError("not a signed manifest")
    return body, bytes.fromhex(data[stop : -len(AFTER_SIGNATURE)].decode())


def names_a_model_type(config_json: str) -> bool:
    try:
        config = json.loads(config_json)
    except (ValueError, RecursionError):
        return False
    return isinstance(config, dict) and isinstance(config.get("model_type"), str)


def canonical_json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()
