"""The peers that a peer may form a round with, as it sees the swarm: which ranks first, which has failed it, and where
they are."""

from __future__ import annotations

from dataclasses import dataclass, field

from p2p_diloco.core.errors import Misbehaved
from p2p_diloco.core.manifest import RunManifest
from p2p_diloco.core.records import Record
from p2p_diloco.core.roster import Readiness, leader_order, open_readiness
from p2p_diloco.core.swarm_head import must_catch_up, swarm_head, way_of
from p2p_diloco.core.waiting import now_s
from p2p_diloco.round.here import Here
from p2p_diloco.wire.messages import Ready

CHANCES = 2
"""After so many failures on one head a leader is asked no more there. Not after the first, for it may just have been
stopped, and others may be with it again."""
MAX_GATHER_EXTENSION_S = 30.0
"""So much longer than the manifest's ``round.gather_s`` a gathering may wait for a peer in the middle of a long inner
step."""


@dataclass(kw_only=True, eq=False)
class Company:
    """What a peer knows of the others when it forms a round. It decides which of them lead, and how long a round may be
    waited for."""

    here: Here
    manifest: RunManifest
    failures: dict[tuple[bytes, str], list[float]] = field(default_factory=dict)
    """(head, peer id) -> loop times until which each failure of this leader there counts; of my head only."""

    @property
    def me(self) -> str:
        """My peer id."""
        return self.here.peer_id

    def leaders(self, head: bytes) -> list[str]:
        """Returns the peers that may lead on ``head``, in the order in which they are asked: all live trainers there
        that can be dialled, by rank, without those that have failed me there. I am one of them, unless in client
        mode."""
        expected = self.here.directory.expected(self.here.wall_s())
        order = leader_order(expected, head, self.me, self.here.seat.client_mode)
        return [peer_id for peer_id in order if self.is_fit(head, peer_id)]

    def failed(self, head: bytes, leader: str, *, lied: bool = False) -> None:
        """Notes that a peer has failed me as the leader on ``head``. It counts for ``Timeouts.record_life_s``, and as
        CHANCES failures when it ``lied``."""
        until_s = now_s() + self.here.timeouts.record_life_s
        self.failures.setdefault((head, leader), []).extend([until_s] * (CHANCES if lied else 1))

    def is_fit(self, head: bytes, leader: str) -> bool:
        """Returns whether a peer may still lead me on ``head``: it has failed me there less often than CHANCES."""
        return sum(until_s > now_s() for until_s in self.failures.get((head, leader), ())) < CHANCES

    def forget_failures(self, head: bytes) -> None:
        """Forgets which leaders have failed me on any other head."""
        self.failures = {which: until_s for which, until_s in self.failures.items() if which[0] == head}

    def learn(self, source: str, sealed: bytes) -> Record | None:
        """Takes in a record that ``source`` has sent, as ``Directory.learn`` does, and returns the newest one of its
        peer. Misbehaved of ``source`` when the record is not sound."""
        try:
            return self.here.directory.learn(sealed, self.here.wall_s())
        except ValueError as error:
            raise Misbehaved(source, f"sends {error}") from error

    def learn_own(self, source: str, sealed: bytes) -> Record | None:
        """Takes in a record as ``learn`` does; it has to be that of ``source`` itself."""
        try:
            return self.here.directory.learn_from(source, sealed, self.here.wall_s())
        except ValueError as error:
            raise Misbehaved(source, f"sends {error}") from error

    def readiness_of(self, source: str, message: Ready) -> Readiness:
        """Takes in what a peer sends that is ready, and returns its readiness. Misbehaved unless all is its own, sound,
        and of this run."""
        try:
            readiness = open_readiness(message.readiness)
        except ValueError as error:
            raise Misbehaved(source, f"sends {error}") from error
        self.learn_own(source, message.record)
        if readiness.peer_id != source or readiness.run_id != self.manifest.run_id:
            raise Misbehaved(source, "sends somebody else's readiness")
        if readiness.weight > self.manifest.spec.max_weight_tokens:
            raise Misbehaved(source, f"claims a weight of {readiness.weight} tokens")
        return readiness

    def beyond(self, head: bytes) -> bytes | None:
        """Returns the sealed record of a peer that stands beyond ``head``, or None while groups are formed on ``head``.
        None are formed there any more when I have left it, or when the swarm has, by the rule of ``swarm_head``."""
        directory, seat = self.here.directory, self.here.seat
        voters, standing, before = directory.believed(self.here.wall_s()), seat.standing, directory.before
        if head != standing.head:
            return seat.sealed_record
        target = swarm_head(voters, standing, before)
        if target is None or not must_catch_up(standing, target):
            return None
        there = (record.peer_id for record in voters if target[1] in way_of(record, before))
        return next(filter(None, map(directory.sealed, there)), None)

    def longest_s(self, *, busy: bool) -> float:
        """Returns the longest time that a gathering may last, in seconds: the manifest's ``round.gather_s`` and
        MAX_GATHER_EXTENSION_S. ``busy``: with the time for a peer to end another round first, which is
        ``Timeouts.round_limit_s`` of two vectors of float32."""
        longest_s = self.manifest.spec.round.gather_s + MAX_GATHER_EXTENSION_S
        return longest_s + self.here.timeouts.round_limit_s(8 * self.manifest.n_params) if busy else longest_s
