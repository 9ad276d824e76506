"""Lies beside rounds: by what a peer extends its history, what it promises and claims, and what it asks of others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from p2p_diloco.core import known
from p2p_diloco.core.certificate import Certificate, Taken
from p2p_diloco.core.errors import RemoteError
from p2p_diloco.core.group import seal_roster
from p2p_diloco.core.outer import OuterState
from p2p_diloco.core.roster import Readiness, rank, seal_readiness
from p2p_diloco.core.update import Part, Update, UpdateHeader, contributor_mask, in_most_parts
from p2p_diloco.peer.control import OuterResult
from p2p_diloco.peer.uploads import UPLOADS
from p2p_diloco.round.outcome import Settled
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.message import Message
from p2p_diloco.wire.messages import No, Size
from p2p_diloco.wire.round_messages import AskWitness, Closing, Eta, Ready, Witnessed
from p2p_diloco.wire.state_messages import AskChunk
from tests.support.builders import identity
from tests.support.chronicle import MAX_PEERS
from tests.support.lying import Liar, override

FASTEST_TOKENS_PER_S = 1e9
LONGEST_ETA_S = 86_400.0
STREAMS = 10
"""Opened at a time to each of the others."""
STREAMS_EVERY_S = 2.0
CHUNK_EVERY_S = 8.0
"""Slower, and a donor takes the stream for one that asks nothing more."""

# -- histories ---------------------------------------------------------------------------------------------------------


def invented(liar: Liar) -> Settled:
    """The next outer step of nobody's round, by the liar and its accomplices, or by it and a name that it has made
    up, where it has none: the same for all of them. The certificate is as good as they can make it: roster and
    signatures are theirs."""
    replica = liar.steps.replica
    state, grid = replica.loaded, replica.ledger.grid
    random = np.random.default_rng(list(state.head))
    names = {who.peer_id: who for who in map(identity, range(MAX_PEERS))}
    authors = [names[peer_id] for peer_id in liar.accomplices]
    authors += [identity(MAX_PEERS - 1)] if len(authors) == 1 else []
    authors.sort(key=lambda who: rank(state.head, who.peer_id))
    values = [random.standard_normal(grid.n_values(part)).astype(np.float32) for part in range(grid.n_parts)]
    parts = tuple(Part(mask=contributor_mask(range(len(authors))), data=grid.encode(one)) for one in values)
    members = [
        seal_readiness(
            Readiness(
                peer_id=who.peer_id,
                run_id=replica.manifest.run_id,
                leader=authors[0].peer_id,
                step=state.step,
                head=state.head,
                weight=100,
                client_mode=False,
                nonce=bytes(8),
            ),
            who,
        )
        for who in authors
    ]
    roster = seal_roster(members, (), authors[0])
    contributors, hashes = tuple((who.peer_id, 100) for who in authors), tuple(part.hash for part in parts)
    header = UpdateHeader(step=state.step, parent=state.head, contributors=contributors, part_hashes=hashes)
    full = in_most_parts([part.mask for part in parts])
    taken = Taken(round_id=roster.round_id, link=header.link, full=full, state=b"")
    signatures = tuple((member, taken.sign(who)) for member, who in enumerate(authors))
    certificate = Certificate(roster=roster, full=full, state=b"", signatures=signatures)
    return Settled(update=Update(header=header, parts=parts), certificate=certificate)


async def witnessed(liar: Liar, made: Settled) -> Settled:
    """The same with the witness of the run's owner, if it is so kind."""
    here = liar.peer.here
    try:
        channel = await here.open(liar.peer.manifest.owner)
        try:
            ask = AskWitness(link=made.update.header.link, certificate=made.certificate.to_bytes())
            answer: Eta | Witnessed = await channel.request(ask, Eta, Witnessed)
            while isinstance(answer, Eta):
                answer = await channel.receive(Eta, Witnessed, timeout_s=here.timeouts.request_s)
        finally:
            channel.close()
    except RemoteError:
        return made
    return replace(made, certificate=replace(made.certificate, witness=answer.signature))


