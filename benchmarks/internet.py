"""An internet on this machine, of homes behind routers: Linux's namespaces, with addresses that look public.

    backbone          forwards between all that hang on it; it drops what nobody has
     |-- host         5.9.K.2, and 2a01:4f8:K::2 where it has IPv6
     +-- router       5.9.K.2, translates for its homes (NAT)
          |-- home    192.168.1.2, ...
          +-- router  100.64.1.2, of a provider's: its homes are behind two
               +-- home

Every line has a rate in each direction and a delay. Routers use nftables, as those that people have use its ancestors.
Nothing outside these namespaces sees any of it, and nothing is left when this process ends, however it does.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, TypeVar

from benchmarks import cable
from p2p_diloco.core.errors import NetworkError
from p2p_diloco.lab.namespaces import PORT, Namespace, hold, run, why_not

TOOLS = ("nft", "tc")
Translation: TypeAlias = Literal["kept ports", "random ports"]
"""What a router makes of a port that a home uses: where it can the same, so that it can be foretold; or any."""
Families: TypeAlias = frozenset[Literal[4, 6]]
IPV4: Families = frozenset({4})
IPV6: Families = frozenset({6})
BOTH: Families = frozenset({4, 6})
QUEUE_S = 0.1
"""How long a packet waits for a line that is full before it is lost."""
BURST_BYTES = 16_384
"""That pass a shaped line at once. Below a kernel's tick at 100 Mbit/s tbf would not reach its rate."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """What a place's line to the next one carries. Rates of None are without limit."""

    up_mbit: float | None = None
    down_mbit: float | None = None
    delay_s: float = 0.0
    """In each direction."""


@dataclass(kw_only=True)
class Node:
    """A host, home or router: a namespace whose device ``wan`` leads to the next one."""

    name: str
    namespace: Namespace
    above: Node | None
    """What its line leads to; None for the backbone."""
    network: int
    """Its own network's number among those above."""
    families: Families = IPV4
    below: int = 0
    """How many networks hang on it."""
    moves: int = 0
    """How often its address has changed."""

    @property
    def enter(self) -> tuple[str, ...]:
        """Returns what a command begins with to run in it."""
        return self.namespace.enter

    @property
    def address(self) -> str:
        """Returns its IPv4 address on the line to the next one."""
        return f"{self.prefix}.{2 + self.moves}"

    @property
    def prefix(self) -> str:
        """Returns what its IPv4 network's addresses begin with."""
        assert self.above is not None, "the backbone has no address of its own"
        if self.above.above is None:
            return f"5.9.{self.network}"
        return f"100.64.{self.network}" if isinstance(self, Router) else f"192.168.{self.network}"

    @property
    def prefix6(self) -> str:
        """Returns what its IPv6 network's addresses begin with. A home's are its router's to give."""
        assert self.above is not None, "the backbone has no address of its own"
        return (
            f"2a01:4f8:{self.network}:0:" if self.above.above is None else f"{self.above.delegated}:{self.network:x}:"
        )

    @property
    def delegated(self) -> str:
        """Returns what the IPv6 addresses of all networks below it begin with."""
        return f"2a01:4f8:{self.network}"

    @property
    def address6(self) -> str:
        """Returns its IPv6 address."""
        return f"{self.prefix6}:2"

    @property
    def maddrs(self) -> tuple[str, ...]:
        """Returns the addresses for a peer to listen on, one of each family that it has."""
        maddrs = {4: f"/ip4/{self.address}/tcp/{PORT}", 6: f"/ip6/{self.address6}/tcp/{PORT}"}
        return tuple(maddrs[family] for family in sorted(self.families))

    def run(self, words: str) -> None:
        """Runs a command in it. NetworkError when it fails."""
        run(*self.enter, *words.split())


@dataclass(kw_only=True)
class Router(Node):
    """Translates addresses for what is behind it, and lets nobody in who was not asked, over IPv6 neither."""

    def forward(self, port: int, home: Node) -> None:
        """Lets connections to ``port`` through to the same port of ``home``."""
        nft(self, f"add rule ip nat before iifname wan tcp dport {port} dnat to {home.address}")

    def forget_after(self, seconds: int) -> None:
        """Makes it forget connections on which nothing has come for that long."""
        self.run(f"sysctl -q -w net.netfilter.nf_conntrack_tcp_timeout_established={seconds}")

    def remembers(self, home: Node) -> bool:
        """Returns whether it knows a connection of ``home``."""
        command = (*self.enter, "cat", "/proc/net/nf_conntrack")
        return f"src={home.address} " in subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def change_address(self) -> None:
        """Gives it another address, as providers do at night: what its homes had open ends for them when they use it,
        and for the others never."""
        self.run(f"ip addr del {self.address}/24 dev wan")
        self.moves += 1
        self.run(f"ip addr add {self.address}/24 dev wan")
        self.run(f"ip route replace default via {self.prefix}.1")


NodeKind = TypeVar("NodeKind", bound=Node)


