"""The group of a round: what follows from a roster that its leader signed, and from the ledger, for whoever reads it.

A roster is believed only as far as its members signed it themselves, for the very leader that signed the whole. Members
check it before they meet, and whoever takes the update later checks it again, beside the certificate.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

from p2p_diloco.core.admission import counts_as, votes
from p2p_diloco.core.aggregate import Aggregation
from p2p_diloco.core.digest import digest
from p2p_diloco.core.identity import MAX_PEER_ID_CHARS, SIGNATURE_BYTES, Identity, verify
from p2p_diloco.core.known import Known, most_unknown
from p2p_diloco.core.reach import fit_to_average, reaches
from p2p_diloco.core.records import MAX_RECORD_BYTES
from p2p_diloco.core.roster import Readiness, counted_weights, open_readiness, rank
from p2p_diloco.core.roster_rules import RosterRules, check_absent, check_helper, check_members
from p2p_diloco.core.shares import deal, part_counts
from p2p_diloco.core.update import UpdateHeader, bits_of
from p2p_diloco.core.uplinks import counted_uplinks

ROSTER_CONTEXT = b"p2p-diloco roster\0"
MAX_MEMBERS = 128
MAX_ABSENT = 64
"""Absent peers in one roster."""


@dataclass(frozen=True, kw_only=True)
class SealedRoster:
    """A roster as the leader that gathered it has signed it. Two of one leader with the same readiness of its own in
    them are a proof that it lies (``equivocation``)."""

    leader: str
    """The peer id of who gathered it. It need be no member: its trainer may not have been ready."""
    members: tuple[bytes, ...]
    """The sealed readiness of every member, in the order of rank."""
    absent: tuple[bytes, ...]
    """Sealed records of trainers on this head that do not come, in a run that keeps missed rounds."""
    signature: bytes
    idle: tuple[int, ...] = ()
    """Indices of members that neither reduce nor lead in this round, rising, because of what the leader has found of
    them: at most half of those that would."""

    @cached_property
    def round_id(self) -> bytes:
        """Returns 32 bytes that name the round."""
        return round_id_of(self.leader, self.members, self.absent, self.idle)

    def pack(self) -> list[Any]:
        """Returns the roster as plain values, which are packed."""
        return [self.leader, list(self.members), list(self.absent), self.signature, list(self.idle)]

    @classmethod
    def unpack(cls, values: Any) -> SealedRoster:
        """Returns the roster that these values are; no field is checked. TypeError or ValueError where they are
        none."""
        leader, members, absent, signature, idle = values
        return cls(leader=leader, members=tuple(members), absent=tuple(absent), signature=signature, idle=tuple(idle))

    @property
    def is_signed(self) -> bool:
        """Returns whether its leader has signed it."""
        return is_roster_signed(self.leader, self.round_id, self.signature)

    def is_sound(self) -> bool:
        """Returns whether every field is of its type and size. Nothing is verified."""
        pieces = (*self.members, *self.absent)
        return (
            type(self.leader) is str
            and 0 < len(self.leader) <= MAX_PEER_ID_CHARS
            and len(self.members) <= MAX_MEMBERS
            and len(self.absent) <= MAX_ABSENT
            and all(type(piece) is bytes and len(piece) <= MAX_RECORD_BYTES for piece in pieces)
            and all(type(i) is int and 0 <= i < len(self.members) for i in self.idle)
            and all(earlier < later for earlier, later in pairwise(self.idle))
            and type(self.signature) is bytes
            and len(self.signature) == SIGNATURE_BYTES
        )


def round_id_of(leader: str, members: Sequence[bytes], absent: Sequence[bytes], idle: Sequence[int]) -> bytes:
    """Returns the id of the round that ``leader`` forms of these members."""
    return digest(b"round", leader.encode(), *members, b"absent", *absent, b"idle", bytes(idle))


def is_roster_signed(leader: str, round_id: bytes, signature: bytes) -> bool:
    """Returns whether ``leader`` has signed the roster of this round."""
    return verify(leader, ROSTER_CONTEXT + round_id, signature)


def seal_roster(
    members: Sequence[bytes], absent: Sequence[bytes], leader: Identity, idle: Sequence[int] = ()
) -> SealedRoster:
    """Returns a roster as ``leader`` signs it. ``idle``: as in ``SealedRoster``."""
    return SealedRoster(
        leader=leader.peer_id,
        members=tuple(members),
        absent=tuple(absent),
        signature=leader.sign(ROSTER_CONTEXT + round_id_of(leader.peer_id, members, absent, idle)),
        idle=tuple(idle),
    )


@dataclass(frozen=True, kw_only=True)
class Group:
    """The members of a round, in the order of rank, and everything about the round that follows from the roster and
    the ledger alone."""

    sealed: SealedRoster
    step: int
    head: bytes
    members: tuple[Readiness, ...]
    """The trainers in the order of rank, and then the owner's seed, if it helps them."""
    weights: tuple[int, ...]
    """Of the trainers, in tokens, at most ``Aggregation.largest_weight`` times the group's median: a false claim gains
    little."""
    total_weight: int | None
    """What the weighted sum of the contributions is divided by, in tokens. None: by the weights of those that come in
    time."""
    aggregation: Aggregation
    """The run's rule for the mean of a part."""
    counting: frozenset[int]
    """Indices of the members that lead and reduce: the known ones; all, where these are too few."""
    needs_witness: bool
    """Too few members are known: the certificate needs the signature of the run's owner."""

    @property
    def round_id(self) -> bytes:
        """Returns 32 bytes that name the round."""
        return self.sealed.round_id

    @property
    def leader(self) -> int:
        """Returns the index of the member that settles the round."""
        return self.leaders[0]

    @cached_property
    def leaders(self) -> tuple[int, ...]:
        """Returns the indices of the members that settle the round, one after the other fails: those that reduce, the
        ones first that most members reach, by rank where as many do."""
        return tuple(sorted(self.reducers, key=lambda i: -len(self.reaching(i))))

    @property
    def reducers(self) -> tuple[int, ...]:
        """Returns the indices of the members that reduce, by rank."""
        return self.reducers_among(range(len(self.members)))

    def reaching(self, member: int) -> frozenset[int]:
        """Returns the indices of the members that have a family over which they dial this one, itself left out."""
        others = (i for i in range(len(self.members)) if i != member)
        return frozenset(i for i in others if reaches(self.members[i], self.members[member]))

    def reached_by(self, member: int) -> frozenset[int]:
        """Returns the indices of the members for which this one has a family over which it dials them, itself left
        out."""
        others = (i for i in range(len(self.members)) if i != member)
        return frozenset(i for i in others if reaches(self.members[member], self.members[i]))

    def reducers_among(self, members: Sequence[int]) -> tuple[int, ...]:
        """Returns the indices of those of ``members`` that reduce for them: all that count and can be dialled, by most
        of those that contribute (``fit_to_average``), and then the seed that helps; all that count, when there is none
        of these; all, when none counts. Of these, those that the roster does not leave idle, when there are any."""
        return _reducers(self.members, self.counting, self.sealed.idle, members)

    @cached_property
    def uplinks(self) -> tuple[int, ...]:
        """Returns what the uplink of each member counts as, in bytes/s, by what those that certify say of the others
        (``uplinks``)."""
        said = {i: self.members[i].uplinks for i in self.voting}
        return counted_uplinks(self.head, [member.peer_id for member in self.members], said, self.reducers)

    def shares_among(self, members: Sequence[int], parts: Sequence[int]) -> dict[int, list[int]]:
        """Returns which of ``parts`` each of those reduces that reduce for ``members``, by their uplinks: who is slow
        may reduce nothing."""
        reducers = self.reducers_among(members)
        counts = part_counts([self.uplinks[i] for i in reducers], len(members), len(parts))
        return deal(reducers, counts, parts)

    @property
    def trainers(self) -> tuple[Readiness, ...]:
        """Returns the members without the seed that helps them."""
        return self.members[: len(self.weights)]

    @property
    def helper(self) -> str:
        """Returns the peer id of the seed that leads and reduces for the trainers; empty where none does."""
        return self.members[-1].peer_id if self.members[-1].helps else ""

    def n_trainers(self, members: Iterable[int]) -> int:
        """Returns how many of these members are trainers."""
        return sum(not self.members[i].helps for i in members)

    @cached_property
    def voting(self) -> frozenset[int]:
        """Returns the indices of the members that certify: of those that count all, but of each token only the first.
        Could each of them sign for their token, two of them might sign two updates of one round without a lie."""
        first: dict[str, int] = {}
        for i in sorted(self.counting):
            first.setdefault(counts_as(self.members[i]), i)
        return frozenset(first.values())

    def is_most(self, members: Collection[int]) -> bool:
        """Returns whether these members are most of those that certify."""
        return 2 * len(self.voting.intersection(members)) > len(self.voting)

    def lacks_most(self, senders: bytes) -> bool:
        """Returns whether a part to which only the members of this mask have sent lacks most of those that count and
        contribute. Whom of the senders the run's rule then leaves out makes no difference."""
        due = {i for i in self.counting if not self.members[i].dropped}
        return 2 * len(due.intersection(bits_of(senders))) < len(due)

    def may_have_made(self, mask: bytes, senders: bytes) -> bool:
        """Returns whether a part with this mask may be what the run's rule makes of what these senders have sent. It
        leaves out nobody, or a minority where enough have sent; whether the right ones only an audit tells."""
        inside, sent = set(bits_of(mask)), set(bits_of(senders))
        if len(sent) < self.aggregation.leaves_out_from:
            return inside == sent
        return inside <= sent and 2 * len(inside) > len(sent)

    def index_of(self, peer_id: str) -> int:
        """Returns the index of a member. ValueError for any other peer."""
        return [member.peer_id for member in self.members].index(peer_id)

    @property
    def contributors(self) -> tuple[tuple[str, int], ...]:
        """Returns (peer id, weight) of every trainer, as an update's header names them."""
        return tuple((member.peer_id, weight) for member, weight in zip(self.trainers, self.weights))

    def header(self, part_hashes: Sequence[bytes]) -> UpdateHeader:
        """Returns the header of the update that this round makes of these parts."""
        return UpdateHeader(
            step=self.step, parent=self.head, contributors=self.contributors, part_hashes=tuple(part_hashes)
        )


