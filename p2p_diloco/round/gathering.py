"""The rounds that a peer leads while they are formed: it tells the others, waits for them, and gives all that came the
same answer. The rules are in ``matchmaking``.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import TypeAlias

from p2p_diloco.core.errors import Misbehaved, Refused, RemoteError
from p2p_diloco.core.roster import form_roster, on_head, open_readiness, rank
from p2p_diloco.core.waiting import Bell, heard, now_s
from p2p_diloco.round.company import HEARTBEATS, Company
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.messages import Behind, Closing, Eta, Redirect, Roster, TooFew

log = logging.getLogger(__name__)

MAX_ABSENT = 64
MAX_CALLED = 1024
"""By one gathering."""
CLOSING_MARGIN_S = 1.0
"""A leader waits this much longer than the last member said that it needs."""

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


class Gatherings:
    """Those of one peer: one, or two while it moves on to another head."""

    def __init__(self, company: Company) -> None:
        self.company = company
        self.directory = company.directory
        self.seat = company.seat
        self.limits = company.manifest.spec.round
        self.by_head: dict[bytes, Gathering] = {}

    async def lead(self, sealed: bytes) -> Answer:
        gathering = self._at(self.seat.standing.head)
        gathering.ready[self.company.me] = sealed
        gathering.changed.ring()
        while gathering.answer is None:
            await gathering.changed.event.wait()
        return gathering.answer

    def _at(self, head: bytes) -> Gathering:
        gathering = self.by_head.get(head)
        if gathering is None:
            gathering = self.by_head[head] = Gathering(head=head, opened_s=now_s())
            gathering.task = asyncio.create_task(self._gather(gathering))
        return gathering

    async def _gather(self, gathering: Gathering) -> None:
        """Wait for everybody that is expected, then give all that are ready the same answer."""
        limits, me = self.limits, self.company.me
        records = self.directory.expected(self.company.wall_s())
        closes_s = gathering.opened_s + limits.gather_s + CLOSING_MARGIN_S
        gathering.expected_s = {record.peer_id: closes_s for record in on_head(records, gathering.head)}
        for peer_id in [p for p in gathering.expected_s if p not in gathering.ready]:
            self._call(gathering, peer_id)
        if self.seat.role_trainer and self.seat.phase in ("inner", "evaluate"):
            called_s = now_s()
            own_s = called_s + self.seat.call_trainer(called_s, limits.gather_s) + CLOSING_MARGIN_S
            gathering.expected_s[me] = min(own_s, self._latest_s(gathering, busy=False))
        while gathering.answer is None:
            if (beyond := self.company.beyond(gathering.head)) is not None:
                gathering.answer = Behind(record=beyond)
                break
            changed = gathering.changed.event
            gathering.closes_s = self._closes_s(gathering)
            left_s = gathering.closes_s - now_s()
            if left_s <= 0:
                break
            await heard(changed, left_s)
        for notice in gathering.notices.values():
            notice.cancel()
        del self.by_head[gathering.head]
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
        here = {record.peer_id for record in on_head(self.directory.current(self.company.wall_s()), gathering.head)}
        elsewhere = (here | gathering.expected_s.keys()) - gathering.idle - gathering.ready.keys()
        enough = len(elsewhere - {self.company.me}) >= self.limits.min_group
        return closes_s if enough else latest_s

    def _absent(self, gathering: Gathering, members: list[bytes]) -> list[bytes]:
        """Sealed records of those who train on this head and do not come, where they count."""
        if self.limits.on_missed != "keep":
            return []
        present = {open_readiness(one).peer_id for one in members}
        here = on_head(self.directory.live(self.company.wall_s()), gathering.head)
        sealed = [self.directory.sealed(record.peer_id) for record in here if record.peer_id not in present]
        if self.seat.role_trainer and self.company.me not in present:
            sealed.append(self.seat.sealed_record)
        return [one for one in sealed if one is not None][:MAX_ABSENT]

    def _latest_s(self, gathering: Gathering, *, busy: bool) -> float:
        """Nobody is waited for longer than that."""
        return gathering.opened_s + self.company.longest_s(busy=busy)

    def _call(self, gathering: Gathering, peer_id: str) -> None:
        if peer_id not in gathering.notices:
            gathering.notices[peer_id] = asyncio.create_task(self._notice(gathering, peer_id))

    async def _notice(self, gathering: Gathering, peer_id: str) -> None:
        """Tell a peer that the round is closing. Its answer says how long to wait for it; no answer, no waiting."""
        gather_s = self.limits.gather_s
        try:
            channel = await self.company.open(peer_id)
            try:
                closing = Closing(head=gathering.head, gather_s=gather_s, record=self.seat.sealed_record)
                answer: Eta | Behind | Redirect = await channel.request(closing, Eta, Behind, Redirect)
                self._on_notice(gathering, peer_id, answer)
                while isinstance(answer, Eta) and answer.busy:
                    answer = await channel.receive(Eta, Behind, Redirect, timeout_s=self.company.timeouts.request_s)
                    self._on_notice(gathering, peer_id, answer)
            finally:
                channel.close()
        except Refused:
            gathering.idle.add(peer_id)
            gathering.expected_s.pop(peer_id, None)
        except RemoteError as error:
            log.info("not waiting for %s: %s", peer_id[-8:], error.reason)
            self.company.transport.traffic.reject(error)
            self.directory.suspect(peer_id)
            gathering.expected_s.pop(peer_id, None)
        gathering.changed.ring()

    def _on_notice(self, gathering: Gathering, peer_id: str, answer: Eta | Behind | Redirect) -> None:
        if isinstance(answer, Eta):
            until_s = now_s() + answer.eta_s + CLOSING_MARGIN_S
            gathering.expected_s[peer_id] = min(until_s, self._latest_s(gathering, busy=answer.busy))
            (gathering.idle.discard if answer.busy else gathering.idle.add)(peer_id)
            if answer.leader:
                other = self.company.learn(peer_id, answer.leader)
                if other is not None and on_head([other], gathering.head) and len(gathering.notices) < MAX_CALLED:
                    self._call(gathering, other.peer_id)
        elif isinstance(answer, Behind):
            self.company.learn(peer_id, answer.record)
            gathering.idle.add(peer_id)
            gathering.expected_s.pop(peer_id, None)
        else:
            self.company.learn_own(peer_id, answer.record)
            if rank(gathering.head, peer_id) > rank(gathering.head, self.company.me):
                raise Misbehaved(peer_id, "claims to lead where I do")
            if self.company.is_fit(gathering.head, peer_id):
                gathering.answer = answer
            else:
                gathering.expected_s.pop(peer_id, None)
        gathering.changed.ring()

    async def join(self, channel: Channel, head: bytes, sealed: bytes) -> None:
        """A member is ready: it hears how long it takes, then the answer, and takes no part any more when it leaves."""
        gathering = self._at(head)
        gathering.ready[channel.peer_id] = sealed
        gathering.changed.ring()
        closed = asyncio.create_task(channel.reader.read(1))  # A member says nothing more: this ends when it leaves.
        try:
            while gathering.answer is None:
                changed = gathering.changed.event
                await channel.send(Eta(eta_s=max(gathering.closes_s - now_s(), 0.0)))
                change = asyncio.create_task(changed.wait())
                every_s = self.company.timeouts.request_s / HEARTBEATS
                await asyncio.wait((closed, change), timeout=every_s, return_when=asyncio.FIRST_COMPLETED)
                change.cancel()
                if closed.done() and gathering.answer is None:
                    if gathering.ready.get(channel.peer_id) == sealed:
                        gathering.ready.pop(channel.peer_id)
                        gathering.expected_s.pop(channel.peer_id, None)
                        gathering.changed.ring()
                    return
            await channel.send(gathering.answer)
        finally:
            closed.cancel()

    async def close(self) -> None:
        tasks = [gathering.task for gathering in self.by_head.values() if gathering.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
