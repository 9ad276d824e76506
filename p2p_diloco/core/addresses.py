"""Multiaddrs: what a user may give, what others can dial, how p2pd wants them. Pure, but for one trial of a port.

    /ip4/203.0.113.7/tcp/4001/p2p/PEER-ID               /dns/example.org/tcp/4001/p2p/PEER-ID
    /ip4/203.0.113.7/tcp/4001/p2p/RELAY-ID/p2p-circuit/p2p/PEER-ID

TCP only. Binary form: https://github.com/multiformats/multiaddr/blob/master/protocols.csv. hivemind has a Multiaddr,
too, but writes an Ed25519 peer id as a CID, which p2pd does not take, and needs 2 s to import.
"""

from __future__ import annotations

import errno
import ipaddress
import itertools
import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import base58

from p2p_diloco.core.errors import UsageError
from p2p_diloco.core.identity import public_key_of

HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
EXAMPLE = "/ip4/203.0.113.7/tcp/4001"
INTERNET = ipaddress.IPv6Network("2000::/3")
"""Global unicast: RFC 4291."""
MAX_MADDRS = 5
"""Of a record."""
MAX_MADDR_CHARS = 192
"""Of one of them: through a relay at an address of IPv6 it has two ids."""
ADDRESSES_KEPT = 4096
"""Those of the same peers are sorted again and again."""
DIAL_REASONS = {
    "peer id mismatch": "another peer answers at that address",
    "dial to self": "that is this peer itself",
    "connection refused": "connection refused",
    "no good addresses": "its host name is unknown, or none of its addresses can be dialled",
    "network is unreachable": "network is unreachable",
    "no route to host": "no route to host",
    "timeout": "no answer",
    "deadline exceeded": "no answer",
    "dial backoff": "was not there a moment ago",
    "failed to negotiate security protocol": "some other program answers at that address",
    "failed to find any peer": "nobody knows its address",
    "protocols not supported": "does not serve this protocol",
}
"""What p2pd says, most telling first, and how we say it."""


def encode(maddr: str) -> bytes:
    """Returns the binary form of an address. Raises a ValueError that says which part is wrong."""
    begin, *pieces = maddr.split("/")
    if begin or not pieces:
        raise ValueError("it begins with no '/'")
    encoded = b""
    while pieces:
        name = pieces.pop(0)
        if name not in PARTS:
            raise ValueError(f"{name!r} is no part of a TCP address")
        code, value_of = PARTS[name]
        encoded += code
        if value_of is not None:
            if not pieces:
                raise ValueError(f"nothing follows {name!r}")
            encoded += value_of(pieces.pop(0))
    return encoded


def _port(text: str) -> bytes:
    if not (text.isascii() and text.isdigit() and int(text) < 65536):
        raise ValueError(f"{text!r} is no port")
    return int(text).to_bytes(2, "big")


def _host_name(text: str) -> bytes:
    if HOST_NAME.fullmatch(text) is None:
        raise ValueError(f"{text!r} is no host name")
    return bytes([len(text)]) + text.encode()


def _peer_id(text: str) -> bytes:
    if public_key_of(text) is None:
        raise ValueError(f"{text!r} is not a peer's id")
    multihash: bytes = base58.b58decode(text)
    return bytes([len(multihash)]) + multihash


PARTS: dict[str, tuple[bytes, Callable[[str], bytes] | None]] = {
    "ip4": (b"\x04", lambda text: ipaddress.IPv4Address(text).packed),
    "ip6": (b"\x29", lambda text: ipaddress.IPv6Address(text).packed),
    "dns": (b"\x35", _host_name),
    "dns4": (b"\x36", _host_name),
    "dns6": (b"\x37", _host_name),
    "tcp": (b"\x06", _port),
    "ws": (b"\xdd\x03", None),
    "p2p": (b"\xa5\x03", _peer_id),
    "p2p-circuit": (b"\xa2\x02", None),
}
"""Name -> code as a varint, and its value's bytes."""


def parse_maddr(text: str) -> str:
    """Returns the address without surrounding blanks. Raises UsageError when it is no TCP address."""
    text = text.strip()
    try:
        encode(text)
    except ValueError as error:
        raise UsageError(f"address {text!r}: {error}; an address looks like {EXAMPLE}/p2p/12D3KooW...") from error
    if "/tcp/" not in text:
        raise UsageError(f"address {text!r}: lacks /tcp/PORT; an address looks like {EXAMPLE}/p2p/12D3KooW...")
    return text


