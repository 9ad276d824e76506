"""What a member gives its signature to, and what it takes for certified.

It signs one commit in a round, all of which it holds, and to which it does not object. Whoever tells it that a commit
is certified has to show the signatures, and these are checked here, whether it has signed that commit or not.
"""

from __future__ import annotations

import logging

from p2p_diloco.core.certificate import Taken
from p2p_diloco.core.errors import Misbehaved
from p2p_diloco.core.update import in_most_parts
from p2p_diloco.round.meeting import Meeting
from p2p_diloco.round.outcome import Missed, Settled
from p2p_diloco.round.settle_ballot import certificate_in
from p2p_diloco.round.settle_completion import COULD_NOT_FETCH, Completion
from p2p_diloco.round.settle_decide import objection_to
from p2p_diloco.wire.messages import No
from p2p_diloco.wire.round_messages import Certifies, Commit, Took, TookBefore

log = logging.getLogger(__name__)


class Pledge:
    """This member's word in a round: which commit it has signed, and which one it knows to be certified."""

    def __init__(self, meeting: Meeting, completion: Completion) -> None:
        self.meeting = meeting
        self.group = meeting.group
        self.completion = completion
        self.taken: TookBefore | None = None
        """The commit that I have signed. There is never another one in this round."""
        self.settled: Settled | None = None
        """What the round has come to, as soon as I know that it is certified."""

    def sign(self, commit: Commit) -> Took | No:
        """Returns my signature over a commit that I hold all of and do not object to; No when I have signed another one
        in this round."""
        taken = self.taken
        if taken is None:
            signature = self.what_is_taken(commit).sign(self.meeting.identity)
            taken = TookBefore(part_hashes=commit.part_hashes, state=commit.state, signature=signature)
            self.taken = taken
            self.meeting.changed.ring()
        if (taken.part_hashes, taken.state) != (commit.part_hashes, commit.state):
            return No(reason="I have signed another commit in this round")
        return Took(signature=taken.signature)

    def objection(self, commit: Commit) -> str:
        """Returns what speaks against signing a commit; empty where nothing does."""
        objection = objection_to(commit, reduced=self.meeting.reduced, state=self.meeting.state)
        if objection:
            log.warning("outer step %d: not signed: %s", self.group.step, objection)
        return objection

    def what_is_taken(self, commit: Commit) -> Taken:
        """Returns what is signed of a commit, all of which I hold."""
        link = self.group.header(commit.part_hashes).link
        full = in_most_parts([part.mask for part in self.meeting.parts if part is not None])
        return Taken(round_id=self.group.round_id, link=link, full=full, state=commit.state)

    async def certify(self, commit: Commit, certifies: Certifies, source: int) -> Settled | Missed:
        """Takes in what certifies a commit, and returns its update, after fetching the parts that I do not hold.
        Misbehaved of ``source``, a member, when it is not certified so."""
        peer_id, link = self.group.members[source].peer_id, self.group.header(commit.part_hashes).link
        certificate = certificate_in(
            certifies, self.group, state=commit.state, link=link, owner=self.meeting.owner, source=peer_id
        )
        update = await self.completion.complete(commit, source)
        if update is None:
            return Missed(reason="behind", detail=COULD_NOT_FETCH)
        if certificate.full != in_most_parts([part.mask for part in update.parts]):
            raise Misbehaved(peer_id, "sends a certificate that names other contributors than the update has")
        self.settled = Settled(update=update, certificate=certificate)
        self.meeting.changed.ring()
        return self.settled
