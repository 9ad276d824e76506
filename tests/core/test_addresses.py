from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p_diloco.core.addresses import (
    MAX_MADDR_CHARS,
    MAX_MADDRS,
    Endpoint,
    can_be_dialled,
    check_maddr,
    fitting,
    own_maddrs,
)
from p2p_diloco.core.errors import UsageError
from tests.support.builders import identity, record_of

FLAG = "--metrics-addr"
PEER = identity(1).peer_id


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("9100", "127.0.0.1", 9100),
        (" 1 ", "127.0.0.1", 1),
        ("0.0.0.0:65535", "0.0.0.0", 65535),
        ("localhost:9100", "localhost", 9100),
        ("a-b.example.org:80", "a-b.example.org", 80),
        ("[::]:9100", "::", 9100),
        ("[2001:DB8:0::1]:9100", "2001:db8::1", 9100),
    ],
)
def test_what_a_user_may_give(text: str, host: str, port: int) -> None:
    endpoint = Endpoint.parse(text, FLAG)
    assert endpoint == Endpoint(host=host, port=port)
    assert Endpoint.parse(str(endpoint), FLAG) == endpoint


@pytest.mark.parametrize(
    "text",
    ["", "0", "65536", "-1", "1e3", "x", ":9100", "host:", "host:0", "::1:9100", "[::1]", "http://a:80", "a b:1"],
)
def test_what_is_no_endpoint(text: str) -> None:
    with pytest.raises(UsageError, match=rf"^{FLAG} .*: give a port, for this machine alone, or HOST:PORT"):
        Endpoint.parse(text, FLAG)


@pytest.mark.parametrize("text", ["_:80", "a/b:80", "[]:80", "[host]:80", "[::g]:80", "ä:80"])
def test_what_is_no_host(text: str) -> None:
    with pytest.raises(UsageError, match=f"^{FLAG} .* is neither the name of a host nor its address"):
        Endpoint.parse(text, FLAG)


@given(st.text(max_size=30))
def test_whatever_a_user_gives_is_an_endpoint_or_a_usage_error(text: str) -> None:
    try:
        endpoint = Endpoint.parse(text, FLAG)
    except UsageError:
        return
    assert Endpoint.parse(str(endpoint), FLAG) == endpoint


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = Endpoint(host="127.0.0.1", port=other.getsockname()[1])
        with pytest.raises(UsageError, match=f"^{FLAG} {taken}: port {taken.port} is in use"):
            taken.check_free(FLAG)
    taken.check_free(FLAG)
    with pytest.raises(UsageError, match=f"^{FLAG} 192.0.2.1:9100: cannot listen there: "):
        Endpoint(host="192.0.2.1", port=9100).check_free(FLAG)


RELAYED = f"/ip4/198.51.100.7/tcp/4001/p2p/{PEER}/p2p-circuit/p2p/{PEER}"


@pytest.mark.parametrize(
    ("host", "maddrs", "announced"),
    [
        ("127.0.0.1", ["/ip4/203.0.113.7/tcp/4001"], ""),
        ("127.1.2.3", [], ""),
        ("::1", [], ""),
        ("localhost", [], ""),
        ("203.0.113.7", [], "203.0.113.7:9100"),
        ("10.0.0.5", ["/ip4/203.0.113.7/tcp/4001"], "10.0.0.5:9100"),
        ("2001:db8::1", [], "[2001:db8::1]:9100"),
        ("a.example.org", [], "a.example.org:9100"),
        ("a" * 70, [], ""),
        ("fe80::1%eth0", [], ""),
        ("0.0.0.0", [], ""),
        ("0.0.0.0", ["/ip4/127.0.0.1/tcp/1"], ""),
        ("0.0.0.0", [RELAYED], ""),
        ("0.0.0.0", [RELAYED, "/ip4/203.0.113.7/tcp/4001", "/ip4/10.0.0.5/tcp/4001"], "203.0.113.7:9100"),
        ("0.0.0.0", ["/ip4/10.0.0.5/tcp/4001", "/ip4/127.0.0.1/tcp/1"], "10.0.0.5:9100"),
        ("::", ["/ip6/2001:db8::1/tcp/4001"], "[2001:db8::1]:9100"),
        ("0.0.0.0", ["/dns4/a.example.org/tcp/4001"], "a.example.org:9100"),
    ],
)
def test_what_others_are_told(host: str, maddrs: list[str], announced: str) -> None:
    found = Endpoint(host=host, port=9100).announced([f"{maddr}/p2p/{PEER}" for maddr in maddrs])
    assert found == announced
    assert record_of(identity(1), metrics_addr=found).metrics_addr == announced


PUBLIC, PRIVATE, SHARED, HERE = (f"/ip4/{ip}/tcp/4001" for ip in ("1.1.1.1", "192.168.1.2", "100.64.1.2", "127.0.0.1"))
RELAYED = f"{PUBLIC}/p2p/{identity(1).peer_id}/p2p-circuit"
PUBLIC6, NEXT_DOOR6, ELSEWHERE6, LOCAL6 = (
    f"/ip6/{ip}/tcp/4001" for ip in ("2606:4700::1", "2606:4700::2", "2606:4700:0:1::1", "fd00::2")
)


