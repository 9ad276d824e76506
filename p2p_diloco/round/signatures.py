"""What the members of a round have signed, as far as this member has seen it, and whether anything may come of the
round.

Every signature that was found good is noted here. A member that has signed two commits is barred with both of them. The
round goes on without its word, unless it is void: when two of its updates are certified, or its leader has signed
another roster as well, nobody can tell which members the other half of it will follow.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

from p2p_diloco.core.barred import Barred
from p2p_diloco.core.certificate import Taken
from p2p_diloco.core.equivocation import Proof, TwoLinks, TwoRosters
from p2p_diloco.core.group import Group

log = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class Signatures:
    """The members' signatures in one round."""

    group: Group
    owner: str
    """The peer id of the run's, against whom nothing is proved."""
    barred: Barred
    void: str = ""
    """Why nothing may come of the round; empty where something may."""
    voided: asyncio.Event = field(default_factory=asyncio.Event)
    _first: dict[int, tuple[Taken, bytes]] = field(default_factory=dict)
    """Member -> the first commit that it was seen to have signed, and its signature."""

    def note(self, member: int, taken: Taken, signature: bytes) -> bool:
        """Notes a good signature. Returns False where the member has signed another commit before; it is barred
        now."""
        first, one = self._first.setdefault(member, (taken, signature))
        peer_id = self.group.members[member].peer_id
        if first.link == taken.link or peer_id in (self.owner, self.barred.me):
            return True
        self.barred.add(TwoLinks(peer_id=peer_id, taken=(first, taken), signatures=(one, signature)))
        return False

    def note_all(self, taken: Taken, signatures: Iterable[tuple[int, bytes]]) -> None:
        """Notes the signatures of a certificate, all of which are good."""
        for member, signature in signatures:
            self.note(member, taken, signature)

    def prove(self, proof: TwoRosters) -> None:
        """Bars the leader that has gathered this round, for it has gathered another one as well: the round is void."""
        self.barred.add(proof)
        self.end(told(proof))

    def end(self, reason: str) -> None:
        """Makes the round void."""
        if not self.void:
            self.void = reason
            log.warning("outer step %d: the round is void: %s", self.group.step, reason)
        self.voided.set()


def told(proof: Proof) -> str:
    """Returns what people are told of a proof."""
    return f"peer {proof.peer_id[-8:]} signed {proof.what}"
