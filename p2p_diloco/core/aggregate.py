"""What a reducer makes of contributions, by the rule that the run names, and how one contribution lies to the mean.

    Mean      the weighted mean of all that came, as in the paper
    Robust    the same, but no contribution counts far more than the others, and a minority that opposes them does not

The mean is part of what all replicas share: float32, each multiply and each add a ufunc of its own, in the order of the
roster. The alignment is not: reductions are fine there, and the last bits may differ between machines.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import median_low
from typing import Literal, Protocol

import numpy as np

from p2p_diloco.core.agreement import AGREES_FROM, agreeing, bounded, bounded_by_weight
from p2p_diloco.core.codec import Vector
from p2p_diloco.core.grid import Grid
from p2p_diloco.core.norms import squared_norms
from p2p_diloco.core.update import Part, Update, contributor_mask

LARGEST_WEIGHT_OVER_MEDIAN = 4
"""A weight counts as at most so many times the group's median."""
LARGEST_ROBUST_WEIGHT_OVER_MEDIAN = 1.5
"""The same where the run asks for ``robust``."""
LARGEST_OVER_EXPECTED = 4
"""How many times the norm that a member expects of a part's mean may have."""
SMALLEST_SHARE = 2.0**-126
"""Below float32's normal numbers, where machines may differ, a contribution counts for nothing."""


class Aggregation(Protocol):
    """Makes the mean of a part of the contributions to it, by one rule. Instances hold no state."""

    @property
    def largest_weight(self) -> Fraction:
        """Returns the largest weight that counts, over the group's median."""
        ...

    @property
    def leaves_out_from(self) -> float:
        """Returns how many have to contribute before the rule may leave one of them out."""
        ...

    def reduce(
        self, came: Mapping[int, Vector], weights: Sequence[int], part: int, grid: Grid, total_weight: int | None = None
    ) -> Part:
        """Returns what the reducer of a part makes of the contributions that ``came``: index in the roster -> decoded
        values. ``weights``: of the whole roster, in tokens. ``total_weight``: what the sum is divided by; without it,
        the weights of those that count. Zeros where nothing came."""
        ...

    def largest_norm(self, mine: float, weights: Sequence[int], me: int, last: float | None) -> float:
        """Returns the norm above which a part that another peer has made is refused. ``mine``: the norm of my own
        contribution to it; ``weights``: of the whole roster, where I am ``me``; ``last``: the norm of this part in the
        last update, None where unknown."""
        ...


class Mean:
    """``aggregate = "mean"``: every contribution counts in full, by its tokens."""

    largest_weight = Fraction(LARGEST_WEIGHT_OVER_MEDIAN)
    leaves_out_from = math.inf

    def reduce(
        self, came: Mapping[int, Vector], weights: Sequence[int], part: int, grid: Grid, total_weight: int | None = None
    ) -> Part:
        shares = shares_of({i: weights[i] for i in sorted(came)}, total_weight)
        return part_of(came, shares, part, grid)

    def largest_norm(self, mine: float, weights: Sequence[int], me: int, last: float | None) -> float:
        """Returns infinity: without a bound on contributions there is none on what an honest reducer makes of them."""
        return math.inf


class Robust:
    """``aggregate = "robust"``: norms are bounded by the group's, and who points away from the others is left out of
    the part. ``agreement`` has the rules, docs/log.md what they cost and prevent."""

    largest_weight = Fraction(LARGEST_ROBUST_WEIGHT_OVER_MEDIAN)
    leaves_out_from = AGREES_FROM

    def reduce(
        self, came: Mapping[int, Vector], weights: Sequence[int], part: int, grid: Grid, total_weight: int | None = None
    ) -> Part:
        inside = {i: came[i] for i in sorted(came)}
        squares = dict(zip(inside, squared_norms(list(inside.values()))))
        norms = [math.sqrt(square) for square in squares.values()]
        alike = dict(zip(inside, bounded(norms)))
        usual = median_low(weights)
        factors = dict(zip(inside, bounded_by_weight(norms, [weights[i] / usual for i in inside])))
        shares = shares_of({i: weights[i] for i in inside}, total_weight, alike)
        whole = weighted_sum(inside, shares, grid.n_values(part))
        stay = agreeing(inside, squares, {i: float(share) for i, share in shares.items()}, whole)
        if len(stay) == len(inside) and factors == alike:
            return Part(mask=contributor_mask(inside), data=grid.encode(whole))
        # Who is left out has taken part in the round, and will not come with this again: nothing stands in for it.
        total = None if total_weight is None else total_weight - sum(weights[i] for i in inside if i not in stay)
        return part_of(inside, shares_of({i: weights[i] for i in stay}, total, factors), part, grid)

    def largest_norm(self, mine: float, weights: Sequence[int], me: int, last: float | None) -> float:
        """Returns LARGEST_OVER_EXPECTED times the norm that I expect of the part. That is the larger of its norm in the
        last update and the norm of my own contribution; the latter times the group's median weight over mine, where I
        weigh less than the median. Where the last update is unknown, my contribution alone tells: I expect its norm
        times the square of that ratio, and any norm where it is nothing but zeros.

        What an honest reducer makes is no longer than the median of the contributions' norms, times the largest weight
        where five and more contribute. A peer that has trained on fewer tokens than the median makes a shorter
        contribution: in proportion to the tokens at worst or, while the learning rate rises from zero, as it does
        before the first update, to their square.
        """
        slower = max(median_low(weights) / weights[me], 1.0)
        if last is None:
            return LARGEST_OVER_EXPECTED * mine * slower * slower if mine > 0 else math.inf
        return LARGEST_OVER_EXPECTED * max(mine * slower, last)


