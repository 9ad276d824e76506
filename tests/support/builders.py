"""Small sound things for tests to spoil: identities, records, readiness, rosters, two ends of a stream."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import msgpack
from hypothesis import strategies as st

from p2p_diloco.core.admission import Admission
from p2p_diloco.core.aggregate import AGGREGATIONS, AggregateName
from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.digest import digest
from p2p_diloco.core.group import Group, open_roster, seal_roster
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.known import Known
from p2p_diloco.core.records import Record, Signed
from p2p_diloco.core.roster import Readiness, rank, seal_readiness
from p2p_diloco.core.roster_rules import RosterRules
from p2p_diloco.wire.anchor_messages import AnchorList, AskAnchors
from p2p_diloco.wire.audit_messages import Accuses, AskContributions, AskEvidence
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.message import Message
from p2p_diloco.wire.messages import No, Size
from p2p_diloco.wire.probe_messages import AskDialBack, AskTransfer, DialBack, DialedBack, Transferred
from p2p_diloco.wire.proof_messages import AskBarred, AskOther, AskProof, AskRoster, BarredPeers, Other
from p2p_diloco.wire.round_messages import (
    Again,
    AskCommit,
    AskPart,
    AskWitness,
    Behind,
    Certifies,
    Closing,
    Commit,
    Contribute,
    Eta,
    NoWitness,
    Ready,
    Receipt,
    Redirect,
    Roster,
    TooFew,
    Took,
    TookBefore,
    Witnessed,
)
from p2p_diloco.wire.state_messages import (
    AskChain,
    AskChunk,
    AskHave,
    AskHeads,
    AskIndex,
    AskManifest,
    AskRevocations,
    AskUpdate,
    Have,
    Heads,
    Push,
    RevocationList,
)

RUN_ID = "ab" * 20
NOW_S = 1_000_000.0


@cache
def identity(index: int) -> Identity:
    return Identity.from_seed(index.to_bytes(32, "big"))


OWNER = identity(1000)
"""Of a run."""


def head(name: str) -> bytes:
    """The head of a history: one letter an outer step."""
    return digest(b"history", name.encode())


def ranked(at: bytes, count: int) -> list[Identity]:
    """In the order of rank on a head: the first one leads."""
    return sorted((identity(i + 1) for i in range(count)), key=lambda who: rank(at, who.peer_id))


def record_of(who: Identity, history: str = "", **changes: Any) -> Record:
    """Of a trainer that stands where ``history`` leads to."""
    fields: dict[str, Any] = {
        "peer_id": who.peer_id,
        "run_id": RUN_ID,
        "run_name": "simulated",
        "issued_s": NOW_S,
        "life_s": 30.0,
        "role": "trainer",
        "phase": "inner",
        "step": len(history),
        "head": head(history),
        "committed": bool(history),
        "heads": [head(history[:back]) for back in range(len(history) - 1, max(len(history) - 5, -1), -1)],
        "snapshot_step": 0,
        "snapshot_digest": bytes(32),
        "maddrs": [f"/memory/{who.peer_id[-8:]}/p2p/{who.peer_id}"],
        "client_mode": False,
    }
    return Record(**fields | changes)


def readiness_of(who: Identity, history: str = "", **changes: Any) -> Readiness:
    """Given to itself, unless ``leader`` says to whom."""
    fields: dict[str, Any] = {
        "run_id": RUN_ID,
        "leader": who.peer_id,
        "step": len(history),
        "head": head(history),
        "peer_id": who.peer_id,
        "weight": 100,
        "client_mode": False,
        "nonce": bytes(8),
    }
    return Readiness(**fields | changes)


def rules_of(aggregate: AggregateName = "mean", **changes: Any) -> RosterRules:
    fields: dict[str, Any] = {
        "run_id": RUN_ID,
        "owner": OWNER.peer_id,
        "min_group": 1,
        "max_group": 256,
        "max_weight_tokens": 2**60,
        "aggregation": AGGREGATIONS[aggregate],
        "on_missed": "adopt",
        "seeds_reduce": "auto",
        "admission": Admission.to_all(RUN_ID),
    }
    return RosterRules(**fields | changes)


def known(*members: Identity, step: int = 99) -> Known:
    """So many are known, and nobody else."""
    return Known(step=step, peers=frozenset(who.peer_id for who in members))


def group_of(
    members: Sequence[Identity],
    history: str = "",
    aggregate: AggregateName = "mean",
    *,
    familiar: Sequence[Identity] | None = None,
    idle: Sequence[int] = (),
    **changes: Sequence[Any],
) -> Group:
    """The group of ``members``, in the order of rank, whom the first of them has gathered; ``changes``: a value for
    each. ``familiar``: those that are known; all, if None."""
    leader = members[0]
    readiness = [
        readiness_of(who, history, leader=leader.peer_id, **{name: values[i] for name, values in changes.items()})
        for i, who in enumerate(members)
    ]
    sealed = [seal_readiness(mine, who) for mine, who in zip(readiness, members)]
    return open_roster(
        seal_roster(sealed, [], leader, idle), rules_of(aggregate), known(*(members if familiar is None else familiar))
    )


def sealed_anyhow(values: object, context: bytes, who: Identity) -> bytes:
    """As ``records.seal``, for a statement that no honest peer would make."""
    body = msgpack.packb(values)
    packed: bytes = msgpack.packb([body, who.sign(context + body)])
    return packed


def values_of(statement: Signed, **changes: object) -> list[object]:
    return list((statement.model_dump() | changes).values())


plain_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=True)
    | st.text(max_size=8)
    | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=5),
    max_leaves=10,
)
"""Whatever msgpack can say without extension types."""


@st.composite
def damaged(draw: st.DrawFn, sound: bytes) -> bytes:
    """``sound`` cut short, with bytes behind it, or with one byte changed."""
    kind = draw(st.sampled_from(["cut", "longer", "changed"]))
    if kind == "cut":
        return sound[: draw(st.integers(0, len(sound) - 1))]
    if kind == "longer":
        return sound + draw(st.binary(min_size=1, max_size=4))
    at = draw(st.integers(0, len(sound) - 1))
    return sound[:at] + bytes([sound[at] ^ draw(st.integers(1, 255))]) + sound[at + 1 :]


@dataclass(eq=False)
class PipeWriter:
    """Its bytes are at the other end at once."""

    reader: asyncio.StreamReader
    written: bytearray = field(default_factory=bytearray)

    def write(self, data: bytes | memoryview, /) -> None:
        self.written += data
        self.reader.feed_data(bytes(data))

    async def drain(self) -> None:
        await asyncio.sleep(0)

    def close(self) -> None:
        self.reader.feed_eof()


@dataclass(eq=False)
class DeafWriter:
    """Takes what is written, and is never done with it."""

    drains: int = 0
    closed: bool = False

    def write(self, data: bytes | memoryview, /) -> None:
        pass

    async def drain(self) -> None:
        self.drains += 1
        await asyncio.get_running_loop().create_future()

    def close(self) -> None:
        self.closed = True


def pipe(timeouts: Timeouts | None = None) -> tuple[Channel, Channel]:
    """Both ends of a stream."""
    timeouts = timeouts or Timeouts()
    a, b = asyncio.StreamReader(), asyncio.StreamReader()
    mine = Channel(peer_id=identity(2).peer_id, reader=a, writer=PipeWriter(b), timeouts=timeouts)
    theirs = Channel(peer_id=identity(1).peer_id, reader=b, writer=PipeWriter(a), timeouts=timeouts)
    return mine, theirs


HASH = bytes(range(32))
SIGNATURE = bytes(range(64))
MESSAGE_EXAMPLES: list[Message] = [
    Ready(readiness=b"a" * 300, record=b"b" * 2048),
    Roster(members=[b"a" * 1000] * 100, absent=[b"b" * 1600] * 64, signature=SIGNATURE, idle=list(range(64))),
    TooFew(ready=1),
    NoWitness(),
    Redirect(record=b"b"),
    Behind(record=b"b"),
    No(reason="not in my ledger"),
    Closing(head=HASH, gather_s=5.0, record=b"r" * 2048),
    Eta(eta_s=0.25),
    Contribute(round_id=HASH, number=255),
    Receipt(round_id=HASH, number=255, part_hashes=[HASH, b"", HASH], state=HASH),
    Again(number=1, members=list(range(256)), parts=[0, 2**16 - 1]),
    Commit(part_hashes=[HASH] * 3, holders=[0, 255, 3], state=HASH),
    Took(signature=SIGNATURE),
    AskCommit(round_id=HASH),
    TookBefore(part_hashes=[HASH] * 3, state=b"", signature=SIGNATURE),
    Certifies(full=b"\xff" * 32, members=list(range(128)), signatures=[SIGNATURE] * 128, witness=SIGNATURE),
    AskWitness(link=HASH, certificate=b"c" * 512 * 1024),
    Witnessed(signature=SIGNATURE),
    AskPart(round_id=HASH, part=7, hash=HASH),
    AskContributions(round_id=HASH, number=255, part=7),
    Accuses(peer_id="1" * 64),
    AskEvidence(),
    AskHeads(since=0),
    Heads(first=5, head=HASH, links=[HASH] * 1024),
    AskChain(since=2**59),
    AskUpdate(step=2**59, head=HASH),
    AskIndex(step=10, digest=HASH),
    AskChunk(step=10, digest=HASH, chunk=2**40),
    AskHave(step=10, digest=HASH),
    Have(chunks=b"\xff\x03"),
    Size(size_bytes=0),
    AskManifest(),
    Push(record=b"b"),
    AskRevocations(),
    RevocationList(sealed=b"s" * 65536),
    AskAnchors(since=2**60 - 1),
    AnchorList(anchors=[b"a" * 512] * 256),
    AskRoster(head=HASH, leader="12D3KooWa", round_id=HASH, signature=SIGNATURE),
    AskOther(round_id=HASH, link=HASH, full=b"\x1f", members=[0, 127], signatures=[SIGNATURE] * 2),
    Other(link=HASH, full=b"", state=HASH, members=[0], signatures=[SIGNATURE], witness=SIGNATURE),
    AskBarred(),
    BarredPeers(peer_ids=["12D3KooWa"] * 64),
    AskProof(peer_id="12D3KooWa"),
    AskDialBack(consent=b"c" * 400),
    DialBack(),
    DialedBack(reached=False, ip="2001:db8::7", reason="no answer"),
    AskTransfer(up_bytes=2**21, down_bytes=0),
    Transferred(wall_s=1.7e9),
]
"""One of every kind, many of them as large as they may be."""
