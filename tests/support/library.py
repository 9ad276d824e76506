"""A peer that catches up, and its donors: real ones with ledgers of their own, which may break one rule each."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from p2p_diloco.core import grid
from p2p_diloco.core.certificate import Certificate
from p2p_diloco.core.codecs import encode
from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.directory import Directory
from p2p_diloco.core.errors import Gone
from p2p_diloco.core.event import PhaseBegan, of_kind
from p2p_diloco.core.events import EventLog, read_events
from p2p_diloco.core.grid import part_slices
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.outer import genesis_state
from p2p_diloco.core.records import HEADS_SHOWN, seal_record
from p2p_diloco.core.roster import rank
from p2p_diloco.core.swarm_head import Standing
from p2p_diloco.core.update import Part, Update
from p2p_diloco.ledger.ledger import Ledger
from p2p_diloco.ledger.replica import Replica
from p2p_diloco.ledger.snapshot import IncomingSnapshot, SnapshotInfo, chunk_slices
from p2p_diloco.peer import uploads
from p2p_diloco.peer.catchup import Catchup, CaughtUp
from p2p_diloco.peer.uploads import Uploads
from p2p_diloco.round.here import Here
from p2p_diloco.round.seat import Seat
from p2p_diloco.wire import channel
from p2p_diloco.wire.channel import Channel, M, run_protocol
from p2p_diloco.wire.message import MAX_FRAME_BYTES, Message
from p2p_diloco.wire.state_messages import AskChain, AskChunk, AskHave, AskHeads, AskIndex, AskUpdate
from tests.support.builders import NOW_S, identity, record_of
from tests.support.certificates import made_by
from tests.support.fakes import FakeNetwork, FakeTransport, make_manifest

N = 300
PART = 50
CHUNK_BYTES = 4 * PART
CHUNKS = 12
"""Of a snapshot: six parts of theta, six of momentum."""
FRAME_BYTES = 256
"""An update takes three."""
EVERY = 5
"""Outer steps from snapshot to snapshot."""
REQUESTS = (AskHeads, AskChain, AskIndex, AskHave, AskChunk, AskUpdate)
TIMEOUTS = Timeouts(slow_rate_bytes_per_s=100.0)
"""An item is late after some seconds, small as it is."""


OPEN_LOGS: list[EventLog] = []


@contextmanager
def small_parts() -> Iterator[None]:
    """Every test takes place in here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "PART_VALUES", PART)
        patch.setattr(channel, "CHUNK_BYTES", FRAME_BYTES)
        patch.setattr(uploads, "CHUNK_BYTES", FRAME_BYTES)
        yield
    for log in OPEN_LOGS:
        log.close()
    OPEN_LOGS.clear()


def event_log(folder: Path) -> EventLog:
    OPEN_LOGS.append(EventLog(folder))
    return OPEN_LOGS[-1]


GENESIS = np.linspace(-1, 1, N, dtype=np.float32)
with small_parts():
    MANIFEST = make_manifest(N, GENESIS, identity(1000), codec="int8")
OWNER = identity(1000)
MEMBERS = (identity(20), identity(21))
"""Who makes every update."""
PROTOCOL = run_protocol(MANIFEST.run_id)
ME = identity(1)
DONORS = sorted((identity(i) for i in range(2, 8)), key=lambda who: rank(ME.peer_id.encode(), who.peer_id))
"""In the order in which ME asks them."""

Lie = Callable[["Donor", Channel, Message], Awaitable[bool]]
"""Whether it has answered; if not, the donor answers as it should."""

NOWHERE = Standing(step=0, head=bytes(32), heads=())


def new_replica(folder: Path) -> Replica:
    outer = MANIFEST.spec.outer
    ledger = Ledger(
        folder,
        grid=MANIFEST.grid,
        lr=outer.lr,
        momentum=outer.momentum,
        snapshot_every=EVERY,
        run_id=MANIFEST.run_id,
    )
    return Replica(MANIFEST, ledger, np.full(N, 7, np.float32), np.full(N, 7, np.float32))


def update_after(replica: Replica, seed: int = 0) -> tuple[Update, Certificate]:
    """A round of MEMBERS, and its certificate, which names the state where a snapshot is due."""
    state = replica.loaded
    values = np.random.default_rng([state.step, seed]).standard_normal(N).astype(np.float32)
    parts = tuple(Part(mask=b"\x03", data=encode(values[where], "int8")) for where in part_slices(N))
    return made_by(
        MEMBERS,
        parts,
        replica.rules,
        replica.known(),
        state.head,
        owner=OWNER,
        state=replica.digest_due(),
    )


