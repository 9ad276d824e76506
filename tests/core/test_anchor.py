"""Anchors: what their bytes may be, which one is newer, when two contradict each other, and what settles that."""

from __future__ import annotations

from dataclasses import replace

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p_diloco.core.anchor import (
    MAX_ANCHOR_BYTES,
    MAX_ANCHORS,
    Anchor,
    Anchors,
    anchored_steps,
    leads_on,
    open_anchor,
)
from tests.support.builders import OWNER, RUN_ID, damaged, head, identity, plain_values


def after(anchors: Anchors, name: str, step: int = 0) -> Anchor:
    """What the owner signs after these, for the history of this name."""
    step = step or 10 * (len(anchors.chain) + 1)
    return anchors.next(RUN_ID, step=step, head=head(name), state=head(name + "!"), owner=OWNER)


def chain_of(names: str, base: Anchors | None = None) -> Anchors:
    anchors = base or Anchors()
    for name in names:
        anchors = anchors.offered([after(anchors, name)])
    return anchors


FIRST = after(Anchors(), "a")
THREE = chain_of("abc")


# -- bytes -------------------------------------------------------------------------------------------------------------


def test_an_anchor_comes_back_as_it_was() -> None:
    for anchor in THREE.chain:
        assert open_anchor(anchor.to_bytes(), run_id=RUN_ID, owner=OWNER.peer_id) == anchor
        assert len(anchor.to_bytes()) <= MAX_ANCHOR_BYTES


def test_the_largest_anchor_fits() -> None:
    named = (bytes(32), bytes([1]) * 32)
    largest = replace(FIRST, number=2**60 - 1, follows=named, step=2**40 - 1).signed_by(OWNER)
    assert open_anchor(largest.to_bytes(), run_id=RUN_ID, owner=OWNER.peer_id) == largest


@given(st.binary(max_size=2 * MAX_ANCHOR_BYTES) | plain_values.map(msgpack.packb))
def test_any_bytes_are_an_anchor_or_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"anchor|msgpack"):
        Anchor.from_bytes(data)


@given(damaged(FIRST.to_bytes()))
def test_a_damaged_anchor_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"anchor|msgpack"):
        open_anchor(data, run_id=RUN_ID, owner=OWNER.peer_id)


@pytest.mark.parametrize(
    "wrong",
    [
        {"number": 0},
        {"number": True},
        {"number": 2**60},
        {"number": 2},
        {"follows": (bytes(32),)},
        {"number": 2, "follows": (bytes(31),)},
        {"number": 2, "follows": (bytes(32),) * 3},
        {"step": 0},
        {"step": 2**40},
        {"head": bytes(31)},
        {"state": "x" * 32},
        {"run_id": "ab"},
        {"run_id": 5},
    ],
)
def test_a_field_that_is_out_of_its_bounds_is_refused(wrong: dict[str, object]) -> None:
    anchor = replace(FIRST, **wrong).signed_by(OWNER)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="out of its bounds"):
        Anchor.from_bytes(anchor.to_bytes())


def test_only_the_owner_of_the_run_signs() -> None:
    stranger = replace(FIRST, signature=b"").signed_by(identity(1))
    with pytest.raises(ValueError, match="anchor 1 is not signed by the run's owner"):
        open_anchor(stranger.to_bytes(), run_id=RUN_ID, owner=OWNER.peer_id)
    with pytest.raises(ValueError, match="an anchor of another run"):
        open_anchor(FIRST.to_bytes(), run_id="cd" * 20, owner=OWNER.peer_id)


@pytest.mark.parametrize("change", [{"step": 11}, {"head": bytes(32)}, {"state": bytes(32)}])
def test_the_signature_is_over_every_field(change: dict[str, object]) -> None:
    changed = replace(FIRST, **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not signed"):
        open_anchor(changed.to_bytes(), run_id=RUN_ID, owner=OWNER.peer_id)


# -- which one counts --------------------------------------------------------------------------------------------------


def test_those_that_follow_are_taken_in_any_order() -> None:
    assert Anchors().offered(reversed(THREE.chain)) == THREE
    assert (THREE.newest, THREE.number, THREE.contrary) == (THREE.chain[2], 3, None)
    assert (Anchors().newest, Anchors().number) == (None, 0)


def test_an_older_one_changes_nothing() -> None:
    assert THREE.offered(THREE.chain[:2]) == THREE
    assert THREE.offered([after(chain_of("a"), "z")]) == THREE  # an old copy's, which was overtaken long ago
    assert THREE.offered([]) == THREE


def test_who_has_none_begins_with_the_first_one() -> None:
    assert Anchors().offered(THREE.chain[1:]) == Anchors()
    assert Anchors().offered(THREE.chain[:1]).number == 1


def test_what_is_served_is_what_the_other_one_lacks() -> None:
    assert THREE.since(0, 10) == list(THREE.chain)
    assert THREE.since(1, 1) == [THREE.chain[1]]
    assert THREE.since(3, 10) == []


@pytest.mark.parametrize("name", ["x", "xy"])
def test_two_that_contradict_each_other_move_nobody(name: str) -> None:
    """One of the same number with other content, and a later one that does not name the newest."""
    copy = chain_of(name, chain_of("ab"))
    theirs = THREE.offered(copy.chain)
    assert (theirs.chain, theirs.contrary) == (THREE.chain, copy.newest)
    ours = copy.offered(THREE.chain)
    assert ours.chain == copy.chain
    assert (ours.contrary == THREE.newest) == (name == "x")  # one with a lower number is older, and that is all


def test_a_higher_one_that_names_both_settles_it_for_everybody() -> None:
    copy = chain_of("x", chain_of("ab"))
    more = chain_of("de", THREE)
    settles = after(copy.offered(more.chain), "s")
    assert settles.number == 6
    assert set(settles.follows) == {copy.chain[-1].digest, more.chain[-1].digest}
    for before in (copy, more, copy.offered(more.chain), more.offered(copy.chain), more.offered([settles])):
        settled = before.offered([settles])
        assert (settled.newest, settled.contrary) == (settles, None)
        assert settled.offered([*copy.chain, *more.chain]) == settled
    assert copy.offered([*more.chain, settles]).chain == (*copy.chain, settles)


def test_one_that_names_neither_settles_nothing() -> None:
    copy = chain_of("x", chain_of("ab"))
    contradicted = THREE.offered(copy.chain)
    later = after(copy, "y")
    assert contradicted.offered([later]) == replace(contradicted, contrary=later)
    assert not leads_on(THREE.newest, later)
    assert leads_on(copy.newest, later)


def test_the_same_word_twice_is_one() -> None:
    """An owner that is set back, and goes the same way again."""
    again = chain_of("c", chain_of("ab"))
    assert again == THREE
    assert THREE.offered(again.chain) == THREE


@given(st.integers(1, 10**7), st.integers(1, 10**4))
def test_a_run_has_no_more_than_so_many(steps: int, snapshot_every: int) -> None:
    every = anchored_steps(steps, snapshot_every)
    assert every % snapshot_every == 0
    assert steps // every <= MAX_ANCHORS
    assert every == snapshot_every or steps // (every - snapshot_every) > MAX_ANCHORS - 1
