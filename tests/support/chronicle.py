"""What the peers of a simulated swarm did to their outer states, and what must be true of it.

Every state that any peer stood at, in any of its lives, is noted by its head. The vectors are made so that an update
tells whose inner steps are in it: for every part and peer there is one value that counts the peer's inner steps, and
one that adds up their numbers. As a contribution is an unbroken run of steps, the two name its first and its last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median_low

import numpy as np
import numpy.typing as npt

from p2p_diloco.core import known
from p2p_diloco.core.aggregate import LARGEST_WEIGHT_OVER_MEDIAN
from p2p_diloco.core.certificate import Certified, check_certificate
from p2p_diloco.core.codec import Vector
from p2p_diloco.core.codecs import decode
from p2p_diloco.core.grid import part_slices
from p2p_diloco.core.outer import OuterState
from p2p_diloco.core.records import Record
from p2p_diloco.core.roster_rules import RosterRules
from p2p_diloco.core.runfile import OnMissed
from p2p_diloco.core.swarm_head import Standing, way_of
from p2p_diloco.core.update import Update, in_most_parts
from p2p_diloco.peer.reception import ROUNDS_KEPT

MAX_PEERS = 12
PART_VALUES = 32
"""Two for each peer, and some that everybody trains."""
LARGEST_ERROR = 0.2
"""Of a count or sum read from an update: it is rounded to float32, and theta moves a little by itself."""
TOKENS = 8
"""Of an inner step."""


class Violation(Exception):
    """``invariant``: its name, one of those in ``explorer``."""

    def __init__(self, invariant: str, text: str) -> None:
        super().__init__(f"{invariant}: {text}")
        self.invariant = invariant


@dataclass(frozen=True)
class Steps:
    """Inner steps ``first``, ..., ``last`` of a peer, counted over all its lives."""

    first: int
    last: int

    def overlaps(self, other: Steps) -> bool:
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True, kw_only=True)
class Settled:
    """How a round ended at one of its members."""

    peer: int
    began_s: float
    settles_s: float
    """When it began to settle: it asks nobody before."""
    head: bytes | None
    """None: without an update."""
    heard: bool
    """It knew a commit, whether it could use it or not."""
    place: int
    """Of the leader that it was with in the end, in the order of leaders."""
    leads: bool
    """It was that leader itself."""
    decided: bool
    """And most of the group took its commit."""
    total_weight: int | None = None
    """As ``Group`` has it."""


@dataclass(eq=False)
class Chronicle:
    names: dict[str, int]
    """Peer id -> index."""
    on_missed: OnMissed = "adopt"
    largest_weight: int = 2**60
    """What a contribution may weigh at most."""
    counts: bool = True
    """Whether contributions count inner steps. Where norms are bounded they say nothing, and make a peer that has
    trained for long much louder than a newcomer."""
    liars: frozenset[int] = frozenset()
    """Peers whose inner steps nobody counts. What the others do is told here, and nothing of them."""
    digests: dict[bytes, tuple[bytes, int]] = field(default_factory=dict)
    """Head -> the digest of the state there, and the peer that was first there."""
    updates: dict[bytes, Update] = field(default_factory=dict)
    """Head -> the update that leads there."""
    certified: set[bytes] = field(default_factory=set)
    """Heads to which an update led whose certificate is sound."""
    certificates: dict[bytes, bytes] = field(default_factory=dict)
    """Round id -> the head of the update of it that is certified."""
    committed: dict[int, list[bytes]] = field(default_factory=dict)
    """Peer -> the heads that it came to by an update."""
    lost: set[bytes] = field(default_factory=set)
    """Heads that no living peer held at some time."""
    trained: dict[int, int] = field(default_factory=dict)
    """Peer -> its inner steps, over all its lives."""
    durable: dict[int, bytes] = field(default_factory=dict)
    """Peer -> the head that its disk must lead to, or past."""
    given_up: dict[bytes, int] = field(default_factory=dict)
    """Head that was put aside -> how many updates there were when this first happened."""
    rounds: dict[bytes, list[Settled]] = field(default_factory=dict)
    """Round id -> how it ended, in that order."""
    total_weights: dict[bytes, int] = field(default_factory=dict)
    """Head -> what the weighted sum of the update that leads there is divided by, in tokens, as its round agreed; where
    missed rounds are kept."""
    begun_s: dict[int, list[float]] = field(default_factory=dict)
    """Peer -> when its rounds began that have ended."""
    denied: dict[tuple[bytes, int], int] = field(default_factory=dict)
    """Round id and peer -> the last one in the order of leaders to whom it has said that it has taken no commit."""

    # -- what happens ------------------------------------------------------------------------------------------------

    def stood(self, peer: int, state: OuterState) -> None:
        """A peer stands at a state. Violation when that head meant other bytes before."""
        if state.step and state.head not in self.certified:
            raise Violation(
                "certified", f"peer {peer} stands at outer step {state.step}, to which no certificate leads"
            )
        now = state.digest()
        first, by = self.digests.setdefault(state.head, (now, peer))
        if now != first:
            raise Violation(
                "same-bytes", f"at outer step {state.step}, head {state.head.hex()[:8]}: peers {by} and {peer} differ"
            )

    def writes(self, update: Update) -> None:
        """A peer may be killed before it can say more than its disk does."""
        self.updates[update.header.head] = update

    def certifies(self, certified: Certified, rules: RosterRules) -> None:
        """A peer, honest or not, has an update with this certificate. Violation when its round, of honest members only,
        has certified another one."""
        header, history = certified.header, self.history(certified.header.parent)
        last = [self._in_most_parts(self.updates[head]) for head in reversed(history[:-1][: known.WINDOW_STEPS])]
        try:
            group = check_certificate(certified, rules, known.known_at(header.step, last))
        except ValueError:
            return
        signed = {member for member, _ in certified.certificate.signatures}
        if 2 * len(signed & group.counting) <= len(group.counting):
            return
        self.certified.add(header.head)
        first = self.certificates.setdefault(group.round_id, header.head)
        if first != header.head and not self.liars:
            raise Violation("one-outcome", f"outer step {header.step}: two updates of one round are certified")

    @staticmethod
    def _in_most_parts(update: Update) -> list[str]:
        full = int.from_bytes(in_most_parts([part.mask for part in update.parts]), "little")
        return [peer_id for i, (peer_id, _) in enumerate(update.header.contributors) if full >> i & 1]

    def commits(self, peer: int, state: OuterState, update: Update) -> None:
        self.writes(update)
        self.committed.setdefault(peer, []).append(state.head)
        self.lost.discard(state.head)
        self.stood(peer, state)
        self.durable[peer] = state.head

    def starts(self, peer: int, state: OuterState | None) -> None:
        """What a peer finds on its disk when it is started again. Violation when that is not all it had."""
        had = self.durable.get(peer)
        if had is not None and (state is None or had not in self.history(state.head)):
            raise Violation("durable", f"peer {peer} was at {had.hex()[:8]}, and its disk does not lead there any more")
        self.moves(peer, state)

    def moves(self, peer: int, state: OuterState | None) -> None:
        """A peer has loaded another state from its disk."""
        if state is not None:
            self.stood(peer, state)
            self.durable[peer] = state.head

    def gives_up(self, peer: int) -> None:
        """A peer begins to put aside a history of its own."""
        had = self.durable.pop(peer, None)
        for head in self.history(had) if had else ():
            self.given_up.setdefault(head, len(self.updates))

    def dies(self, held: Iterable[bytes]) -> None:
        """``held``: the heads at which those stand that are still alive."""
        alive = {past for head in held for past in self.history(head)}
        self.lost |= {head for heads in self.committed.values() for head in heads if head not in alive}

    def trains(self, peer: int, local: Vector, target: Vector) -> None:
        """One inner step of a peer. ``local``, ``target``: float32 [n]."""
        number = self.trained[peer] = self.trained.get(peer, 0) + 1
        for where in part_slices(len(local)):
            if self.counts:
                local[where.start + 2 * peer] += np.float32(1)
                local[where.start + 2 * peer + 1] += np.float32(number)
            rest = slice(where.start + 2 * MAX_PEERS, where.stop)
            local[rest] -= np.float32(0.1) * (local[rest] - target[rest])

    def bars(self, peer: int, other: str) -> None:
        """A peer bars another one, with a proof. Violation when that is an honest one."""
        index = self.names.get(other)
        if index is not None and index not in self.liars:
            raise Violation("no-honest-barred", f"peer {peer} has a proof that {index} has signed two of what is one")

    def denies(self, round_id: bytes, peer: int, place: int) -> None:
        """A peer tells the leader at ``place`` that it has taken no commit."""
        self.denied[round_id, peer] = max(self.denied.get((round_id, peer), -1), place)

    def settles(self, round_id: bytes, now: Settled, well_since_s: Callable[[int, int], float]) -> None:
        """A round ends at one of its members. ``well_since_s``: since when two peers have been able to talk."""
        if now.heard and now.place < self.denied.get((round_id, now.peer), -1):
            raise Violation("one-outcome", f"peer {now.peer} takes a commit after it has told a later leader of none")
        if now.head is not None and now.total_weight is not None:
            self.total_weights[now.head] = now.total_weight
        others = self.rounds.setdefault(round_id, [])
        for one in others if self.liars else ():
            well = well_since_s(one.peer, now.peer) <= min(one.began_s, now.began_s)
            if well and None not in (one.head, now.head) and one.head != now.head:
                raise Violation("one-outcome", f"peers {one.peer} and {now.peer} have two updates of one round")
        for one in others:
            for leader, member in ((now, one), (one, now)):
                if leader.peer != member.peer and leader.leads and member.head is not None:
                    apart = well_since_s(leader.peer, member.peer) > min(leader.began_s, member.began_s)
                    knew = leader is now and not self._has_forgotten(member, leader.settles_s)
                    self._check_leader(leader, member, apart=apart, knew=knew)
        others.append(now)
        self.begun_s.setdefault(now.peer, []).append(now.began_s)

    def _has_forgotten(self, member: Settled, at_s: float) -> bool:
        """Returns whether a member serves a round no more at ``at_s``: it has met in ROUNDS_KEPT later ones. A leader
        that was held up for so long hears nothing of it, and can only catch up."""
        later_s = [began_s for began_s in self.begun_s[member.peer] if member.began_s < began_s <= at_s]
        return len(later_s) >= ROUNDS_KEPT

    @staticmethod
    def _check_leader(leader: Settled, member: Settled, *, apart: bool, knew: bool) -> None:
        assert member.head is not None
        names = (
            f"peer {leader.peer}, leader {leader.place} of a round, and peer {member.peer}, with leader {member.place}"
        )
        if leader.decided and leader.head != member.head and (member.place >= leader.place or member.decided):
            raise Violation("one-outcome", f"{names}: another update than most of the group have taken")
        if apart or member.place >= leader.place:
            return
        if leader.decided and leader.head != member.head:
            raise Violation("one-outcome", f"{names}: different updates, although they could talk")
        if knew and not leader.heard:
            raise Violation(
                "one-outcome", f"{names}, who has an update that the first never heard of, although they could talk"
            )

    def follows(
        self,
        records: Sequence[Record],
        mine: Standing | None,
        before: Mapping[bytes, bytes],
        target: tuple[int, bytes] | None,
    ) -> None:
        """A peer takes ``target`` for the swarm's head. Violation where it would give up what it has committed for
        less: the others must have most of those whom it knows, or more than stand where it stands, or as many on a
        newer head, or on one as new with the smaller digest. So two halves do not change places, whoever else each of
        their members sees."""
        if mine is None or not mine.beyond_genesis or target is None:
            return
        here = way_of(mine, before)
        ways = [way_of(record, before) for record in records if record.beyond_genesis]
        there = {head for way in ways if target[1] in way for head in way[way.index(target[1]) :]}
        if target[1] in here or mine.head in there:
            return
        support = Counter(head for way in [here, *ways] for head in way)
        if any(2 * support[head] > len(ways) + 1 for head in there.difference(here)):
            return
        if (-support[target[1]], -target[0], target[1]) > (-support[mine.head], -mine.step, mine.head):
            raise Violation(
                "head-choice",
                f"outer step {mine.step}, with {support[mine.head]} of {len(ways) + 1} voters, yields to outer step "
                f"{target[0]}, with {support[target[1]]}",
            )

    # -- what must be true -------------------------------------------------------------------------------------------

    def history(self, head: bytes) -> list[bytes]:
        """The heads that lead to ``head``, newest first, as far as anybody has seen them."""
        path = [head]
        while (update := self.updates.get(path[-1])) is not None:
            path.append(update.header.parent)
        return path

    def was_replaced(self, head: bytes, by: bytes) -> bool:
        """Whether the history that leads to ``by`` had left that which leads to ``head`` before anybody gave ``head``
        up."""
        shared = set(self.history(head))
        own = [past for past in self.history(by) if past not in shared]
        return bool(own) and list(self.updates).index(own[-1]) < self.given_up.get(head, len(self.updates))

    def check_once(self, head: bytes, n: int) -> None:
        """In the history that leads to ``head``, no inner step of any peer counts twice."""
        for part in range(len(part_slices(n))):
            seen: dict[int, list[tuple[int, Steps]]] = {}
            for past in reversed(self.history(head)[:-1]):
                update = self.updates[past]
                step = update.header.step
                for peer, steps in self.contributions(update, part, n):
                    for before, others in seen.setdefault(peer, []):
                        if steps.overlaps(others):
                            raise Violation(
                                "counted-once",
                                f"part {part}: inner steps of peer {peer} are in updates {before} and {step}: {steps}",
                            )
                    if steps.last > self.trained.get(peer, 0):
                        raise Violation("counted-once", f"part {part} of update {step}: {steps} never made by {peer}")
                    seen[peer].append((step, steps))

    def contributions(self, update: Update, index: int, n: int) -> Iterator[tuple[int, Steps]]:
        """Whose inner steps are in a part of an update that was encoded without loss."""
        name, named = f"part {index} of update {update.header.step}", self._named(update, index)
        total_weight = sum(named.values()) if self.on_missed == "adopt" else self._total_weight(update, n)
        values = self._values(update, index, n) * total_weight
        for peer in (one for one in range(MAX_PEERS) if one not in self.liars):
            count, numbers = values[2 * peer : 2 * peer + 2] / named.get(peer, total_weight)
            if peer not in named:
                if abs(count) > LARGEST_ERROR:
                    raise Violation("counted-once", f"{name}: {peer} is in it, unnamed")
                continue
            steps = round(count)
            before = (numbers - steps * (steps + 1) / 2) / max(steps, 1)
            if abs(count - steps) > LARGEST_ERROR or steps < 1 or abs(before - round(before)) > LARGEST_ERROR:
                raise Violation(
                    "counted-once",
                    f"{name}: {count:.2f} steps of peer {peer} that add up to {numbers:.2f}: no unbroken run",
                )
            yield peer, Steps(round(before) + 1, round(before) + steps)

    def _named(self, update: Update, index: int) -> dict[int, int]:
        """The peers whose contributions a part says that it holds, and their weights."""
        mask = int.from_bytes(update.parts[index].mask, "little")
        return {self.names[p]: weight for i, (p, weight) in enumerate(update.header.contributors) if mask >> i & 1}

    @staticmethod
    def _values(update: Update, index: int, n: int) -> npt.NDArray[np.float64]:
        where = part_slices(n)[index]
        return -decode(update.parts[index].data, where.stop - where.start, "fp32").astype(np.float64)

    def _total_weight(self, update: Update, n: int) -> int:
        """Where missed rounds are kept, an update does not say how many were absent. Its round does, and the values
        must bear it out: nobody's count is larger than its weight says, and somebody's is as large. They do not tell it
        by themselves: a weight that is cut to the largest one does not say how large the count is, and after a long
        time without a round all of them may be."""
        weights = [weight for _, weight in update.header.contributors]
        usual = median_low(weights)
        limit = min(LARGEST_WEIGHT_OVER_MEDIAN * usual, self.largest_weight)
        total_weight = self.total_weights.get(update.header.head, 0)  # of no round: 0, which nothing explains
        steps_per_claimed = [
            self._values(update, index, n)[2 * peer] * total_weight / weight / (weight / TOKENS)
            for index in range(len(update.parts))
            for peer, weight in self._named(update, index).items()
            if weight < limit
        ]
        largest = max(steps_per_claimed, default=1.0)
        absent, rest = divmod(total_weight - sum(weights), usual)
        if rest or not 0 <= absent < MAX_PEERS or abs(largest - 1) >= 1 / (4 * MAX_PEERS):
            raise Violation(
                "counted-once",
                f"update {update.header.step}: no number of absent peers explains its values"
                f", divided by {total_weight}",
            )
        return total_weight
