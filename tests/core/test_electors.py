"""Whose word counts, on histories that are named by letters: one an outer step."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from p2p_diloco.core.admission import Claim
from p2p_diloco.core.electors import NoHistory, electorate, electors_at, fork_step
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.invitation import Token
from p2p_diloco.core.known import LEAST_STEPS, WINDOW_STEPS
from p2p_diloco.core.records import Record
from p2p_diloco.core.swarm_head import Standing, swarm_head
from tests.support.builders import head, identity, record_of
from tests.support.invited import token_of

MINE = "abcdefgh"
ME, KNOWN, OTHERS = identity(1), (identity(2), identity(3), identity(4)), (identity(5), identity(6), identity(7))

MY_CLAIM = Claim(peer_id=ME.peer_id, seat=b"")


@dataclass
class Ledger:
    """Of a peer that came by ``history``; ``known[step]``: who has a vote from there on."""

    history: str = MINE
    known: dict[int, tuple[str, ...]] = field(default_factory=dict)

    def step_of(self, at: bytes) -> int | None:
        return next((step for step in range(len(self.history) + 1) if head(self.history[:step]) == at), None)

    def electors(self, step: int) -> frozenset[str]:
        return frozenset(self.known[max(known for known in self.known if known <= step)])


def ids(*who: object) -> tuple[str, ...]:
    return tuple(one.peer_id for one in who)  # type: ignore[attr-defined]


OURS = Ledger(known={0: ids(ME, *KNOWN)})
LED_OFF = Ledger(known={0: ids(*KNOWN), 4: ids(ME, *OTHERS)})
"""That of a newcomer that liars have led off after outer step 3: they alone are known there."""


def standing(history: str = MINE) -> Standing:
    heads = tuple(head(history[:back]) for back in range(len(history) - 1, max(len(history) - 5, -1), -1))
    return Standing(step=len(history), head=head(history), heads=heads)


def ways(*histories: str) -> dict[bytes, bytes]:
    """What is known to come before what."""
    return {head(one[: i + 1]): head(one[:i]) for one in histories for i in range(len(one))}


def swarm(records: list[Record], ledger: Ledger, *histories: str) -> tuple[int, bytes] | None:
    before = ways(MINE, *histories)
    voters, mine = electorate(records, standing(), MY_CLAIM, before, ledger)
    return swarm_head(voters, mine, before)


def test_in_the_beginning_whoever_has_contributed_has_a_vote_and_later_whoever_is_known() -> None:
    once, often = [("a", "b")], [("c",)] * LEAST_STEPS
    assert electors_at(0, [], "owner") == {"owner"}
    for step in (5, WINDOW_STEPS - 1):
        assert electors_at(step, [*once, *often], "owner") == {"owner", "a", "b", "c"}
    assert electors_at(WINDOW_STEPS, [*once, *often], "owner") == {"owner", "c"}
    assert electors_at(WINDOW_STEPS, once, "owner") == {"owner"}, "nobody is known, and yet no others have a vote"


def test_who_is_not_known_has_no_vote() -> None:
    """However many they are, and however far they say that they are."""
    strangers = [record_of(identity(i), "abcdefghxyz") for i in range(50, 80)]
    at_home = [record_of(who, MINE) for who in KNOWN]
    assert swarm([*strangers, *at_home], OURS, "abcdefghxyz") == (8, head(MINE))
    assert swarm([*strangers, *at_home], OURS) == (8, head(MINE))


def test_where_nobody_else_with_a_vote_is_there_everybody_has_one() -> None:
    """To follow a claim takes certificates anyhow."""
    strangers = [record_of(identity(i), "abcdefghi") for i in (50, 51)]
    assert swarm(strangers, OURS) == (9, head("abcdefghi"))


def test_known_members_that_have_gone_on_are_followed() -> None:
    records = [record_of(who, "abcdefghi") for who in KNOWN[:2]]
    assert swarm(records, OURS) == (9, head("abcdefghi"))


def test_who_was_led_off_comes_back_to_those_that_were_known_at_the_fork() -> None:
    """Its own ledger names liars alone, which are as many as there are honest peers, and one more."""
    honest, liars = [record_of(who, "abcuvwxyz") for who in KNOWN], [record_of(who, MINE) for who in OTHERS]
    assert swarm([*honest, *liars], LED_OFF, "abcuvwxyz") == (9, head("abcuvwxyz"))
    assert swarm([*honest, *liars], LED_OFF) == (8, head(MINE)), "until their way is known"


def test_a_strangers_branch_parts_from_nothing() -> None:
    """Whoever could name an old outer step as the place where its branch parts would choose who has a vote."""
    before = ways(MINE, "axyz")
    assert fork_step([record_of(identity(50), "axyz")], standing(), before, OURS) == 8
    assert fork_step([record_of(KNOWN[0], "axyz")], standing(), before, OURS) == 1
    assert fork_step([record_of(OTHERS[0], "abcdxyz")], standing(), ways(MINE, "abcdxyz"), LED_OFF) == 4


@pytest.mark.parametrize("history", ["abcd", MINE, "abcdefghij"])
def test_who_is_behind_or_ahead_on_my_way_is_on_no_branch(history: str) -> None:
    assert fork_step([record_of(KNOWN[0], history)], standing(), ways(MINE, "abcdefghij"), OURS) == 8


def test_there_is_one_genesis() -> None:
    """Who claims another one has no vote, where everybody has one, too."""
    elsewhere = record_of(identity(50), head=bytes(32))
    at_home, nowhere = record_of(identity(51)), NoHistory()
    assert electorate([elsewhere, at_home], standing(""), MY_CLAIM, {}, nowhere) == ([at_home], standing(""))
    assert electorate([elsewhere, at_home], standing(), MY_CLAIM, {}, OURS) == ([at_home], standing())


def test_my_own_standing_counts_if_i_have_a_vote() -> None:
    records = [record_of(KNOWN[0], "abcdefg")]
    assert electorate(records, standing(), MY_CLAIM, {}, OURS) == (records, standing())
    assert electorate(records, standing(), Claim(peer_id=identity(9).peer_id, seat=b""), {}, OURS) == (records, None)


def test_without_a_ledger_everybody_has_a_vote() -> None:
    records = [record_of(identity(i), MINE) for i in range(3) if identity(i) != ME]
    records.sort(key=lambda record: record.peer_id)
    assert electorate(records, standing(), MY_CLAIM, {}, NoHistory()) == (records, standing())


# -- by invitation -----------------------------------------------------------------------------------------------------

TWO, ATTIC = token_of("two", places=2), token_of("attic", key=2001)


def seated(who: Identity, token: Token, history: str = MINE) -> Record:
    return record_of(who, history, seat=token.seat(who.peer_id))


def test_of_one_token_one_that_has_a_vote_votes() -> None:
    """Not another one of it that is further, or says so."""
    ahead, behind = seated(identity(50), TWO, "abcdefghi"), seated(KNOWN[0], TWO)
    other = seated(KNOWN[1], ATTIC)
    voters, mine = electorate([ahead, behind, other], standing(), MY_CLAIM, {}, OURS)
    assert {record.peer_id for record in voters} == set(ids(*KNOWN[:2]))
    assert mine == standing()


def test_all_of_one_token_have_one_vote() -> None:
    records = [seated(who, TWO) for who in KNOWN]
    voters, _ = electorate(records, standing(), MY_CLAIM, {}, OURS)
    assert len(voters) == 1


def test_the_others_of_my_token_have_no_vote_beside_mine() -> None:
    me = Claim(peer_id=ME.peer_id, seat=TWO.seat(ME.peer_id))
    mate, other = seated(KNOWN[0], TWO), seated(KNOWN[1], ATTIC)
    assert electorate([mate, other], standing(), me, {}, OURS) == ([other], standing())
    assert electorate([mate], standing(), me, {}, OURS) == ([], standing())


def test_another_one_of_my_token_has_the_vote_that_i_have_not() -> None:
    newcomer = Claim(peer_id=identity(9).peer_id, seat=TWO.seat(identity(9).peer_id))
    mate = seated(KNOWN[0], TWO)
    assert electorate([mate], standing(), newcomer, {}, OURS) == ([mate], None)


def test_where_nobody_has_a_vote_each_token_has_one() -> None:
    me = Claim(peer_id=ME.peer_id, seat=TWO.seat(ME.peer_id))
    crowd = [seated(identity(i), ATTIC) for i in (50, 51, 52)]
    voters, mine = electorate([*crowd, seated(identity(53), TWO)], standing(), me, {}, NoHistory())
    assert ([record.seat in [one.seat for one in crowd] for record in voters], mine) == ([True], standing())
