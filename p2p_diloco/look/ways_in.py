"""The ways in to a peer, in words: what others type to join there, for whom that works, and what to do so that it works
for everybody. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from p2p_diloco.core.addresses import address_of, family_of, is_relayed, publicness

USUAL_PORT = 4001
SHARED = ipaddress.IPv4Network("100.64.0.0/10")
"""Of providers that have more customers than addresses: RFC 6598."""
SHARED_MEANS = "a provider shares one address among many, and no port can be forwarded through that"


def addresses_to_paste(maddrs: Sequence[str]) -> list[str]:
    """Returns those of a peer's addresses that somebody who wants to join needs, the best first: the first public one
    of IPv4, or a name, and of IPv6; without the former, whatever else there is of each kind that is not for this
    machine alone, so that a neighbour may still get through."""
    kinds: dict[tuple[int, bool], str] = {}
    for maddr in maddrs:
        level = publicness(maddr)
        kinds.setdefault((level, level == 0 and family_of(maddr) == 6), maddr)
    ordered = [kinds[kind] for kind in sorted(kinds)]
    if (0, False) in kinds:
        return [maddr for maddr in ordered if publicness(maddr) == 0]
    return [maddr for maddr in ordered if publicness(maddr) < 3] or ordered[:1]


def join_line(maddrs: Sequence[str]) -> str:
    """Returns what somebody else types to join, or "" without an address."""
    return f"p2p-diloco peer --initial-peers {' '.join(addresses_to_paste(maddrs))}" if maddrs else ""


def join_note(maddrs: Sequence[str]) -> str:
    """Returns for whom ``join_line`` does not work, with the remedy; empty where it is for everybody."""
    public = [maddr for maddr in maddrs if publicness(maddr) == 0]
    if not maddrs or any(family_of(maddr) != 6 for maddr in public):
        return ""
    remedy = f"for others {forward(USUAL_PORT, '')}"
    if public:
        return f"only for peers that have IPv6, as far as firewall and router let them in; {remedy}"
    if any(map(is_relayed, maddrs)):
        return f"through a relay, which carries small messages and no parts of a model; {remedy}"
    if any(is_shared(maddr) for maddr in maddrs):
        return f"only for peers in this network: {SHARED_MEANS}; for others a peer with a public address has to come"
    if any(publicness(maddr) == 2 for maddr in maddrs):
        return f"only for peers in this network; {remedy}"
    return f"only for peers on this machine; for others start with --host-maddrs /ip4/0.0.0.0/tcp/{USUAL_PORT}"


def is_shared(maddr: str) -> bool:
    """Returns whether an address, a relay's not counted, is one that a provider gives to customers without a public
    one."""
    ip = address_of(maddr)
    return isinstance(ip, ipaddress.IPv4Address) and ip in SHARED and not is_relayed(maddr)


def forward(port: int, ip: str) -> str:
    """Returns what to do so that peers outside can dial this machine. ``ip``: where they see it."""
    there = ip if is_global(ip) else "YOUR-PUBLIC-IP"
    if ":" in there:
        return (
            f"open TCP port {port} for this machine in its firewall and in the router (IPv6 needs no forwarding), and "
            f"start with --host-maddrs /ip4/0.0.0.0/tcp/{port} /ip6/::/tcp/{port} "
            f"--announce-maddrs /ip6/{there}/tcp/{port}"
        )
    return (
        f"open TCP port {port} in the firewall, forward it in the router, and start with --host-maddrs "
        f"/ip4/0.0.0.0/tcp/{port} --announce-maddrs /ip4/{there}/tcp/{port}"
    )


def is_global(ip: str) -> bool:
    """Returns whether a peer that sees us at ``ip`` sees us from the internet; not where ``ip`` is empty."""
    return ipaddress.ip_address(ip).is_global if ip else False
