from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Iterator
from contextlib import closing

import pytest

from p2p_diloco.core import listening
from p2p_diloco.core.errors import UsageError
from p2p_diloco.core.listening import EVERYWHERE, at_home, check_host_maddrs, kept, outward, pin_ports


def port_of(maddr: str) -> int:
    return int(maddr.rpartition("/")[2])


def has_ipv6() -> bool:
    try:
        socket.create_server(("::", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def taken(version: str, port: int) -> socket.socket:
    """A socket of a program that is none of ours."""
    family, host = (socket.AF_INET6, "::") if version == "ip6" else (socket.AF_INET, "0.0.0.0")
    return socket.create_server((host, port), family=family)


@pytest.fixture
def without_ipv6() -> Iterator[None]:
    """A kernel that has none, as it looks to a program."""

    def refuse(family: int, kind: int) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        return plain(family, kind)

    plain = socket.socket
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "socket", refuse)
        yield


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_everywhere_is_both_families_at_one_port() -> None:
    with kept(EVERYWHERE) as maddrs:
        port = port_of(maddrs[0])
        assert maddrs == (f"/ip4/0.0.0.0/tcp/{port}", f"/ip6/::/tcp/{port}")
        for version in ("ip4", "ip6"):
            with pytest.raises(OSError, match="in use"):
                taken(version, port)
        with socket.socket() as p2pd:  # but p2pd gets it
            p2pd.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            p2pd.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            p2pd.bind(("0.0.0.0", port))
            p2pd.listen()
            socket.create_connection(("127.0.0.1", port)).close()
            p2pd.accept()[0].close()
    taken("ip6", port).close()


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_another_port_is_taken_where_one_family_has_it_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = listening._bound

    def refuse_once(version: str, host: str, port: int, *, shared: bool) -> socket.socket:
        if version == "ip6" and port:
            raise OSError(errno.EADDRINUSE, "Address already in use")
        return bound(version, host, port, shared=shared)

    monkeypatch.setattr(listening, "_bound", refuse_once)
    with kept(EVERYWHERE) as (ip4, ip6):
        assert port_of(ip4) != port_of(ip6) != 0


@pytest.mark.usefixtures("without_ipv6")
def test_a_machine_without_ipv6_listens_on_what_it_has(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger=listening.log.name)
    check_host_maddrs(EVERYWHERE)
    with kept(EVERYWHERE) as maddrs:
        assert [maddr.rpartition("/")[0] for maddr in maddrs] == ["/ip4/0.0.0.0/tcp"]
    assert "/ip6/::/tcp/0 is not listened on: Address family not supported" in caplog.text
    assert not [record for record in caplog.records if record.levelno > logging.DEBUG]


@pytest.mark.usefixtures("without_ipv6")
def test_an_address_that_the_user_names_has_to_be_had() -> None:
    for maddrs in (("/ip6/::/tcp/0",), ("/ip4/127.0.0.1/tcp/0", "/ip6/::/tcp/0")):
        with pytest.raises(UsageError, match=r"^cannot listen on /ip6/::/tcp/0: Address family not supported"):
            check_host_maddrs(maddrs)
        with pytest.raises(UsageError, match=r"^cannot listen on /ip6/::/tcp/0: "), kept(maddrs):
            pass


def test_what_the_user_names_is_kept_as_it_is() -> None:
    named = ("/ip4/127.0.0.1/tcp/0",)
    with kept(named) as maddrs:
        assert maddrs == named
    with closing(socket.create_server(("127.0.0.1", 0))) as other:
        port = other.getsockname()[1]
        with pytest.raises(UsageError, match=f"^port {port} is in use"), kept((f"/ip4/127.0.0.1/tcp/{port}",)):
            pass


def test_neither_family(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(version: str, host: str, port: int, *, shared: bool) -> socket.socket:
        raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")

    monkeypatch.setattr(listening, "_bound", refuse)
    with pytest.raises(UsageError, match="neither IPv4 nor IPv6; with --client-mode"), kept(EVERYWHERE):
        pass


def test_ports_are_pinned() -> None:
    visible = ["/ip6/::1/tcp/7", "/ip4/10.0.0.1/tcp/8"]
    hosts = ("/ip4/0.0.0.0/tcp/0", "/ip6/::/tcp/0", "/ip4/127.0.0.1/tcp/0", "/ip4/0.0.0.0/tcp/9")
    assert pin_ports(hosts, visible) == ("/ip4/0.0.0.0/tcp/8", "/ip6/::/tcp/7", *hosts[2:])


def test_the_own_network_is_where_the_routes_lead() -> None:
    ips = ["192.168.1.2", "fd00::2"]
    assert at_home(["/ip4/0.0.0.0/tcp/4001", "/ip6/::/tcp/4002/ws"], ips) == [
        "/ip4/192.168.1.2/tcp/4001",
        "/ip6/fd00::2/tcp/4002/ws",
    ]
    assert at_home(["/ip4/10.0.0.1/tcp/4001"], ips) == ["/ip4/10.0.0.1/tcp/4001"]
    assert at_home(["/ip4/0.0.0.0/tcp/0"], ips) == []
    assert at_home(["/ip6/::/tcp/4001"], ips[:1]) == []


def test_a_route_is_asked_and_nothing_is_sent() -> None:
    for ip in outward():
        with socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET) as own:
            own.bind((ip, 0))  # it is an address of this machine
