"""Where a peer listens: what can be asked for, what this machine has of it, and at which port. Ports are tried, and
routes asked; nothing is sent.

    /ip4/0.0.0.0/tcp/4001       /ip6/::/tcp/4001       /ip4/192.168.1.2/tcp/0       /ip4/0.0.0.0/tcp/80/ws
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from p2p_diloco.core.errors import UsageError

log = logging.getLogger(__name__)

LISTEN = re.compile(r"/(ip4|ip6)/([^/]+)/tcp/(\d+)(/ws)?")
EVERYWHERE = ("/ip4/0.0.0.0/tcp/0", "/ip6/::/tcp/0")
"""All addresses of this machine, at a port that the system chooses: the default. A family that this machine lacks is
left out."""
FAMILIES = {"ip4": socket.AF_INET, "ip6": socket.AF_INET6}
OUTSIDE = {"ip4": "203.0.113.1", "ip6": "2001:db8::1"}
"""Addresses on the internet, which nobody has: RFC 5737, RFC 3849."""


def parse_host_maddr(maddr: str) -> re.Match[str]:
    """Returns the match of LISTEN with an address. Raises UsageError for what cannot be listened on anywhere."""
    match = LISTEN.fullmatch(maddr.strip())
    if match is None:
        raise UsageError(f"address {maddr!r}: listen on TCP, like /ip4/0.0.0.0/tcp/4001")
    return match


def check_host_maddrs(maddrs: Sequence[str]) -> None:
    """Raises UsageError for what is not TCP, or cannot be listened on; never for EVERYWHERE. p2pd would start all the
    same: it skips addresses that it cannot have, and *shares* a port with another p2pd of the same user, which then
    gets half of our connections."""
    for maddr in () if tuple(maddrs) == EVERYWHERE else maddrs:
        version, host, port, _ = parse_host_maddr(maddr).groups()
        try:
            _bound(version, host, int(port), shared=False).close()
        except (OSError, OverflowError) as error:
            if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
                raise UsageError(
                    f"port {port} is in use: end the program that listens there, or choose another"
                ) from error
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise UsageError(f"cannot listen on {maddr}: {reason}") from error


@contextmanager
def kept(maddrs: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Yields where p2pd shall listen: at ``maddrs``, which are checked. Of EVERYWHERE these are the families that this
    machine has, at one port where both have it free; until the context ends, no other program gets that port. Raises
    UsageError."""
    if tuple(maddrs) != EVERYWHERE:
        check_host_maddrs(maddrs)
        yield tuple(maddrs)
        return
    with contextlib.ExitStack() as held:
        found: list[str] = []
        port = 0
        for version, host, _, _ in (parse_host_maddr(maddr).groups() for maddr in EVERYWHERE):
            for wanted in dict.fromkeys((port, 0)):
                try:
                    _bound(version, host, wanted, shared=False).close()
                    trial = held.enter_context(_bound(version, host, wanted, shared=True))
                except OSError as error:
                    log.debug("/%s/%s/tcp/%d is not listened on: %s", version, host, wanted, error.strerror)
                    continue
                port = trial.getsockname()[1]
                found.append(f"/{version}/{host}/tcp/{port}")
                break
        if not found:
            raise UsageError("this machine has neither IPv4 nor IPv6; with --client-mode a peer listens nowhere")
        yield tuple(found)


def _bound(version: str, host: str, port: int, *, shared: bool) -> socket.socket:
    """Returns a socket that has an address, and does not listen. ``shared``: p2pd can have it all the same."""
    trial = socket.socket(FAMILIES[version], socket.SOCK_STREAM)
    try:
        # As p2pd: old connections do not matter. Who sets that gets a port that a socket with REUSEADDR has, too.
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT if shared else socket.SO_REUSEADDR, 1)
        if version == "ip6":
            trial.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        trial.bind((host, port))
    except BaseException:
        trial.close()
        raise
    return trial


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


def outward() -> tuple[str, ...]:
    """Returns the IP addresses, one of each family, from which this machine would call the internet, as its routes have
    it: those of its network, and not of a bridge that leads to containers."""
    found = []
    for version, somewhere in OUTSIDE.items():
        with contextlib.suppress(OSError), socket.socket(FAMILIES[version], socket.SOCK_DGRAM) as trial:
            trial.connect((somewhere, 9))  # of UDP: it looks for a route, and sends nothing
            found.append(str(trial.getsockname()[0]))
    return tuple(found)


def at_home(host_maddrs: Sequence[str], outward: Sequence[str]) -> list[str]:
    """Returns the addresses at which a peer can be called from its own network, of those that it listens on at a port
    that is known. ``outward``: as the function of this name has it."""
    found: list[str] = []
    for version, host, port, ws in (parse_host_maddr(maddr).groups() for maddr in host_maddrs):
        own = [ip for ip in outward if f"ip{ipaddress.ip_address(ip).version}" == version]
        hosts = own if ipaddress.ip_address(host).is_unspecified else [host]
        found += [f"/{version}/{ip}/tcp/{port}{ws or ''}" for ip in hosts if port != "0"]
    return found
