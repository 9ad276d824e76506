"""What a leader answers to each member that gives it a receipt: its decision, and in the end whether that is certified.

A member's receipt is checked here, and its signature by the ballot.
"""

from __future__ import annotations

from p2p_diloco.core.errors import Misbehaved, RemoteError
from p2p_diloco.core.waiting import now_s
from p2p_diloco.round.settle_ballot import certifies
from p2p_diloco.round.settle_decide import Decision, answer_to_receipt, receipt_fits
from p2p_diloco.round.settle_eta import beyond_etas, keep_waiting
from p2p_diloco.round.settle_leader import Leader
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.messages import No
from p2p_diloco.wire.round_messages import Again, Certifies, Commit, Eta, Receipt, Took


class LeaderAnswers:
    """Serves the streams on which members give their receipts."""

    def __init__(self, leader: Leader) -> None:
        self.leader = leader
        self.member = leader.member
        self.meeting = leader.meeting
        self.group = leader.group

    async def on_receipt(self, channel: Channel, sender: int, receipt: Receipt) -> None:
        """Takes a member's receipt, and tells the member what I decide as soon as I lead and have decided; then takes
        its signature, and tells it when the commit is certified. When the member fails before that, its receipt does
        not count any more; one that it has given meanwhile on a second stream does, if all that it did was to fail."""
        meeting = self.meeting
        try:
            while True:
                newest, n_parts = max(self.member.butterflies), len(meeting.parts)
                if not receipt_fits(receipt, self.group, me=meeting.me, newest=newest, n_parts=n_parts):
                    raise Misbehaved(channel.peer_id, "sends a receipt that does not fit the round")
                self.leader.hearing.receipts[sender] = receipt
                meeting.changed.ring()
                answer = await self._decided(channel, sender, receipt.number)
                await channel.send(answer)
                if not isinstance(answer, Again):
                    break
                patience_s = meeting.timeouts.reduced_part_s + meeting.timeouts.settle_s
                receipt = await channel.receive(Receipt, timeout_s=patience_s)
            if isinstance(answer, Commit):
                await self._hear_signature(channel, sender)
                await channel.send(await self._last_word(channel))
        except RemoteError as error:
            receipts = self.leader.hearing.receipts
            if isinstance(error, Misbehaved) or receipts.get(sender, receipt) is receipt:
                receipts.pop(sender, None)
                meeting.lose(sender, error)
            raise

    async def _decided(self, channel: Channel, sender: int, number: int) -> Decision:
        """Returns what a member is told about its receipt of butterfly ``number``. Until there is something to tell, it
        hears every ``Timeouts.heartbeat_s`` that I am still here."""
        meeting, every_s = self.meeting, self.meeting.timeouts.heartbeat_s
        next_word_s = now_s() + every_s
        while True:
            changed, settled, decision = meeting.changed.event, self.member.pledge.settled, self.leader.decision
            applied = None if settled is None else settled.commit(meeting.me)
            answer = answer_to_receipt(sender, number, decision=decision, applied=applied, over=meeting.over)
            if answer is not None:
                return answer
            next_word_s = await keep_waiting(channel, changed, next_word_s, every_s)

    async def _hear_signature(self, channel: Channel, sender: int) -> None:
        """Takes a member's signature over the commit that I gave it, which it may have to complete first."""
        request_s = self.meeting.timeouts.request_s
        first: Eta | Took | No = await channel.receive(Eta, Took, No, timeout_s=request_s)
        word: Took | No = await beyond_etas(channel, first, Took, No, timeout_s=request_s)
        if self.leader.ballot is not None:
            self.leader.ballot.hear(sender, word)

    async def _last_word(self, channel: Channel) -> Certifies | No:
        """Returns what a member is told in the end about the commit that I gave it. It hears every
        ``Timeouts.heartbeat_s`` that I am still here."""
        meeting, every_s = self.meeting, self.meeting.timeouts.heartbeat_s
        next_word_s = now_s() + every_s
        while True:
            changed, settled = meeting.changed.event, self.member.pledge.settled
            if settled is not None:
                return certifies(settled.certificate)
            if isinstance(self.leader.decision, No):
                return self.leader.decision
            if meeting.over:
                return No(reason="the round is over")
            next_word_s = await keep_waiting(channel, changed, next_word_s, every_s)
