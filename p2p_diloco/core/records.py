"""What a peer says about itself in the DHT: one signed record of at most 1 kB, renewed every few seconds.

    bytes on the wire   msgpack [body, signature]; the body is msgpack of the record's fields, in order
    signature           Ed25519 over a fixed context and the body, by the key inside the record's own peer id

A record is a claim, not a fact: it says where its peer stands, never where the swarm stands (that is ``rounds``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import islice, pairwise
from typing import Annotated, Any, Literal, TypeVar

import msgpack
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from p2p_diloco.core.identity import MAX_PEER_ID_CHARS, Identity, verify
from p2p_diloco.core.outer import HASH_BYTES

MAX_RECORD_BYTES = 1024
MAX_RECORD_LIFE_S = 900.0
MAX_PEERS_KNOWN = 4096
MAX_LINKS_KNOWN = 16384
MAX_DOUBTS = 4
"""Sixteen times as long."""
HEADS_SHOWN = 4
"""In a record, beside the head: there is no room for more."""
OPENED_KEPT = 2048
MAX_ARRAY = 1 << 16
MAX_MAP = 64
"""Items of one list, and keys of one dict, in anything that a peer sends."""
METRICS_ADDR = r"^(([A-Za-z0-9.-]+|\[[0-9a-f:.]+\]):[0-9]{1,5})?$"
SIGNATURE_CONTEXT = b"p2p-diloco record\0"
RUNS_KEY = "p2p-diloco.runs"
"""DHT key under which some peers of every run announce it, so that one address is enough to join."""


def peers_key(run_id: str) -> str:
    """DHT key under which every peer of a run keeps its record, with its peer id as the subkey."""
    return f"p2p-diloco.{run_id}.peers"


Role = Literal["trainer", "seed"]
Phase = Literal["joining", "inner", "gather", "reduce", "settle", "apply", "evaluate", "left"]
Hash = Annotated[bytes, Field(min_length=HASH_BYTES, max_length=HASH_BYTES)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Natural = Annotated[int, Field(ge=0, lt=2**60)]


class Signed(BaseModel):
    """What a peer states under its signature. The fields' order is the wire's order: append only."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    peer_id: Annotated[str, Field(min_length=1, max_length=MAX_PEER_ID_CHARS)]


S = TypeVar("S", bound=Signed)

Fault = Literal["size", "form", "version", "field", "signature", "other"]
"""Why a record is refused; "other": it is sound, but not what it was stored as."""


class Unsound(ValueError):
    """Something that its own peer did not sign in exactly this form."""

    def __init__(self, fault: Fault, message: str) -> None:
        super().__init__(message)
        self.fault: Fault = fault


def seal(statement: Signed, context: bytes, identity: Identity) -> bytes:
    """``context`` keeps a signature under one kind of statement from being one under another kind."""
    body = msgpack.packb(list(statement.model_dump().values()))
    sealed: bytes = msgpack.packb([body, identity.sign(context + body)])
    return sealed


def unseal(data: bytes, kind: type[S], context: bytes) -> S:
    """Parse and verify. Unsound for anything that its own peer did not sign in exactly this form."""
    if len(data) > MAX_RECORD_BYTES:
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
    """The newest snapshot that it serves, and that state's digest."""
    snapshot_digest: Hash
    maddrs: Annotated[list[Annotated[str, Field(max_length=160)]], Field(max_length=3)]
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

    @property
    def expires_s(self) -> float:
        return self.issued_s + self.life_s

    @property
    def label(self) -> str:
        return self.name or self.peer_id[-8:]


def seal_record(record: Record, identity: Identity) -> bytes:
    """ValueError when the record is larger than 1 kB."""
    sealed = seal(record, SIGNATURE_CONTEXT, identity)
    if len(sealed) > MAX_RECORD_BYTES:
        raise ValueError(f"a record of {len(sealed)} bytes; shorten the peer's name or announce fewer addresses")
    return sealed


@lru_cache(maxsize=OPENED_KEPT)
def open_record(data: bytes) -> Record:
    """Unsound for anything that its own peer did not sign in exactly this form. Remembers the last sound ones: the
    DHT's validator opens a record, at 0.2 ms, before whoever looked it up does."""
    return unseal(data, Record, SIGNATURE_CONTEXT)


def is_current(record: Record, now_s: float) -> bool:
    """Whether the record is of this time. Clocks of two peers may differ by up to a record's life."""
    return now_s - record.life_s < record.issued_s < now_s + record.life_s


