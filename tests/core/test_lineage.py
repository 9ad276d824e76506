"""A chain of certificates is followed as far as each is signed by those that the ones before make known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from p2p_diloco.core.admission import Admission
from p2p_diloco.core.aggregate import AGGREGATIONS
from p2p_diloco.core.certificate import Certified
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.invitation import Token
from p2p_diloco.core.known import WINDOW_STEPS
from p2p_diloco.core.lineage import Lineage
from p2p_diloco.core.roster_rules import RosterRules
from p2p_diloco.core.update import Part, contributor_mask
from tests.support.builders import RUN_ID, identity
from tests.support.certificates import certified, made_by
from tests.support.invited import Shameless, token_of

OWNER = identity(1000)
GENESIS = bytes([7]) * 32
OURS = (identity(20), identity(21), identity(22))
THEIRS = (identity(30), identity(31), identity(32))
RULES = RosterRules(
    run_id=RUN_ID,
    owner=OWNER.peer_id,
    min_group=2,
    max_group=8,
    max_weight_tokens=100,
    aggregation=AGGREGATIONS["mean"],
    on_missed="adopt",
    seeds_reduce="auto",
    admission=Admission.to_all(RUN_ID),
)


def next_by(
    lineage: Lineage,
    members: Sequence[Identity],
    owner: Identity = OWNER,
    rules: RosterRules = RULES,
    tokens: Sequence[Token | None] = (),
) -> Certified:
    """The update of a round of ``members``, who are all in all of it. ``tokens``: one for each of them."""
    part = Part(mask=contributor_mask(range(len(members))), data=bytes(16))
    seats = {who.peer_id: token.seat(who.peer_id) for who, token in zip(members, tokens) if token is not None}
    head = lineage.head or GENESIS
    return certified(*made_by(members, (part,), rules, lineage.known(), head, owner=owner, seats=seats))


def followed(steps: int, members: Sequence[Identity] = OURS) -> tuple[Lineage, list[Certified]]:
    lineage, chain = Lineage(RULES), list[Certified]()
    while len(chain) < steps:
        chain.append(next_by(lineage, members))
        lineage.follow(chain[-1])
    return lineage, chain


def test_from_the_genesis_on() -> None:
    lineage, chain = followed(WINDOW_STEPS + 3)
    assert (lineage.step, lineage.head) == (WINDOW_STEPS + 3, chain[-1].header.head)
    assert lineage.known().peers == {who.peer_id for who in OURS}
    assert [bool(one.certificate.witness) for one in chain] == [True] * WINDOW_STEPS + [False] * 3


def test_on_from_where_somebody_has_followed_it_to() -> None:
    lineage, chain = followed(WINDOW_STEPS + 3)
    last = [one.in_most_parts() for one in chain[:-1]]
    head = chain[-2].header.head
    again = Lineage(RULES, step=len(last), head=head, last=last)
    again.follow(chain[-1])
    assert (again.step, again.head, again.known()) == (lineage.step, lineage.head, lineage.known())


@pytest.mark.parametrize("steps", [0, 1, WINDOW_STEPS, WINDOW_STEPS + 2])
def test_strangers_do_not_lead_on(steps: int) -> None:
    """Before anybody is known, or beside those who are: it takes the owner, or them."""
    lineage, _ = followed(steps)
    with pytest.raises(ValueError, match="not the run's owner"):
        lineage.follow(next_by(lineage, THEIRS, owner=THEIRS[0]))
    alone = next_by(lineage, THEIRS)
    with pytest.raises(ValueError, match="without the witness of the run's owner"):
        lineage.follow(replace(alone, certificate=replace(alone.certificate, witness=b"")))
    assert lineage.step == steps
    lineage.follow(next_by(lineage, OURS))
    assert lineage.step == steps + 1


def test_who_has_become_known_leads_on() -> None:
    lineage, _ = followed(WINDOW_STEPS)
    for _ in range(4):
        lineage.follow(next_by(lineage, (*OURS, THEIRS[0])))
    assert lineage.known().peers == {who.peer_id for who in (*OURS, THEIRS[0])}
    lineage.follow(next_by(lineage, (OURS[0], THEIRS[0])))


def test_who_is_known_elsewhere_does_not_count_here() -> None:
    """Their own branch makes them known to who follows that one, and to nobody else."""
    theirs, _ = followed(WINDOW_STEPS, THEIRS)
    ours, _ = followed(WINDOW_STEPS)
    entry = next_by(theirs, THEIRS)
    with pytest.raises(ValueError, match=r"does not follow from outer step 16"):
        ours.follow(entry)
    theirs.follow(entry)


@pytest.mark.parametrize("change", ["step", "parent", "weights", "full", "state", "round", "signature", "none"])
def test_what_is_changed_does_not_lead_on(change: str) -> None:
    lineage, chain = followed(WINDOW_STEPS + 1)
    one, before = next_by(lineage, OURS), chain[-1]
    header, certificate = one.header, one.certificate
    forged = {
        "step": replace(one, header=replace(header, step=3)),
        "parent": replace(one, header=replace(header, parent=bytes(32))),
        "weights": replace(one, header=replace(header, contributors=(*header.contributors[:2], (OURS[0].peer_id, 9)))),
        "full": replace(one, certificate=replace(certificate, full=b"\x01")),
        "state": replace(one, certificate=replace(certificate, state=bytes(32))),
        "round": replace(one, certificate=before.certificate),
        "signature": replace(one, certificate=replace(certificate, signatures=before.certificate.signatures)),
        "none": replace(one, certificate=replace(certificate, signatures=())),
    }
    with pytest.raises(ValueError, match=r"does not follow|a certificate|a mask"):
        lineage.follow(forged[change])
    lineage.follow(one)
    assert lineage.step == WINDOW_STEPS + 2


BY_INVITATION = Admission(run_id=RUN_ID, owner=OWNER.peer_id, by_invitation=True)
TOKENS = tuple(token_of(name, key=2000 + i) for i, name in enumerate(("attic", "barn", "cellar")))


@pytest.mark.parametrize("steps", [0, WINDOW_STEPS + 1])
@pytest.mark.parametrize(
    ("members", "tokens"),
    [
        ((*OURS[:2], THEIRS[0]), (*TOKENS[:2], None)),
        (OURS, (*TOKENS[:2], TOKENS[1])),
        (OURS, (*TOKENS[:2], token_of("forged", owner=THEIRS[0]))),
    ],
)
def test_a_chain_with_a_member_that_was_not_invited_is_not_followed(
    steps: int, members: Sequence[Identity], tokens: Sequence[Token | None]
) -> None:
    """Or with more of one token than it has places; whoever has signed it."""
    lineage = Lineage(replace(RULES, admission=BY_INVITATION))
    shameless = Shameless(run_id=RUN_ID, owner=OWNER.peer_id, by_invitation=True)
    sound, lax = replace(RULES, admission=BY_INVITATION), replace(RULES, admission=shameless)
    for _ in range(steps):
        lineage.follow(next_by(lineage, OURS, rules=sound, tokens=TOKENS))
    with pytest.raises(ValueError, match=r"has not been invited|than it has places|of another owner"):
        lineage.follow(next_by(lineage, members, rules=lax, tokens=tokens))
    lineage.follow(next_by(lineage, OURS, rules=sound, tokens=TOKENS))
    assert lineage.step == steps + 1


def test_a_chain_stays_sound_when_seats_expire() -> None:
    rules = replace(RULES, admission=BY_INVITATION)
    lineage, old = Lineage(rules), [token_of(f"old-{i}", key=2010 + i, expires_s=1) for i in range(3)]
    lineage.follow(next_by(lineage, OURS, rules=rules, tokens=old))
    assert lineage.step == 1


def test_a_chain_of_another_run_is_none_of_ours() -> None:
    other = replace(RULES, run_id="cd" * 20)
    lineage = Lineage(RULES)
    with pytest.raises(ValueError, match="on another head"):
        lineage.follow(next_by(Lineage(other), OURS, rules=other))
