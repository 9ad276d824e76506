"""How the members of a round find out that its leader has signed another roster: they ask those that could be in one.

A leader that gives some of the peers on a head one roster, and others another one, makes two rounds whose members have
no reason to speak to each other. So each member tells peers on its head that are not in its roster which one it has,
beside the butterfly, and those that have refused it there, for they may be in another round. Where a peer has another
roster of the same leader, both show theirs to each other. Whatever the two prove (``core.equivocation``) makes the
round void at both: an honest leader that tries again signs another readiness of its own.

Known peers are waited for at the end of the round, ``Timeouts.heartbeat_s`` at most. Who keeps a member waiting pays
for it, as a reducer does that answers late (``settle_once``).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from p2p_diloco.core.equivocation import TwoRosters, proved
from p2p_diloco.core.errors import Misbehaved, RemoteError
from p2p_diloco.core.waiting import now_s
from p2p_diloco.round.meeting import Meeting
from p2p_diloco.round.settle_once import late
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.messages import No
from p2p_diloco.wire.proof_messages import AskRoster
from p2p_diloco.wire.round_messages import Roster

log = logging.getLogger(__name__)

NEIGHBOURS = 16
"""Peers that a member asks: in a large swarm each member asks others."""


class Rosters:
    """Asks others on the head of a round whether they have another roster of its leader."""

    def __init__(self, meeting: Meeting) -> None:
        self.meeting = meeting
        self.group = meeting.group
        self.late_s: dict[str, float] = {}
        """Known peer that did not answer promptly -> the seconds that I have waited for it."""
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._over_s: dict[str, float] = {}
        """Peer -> the loop time at which it had answered, or could not be asked."""

    def ask(self, peer_ids: Iterable[str]) -> None:
        """Begins to ask some peers, NEIGHBOURS at most."""
        for peer_id in list(peer_ids)[:NEIGHBOURS]:
            if peer_id not in self._asking:
                self._asking[peer_id] = asyncio.create_task(self._ask(peer_id))

    async def answered(self) -> None:
        """Returns when all known peers have answered that were asked, or after ``Timeouts.heartbeat_s``. Nobody else is
        waited for: a stranger costs nothing, and a round of strangers needs the owner's witness. Who was silent is not
        asked again before it has answered something."""
        waited_for = {peer_id: task for peer_id, task in self._asking.items() if peer_id in self.meeting.known}
        limit_s, began_s = self.meeting.timeouts.heartbeat_s, now_s()
        if waited_for:
            await asyncio.wait(waited_for.values(), timeout=limit_s)
        took_s = {peer_id: self._over_s[peer_id] - began_s for peer_id in waited_for if peer_id in self._over_s}
        self.late_s = late(waited_for, took_s, limit_s)
        for peer_id in waited_for.keys() - took_s.keys():
            self.meeting.directory.proven.failed(peer_id)

    async def close(self) -> None:
        """Asks no more."""
        for task in self._asking.values():
            task.cancel()
        await asyncio.gather(*self._asking.values(), return_exceptions=True)

    async def _ask(self, peer_id: str) -> None:
        """Asks one peer, and gives it my roster where the two prove something."""
        meeting, sealed = self.meeting, self.group.sealed
        ask = AskRoster(
            head=self.group.head, leader=sealed.leader, round_id=sealed.round_id, signature=sealed.signature
        )
        try:
            channel = await meeting.transport.open(peer_id, meeting.directory.maddrs(peer_id), meeting.protocol)
            try:
                meeting.count(channel)
                answer: Roster | No = await channel.request(ask, Roster, No)
                if isinstance(answer, Roster):
                    proof = self._compare(answer)
                    await channel.send(No(reason="no proof") if proof is None else Roster.of(self.group.sealed))
                    if proof is not None:
                        meeting.signatures.prove(proof)
            finally:
                channel.close()
        except RemoteError as error:
            log.debug("outer step %d: %s", self.group.step, error)
            meeting.transport.traffic.reject(error)
        self._over_s[peer_id] = now_s()

    async def show(self, channel: Channel) -> None:
        """Answers a peer that has another roster of my leader: with mine; and hears whether the two prove anything.
        Misbehaved when it says so, and they do not."""
        await channel.send(Roster.of(self.group.sealed))
        answer: Roster | No = await channel.receive(Roster, No, timeout_s=self.meeting.timeouts.request_s)
        if isinstance(answer, Roster):
            proof = self._compare(answer)
            if proof is None:
                raise Misbehaved(channel.peer_id, "sends a roster that proves nothing")
            self.meeting.signatures.prove(proof)

    def _compare(self, other: Roster) -> TwoRosters | None:
        """Returns the proof that my roster and another one make; None where they make none."""
        mine = self.group.sealed
        return proved(
            mine, other.sealed_by(mine.leader), run_id=self.meeting.directory.run_id, owner=self.meeting.owner
        )
