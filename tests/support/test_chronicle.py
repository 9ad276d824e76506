"""The chronicle sees what it must: two kinds of bytes behind one head, steps that count twice, what is not durable."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import numpy as np
import pytest

from p2p_diloco.core import grid
from p2p_diloco.core.aggregate import AGGREGATIONS
from p2p_diloco.core.certificate import Certified
from p2p_diloco.core.grid import Grid
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.known import Known
from p2p_diloco.core.outer import OuterState, apply, genesis_state
from p2p_diloco.core.records import Record
from p2p_diloco.core.runfile import OnMissed
from p2p_diloco.core.swarm_head import Standing
from p2p_diloco.core.update import Part, Update, UpdateHeader, contributor_mask
from tests.support.builders import OWNER, head, identity, record_of, rules_of
from tests.support.certificates import certificate_for, group_at
from tests.support.chronicle import MAX_PEERS, PART_VALUES, TOKENS, Chronicle, Settled, Steps, Violation

N = 3 * PART_VALUES - 5
TARGET = np.zeros(N, np.float32)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "PART_VALUES", PART_VALUES)


class Story:
    """Peers that train and meet, without any network."""

    def __init__(self, on_missed: OnMissed = "adopt", largest_weight: int = 2**60) -> None:
        self.ids = [identity(i).peer_id for i in range(MAX_PEERS)]
        self.chronicle = Chronicle(
            names={peer_id: i for i, peer_id in enumerate(self.ids)}, on_missed=on_missed, largest_weight=largest_weight
        )
        self.state = genesis_state(np.random.default_rng(0).standard_normal(N).astype(np.float32))
        self.local = {i: self.state.theta.copy() for i in range(MAX_PEERS)}

    def train(self, peer: int, steps: int) -> None:
        for _ in range(steps):
            self.chronicle.trains(peer, self.local[peer], TARGET)

    def meet(self, *peers: int, weights: Sequence[int], total_weight: int | None = None) -> Update:
        """An outer step of these peers. Everybody goes on from theta. ``total_weight``: what they divide by, where that
        is not the sum of their weights."""
        parts, grid = [], Grid(n=N, codec="fp32")
        for i, where in enumerate(grid.slices):
            came = {k: self.state.theta[where] - self.local[peer][where] for k, peer in enumerate(peers)}
            parts.append(AGGREGATIONS["mean"].reduce(came, weights, i, grid, total_weight))
        update = self.update(peers, weights, parts)
        self.chronicle.certified.add(update.header.head)
        apply(self.state, update, grid, lr=0.01, momentum=0.9)
        for peer in peers:
            self.chronicle.commits(peer, self.state, update)
        for local in self.local.values():
            local[:] = self.state.theta
        return update

    def update(self, peers: Sequence[int], weights: Sequence[int], parts: Sequence[Part]) -> Update:
        header = UpdateHeader(
            step=self.state.step,
            parent=self.state.head,
            contributors=tuple((self.ids[peer], weight) for peer, weight in zip(peers, weights)),
            part_hashes=tuple(part.hash for part in parts),
        )
        return Update(header=header, parts=tuple(parts))

    def other(self) -> OuterState:
        """The same head with other bytes."""
        state = self.state
        return OuterState(step=state.step, head=state.head, theta=state.theta + 1, momentum=state.momentum)


def test_an_update_tells_whose_inner_steps_are_in_it() -> None:
    story = Story()
    story.train(0, 5)
    story.train(3, 9)
    story.meet(0, 3, weights=[50, 90])
    story.train(0, 400)
    story.meet(0, weights=[400])
    story.train(0, 7)
    story.train(3, 2)
    update = story.meet(3, 0, weights=[20, 70])
    for part in range(3):
        assert dict(story.chronicle.contributions(update, part, N)) == {0: Steps(406, 412), 3: Steps(10, 11)}
    story.chronicle.check_once(story.state.head, N)


def certified_by(*signers: Identity, witness: bool = True) -> Chronicle:
    """A chronicle that has seen the update of a round of four, of whom nobody is known yet."""
    chronicle = Chronicle(names={})
    members, nobody = [identity(i) for i in range(4)], Known(step=0, peers=frozenset())
    group = group_at(members, rules_of(), nobody, head(""))
    header = group.header([bytes(32)])
    certificate = certificate_for(group, header, signers, owner=OWNER if witness else identity(0), full=b"\x0f")
    chronicle.certifies(Certified(header=header, certificate=certificate), rules_of())
    return chronicle


def test_a_head_is_certified_by_most_of_those_who_count_and_the_owner() -> None:
    members = [identity(i) for i in range(4)]
    assert certified_by(*members[:3]).certified
    assert not certified_by(*members[:2]).certified
    assert not certified_by(*members[:3], witness=False).certified


def test_nobody_stands_where_no_certificate_leads() -> None:
    story = Story()
    story.train(0, 5)
    story.meet(0, weights=[50])
    story.chronicle.certified.clear()
    with pytest.raises(Violation, match="certified: peer 0 stands at outer step 1"):
        story.chronicle.moves(0, story.state)


def test_two_certificates_of_one_round() -> None:
    chronicle, members = Chronicle(names={}), [identity(i) for i in range(3)]
    group = group_at(members, rules_of(), Known(step=0, peers=frozenset()), head(""))
    first, second = (group.header([bytes([i]) * 32]) for i in range(2))
    for header in (first, second):
        certificate = certificate_for(group, header, members[:2], owner=OWNER, full=b"\x07")
        one = Certified(header=header, certificate=certificate)
        if header is first:
            chronicle.certifies(one, rules_of())
        else:
            with pytest.raises(Violation, match="two updates of one round are certified"):
                chronicle.certifies(one, rules_of())


def test_what_is_given_up_was_replaced_before() -> None:
    story = Story()
    story.train(0, 5)
    story.train(1, 5)
    first = story.meet(0, 1, weights=[50, 50])
    weights = tuple((peer_id, 40) for peer_id, _ in first.header.contributors)
    other = Update(header=dataclasses.replace(first.header, contributors=weights), parts=first.parts)
    story.chronicle.gives_up(0)
    story.chronicle.writes(other)
    assert not story.chronicle.was_replaced(first.header.head, other.header.head)
    assert story.chronicle.was_replaced(other.header.head, first.header.head)


def test_steps_that_count_twice() -> None:
    """Peer 1 was in the first update, does not know it, and brings the same steps and some more to the next one."""
    story = Story()
    for peer in (0, 1):
        story.train(peer, 5)
    before = story.local[1] - story.state.theta
    story.meet(0, 1, weights=[50, 50])
    story.local[1] = story.state.theta + before
    story.train(1, 3)
    story.meet(1, weights=[80])
    with pytest.raises(Violation, match=r"counted-once: part 0: inner steps of peer 1 are in updates 0 and 1"):
        story.chronicle.check_once(story.state.head, N)


def test_steps_of_who_is_not_named() -> None:
    story = Story()
    story.train(0, 5)
    story.train(1, 5)
    update = story.meet(0, 1, weights=[50, 50])
    unnamed = [Part(mask=contributor_mask([1]), data=part.data) for part in update.parts]
    with pytest.raises(Violation, match="0 is in it, unnamed"):
        list(story.chronicle.contributions(story.update([0, 1], [50, 50], unnamed), 0, N))


def test_steps_that_are_no_unbroken_run() -> None:
    story = Story()
    story.train(0, 5)
    story.local[0][: PART_VALUES * 3] *= np.float32(1.5)
    update = story.meet(0, weights=[50])
    with pytest.raises(Violation, match="no unbroken run"):
        list(story.chronicle.contributions(update, 0, N))


LARGEST = 20 * TOKENS
"""What a contribution may weigh at most, in runs that keep missed rounds."""


def met(steps: Sequence[int], *, divided: int, said: int | None) -> tuple[Story, Update]:
    """An outer step of peers that have made so many ``steps`` since they took theta, in a run that keeps missed rounds.
    ``divided``: what its reducers divide the sum by; ``said``: what the round agreed on; None: there was no round."""
    story = Story("keep", LARGEST)
    for peer, count in enumerate(steps):
        story.train(peer, count)
    update = story.meet(
        *range(len(steps)), weights=[min(count * TOKENS, LARGEST) for count in steps], total_weight=divided
    )
    if said is not None:
        outcome = dataclasses.replace(settled(0, update.header.head), total_weight=said)
        story.chronicle.settles(b"round", outcome, since(TALKING))
    return story, update


@pytest.mark.parametrize("absent", [0, 1, 3])
@pytest.mark.parametrize("steps", [(5, 5, 4), (5, 30, 5), (30, 30, 28)])
def test_how_many_were_absent_is_what_the_round_says(steps: tuple[int, ...], absent: int) -> None:
    """Also where everybody has been away for so long that no weight says how many steps there must be."""
    usual = min(sorted(steps)[1] * TOKENS, LARGEST)
    total_weight = sum(min(count * TOKENS, LARGEST) for count in steps) + absent * usual
    story, update = met(steps, divided=total_weight, said=total_weight)
    for part in range(3):
        expected = {peer: Steps(1, count) for peer, count in enumerate(steps)}
        assert dict(story.chronicle.contributions(update, part, N)) == expected
    story.chronicle.check_once(story.state.head, N)


@pytest.mark.parametrize(
    ("steps", "divided", "said", "why"),
    [
        ((5, 5, 4), 112, 152, "no number of absent peers"),  # one was absent, and the reducers did not know
        ((5, 5, 4), 152, 112, "no number of absent peers"),
        ((30, 30, 28), 480, 500, "no number of absent peers"),
        ((30, 30, 28), 480, 320, "no number of absent peers"),
        ((5, 5, 4), 112, None, "no number of absent peers"),
        ((30, 30, 28), 480, 640, "no unbroken run"),
        ((30, 30, 28), 640, 480, "no unbroken run"),
    ],
)
def test_values_that_were_divided_by_something_else(
    steps: tuple[int, ...], divided: int, said: int | None, why: str
) -> None:
    story, update = met(steps, divided=divided, said=said)
    with pytest.raises(Violation, match=f"counted-once: .*{why}"):
        list(story.chronicle.contributions(update, 0, N))


def test_two_kinds_of_bytes_behind_one_head() -> None:
    story = Story()
    story.train(0, 5)
    story.meet(0, weights=[50])
    with pytest.raises(Violation, match=r"same-bytes: at outer step 1, .*: peers 0 and 2 differ"):
        story.chronicle.stood(2, story.other())


def test_a_disk_that_does_not_lead_to_where_its_peer_was() -> None:
    story = Story()
    genesis = genesis_state(story.state.theta.copy())
    story.train(0, 5)
    story.meet(0, weights=[50])
    story.chronicle.starts(0, story.state)
    story.chronicle.starts(1, genesis)
    for found in (genesis, None):
        with pytest.raises(Violation, match="durable: peer 0"):
            story.chronicle.starts(0, found)
    story.chronicle.gives_up(0)
    story.chronicle.starts(0, genesis)


def test_what_all_who_held_it_took_with_them_may_be_lost() -> None:
    story = Story()
    story.train(0, 5)
    first = story.meet(0, weights=[50]).header.head
    story.train(0, 5)
    second = story.meet(0, weights=[50]).header.head
    story.chronicle.dies([second])
    assert story.chronicle.lost == set()
    story.chronicle.dies([first])
    assert story.chronicle.lost == {second}
    story.chronicle.dies([])
    assert story.chronicle.lost == {first, second}


HEADS = [bytes([i]) * 32 for i in range(4)]
TALKING, APART = -math.inf, math.inf


def settled(peer: int, head: bytes | None, *, place: int = 0, leads: bool = False, decided: bool = False) -> Settled:
    heard = head is not None
    return Settled(
        peer=peer,
        began_s=10.0,
        settles_s=20.0,
        head=head,
        heard=heard,
        place=place,
        leads=leads,
        decided=decided,
    )


def since(well_since_s: float) -> Callable[[int, int], float]:
    return lambda a, b: well_since_s


LEADER = settled(0, HEADS[0], leads=True, decided=True)
"""Most of the group have taken its commit."""
LATER = settled(1, HEADS[1], place=1, leads=True, decided=True)
DEAF = settled(1, None, place=1, leads=True)


@pytest.mark.parametrize("since_s", [TALKING, APART])
@pytest.mark.parametrize(
    "wrong",
    [
        (LEADER, LATER),
        (LEADER, settled(2, HEADS[1], place=1)),
        (
            settled(0, HEADS[0], leads=True, decided=True),
            settled(3, HEADS[0]),
            settled(1, HEADS[1], place=1, leads=True),
        ),
    ],
)
def test_what_most_of_a_group_have_taken_is_the_only_outcome_of_a_round(
    wrong: tuple[Settled, ...], since_s: float
) -> None:
    for *before, last in (wrong, wrong[::-1]):
        story = Story()
        for one in before:
            story.chronicle.settles(b"round", one, since(since_s))
        with pytest.raises(Violation, match="one-outcome"):
            story.chronicle.settles(b"round", last, since(since_s))


def test_rounds_that_end_in_one_way_or_in_several_rounds() -> None:
    story = Story()
    for one in (LEADER, settled(2, HEADS[0]), settled(3, None), dataclasses.replace(LATER, head=HEADS[0])):
        story.chronicle.settles(b"round", one, since(TALKING))
    story.chronicle.settles(b"another", LATER, since(TALKING))


@pytest.mark.parametrize("leader", [LATER, DEAF])
def test_who_leads_in_place_of_others_settles_the_round_as_those_did_whom_it_can_reach(leader: Settled) -> None:
    member = settled(2, HEADS[0])
    for well_since_s in (TALKING, 9.9):
        story = Story()
        story.chronicle.settles(b"round", member, since(well_since_s))
        with pytest.raises(Violation, match="one-outcome"):
            story.chronicle.settles(b"round", leader, since(well_since_s))
    for well_since_s in (APART, 10.1):
        story = Story()
        for one in (member, leader):
            story.chronicle.settles(b"round", one, since(well_since_s))
    known = dataclasses.replace(DEAF, heard=True)  # but most did not take it, or a part of it was to be had nowhere
    story = Story()
    for one in (member, known):
        story.chronicle.settles(b"round", one, since(TALKING))


@pytest.mark.parametrize(("begun_s", "forgotten"), [((12.0, 20.0), True), ((12.0, 20.1), False), ((12.0,), False)])
def test_who_has_met_in_two_later_rounds_tells_nobody_how_that_one_ended(
    begun_s: tuple[float, ...], forgotten: bool
) -> None:
    """However well they can talk: it serves that round no more when the leader begins to ask."""
    story, member = Story(), settled(2, HEADS[0])
    story.chronicle.settles(b"round", member, since(TALKING))
    for i, at_s in enumerate(begun_s):
        story.chronicle.settles(bytes([i]), dataclasses.replace(member, began_s=at_s), since(TALKING))
    with nullcontext() if forgotten else pytest.raises(Violation, match="one-outcome"):
        story.chronicle.settles(b"round", DEAF, since(TALKING))


def test_who_tells_a_leader_of_no_commit_takes_none_from_a_leader_before_it() -> None:
    story = Story()
    story.chronicle.denies(b"round", 1, 2)
    story.chronicle.denies(b"round", 1, 1)
    story.chronicle.settles(b"another", settled(1, HEADS[0], place=1), since(APART))
    story.chronicle.settles(b"round", settled(2, HEADS[0], place=1), since(APART))
    story.chronicle.settles(b"round", settled(1, None, place=1), since(APART))
    story.chronicle.settles(b"round", settled(1, HEADS[0], place=2), since(APART))
    with pytest.raises(Violation, match="one-outcome"):
        story.chronicle.settles(b"round", settled(1, HEADS[0], place=1), since(APART))


X, Y = sorted(HEADS[2:])
"""Two heads of outer step 3, both from HEADS[1]."""


def at(head: bytes, step: int = 3, *older: bytes) -> Standing:
    return Standing(step=step, head=head, heads=(*older, HEADS[1], HEADS[0]))


def voters(*heads: bytes) -> list[Record]:
    return [
        record_of(identity(10 + i), step=3, head=head, heads=[HEADS[1], HEADS[0]], committed=True)
        for i, head in enumerate(heads)
    ]


@pytest.mark.parametrize(
    ("mine", "others", "target"),
    [
        (at(Y), voters(Y, X, X), (3, X)),  # even, and the smaller digest
        (at(X), voters(Y, Y), (3, Y)),
        (at(X), voters(X, Y, Y), (3, X)),
        (at(HEADS[1], 2), voters(Y, X, X), (3, Y)),  # nothing is given up
        (dataclasses.replace(at(X), step=0), voters(Y, X), (3, Y)),
        (None, voters(Y), (3, Y)),
        (at(X), [], None),
    ],
)
def test_peers_follow_for_good_reasons(
    mine: Standing | None, others: list[Record], target: tuple[int, bytes] | None
) -> None:
    Story().chronicle.follows(others, mine, {}, target)


@pytest.mark.parametrize(
    ("mine", "others", "target"),
    [
        (at(X), voters(X, Y, Y), (3, Y)),
        (at(Y), voters(Y, X), (3, X)),
        (at(bytes([9]) * 32, 4, X), voters(X, Y), (3, Y)),
    ],
)
def test_nobody_gives_up_what_it_has_committed_for_less(
    mine: Standing, others: list[Record], target: tuple[int, bytes]
) -> None:
    with pytest.raises(Violation, match="head-choice"):
        Story().chronicle.follows(others, mine, {}, target)
