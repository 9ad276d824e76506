"""The rounds that a peer leads while they are formed: it calls the others, waits for them, and gives all that came the
same answer.

A gathering opens when the leader's own trainer is ready, or when the first peer that is ready asks it to lead
(``Gathering.opened_s``). It calls every live trainer on this head that is not ready yet with ``closing``.

**Which peers are waited for.** Every live trainer on this head is expected when the gathering opens, and has a deadline
of its own (``Gathering.deadlines_s``):

    before it has answered the call     opened_s + gather_s + CLOSING_MARGIN_S
    it says that it needs ``eta_s``     when it said so + eta_s + CLOSING_MARGIN_S, at most opened_s + gather_s +
                                        MAX_GATHER_EXTENSION_S
    it is busy with another round       the same, at most opened_s + gather_s + MAX_GATHER_EXTENSION_S + the longest
    on this head                        time of a round (``Company.longest_s``)
    the leader's own trainer            as a peer that says what it needs

``gather_s`` is the manifest's ``round.gather_s``. A trainer asks for no more than that, unless one inner step alone
takes longer. A peer is not waited for any more as soon as it refuses, stands on another head, cannot be dialled, does
not answer the call within ``Timeouts.request_s``, or closes its stream after it was ready. When a busy peer waits for
the roster of another leader on this head, that one is called as well.

**When the round closes.** It closes when everybody that is expected is ready or past its deadline. So it closes at once
when all are ready, usually ``gather_s`` + CLOSING_MARGIN_S after it opened at the latest, and never later than the
deadline of a busy peer. A deadline beyond MAX_GATHER_EXTENSION_S holds only while at least ``round.min_group`` peers on
this head are not known to be free for this round: fewer cannot be in another one. Then everybody that is ready hears
the same: the roster of the ``round.max_group`` best-ranked ones, or that fewer than ``round.min_group`` came. It ends
early when a better-ranked leader gathers on this head (all are sent there), or when this head is left behind.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import TypeAlias

from p2p_diloco.core.errors import Misbehaved, Refused, RemoteError
from p2p_diloco.core.roster import form_roster, on_head, open_readiness, rank
from p2p_diloco.core.waiting import Bell, heard, now_s
from p2p_diloco.round.company import Company
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.messages import Behind, Closing, Eta, Redirect, Roster, TooFew

log = logging.getLogger(__name__)

MAX_ABSENT = 64
"""Absent peers in one roster."""
MAX_CALLED = 1024
"""Where so many have been called, nobody is called any more because another peer names it."""
CLOSING_MARGIN_S = 1.0
"""A leader waits this much longer than a peer said that it needs."""

Answer: TypeAlias = Roster | TooFew | Behind | Redirect


@dataclass(kw_only=True)
class Gathering:
    """One round being formed, at its leader."""

    head: bytes
    opened_s: float
    """Loop time at which the first peer was ready."""
    ready: dict[str, bytes] = field(default_factory=dict)
    """Peer id -> sealed readiness."""
    deadlines_s: dict[str, float] = field(default_factory=dict)
    """Peer id -> loop time until which a peer that is expected is waited for."""
    closes_s: float = 0.0
    """Loop time at which the round closes, as far as is known: the latest of these deadlines."""
    answer: Answer | None = None
    """What everybody that is ready hears, as soon as the round has closed."""
    changed: Bell = field(default_factory=Bell)
    task: asyncio.Task[None] | None = None
    idle: set[str] = field(default_factory=set)
    """Peers that have said that they are in no other round on this head."""
    notices: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    """Peer id -> the talk with a peer that has been called."""


class Gatherings:
    """The gatherings that one peer leads: one, or two while it moves on to another head."""

    def __init__(self, company: Company) -> None:
        self.company = company
        self.here = company.here
        self.directory = company.here.directory
        self.seat = company.here.seat
        self.limits = company.manifest.spec.round
        self.by_head: dict[bytes, Gathering] = {}

    async def lead(self, sealed: bytes) -> Answer:
        """Gathers on my head, with my own readiness, and returns what comes of it when the round closes."""
        gathering = self._at(self.seat.standing.head)
        gathering.ready[self.company.me] = sealed
        gathering.changed.ring()
        while gathering.answer is None:
            await gathering.changed.event.wait()
        return gathering.answer

    def _at(self, head: bytes) -> Gathering:
        """Returns the gathering on a head, which opens now if there is none."""
        gathering = self.by_head.get(head)
        if gathering is None:
            gathering = self.by_head[head] = Gathering(head=head, opened_s=now_s())
            gathering.task = asyncio.create_task(self._gather(gathering))
        return gathering

    async def _gather(self, gathering: Gathering) -> None:
        """Calls everybody that is expected, waits until the round closes, and gives all that are ready one answer."""
        limits, me = self.limits, self.company.me
        records = self.directory.expected(self.here.wall_s())
        closes_s = gathering.opened_s + limits.gather_s + CLOSING_MARGIN_S
        gathering.deadlines_s = {record.peer_id: closes_s for record in on_head(records, gathering.head)}
        for peer_id in [p for p in gathering.deadlines_s if p not in gathering.ready]:
            self._call(gathering, peer_id)
        if self.seat.role_trainer and self.seat.phase in ("inner", "evaluate"):
            called_s = now_s()
            own_s = called_s + self.seat.call_trainer(called_s, limits.gather_s) + CLOSING_MARGIN_S
            gathering.deadlines_s[me] = min(own_s, self._latest_s(gathering, busy=False))
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
        """Returns the loop time at which the round closes: the latest deadline of those that are not ready, or a time
        that is past when all are. A peer that is busy is waited for as long as its round may take, but not by its word
        alone: fewer than the run's smallest group cannot be in a round. Those that I cannot ask may be in it."""
        missing_s = [until_s for p, until_s in gathering.deadlines_s.items() if p not in gathering.ready]
        closes_s, latest_s = max(missing_s, default=0.0), self._latest_s(gathering, busy=False)
        if closes_s <= latest_s:
            return closes_s
        around = {record.peer_id for record in on_head(self.directory.current(self.here.wall_s()), gathering.head)}
        elsewhere = (around | gathering.deadlines_s.keys()) - gathering.idle - gathering.ready.keys()
        enough = len(elsewhere - {self.company.me}) >= self.limits.min_group
        return closes_s if enough else latest_s

    def _absent(self, gathering: Gathering, members: list[bytes]) -> list[bytes]:
        """Returns the sealed records of the trainers on this head that do not come, in a run that keeps missed rounds:
        there they count in the weights' sum."""
        if self.limits.on_missed != "keep":
            return []
        present = {open_readiness(one).peer_id for one in members}
        around = on_head(self.here.live(), gathering.head)
        sealed = [self.directory.sealed(record.peer_id) for record in around if record.peer_id not in present]
        if self.seat.role_trainer and self.company.me not in present:
            sealed.append(self.seat.sealed_record)
        return [one for one in sealed if one is not None][:MAX_ABSENT]

    def _latest_s(self, gathering: Gathering, *, busy: bool) -> float:
        """Returns the latest deadline that a peer can have in this gathering. ``busy``: one in another round."""
        return gathering.opened_s + self.company.longest_s(busy=busy)

    def _call(self, gathering: Gathering, peer_id: str) -> None:
        """Calls a peer to the round, once."""
        if peer_id not in gathering.notices:
            gathering.notices[peer_id] = asyncio.create_task(self._notice(gathering, peer_id))

    async def _notice(self, gathering: Gathering, peer_id: str) -> None:
        """Tells a peer that the round is closing, and hears how long it has to be waited for. A peer that refuses or
        does not answer is not waited for; a peer that is busy is heard until it is free."""
        gather_s = self.limits.gather_s
        try:
            channel = await self.here.open(peer_id)
            try:
                closing = Closing(head=gathering.head, gather_s=gather_s, record=self.seat.sealed_record)
                answer: Eta | Behind | Redirect = await channel.request(closing, Eta, Behind, Redirect)
                self._on_notice(gathering, peer_id, answer)
                while isinstance(answer, Eta) and answer.busy:
                    answer = await channel.receive(Eta, Behind, Redirect, timeout_s=self.here.timeouts.request_s)
                    self._on_notice(gathering, peer_id, answer)
            finally:
                channel.close()
        except Refused:
            gathering.idle.add(peer_id)
            gathering.deadlines_s.pop(peer_id, None)
        except RemoteError as error:
            log.info("not waiting for %s: %s", peer_id[-8:], error.reason)
            self.here.transport.traffic.reject(error)
            self.directory.suspect(peer_id)
            gathering.deadlines_s.pop(peer_id, None)
        gathering.changed.ring()

    def _on_notice(self, gathering: Gathering, peer_id: str, answer: Eta | Behind | Redirect) -> None:
        """Takes in what a peer answers to the call. Misbehaved when it claims to lead and ranks after me."""
        if isinstance(answer, Eta):
            until_s = now_s() + answer.eta_s + CLOSING_MARGIN_S
            gathering.deadlines_s[peer_id] = min(until_s, self._latest_s(gathering, busy=answer.busy))
            (gathering.idle.discard if answer.busy else gathering.idle.add)(peer_id)
            if answer.leader:
                other = self.company.learn(peer_id, answer.leader)
                if other is not None and on_head([other], gathering.head) and len(gathering.notices) < MAX_CALLED:
                    self._call(gathering, other.peer_id)
        elif isinstance(answer, Behind):
            self.company.learn(peer_id, answer.record)
            gathering.idle.add(peer_id)
            gathering.deadlines_s.pop(peer_id, None)
        else:
            self.company.learn_own(peer_id, answer.record)
            if rank(gathering.head, peer_id) > rank(gathering.head, self.company.me):
                raise Misbehaved(peer_id, "claims to lead where I do")
            if self.company.is_fit(gathering.head, peer_id):
                gathering.answer = answer
            else:
                gathering.deadlines_s.pop(peer_id, None)
        gathering.changed.ring()

    async def join(self, channel: Channel, head: bytes, sealed: bytes) -> None:
        """Takes in a peer that is ready, and tells it when the round closes, whenever that changes and every
        ``Timeouts.heartbeat_s``; then gives it the answer. It takes no part any more when it closes its stream."""
        gathering = self._at(head)
        gathering.ready[channel.peer_id] = sealed
        gathering.changed.ring()
        closed = asyncio.create_task(channel.reader.read(1))  # A member says nothing more: this ends when it leaves.
        try:
            while gathering.answer is None:
                changed = gathering.changed.event
                await channel.send(Eta(eta_s=max(gathering.closes_s - now_s(), 0.0)))
                change = asyncio.create_task(changed.wait())
                every_s = self.here.timeouts.heartbeat_s
                await asyncio.wait((closed, change), timeout=every_s, return_when=asyncio.FIRST_COMPLETED)
                change.cancel()
                if closed.done() and gathering.answer is None:
                    if gathering.ready.get(channel.peer_id) == sealed:
                        gathering.ready.pop(channel.peer_id)
                        gathering.deadlines_s.pop(channel.peer_id, None)
                        gathering.changed.ring()
                    return
            await channel.send(gathering.answer)
        finally:
            closed.cancel()

    async def close(self) -> None:
        """Ends all gatherings without an answer."""
        tasks = [gathering.task for gathering in self.by_head.values() if gathering.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
