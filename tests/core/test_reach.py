"""Who reaches whom, by families of addresses, and who averages: compared with a count over all pairs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from p2p_diloco.core.reach import BOTH, IPV4, IPV6, Ways, fit_to_average, leaves_out, main_family, reaches, ways_of

ALONE4, ALONE6 = (Ways(reached_over=over, reaches_over=over) for over in (IPV4, IPV6))
DUAL = Ways(reached_over=BOTH, reaches_over=BOTH)
HOME = Ways(client_mode=True, reaches_over=IPV4)
HOME6 = Ways(client_mode=True, reaches_over=BOTH)
OPEN6 = Ways(reached_over=IPV6, reaches_over=BOTH)
KINDS = (ALONE4, ALONE6, DUAL, HOME, HOME6, OPEN6)


@pytest.mark.parametrize(
    ("one", "other", "there"),
    [
        (ALONE4, ALONE4, True),
        (ALONE4, ALONE6, False),
        (ALONE6, ALONE4, False),
        (ALONE6, DUAL, True),
        (ALONE4, OPEN6, False),
        (OPEN6, ALONE4, True),
        (HOME, ALONE4, True),
        (HOME, ALONE6, False),
    ],
)
def test_reaches(one: Ways, other: Ways, there: bool) -> None:
    assert reaches(one, other) is there


def families(over: int) -> set[int]:
    return {family for family in (4, 6) if over & {4: IPV4, 6: IPV6}[family]}


def averaging(peers: Sequence[Ways]) -> list[int]:
    """As ``fit_to_average``, from the words of its docstring."""
    having = {family: sum(family in families(one.reaches_over) for one in peers) for family in (4, 6)}
    main = 4 if having[4] >= having[6] else 6
    fit = []
    for i, one in enumerate(peers):
        by_all = all(families(peer.reaches_over) & families(one.reached_over) for peer in peers)
        if not one.client_mode and (main in families(one.reached_over) or by_all):
            fit.append(i)
    return fit


SWARMS = [swarm for size in (1, 2, 3, 4) for swarm in itertools.combinations_with_replacement(KINDS, size)]


def test_those_average_that_most_reach() -> None:
    for swarm in SWARMS:
        assert fit_to_average(swarm, swarm) == [swarm[i] for i in averaging(swarm)], swarm


def test_all_that_have_the_main_family_reach_each_other() -> None:
    for swarm in SWARMS:
        main = main_family(swarm)
        having = [one for one in swarm if one.reaches_over & main]
        assert 2 * len(having) >= len(swarm), "who most reach is reached by half of all at least"
        for one, other in itertools.product(having, fit_to_average(swarm, swarm)):
            assert reaches(one, other)


def test_where_all_have_one_family_it_makes_no_difference() -> None:
    for swarm in itertools.product((ALONE4, HOME), repeat=4):
        assert fit_to_average(swarm, swarm) == [one for one in swarm if not one.client_mode]
        assert not leaves_out(swarm, DUAL)


def test_one_that_lies_takes_nothing_from_the_others() -> None:
    """Whatever the fourth one says, three average for each other as before."""
    for liar in KINDS:
        assert fit_to_average([ALONE4] * 3, [*[ALONE4] * 3, liar]) == [ALONE4] * 3


@pytest.mark.parametrize(
    ("trainers", "helper", "left_out"),
    [
        ([ALONE4, ALONE4, ALONE4, ALONE6], DUAL, True),
        ([ALONE4, ALONE4, ALONE4, ALONE6], ALONE4, False),
        ([ALONE4, ALONE4, ALONE4, ALONE6], Ways(client_mode=True, reached_over=BOTH), False),
        ([DUAL, DUAL, ALONE4, ALONE6], DUAL, True),
        ([DUAL, DUAL, ALONE6], DUAL, False),
        ([ALONE4, DUAL, HOME], DUAL, False),
        ([HOME, HOME], DUAL, False),
        ([], DUAL, False),
    ],
)
def test_the_seed_helps_whom_it_reaches_and_the_others_do_not(
    trainers: list[Ways], helper: Ways, left_out: bool
) -> None:
    assert leaves_out(trainers, helper) is left_out


PUBLIC, PRIVATE, HERE = (f"/ip4/{ip}/tcp/4001" for ip in ("1.1.1.1", "192.168.1.2", "127.0.0.1"))
PUBLIC6, LOCAL6, HERE6, LINK6 = (f"/ip6/{ip}/tcp/4001" for ip in ("2606:4700::1", "fd00::2", "::1", "fe80::1"))
NAME = "/dns/example.org/tcp/4001"


@pytest.mark.parametrize(
    ("own", "others", "outward", "reached_over", "reaches_over"),
    [
        ([PUBLIC], [PUBLIC], ["1.1.1.1"], IPV4, IPV4),
        ([PUBLIC6], [PUBLIC], ["2606:4700::1"], IPV6, IPV6),
        ([PUBLIC, PUBLIC6], [PUBLIC], ["1.1.1.1", "2606:4700::1"], BOTH, BOTH),
        ([PRIVATE], [PUBLIC], ["192.168.1.2"], IPV4, IPV4),
        ([PRIVATE, PUBLIC6], [PUBLIC], ["192.168.1.2", "2606:4700::1"], IPV6, BOTH),
        ([PUBLIC, LOCAL6], [PUBLIC], ["1.1.1.1", "fd00::2"], IPV4, IPV4),
        ([PRIVATE, PUBLIC6], [], ["192.168.1.2", "2606:4700::1"], IPV6, BOTH),
        ([NAME], [PUBLIC], ["192.168.1.2"], IPV4, IPV4),
        ([NAME], [PUBLIC], ["192.168.1.2", "2606:4700::1"], BOTH, BOTH),
        ([HERE], [HERE], [], IPV4, IPV4),
        ([HERE, HERE6], [HERE], [], BOTH, BOTH),
        ([HERE6], [HERE6], [], IPV6, IPV6),
        ([PRIVATE, LOCAL6, LINK6], [PRIVATE], ["192.168.1.2"], BOTH, BOTH),
        ([PRIVATE, LINK6], [PRIVATE], ["192.168.1.2"], IPV4, IPV4),
        ([], [PUBLIC], ["192.168.1.2"], IPV4, IPV4),
        ([], [PUBLIC6], ["2606:4700::1"], IPV4, IPV6),
        ([], [], [], IPV4, IPV4),
    ],
)
def test_a_machine_tells_its_families(
    own: list[str], others: list[str], outward: list[str], reached_over: int, reaches_over: int
) -> None:
    assert ways_of(own, others, outward) == Ways(reached_over=reached_over, reaches_over=reaches_over)
