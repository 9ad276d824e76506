"""What a leader says to those that are not ready while a round gathers, and what it hears from them.

    hail   "I gather here", where too few are ready: it calls nobody, but two leaders on one head hear of each other
    call   "the round closes", where enough are: who is called stops training in time, and says when that is

Both are ``closing``, with the records of those that are ready. Who gets it decides for itself which of the two it is,
and says so; it may have heard of others than the leader has.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from p2p_diloco.core.errors import Misbehaved, Refused, RemoteError
from p2p_diloco.core.roster import on_head
from p2p_diloco.core.waiting import now_s
from p2p_diloco.round import callers
from p2p_diloco.round.calls import ask, reach
from p2p_diloco.round.company import CLOSING_MARGIN_S, Company
from p2p_diloco.round.gathering import Gathering
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.round_messages import Behind, Closing, Eta, Redirect

log = logging.getLogger(__name__)

MAX_CALLED = 1024
"""Where so many have been called, nobody is called any more because another peer names it."""
ANSWERS = (Eta, Behind, Redirect)


class Notices:
    """Says to the peers that are expected where and when the rounds of one leader gather."""

    def __init__(self, company: Company) -> None:
        self.company = company
        self.here = company.here
        self.directory = company.here.directory
        self._hails: set[asyncio.Task[None]] = set()
        """Each ends with the first answer, whatever has become of its gathering."""

    def call(self, gathering: Gathering) -> None:
        """Calls everybody that is expected on this head and not ready; not too many that are not proven."""
        for peer_id in self.not_ready(gathering):
            if peer_id in self.directory.proven or len(gathering.notices) < MAX_CALLED:
                self._call(gathering, peer_id)

    def hail(self, gathering: Gathering) -> None:
        """Says to everybody that is expected on this head and not ready that I gather."""
        for peer_id in self.not_ready(gathering):
            self._begin_hail(gathering, peer_id)

    def _begin_hail(self, gathering: Gathering, peer_id: str) -> None:
        """Says to a peer that I gather, once."""
        if peer_id in gathering.hailed or len(self._hails) >= MAX_CALLED:
            return
        gathering.hailed.add(peer_id)
        hail = asyncio.create_task(self._hail(gathering, peer_id))
        self._hails.add(hail)
        hail.add_done_callback(self._hails.discard)

    def not_ready(self, gathering: Gathering) -> list[str]:
        """Returns the ids of those that are expected on this head and not ready."""
        around = on_head(self.directory.expected(self.here.wall_s()), gathering.head)
        return [record.peer_id for record in around if record.peer_id not in gathering.ready]

    def _call(self, gathering: Gathering, peer_id: str) -> None:
        """Calls a peer to the round, once."""
        if peer_id not in gathering.notices:
            gathering.notices[peer_id] = asyncio.create_task(self._hear(gathering, peer_id))

    async def _hear(self, gathering: Gathering, peer_id: str) -> None:
        """Tells a peer that the round is closing, and hears how long it has to be waited for. A peer that refuses or
        does not answer is not waited for; a peer that is busy is heard until it is free."""
        called_s = now_s()
        try:
            async with self._said(gathering, peer_id) as (channel, answer):
                self._on_call(gathering, peer_id, answer)
                while isinstance(answer, Eta) and answer.busy:
                    answer = await channel.receive(*ANSWERS, timeout_s=self.here.timeouts.request_s)
                    self._on_call(gathering, peer_id, answer)
        except Refused:
            self.directory.proven.answered(peer_id)
            gathering.idle.add(peer_id)
            gathering.deadlines_s.pop(peer_id, None)
        except RemoteError as error:
            log.info("not waiting for %s: %s, waited %.2f s", peer_id[-8:], error.reason, now_s() - called_s)
            self.here.transport.traffic.reject(error)
            self.directory.suspect(peer_id)
            if gathering.deadlines_s.pop(peer_id, None) is not None and peer_id not in gathering.ready:
                self.company.waits.charge(peer_id, now_s() - gathering.opened_s, now_s())
        gathering.changed.ring()

    async def _hail(self, gathering: Gathering, peer_id: str) -> None:
        """Tells a peer that I gather, and hears whether somebody else does."""
        try:
            async with self._said(gathering, peer_id) as (_, answer):
                if gathering.answer is None:
                    self._on_notice(gathering, peer_id, answer)
        except Refused:
            self.directory.proven.answered(peer_id)
            gathering.idle.add(peer_id)
        except RemoteError as error:
            log.info("%s does not hear that I gather: %s", peer_id[-8:], error.reason)
            self.here.transport.traffic.reject(error)
            self.directory.suspect(peer_id)
        gathering.changed.ring()

    @asynccontextmanager
    async def _said(self, gathering: Gathering, peer_id: str) -> AsyncIterator[tuple[Channel, Eta | Behind | Redirect]]:
        """Says ``closing`` to a peer, and yields the stream and its first answer, which proves it."""
        channel = await reach(self.company, peer_id)
        try:
            answer: Eta | Behind | Redirect = await ask(self.company, channel, self._closing(gathering), *ANSWERS)
            self.directory.proven.answered(peer_id)
            yield channel, answer
        finally:
            channel.close()

    def _closing(self, gathering: Gathering) -> Closing:
        """Returns what I say to those that are not ready: it calls them, if enough are by the records in it."""
        return Closing(
            head=gathering.head,
            gather_s=self.company.manifest.spec.round.gather_s,
            record=self.here.seat.sealed_record,
            callers=callers.records_of(self.company, gathering.head),
        )

    def _on_call(self, gathering: Gathering, peer_id: str, answer: Eta | Behind | Redirect) -> None:
        """Takes in what a peer answers to the call: until when it is waited for, and what ``_on_notice`` says. Who has
        not heard of enough that are ready makes all its steps, and is not waited for: that is nobody's fault."""
        if isinstance(answer, Eta) and answer.uncalled:
            gathering.deadlines_s.pop(peer_id, None)
        elif isinstance(answer, Eta):
            until_s = now_s() + answer.eta_s + CLOSING_MARGIN_S
            latest_s = self.company.waits_until_s(peer_id, gathering.opened_s, busy=answer.busy)
            gathering.deadlines_s[peer_id] = min(until_s, latest_s)
        self._on_notice(gathering, peer_id, answer)

    def _on_notice(self, gathering: Gathering, peer_id: str, answer: Eta | Behind | Redirect) -> None:
        """Takes in what a peer answers that has heard that I gather. Misbehaved when it claims to lead and ranks after
        me; not where I help, for it may not have heard that I am needed."""
        if isinstance(answer, Eta):
            (gathering.idle.discard if answer.busy else gathering.idle.add)(peer_id)
            if answer.leader:
                other = self.company.learn(peer_id, answer.leader)
                if other is not None and on_head([other], gathering.head) and len(gathering.notices) < MAX_CALLED:
                    (self._begin_hail if gathering.is_uncalled else self._call)(gathering, other.peer_id)
                    if self.company.is_believed(peer_id):
                        gathering.awaited.add(other.peer_id)
                        self._yield(gathering, other.peer_id)
        elif isinstance(answer, Behind):
            self.company.learn(peer_id, answer.record)
            gathering.idle.add(peer_id)
            gathering.deadlines_s.pop(peer_id, None)
        else:
            self.company.learn_own(peer_id, answer.record)
            helps = self.company.me in self.company.leading_helper(gathering.head)
            if not helps and self.company.precedes(gathering.head, self.company.me, peer_id):
                raise Misbehaved(peer_id, "claims to lead where I do")
            gathering.deadlines_s.pop(peer_id, None)
            self.claim(gathering, peer_id, answer)
        gathering.changed.ring()

    def claim(self, gathering: Gathering, leader: str, redirect: Redirect) -> None:
        """Takes in that a peer that precedes me says that it gathers on this head."""
        gathering.claims[leader] = redirect
        self._yield(gathering, leader)

    def _yield(self, gathering: Gathering, leader: str) -> None:
        """Sends all that have come here to a peer that precedes me, gathers and may lead me on this head: two leaders
        on one head would make two histories. One that is in debt for rounds need be waited for by others, too."""
        doubted = self.company.rounds.in_debt(leader, now_s()) or self.company.is_wrong(leader)
        believed = not doubted or leader in gathering.awaited
        if leader in gathering.claims and believed and self.company.is_fit(gathering.head, leader):
            gathering.answer = gathering.answer or gathering.claims[leader]
            gathering.changed.ring()

    async def close(self) -> None:
        """Hears nobody any more."""
        hails = tuple(self._hails)
        for hail in hails:
            hail.cancel()
        await asyncio.gather(*hails, return_exceptions=True)
