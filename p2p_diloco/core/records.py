"""What a peer says about itself in the DHT: one signed record of at most 2 kB, renewed every few seconds.

    bytes on the wire   msgpack [body, signature]; the body is msgpack of the record's fields, in order
    signature           Ed25519 over a fixed context and the body, by the key inside the record's own peer id

A record is a claim, not a fact: it says where its peer stands, never where the swarm stands (that is ``swarm_head``).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import msgpack
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from p2p_diloco.core.addresses import MAX_MADDR_CHARS, MAX_MADDRS, is_relayed
from p2p_diloco.core.digest import HASH_BYTES
from p2p_diloco.core.identity import MAX_PEER_ID_CHARS, Identity, verify
from p2p_diloco.core.reach import IPV4, Over
from p2p_diloco.core.shares import LARGEST_SHARE_OVER_EQUAL

MAX_RECORD_BYTES = 2048
MAX_SEAT_BYTES = 512
MAX_BARRED = 64
"""Peers that one has barred."""
BARRED_DIGEST_BYTES = 8
MAX_RECORD_LIFE_S = 900.0
HEADS_SHOWN = 4
"""In a record, beside the head: there is no room for more."""
OPENED_KEPT = 8192
MAX_ARRAY = 1 << 16
MAX_MAP = 64
"""Items of one list, and keys of one dict, in anything that a peer sends."""
METRICS_ADDR = r"^(([A-Za-z0-9.-]+|\[[0-9a-f:.]+\]):[0-9]{1,5})?$"
SIGNATURE_CONTEXT = b"p2p-diloco record\0"
RUNS_KEY = "p2p-diloco.runs"
"""DHT key under which some peers of every run announce it, so that one address is enough to join."""


def peers_key(run_id: str) -> str:
    """Returns the DHT key under which every peer of a run keeps its record, with its peer id as the subkey."""
    return f"p2p-diloco.{run_id}.peers"


Role = Literal["trainer", "seed"]
Reached = Literal["direct", "relay", "no"]
Phase = Literal["joining", "inner", "gather", "reduce", "settle", "apply", "evaluate", "left"]
Hash = Annotated[bytes, Field(min_length=HASH_BYTES, max_length=HASH_BYTES)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Natural = Annotated[int, Field(ge=0, lt=2**60)]


class Signed(BaseModel):
    """Holds what a peer states under its signature. The fields' order is the wire's order: append only."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    max_bytes: ClassVar[int] = MAX_RECORD_BYTES
    """When it is sealed."""

    peer_id: Annotated[str, Field(min_length=1, max_length=MAX_PEER_ID_CHARS)]


S = TypeVar("S", bound=Signed)

Fault = Literal["size", "form", "version", "field", "signature", "seat", "other"]
"""Why a record is refused; "seat": its peer may not take part; "other": it is sound, but not what it was stored as."""


class Unsound(ValueError):
    """Something that its own peer did not sign in exactly this form."""

    def __init__(self, fault: Fault, message: str) -> None:
        super().__init__(message)
        self.fault: Fault = fault


def seal(statement: Signed, context: bytes, identity: Identity) -> bytes:
    """Returns a statement with its peer's signature, as bytes. ``context`` keeps a signature under one kind of
    statement from being one under another kind."""
    body = msgpack.packb(list(statement.model_dump().values()))
    sealed: bytes = msgpack.packb([body, identity.sign(context + body)])
    return sealed


def unseal(data: bytes, kind: type[S], context: bytes) -> S:
    """Parses and verifies a signed statement, and returns it. Raises Unsound for anything that its own peer did not
    sign in exactly this form."""
    if len(data) > kind.max_bytes:
        raise Unsound("size", f"a signed {kind.__name__.lower()} that is too large")
    envelope = unpack_plain(data)
    if not (isinstance(envelope, list) and len(envelope) == 2 and all(isinstance(piece, bytes) for piece in envelope)):
        raise Unsound("form", f"not a signed {kind.__name__.lower()}")
    body, signature = envelope
    values, names = unpack_plain(body), list(kind.model_fields)
    if not isinstance(values, list) or len(values) != len(names):
        raise Unsound("version", f"a {kind.__name__.lower()} of another version")
    try:
        statement = kind.model_validate(dict(zip(names, values)))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise Unsound("field", f"{kind.__name__.lower()} field {first['loc'][0]}: {first['msg']}") from error
    if not verify(statement.peer_id, context + body, signature):
        raise Unsound("signature", f"the {kind.__name__.lower()} is not signed by its peer")
    return statement