def check_maddr(text: str) -> str:
    """Returns an address of a peer, as a user gives it, without surrounding blanks. Raises UsageError when it is none,
    or not a whole one."""
    text = parse_maddr(text)
    if text.split("/")[-2] != "p2p":
        raise UsageError(
            f"address {text!r}: lacks /p2p/PEER-ID at its end; copy the whole address that the peer prints"
        )
    return text


def peers_of(maddrs: Sequence[str], own_id: str) -> dict[str, list[str]]:
    """Returns the addresses of each peer that is named in ``maddrs`` (peer id -> addresses), without our own. Raises
    UsageError for what is no address of a peer."""
    peers: dict[str, list[str]] = {}
    for maddr in map(check_maddr, maddrs):
        peer_id = maddr.rpartition("/p2p/")[2]
        if peer_id != own_id:
            peers.setdefault(peer_id, []).append(maddr)
    return peers


def without_peer(maddr: str) -> str:
    return re.sub(r"/p2p/[^/]+$", "", maddr)


@lru_cache(maxsize=ADDRESSES_KEPT)
def publicness(maddr: str) -> int:
    """Sorts addresses: public, by a relay, private, on this machine only."""
    address = address_of(maddr)
    if address is not None and address.is_loopback:
        return 3
    if address is not None and not address.is_global:
        return 2
    return 1 if is_relayed(maddr) else 0


def is_loopback(maddr: str) -> bool:
    return publicness(maddr) == 3


def can_be_dialled(own: Sequence[str], others: Sequence[str]) -> bool:
    """Returns whether peers at the addresses ``others`` can dial one of my ``own``, as far as these tell: all of theirs
    are in my network; or one of mine is public, of IPv4 or a name. What a router or a provider forwards to a private
    address has to be announced, and an address that is public may still be closed by a firewall.

    A public address of IPv6 counts for those that have IPv6 (``reach``); and not beside a private one of IPv4: a router
    that translates that mostly lets nobody in over IPv6 either."""
    if all(publicness(maddr) >= 2 or shares_network(maddr, own) for maddr in others):
        return True
    public = [maddr for maddr in own if publicness(maddr) == 0]
    translated = any(publicness(maddr) == 2 and family_of(maddr) == 4 for maddr in own)
    return any(family_of(maddr) != 6 or not translated for maddr in public)


def shares_network(maddr: str, own: Sequence[str]) -> bool:
    """Returns whether an address of IPv6 is of the network, a /64, of one of ``own``."""
    ip = address_of(maddr)
    if not isinstance(ip, ipaddress.IPv6Address) or is_relayed(maddr):
        return False
    mine = (one for one in map(address_of, own) if isinstance(one, ipaddress.IPv6Address))
    return any(one.packed[:8] == ip.packed[:8] for one in mine)


def family_of(maddr: str) -> int:
    """Returns 4 or 6 for an address of IPv4 or IPv6 alone; 0 for a name that may stand for both."""
    return {"ip4": 4, "dns4": 4, "ip6": 6, "dns6": 6}.get(maddr.split("/", 2)[1], 0)


def own_maddrs(
    announced: Sequence[str], visible: Sequence[str], listened: Sequence[str], outward: Sequence[str]
) -> list[str]:
    """Returns a peer's addresses as it tells them, those that serve others best first: what the user announces, else
    all at which p2pd says that it is ``visible``. Beside announced ones that is, of ``listened``, what its own network
    can use: two behind one router seldom reach each other at the address that the router forwards. Of private
    addresses those of the network that leads ``outward`` come first, for others are mostly bridges to containers."""
    seen = [maddr for maddr in listened if publicness(maddr) == 2] if announced else visible
    ordered = sorted(seen, key=lambda maddr: (publicness(maddr), direct_ip(maddr) not in outward))
    return list(dict.fromkeys([*announced, *ordered]))


def fitting(maddrs: Sequence[str], max_bytes: int) -> list[str]:
    """Returns the addresses for a record, the most public first, of ``maddrs`` in the order of ``own_maddrs``: as many
    as fit, up to MAX_MADDRS, and of every kind one before any has two: public of IPv4 or a name, public of IPv6, a
    relay's, and private. An address of one link alone (fe80, 169.254) is never taken, and one of this machine alone
    only where there is no other."""
    useful = [maddr for maddr in maddrs if not is_of_one_link(maddr)]
    kinds: dict[tuple[int, bool], list[str]] = {}
    for maddr in [maddr for maddr in useful if not is_loopback(maddr)] or useful:
        level = publicness(maddr)
        kinds.setdefault((level, level == 0 and family_of(maddr) == 6), []).append(maddr)
    rounds = itertools.zip_longest(*(kinds[kind] for kind in sorted(kinds)))
    taken: list[str] = []
    for maddr in filter(None, itertools.chain(*rounds)):
        fits = sum(map(len, (*taken, maddr))) <= max_bytes and len(maddr) <= MAX_MADDR_CHARS
        if fits and len(taken) < MAX_MADDRS:
            taken.append(maddr)
    return sorted(taken, key=publicness)


