"""What a run's manifest says of rosters, and whether members fit it.

Who is known plays no part here: that is for ``group``, which opens a roster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from p2p_diloco.core.admission import Admission
from p2p_diloco.core.aggregate import Aggregation
from p2p_diloco.core.known import LEAST_KNOWN
from p2p_diloco.core.manifest import RunManifest
from p2p_diloco.core.records import Record, open_record
from p2p_diloco.core.roster import Readiness, on_head, rank
from p2p_diloco.core.runfile import OnMissed, SeedsReduce


@dataclass(frozen=True, kw_only=True)
class RosterRules:
    """Holds what a run's manifest says of rosters."""

    run_id: str
    owner: str
    """The peer id of the run's owner, whose seed witnesses what too few known members make."""
    min_group: int
    max_group: int
    max_weight_tokens: int
    aggregation: Aggregation
    on_missed: OnMissed
    seeds_reduce: SeedsReduce
    admission: Admission
    """Who may take part, as the manifest alone tells. What is revoked is not in it: not all have heard the same of
    that, and what is committed stays."""

    @classmethod
    def of(cls, manifest: RunManifest) -> RosterRules:
        """Returns the rules of a run."""
        spec = manifest.spec
        return cls(
            run_id=manifest.run_id,
            owner=manifest.owner,
            min_group=spec.round.min_group,
            max_group=spec.round.max_group,
            max_weight_tokens=spec.max_weight_tokens,
            aggregation=manifest.aggregation,
            on_missed=spec.round.on_missed,
            seeds_reduce=spec.round.seeds_reduce,
            admission=manifest.admission(),
        )

    @property
    def least_known(self) -> int:
        """Returns how many known members of a roster, those of one token counted once, can do without the owner's
        witness."""
        return min(LEAST_KNOWN, self.min_group)


def check_members(members: Sequence[Readiness], rules: RosterRules, leader: str, step: int, head: bytes) -> None:
    """Raises ValueError unless these are the trainers of one round that ``leader`` gathered, in the order of rank."""
    ids = [member.peer_id for member in members]
    if len(set(ids)) != len(ids):
        raise ValueError("a roster that names a peer twice")
    for member in members:
        _check_member(member, rules, leader, step, head)
        if member.helps:
            raise ValueError("a roster with a peer that helps, and is not the last one")
        if member.weight > rules.max_weight_tokens:
            raise ValueError(f"a roster with a weight of {member.weight}")
    if ids != sorted(ids, key=lambda peer_id: rank(head, peer_id)):
        raise ValueError("a roster that is not in the order of rank")


def check_helper(helpers: Sequence[Readiness], rules: RosterRules, leader: str, step: int, head: bytes) -> None:
    """Raises ValueError unless these are nobody, or the seed of the run's owner, which the run lets help: nobody else's
    help is worth more than a stranger's."""
    for helper in helpers:
        _check_member(helper, rules, leader, step, head)
        if helper.peer_id != rules.owner or rules.seeds_reduce == "never":
            raise ValueError("a roster with a helper that the run has not")
        if helper.client_mode or not helper.dropped:
            raise ValueError("a roster with a helper that cannot be dialled, or contributes")


def _check_member(member: Readiness, rules: RosterRules, leader: str, step: int, head: bytes) -> None:
    if (member.run_id, member.step, member.head) != (rules.run_id, step, head):
        raise ValueError("a roster with a member on another head")
    if member.leader != leader:
        raise ValueError("a roster with a member that is ready for another leader")


def check_absent(
    absent: Sequence[bytes], members: Sequence[Readiness], rules: RosterRules, head: bytes
) -> list[Record]:
    """Returns the records of the absent peers that a roster names. ValueError unless each of them signed that it trains
    on this head, and is named once."""
    away = [open_record(one) for one in absent]
    if away and rules.on_missed != "keep":
        raise ValueError("a roster with absent peers")
    ids = [one.peer_id for one in (*members, *away)]
    if len(set(ids)) != len(ids):
        raise ValueError("a roster that names an absent peer twice")
    if any(record.run_id != rules.run_id for record in away) or len(on_head(away, head)) != len(away):
        raise ValueError("a roster with an absent peer that does not train on this head")
    return away
