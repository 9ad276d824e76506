"""What honest peers of a swarm with liars did in their rounds, and what they may apply because of it.

Only what a peer saw with its own eyes is noted: that it was in a round, which parts came to it as means of a butterfly
(and not as a commit wants them), and what it contributed itself. A round is known by what its update would be:
outer step, head, and contributors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from p2p_diloco.core.codec import Vector
from p2p_diloco.core.grid import Grid
from p2p_diloco.core.group import Group
from p2p_diloco.core.outer import OuterState, apply
from p2p_diloco.core.update import Update, UpdateHeader
from p2p_diloco.ledger.replica import Replica
from tests.support.chronicle import MAX_PEERS, Violation

LARGEST_OVER_HONEST = 4.0
"""A part of an update is at most so many times as large as the largest honest contribution to it, or as that part of
the update before."""
ASTRAY_STEPS = 3
"""So many updates may go astray: a reducer that lies is found after some."""
LEAST_SHARE = 0.75
"""Of what honest peers contribute on average, along its direction."""
SHARED_VALUES = slice(2 * MAX_PEERS, None)
"""Of a part: those that everybody trains."""
LEAST_SHARED = 8
"""In a part that has fewer of them, their direction says little."""

RoundKey = tuple[int, bytes, tuple[tuple[str, int], ...]]
Values = npt.NDArray[np.float64]


@dataclass(kw_only=True)
class Round:
    """As honest members have seen it."""

    held: set[bytes] = field(default_factory=set)
    """Hashes of parts that came out of a butterfly."""
    contributed: dict[int, dict[int, Values]] = field(default_factory=dict)
    """Part -> peer -> what it contributed."""


@dataclass(kw_only=True, eq=False)
class Witness:
    names: dict[str, int]
    """Peer id -> index."""
    genesis: OuterState
    liars: frozenset[int] = frozenset()
    rounds: dict[RoundKey, Round] = field(default_factory=dict)
    took_part: set[int] = field(default_factory=set)
    """Honest peers that have settled a round in which they were not the only honest one."""
    of_liars: dict[bytes, Update] = field(default_factory=dict)
    """Head -> an update that a liar wrote."""
    norms: dict[bytes, list[float]] = field(default_factory=dict)
    """Head -> those of the parts of the update that leads there, as an honest peer applied it."""
    astray: set[bytes] = field(default_factory=set)
    """Heads to which an update led that goes against what honest peers contributed."""

    def __post_init__(self) -> None:
        self.states = {self.genesis.head: self.genesis}
        """Head -> what the updates that lead there make of S_0."""

    # -- what happens ------------------------------------------------------------------------------------------------

    def contributes(self, group: Group, peer: int, part: int, values: Vector) -> None:
        """A peer makes its contribution to a part, perhaps not for the first time."""
        self._round_of(group).contributed.setdefault(part, {})[peer] = values.astype(np.float64)

    def reduced(self, group: Group, part_hash: bytes) -> None:
        """A part comes to a peer out of a butterfly."""
        self._round_of(group).held.add(part_hash)

    def settled(self, group: Group, peer: int) -> None:
        """A peer takes an update from a round."""
        honest = [one for one in self._members(group.header(())) if one not in self.liars]
        if len(honest) > 1:
            self.took_part.add(peer)

    def writes(self, peer: int, update: Update, replica: Replica) -> None:
        """A peer, honest or not, has an update: it leads on from the state before, whoever has made it."""
        header, before = update.header, self.states.get(update.header.parent)
        if peer in self.liars:
            self.of_liars[header.head] = update
        if before is not None and header.head not in self.states:
            theta, momentum, outer = before.theta.copy(), before.momentum.copy(), replica.manifest.spec.outer
            state = OuterState(step=before.step, head=before.head, theta=theta, momentum=momentum)
            with np.errstate(over="ignore", invalid="ignore"):
                apply(state, update, replica.ledger.grid, lr=outer.lr, momentum=outer.momentum)
            self.states[header.head] = state

    def applies(self, peer: int, update: Update, replica: Replica) -> None:
        """An honest peer has applied an update. Violation when it ought not to have, or to other values."""
        header, grid, state = update.header, replica.ledger.grid, self.states.get(update.header.head)
        if not self.is_made(update) and peer in self.took_part:
            raise Violation(
                "no-invention",
                f"peer {peer} applies update {header.step}, of {self._members(header)}, that no round of honest peers "
                f"has made",
            )
        if state is not None and state.digest() != replica.loaded.digest():
            raise Violation(
                "same-bytes", f"peer {peer} stands at outer step {state.step}, and its updates lead to other values"
            )
        if header.head not in self.norms:
            self.norms[header.head] = self._check_values(update, grid)

    def stands(self, peer: int, state: OuterState) -> None:
        """A peer has taken a state from a disk. Violation when it comes from an update that was invented."""
        update = self.of_liars.get(state.head)
        if update is not None and peer in self.took_part and not self.is_made(update):
            raise Violation("no-invention", f"peer {peer} takes a state beyond update {update.header.step}, invented")

    def blames(self, peer: int, other: str, what: str) -> None:
        """A peer takes another one for a liar."""
        index = self.names.get(other)
        if index is not None and index not in self.liars:
            raise Violation("no-blame", f"peer {peer} says that {index} {what}")

    # -- what must be true -------------------------------------------------------------------------------------------

    def is_made(self, update: Update) -> bool:
        """Whether each part of an update came out of a butterfly to an honest member of its round."""
        seen = self.rounds.get(key_of(update.header))
        return seen is not None and seen.held.issuperset(update.header.part_hashes)

    def _check_values(self, update: Update, grid: Grid) -> list[float]:
        """The norms of an update's parts. Violation when one is too large, or too many updates have gone astray."""
        header, before = update.header, self.norms.get(update.header.parent, [])
        lied = not self.liars.isdisjoint(self._members(header))
        norms, astray = [], []
        for part, mean in enumerate(grid.decode(i, one.data).astype(np.float64) for i, one in enumerate(update.parts)):
            norms.append(float(np.linalg.norm(mean)))
            honest = list(self._contributed(header, part))
            if not honest:
                continue
            bound = LARGEST_OVER_HONEST * max(
                *(float(np.linalg.norm(one)) for one in honest), *before[part : part + 1], 0.0
            )
            if norms[part] > bound:
                raise Violation(
                    "bounded", f"part {part} of update {header.step} has a norm of {norms[part]:.3g}, bound {bound:.3g}"
                )
            # Other codecs round small values away. Honest peers alone bound each other's norms, and late in a run, when
            # their contributions are small and point apart, that takes more of them than a lie would.
            share = share_of(mean, honest) if lied and grid.codec == "fp32" else None
            if share is not None and share < LEAST_SHARE:
                astray.append((part, share))
        if astray:
            self.astray.add(header.head)
            if len(self.astray) > ASTRAY_STEPS:
                part, share = astray[0]
                raise Violation(
                    "astray",
                    f"update {header.step} is the {len(self.astray)}th that goes against honest peers: part {part} has "
                    f"{share:.2f} of what they contributed",
                )
        return norms

    def _contributed(self, header: UpdateHeader, part: int) -> Iterator[Values]:
        seen = self.rounds.get(key_of(header))
        if seen is not None:
            yield from seen.contributed.get(part, {}).values()

    def _round_of(self, group: Group) -> Round:
        return self.rounds.setdefault(key_of(group.header(())), Round())

    def _members(self, header: UpdateHeader) -> list[int]:
        return [self.names[peer_id] for peer_id, _ in header.contributors]


def key_of(header: UpdateHeader) -> RoundKey:
    return header.step, header.parent, header.contributors


def share_of(mean: Values, contributions: list[Values]) -> float | None:
    """How much of the mean of some contributions is in ``mean``, in the values that everybody trains. None where those
    are too few."""
    shared, wanted = mean[SHARED_VALUES], np.mean(contributions, axis=0)[SHARED_VALUES]
    if len(shared) < LEAST_SHARED or not wanted.any():
        return None
    return float(shared @ wanted / (wanted @ wanted))
