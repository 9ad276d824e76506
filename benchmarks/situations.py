"""The situations of ``homes``: where the seed and the trainers of a swarm are in an internet, and what happens there.

In each, all machines have lines of 100 Mbit/s without delay, and all trainers the flags of ``p2p-diloco peer``, as far
as nothing else is said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.internet import BOTH, IPV4, IPV6, Families, Internet, Line, Node, Router, Translation
from p2p_diloco.lab.children import SEED, names_of
from p2p_diloco.lab.namespaces import LISTEN, PORT

TRAINERS = 4
PEERS = tuple(names_of(TRAINERS)[1:])
LAST = PEERS[-1]
"""Whose trouble it is where one has some."""
METRICS_PORT = 9100
"""Of every trainer, for its own machine alone."""
CLIENT = ("--client-mode",)
FAST_MBIT = 100.0
FAST = Line(up_mbit=FAST_MBIT, down_mbit=FAST_MBIT)
SEED_MBIT = 40.0
"""Of the seed where all trainers need it: so little that its line, and not this machine's cores, makes the stall."""
SEED_DELAY_S = 0.02
FAR_S = 0.02
"""Of a line, in each direction: from one machine to another and back it is four times as long."""


@dataclass(frozen=True, kw_only=True)
class Home:
    """A node with the peer that runs there."""

    node: Node
    more: tuple[str, ...] = ()
    """Options of that peer."""

    @property
    def enter(self) -> tuple[str, ...]:
        """Returns what a command begins with to run there."""
        return self.node.enter

    @property
    def options(self) -> tuple[str, ...]:
        """Returns the options of the peer."""
        return LISTEN, *self.node.maddrs, "--metrics-addr", str(METRICS_PORT), *self.more


Homes = dict[str, Home]


@dataclass(frozen=True, kw_only=True)
class Situation:
    """A swarm's homes, and what is asked of it beyond what is asked of all."""

    name: str
    lay: Callable[[Internet], Homes]
    """Lays the lines of a seed and all trainers."""
    troubled: frozenset[str] = frozenset()
    """Trainers for which the situation is hard; it shall not be hard for the others."""
    contribute: frozenset[str] = frozenset()
    """Trainers that shall contribute all the same."""
    hub: Line | None = None
    """The seed's line, where nobody else can be dialled."""
    happens: Callable[[Mapping[str, Home]], None] | None = None
    """What comes to pass in mid-run."""


def hosts(internet: Internet, names: tuple[str, ...], line: Line = FAST, families: Families = IPV4) -> Homes:
    """Returns machines that everybody can dial."""
    return {name: Home(node=internet.host(name, line, families=families)) for name in names}


def homes(
    internet: Internet, names: tuple[str, ...], *, translation: Translation = "kept ports", more: tuple[str, ...] = ()
) -> Homes:
    """Returns machines that are each behind a router of its own."""
    routers = {name: internet.router(f"router of {name}", FAST, translation=translation) for name in names}
    return {name: Home(node=internet.home(name, router), more=more) for name, router in routers.items()}


def no_nat(internet: Internet) -> Homes:
    return hosts(internet, (SEED, *PEERS))


def one_public_trainer(internet: Internet, more: tuple[str, ...] = ()) -> Homes:
    return hosts(internet, (SEED, PEERS[0])) | homes(internet, PEERS[1:], more=more)


def clients(internet: Internet) -> Homes:
    return one_public_trainer(internet, CLIENT)


HUB = Line(up_mbit=SEED_MBIT, down_mbit=SEED_MBIT, delay_s=SEED_DELAY_S)


def only_the_seed_is_public(internet: Internet) -> Homes:
    return hosts(internet, (SEED,), HUB) | homes(internet, PEERS)


def double_nat(internet: Internet) -> Homes:
    router = internet.router("router", behind=internet.router("provider", FAST))
    return hosts(internet, (SEED, *PEERS[:-1])) | {LAST: Home(node=internet.home(LAST, router))}


def two_behind_one_router(internet: Internet) -> Homes:
    router = internet.router("router", FAST)
    return hosts(internet, (SEED, *PEERS[:2])) | {name: Home(node=internet.home(name, router)) for name in PEERS[2:]}


def random_ports(internet: Internet) -> Homes:
    return hosts(internet, (SEED, *PEERS[:2])) | homes(internet, PEERS[2:], translation="random ports")


def port_forward(internet: Internet) -> Homes:
    router = internet.router("router", FAST)
    home = internet.home(LAST, router)
    router.forward(PORT, home)
    announced = ("--announce-maddrs", f"/ip4/{router.address}/tcp/{PORT}")
    return hosts(internet, (SEED, *PEERS[:-1])) | {LAST: Home(node=home, more=announced)}


def ipv6_only(internet: Internet) -> Homes:
    return (
        hosts(internet, (SEED,), families=BOTH) | hosts(internet, PEERS[:-1]) | hosts(internet, (LAST,), families=IPV6)
    )


def dual_stack(internet: Internet) -> Homes:
    """Two have both families, and of the others each has another one."""
    return (
        hosts(internet, (SEED, *PEERS[:2]), families=BOTH)
        | hosts(internet, (PEERS[2],))
        | hosts(internet, (LAST,), families=IPV6)
    )


def slow_link(up_mbit: float) -> Callable[[Internet], Homes]:
    """Returns what lays the lines where one can send no faster."""

    def lay(internet: Internet) -> Homes:
        slow = Line(up_mbit=up_mbit, down_mbit=FAST_MBIT)
        return hosts(internet, (SEED, *PEERS[:-1])) | hosts(internet, (LAST,), slow)

    return lay


def one_client(internet: Internet) -> Homes:
    return hosts(internet, (SEED, *PEERS[:-1])) | homes(internet, (LAST,), more=CLIENT)


def new_address(homes: Mapping[str, Home]) -> None:
    """Gives the router of the last one another address."""
    router = homes[LAST].node.above
    assert isinstance(router, Router)
    router.change_address()


def far_apart(internet: Internet) -> Homes:
    return hosts(internet, (SEED, *PEERS), Line(up_mbit=FAST_MBIT, down_mbit=FAST_MBIT, delay_s=FAR_S))


ONE = frozenset({LAST})
REFERENCE = Situation(name="no NAT", lay=no_nat)
SITUATIONS = (
    REFERENCE,
    Situation(name="one public trainer, the others clients", lay=clients, troubled=frozenset(PEERS[1:])),
    Situation(name="one public trainer, default flags", lay=one_public_trainer, troubled=frozenset(PEERS[1:])),
    Situation(name="only the seed is public", lay=only_the_seed_is_public, troubled=frozenset(PEERS), hub=HUB),
    Situation(name="double NAT", lay=double_nat, troubled=ONE),
    Situation(name="two behind one router", lay=two_behind_one_router, troubled=frozenset(PEERS[2:])),
    Situation(name="random ports", lay=random_ports, troubled=frozenset(PEERS[2:])),
    Situation(name="port forward", lay=port_forward, troubled=ONE),
    Situation(name="one IPv6 only", lay=ipv6_only, troubled=ONE, contribute=ONE),
    Situation(name="dual stack", lay=dual_stack, troubled=frozenset(PEERS[2:]), contribute=ONE),
    Situation(name="one at 10 Mbit/s up", lay=slow_link(10.0), troubled=ONE),
    Situation(name="one at 1 Mbit/s up", lay=slow_link(1.0), troubled=ONE),
    Situation(name="a router's new address", lay=one_client, troubled=ONE, happens=new_address),
    Situation(name="100 Mbit/s, 80 ms", lay=far_apart, troubled=frozenset(PEERS)),
)
