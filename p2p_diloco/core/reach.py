"""Which peers reach which, as far as the families of their addresses tell: whoever has IPv4 alone cannot dial one that
has IPv6 alone. Pure.

A peer says over which families others dial it, and over which it dials others. It may be wrong, or lie: that costs the
round one dial that fails, as with any peer that says it can be dialled. Whoever says that it reaches fewer than it does
contributes to fewer parts, and moves nothing to itself: those that average are chosen by what most say.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol, TypeVar

from pydantic import Field

from p2p_diloco.core.addresses import family_of, is_of_one_link, is_public, publicness, shares_network

IPV4, IPV6, BOTH = 1, 2, 3
Over = Annotated[int, Field(ge=IPV4, le=BOTH)]
"""One family, or both: a sum of IPV4 and IPV6."""


class Reachable(Protocol):
    """A peer, by its record or its readiness."""

    @property
    def client_mode(self) -> bool: ...

    @property
    def reached_over(self) -> int: ...

    @property
    def reaches_over(self) -> int: ...


R = TypeVar("R", bound=Reachable)


@dataclass(frozen=True, kw_only=True)
class Ways:
    """Says over which families a machine is reached, and which it reaches, as a record does."""

    client_mode: bool = False
    reached_over: int = IPV4
    reaches_over: int = IPV4


IPV4_ALONE = Ways()


def reaches(one: Reachable, other: Reachable) -> bool:
    """Returns whether one peer has a family over which the other one is dialled, where it can be dialled at all."""
    return bool(one.reaches_over & other.reached_over)


def main_family(peers: Collection[Reachable]) -> int:
    """Returns the family over which most of these peers dial others: IPv4, where that is even."""
    over_ipv6 = sum(bool(peer.reaches_over & IPV6) for peer in peers)
    return IPV6 if over_ipv6 > sum(bool(peer.reaches_over & IPV4) for peer in peers) else IPV4


def fit_to_average(candidates: Iterable[R], among: Collection[Reachable]) -> list[R]:
    """Returns those of the candidates that may lead and reduce for the peers ``among`` whom they are: they can be
    dialled, and that over the family that most of these have, or by every one of them. So most reach them all, and they
    each other."""
    main = main_family(among)
    return [
        one
        for one in candidates
        if not one.client_mode and (one.reached_over & main or all(reaches(peer, one) for peer in among))
    ]


def leaves_out(trainers: Sequence[Reachable], helper: Reachable) -> bool:
    """Returns whether one of the trainers does not reach all that average for them, and would reach the seed that
    helps."""
    average = fit_to_average(trainers, trainers)
    lone = [one for one in trainers if not all(reaches(one, other) for other in average)]
    return not helper.client_mode and any(reaches(one, helper) for one in lone)


def ways_of(own: Sequence[str], others: Sequence[str], outward: Sequence[str]) -> Ways:
    """Returns over which families a peer is reached, if it can be dialled, and over which it reaches others. ``own``:
    the addresses that it announces, or listens at. ``others``: those of its initial peers. ``outward``: the IP
    addresses from which this machine would call the internet, one of each family for which it has a route.

    It is reached over the families of its public addresses, or of all where it has none, or is in one network with all
    others. It reaches the families for which it has a route, of IPv6 from a public address; and in one network with all
    others those of its own addresses. A name stands for all families that the machine reaches."""
    near = all(publicness(maddr) >= 2 or shares_network(maddr, own) for maddr in others)
    useful = [maddr for maddr in own if not is_of_one_link(maddr)]
    reaches_over = _over(map(family_of_ip, outward)) | (_over(map(family_of, useful)) if near else 0) or IPV4
    public = [maddr for maddr in useful if publicness(maddr) == 0]
    counted = useful if near and others else public or useful
    named = reaches_over if any(family_of(maddr) == 0 for maddr in counted) else 0
    return Ways(reached_over=_over(map(family_of, counted)) | named or IPV4, reaches_over=reaches_over)


def family_of_ip(text: str) -> int:
    """Returns 4 or 6 for an IP address from which others on the internet can be called; else 0."""
    ip = ipaddress.ip_address(text)
    return 4 if ip.version == 4 else 6 if is_public(ip) else 0


def _over(families: Iterable[int]) -> int:
    """Returns the bits of these families, of which each is 4, 6, or 0 for none."""
    bits = 0
    for family in families:
        bits |= {4: IPV4, 6: IPV6}.get(family, 0)
    return bits
