"""How a member sees to it that a round has one update: before it applies what is certified, it tells the other
reducers, and hears whether one of them knows that another update is certified.

Two updates of one round are certified only when somebody in both majorities has signed both. Without a word to each
other, two members that such a liar has told different things would both apply what they were told. Each of them tells
all reducers first, and each reducer keeps the first certificate that it has or is told of, and answers any other one
with it. So of two members that reach one honest reducer, at least the later one hears of both. The round is void for it
then, and who has signed both is barred.

It costs one answer of each reducer, and where one is silent ``Timeouts.heartbeat_s``: a member that cannot reach the
others applies what is certified all the same. Who keeps it waiting for more than PROMPT_SHARE of that pays for it
(``Company.kept_waiting``), or a reducer that answers all but this could slow down every round.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping
from typing import TypeVar

from p2p_diloco.core.certificate import Certificate
from p2p_diloco.core.errors import Misbehaved, RemoteError
from p2p_diloco.core.group import Group
from p2p_diloco.core.waiting import deadline, now_s, run_all
from p2p_diloco.round.meeting import Meeting
from p2p_diloco.round.outcome import Settled
from p2p_diloco.round.settle_ballot import certificate_in
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.messages import No
from p2p_diloco.wire.proof_messages import AskOther, Other

log = logging.getLogger(__name__)
Asked = TypeVar("Asked", int, str)

TWO_UPDATES = "two updates of it are certified"
PROMPT_SHARE = 0.5
"""Of ``Timeouts.heartbeat_s``: within this an answer costs nobody anything. It is a few round trips of a slow line."""


class Once:
    """The update of a round that one member knows to be certified, and what it tells the others of it."""

    def __init__(self, meeting: Meeting) -> None:
        self.meeting = meeting
        self.group = meeting.group
        self.first: tuple[bytes, Certificate] | None = None
        """Link and certificate of the first update that I have or was told of."""
        self.late_s: dict[int, float] = {}
        """Reducer that did not answer promptly -> the seconds that I have waited for it."""

    async def confirm(self, settled: Settled) -> None:
        """Tells the other reducers which update I am about to apply, and returns when all have answered that they know
        of no other one, or after ``Timeouts.heartbeat_s``. The round is void where one does."""
        link, certificate = settled.update.header.link, settled.certificate
        self._hear(link, certificate)
        meeting, members, signatures = self.meeting, *enough(self.group, certificate, self.meeting.owner)
        ask = AskOther(
            round_id=self.group.round_id,
            link=link,
            full=certificate.full,
            state=certificate.state,
            members=members,
            signatures=signatures,
            witness=certificate.witness,
        )
        reached = self.group.reached_by(meeting.me)
        others = [i for i in self.group.reducers if i in reached and i not in meeting.lost]
        limit_s, took_s, began_s = meeting.timeouts.heartbeat_s, dict[int, float](), now_s()

        async def ask_one(member: int) -> None:
            await self._ask(member, ask)
            took_s[member] = now_s() - began_s

        try:
            async with deadline(limit_s):
                await run_all(*map(ask_one, others))
        except asyncio.TimeoutError:
            log.info("outer step %d: not all have said whether they know of another update", self.group.step)
        self.late_s = late(others, took_s, limit_s)

    async def _ask(self, member: int, ask: AskOther) -> None:
        """Tells one reducer, and takes in what it knows."""
        try:
            channel = await self.meeting.open(member)
            try:
                answer: Other | No = await channel.request(ask, Other, No)
            finally:
                channel.close()
            if isinstance(answer, Other):
                if answer.link == ask.link:
                    raise Misbehaved(channel.peer_id, "says that another update is certified, and names the same one")
                self._hear(answer.link, self._certificate_of(channel.peer_id, answer))
        except Misbehaved as error:
            self.meeting.lose(member, error)
        except RemoteError as error:
            log.debug("outer step %d: %s", self.group.step, error)
            self.meeting.transport.traffic.reject(error)

    async def on_ask_other(self, channel: Channel, message: AskOther) -> None:
        """Answers a member that tells me what it is about to apply: with the first update that I know to be certified,
        if that is another one. Misbehaved when what it tells is not certified."""
        if self.first is None or self.first[0] != message.link:
            certificate = self._certificate_of(channel.peer_id, message)
            before = self.first
            self._hear(message.link, certificate)
            if before is not None:
                await channel.send(self._other(*before))
                return
        await channel.send(No(reason="no other one"))

    def _hear(self, link: bytes, certificate: Certificate) -> None:
        """Takes in that an update is certified. The round is void when another one was before."""
        self.meeting.signatures.note_all(certificate.taken(link), certificate.signatures)
        if self.first is None:
            self.first = link, certificate
        elif self.first[0] != link:
            self.meeting.signatures.end(TWO_UPDATES)

    def _certificate_of(self, source: str, message: AskOther | Other) -> Certificate:
        """Returns the certificate in what a member says, verified. Misbehaved of ``source`` when it is not sound."""
        return certificate_in(
            message,
            self.group,
            state=message.state,
            link=message.link,
            owner=self.meeting.owner,
            source=source,
        )

    def _other(self, link: bytes, certificate: Certificate) -> Other:
        members, signatures = enough(self.group, certificate, self.meeting.owner)
        return Other(
            link=link,
            full=certificate.full,
            state=certificate.state,
            members=members,
            signatures=signatures,
            witness=certificate.witness,
        )


def late(asked: Collection[Asked], took_s: Mapping[Asked, float], limit_s: float) -> dict[Asked, float]:
    """Returns those that did not answer promptly, and the seconds that each was waited for. ``took_s``: those
    that are no longer waited for, and how long each took, whatever came of it; the others were waited for until
    ``limit_s``."""
    waited_s = {member: took_s.get(member, limit_s) for member in asked}
    return {member: waited for member, waited in waited_s.items() if waited > PROMPT_SHARE * limit_s}


def enough(group: Group, certificate: Certificate, owner: str) -> tuple[list[int], list[bytes]]:
    """Returns members and signatures of a certificate, no more of them than it needs: the owner's, if it has signed as
    a member, and those of most of the others that certify. A request is no longer than that."""
    chosen: dict[int, bytes] = {}
    signed = sorted(certificate.signatures, key=lambda one: group.members[one[0]].peer_id != owner)
    for member, signature in signed:
        if not group.is_most(chosen):
            chosen[member] = signature
    return sorted(chosen), [chosen[member] for member in sorted(chosen)]
