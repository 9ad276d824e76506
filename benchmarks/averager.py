"""All-reduce of four peers on loopback: our butterfly with every codec against hivemind's averager."""

from __future__ import annotations

import asyncio
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks import averager_hivemind
from benchmarks.loopback import HOST_MADDRS
from benchmarks.table import Cell, Table
from benchmarks.workers import Workers
from p2p_diloco.core.admission import Admission
from p2p_diloco.core.aggregate import AGGREGATIONS
from p2p_diloco.core.codecs import CODECS, CodecName
from p2p_diloco.core.config import PeerConfig, Timeouts
from p2p_diloco.core.digest import digest
from p2p_diloco.core.directory import Directory
from p2p_diloco.core.grid import Grid
from p2p_diloco.core.group import SealedRoster, open_roster, seal_roster
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.known import NOBODY_KNOWN, Known
from p2p_diloco.core.records import MAX_RECORD_LIFE_S, Record, seal_record
from p2p_diloco.core.roster import Readiness, form_roster, new_nonce, open_readiness, seal_readiness
from p2p_diloco.core.roster_rules import RosterRules
from p2p_diloco.round.meeting import Meeting
from p2p_diloco.round.outcome import Missed
from p2p_diloco.round.settle import Settlement
from p2p_diloco.wire.channel import Channel, run_protocol
from p2p_diloco.wire.daemon import private_socket_folder
from p2p_diloco.wire.node import Node
from p2p_diloco.wire.round_messages import AskCommit, AskPart, Contribute, Receipt

PEERS = 4
VALUES = (4_000_000, 25_000_000)
ROUNDS = 3
LIMIT_S = 150.0
RUN_ID = digest(b"benchmark")[:20].hex()
GATHERER = Identity.from_seed(b"g" * 32)
"""Signs the rosters, in place of a leader."""
WEIGHT_TOKENS = 1000


@dataclass(frozen=True, kw_only=True)
class Task:
    values: int
    codec: CodecName
    attempt: int

    @property
    def head(self) -> bytes:
        """Another one for every task, so that the members' order changes as in a run."""
        return digest(self.values.to_bytes(8, "big"), self.codec.encode(), self.attempt.to_bytes(8, "big"))


def main() -> Table:
    theirs = {values: hivemind_seconds(values) for values in VALUES}
    ours = butterfly_seconds()
    rows: list[tuple[Cell, ...]] = []
    for values in VALUES:
        seconds = {"hivemind fp32": theirs[values]} | {f"ours {codec}": ours[values, codec] for codec in CODECS}
        rows += [(name, values, seconds[name], seconds[name] / theirs[values]) for name in seconds]
    return Table(
        title=f"Seconds per all-reduce, {PEERS} peers",
        columns=("averager", "values", "seconds", "ratio to hivemind"),
        rows=rows,
        notes=(
            f"Median of {ROUNDS} rounds; of each round the slowest peer. Both without matchmaking, on open connections",
            "after the first round; ours with settling (all hold the same bytes) and decoding of the result.",
        ),
    )


def hivemind_seconds(values: int) -> float:
    timing = averager_hivemind.main(values, PEERS, ROUNDS)
    return median(max(peer[i] for peer in timing.all_reduce_seconds) for i in range(ROUNDS))


def butterfly_seconds() -> dict[tuple[int, CodecName], float]:
    """(values, codec) -> seconds. RuntimeError when a round fails or its members end with different bytes."""
    seconds: dict[tuple[int, CodecName], float] = {}
    with tempfile.TemporaryDirectory(prefix="p2p-diloco-bench-") as folder, Workers(LIMIT_S) as workers:
        for rank in range(PEERS):
            workers.start(run_member, Path(folder) / str(rank))
        workers.send_all(workers.receive_all())  # records
        for values in VALUES:
            for codec in CODECS:
                tasks = (Task(values=values, codec=codec, attempt=attempt) for attempt in range(ROUNDS))
                seconds[values, codec] = median(round_seconds(workers, task) for task in tasks)
    return seconds


def round_seconds(workers: Workers, task: Task) -> float:
    """Of the slowest member."""
    workers.send_all(task)
    members = form_roster(workers.receive_all(), task.head, PEERS, NOBODY_KNOWN, least_known=PEERS)
    workers.send_all(seal_roster(members, (), GATHERER))
    workers.receive_all()
    workers.send_all("go")
    outcomes = workers.receive_all()
    if len({head for _, head in outcomes}) != 1:
        raise RuntimeError("the members ended with different bytes")
    return float(max(seconds for seconds, _ in outcomes))


