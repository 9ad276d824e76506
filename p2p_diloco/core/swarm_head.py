"""Which head is the swarm's, and which peers to believe about it. Pure functions of records and of the own standing.

The swarm's head is never the loudest claim: it has a majority of the peers that have ever committed, or directly
extends a head that has one, as far back as it can show.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median_low

from p2p_diloco.core.records import Record


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Says where a peer is: its outer step, its head, and the heads that led there, newest first, as far as it has
    them."""

    step: int
    head: bytes
    heads: tuple[bytes, ...]

    @property
    def beyond_genesis(self) -> bool:
        """Returns whether the peer has made or taken any outer step."""
        return self.step > 0


def swarm_head(
    records: Iterable[Record | Standing], mine: Standing | None, before: Mapping[bytes, bytes] | None = None
) -> tuple[int, bytes] | None:
    """Returns the (outer step, head) of the swarm; None when nobody is there. ``before``: head -> the one that it is
    known to follow from, for a record has room for its peer's last ones only.

    Voters are the live peers that have committed, and me if I have. The base is the newest head that most voters stand
    on or have passed. A head that has the base in its history is newer than the base without contradicting it: of
    those, the one with the most voters on or beyond it, then the newest, then the smaller digest. A claim from nowhere,
    however new, extends nothing and changes nothing. Where no head has a majority (a healed partition), the same order
    decides among all.
    """
    everybody: list[Record | Standing] = [*records, *([mine] if mine is not None else [])]
    voters = [voter for voter in everybody if voter.beyond_genesis] or everybody
    if not voters:
        return None
    # Most say the same: a way, which is as long as the run's history, is walked once for all of them.
    alike: dict[tuple[int, bytes, tuple[bytes, ...]], list[Record | Standing]] = {}
    for voter in voters:
        alike.setdefault((voter.step, voter.head, tuple(voter.heads)), []).append(voter)
    paths = [path_of(same[0], before or {}) for same in alike.values()]
    support: Counter[tuple[int, bytes]] = Counter()
    for path, same in zip(paths, alike.values()):
        for candidate in path:
            support[candidate] += len(same)

    def order(candidate: tuple[int, bytes]) -> tuple[int, int, bytes]:
        return (-support[candidate], -candidate[0], candidate[1])

    agreed = [candidate for candidate, count in support.items() if 2 * count > len(voters)]
    if not agreed:
        return min(support, key=order)
    base = max(agreed)
    newer = {path[0] for path in paths if base in path[1:]}
    return min(newer, key=order) if newer else base


def way(peer: Record | Standing, before: Mapping[bytes, bytes]) -> Iterator[bytes]:
    """Yields a peer's head and those that led there, newest first: what it says itself, and what is known to come
    before that."""
    oldest = peer.head
    yield oldest
    for oldest in peer.heads:
        yield oldest
    while (older := before.get(oldest)) is not None:
        oldest = older
        yield oldest


def way_of(peer: Record | Standing, before: Mapping[bytes, bytes]) -> list[bytes]:
    """Returns the whole of ``way``."""
    return list(way(peer, before))


def path_of(peer: Record | Standing, before: Mapping[bytes, bytes]) -> list[tuple[int, bytes]]:
    """Returns the same as ``way_of``, each head with its outer step."""
    return [(peer.step - back, head) for back, head in enumerate(way_of(peer, before))]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A peer's claim how well theta of an outer step predicts held-out text."""

    step: int
    loss: float
    """Nats per token."""
    path: Collection[tuple[int, bytes]]
    """(outer step, head) where the peer stands, and where it is known to have stood before."""


def believed_losses(evaluations: Iterable[Evaluation], swarm: tuple[int, bytes] | None) -> list[tuple[int, float]]:
    """Returns (outer step, held-out loss), one loss a step, rising. ``swarm``: as ``swarm_head`` has it.

    A peer is believed that stands on the swarm's head, or has passed it; but not about a step that the swarm has not
    made, nor a loss that no model has: not finite, or below 0. Where several have evaluated a step, the lower one of
    the losses in the middle counts. A peer on the head can still lie about a step that it alone evaluated.
    """
    losses: dict[int, list[float]] = {}
    for said in evaluations:
        if swarm is not None and swarm in said.path and said.step <= swarm[0] and 0 <= said.loss < math.inf:
            losses.setdefault(said.step, []).append(said.loss)
    return [(step, median_low(losses[step])) for step in sorted(losses)]


def newest_evaluation(records: Iterable[Record], swarm: tuple[int, bytes] | None) -> tuple[int, float] | None:
    """Returns (outer step, held-out loss) of the newest step whose loss is believed; None where there is none."""
    evaluations = (
        Evaluation(step=record.held_out_step, loss=record.held_out_loss, path=path_of(record, {}))
        for record in records
        if record.held_out_loss is not None
    )
    return next(reversed(believed_losses(evaluations, swarm)), None)


def from_nowhere(records: Iterable[Record], mine: Standing, before: Mapping[bytes, bytes]) -> list[Record]:
    """Returns the records of the voters that are not known to have ever stood where I did: they are on a history of
    their own, or more steps ahead or behind than a record shows."""
    here = set(way_of(mine, before))
    return [r for r in records if r.beyond_genesis and here.isdisjoint(way_of(r, before))]


def must_catch_up(mine: Standing, target: tuple[int, bytes] | None) -> bool:
    """Returns whether the swarm's head is neither mine nor one that I have passed."""
    return target is not None and target[1] != mine.head and target[1] not in mine.heads
