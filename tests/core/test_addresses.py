from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p_diloco.core.addresses import Endpoint, can_be_dialled
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


@pytest.mark.parametrize(
    ("own", "others", "dialled"),
    [
        ([PUBLIC, PRIVATE], [PUBLIC], True),
        (["/ip6/2606:4700::1111/tcp/4001"], [PUBLIC], True),
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
    """A machine behind a router has no public address, and its peers do; in one network nobody needs any."""
    assert can_be_dialled(own, others) is dialled