def extends(liar: Liar) -> None:
    """It extends the head by updates that it invents, alone or with its accomplices."""

    def outer_step(real: Callable[..., Any]) -> Callable[..., Any]:
        async def made(tokens: int, **rest: Any) -> OuterResult:
            steps = liar.steps
            if not liar.lying() or steps.follower.must_move():
                result: OuterResult = await real(tokens, **rest)
                return result
            async with steps.follower.moving:
                await steps.attempts._commit(await witnessed(liar, invented(liar)))
            await steps.presence.pushes.to_all()
            steps.here.seat.closes_s = None
            made_alone = steps._without_round("", adopted=False)
            return replace(made_alone, committed=True, group=len(liar.accomplices))

        return made

    override(liar.steps, "outer_step", outer_step)


def forks(liar: Liar) -> None:
    """With its accomplices, most of those that are known before the first anchor that is late enough, it goes back to
    there, and on by updates that they invent and certify: their keys were good there. It has kept all snapshots."""
    replica = liar.peer.replica
    replica.ledger._keep_snapshots = 1000
    forked = False

    def outer_step(real: Callable[..., Any]) -> Callable[..., Any]:
        async def made(tokens: int, **rest: Any) -> OuterResult:
            nonlocal forked
            steps, anchors = liar.steps, liar.peer.seat.anchors.chain
            late = next((anchor for anchor in anchors if anchor.step > known.WINDOW_STEPS), None)
            if not liar.lying() or late is None:
                result: OuterResult = await real(tokens, **rest)
                return result
            async with steps.follower.moving:
                await steps.upkeep.settled()
                if not forked:
                    await asyncio.to_thread(replica.roll_back, late.step - 1)
                    forked = True
                await steps.attempts._commit(invented(liar))
            await steps.presence.pushes.to_all()
            steps.here.seat.closes_s = None
            made_alone = steps._without_round("", adopted=False)
            return replace(made_alone, committed=True, group=len(liar.accomplices))

        return made

    override(liar.steps, "outer_step", outer_step)


def invents_snapshots(liar: Liar) -> None:
    """Its snapshots hold other values than its history leads to: the same ones as its accomplices'."""
    replica = liar.peer.replica

    def make(real: Callable[[], None]) -> Callable[[], None]:
        def made() -> None:
            real()
            newest, state = replica.newest_snapshot(), replica.loaded
            if liar.lying() and newest.step == state.step > 0:
                theta = np.full_like(state.theta, 3)
                invented = OuterState(step=state.step, head=state.head, theta=theta, momentum=state.momentum.copy())
                replica.ledger.write_snapshot(invented)

        return made

    async def nothing() -> None:
        pass

    override(replica, "make_snapshots", make)
    override(liar.peer.upkeep, "_compare", lambda real: nothing)


# -- promises and claims -----------------------------------------------------------------------------------------------


def stays_on_the_head(liar: Liar) -> None:
    """It follows the swarm, and offers nothing."""

    def outer_step(real: Callable[..., Any]) -> Callable[..., Any]:
        async def made(tokens: int, **rest: Any) -> OuterResult:
            steps = liar.steps
            if not liar.lying():
                honest: OuterResult = await real(tokens, **rest)
                return honest
            alone = steps._without_round("alone", adopted=False)
            result = await steps._adopt() if steps.follower.must_move() else alone
            steps.follower.behind = False
            steps.here.seat.closes_s = None
            steps.presence.enter("inner")
            steps.presence.publish_now.ring()
            return replace(result, planned=1)

        return made

    override(liar.steps, "outer_step", outer_step)


def answers(word: Callable[[], Eta]) -> Callable[[Liar], None]:
    """It answers whoever asks it to a round, or to lead one, by promises alone."""

    def corrupt(liar: Liar) -> None:
        def answer(real: Callable[..., Any]) -> Callable[..., Any]:
            async def promised(channel: Channel, message: Closing | Ready) -> None:
                if not liar.lying():
                    await real(channel, message)
                    return
                while True:
                    await channel.send(word())
                    await asyncio.sleep(1.0)

            return promised

        stays_on_the_head(liar)
        override(liar.peer.matchmaker, "on_closing", answer)
        override(liar.peer.matchmaker, "on_ready", answer)

    return corrupt


