"""The witness of a swarm with liars: what it lets pass, and what it does not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from p2p_diloco.core.aggregate import AGGREGATIONS
from p2p_diloco.core.codec import Vector
from p2p_diloco.core.grid import Grid
from p2p_diloco.core.group import Group, SealedRoster
from p2p_diloco.core.identity import SIGNATURE_BYTES, Identity
from p2p_diloco.core.outer import genesis_state
from p2p_diloco.core.update import Part, Update
from tests.support.builders import head, identity, readiness_of
from tests.support.chronicle import PART_VALUES, Violation
from tests.support.witness import ASTRAY_STEPS, Witness, share_of

N = 2 * PART_VALUES
GRID = Grid(n=N, codec="fp32")
GENESIS = genesis_state(np.zeros(N, np.float32))
MEMBERS = [identity(i) for i in range(4)]
NAMES = {who.peer_id: i for i, who in enumerate(MEMBERS)}
LIAR = 3
HONEST = np.linspace(1, 2, N, dtype=np.float32)


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2p_diloco.core.grid.PART_VALUES", PART_VALUES)


def witness() -> Witness:
    return Witness(names=NAMES, genesis=GENESIS, liars=frozenset((LIAR,)))


def group(history: str = "", who: Sequence[Identity] = MEMBERS) -> Group:
    members = tuple(readiness_of(one, history) for one in who)
    step, at, weights = len(history), head(history), (100,) * len(members)
    return Group(
        sealed=SealedRoster(leader="", members=(), absent=(), signature=bytes(SIGNATURE_BYTES)),
        step=step,
        head=at,
        members=members,
        weights=weights,
        total_weight=None,
        aggregation=AGGREGATIONS["mean"],
        counting=frozenset(range(len(members))),
        needs_witness=False,
    )


def update_of(group: Group, seen: Witness, contributions: dict[int, Vector], *, held: bool = True) -> Update:
    """The update of a round in which all of these contribute; ``held``: its parts come to an honest member."""
    parts: list[Part] = []
    for part, where in enumerate(GRID.slices):
        came = {i: values[where] for i, values in contributions.items()}
        for peer in came.keys() - {LIAR}:
            seen.contributes(group, peer, part, came[peer])
        parts.append(group.aggregation.reduce(came, group.weights, part, GRID))
        if held:
            seen.reduced(group, parts[part].hash)
    return Update(header=group.header([part.hash for part in parts]), parts=tuple(parts))


def norms_of(seen: Witness, update: Update) -> list[float]:
    return seen._check_values(update, GRID)


def test_an_update_is_made_where_an_honest_member_holds_each_part_of_it() -> None:
    seen = witness()
    made = update_of(group(), seen, dict.fromkeys(range(4), HONEST))
    assert seen.is_made(made)
    other = update_of(group(), seen, dict.fromkeys(range(4), -HONEST), held=False)
    assert not seen.is_made(other)
    parts = (other.parts[0], made.parts[1])
    assert not seen.is_made(Update(header=group().header([part.hash for part in parts]), parts=parts))
    assert not witness().is_made(made)


def test_who_was_the_only_honest_one_in_a_round_has_not_taken_part() -> None:
    seen = witness()
    seen.settled(group(who=(MEMBERS[0], MEMBERS[LIAR])), 0)
    assert not seen.took_part
    seen.settled(group(), 1)
    assert seen.took_part == {1}


def test_a_contribution_that_is_too_large_is_seen_in_the_update() -> None:
    seen = witness()
    assert norms_of(seen, update_of(group(), seen, dict.fromkeys(range(4), HONEST)))
    with pytest.raises(Violation, match="bounded: part 0 of update 1"):
        norms_of(seen, update_of(group("a"), seen, dict.fromkeys(range(3), HONEST) | {LIAR: 100 * HONEST}))


def test_too_many_updates_go_astray() -> None:
    seen = witness()
    for history in "abc":
        norms_of(seen, update_of(group(history), seen, dict.fromkeys(range(3), HONEST) | {LIAR: -HONEST}))
    assert len(seen.astray) == ASTRAY_STEPS
    norms_of(seen, update_of(group("d"), seen, dict.fromkeys(range(4), HONEST)))
    with pytest.raises(Violation, match=r"astray: .* part 0 has 0\.50"):
        norms_of(seen, update_of(group("e"), seen, dict.fromkeys(range(3), HONEST) | {LIAR: -HONEST}))


def test_what_honest_peers_alone_make_of_their_contributions_is_not_astray() -> None:
    """Whatever their rule has left of it, as here a third."""
    seen = witness()
    for history in "abcde":
        honest = group(history, who=MEMBERS[:3])
        third = HONEST / np.float32(3)
        update = update_of(honest, seen, dict.fromkeys(range(3), third))
        for part, where in enumerate(GRID.slices):
            for peer in range(3):
                seen.contributes(honest, peer, part, HONEST[where])
        norms_of(seen, update)
    assert not seen.astray


def test_an_honest_peer_is_blamed() -> None:
    seen = witness()
    seen.blames(0, MEMBERS[LIAR].peer_id, "lies")
    seen.blames(0, "a stranger", "lies")
    with pytest.raises(Violation, match="no-blame: peer 0 says that 1 lies"):
        seen.blames(0, MEMBERS[1].peer_id, "lies")


def test_how_much_of_what_was_contributed_is_left() -> None:
    wanted = np.arange(PART_VALUES, dtype=np.float64)
    assert share_of(wanted, [wanted, wanted]) == 1
    assert share_of(-wanted, [wanted]) == -1
    assert share_of(np.zeros_like(wanted), [wanted]) == 0
    assert share_of(wanted[:-1], [wanted[:-1]]) is None