class Internet:
    """A backbone with what hangs on it, as a context manager. NetworkError when it cannot be made; ``why_no_internet``
    tells before."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self.carriers: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Internet:
        self.backbone = Node(name="backbone", namespace=hold(""), above=None, network=0, families=BOTH)
        self.backbone.run("ip link set lo up")
        make_forward(self.backbone)
        # What nobody has is lost without an answer, as on the way to a machine that is switched off.
        nft(self.backbone, "add table inet silence")
        nft(self.backbone, "add chain inet silence answers { type filter hook output priority 0; }")
        nft(self.backbone, "add rule inet silence answers icmp type destination-unreachable drop")
        nft(self.backbone, "add rule inet silence answers icmpv6 type destination-unreachable drop")
        return self

    def __exit__(self, *_: object) -> None:
        for carrier in self.carriers:
            carrier.communicate()
        for node in (*self.nodes.values(), self.backbone):
            node.namespace.holder.communicate()  # closes its input: it ends

    def host(self, name: str, line: Line | None = None, *, families: Families = IPV4) -> Node:
        """Returns a new machine with public addresses."""
        node = self._new(Node, name, self.backbone, families)
        self._connect(node, line or Line())
        return node

    def home(self, name: str, router: Router, line: Line | None = None) -> Node:
        """Returns a new machine behind ``router``, with its families."""
        node = self._new(Node, name, router, router.families)
        self._connect(node, line or Line())
        return node

    def router(
        self,
        name: str,
        line: Line | None = None,
        *,
        behind: Router | None = None,
        families: Families = IPV4,
        translation: Translation = "kept ports",
    ) -> Router:
        """Returns a new router, on the backbone or ``behind`` another one, a provider's."""
        node = self._new(Router, name, behind or self.backbone, families)
        self._connect(node, line or Line())
        make_forward(node)
        how = " fully-random" if translation == "random ports" else ""
        nft(node, "add table ip nat")
        nft(node, "add chain ip nat before { type nat hook prerouting priority -100; }")
        nft(node, "add chain ip nat after { type nat hook postrouting priority 100; }")
        nft(node, f"add rule ip nat after oifname wan masquerade{how}")
        nft(node, "add table inet guard")
        nft(node, "add chain inet guard inward { type filter hook forward priority 0; }")
        nft(node, "add rule inet guard inward iifname wan ct state new ct status ! dnat drop")
        return node

    def _new(self, kind: type[NodeKind], name: str, above: Node, families: Families) -> NodeKind:
        above.below += 1
        node = kind(name=name, namespace=hold(""), above=above, network=above.below, families=families)
        self.nodes[name] = node
        node.run("ip link set lo up")
        return node

    def _connect(self, node: Node, line: Line) -> None:
        """Lays a node's line to the one above, gives both ends addresses, and shapes what leaves either."""
        above, down = node.above, f"down{node.network}"
        assert above is not None
        holders = above.namespace.holder.pid, node.namespace.holder.pid
        if line.delay_s:
            self._lay_slow_cable(line.delay_s, holders, down)
        else:
            above.run(f"ip link add dev {down} type veth peer name wan netns {holders[1]}")
        for one, device, number, rate_mbit in ((above, down, 1, line.down_mbit), (node, "wan", 2, line.up_mbit)):
            one.run(f"ip link set {device} up")
            if 4 in node.families:
                one.run(f"ip addr add {node.prefix}.{number}/24 dev {device}")
            if 6 in node.families:
                one.run(f"ip -6 addr add {node.prefix6}:{number}/64 dev {device} nodad")
            if rate_mbit is not None:
                shape = f"rate {rate_mbit}mbit burst {BURST_BYTES} latency {QUEUE_S * 1000:.0f}ms"
                one.run(f"tc qdisc replace dev {device} root tbf {shape}")
        if 4 in node.families:
            node.run(f"ip route add default via {node.prefix}.1 dev wan")
        if 6 in node.families:
            node.run(f"ip -6 route add default via {node.prefix6}:1 dev wan")
            if isinstance(node, Router):
                above.run(f"ip -6 route add {node.delegated}::/48 via {node.address6} dev {down}")

    def _lay_slow_cable(self, delay_s: float, holders: tuple[int, int], down: str) -> None:
        ends = (str(holders[0]), down, str(holders[1]), "wan")
        words = (sys.executable, "-I", cable.__file__, str(delay_s), *ends)
        carrier = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        self.carriers.append(carrier)
        assert carrier.stdout is not None
        if not carrier.stdout.readline():
            raise NetworkError(f"a cable with a delay cannot be made: its process ends with exit code {carrier.wait()}")


def make_forward(node: Node) -> None:
    """Makes a node forward what is not for itself."""
    for key in ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"):
        node.run(f"sysctl -q -w {key}=1")


def nft(node: Node, rule: str) -> None:
    """Adds to a node's filter."""
    run(*node.enter, "nft", rule)


def why_no_internet() -> str | None:
    """Returns why this process cannot make an internet; None if it can."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{missing[0]} is not installed (nftables and iproute2 have what is needed)"
    if os.geteuid() != 0:
        return "only root may"
    return why_not() or (None if Path(cable.DEVICE).exists() else f"there is no {cable.DEVICE}")