def open_roster(sealed: SealedRoster, rules: RosterRules, known: Known) -> Group:
    """Returns the group of a roster. ValueError where ``open_anywhere`` raises it, and unless a known member has
    gathered it, where one could have; there are no more unknown members than the known ones allow; and those that are
    left idle are few, and would reduce. ``known``: at the head of the round."""
    group = open_anywhere(sealed, rules)
    members = group.trainers
    familiar, counting = _counting(members, known, rules.least_known)
    needs_witness = votes(members[i] for i in familiar) < rules.least_known
    dialable = any(not members[i].client_mode for i in familiar)
    if not needs_witness and dialable and sealed.leader not in (*known.peers, group.helper):
        raise ValueError("a roster that a newcomer gathered")
    if not needs_witness and len(members) - len(familiar) > most_unknown(len(familiar)):
        raise ValueError(f"a roster with {len(members) - len(familiar)} newcomers beside {len(familiar)} known members")
    would_reduce = _reducers(members, counting, (), range(len(members)))
    idle = list(sealed.idle)
    if idle != sorted(set(idle) & set(would_reduce)) or 2 * len(idle) > len(would_reduce):
        raise ValueError(f"a roster that leaves {len(idle)} members idle, too many or the wrong ones")
    return replace(group, counting=counting, needs_witness=needs_witness)


