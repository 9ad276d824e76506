"""HOST:PORT, where something is served over HTTP: what a user may give, and what others can reach of it."""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from p2p_diloco.core.addresses import HOST_NAME, is_loopback
from p2p_diloco.core.errors import UsageError

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
        """HOST:PORT, [IPv6]:PORT, or PORT, which means this machine alone. UsageError names ``flag``."""
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
        """None for a name."""
        try:
            return ipaddress.ip_address(self.host)
        except ValueError:
            return None

    def check_free(self, flag: str) -> None:
        """UsageError when nobody can listen there now."""
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
        """What others may dial; empty when they cannot. Who listens on all addresses is reached at the first of its own
        ``maddrs`` that is neither a relay's nor loopback."""
        host = self.host
        if self.ip is not None and self.ip.is_unspecified:
            direct = (maddr for maddr in maddrs if "/p2p-circuit" not in maddr and not is_loopback(maddr))
            host = next((maddr.split("/")[2] for maddr in direct), "localhost")
        there = Endpoint(host=host, port=self.port)
        here_alone = host == "localhost" or "%" in host or (there.ip is not None and there.ip.is_loopback)
        return "" if here_alone or len(str(there)) > MAX_CHARS else str(there)
