"""Audits: which parts of an update a member looks at, and whether a part is the mean of what was contributed. Pure.

A reducer signs a part together with all contributions that came to it (``signed_part``), before anybody knows which
parts are audited: that follows from the head that the update leads to. Whoever has the contributions, the roster and
the part can take the mean again, and comes to the same bits. So a part that is wrong proves itself to everybody: also
one without a contribution that the run's rule does not leave out. Who claims a contribution that did not come cannot
show it.

What it cannot show: that a reducer took its own contribution, or that of a friend, after it had seen the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgpack

from p2p_diloco.core.digest import digest
from p2p_diloco.core.grid import Grid
from p2p_diloco.core.group import MAX_ABSENT, MAX_MEMBERS, Group, SealedRoster, open_anywhere
from p2p_diloco.core.identity import SIGNATURE_BYTES
from p2p_diloco.core.records import MAX_RECORD_BYTES, unpack_plain
from p2p_diloco.core.roster_rules import RosterRules
from p2p_diloco.core.signed_part import REDUCTION_BYTES, Contribution, Inputs, Place, Reduction
from p2p_diloco.core.update import MAX_MASK_BYTES, Part

MAX_ROSTER_BYTES = (MAX_MEMBERS + MAX_ABSENT) * (MAX_RECORD_BYTES + 8) + 1024


def drawn_parts(head: bytes, me: str, reducer_of: Mapping[int, str], count: int) -> list[int]:
    """Returns the parts that a member audits. ``head``: the one that the certified update leads to. ``reducer_of``:
    the peer that has reduced each part that can be audited.

    All members and reducers stand in a ring, in an order that follows from the head. Each audits the next reducer
    after itself, and where ``count`` is larger also those after that one, a part of each: so one peer alone escapes no
    round, if those that audit are honest. Fewer parts come back where there are fewer.
    """
    others = sorted({peer_id for peer_id in reducer_of.values() if peer_id != me})
    if not others:
        return []
    mine = digest(b"audit", head, me.encode())
    places = {peer_id: digest(b"audit", head, peer_id.encode()) for peer_id in others}
    ring = sorted(others, key=lambda peer_id: (places[peer_id] < mine, places[peer_id]))
    parts = {
        peer_id: sorted(
            (part for part, reducer in reducer_of.items() if reducer == peer_id),
            key=lambda part: digest(b"audited part", head, me.encode(), part.to_bytes(4, "big")),
        )
        for peer_id in ring
    }
    depth = max(len(own) for own in parts.values())
    dealt = [parts[peer_id][i] for i in range(depth) for peer_id in ring if i < len(parts[peer_id])]
    return dealt[:count]


def max_contributions_bytes(grid: Grid, part: int, members: int) -> int:
    """Returns an upper bound of what ``pack_contributions`` makes of one part."""
    return 8 + members * (grid.part_bytes(part) + SIGNATURE_BYTES + 16)


def pack_contributions(came: Mapping[int, Contribution]) -> bytes:
    """Returns contributions as they travel: index in the roster -> contribution."""
    packed: bytes = msgpack.packb([[i, came[i].data, came[i].signature] for i in sorted(came)])
    return packed


def parse_contributions(data: bytes, members: int) -> dict[int, Contribution]:
    """Returns the contributions that ``data`` holds; no signature is verified. ValueError when it is not exactly what
    ``pack_contributions`` would give for a roster of so many ``members``."""
    content: Any = unpack_plain(data)
    try:
        came = {i: Contribution(data=one, signature=signature) for i, one, signature in content}
    except (TypeError, ValueError) as error:
        raise ValueError("no contributions") from error
    sound = all(
        type(i) is int and 0 <= i < members and type(one.data) is bytes and type(one.signature) is bytes
        for i, one in came.items()
    )
    if not sound or pack_contributions(came) != data:
        raise ValueError("no contributions: a field is out of its bounds")
    return came


def is_what_was_reduced(came: Mapping[int, Contribution], reduction: Reduction) -> bool:
    """Returns whether these are the contributions that a reducer has signed that it took."""
    return Inputs.of(came) == reduction.inputs


def is_wrong(
    group: Group, grid: Grid, index: int, part: Part, reduction: Reduction, came: Mapping[int, Contribution]
) -> bool:
    """Returns whether a part is not the mean of the contributions that its reducer has signed for: one of them is not
    its sender's, or does not decode, or the run's rule makes something else of them. Decodes all of them: a few
    milliseconds for each."""
    place = Place(round_id=group.round_id, number=reduction.number, part=index)
    if not all(one.is_signed(place, group.members[i].peer_id) for i, one in came.items()):
        return True
    try:
        values = {i: grid.decode(index, one.data) for i, one in came.items()}
    except ValueError:
        return True
    return group.aggregation.reduce(values, group.weights, index, grid, group.total_weight) != part


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All that shows that a part is wrong."""

    roster: SealedRoster
    index: int
    """Of the part."""
    part: Part
    reduction: Reduction
    came: Mapping[int, Contribution]

    def to_bytes(self) -> bytes:
        """Returns the evidence as it travels."""
        part, signed = [self.index, self.part.mask, self.part.data], self.reduction.to_bytes()
        packed: bytes = msgpack.packb([self.roster.pack(), part, signed, pack_contributions(self.came)])
        return packed

    @classmethod
    def from_bytes(cls, data: bytes) -> Evidence:
        """Returns the evidence that ``data`` is; no signature is verified. ValueError when ``data`` is not exactly what
        ``to_bytes`` would give."""
        content: Any = unpack_plain(data)
        try:
            packed, (index, mask, mean), signed, came = content
            roster = SealedRoster.unpack(packed)
            typed = type(index) is int and all(type(one) is bytes for one in (mask, mean, signed, came))
            if not (roster.is_sound() and typed and index >= 0 and len(signed) == REDUCTION_BYTES):
                raise ValueError("a field is out of its bounds")
            evidence = cls(
                roster=roster,
                index=index,
                part=Part(mask=mask, data=mean),
                reduction=Reduction.from_bytes(signed),
                came=parse_contributions(came, len(roster.members)),
            )
        except (TypeError, ValueError) as error:
            raise ValueError("no evidence") from error
        if evidence.to_bytes() != data:
            raise ValueError("no evidence")
        return evidence

    def accused(self, rules: RosterRules, grid: Grid) -> tuple[str, int]:
        """Returns the id of the peer that has reduced the part wrongly, and the outer step of the round. ValueError
        where this does not prove it of anybody: the roster is none of this run, the reducer has not signed the part
        and these contributions, or the part is what they make."""
        group = open_anywhere(self.roster, rules)  # who is known changes no weight
        if self.index >= grid.n_parts or self.reduction.reducer >= len(group.members):
            raise ValueError("evidence of a part or of a member that is none")
        accused = group.members[self.reduction.reducer].peer_id
        if not self.reduction.is_signed(group.round_id, self.index, self.part, accused):
            raise ValueError("evidence that the accused has not signed")
        if not is_what_was_reduced(self.came, self.reduction):
            raise ValueError("evidence with other contributions than the accused has signed for")
        if not is_wrong(group, grid, self.index, self.part, self.reduction, self.came):
            raise ValueError("evidence of a part that is right")
        return accused, group.step


def max_evidence_bytes(grid: Grid, members: int) -> int:
    """Returns an upper bound of the evidence about one part of a grid, in a round of at most so many members."""
    parts_bytes = max_contributions_bytes(grid, 0, members) + grid.part_bytes(0)
    return MAX_ROSTER_BYTES + MAX_MASK_BYTES + REDUCTION_BYTES + parts_bytes + 64
