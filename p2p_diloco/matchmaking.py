"""The roster of a round: who asks whom to lead, who waits for whom, and until when.

A peer that is ready asks the best-ranked live peer on its head to lead. That peer tells the others that the round is
closing, waits until all of them are ready or out of time, and sends everybody the same roster: the signed readiness of
every member. Nobody is believed about anybody else.

The leader need not be ready itself: its network process leads while its trainer finishes, and if the trainer does not
make it in time, the roster goes out without it.

Known weak point: a leader that stops without closing its streams (SIGSTOP) costs the members ``gather_s`` and one
request time-out before the next in rank is asked.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from p2p_diloco.config import Timeouts
from p2p_diloco.errors import Misbehaved, Refused, RemoteError
from p2p_diloco.identity import Identity
from p2p_diloco.manifest import RunManifest
from p2p_diloco.records import Directory, Phase
from p2p_diloco.rounds import (
    Group,
    Missed,
    Progress,
    Readiness,
    Standing,
    check_roster,
    form_roster,
    leader_order,
    new_nonce,
    on_head,
    open_readiness,
    seal_readiness,
)
from p2p_diloco.waiting import Bell, heard
from p2p_diloco.wire import Behind, Channel, Closing, Eta, No, Ready, Redirect, Roster, TooFew, Transport, run_protocol

log = logging.getLogger(__name__)

MAX_LEADERS_ASKED = 16
CLOSING_MARGIN_S = 1.0
"""A leader waits this much longer than the last member said that it needs."""
MAX_GATHER_EXTENSION_S = 30.0
"""Beyond ``gather_s``, for a peer in the middle of a long inner step."""

Answer: TypeAlias = Roster | TooFew | Behind


@dataclass(kw_only=True)
class Seat:
    """This peer, as its own network side sees it. Its owner keeps it up to date; matchmaking reads it."""

    standing: Standing
    role_trainer: bool
    client_mode: bool
    phase: Phase = "joining"
    progress: Progress = field(default_factory=Progress)
    sealed_record: bytes = b""
    """My newest record."""
    closes_s: float | None = None
    """Loop time at which the round that I have been told of closes."""
    in_round: bool = False
    changed: Bell = field(default_factory=Bell)


@dataclass(kw_only=True)
class Gathering:
    """One round being formed, at its leader."""

    head: bytes
    opened_s: float
    ready: dict[str, bytes] = field(default_factory=dict)
    """Peer id -> sealed readiness."""
    expected_s: dict[str, float] = field(default_factory=dict)
    """Peer id -> loop time until which we wait for it."""
    closes_s: float = 0.0
    answer: Answer | None = None
    changed: Bell = field(default_factory=Bell)
    task: asyncio.Task[None] | None = None


class Matchmaker:
    def __init__(
        self,
        *,
        transport: Transport,
        identity: Identity,
        manifest: RunManifest,
        directory: Directory,
        seat: Seat,
        timeouts: Timeouts,
        wall_s: Callable[[], float],
    ) -> None:
        self.transport = transport
        self.identity = identity
        self.manifest = manifest
        self.directory = directory
        self.seat = seat
        self.timeouts = timeouts
        self.wall_s = wall_s
        self.gatherings: dict[bytes, Gathering] = {}

    async def find_group(self, weight: int) -> Group | Missed:
        """The group of the next round on my head, or why there is none."""
        seat, limits = self.seat, self.manifest.spec.round
        mine = Readiness(
            run_id=self.manifest.run_id,
            step=seat.standing.step,
            head=seat.standing.head,
            peer_id=self.identity.peer_id,
            weight=min(weight, self.manifest.spec.max_weight_tokens),
            client_mode=seat.client_mode,
            nonce=new_nonce(),
        )
        sealed = seal_readiness(mine, self.identity)
        useless: set[str] = set()
        for _ in range(MAX_LEADERS_ASKED):
            records = self.directory.expected(self.wall_s())
            order = [p for p in leader_order(records, mine.head, mine.peer_id, seat.client_mode) if p not in useless]
            if not order:
                break
            leader = order[0]
            try:
                if leader == mine.peer_id:
                    answer: Answer | Redirect = await self._lead(sealed)
                else:
                    answer = await self._ask(leader, sealed)
                if isinstance(answer, TooFew):
                    return Missed(reason="alone", detail=f"{answer.ready} ready, {limits.min_group} needed")
                if isinstance(answer, Behind):
                    self._learn(leader, answer.record)
                    return Missed(reason="behind", detail=f"peer {leader[-8:]} is past this head")
                if isinstance(answer, Redirect):
                    self._learn(leader, answer.record)
                    useless.add(leader)
                    continue
                if len(answer.members) == limits.max_group and sealed not in answer.members:
                    raise Refused(leader, "its group is full")
                return self._check(leader, answer, mine)
            except Refused as error:
                log.debug("%s does not lead: %s", leader[-8:], error.reason)
                useless.add(leader)
            except RemoteError as error:
                log.info("cannot meet at %s: %s", leader[-8:], error.reason)
                self.directory.suspect(leader)
                useless.add(leader)
        return Missed(reason="alone", detail="nobody to meet")

    def _check(self, leader: str, roster: Roster, mine: Readiness) -> Group:
        limits = self.manifest.spec.round
        try:
            return check_roster(
                roster.members,
                mine,
                min_group=limits.min_group,
                max_group=limits.max_group,
                max_weight=self.manifest.spec.max_weight_tokens,
            )
        except ValueError as error:
            raise Misbehaved(leader, f"sends {error}") from error

    def _learn(self, source: str, sealed: bytes) -> None:
        try:
            self.directory.learn(sealed, self.wall_s())
        except ValueError as error:
            raise Misbehaved(source, f"sends {error}") from error

    async def _ask(self, leader: str, sealed: bytes) -> Answer | Redirect:
        channel = await self._open(leader)
        try:
            await channel.send(Ready(readiness=sealed, record=self.seat.sealed_record))
            wait_s = self.timeouts.request_s
            longest_s = self.manifest.spec.round.gather_s + MAX_GATHER_EXTENSION_S + self._round_limit_s()
            deadline_s = self._now() + longest_s
            while True:
                answer: Eta | Answer | Redirect = await channel.receive(
                    Eta, Roster, TooFew, Redirect, Behind, timeout_s=wait_s
                )
                if not isinstance(answer, Eta):
                    return answer
                wait_s = min(answer.eta_s, deadline_s - self._now()) + self.timeouts.request_s
        finally:
            channel.close()

    async def _lead(self, sealed: bytes) -> Answer:
        gathering = self._gathering(self.seat.standing.head)
        gathering.ready[self.identity.peer_id] = sealed
        gathering.changed.ring()
        while gathering.answer is None:
            await gathering.changed.event.wait()
        return gathering.answer

    def _gathering(self, head: bytes) -> Gathering:
        gathering = self.gatherings.get(head)
        if gathering is None:
            gathering = self.gatherings[head] = Gathering(head=head, opened_s=self._now())
            gathering.task = asyncio.create_task(self._gather(gathering))
        return gathering

    async def _gather(self, gathering: Gathering) -> None:
        """Wait for everybody that is expected, then give all that are ready the same answer."""
        limits, me = self.manifest.spec.round, self.identity.peer_id
        records = self.directory.expected(self.wall_s())
        closes_s = gathering.opened_s + limits.gather_s + CLOSING_MARGIN_S
        gathering.expected_s = {record.peer_id: closes_s for record in on_head(records, gathering.head)}
        if self.seat.role_trainer and self.seat.phase in ("inner", "evaluate"):
            gathering.expected_s[me] = self._now() + self._close_own() + CLOSING_MARGIN_S
        notices = [
            asyncio.create_task(self._notice(gathering, peer_id))
            for peer_id in gathering.expected_s
            if peer_id != me and peer_id not in gathering.ready
        ]
        latest_s = gathering.opened_s + limits.gather_s + MAX_GATHER_EXTENSION_S
        while gathering.answer is None:
            changed = gathering.changed.event
            missing_s = [until_s for p, until_s in gathering.expected_s.items() if p not in gathering.ready]
            gathering.closes_s = min(max(missing_s, default=0.0), latest_s)
            left_s = gathering.closes_s - self._now()
            if left_s <= 0:
                break
            await heard(changed, left_s)
        for notice in notices:
            notice.cancel()
        del self.gatherings[gathering.head]
        if gathering.answer is None:
            if len(gathering.ready) >= limits.min_group:
                gathering.answer = Roster(
                    members=form_roster(gathering.ready.values(), gathering.head, limits.max_group)
                )
            else:
                gathering.answer = TooFew(ready=len(gathering.ready))
        gathering.changed.ring()

    async def _notice(self, gathering: Gathering, peer_id: str) -> None:
        """Tell a peer that the round is closing. Its answer says how long to wait for it; no answer, no waiting."""
        gather_s = self.manifest.spec.round.gather_s
        try:
            channel = await self._open(peer_id)
            try:
                closing = Closing(head=gathering.head, gather_s=gather_s)
                answer: Eta | Behind = await channel.request(closing, Eta, Behind)
                self._on_notice(gathering, peer_id, answer)
                if isinstance(answer, Eta) and answer.in_round:
                    answer = await channel.receive(Eta, Behind, timeout_s=self._round_limit_s())
                    self._on_notice(gathering, peer_id, answer)
            finally:
                channel.close()
        except Refused:
            gathering.expected_s.pop(peer_id, None)
        except RemoteError as error:
            log.info("not waiting for %s: %s", peer_id[-8:], error.reason)
            self.directory.suspect(peer_id)
            gathering.expected_s.pop(peer_id, None)
        gathering.changed.ring()

    def _on_notice(self, gathering: Gathering, peer_id: str, answer: Eta | Behind) -> None:
        if isinstance(answer, Behind):
            self._learn(peer_id, answer.record)
            gathering.answer = answer
        else:
            gathering.expected_s[peer_id] = self._now() + answer.eta_s + CLOSING_MARGIN_S
        gathering.changed.ring()

    async def on_ready(self, channel: Channel, message: Ready) -> None:
        """A peer asks me to lead."""
        readiness = self._verified(channel.peer_id, message)
        await self._round_over(channel, readiness.head)
        standing = self.seat.standing
        if readiness.head != standing.head:
            await channel.send(self._elsewhere(readiness.head))
            return
        if readiness.step != standing.step:
            raise Misbehaved(channel.peer_id, f"says that this head is outer step {readiness.step}")
        if readiness.head not in self.gatherings:
            better = await self._better_leader(readiness.head)
            if better is not None:
                await channel.send(Redirect(record=better))
                return
            if self.seat.client_mode or self.seat.standing.head != readiness.head:
                await channel.send(No(reason="cannot lead"))
                return
        gathering = self._gathering(readiness.head)
        gathering.ready[channel.peer_id] = message.readiness
        gathering.changed.ring()
        closed = asyncio.create_task(channel.reader.read(1))  # A member says nothing more: this ends when it leaves.
        try:
            told_s = -1.0
            while gathering.answer is None:
                changed = gathering.changed.event
                if gathering.closes_s != told_s:
                    told_s = gathering.closes_s
                    await channel.send(Eta(eta_s=max(told_s - self._now(), 0.0)))
                change = asyncio.create_task(changed.wait())
                await asyncio.wait((closed, change), return_when=asyncio.FIRST_COMPLETED)
                change.cancel()
                if closed.done() and gathering.answer is None:
                    if gathering.ready.get(channel.peer_id) == message.readiness:
                        gathering.ready.pop(channel.peer_id)
                        gathering.expected_s.pop(channel.peer_id, None)
                        gathering.changed.ring()
                    return
            await channel.send(gathering.answer)
        finally:
            closed.cancel()

    def _verified(self, source: str, message: Ready) -> Readiness:
        try:
            readiness = open_readiness(message.readiness)
            self.directory.learn(message.record, self.wall_s())
        except ValueError as error:
            raise Misbehaved(source, f"sends {error}") from error
        if readiness.peer_id != source or readiness.run_id != self.manifest.run_id:
            raise Misbehaved(source, "sends somebody else's readiness")
        if readiness.weight > self.manifest.spec.max_weight_tokens:
            raise Misbehaved(source, f"claims a weight of {readiness.weight} tokens")
        return readiness

    async def _better_leader(self, head: bytes) -> bytes | None:
        """The sealed record of a live peer that ranks before me on ``head``."""
        for _ in range(MAX_LEADERS_ASKED):
            records = self.directory.expected(self.wall_s())
            leader = leader_order(records, head, self.identity.peer_id, self.seat.client_mode)[:1]
            if leader in ([], [self.identity.peer_id]):
                return None
            try:
                channel = await self._open(leader[0])
                channel.close()
                return self.directory.sealed(leader[0])
            except RemoteError:
                self.directory.suspect(leader[0])
        return None

    async def on_closing(self, channel: Channel, message: Closing) -> None:
        """The leader of a round that somebody else is ready for asks how long I need."""
        await self._round_over(channel, message.head)
        if message.head != self.seat.standing.head:
            await channel.send(self._elsewhere(message.head))
        elif not self.seat.role_trainer or self.seat.phase == "joining":
            await channel.send(No(reason="not training"))
        else:
            await channel.send(Eta(eta_s=self._close_own()))

    def _close_own(self) -> float:
        """My trainer shall come to the round that closes now. Seconds until it is ready."""
        gather_s, now_s = self.manifest.spec.round.gather_s, self._now()
        if self.seat.closes_s is None:
            self.seat.closes_s = now_s + gather_s
            self.seat.changed.ring()
        return min(self.seat.progress.ready_in_s(now_s, gather_s), 86400.0)

    def _elsewhere(self, head: bytes) -> Behind | No:
        if head in self.seat.standing.heads:
            return Behind(record=self.seat.sealed_record)
        return No(reason="on another head")

    async def _round_over(self, channel: Channel, head: bytes) -> None:
        """Return when I am in no round on ``head``, at the latest when such a round must have ended. Who asks is told
        to wait: it would else take me for dead, and meet others on a head that is about to be history."""
        seat, deadline_s = self.seat, self._now() + self._round_limit_s()
        if seat.in_round and seat.standing.head == head:
            await channel.send(Eta(eta_s=min(self._round_limit_s(), 86400.0), in_round=True))
        while seat.in_round and seat.standing.head == head and self._now() < deadline_s:
            await heard(seat.changed.event, deadline_s - self._now())

    def _round_limit_s(self) -> float:
        return self.timeouts.round_limit_s(8 * self.manifest.n_params)

    async def _open(self, peer_id: str) -> Channel:
        return await self.transport.open(peer_id, self.directory.maddrs(peer_id), run_protocol(self.manifest.run_id))

    async def close(self) -> None:
        tasks = [gathering.task for gathering in self.gatherings.values() if gathering.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