promises = answers(lambda: Eta(eta_s=LONGEST_ETA_S))
busy = answers(lambda: Eta(eta_s=1.0, busy=True))


def claims_speed(liar: Liar) -> None:
    """It says in every round that it is faster than anybody can be."""

    def readiness(real: Callable[..., Any]) -> Callable[..., Any]:
        def claimed(weight: int, dropped: bool, tokens_per_s: float, leader: str) -> Any:
            return real(weight, dropped, FASTEST_TOKENS_PER_S if liar.lying() else tokens_per_s, leader)

        return claimed

    override(liar.peer.matchmaker, "_readiness", readiness)


def hurries(liar: Liar) -> None:
    """It makes one inner step, and is ready while the others have just begun."""

    def outer_step(real: Callable[..., Any]) -> Callable[..., Any]:
        async def made(tokens: int, **rest: Any) -> OuterResult:
            result: OuterResult = await real(tokens, **rest)
            return replace(result, planned=1) if liar.lying() else result

        return made

    override(liar.steps, "outer_step", outer_step)


# -- streams -----------------------------------------------------------------------------------------------------------


def beside(work: Callable[[Liar], Any]) -> Callable[[Liar], None]:
    """A lie that is told all the time, by a task of its own."""

    def corrupt(liar: Liar) -> None:
        def run(real: Callable[[], Any]) -> Callable[[], Any]:
            async def ran() -> None:
                await asyncio.gather(real(), work(liar))

            return ran

        override(liar.peer, "run", run)

    return corrupt


async def hold_streams(liar: Liar, talk: Callable[[Channel, str], Any], count: int) -> None:
    """Opens streams to all others, again and again, and lets ``talk`` hold them."""
    held = Streams()
    while True:
        here = liar.peer.here
        for record in here.live() if liar.lying() else ():
            for _ in range(count - held.open_to(record.peer_id)):
                try:
                    channel = await here.open(record.peer_id)
                except RemoteError:
                    break
                held.hold(channel, talk)
        await asyncio.sleep(STREAMS_EVERY_S)


@dataclass(eq=False)
class Streams:
    """Those that a liar holds open."""

    tasks: dict[asyncio.Task[None], str] = field(default_factory=dict)

    def open_to(self, peer_id: str) -> int:
        self.tasks = {task: other for task, other in self.tasks.items() if not task.done()}
        return list(self.tasks.values()).count(peer_id)

    def hold(self, channel: Channel, talk: Callable[[Channel, str], Any]) -> None:
        self.tasks[asyncio.ensure_future(self._talk(channel, talk))] = channel.peer_id

    async def _talk(self, channel: Channel, talk: Callable[[Channel, str], Any]) -> None:
        try:
            await talk(channel, channel.peer_id)
        except RemoteError:
            pass
        finally:
            channel.close()


@beside
async def opens_streams(liar: Liar) -> None:
    """Streams that never say anything."""

    async def silent(channel: Channel, _: str) -> None:
        await asyncio.sleep(60.0)

    await hold_streams(liar, silent, STREAMS)


@beside
async def reads_slowly(liar: Liar) -> None:
    """Downloads that take every place a donor has, and ask for one chunk whenever they have to. It serves nobody."""

    async def refuse(channel: Channel, _: Message) -> None:
        await channel.send(No(reason="busy serving others"))

    override(liar.peer.uploads, "serve", lambda real: refuse)

    async def read(channel: Channel, peer_id: str) -> None:
        while (record := liar.peer.directory.get(peer_id)) is not None:
            ask = AskChunk(step=record.snapshot_step, digest=record.snapshot_digest, chunk=0)
            size = await channel.request(ask, Size)
            await channel.receive_frame(size.size_bytes, CHUNK_EVERY_S)
            await asyncio.sleep(CHUNK_EVERY_S)

    await hold_streams(liar, read, 2 * UPLOADS)