class Directory:
    """The newest record of every other peer, and who did not answer although its record says that it lives."""

    def __init__(self, peer_id: str, run_id: str) -> None:
        self.peer_id = peer_id
        self.run_id = run_id
        self._records: dict[str, Record] = {}
        self._sealed: dict[str, bytes] = {}
        self._verified: dict[bytes, str] = {}
        """The same the other way round: records are read again and again, and a signature costs 0.1 ms to verify."""
        self._suspects: dict[str, float] = {}
        """Peer id -> ``issued_s`` of the record that turned out untrue."""
        self._doubts: dict[str, float] = {}
        """Peer id -> the time until which its claims have no weight."""
        self._doubted: dict[str, int] = {}
        """Peer id -> how often it was, as one of a few."""
        self._met: tuple[frozenset[str], int, bytes] = (frozenset(), 0, b"")
        self.before: dict[bytes, bytes] = {}
        """Head -> the one that it follows from. Verified, not claimed."""

    def learn(self, sealed: bytes, now_s: float) -> Record | None:
        """Take in a record from anywhere; the newest one known of its peer. None when it is ours, out of date, or of
        another run. Unsound when it is not sound."""
        if sealed in self._verified:
            known = self._records[self._verified[sealed]]
            return known if is_current(known, now_s) else None
        known = open_record(sealed)
        if known.peer_id == self.peer_id or known.run_id != self.run_id or not is_current(known, now_s):
            return None
        newest = self._records.get(known.peer_id)
        if newest is None and len(self._records) >= MAX_PEERS_KNOWN:
            return None
        if newest is None or newest.issued_s < known.issued_s:
            if newest is not None:
                del self._verified[self._sealed[known.peer_id]]
            self._records[known.peer_id] = known
            self._verified[sealed] = known.peer_id
            self._sealed[known.peer_id] = sealed
        return self._records[known.peer_id]

    def learn_from(self, peer_id: str, sealed: bytes, now_s: float) -> Record | None:
        """As ``learn``, from the peer that it is about. Unsound when that is another one: a stranger could fill the
        directory with peers that it has invented, each of them dialled by all."""
        if open_record(sealed).peer_id != peer_id:
            raise Unsound("other", "somebody else's record")
        return self.learn(sealed, now_s)

    def suspect(self, peer_id: str) -> None:
        """Do not count on this peer until it signs a newer record."""
        if peer_id in self._records:
            self._suspects[peer_id] = self._records[peer_id].issued_s

    def live(self, now_s: float) -> list[Record]:
        """Records of the peers that are there, in the order of their ids."""
        return [record for record in self.current(now_s) if self._answers(record)]

    def _answers(self, record: Record) -> bool:
        """Tells whether this peer has not failed to answer me since it signed this record."""
        return self._suspects.get(record.peer_id, -1.0) < record.issued_s

    def current(self, now_s: float) -> list[Record]:
        """As ``live``, with those who did not answer."""
        for peer_id in [p for p, record in self._records.items() if not is_current(record, now_s)]:
            del self._records[peer_id]
            del self._verified[self._sealed.pop(peer_id)]
            self._suspects.pop(peer_id, None)
            self._doubts.pop(peer_id, None)
            self._doubted.pop(peer_id, None)
        return [record for _, record in sorted(self._records.items()) if record.phase != "left"]

    def doubt(self, head: bytes, now_s: float, life_s: float) -> int:
        """Who claims this head has no vote for ``life_s``, whatever newer records it signs; fewer than half of those
        who are there have none for twice as long each time again, MAX_DOUBTS times: else one that lies could hold
        up the others for most of their time. How many do."""
        current = self.current(now_s)
        claim = [record.peer_id for record in current if head in (record.head, *record.heads)]
        few = 2 * len(claim) < len(current) + 1
        for peer_id in claim:
            again = self._doubted.get(peer_id, 0)
            self._doubts[peer_id] = now_s + life_s * (1 << again if few else 1)
            if few:
                self._doubted[peer_id] = min(again + 1, MAX_DOUBTS)
        return len(claim)

    def believed(self, now_s: float) -> list[Record]:
        """The voters: as ``live``, without those in doubt, and with all in client mode whose record is current. They
        cannot be dialled, so it means little that one does not answer; and if its vote came and went with every try,
        each half of a swarm that was cut in two could take itself for the larger one."""
        return [
            record
            for record in self.current(now_s)
            if (record.client_mode or self._answers(record)) and self._doubts.get(record.peer_id, now_s) <= now_s
        ]

    def show(self, way: Sequence[bytes]) -> None:
        """Heads, newest first, of which each is known to follow from the next. The oldest that are known make room."""
        self.before |= pairwise(way)
        for head in list(islice(self.before, max(len(self.before) - MAX_LINKS_KNOWN, 0))):
            del self.before[head]

    def met(self, peer_ids: Iterable[str], step: int, head: bytes) -> None:
        """A round with these peers has just led me to ``head``."""
        self._met = frozenset(peer_ids), step, head

    def expected(self, now_s: float) -> list[Record]:
        """As ``live``, but those whom I met last stand where that round led, although their records, which take
        seconds to get here, do not say so yet. For who to wait for; not for any vote."""
        peer_ids, step, head = self._met
        return [
            r.model_copy(update={"step": step, "head": head}) if r.peer_id in peer_ids and r.step < step else r
            for r in self.live(now_s)
        ]

    def get(self, peer_id: str) -> Record | None:
        return self._records.get(peer_id)

    def sealed(self, peer_id: str) -> bytes | None:
        return self._sealed.get(peer_id)

    def maddrs(self, peer_id: str) -> list[str]:
        record = self._records.get(peer_id)
        return record.maddrs if record else []


def unpack_plain(data: bytes) -> Any:
    """msgpack without extension types, without nesting deeper than C can check, and nothing after the value; else
    Unsound."""
    try:
        limits = {"max_array_len": MAX_ARRAY, "max_map_len": MAX_MAP}
        return msgpack.unpackb(data, strict_map_key=True, ext_hook=_no_extension, raw=False, **limits)
    except (ValueError, msgpack.UnpackException, RecursionError, UnicodeDecodeError) as error:
        raise Unsound("form", "not plain msgpack") from error


def _no_extension(code: int, data: bytes) -> object:
    raise ValueError("msgpack extension types are not accepted")