def advance(replica: Replica, to_step: int, seed: int = 0) -> Replica:
    while replica.loaded.step < to_step:
        replica.commit(*update_after(replica, seed))
        replica.make_snapshots()
    return replica


def replica_at(folder: Path, step: int, *, fork_at: int = 10**6, seed: int = 1) -> Replica:
    """One that made ``step`` outer steps from the genesis, those from ``fork_at`` on as the swarm did not."""
    replica = new_replica(folder)
    replica.ledger.write_snapshot(genesis_state(GENESIS.copy()))
    replica.load()
    advance(replica, min(step, fork_at))
    return advance(replica, step, seed)


@dataclass(eq=False)
class Donor:
    who: Identity
    replica: Replica
    uploads: Uploads
    lie: Lie | None
    log: Path
    asked: list[Message] = field(default_factory=list)

    async def serve(self, channel: Channel) -> None:
        heard = Overheard(**{name: getattr(channel, name) for name in ("peer_id", "reader", "writer", "timeouts")})
        heard.donor = self
        with contextlib.suppress(Gone):
            await self.uploads.serve(heard, await heard.receive(*REQUESTS, timeout_s=10.0))

    def count(self, kind: type[Message]) -> int:
        return sum(isinstance(message, kind) for message in self.asked)

    def chunks(self) -> list[int]:
        return [message.chunk for message in self.asked if isinstance(message, AskChunk)]

    def steps(self) -> list[int]:
        return [message.step for message in self.asked if isinstance(message, AskUpdate)]

    def phases(self) -> list[tuple[str, int]]:
        return [(event.phase, event.step) for event in of_kind(read_events(self.log), PhaseBegan)]


class Overheard(Channel):
    """A donor's end of a stream: what is asked is noted, and maybe lied to."""

    donor: Donor

    async def receive(self, *kinds: type[M], timeout_s: float, max_bytes: int = MAX_FRAME_BYTES) -> M:
        while True:
            message = await super().receive(*kinds, timeout_s=timeout_s, max_bytes=max_bytes)
            self.donor.asked.append(message)
            if self.donor.lie is None or not await self.donor.lie(self.donor, self, message):
                return message


