"""Multiaddrs: what a user may give, what others can dial, how p2pd wants them. Pure, but for one trial of a port.

    /ip4/203.0.113.7/tcp/4001/p2p/PEER-ID               /dns/example.org/tcp/4001/p2p/PEER-ID
    /ip4/203.0.113.7/tcp/4001/p2p/RELAY-ID/p2p-circuit/p2p/PEER-ID

TCP only. Binary form: https://github.com/multiformats/multiaddr/blob/master/protocols.csv. hivemind has a Multiaddr,
too, but writes an Ed25519 peer id as a CID, which p2pd does not take, and needs 2 s to import.
"""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import base58

from p2p_diloco.core.errors import UsageError
from p2p_diloco.core.identity import public_key_of

LISTEN = re.compile(r"/(ip4|ip6)/([^/]+)/tcp/(\d+)(/ws)?")
HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
EXAMPLE = "/ip4/203.0.113.7/tcp/4001"
INTERNET = ipaddress.IPv6Network("2000::/3")
"""Global unicast: RFC 4291."""
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


def parse_host_maddr(maddr: str) -> re.Match[str]:
    """Returns the match of LISTEN with an address. Raises UsageError for what cannot be listened on anywhere."""
    match = LISTEN.fullmatch(maddr.strip())
    if match is None:
        raise UsageError(f"address {maddr!r}: listen on TCP, like /ip4/0.0.0.0/tcp/4001")
    return match


def check_host_maddrs(maddrs: Sequence[str]) -> None:
    """Raises UsageError for what is not TCP, or cannot be listened on. p2pd would start all the same: it skips
    addresses that it cannot have, and *shares* a port with another p2pd of the same user, which then gets half of our
    connections."""
    for maddr in maddrs:
        version, host, port, _ = parse_host_maddr(maddr).groups()
        family = socket.AF_INET if version == "ip4" else socket.AF_INET6
        try:
            with socket.socket(family, socket.SOCK_STREAM) as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as p2pd: old connections do not matter
                if family == socket.AF_INET6:
                    trial.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                trial.bind((host, int(port)))
        except (OSError, OverflowError) as error:
            if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
                raise UsageError(
                    f"port {port} is in use: end the program that listens there, or choose another"
                ) from error
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise UsageError(f"cannot listen on {maddr}: {reason}") from error


def pin_ports(host_maddrs: Sequence[str], visible: Sequence[str]) -> tuple[str, ...]:
    """Returns ``host_maddrs`` with the ports that the system chose for port 0, so that a restart gets them again."""
    pinned = []
    for maddr in host_maddrs:
        match = LISTEN.fullmatch(maddr)
        if match is not None and match[3] == "0":
            for candidate in map(LISTEN.match, visible):
                if candidate is not None and candidate[1] == match[1] and fits(match[2], candidate[2]):
                    maddr = f"/{match[1]}/{match[2]}/tcp/{candidate[3]}{match[4] or ''}"
                    break
        pinned.append(maddr)
    return tuple(pinned)


def fits(listening: str, visible: str) -> bool:
    return listening == visible or ipaddress.ip_address(listening).is_unspecified


@lru_cache(maxsize=ADDRESSES_KEPT)
def publicness(maddr: str) -> int:
    """Sorts addresses: public, by a relay, private, on this machine only."""
    address = address_of(maddr)
    if address is not None and address.is_loopback:
        return 3
    if address is not None and not address.is_global:
        return 2
    return 1 if "/p2p-circuit" in maddr else 0


def is_loopback(maddr: str) -> bool:
    return publicness(maddr) == 3


def can_be_dialled(own: Sequence[str], others: Sequence[str]) -> bool:
    """Returns whether peers at the addresses ``others`` can dial one of my ``own``, as far as these tell: one of mine
    is public, or all of theirs are private, and we are in one network. What a router or a provider forwards to a
    private address has to be announced, and an address that is public may still be closed by a firewall."""
    return any(publicness(maddr) == 0 for maddr in own) or all(publicness(maddr) >= 2 for maddr in others)


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


def direct_ip(maddr: str) -> str:
    """Returns the IP address that a connection comes from; "" where a relay is between."""
    address = None if "/p2p-circuit" in maddr else address_of(maddr)
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
            direct = (maddr for maddr in maddrs if "/p2p-circuit" not in maddr and not is_loopback(maddr))
            host = next((maddr.split("/")[2] for maddr in direct), "localhost")
        there = Endpoint(host=host, port=self.port)
        here_alone = host == "localhost" or "%" in host or (there.ip is not None and there.ip.is_loopback)
        return "" if here_alone or len(str(there)) > MAX_CHARS else str(there)
