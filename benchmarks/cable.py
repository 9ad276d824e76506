"""A cable that takes its time: packets cross it some milliseconds after they were sent, in both directions.

    python -m benchmarks.cable DELAY_S PID NAME PID NAME

Kernels that have no netem know no latency. This process has a TUN device in the network namespaces of two processes,
and carries every packet from one to the other when it is due. It ends when its standard input does.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import selectors
import struct
import sys
import time
from collections import deque
from pathlib import Path

DEVICE = "/dev/net/tun"
TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
CLONE_NEWNET = 0x40000000
MAX_PACKET_BYTES = 65_536
BURST = 64
"""Packets that are read before the other side gets its turn."""


def open_device(pid: int, name: str) -> int:
    """Returns the descriptor of a new TUN device in the network namespace of process ``pid``, in which this process is
    from then on. OSError when it cannot be made."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path(f"/proc/{pid}/ns/net").open() as namespace:
        if libc.setns(namespace.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"the network namespace of process {pid} cannot be entered")
    device = os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TUN | IFF_NO_PI))
    return device


class Direction:
    """Packets on their way from one end of a cable to the other."""

    def __init__(self, source: int, target: int, delay_s: float) -> None:
        self.source, self.target = source, target
        self.delay_s = delay_s
        self.under_way: deque[tuple[float, bytes]] = deque()
        """When each is due, and the packet, in the order in which they were sent."""

    def take(self, now_s: float) -> None:
        """Reads what has been sent."""
        with contextlib.suppress(BlockingIOError):
            for _ in range(BURST):
                self.under_way.append((now_s + self.delay_s, os.read(self.source, MAX_PACKET_BYTES)))

    def deliver(self, now_s: float) -> None:
        """Hands over what is due. A device that is down loses it, as a cable would."""
        while self.under_way and self.under_way[0][0] <= now_s:
            with contextlib.suppress(OSError):
                os.write(self.target, self.under_way.popleft()[1])

    def wait_s(self, now_s: float) -> float | None:
        """Returns how long it takes until a packet is due; None if none is under way."""
        return max(0.0, self.under_way[0][0] - now_s) if self.under_way else None


def carry(one: int, other: int, delay_s: float) -> None:
    """Carries packets between two devices until standard input ends."""
    directions = (Direction(one, other, delay_s), Direction(other, one, delay_s))
    with selectors.DefaultSelector() as selector:
        for direction in directions:
            selector.register(direction.source, selectors.EVENT_READ, direction)
        selector.register(sys.stdin.fileno(), selectors.EVENT_READ, None)
        while True:
            now_s = time.monotonic()
            waits_s = [wait_s for direction in directions if (wait_s := direction.wait_s(now_s)) is not None]
            ready = [key.data for key, _ in selector.select(min(waits_s, default=None))]
            if None in ready:
                return
            now_s = time.monotonic()
            for direction in ready:
                direction.take(now_s)
            for direction in directions:
                direction.deliver(now_s)


def main(words: list[str]) -> None:
    delay_s, one, name, other, other_name = words
    devices = open_device(int(one), name), open_device(int(other), other_name)
    print("made", flush=True)
    carry(*devices, float(delay_s))


if __name__ == "__main__":
    main(sys.argv[1:])