def is_of_one_link(maddr: str) -> bool:
    """Returns whether an address means something on one cable only."""
    ip = address_of(maddr)
    return ip is not None and ip.is_link_local


def is_public(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Returns whether it names one machine on the internet: of IPv6 only what is given out as such, and nothing that
    tunnels to an IPv4 address, which may be any."""
    if isinstance(ip, ipaddress.IPv6Address) and (ip not in INTERNET or ip.sixtofour is not None):
        return False
    return ip.is_global and not ip.is_multicast


def address_of(maddr: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Returns the IP address that a multiaddr begins with; None for a host name."""
    pieces = maddr.split("/", 3)
    if len(pieces) < 3 or pieces[1] not in ("ip4", "ip6"):
        return None
    try:
        return ipaddress.ip_address(pieces[2])
    except ValueError:
        return None


def is_relayed(maddr: str) -> bool:
    """Returns whether an address leads, or a connection comes, through a relay."""
    return "/p2p-circuit" in maddr


def direct_ip(maddr: str) -> str:
    """Returns the IP address that a connection comes from; "" where a relay is between."""
    address = None if is_relayed(maddr) else address_of(maddr)
    return "" if address is None else str(address)


def ip_maddr(ip: str, port: int) -> str:
    return f"/ip{ipaddress.ip_address(ip).version}/{ip}/tcp/{port}"


def dial_bytes(peer_id: str, maddr: str) -> bytes | None:
    """Returns one of a peer's addresses as p2pd dials it: binary, and without that peer's id at its end. Returns None
    for what p2pd shall not dial: another peer's address, garbage, anything but TCP."""
    if not maddr.endswith(f"/p2p/{peer_id}") or "/tcp/" not in maddr:
        return None
    try:
        return encode(without_peer(maddr))
    except ValueError:
        return None


def dial_reason(message: str) -> str:
    for telling, reason in DIAL_REASONS.items():
        if telling in message:
            return reason
    return message.strip().splitlines()[-1].strip(" *")[:160] if message.strip() else "no reason given"


FORM = re.compile(r"(?:([^:\s]+|\[[^\]\s]+\]):)?([0-9]{1,5})")
MAX_CHARS = 64
"""Of what a record announces."""
METRICS_FLAG = "--metrics-addr"


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    host: str
    """A name or an address, that of IPv6 without brackets."""
    port: int

    @classmethod
    def parse(cls, text: str, flag: str) -> Endpoint:
        """Returns the endpoint that a text names: HOST:PORT, [IPv6]:PORT, or PORT, which means this machine alone.
        Raises a UsageError that names ``flag``."""
        match = FORM.fullmatch(text.strip())
        if match is None or not 0 < int(match[2]) < 65536:
            raise UsageError(f"{flag} {text}: give a port, for this machine alone, or HOST:PORT, like 0.0.0.0:9100")
        host = match[1] or "127.0.0.1"
        endpoint = cls(host=host.strip("[]"), port=int(match[2]))
        if endpoint.ip is not None:
            return cls(host=str(endpoint.ip), port=endpoint.port)  # there are many ways to write one
        if HOST_NAME.fullmatch(host) is None:
            raise UsageError(f"{flag} {text}: {host!r} is neither the name of a host nor its address")
        return endpoint

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def ip(self) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
        """Returns the IP address; None where the host is a name."""
        try:
            return ipaddress.ip_address(self.host)
        except ValueError:
            return None

    def check_free(self, flag: str) -> None:
        """Raises UsageError when nobody can listen there now."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            socket.create_server((self.host, self.port), family=family).close()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                what = f"port {self.port} is in use: end the program that listens there, or choose another"
            else:
                what = f"cannot listen there: {error.strerror or error}"
            raise UsageError(f"{flag} {self}: {what}") from error

    def announced(self, maddrs: Sequence[str]) -> str:
        """Returns what others may dial; empty when they cannot. Who listens on all addresses is reached at the first of
        its own ``maddrs`` that is neither a relay's nor loopback."""
        host = self.host
        if self.ip is not None and self.ip.is_unspecified:
            direct = (maddr for maddr in maddrs if not is_relayed(maddr) and not is_loopback(maddr))
            host = next((maddr.split("/")[2] for maddr in direct), "localhost")
        there = Endpoint(host=host, port=self.port)
        here_alone = host == "localhost" or "%" in host or (there.ip is not None and there.ip.is_loopback)
        return "" if here_alone or len(str(there)) > MAX_CHARS else str(there)