def open_anywhere(sealed: SealedRoster, rules: RosterRules) -> Group:
    """Returns the group of a roster, for who does not know its head, and so nobody there: all members count. ValueError
    unless its leader signed it, every member signed, once, for this leader and one head of the run; every absent peer
    signed that it trains there; and all of them have the seats that the run asks for, whether these have lapsed by now
    or not.

    ``RosterRules.on_missed`` "keep": a peer that misses a round comes to the next one with the progress of both, so the
    sum is divided by the weights of all that train on this head, absent ones at the group's median (docs/log.md has the
    figures).
    """
    if len(sealed.members) > rules.max_group + 1:
        raise ValueError(f"a roster of {len(sealed.members)}")
    if not sealed.is_signed:
        raise ValueError("a roster that its leader did not sign")
    members = tuple(open_readiness(one) for one in sealed.members)
    trainers = members[:-1] if members and members[-1].helps else members
    if not rules.min_group <= len(trainers) <= rules.max_group:
        raise ValueError(f"a roster of {len(trainers)}")
    step, head = members[0].step, members[0].head
    check_members(trainers, rules, sealed.leader, step, head)
    check_helper(members[len(trainers) :], rules, sealed.leader, step, head)
    away = check_absent(sealed.absent, members, rules, head)
    rules.admission.check_roster(members, away, now_s=None, step=step)
    claimed = [member.weight for member in trainers]
    weights, total_weight = counted_weights(claimed, rules.aggregation, rules.on_missed, absent=len(away))
    return Group(
        sealed=sealed,
        step=step,
        head=head,
        members=members,
        weights=weights,
        total_weight=total_weight,
        aggregation=rules.aggregation,
        counting=frozenset(range(len(trainers))),
        needs_witness=True,
    )


def _counting(members: Sequence[Readiness], known: Known, least_known: int) -> tuple[frozenset[int], frozenset[int]]:
    """Returns the indices of the known members, and of those that count: all, where too few are known."""
    familiar = frozenset(i for i, member in enumerate(members) if member.peer_id in known.peers)
    enough = votes(members[i] for i in familiar) >= least_known
    return familiar, familiar if enough else frozenset(range(len(members)))


def _reducers(
    roster: Sequence[Readiness], counting: Collection[int], idle: Collection[int], members: Sequence[int]
) -> tuple[int, ...]:
    """Returns what ``Group.reducers_among`` does."""
    trainers = [i for i in members if not roster[i].helps]
    count = [i for i in trainers if i in counting] or trainers
    contribute = [roster[i] for i in sorted(counting) if not roster[i].dropped]
    fit = {member.peer_id for member in fit_to_average(roster, contribute)}
    reducers = [i for i in count if roster[i].peer_id in fit] + [i for i in members if roster[i].helps] or count
    return tuple(i for i in reducers if i not in idle) or tuple(reducers)


def idle_among(members: Sequence[Readiness], known: Known, least_known: int, unfit: Sequence[str]) -> list[int]:
    """Returns the indices of the members that a leader leaves idle, rising: of those in ``unfit``, from the worst on,
    as many as a roster may name."""
    _, counting = _counting(members, known, least_known)
    would_reduce = _reducers(members, counting, (), range(len(members)))
    index_of = {members[i].peer_id: i for i in would_reduce}
    chosen = [index_of[peer_id] for peer_id in unfit if peer_id in index_of]
    return sorted(chosen[: len(would_reduce) // 2])


def evaluator(group: Group, head: bytes) -> str:
    """Returns the member that evaluates theta after an outer step: another one every time."""
    return min((member.peer_id for member in group.trainers), key=lambda peer_id: rank(head, peer_id))