def run_member(pipe: Connection, folder: Path) -> None:
    import uvloop

    uvloop.run(take_part(pipe, folder))


async def take_part(pipe: Connection, folder: Path) -> None:
    config, timeouts = PeerConfig(folder=folder, host_maddrs=HOST_MADDRS), Timeouts()
    identity = Identity.load_or_create(config.identity_path)
    node = await Node.start(config, identity, timeouts, private_socket_folder(folder))
    try:
        member = Member(node, identity)
        await node.serve(member.protocol, member.serve)
        pipe.send(seal_record(member.record(await node.maddrs()), identity))
        for sealed in await asyncio.to_thread(pipe.recv):
            member.directory.learn(sealed, time.time())
        while True:
            await member.meet(pipe, await asyncio.to_thread(pipe.recv))
    finally:
        await node.close()


RULES = RosterRules(
    run_id=RUN_ID,
    owner=GATHERER.peer_id,
    min_group=PEERS,
    max_group=PEERS,
    max_weight_tokens=WEIGHT_TOKENS,
    aggregation=AGGREGATIONS["mean"],
    on_missed="adopt",
    seeds_reduce="auto",
    admission=Admission.to_all(RUN_ID),
)


class Member:
    """A peer that is all butterfly: it has no ledger and no trainer, and is told who meets."""

    protocol = run_protocol(RUN_ID)

    def __init__(self, node: Node, identity: Identity) -> None:
        self.node = node
        self.identity = identity
        self.directory = Directory(identity.peer_id, RUN_ID)
        self.settlement: Settlement | None = None

    async def meet(self, pipe: Connection, task: Task) -> None:
        readiness = Readiness(
            run_id=RUN_ID,
            leader=GATHERER.peer_id,
            step=task.attempt,
            head=task.head,
            peer_id=self.identity.peer_id,
            weight=WEIGHT_TOKENS,
            client_mode=False,
            nonce=new_nonce(),
        )
        pipe.send(seal_readiness(readiness, self.identity))
        roster: SealedRoster = await asyncio.to_thread(pipe.recv)
        ids = (open_readiness(sealed).peer_id for sealed in roster.members)
        group = open_roster(roster, RULES, Known(step=task.attempt, peers=frozenset((roster.leader, *ids))))
        me = group.index_of(self.identity.peer_id)
        local = np.random.default_rng(me).standard_normal(task.values, np.float32)
        settlement = self.settlement = Settlement(
            Meeting(
                group=group,
                identity=self.identity,
                owner=RULES.owner,
                transport=self.node,
                protocol=self.protocol,
                directory=self.directory,
                timeouts=self.node.timeouts,
                grid=Grid(n=task.values, codec=task.codec),
                theta=np.zeros(task.values, np.float32),
                local=local,
                min_group=PEERS,
            )
        )
        pipe.send("set")
        await asyncio.to_thread(pipe.recv)
        started_s = time.perf_counter()
        await settlement.reduce()
        outcome = await settlement.settle()
        if isinstance(outcome, Missed):
            raise RuntimeError(outcome.detail)
        update = outcome.update
        grid = settlement.meeting.grid
        for i, (part, where) in enumerate(zip(update.parts, grid.slices)):
            local[where] = grid.decode(i, part.data)
        pipe.send((time.perf_counter() - started_s, update.header.head))

    async def serve(self, channel: Channel) -> None:
        message: Contribute | Receipt | AskPart | AskCommit = await channel.receive(
            Contribute, Receipt, AskPart, AskCommit, timeout_s=self.node.timeouts.first_message_s
        )
        assert self.settlement is not None
        await self.settlement.serve(channel, message)

    def record(self, maddrs: list[str]) -> Record:
        return Record(
            peer_id=self.identity.peer_id,
            run_id=RUN_ID,
            run_name="benchmark",
            issued_s=time.time(),
            life_s=MAX_RECORD_LIFE_S,
            role="trainer",
            phase="reduce",
            step=0,
            head=bytes(32),
            committed=False,
            heads=[],
            snapshot_step=0,
            snapshot_digest=bytes(32),
            maddrs=maddrs[:3],
            client_mode=False,
        )