@pytest.mark.parametrize(
    ("own", "others", "dialled"),
    [
        ([PUBLIC, PRIVATE], [PUBLIC], True),
        ([PUBLIC6], [PUBLIC], True),
        ([PUBLIC6], [PUBLIC, ELSEWHERE6], True),
        ([PUBLIC6], [ELSEWHERE6], True),
        ([PUBLIC6], ["/dns6/example.org/tcp/4001"], True),
        ([PUBLIC6], ["/dns/example.org/tcp/4001"], True),
        ([PUBLIC6, PRIVATE], [ELSEWHERE6], False),
        ([PUBLIC6, LOCAL6], [ELSEWHERE6], True),
        ([PUBLIC6, PUBLIC], [ELSEWHERE6, PUBLIC], True),
        ([PUBLIC6, PRIVATE], [NEXT_DOOR6, PRIVATE], True),
        ([PUBLIC6, PRIVATE], [f"{NEXT_DOOR6}/p2p/{identity(1).peer_id}/p2p-circuit"], False),
        (["/dns/example.org/tcp/4001"], [PUBLIC], True),
        ([PRIVATE, HERE], [PUBLIC], False),
        ([SHARED], [PUBLIC, PRIVATE], False),
        ([RELAYED, PRIVATE], [PUBLIC], False),
        ([], ["/dns/example.org/tcp/4001"], False),
        ([PRIVATE], [PRIVATE, HERE], True),
        ([PRIVATE], [RELAYED], False),
        ([HERE], [], True),
    ],
)
def test_who_cannot_be_dialled_is_told_from_who_can(own: list[str], others: list[str], dialled: bool) -> None:
    """A machine behind a router has no public address, and its peers do; in one network nobody needs any. Beside an
    IPv4 address that a router translates, one of IPv6 is mostly closed."""
    assert can_be_dialled(own, others) is dialled


def of_me(*maddrs: str) -> list[str]:
    return [f"{maddr}/p2p/{PEER}" for maddr in maddrs]


BRIDGE, LINK, LINK6, HERE6 = (
    f"/{ip}/tcp/4001" for ip in ("ip4/172.17.0.1", "ip4/169.254.7.7", "ip6/fe80::1", "ip6/::1")
)
SECOND, NAME = "/ip4/8.8.8.8/tcp/4001", "/dns4/example.org/tcp/4001"


@pytest.mark.parametrize(
    ("maddrs", "told"),
    [
        ([HERE], [HERE]),
        ([HERE, HERE6, LINK6], [HERE, HERE6]),
        ([PRIVATE, HERE], [PRIVATE]),
        ([LINK, LINK6, PRIVATE], [PRIVATE]),
        ([LINK6], []),
        ([PUBLIC, PUBLIC6, RELAYED, PRIVATE], [PUBLIC, PUBLIC6, RELAYED, PRIVATE]),
        ([PUBLIC, SECOND, NAME, PUBLIC6, ELSEWHERE6, RELAYED], [PUBLIC, PUBLIC6, SECOND, ELSEWHERE6, RELAYED]),
        ([PUBLIC, SECOND, NAME, PUBLIC6, PRIVATE, BRIDGE], [PUBLIC, PUBLIC6, SECOND, PRIVATE, BRIDGE]),
        ([*[PUBLIC.replace("1.1.1.1", f"1.1.1.{n}") for n in range(9)], PRIVATE], 5),
    ],
)
def test_a_record_has_addresses_of_every_kind(maddrs: list[str], told: list[str] | int) -> None:
    found = fitting(of_me(*maddrs), 560)
    if isinstance(told, int):
        assert len(found) == told
        assert found[-1] == of_me(PRIVATE)[0]
    else:
        assert found == of_me(*told)


def test_the_longest_addresses_of_every_kind_fit() -> None:
    ip6 = "2606:4700:1111:1111:1111:1111:1111:111"
    longest = of_me(
        "/ip4/155.155.155.155/tcp/65535",
        f"/ip6/{ip6}1/tcp/65535",
        f"/ip4/155.155.155.155/tcp/65535/p2p/{PEER}/p2p-circuit",
        "/ip4/192.168.155.155/tcp/65535",
    )
    assert fitting(longest, 560 - 64) == longest
    relayed6 = check_maddr(of_me(f"/ip6/{ip6}1/tcp/65535/p2p/{PEER}/p2p-circuit")[0])
    assert len(relayed6) <= MAX_MADDR_CHARS
    assert fitting([relayed6], 560) == [relayed6]


@given(
    st.lists(
        st.sampled_from(
            of_me(PUBLIC, SECOND, NAME, PUBLIC6, LINK6, RELAYED, PRIVATE, BRIDGE, HERE, "/dns4/" + "a" * 150)
        )
    )
)
def test_what_a_record_tells_is_bounded(maddrs: list[str]) -> None:
    found = fitting(maddrs, 300)
    assert len(found) <= MAX_MADDRS
    assert sum(map(len, found)) <= 300
    assert all(len(maddr) <= MAX_MADDR_CHARS for maddr in found)
    assert set(found) <= set(maddrs)


@pytest.mark.parametrize(
    ("announced", "visible", "listened", "outward", "told"),
    [
        ([], [HERE, BRIDGE, PRIVATE, PUBLIC], [PRIVATE], ["192.168.1.2"], [PUBLIC, PRIVATE, BRIDGE, HERE]),
        ([], [BRIDGE, PRIVATE], [PRIVATE], [], [BRIDGE, PRIVATE]),
        ([SECOND], [SECOND], [PRIVATE, PUBLIC6], ["192.168.1.2"], [SECOND, PRIVATE]),
        ([SECOND], [SECOND], [HERE], [], [SECOND]),
        ([PRIVATE], [PRIVATE], [PRIVATE], ["192.168.1.2"], [PRIVATE]),
        ([NAME, SECOND], [SECOND, NAME], [], [], [NAME, SECOND]),
    ],
)
def test_the_own_network_is_told_beside_what_is_announced(
    announced: list[str], visible: list[str], listened: list[str], outward: list[str], told: list[str]
) -> None:
    assert own_maddrs(announced, visible, listened, outward) == told
