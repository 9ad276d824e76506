"""The peers that a peer may form a round with, as it sees the swarm: which ranks first, which has failed it, and where
they are.

Others cost time when they fail: when they do not answer, do not come when they said, lead badly, or come to a round and
contribute nothing. What a peer has cost is remembered (``core.credit``), in two accounts: ``waits`` for what was waited
for in vain while a round gathers, ``rounds`` for rounds that it led or was in and failed. Who says that it is busy with
another round is waited for out of the one that has less left, or each identity would cost twice its credit. Views of
this differ between honest peers. So they decide who is asked first, and for how long, but not who leads: whoever finds
others at a leader goes there, too, unless that one has failed it twice on this very head.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace

from p2p_diloco.core.admission import Lapsed, votes
from p2p_diloco.core.credit import Credit
from p2p_diloco.core.errors import Misbehaved, Refused
from p2p_diloco.core.findings import Findings
from p2p_diloco.core.group import Group, open_roster
from p2p_diloco.core.manifest import RunManifest
from p2p_diloco.core.recent import Recent
from p2p_diloco.core.records import Record, open_record
from p2p_diloco.core.roster import (
    Readiness,
    has_place,
    leader_order,
    on_head,
    open_readiness,
    precedence,
    rank,
)
from p2p_diloco.core.roster_rules import RosterRules
from p2p_diloco.core.swarm_head import must_catch_up, swarm_head, way_of
from p2p_diloco.core.waiting import now_s
from p2p_diloco.round.helper import Helper
from p2p_diloco.round.here import Here
from p2p_diloco.round.measured import Measured
from p2p_diloco.wire.round_messages import Ready, Roster

CHANCES = 2
"""After so many failures on one head a leader is asked no more there. Not after the first, for it may just have been
stopped, and others may be with it again."""
CLOSING_MARGIN_S = 1.0
"""A leader waits this much longer than a peer said that it needs."""
MAX_GATHER_EXTENSION_S = 30.0
"""So much longer than the manifest's ``round.gather_s`` a gathering may wait for a peer in the middle of a long inner
step."""


@dataclass(kw_only=True, eq=False)
class Company:
    """Holds what a peer knows of the others when it forms a round. It decides which of them lead, and how long a round
    may be waited for."""

    here: Here
    manifest: RunManifest
    failures: dict[str, list[tuple[bytes, float]]] = field(default_factory=dict)
    """Peer id -> (head, loop time until which it counts) of each time that it failed me as a leader."""
    waits: Credit = field(init=False)
    """What each peer may still be waited for in vain while rounds gather."""
    rounds: Credit = field(init=False)
    """What each peer may still cost as a leader, and as a member that contributes nothing or answers late."""
    findings: Findings = field(default_factory=Findings)
    """What was found of peers as reducers."""
    lapsed: dict[str, float] = field(default_factory=dict)
    """Peer that I lost in a round, and that has not contributed in full to one since -> loop time of the last loss."""

    measured: Measured = field(default_factory=Measured)
    """How fast others send."""
    recent: Recent = field(default_factory=Recent)
    """How long others have kept me waiting in recent rounds."""

    def __post_init__(self) -> None:
        life_s = self.here.timeouts.record_life_s
        self.waits, self.rounds = Credit(life_s), Credit(life_s)
        self.rules = RosterRules.of(self.manifest)
        self.helper = Helper(here=self.here, rules=self.rules)

    @property
    def me(self) -> str:
        """Returns my peer id."""
        return self.here.peer_id

    def leaders(self, head: bytes, vouched: Collection[str] = ()) -> list[str]:
        """Returns the peers that may lead on ``head``, in the order in which they are asked: all live trainers there
        that can be dialled by most and by me, by rank, without those that have failed me there. I am one of them, if I
        train, unless in client mode. Those that I do not trust come last, but the ``vouched`` ones, which others name
        as their leader. Where there is nobody, the seed that helps leads, and first of all where it comes first
        (``Helper.comes_first``)."""
        expected = self.here.directory.expected(self.here.wall_s())
        seat = self.here.seat
        ways = replace(seat.ways, client_mode=seat.client_mode or not seat.role_trainer)
        order = leader_order(expected, head, self.here.claim, ways, seat.known, self.rules.least_known)
        fit = [peer_id for peer_id in order if self.is_fit(head, peer_id)]
        first = {peer_id for peer_id in fit if peer_id == self.me or peer_id in vouched or self.is_trusted(peer_id)}
        fit = sorted(fit, key=lambda peer_id: peer_id not in first)
        if fit and not self.helper.comes_first():
            return fit
        return [*self.leading_helper(head), *fit]

    def leading_helper(self, head: bytes) -> list[str]:
        """Returns the seed of the run's owner, if it is on ``head`` and may lead me there; else nobody."""
        owner = self.rules.owner
        return [owner] if self.helper.is_on(head) and (self.me == owner or self.is_fit(head, owner)) else []

    def may_lead(self, record: Record, head: bytes) -> bool:
        """Returns whether a peer may lead on ``head`` at all, where its record has it: it trains there, or helps."""
        return bool(on_head([record], head)) or record.peer_id in self.leading_helper(head)

    def precedes(self, head: bytes, one: str, other: str) -> bool:
        """Returns whether one peer comes before another one, as a leader on ``head``. The seed that helps comes after
        all trainers, or before them where ``Helper.comes_first`` says so."""
        helper, known = self.leading_helper(head), self.here.seat.known
        if one in helper or other in helper:
            return one in helper if self.helper.comes_first() else other in helper
        return precedence(head, one, known) < precedence(head, other, known)

    def lacks_witness(self, members: Collection[Readiness]) -> bool:
        """Returns whether an update of these members would need the witness of the run's owner, who is not there."""
        owner, known = self.rules.owner, self.here.seat.known.peers
        enough = votes(member for member in members if member.peer_id in known) >= self.rules.least_known
        if enough or owner in (self.me, *(member.peer_id for member in members)):
            return False
        return all(record.peer_id != owner for record in self.here.live())

    def is_trusted(self, leader: str) -> bool:
        """Returns whether a peer is asked to lead in the order of its rank: it is proven, has failed no lead within
        ``Timeouts.record_life_s``, on whatever head, is not in debt, was not found to reduce wrongly, and has at least
        half of its credit left for what was waited for it in vain: who does not come when it said does not lead first
        either."""
        now = now_s()
        recent = any(until_s > now for _, until_s in self.failures.get(leader, ()))
        keeps_its_word = self.waits.is_good(leader, now) and not self.is_idle(leader)
        sound = keeps_its_word and not self.is_wrong(leader)
        return leader in self.here.directory.proven and not recent and sound

    def left_s(self, peer_id: str) -> float:
        """Returns the seconds that a peer may still be waited for that says it is busy with another round: what it has
        left in the account that has less."""
        return min(self.waits.left_s(peer_id, now_s()), self.rounds.left_s(peer_id, now_s()))

    def is_wrong(self, peer_id: str) -> bool:
        """Returns whether a peer was found to reduce wrongly."""
        return self.findings.is_wrong(peer_id, self.here.seat.standing.step)

    def failed(self, head: bytes, leader: str, *, cost_s: float, lied: bool = False) -> None:
        """Notes that a peer has failed me as the leader on ``head``, which has cost ``cost_s``. It counts for
        ``Timeouts.record_life_s``, and as CHANCES failures when it ``lied``."""
        until_s = now_s() + self.here.timeouts.record_life_s
        self.failures.setdefault(leader, []).extend([(head, until_s)] * (CHANCES if lied else 1))
        self.rounds.charge(leader, cost_s, now_s())

    def kept_waiting(self, peer_id: str, waited_s: float) -> None:
        """Notes that a member, or a known peer beside the round, has kept me waiting so long at the end of a round that
        was committed all the same."""
        self.rounds.charge(peer_id, waited_s, now_s())

    def is_fit(self, head: bytes, leader: str) -> bool:
        """Returns whether a peer may still lead me on ``head``: it has failed me there less often than CHANCES."""
        failures = self.failures.get(leader, ())
        return sum(where == head and until_s > now_s() for where, until_s in failures) < CHANCES

    def forget_failures(self) -> None:
        """Forgets failures of leaders that count no more."""
        counting = {
            leader: [(head, until_s) for head, until_s in failures if until_s > now_s()]
            for leader, failures in self.failures.items()
        }
        self.failures = {leader: failures for leader, failures in counting.items() if failures}

    def expected_on(self, head: bytes) -> frozenset[str]:
        """Returns the peers that a round which gathers on ``head`` now has to wait for, as far as I can know."""
        around = on_head(self.here.directory.expected(self.here.wall_s()), head)
        return frozenset(record.peer_id for record in around if self.is_waited_for(record.peer_id))

    def judge_gathering(self, group: Group, expected: Collection[str], took_s: float) -> None:
        """Notes how long I have waited for a roster that somebody else made. It was for those of the ``expected`` that
        are not in it although it has a place for them, as far as I can know, wherever they stand by now: what one peer
        costs all shall not be charged by one leader after another."""
        known, limits = self.here.seat.known, self.manifest.spec.round
        for peer_id in set(expected).difference(member.peer_id for member in group.members):
            takes_in = has_place(peer_id, group.trainers, limits.max_group, known, self.rules.least_known)
            if takes_in and not self.is_idle(peer_id):
                self.waits.charge(peer_id, took_s, now_s())

    def judge_round(self, lost: Collection[str], others: int, took_s: float, contributed: Iterable[str]) -> None:
        """Notes what became of a round with so many ``others``: whom I ``lost`` while it was reduced, and who has
        contributed to every part. Who is lost later may only have waited for others, too, so that is not held against
        it. The round's time is taken from the credit of the lost; but whoever loses all others has most likely been
        cut off itself."""
        if len(lost) < others:
            for peer_id in lost:
                self.rounds.charge(peer_id, took_s, now_s())
        known = {record.peer_id for record in self.here.directory.current(self.here.wall_s())} - set(contributed)
        kept = {peer_id: at_s for peer_id, at_s in self.lapsed.items() if peer_id in known}
        self.lapsed = kept | dict.fromkeys(lost, now_s())

    def is_idle(self, peer_id: str) -> bool:
        """Returns whether a peer shall be in no roster as long as others are enough: I lost it in a round within
        ``Timeouts.record_life_s``, or it is in debt for rounds."""
        lapsed_s = self.lapsed.get(peer_id)
        lately = lapsed_s is not None and now_s() < lapsed_s + self.here.timeouts.record_life_s
        return lately or self.rounds.in_debt(peer_id, now_s())

    def is_waited_for(self, peer_id: str) -> bool:
        """Returns whether a round waits for a peer that is not ready: it is proven, and in no debt."""
        return peer_id in self.here.directory.proven and self.is_believed(peer_id)

    def waits_until_s(self, peer_id: str, opened_s: float, *, busy: bool) -> float:
        """Returns the latest loop time until which a round that opened at ``opened_s`` waits for a peer that has
        answered. ``busy``: it says that it is in another one, which counts where that could make a second history."""
        if not self.is_waited_for(peer_id):
            return opened_s
        left_s = self.left_s(peer_id) if busy else self.waits.left_s(peer_id, now_s())
        if busy and self._could_certify(peer_id) and left_s >= self.waits.full_s / 2:
            return opened_s + self.longest_s(busy=True)
        extension_s = max(min(left_s, MAX_GATHER_EXTENSION_S), CLOSING_MARGIN_S)
        return opened_s + self.manifest.spec.round.gather_s + extension_s

    def _could_certify(self, peer_id: str) -> bool:
        """Returns whether an update of another round that a peer is in could be certified on my head without whoever
        is here: no update is without known members, where enough of them are known. Where too few are, the run's owner
        witnesses one update of a head, so nobody has to wait for the other round."""
        known = self.here.seat.known.peers
        return peer_id in known and len(known) >= self.rules.least_known

    def is_believed(self, peer_id: str) -> bool:
        """Returns whether a peer's word counts about which leader it waits for. It does when I have lost it once: two
        sides of a network that was cut have lost each other."""
        return not self.waits.in_debt(peer_id, now_s()) and not self.rounds.in_debt(peer_id, now_s())

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
        if readiness.leader != self.me:
            raise Misbehaved(source, "sends a readiness for another leader")
        if readiness.weight > self.manifest.spec.max_weight_tokens:
            raise Misbehaved(source, f"claims a weight of {readiness.weight} tokens")
        try:
            self.here.directory.admission.invitation_of(readiness)
        except ValueError as error:
            raise Misbehaved(source, f"sends a readiness of {error}") from error
        return readiness

    def group_of(self, leader: str, roster: Roster) -> Group:
        """Returns the group of a roster that ``leader`` has sent. Misbehaved when the roster is not sound; Refused
        where a seat in it has lapsed, or somebody in it is barred, for its leader may not have heard of that."""
        if leader in self.here.directory.barred:
            raise Refused(leader, "it is barred")
        try:
            group = open_roster(roster.sealed_by(leader), self.rules, self.here.seat.known)
        except ValueError as error:
            raise Misbehaved(leader, f"sends {error}") from error
        admission, away = self.here.directory.admission, [open_record(one) for one in roster.absent]
        try:
            admission.check_roster(group.members, away, now_s=self.here.wall_s(), step=group.step)
        except Lapsed as error:
            raise Refused(leader, f"its roster has {error}") from error
        return group

    def with_places(self, head: bytes, ready: Iterable[bytes], around: Iterable[Record] = ()) -> set[str]:
        """Returns the ids of the peers that a round on ``head`` has places for: of those that are ``ready``, in the
        order of rank, and then of those ``around``."""
        members = sorted(map(open_readiness, ready), key=lambda member: rank(head, member.peer_id))
        admission, step = self.here.directory.admission, self.here.seat.standing.step
        return admission.within_places([*members, *around], now_s=self.here.wall_s(), step=step)

    def beyond(self, head: bytes) -> bytes | None:
        """Returns the sealed record of a peer that stands beyond ``head``, or None while groups are formed on ``head``.
        None are formed there any more when I have left it, or when the swarm has, by the rule of ``swarm_head``."""
        directory, seat = self.here.directory, self.here.seat
        standing, before = seat.standing, directory.before
        if head != standing.head:
            return seat.sealed_record
        voters, mine = self.here.voters()
        target = swarm_head(voters, mine, before)
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

    def patience_s(self, leader: str, *, busy: bool) -> float:
        """Returns how long a leader may keep me waiting for a roster, in seconds: CLOSING_MARGIN_S longer than a
        gathering may last, for I would else leave when the roster is on its way. ``busy``: it says that it is in
        another round, or waits for one; then it may take what credit it has left in addition, where that round could
        make a second history."""
        left_s = max(self.left_s(leader), 0.0) if busy and self._could_certify(leader) else 0.0
        return min(self.longest_s(busy=False) + left_s, self.longest_s(busy=True)) + CLOSING_MARGIN_S