AggregateName = Literal["mean", "robust"]
"""A key of AGGREGATIONS, as manifests and run files name it."""

AGGREGATIONS: Mapping[AggregateName, Aggregation] = {"mean": Mean(), "robust": Robust()}
"""A name is for ever: another rule gets another one."""


def shares_of(
    weights: Mapping[int, int], total_weight: int | None, factors: Mapping[int, float] | None = None
) -> dict[int, np.float32]:
    """Returns what each contribution is multiplied by: its weight over ``total_weight`` or, without it, over the sum of
    the weights; times its factor, at most 1, where there are ``factors``."""
    total = sum(weights.values()) if total_weight is None else total_weight
    shares = {i: weight / total * (1.0 if factors is None else factors[i]) for i, weight in weights.items()}
    return {i: np.float32(share if share >= SMALLEST_SHARE else 0.0) for i, share in shares.items()}


def weighted_sum(contributions: Mapping[int, Vector], shares: Mapping[int, np.float32], n: int) -> Vector:
    """Returns float32 [n]: the sum of share times contribution, in the order of ``shares``."""
    total, term = np.zeros(n, np.float32), np.empty(n, np.float32)
    for i, share in shares.items():
        np.multiply(contributions[i], share, out=term)
        np.add(total, term, out=total)
    return total


def part_of(contributions: Mapping[int, Vector], shares: Mapping[int, np.float32], part: int, grid: Grid) -> Part:
    """Returns the part that is the weighted sum of those contributions that have a share."""
    return Part(
        mask=contributor_mask(shares), data=grid.encode(weighted_sum(contributions, shares, grid.n_values(part)))
    )


SAMPLED_PARTS = 4
"""Of a model of more parts, so many are looked at, evenly spread and always the same. To look at all 96 of 25 million
values takes 0.6 times as long as to apply them, while everybody waits; four of them take 2 to 3 %."""


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """Norms are those of whole vectors, estimated from the parts that were looked at."""

    contribution_norm: float
    """Of theta minus local, before the codec."""
    update_norm: float
    """Of the group's mean, decoded."""
    cosine: float
    """Between the two; 0 where one of them is nothing but zeros."""


def align(theta: Vector, local: Vector, update: Update, grid: Grid) -> Alignment | None:
    """Returns the norms of my own contribution and of the update, and the cosine between them. ``theta``, ``local``:
    float32 [n], before ``update`` is applied. Returns None where their difference is not finite: a bit has flipped
    since it was sent."""
    mine = group = both = 0.0
    seen = 0
    for part in sampled(grid.n_parts):
        where = grid.slices[part]
        contribution = np.subtract(theta[where], local[where])
        mean = grid.decode(part, update.parts[part].data)
        mine += dot(contribution, contribution)
        group += dot(mean, mean)
        both += dot(contribution, mean)
        seen += len(contribution)
    if not (math.isfinite(mine) and math.isfinite(both)):
        return None
    scale = len(theta) / seen
    return Alignment(
        contribution_norm=math.sqrt(scale * mine),
        update_norm=math.sqrt(scale * group),
        cosine=both / math.sqrt(mine) / math.sqrt(group) if mine and group else 0.0,
    )


def dot(a: Vector, b: Vector) -> float:
    """Returns the inner product, in float64 where float32 is too narrow: a codec lets values through whose squares are
    not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        product = float(np.dot(a, b))
    return product if math.isfinite(product) else float(np.dot(a.astype(np.float64), b.astype(np.float64)))


def norm_of(values: Vector) -> float:
    """Returns the norm, as near as this machine's kernels have it: for a judgement of its own, no bits that others
    share."""
    return math.sqrt(dot(values, values))


def sampled(n_parts: int) -> Iterator[int]:
    """Returns the parts that are looked at: the middle one of each of SAMPLED_PARTS stretches, or all of a small
    model."""
    count = min(n_parts, SAMPLED_PARTS)
    return ((2 * i + 1) * n_parts // (2 * count) for i in range(count))