@dataclass(eq=False)
class Library:
    """One joiner and its donors."""

    folder: Path
    replica: Replica
    """The joiner's."""
    donors: list[Donor] = field(default_factory=list)
    timeouts: Timeouts = TIMEOUTS

    def __post_init__(self) -> None:
        self.network = FakeNetwork()
        self.directory = Directory(ME.peer_id, MANIFEST.run_id)
        self.transport = FakeTransport(self.network, ME.peer_id, self.timeouts)
        self.events = event_log(self.folder / "events")
        here = Here(
            transport=self.transport,
            identity=ME,
            directory=self.directory,
            seat=Seat(standing=NOWHERE, history=self.replica.history, role_trainer=True, client_mode=False),
            timeouts=self.timeouts,
            wall_s=lambda: NOW_S,
        )
        self.catchup = Catchup(here=here, replica=self.replica, events=self.events)

    def add(
        self, replica: Replica, lie: Lie | None = None, *, max_bytes_per_s: float | None = None, **record: Any
    ) -> Donor:
        """The next one to be asked."""
        who = DONORS[len(self.donors)]
        transport = FakeTransport(self.network, who.peer_id, self.timeouts)
        events = event_log(self.folder / f"events-{len(self.donors)}")
        mine = Uploads(
            ledger=replica.ledger, n=N, events=events, timeouts=self.timeouts, max_bytes_per_s=max_bytes_per_s
        )
        donor = Donor(who, replica, mine, lie, events.path)
        transport.handlers[PROTOCOL] = donor.serve
        self.donors.append(donor)
        self.publish(donor, **record)
        return donor

    def add_partner(self, info: SnapshotInfo, chunks: Collection[int], lie: Lie | None = None, **record: Any) -> Donor:
        """One that has these chunks of a snapshot, and downloads the others."""
        folder = self.folder / f"partner-{len(self.donors)}"
        replica = new_replica(folder)
        replica.ledger.incoming = IncomingSnapshot(
            folder, step=info.step, head=info.head, chunk_hashes=info.chunk_hashes, n=N, run_id=MANIFEST.run_id
        )
        replica.ledger.incoming.open()
        for chunk in chunks:
            replica.ledger.incoming.write(chunk, info.path.read_bytes()[chunk_slices(N)[chunk]])
        return self.add(replica, lie, **record)

    def publish(self, donor: Donor, issued_s: float = NOW_S, **record: Any) -> None:
        """The donor's record, as it stands now; without a state, while it downloads one."""
        ledger, joining = donor.replica.ledger, donor.replica.state is None
        standing = NOWHERE if joining else donor.replica.standing()
        snapshot = ledger.incoming if ledger.incoming is not None else ledger.snapshots()[-1]
        fields: dict[str, Any] = {
            "run_id": MANIFEST.run_id,
            "phase": "joining" if joining else "inner",
            "step": standing.step,
            "head": standing.head,
            "heads": list(standing.heads[:HEADS_SHOWN]),
            "committed": standing.beyond_genesis,
            "snapshot_step": snapshot.step,
            "snapshot_digest": snapshot.digest,
            "issued_s": issued_s,
            "life_s": 900.0,
        }
        self.directory.learn(seal_record(record_of(donor.who, **fields | record), donor.who), NOW_S)

    async def to(self, target: Replica) -> CaughtUp | None:
        return await self.catchup.to((target.loaded.step, target.loaded.head))

    async def fetch_ahead(self, target: tuple[int, bytes]) -> None:
        """As the follower does it."""
        entry = await self.catchup.check_ahead(target)
        if entry is not None:
            await self.catchup.fetch_ahead(entry)

    async def learn_way(self, donor: Donor) -> None:
        record = self.directory.get(donor.who.peer_id)
        assert record is not None
        await self.catchup.learn_way(record)

    async def open(self, donor: Donor, asker: int = 1) -> Channel:
        """A stream to a donor, of the joiner or of another peer."""
        who = identity(asker).peer_id
        transport = self.network.nodes.get(who) or FakeTransport(self.network, who, self.timeouts)
        return await transport.open(donor.who.peer_id, [], PROTOCOL)

    def suspects(self) -> list[int]:
        live = {record.peer_id for record in self.directory.live(NOW_S)}
        return [i for i, donor in enumerate(self.donors) if donor.who.peer_id not in live]

    def phases(self) -> list[tuple[str, int]]:
        return [(event.phase, event.step) for event in of_kind(read_events(self.events.path), PhaseBegan)]

    def incoming(self) -> list[Path]:
        return list(self.replica.ledger.folder.glob("incoming-*"))

    def check_same(self, swarm: Replica) -> None:
        """In memory, and after a restart from the disk."""
        for replica in (self.replica, new_replica(self.replica.ledger.folder)):
            replica.load()
            assert (replica.loaded.step, replica.loaded.head) == (swarm.loaded.step, swarm.loaded.head)
            assert replica.loaded.digest() == swarm.loaded.digest()
            assert replica.ledger.quarantined == []
        assert self.incoming() == []


# -- lies --------------------------------------------------------------------------------------------------------------


def on(kind: type[Message], lie: Callable[[Donor, Channel, Any], Awaitable[object]]) -> Lie:
    """And closes the stream."""

    async def answer(donor: Donor, channel: Channel, message: Message) -> bool:
        if isinstance(message, kind):
            await lie(donor, channel, message)
            raise Gone(channel.peer_id, "has been lied to")
        return False

    return answer


def after(count: int, kind: type[Message], then: Lie) -> Lie:
    """An honest donor, until it is asked once more."""

    async def answer(donor: Donor, channel: Channel, message: Message) -> bool:
        return donor.count(kind) > count and await then(donor, channel, message)

    return answer


def frames(*pieces: bytes) -> Callable[[Donor, Channel, Any], Awaitable[None]]:
    async def lie(donor: Donor, channel: Channel, message: Message) -> None:
        for piece in pieces:
            await channel.send_frame(piece)

    return lie


def says(*messages: Message) -> Callable[[Donor, Channel, Any], Awaitable[None]]:
    async def lie(donor: Donor, channel: Channel, message: Message) -> None:
        for answer in messages:
            await channel.send(answer)

    return lie


async def silent(donor: Donor, channel: Channel, message: Message) -> None:
    await asyncio.sleep(1000)


async def one_bit(donor: Donor, channel: Channel, message: AskChunk) -> None:
    await send_chunk(donor.replica, channel, message.chunk, change=1)


async def send_chunk(replica: Replica, channel: Channel, chunk: int, change: int = 0) -> None:
    where = chunk_slices(N)[chunk]
    data = bytearray(replica.newest_snapshot().path.read_bytes()[where])
    data[-1] ^= change
    await channel.send_blob(bytes(data))
