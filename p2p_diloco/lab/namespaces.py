"""A network on this machine in which every peer has a cable of its own, that can be pulled: Linux's namespaces.

    switch     a namespace with a bridge, and an address on it for guests
    NAME       a namespace with one end of a cable; the other end is on the switch

Namespaces have no names in the system: each lives as long as a process in it, first of all a ``cat`` that waits for us
to end, however we do. So nothing is left when we are killed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass

from p2p_diloco.core.errors import NetworkError
from p2p_diloco.core.interpreter import python_command

SUBNET = "10.83.0"
"""Seen by nobody outside these namespaces."""
PORT = 4001
LISTEN = "--host-maddrs"
"""The option that says where a peer listens."""
COMMAND_S = 10.0
MOST = 250
"""Of peers: the subnet's addresses."""
TOOLS = ("unshare", "nsenter", "ip")
AS_ROOT = ("unshare", "--user", "--map-root-user")
"""Of a user namespace of one's own, where the system lets everybody have one."""


@dataclass(frozen=True)
class Namespace:
    """A network namespace, which lives as long as its holder."""

    holder: subprocess.Popen[bytes]
    address: str

    @property
    def enter(self) -> tuple[str, ...]:
        """Returns what a command begins with to run in it."""
        return "nsenter", f"--net=/proc/{self.holder.pid}/ns/net"

    @property
    def options(self) -> tuple[str, ...]:
        """Returns the options of a peer in it, which finds nobody there who could relay."""
        return LISTEN, f"/ip4/{self.address}/tcp/{PORT}", "--no-use-relay"


class Network:
    """A switch and cables, as a context manager. NetworkError when a namespace cannot be made; ``why_not`` tells
    before."""

    def __init__(self) -> None:
        self.namespaces: dict[str, Namespace] = {}
        self.islands: set[str] = set()

    def __enter__(self) -> Network:
        self.switch = hold(f"{SUBNET}.1")
        self._ip("link add switch type bridge")
        self._ip(f"addr add {self.switch.address}/24 dev switch")
        self._ip("link set switch up")
        return self

    def __exit__(self, *_: object) -> None:
        for namespace in (*self.namespaces.values(), self.switch):
            namespace.holder.communicate()  # closes its input: it ends

    def add(self, name: str) -> Namespace:
        """Returns a new namespace, connected."""
        if len(self.namespaces) == MOST:
            raise NetworkError(f"more than {MOST} peers do not fit into one network")
        new = self.namespaces[name] = hold(f"{SUBNET}.{len(self.namespaces) + 2}")
        self._ip(f"link add dev {name} type veth peer name cable netns {new.holder.pid}")
        self._ip(f"link set dev {name} master switch up")
        for words in ("link set lo up", f"addr add {new.address}/24 dev cable", "link set cable up"):
            run(*new.enter, "ip", *words.split())
        return new

    def cut(self, name: str) -> None:
        """Pulls a cable, at the switch's end: the peer's own routes stay, and what it sends is lost without a word."""
        self._ip(f"link set dev {name} down")

    def cut_together(self, name: str, island: str) -> None:
        """Moves a cable off this switch and onto another one, with whoever is moved to the same island."""
        if island not in self.islands:
            self._ip(f"link add dev {island} type bridge")
            self._ip(f"link set dev {island} up")
            self.islands.add(island)
        self._ip(f"link set dev {name} master {island}")

    def restore(self, name: str) -> None:
        """Puts a cable back."""
        self._ip(f"link set dev {name} master switch up")

    def _ip(self, words: str) -> None:
        run(*self.switch.enter, "ip", *words.split())


def hold(address: str) -> Namespace:
    """Returns a new namespace, which is to have ``address``. NetworkError when it cannot be made."""
    command = ("unshare", "--net", "sh", "-c", "echo made; exec cat")
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    assert holder.stdout is not None
    if not holder.stdout.readline():
        raise NetworkError(f"a network namespace cannot be made: unshare ends with exit code {holder.wait()}")
    return Namespace(holder, address)


def run(*command: str) -> None:
    """Runs a command to its end. NetworkError when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=COMMAND_S, check=False)
    if done.returncode != 0:
        raise NetworkError(f"{' '.join(command)}: {done.stderr.strip()}")


def why_not() -> str | None:
    """Returns why this process cannot make network namespaces; None if it can, if need be after ``as_root``."""
    if sys.platform != "linux":
        return "they exist on Linux only"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{missing[0]} is not installed (util-linux and iproute2 have what is needed)"
    prefix = () if os.geteuid() == 0 else AS_ROOT
    allowed = subprocess.run([*prefix, "unshare", "--net", "true"], capture_output=True, timeout=COMMAND_S, check=False)
    return None if allowed.returncode == 0 else "this user may not make them; root may"


def as_root(*arguments: str) -> None:
    """Starts this program again as root of a user namespace of its own, with the same pid, unless it is root. The files
    that it writes belong to the user all the same."""
    if os.geteuid() != 0:
        os.execvp(AS_ROOT[0], [*AS_ROOT, *python_command("-m", "p2p_diloco", *arguments)])
