"""The roster of a round: who asks whom to lead, who waits for whom, and until when.

A peer that is ready asks the best-ranked live peer on its head to lead. That peer tells the others that the round is
closing, waits until all of them are ready or out of time, and sends everybody the same roster: the signed readiness of
every member. Nobody is believed about anybody else.

The leader need not be ready itself: its network process leads while its trainer finishes, and if the trainer does not
make it in time, the roster goes out without it.

Two leaders may gather on one head, when one of them has just come there. They hear of each other from those whom they
call, and the better ranked one takes over what the other has gathered. Who is called while it waits elsewhere, or is in
a round, is waited for: two groups on one head would make two histories.

A leader that stops without closing its streams (SIGSTOP) costs the members one request time-out: it says from time to
time that it is still there.

What others say ends no gathering by itself. That the swarm is past a head has to follow from records, by the rule that
catches up; who names another leader must rank after it; and who has failed twice as a leader on a head, or lied, leads
nobody there for as long as a record lives. Not for ever: two sides of a network that was cut have failed each other.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from p2p_diloco.config import Timeouts
from p2p_diloco.errors import Misbehaved, Refused, RemoteError, Silent
from p2p_diloco.identity import Identity
from p2p_diloco.manifest import RunManifest
from p2p_diloco.messages import Behind, Closing, Eta, No, Ready, Redirect, Roster, TooFew
from p2p_diloco.records import Directory, Record, open_record
from p2p_diloco.rounds import (
    Group,
    Missed,
    Readiness,
    check_roster,
    form_roster,
    leader_order,
    must_catch_up,
    new_nonce,
    on_head,
    open_readiness,
    rank,
    seal_readiness,
    swarm_head,
    way_of,
)
from p2p_diloco.seat import Seat
from p2p_diloco.waiting import Bell, heard
from p2p_diloco.wire import Channel, Transport, run_protocol

log = logging.getLogger(__name__)

MAX_LEADERS_ASKED = 16
MAX_ABSENT = 64
MAX_CALLED = 1024
"""By one gathering."""
CHANCES = 2
"""Of a leader on one head. A second one, for it may just have been stopped, and others may be with it again."""
HEARTBEATS = 3
"""Words of a leader within the time after which a member takes it for dead."""
CLOSING_MARGIN_S = 1.0
"""A leader waits this much longer than the last member said that it needs."""
MAX_GATHER_EXTENSION_S = 30.0
"""Beyond ``gather_s``, for a peer in the middle of a long inner step."""

Answer: TypeAlias = Roster | TooFew | Behind | Redirect


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
    idle: set[str] = field(default_factory=set)
    """Who has said that it meets nobody else on this head."""
    notices: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    """Peer id -> the talk with a peer that has been told."""


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
        self.failures: dict[tuple[bytes, str], list[float]] = {}
        """(head, peer id) -> loop times until which it counts that this leader has failed me there; of my head only."""
        self.waiting_at: tuple[bytes, str] | None = None
        """(head, peer id of the leader) while I wait for a roster."""

    async def find_group(self, weight: int, *, dropped: bool = False, tokens_per_s: float = 0.0) -> Group | Missed:
        """The group of the next round on my head, or why there is none. ``dropped``: I contribute nothing."""
        seat, limits = self.seat, self.manifest.spec.round
        mine = Readiness(
            run_id=self.manifest.run_id,
            step=seat.standing.step,
            head=seat.standing.head,
            peer_id=self.identity.peer_id,
            weight=min(weight, self.manifest.spec.max_weight_tokens),
            client_mode=seat.client_mode,
            dropped=dropped,
            tokens_per_s=tokens_per_s,
            nonce=new_nonce(),
        )
        sealed = seal_readiness(mine, self.identity)
        self.failures = {which: until_s for which, until_s in self.failures.items() if which[0] == mine.head}
        useless: set[str] = set()
        claims: set[str] = set()
        """Those to whom I have left the lead, because they said that they gather."""
        for _ in range(MAX_LEADERS_ASKED):
            if self._beyond(seat.standing.head) is not None:
                return Missed(reason="behind", detail="the swarm went on meanwhile")
            records = self.directory.expected(self.wall_s())
            order = leader_order(records, mine.head, mine.peer_id, seat.client_mode)
            fit = [p for p in order if p not in useless and self._is_fit(mine.head, p)]
            if not fit:
                break
            leader = fit[0]
            try:
                if leader == mine.peer_id:
                    answer = await self._lead(sealed)
                else:
                    answer = await self._ask(leader, sealed)
                if isinstance(answer, TooFew):
                    return Missed(reason="alone", detail=f"{answer.ready} ready, {limits.min_group} needed")
                if isinstance(answer, Behind):
                    self._learn(leader, answer.record)
                    if self._beyond(mine.head) is None:
                        raise Refused(leader, "it says that the swarm is past this head, which no record shows")
                    return Missed(reason="behind", detail=f"peer {leader[-8:]} is past this head")
                if isinstance(answer, Redirect):
                    self._learn(leader, answer.record)
                    better = open_record(answer.record).peer_id
                    if leader == mine.peer_id:
                        useless.discard(better)
                        claims.add(better)
                        continue
                    if rank(mine.head, better) >= rank(mine.head, leader):
                        raise Misbehaved(leader, "names a leader that does not rank before it")
                    raise Refused(leader, "it names another leader")
                if len(answer.members) == limits.max_group and sealed not in answer.members:
                    raise Refused(leader, "its group is full")
                return self._check(leader, answer, mine)
            except Refused as error:
                log.debug("%s does not lead: %s", leader[-8:], error.reason)
                useless.add(leader)
                if leader in claims:
                    self.failed(mine.head, leader)
            except RemoteError as error:
                log.info("cannot meet at %s: %s", leader[-8:], error.reason)
                self.transport.traffic.reject(error)
                self.directory.suspect(leader)
                self.failed(mine.head, leader, lied=isinstance(error, Misbehaved))
                useless.add(leader)
        return Missed(reason="alone", detail="nobody to meet")

    def failed(self, head: bytes, leader: str, *, lied: bool = False) -> None:
        """As a leader on ``head``."""
        until_s = self._now() + self.timeouts.record_life_s
        self.failures.setdefault((head, leader), []).extend([until_s] * (CHANCES if lied else 1))

    def _is_fit(self, head: bytes, leader: str) -> bool:
        return sum(until_s > self._now() for until_s in self.failures.get((head, leader), ())) < CHANCES

    def _check(self, leader: str, roster: Roster, mine: Readiness) -> Group:
        limits = self.manifest.spec.round
        try:
            return check_roster(
                roster.members,
                mine,
                min_group=limits.min_group,
                max_group=limits.max_group,
                max_weight=self.manifest.spec.max_weight_tokens,
                on_missed=limits.on_missed,
                absent=roster.absent,
            )
        except ValueError as error:
            raise Misbehaved(leader, f"sends {error}") from error

    def _learn(self, source: str, sealed: bytes) -> Record | None:
        try:
            return self.directory.learn(sealed, self.wall_s())
        except ValueError as error:
            raise Misbehaved(source, f"sends {error}") from error

    def _learn_own(self, source: str, sealed: bytes) -> Record | None:
        try:
            return self.directory.learn_from(source, sealed, self.wall_s())
        except ValueError as error:
            raise Misbehaved(source, f"sends {error}") from error

    async def _ask(self, leader: str, sealed: bytes) -> Answer:
        channel = await self._open(leader)
        self.waiting_at = self.seat.standing.head, leader
        try:
            await channel.send(Ready(readiness=sealed, record=self.seat.sealed_record))
            longest_s = self.manifest.spec.round.gather_s + MAX_GATHER_EXTENSION_S + self._round_limit_s()
            deadline_s = self._now() + longest_s
            while self._now() < deadline_s:
                answer: Eta | Answer = await channel.receive(
                    Eta, Roster, TooFew, Redirect, Behind, timeout_s=self.timeouts.request_s
                )
                if not isinstance(answer, Eta):
                    return answer
            raise Silent(leader, f"gathers for more than {longest_s:.0f} s")
        finally:
            self.waiting_at = None
            self.seat.changed.ring()
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
        for peer_id in [p for p in gathering.expected_s if p not in gathering.ready]:
            self._call(gathering, peer_id)
        if self.seat.role_trainer and self.seat.phase in ("inner", "evaluate"):
            own_s = self._now() + self._close_own() + CLOSING_MARGIN_S
            gathering.expected_s[me] = min(own_s, self._latest_s(gathering, busy=False))
        while gathering.answer is None:
            if (beyond := self._beyond(gathering.head)) is not None:
                gathering.answer = Behind(record=beyond)
                break
            changed = gathering.changed.event
            gathering.closes_s = self._closes_s(gathering)
            left_s = gathering.closes_s - self._now()
            if left_s <= 0:
                break
            await heard(changed, left_s)
        for notice in gathering.notices.values():
            notice.cancel()
        del self.gatherings[gathering.head]
        if gathering.answer is None:
            if len(gathering.ready) >= limits.min_group:
                members = form_roster(gathering.ready.values(), gathering.head, limits.max_group)
                gathering.answer = Roster(members=members, absent=self._absent(gathering, members))
            else:
                gathering.answer = TooFew(ready=len(gathering.ready))
        gathering.changed.ring()

    def _closes_s(self, gathering: Gathering) -> float:
        """When the last one that is expected must have come. Who is busy is waited for as long as its round may take,
        but not by its word alone: fewer than the run's smallest group meet nobody. Whom I cannot ask may be there."""
        missing_s = [until_s for p, until_s in gathering.expected_s.items() if p not in gathering.ready]
        closes_s, latest_s = max(missing_s, default=0.0), self._latest_s(gathering, busy=False)
        if closes_s <= latest_s:
            return closes_s
        here = {record.peer_id for record in on_head(self.directory.current(self.wall_s()), gathering.head)}
        elsewhere = (here | gathering.expected_s.keys()) - gathering.idle - gathering.ready.keys()
        enough = len(elsewhere - {self.identity.peer_id}) >= self.manifest.spec.round.min_group
        return closes_s if enough else latest_s

    def _absent(self, gathering: Gathering, members: list[bytes]) -> list[bytes]:
        """Sealed records of those who train on this head and do not come, where they count."""
        if self.manifest.spec.round.on_missed != "keep":
            return []
        present = {open_readiness(one).peer_id for one in members}
        here = on_head(self.directory.live(self.wall_s()), gathering.head)
        sealed = [self.directory.sealed(record.peer_id) for record in here if record.peer_id not in present]
        if self.seat.role_trainer and self.identity.peer_id not in present:
            sealed.append(self.seat.sealed_record)
        return [one for one in sealed if one is not None][:MAX_ABSENT]

    def _beyond(self, head: bytes) -> bytes | None:
        """The sealed record of a peer elsewhere, where I have left ``head``, or the swarm has: no group is formed on it
        any more."""
        voters, standing, before = self.directory.believed(self.wall_s()), self.seat.standing, self.directory.before
        if head != standing.head:
            return self.seat.sealed_record
        target = swarm_head(voters, standing, before)
        if target is None or not must_catch_up(standing, target):
            return None
        there = (record.peer_id for record in voters if target[1] in way_of(record, before))
        return next(filter(None, map(self.directory.sealed, there)), None)

    def _latest_s(self, gathering: Gathering, *, busy: bool) -> float:
        """Nobody is waited for longer than that."""
        latest_s = gathering.opened_s + self.manifest.spec.round.gather_s + MAX_GATHER_EXTENSION_S
        return latest_s + self._round_limit_s() if busy else latest_s

    def _call(self, gathering: Gathering, peer_id: str) -> None:
        if peer_id not in gathering.notices:
            gathering.notices[peer_id] = asyncio.create_task(self._notice(gathering, peer_id))

    async def _notice(self, gathering: Gathering, peer_id: str) -> None:
        """Tell a peer that the round is closing. Its answer says how long to wait for it; no answer, no waiting."""
        gather_s = self.manifest.spec.round.gather_s
        try:
            channel = await self._open(peer_id)
            try:
                closing = Closing(head=gathering.head, gather_s=gather_s, record=self.seat.sealed_record)
                answer: Eta | Behind | Redirect = await channel.request(closing, Eta, Behind, Redirect)
                self._on_notice(gathering, peer_id, answer)
                while isinstance(answer, Eta) and answer.busy:
                    answer = await channel.receive(Eta, Behind, Redirect, timeout_s=self.timeouts.request_s)
                    self._on_notice(gathering, peer_id, answer)
            finally:
                channel.close()
        except Refused:
            gathering.idle.add(peer_id)
            gathering.expected_s.pop(peer_id, None)
        except RemoteError as error:
            log.info("not waiting for %s: %s", peer_id[-8:], error.reason)
            self.transport.traffic.reject(error)
            self.directory.suspect(peer_id)
            gathering.expected_s.pop(peer_id, None)
        gathering.changed.ring()

    def _on_notice(self, gathering: Gathering, peer_id: str, answer: Eta | Behind | Redirect) -> None:
        if isinstance(answer, Eta):
            until_s = self._now() + answer.eta_s + CLOSING_MARGIN_S
            gathering.expected_s[peer_id] = min(until_s, self._latest_s(gathering, busy=answer.busy))
            (gathering.idle.discard if answer.busy else gathering.idle.add)(peer_id)
            if answer.leader:
                other = self._learn(peer_id, answer.leader)
                if other is not None and on_head([other], gathering.head) and len(gathering.notices) < MAX_CALLED:
                    self._call(gathering, other.peer_id)
        elif isinstance(answer, Behind):
            self._learn(peer_id, answer.record)
            gathering.idle.add(peer_id)
            gathering.expected_s.pop(peer_id, None)
        else:
            self._learn_own(peer_id, answer.record)
            if rank(gathering.head, peer_id) > rank(gathering.head, self.identity.peer_id):
                raise Misbehaved(peer_id, "claims to lead where I do")
            if self._is_fit(gathering.head, peer_id):
                gathering.answer = answer
            else:
                gathering.expected_s.pop(peer_id, None)
        gathering.changed.ring()

    async def on_ready(self, channel: Channel, message: Ready) -> None:
        """A peer asks me to lead."""
        readiness = self._verified(channel.peer_id, message)
        awaited = self._awaited(channel.peer_id)
        if awaited is not None and readiness.head == self.seat.standing.head and not self.seat.in_round:
            await channel.send(Redirect(record=awaited))
            return
        await self._round_over(channel, readiness.head)
        standing = self.seat.standing
        if readiness.head != standing.head:
            await channel.send(self._elsewhere(readiness.head))
            return
        if readiness.step != standing.step:
            raise Misbehaved(channel.peer_id, f"says that this head is outer step {readiness.step}")
        if readiness.head not in self.gatherings:
            looking = asyncio.create_task(self._better_leader(readiness.head))
            try:
                while not looking.done():
                    await channel.send(Eta(eta_s=0.0))
                    await asyncio.wait((looking,), timeout=self.timeouts.request_s / HEARTBEATS)
                better = looking.result()
            finally:
                looking.cancel()
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
            while gathering.answer is None:
                changed = gathering.changed.event
                await channel.send(Eta(eta_s=max(gathering.closes_s - self._now(), 0.0)))
                change = asyncio.create_task(changed.wait())
                every_s = self.timeouts.request_s / HEARTBEATS
                await asyncio.wait((closed, change), timeout=every_s, return_when=asyncio.FIRST_COMPLETED)
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
        except ValueError as error:
            raise Misbehaved(source, f"sends {error}") from error
        self._learn_own(source, message.record)
        if readiness.peer_id != source or readiness.run_id != self.manifest.run_id:
            raise Misbehaved(source, "sends somebody else's readiness")
        if readiness.weight > self.manifest.spec.max_weight_tokens:
            raise Misbehaved(source, f"claims a weight of {readiness.weight} tokens")
        return readiness

    async def _better_leader(self, head: bytes) -> bytes | None:
        """The sealed record of a live peer that ranks before me on ``head``."""
        for _ in range(MAX_LEADERS_ASKED):
            records = self.directory.expected(self.wall_s())
            order = leader_order(records, head, self.identity.peer_id, self.seat.client_mode)
            leader = next((p for p in order if self._is_fit(head, p)), None)
            if leader in (None, self.identity.peer_id):
                return None
            try:
                channel = await self._open(leader)
                channel.close()
                return self.directory.sealed(leader)
            except RemoteError:
                self.directory.suspect(leader)
        return None

    async def on_closing(self, channel: Channel, message: Closing) -> None:
        """The leader of a round that somebody else is ready for asks how long I need."""
        leader = self._learn_own(channel.peer_id, message.record)
        await self._round_over(channel, message.head)
        gathering = self.gatherings.get(message.head)
        if message.head != self.seat.standing.head:
            await channel.send(self._elsewhere(message.head))
        elif not self.seat.role_trainer or self.seat.phase == "joining":
            await channel.send(No(reason="not training"))
        elif gathering is not None and rank(message.head, self.identity.peer_id) < rank(message.head, channel.peer_id):
            await channel.send(Redirect(record=self.seat.sealed_record))
        else:
            comes = leader is not None and on_head([leader], message.head)
            if gathering is not None and comes and self._is_fit(message.head, channel.peer_id):
                gathering.answer = gathering.answer or Redirect(record=message.record)
                gathering.changed.ring()
            await channel.send(Eta(eta_s=self._close_own()))

    def _awaited(self, asker: str) -> bytes | None:
        """The record of the leader for whose roster I wait, unless it is the one who asks."""
        if self.waiting_at is None or self.waiting_at[1] == asker:
            return None
        return self.directory.sealed(self.waiting_at[1])

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
        """Return when I am in no round on ``head`` and wait for none elsewhere, at the latest when such a round must
        have ended. Who asks is told to wait: it would else take me for dead, and meet others on a head that is about to
        be history."""
        seat = self.seat
        deadline_s = self._now() + self.manifest.spec.round.gather_s + MAX_GATHER_EXTENSION_S + self._round_limit_s()
        while seat.standing.head == head and self._now() < deadline_s:
            changed, awaited = seat.changed.event, self._awaited(channel.peer_id)
            if not seat.in_round and awaited is None:
                return
            await channel.send(Eta(eta_s=self.timeouts.request_s, busy=True, leader=awaited or b""))
            await heard(changed, self.timeouts.request_s / HEARTBEATS)

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
