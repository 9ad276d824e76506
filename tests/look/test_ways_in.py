from __future__ import annotations

import pytest

from p2p_diloco.core.addresses import check_maddr
from p2p_diloco.look.ways_in import join_line, join_note
from tests.support.builders import identity

PEER = identity(1).peer_id
PUBLIC, PUBLIC6, NAME, LAN, SHARED, HERE, HERE6 = (
    f"/{host}/tcp/4001/p2p/{PEER}"
    for host in (
        "ip4/1.1.1.1",
        "ip6/2606:4700::1",
        "dns4/example.org",
        "ip4/192.168.1.2",
        "ip4/100.64.1.2",
        "ip4/127.0.0.1",
        "ip6/::1",
    )
)
RELAYED = f"/ip4/8.8.8.8/tcp/4001/p2p/{identity(2).peer_id}/p2p-circuit/p2p/{PEER}"
FORWARD = (
    "for others open TCP port 4001 in the firewall, forward it in the router, and start with --host-maddrs "
    "/ip4/0.0.0.0/tcp/4001 --announce-maddrs /ip4/YOUR-PUBLIC-IP/tcp/4001"
)


@pytest.mark.parametrize(
    ("maddrs", "pasted", "note"),
    [
        ([], [], ""),
        ([PUBLIC, LAN, HERE], [PUBLIC], ""),
        ([NAME, PUBLIC, HERE], [NAME], ""),
        ([PUBLIC, PUBLIC6, LAN], [PUBLIC, PUBLIC6], ""),
        ([PUBLIC6, PUBLIC], [PUBLIC, PUBLIC6], ""),
        (
            [PUBLIC6, HERE],
            [PUBLIC6],
            "only for peers that have IPv6, as far as firewall and router let them in; " + FORWARD,
        ),
        ([PUBLIC6, RELAYED, LAN], [PUBLIC6, RELAYED, LAN], "only for peers that have IPv6, as far as"),
        (
            [RELAYED, LAN],
            [RELAYED, LAN],
            "through a relay, which carries small messages and no parts of a model; " + FORWARD,
        ),
        ([LAN, HERE], [LAN], "only for peers in this network; " + FORWARD),
        ([SHARED, HERE], [SHARED], "only for peers in this network: a provider shares one address among many"),
        (
            [HERE, HERE6],
            [HERE],
            "only for peers on this machine; for others start with --host-maddrs /ip4/0.0.0.0/tcp/4001",
        ),
    ],
)
def test_a_line_to_join_says_for_whom_it_does_not_work(maddrs: list[str], pasted: list[str], note: str) -> None:
    line = join_line(maddrs)
    assert line == (f"p2p-diloco peer --initial-peers {' '.join(pasted)}" if pasted else "")
    assert [check_maddr(maddr) for maddr in pasted] == pasted
    assert join_note(maddrs).startswith(note)
    assert bool(join_note(maddrs)) == bool(note)
    assert "\n" not in join_note(maddrs)