class Record(Signed):
    run_id: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
    run_name: Annotated[str, Field(max_length=64)]
    issued_s: Annotated[float, Field(ge=0, le=1e11)]
    """Unix time at which the peer signed this."""
    life_s: Annotated[float, Field(gt=0, le=MAX_RECORD_LIFE_S)]
    role: Role
    phase: Phase
    step: Natural
    """Outer step the peer stands at."""
    head: Hash
    committed: bool
    """Whether this peer has ever applied an update; only such peers have a vote on the swarm's head."""
    heads: Annotated[list[Hash], Field(max_length=HEADS_SHOWN)]
    """Its heads before ``head``, newest first: lets others see that it went the same way."""
    snapshot_step: Natural
    """The newest snapshot that it serves, and that state's digest; while it is joining, the one that it downloads, if
    it does."""
    snapshot_digest: Hash
    maddrs: Annotated[list[Annotated[str, Field(max_length=MAX_MADDR_CHARS)]], Field(max_length=MAX_MADDRS)]
    """Where it can be dialled."""
    client_mode: bool
    name: Annotated[str, Field(max_length=32)] = ""
    version: Annotated[str, Field(max_length=16)] = ""
    inner_step: Natural = 0
    """Since the last outer step."""
    inner_steps_planned: Natural = 0
    loss: Finite | None = None
    """Training loss, nats per token."""
    held_out_loss: Finite | None = None
    """Of theta, nats per token, at outer step ``held_out_step``; only where this peer evaluated it."""
    held_out_step: Natural = 0
    tokens: Natural = 0
    """Trained on since this peer joined."""
    tokens_per_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    group_size: Natural = 0
    """Of its last round."""
    round_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Seconds that its last round took."""
    round_bytes: Natural = 0
    """Sent and received in its last round."""
    metrics_addr: Annotated[str, Field(max_length=64, pattern=METRICS_ADDR)] = ""
    """HOST:PORT where its metrics can be scraped; empty when they cannot, from other machines."""
    seat: Annotated[bytes, Field(max_length=MAX_SEAT_BYTES)] = b""
    """Under which it takes part in a run by invitation; empty in a run that is open, and of the run's owner."""
    revocations: Natural = 0
    """Number of the newest list of revocations that it has and serves; 0 where there is none."""
    known: bool = False
    """Whether it is known where it stands, as its own ledger has it."""
    known_members: Natural = 0
    """How many peers are known there."""
    signatures: Natural = 0
    """Members that have signed the certificate of the update that led here; 0 where it did not take part in that
    round."""
    certifying: Natural = 0
    """Members of that round that certify."""
    witnessed: bool = False
    """Whether the run's owner has signed that certificate, too."""
    awaits_witness: bool = False
    """Whether its last round, on this head, did not commit for want of the owner's witness."""
    anchored_step: Natural = 0
    """Outer step of the newest anchor that it goes by; 0 where there is none."""
    anchor: Annotated[bytes, Field(max_length=HASH_BYTES)] = b""
    """That anchor's digest; empty where there is none."""
    barred: Annotated[int, Field(ge=0, le=MAX_BARRED)] = 0
    """How many peers it has barred, each with a proof that it serves."""
    barred_digest: Annotated[bytes, Field(max_length=BARRED_DIGEST_BYTES)] = b""
    """Tells whether these are the same as another peer's; empty where there are none."""
    found_wrong: Natural = 0
    """How many peers it has found, or was shown, to have reduced wrongly, as far as that counts today."""
    helped: bool = False
    """Whether the owner's seed has led the round of the update that led here, and averaged in it."""
    share_percent: Annotated[int, Field(ge=0, le=100 * LARGEST_SHARE_OVER_EQUAL)] = 100
    """What it was to reduce in that round, by its uplink, in percent of an equal share; 100 also where it does not
    reduce, or was not there."""
    reached_over: Over = IPV4
    """The families of addresses over which it is dialled, where it is not in client mode (``reach``)."""
    reaches_over: Over = IPV4
    """Those over which it dials others."""
    helps: bool = False
    """Of the owner's seed: it leads and reduces now, also where trainers can, for not all of them reach each other."""

    @property
    def beyond_genesis(self) -> bool:
        """Returns the field ``committed``, by the name that a ``Standing`` has for it."""
        return self.committed

    @property
    def expires_s(self) -> float:
        return self.issued_s + self.life_s

    @property
    def label(self) -> str:
        return self.name or self.peer_id[-8:]

    @property
    def reached(self) -> Reached:
        """Returns how others reach the peer, as it says: directly; through a relay, which carries small messages and no
        parts of a model; or not unless it calls them."""
        if not self.client_mode:
            return "direct"
        return "relay" if any(map(is_relayed, self.maddrs)) else "no"


def seal_record(record: Record, identity: Identity) -> bytes:
    """Returns a record with its peer's signature, as bytes. Raises ValueError when they are more than 2 kB."""
    sealed = seal(record, SIGNATURE_CONTEXT, identity)
    if len(sealed) > MAX_RECORD_BYTES:
        raise ValueError(f"a record of {len(sealed)} bytes; shorten the peer's name or announce fewer addresses")
    return sealed


@lru_cache(maxsize=OPENED_KEPT)
def open_record(data: bytes) -> Record:
    """Parses and verifies a signed record, and returns it. Raises Unsound for anything that its own peer did not sign
    in exactly this form. Remembers the last sound ones: the DHT's validator opens a record, at 0.2 ms, before whoever
    looked it up does."""
    return unseal(data, Record, SIGNATURE_CONTEXT)


def is_current(record: Record, now_s: float) -> bool:
    """Returns whether the record is of this time. Clocks of two peers may differ by up to a record's life."""
    return now_s - record.life_s < record.issued_s < now_s + record.life_s


def unpack_plain(data: bytes) -> Any:
    """Returns the value that msgpack holds. Raises Unsound for extension types, for nesting deeper than C can check,
    and where anything comes after the value."""
    try:
        limits = {"max_array_len": MAX_ARRAY, "max_map_len": MAX_MAP}
        return msgpack.unpackb(data, strict_map_key=True, ext_hook=_no_extension, raw=False, **limits)
    except (ValueError, msgpack.UnpackException, RecursionError, UnicodeDecodeError) as error:
        raise Unsound("form", "not plain msgpack") from error


def _no_extension(code: int, data: bytes) -> object:
    raise ValueError("msgpack extension types are not accepted")
