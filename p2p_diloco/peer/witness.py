"""The witness of the run's owner over updates that too few known members make: in the first outer steps, and whenever
most of those that were known have left.

Where nobody is known, most of a roster says nothing: names cost nothing. So the owner's seed signs such an update as
well, and only one on a head; none where it sees enough known members, which make the run's updates then. It says
nothing about what is in the update, and its own history follows it like anybody else's. A round may fail after it has
signed, and nobody have the update; so it signs another one on the same head when nobody has shown it the first one for
``Timeouts.record_life_s``.

Nor does it sign for the first that asks: where fewer than LEAST_SHARE of those that have contributed so far, and are
here, are in the roster, it waits for that time as well, in which they can meet; before the first update, of the
trainers that have answered it. It is one of them itself, if it trains. Else whoever trains least would be known before
all others. Not most of them: some may
be ready and contribute nothing, and shall not stop the rest.

Known weaknesses: whoever holds back such an update for longer than that can bring it out later, and then there are two.
Who makes the first updates alone, because nobody else is ready in that time, has them to itself. An owner that trains
may sign one update as a member, and another one of the same head as a witness.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from p2p_diloco.core.admission import Seated, votes
from p2p_diloco.core.certificate import Certificate, Taken, check_most
from p2p_diloco.core.errors import Misbehaved
from p2p_diloco.core.events import EventLog
from p2p_diloco.core.group import Group, open_roster
from p2p_diloco.core.roster import on_head, open_readiness
from p2p_diloco.core.trust_event import WitnessAsked
from p2p_diloco.core.update import next_head
from p2p_diloco.core.waiting import heard, now_s
from p2p_diloco.ledger.replica import Replica
from p2p_diloco.round.here import Here
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.messages import No
from p2p_diloco.wire.round_messages import AskWitness, Eta, Witnessed

log = logging.getLogger(__name__)

LEAST_SHARE = 0.3
"""Of those who are there."""


@dataclass(frozen=True, kw_only=True)
class LastSigned:
    """The update that was witnessed last."""

    head: bytes
    """Where it leads on from."""
    link: bytes
    until_s: float
    """Loop time until which no other one is witnessed there."""


@dataclass(kw_only=True, eq=False)
class Witness:
    """Witnesses updates, at the run's owner; anybody else refuses."""

    here: Here
    replica: Replica
    events: EventLog
    _signed: LastSigned | None = field(default=None, init=False)
    _asked: tuple[bytes, float] = field(default=(b"", 0.0), init=False)
    """The head for which a witness was asked last, and the loop time at which it was for the first time."""

    async def on_ask_witness(self, channel: Channel, message: AskWitness) -> None:
        """Answers a leader that asks for the owner's witness."""
        if self.here.peer_id != self.replica.rules.owner:
            await channel.send(No(reason="not the run's owner"))
            return
        try:
            certificate = Certificate.from_bytes(message.certificate)
            first = open_readiness(next(iter(certificate.roster.members), b""))
            await self._catch_up(channel, first.step, first.head)
            if self.here.seat.standing.head != first.head:
                await channel.send(self._refuse(first.step, "the run's owner stands on another head"))
                return
            group = open_roster(certificate.roster, self.replica.rules, self.here.seat.known)
            check_most(certificate, group, message.link, self.replica.rules.owner)
        except ValueError as error:
            raise Misbehaved(channel.peer_id, f"asks to witness {error}") from error
        await channel.send(self.sign(group, certificate.taken(message.link)))

    def sign(self, group: Group, taken: Taken) -> Witnessed | No:
        """Returns the owner's signature over what most of a group have taken, or why it is not witnessed."""
        if refusal := self._refusal(group, taken.link):
            return self._refuse(group.step, refusal)
        until_s = now_s() + self.here.timeouts.record_life_s
        self._signed = LastSigned(head=group.head, link=taken.link, until_s=until_s)
        log.info("outer step %d: witnessed", group.step)
        self.events.write(WitnessAsked(step=group.step, signed=True, reason=""))
        return Witnessed(signature=taken.sign(self.here.identity))

    async def _catch_up(self, channel: Channel, step: int, head: bytes) -> None:
        """Waits until I stand on a head of outer step ``step``, for ``Timeouts.request_s`` at most: who is known there
        follows from my ledger."""
        seat, timeouts = self.here.seat, self.here.timeouts
        deadline_s = now_s() + timeouts.request_s
        while seat.standing.step <= step and seat.standing.head != head and now_s() < deadline_s:
            changed = seat.changed.event
            await channel.send(Eta(eta_s=timeouts.heartbeat_s))
            await heard(changed, timeouts.heartbeat_s)

    def leads_to(self, head: bytes) -> bytes | None:
        """Returns the head that the update which I have witnessed on ``head`` leads to; None where there is none, or it
        is too long ago to wait for it."""
        signed = self._signed
        if signed is None or signed.head != head or now_s() >= signed.until_s:
            return None
        return next_head(head, signed.link)

    def _refusal(self, group: Group, link: bytes) -> str:
        """Returns why an update of this head is not witnessed; empty where it is."""
        signed, seat = self._signed, self.here.seat
        trainers: list[Seated] = [*on_head(self.here.live(), group.head)]
        trainers += [self.here.claim] if seat.role_trainer else []
        if votes(one for one in trainers if one.peer_id in seat.known.peers) >= self.replica.rules.least_known:
            return "enough known members are here to do without a witness"
        if signed is not None and signed.head == group.head and signed.link != link and now_s() < signed.until_s:
            return "the run's owner has just witnessed another update of this head"
        if self._asked[0] != group.head:
            self._asked = group.head, now_s()
        if now_s() < self._asked[1] + self.here.timeouts.record_life_s and self._leaves_out_others(group):
            return "too few of those that the run's owner sees here are in it"
        return ""

    def _leaves_out_others(self, group: Group) -> bool:
        """Tells whether fewer than LEAST_SHARE of those that have contributed so far, and are on my way, are in a
        group; before the first update, of the trainers that have answered me, and of me, if I train. Their records may
        not have heard of the last outer step yet."""
        seat, proven = self.here.seat, self.here.directory.proven
        way = {seat.standing.head, *seat.standing.heads}
        here = (record for record in self.here.live() if record.role == "trainer" and record.head in way)
        there = {record.peer_id for record in here if record.peer_id in proven}
        there |= {self.here.peer_id} if seat.role_trainer else set()
        if group.step:
            there &= seat.history.electors(group.step)
        inside = there.intersection(member.peer_id for member in group.members)
        return len(inside) < LEAST_SHARE * len(there)

    def _refuse(self, step: int, reason: str) -> No:
        log.warning("outer step %d: not witnessed: %s", step, reason)
        self.events.write(WitnessAsked(step=step, signed=False, reason=reason))
        return No(reason=reason)
