"""Which contributions to one part count, and how much of each: no single one may move the mean far, or turn it round.

    bounded            none is longer than the others are
    agreeing           of five and more, a minority that points away from the others is left out
    bounded_by_weight  of those that stay, who has trained on more tokens may be longer than the others

Who agrees is asked where all are bounded alike: two hostile ones of five that are longer, too, would outweigh three
honest ones. All are exact rules, the same bits everywhere (``norms``): whoever has the contributions comes to the same
mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median_low

from p2p_diloco.core.codec import Vector
from p2p_diloco.core.norms import inner_products, squared_norms

LARGEST_OF_TWO = 4
"""Where two contribute, neither counts with more than so many times the other's norm."""
AGREES_FROM = 5
"""So many have to contribute before one is left out: of three, a single hostile one makes the others look opposed."""
LEAST_COSINE = 0.0
"""With the mean of the others. What lies below points away from them."""


def bounded(norms: Sequence[float]) -> list[float]:
    """Returns the factor that each contribution is multiplied by, at most 1, by the norms of all.

    From three on the longest that counts in full is the median (of an even number, the lower one in the middle). Of
    two, each is bounded by LARGEST_OF_TWO times the other. One alone is what it is: who receives it has a bound.
    """
    if len(norms) < 2:
        return [1.0] * len(norms)
    longest = median_low(norms) if len(norms) > 2 else LARGEST_OF_TWO * min(norms)
    return _within(norms, [longest] * len(norms))


def bounded_by_weight(norms: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Returns the factors of those that are in the mean. ``weights``: over the group's median.

    As ``bounded``, but with AGREES_FROM and more, who weighs more than the median may be as many times longer: it has
    made more steps, and come farther. With fewer, one that flips its outer gradient could turn the mean round.
    """
    if len(norms) < AGREES_FROM:
        return bounded(norms)
    longest = median_low(norms)
    return _within(norms, [longest * max(weight, 1.0) for weight in weights])


def _within(norms: Sequence[float], limits: Sequence[float]) -> list[float]:
    """Returns the factor, at most 1, that brings each norm down to its limit."""
    return [limit / norm if norm > limit else 1.0 for norm, limit in zip(norms, limits)]


def agreeing(
    contributions: Mapping[int, Vector], squares: Mapping[int, float], shares: Mapping[int, float], mean: Vector
) -> list[int]:
    """Returns who is not left out. ``squares``: of the contributions' norms; ``mean``: the sum of all, each multiplied
    by its share.

    One after another goes who has the smallest cosine with the sum of the others that are left, as long as that is
    below LEAST_COSINE, and at least AGREES_FROM contribute; of equal ones, the first in the roster. More than half of
    all stay in any case: where most are opposed to each other, nobody knows who is right.
    """
    left = list(contributions)
    if len(left) < AGREES_FROM:
        return left
    vectors = list(contributions.values())
    with_sum = dict(zip(left, inner_products(vectors, mean)))
    (square_of_sum,) = squared_norms([mean])
    while 2 * (len(left) - 1) > len(contributions):
        cosines = {i: _cosine_with_others(squares[i], shares[i], with_sum[i], square_of_sum) for i in left}
        out = min(left, key=lambda i: cosines[i])
        if cosines[out] >= LEAST_COSINE:
            break
        share = shares[out]
        square_of_sum = square_of_sum - 2 * share * with_sum[out] + share * share * squares[out]
        products = dict(zip(contributions, inner_products(vectors, contributions[out])))
        with_sum = {i: with_sum[i] - share * products[i] for i in left}
        left.remove(out)
    return left


def _cosine_with_others(square: float, share: float, with_sum: float, square_of_sum: float) -> float:
    """Returns the cosine between a contribution c and the sum of the others, which is the sum without share * c; 0
    where one of them is nothing but zeros. ``square``: of c's norm; ``with_sum``: c's inner product with the sum."""
    with_others = with_sum - share * square
    square_of_others = square_of_sum - 2 * share * with_sum + share * share * square
    if square <= 0 or square_of_others <= 0:
        return 0.0
    return with_others / (math.sqrt(square) * math.sqrt(square_of_others))
